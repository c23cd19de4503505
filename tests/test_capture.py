"""Captured rows equal hooks written by hand; nothing is left behind on any exit path."""

import threading

import pytest
import torch
from models import tiny_model, token_batch

from pkt_fast import attribute, capture, reference
from pkt_fast.anatomy import Anatomy
from pkt_fast.capture import Activations, Wanted, record
from pkt_fast.config import INTERFACES
from pkt_fast.errors import ConfigError, ModelError
from pkt_fast.pairing import LayerPair


def by_hand(model, layers, interface, inputs):
    taps = {layer: Anatomy.of(model).tap(layer, interface) for layer in layers}
    with torch.no_grad():
        return reference.read_layers(model, taps, inputs)[0]


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()), [
        m for m in model.modules() if "forward" in m.__dict__
    ]


@pytest.mark.parametrize("interface", INTERFACES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox", "granite"])
def test_rows_equal_the_tapped_activations(family, interface):
    model = tiny_model(family, seed=3)
    inputs = token_batch()
    mask = torch.rand(inputs["input_ids"].shape, generator=torch.Generator().manual_seed(0)) < 0.4
    expected = by_hand(model, [0, 2], interface, inputs)
    before = hooks_of(model)
    with capture(model, [0, 2], interface=interface, positions=mask) as acts:
        model(**inputs)
    assert hooks_of(model) == before
    for layer in (0, 2):
        torch.testing.assert_close(acts[layer], expected[layer][mask], rtol=1e-5, atol=1e-6)
        assert not acts[layer].requires_grad


def test_several_passes_append_and_positions_may_change():
    model = tiny_model("llama")
    inputs = token_batch()
    shape = inputs["input_ids"].shape
    first = torch.zeros(shape, dtype=torch.bool)
    first[0, 1] = True
    with capture(model, [1], positions=first) as acts:
        model(**inputs)
        acts.positions = None
        model(**inputs)
    assert len(acts[1]) == 1 + shape.numel()
    torch.testing.assert_close(acts[1][0], acts[1][1 + 1])
    taken = acts.take()
    assert len(taken[1]) == 1 + shape.numel()
    with pytest.raises(KeyError):
        acts[1]


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
def test_normalised_and_cast(dtype):
    model = tiny_model("llama")
    inputs = token_batch()
    expected = by_hand(model, [1], "block", inputs)[1].flatten(0, 1)
    with capture(model, [1], interface="block", normalize=True, dtype=dtype) as acts:
        model(**inputs)
    assert acts[1].dtype == (dtype or torch.float32)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        acts[1].float(), reference.unit_rows(expected), rtol=tolerance, atol=tolerance
    )


def test_positions_are_worked_out_once_a_mask():
    """On a GPU that waits for it; a mask that was edited is another one."""
    acts = Activations(torch.tensor([[True, False, True]]))
    value = torch.zeros(1, 3, 4)
    index = acts.row_index(value)
    assert index.tolist() == [0, 2]
    assert acts.row_index(value) is index
    acts.positions[0, 1] = True
    assert acts.row_index(value).tolist() == [0, 1, 2]
    acts.positions = torch.tensor([[False, True, False]])
    assert acts.row_index(value).tolist() == [1]
    with torch.inference_mode():  # has no count of its edits
        acts.positions = torch.tensor([[True, True, False]])
        assert acts.row_index(value).tolist() == [0, 1]
        acts.positions[0, 1] = False
        assert acts.row_index(value).tolist() == [0]


@pytest.mark.parametrize("interface", INTERFACES)
def test_interpolated_pair(interface):
    model = tiny_model("llama")
    inputs = token_batch()
    read = by_hand(model, [1, 2], interface, inputs)
    wanted = [Wanted.of_pair(LayerPair(target=7, source=(1, 2), weight=0.25))]
    with record(model, wanted, interface) as acts:
        model(**inputs)
    expected = reference.interpolate([read[1], read[2]], 0.25).flatten(0, 1)
    torch.testing.assert_close(acts[7], expected, rtol=1e-5, atol=1e-6)


def test_hooks_go_when_the_model_raises():
    model = tiny_model("llama")
    before = hooks_of(model)
    with pytest.raises(RuntimeError, match="boom"), capture(model, [0]):
        raise RuntimeError("boom")
    assert hooks_of(model) == before


def test_no_graph_is_kept_under_autograd():
    model = tiny_model("llama")
    with capture(model, [0, 3]) as acts:
        loss = model(**token_batch()).logits.sum()
    loss.backward()
    assert acts[0].grad_fn is None
    assert acts[3].grad_fn is None


def test_two_threads_do_not_mix_their_rows():
    model = tiny_model("llama")
    other, found = [], []

    def refused():
        with pytest.raises(ModelError, match="another thread uses"), capture(model, [0]):
            pass
        with pytest.raises(ModelError, match="another thread uses"):
            attribute(model, [])
        other.append(True)

    def probe():
        found.append(Anatomy.of(fresh).num_layers)

    with capture(model, [0]), capture(model, [1]):  # one thread may nest
        thread = threading.Thread(target=refused)
        thread.start()
        thread.join()
    assert other
    fresh = tiny_model("llama")
    threads = [threading.Thread(target=probe) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [4] * 4


def test_bad_arguments_are_refused():
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="interface"), capture(model, [0], interface="heads"):
        pass
    with pytest.raises(ConfigError, match="out of range"), capture(model, [9]):
        pass
    with (
        pytest.raises(ConfigError, match="one boolean per token"),
        capture(model, [0], positions=torch.ones(1, 3, dtype=torch.bool)),
    ):
        model(**token_batch())
