"""The dtype that models are loaded in."""

import pytest
import torch
from models import tiny_model

from pkt_fast.loading import load_model, resolve_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CHECKS = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")


@pytest.fixture
def processor(monkeypatch):
    """Makes torch see a processor with these bfloat16 instructions; None for a torch that does not
    look for them.
    """

    def make(*has):
        for name, present in zip(CHECKS, has, strict=True):
            if present is None:
                monkeypatch.delattr(torch.cpu, name, raising=False)
            else:
                monkeypatch.setattr(torch.cpu, name, lambda present=present: present, raising=False)

    return make


@pytest.mark.parametrize(
    ("has", "wanted"),
    [
        ((True, False), None),
        ((False, True), None),
        ((False, False), torch.float32),
        ((None, None), torch.float32),
    ],
)
def test_auto_keeps_the_checkpoints_dtype_where_the_processor_multiplies_it(has, wanted, processor):
    processor(*has)
    assert resolve_dtype("auto", CPU) == wanted
    assert resolve_dtype("auto", GPU) is None
    assert resolve_dtype("bfloat16", CPU) == torch.bfloat16
    assert resolve_dtype("float64", GPU) == torch.float64


@pytest.mark.parametrize(("has", "loaded"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_bfloat16_checkpoint_is_loaded_so(has, loaded, processor, tmp_path):
    processor(has, has)
    tiny_model("llama").bfloat16().save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=resolve_dtype("auto", CPU))
    assert {parameter.dtype for parameter in model.parameters()} == {loaded}
