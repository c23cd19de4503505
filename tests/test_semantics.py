"""The semantic basis and map against the pseudoinverse and the paper's two steps."""

import pytest
import torch
from models import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from pkt_fast import SemanticBasis, SemanticMap, reference
from pkt_fast.errors import ConfigError, DataError, NumericsError, VocabularyError
from pkt_fast.vocabulary import SharedVocabulary


def head(rows, width, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)


ALIGN = {
    "frame": reference.align_frame,
    "dual": reference.align_dual,
    "logit": reference.align_logit,
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("recompose", ALIGN)
@pytest.mark.parametrize("shape", [(997, 24, 13), (4200, 16, 31), (64, 8, 8)])
def test_map_equals_the_two_steps(recompose, shape, dtype, tolerance):
    vocabulary, wide, narrow = shape
    source, target = head(vocabulary, wide, 1, dtype), head(vocabulary, narrow, 2, dtype)
    hidden = head(19, wide, 3, dtype)
    expected = ALIGN[recompose](hidden.double(), source.double(), target.double())
    mapping = SemanticMap.between(
        SemanticBasis.from_weight(source), SemanticBasis.from_weight(target), recompose
    )
    assert mapping.matrix.dtype == dtype
    got = mapping(hidden).double()
    assert (got - expected).norm() / expected.norm() < tolerance
    grid = mapping(hidden.reshape(19, 1, wide).expand(19, 2, wide))
    torch.testing.assert_close(grid[:, 1].double(), got)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", [(1000, 33), (20, 33), (4097, 5)])
def test_vectors_are_the_unit_rows_of_the_pseudoinverse(shape, dtype, tolerance):
    weight = head(*shape, dtype=dtype)
    expected = reference.semantic_basis(weight.double())
    vectors = SemanticBasis.from_weight(weight).vectors
    assert vectors.dtype == dtype
    assert (vectors.double() - expected).norm() / expected.norm() < tolerance


def test_vectors_make_no_float64_matrix_of_their_own():
    """G, R and G⁻¹ are all the float64 matrices there are while the vectors fill memory."""
    basis = SemanticBasis.from_weight(head(3000, 160, dtype=torch.float32))
    kept = {x.untyped_storage().data_ptr() for x in (basis.gram, basis.factor, basis.inverse)}
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            wide = isinstance(out, torch.Tensor) and out.dtype == torch.float64
            if wide and out.untyped_storage().data_ptr() not in kept:
                made.append((out.numel(), str(func)))
            return out

    with Watch():
        basis.vectors.sum()
    assert made
    assert max(made)[0] < 160 * 160, max(made)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_head_that_is_not_finite_is_refused_wherever_it_is(value):
    weight = head(50, 6)
    weight[31, 4] = value
    with pytest.raises(NumericsError, match="NaN or inf"):
        SemanticBasis.from_weight(weight)


@pytest.mark.parametrize("recompose", ALIGN)
@pytest.mark.parametrize("whole", [True, False])
def test_one_pass_gives_the_map_and_the_round_trip(recompose, whole):
    """Equal to two maps built apart; widths on both sides of what our own kernel takes."""
    source = SemanticBasis.from_weight(head(4500, 40, 1))
    target = SemanticBasis.from_weight(head(4500, 72, 2))
    rows = torch.arange(4500) if whole else torch.arange(0, 4400, 3)
    shared = SharedVocabulary(rows, rows if whole else rows + 100)
    found = SemanticMap.with_round_trip(source, target, recompose, shared)
    alone = SharedVocabulary(shared.target, shared.target)
    expected = (
        SemanticMap.between(source, target, recompose, vocabulary=shared),
        SemanticMap.between(target, target, recompose, vocabulary=alone),
    )
    for got, other in zip(found, expected, strict=True):
        torch.testing.assert_close(got.matrix, other.matrix, rtol=1e-10, atol=1e-11)
        assert (got.recompose, got.shared, got.normalize) == (
            other.recompose, other.shared, other.normalize
        )


@pytest.mark.parametrize("recompose", ["dual", "logit"])
def test_round_trip_is_exact_when_source_is_target(recompose):
    basis = SemanticBasis.from_weight(head(500, 20))
    mapping = SemanticMap.between(basis, basis, recompose)
    torch.testing.assert_close(
        mapping.matrix, torch.eye(20, dtype=torch.float64), atol=1e-10, rtol=0
    )


def test_zero_padding_rows_do_not_disturb_the_map():
    source, target = head(200, 10, 1), head(200, 6, 2)
    padded = [torch.cat([w, torch.zeros(9, w.shape[1], dtype=w.dtype)]) for w in (source, target)]
    for recompose in ALIGN:
        plain = SemanticMap.between(
            SemanticBasis.from_weight(source), SemanticBasis.from_weight(target), recompose
        )
        same = SemanticMap.between(*map(SemanticBasis.from_weight, padded), recompose)
        torch.testing.assert_close(same.matrix, plain.matrix, atol=1e-11, rtol=1e-9)
    assert SemanticBasis.from_weight(padded[0]).vectors[200:].abs().max() == 0


@pytest.mark.parametrize("recompose", ALIGN)
def test_shared_rows_are_matched_by_index_pairs(recompose):
    source, target = head(300, 10, 1), head(301, 6, 2)
    rows = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    vocabulary = SharedVocabulary(torch.arange(300), rows)
    mapping = SemanticMap.between(
        SemanticBasis.from_weight(source),
        SemanticBasis.from_weight(target),
        recompose,
        vocabulary=vocabulary,
    )
    hidden = head(11, 10, 3)
    if recompose == "logit":
        expected = (hidden @ source.T) @ torch.linalg.pinv(target[rows]).T
    else:
        s, t = reference.semantic_basis(source), reference.semantic_basis(target)[rows]
        if recompose == "frame":
            expected = reference.recompose(reference.coefficients(hidden, s), t)
        else:
            expected = (hidden @ s.T) @ torch.linalg.pinv(t).T
    torch.testing.assert_close(mapping(hidden), expected, rtol=1e-9, atol=1e-10)


def test_models_can_be_given_directly():
    source = tiny_model("llama", seed=1, hidden_size=48)
    target = tiny_model("gpt2", seed=2)
    mapping = SemanticMap.between(source, target, "dual")
    assert mapping.matrix.shape[1] == 48
    assert mapping.shared == source.lm_head.weight.shape[0]


def test_basis_survives_a_file(tmp_path):
    basis = SemanticBasis.from_weight(head(120, 9, dtype=torch.float32))
    basis.save(tmp_path / "basis.safetensors")
    again = SemanticBasis.load(tmp_path / "basis.safetensors")
    for name in ("weight", "gram", "factor", "inverse", "vectors"):
        assert torch.equal(getattr(basis, name), getattr(again, name)), name
    assert again.rank == 9
    assert [p.name for p in tmp_path.iterdir()] == ["basis.safetensors"]


def test_bad_files_and_values_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        SemanticBasis.load(tmp_path / "none.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(DataError, match="not a semantic basis"):
        SemanticBasis.load(tmp_path / "junk.safetensors")
    weight = head(20, 4)
    with pytest.raises(ConfigError, match="frame, dual, logit"):
        SemanticMap.between(*[SemanticBasis.from_weight(weight)] * 2, "inverse")
    with pytest.raises(VocabularyError, match="tokenizers"):
        SemanticMap.between(
            SemanticBasis.from_weight(weight), SemanticBasis.from_weight(head(21, 4))
        )
    weight[3, 1] = torch.nan
    with pytest.raises(NumericsError, match="NaN"):
        SemanticBasis.from_weight(weight)
