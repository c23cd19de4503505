from __future__ import annotations

import pytest
import torch
from kernel_checks import DTYPES, assert_close, bound, extreme_rows, poison, rows
from op_cases import far_apart

from pkt_fast import reference
from pkt_fast.errors import BackendError

kernel = pytest.importorskip("pkt_fast.kernels.capture_rows")


def capture(count, index, value, minus=None, other=None, other_minus=None, **options):
    """Rows written at offset 3 of a poisoned store; nothing else may be touched."""
    settings = {"lam": 0.0, "scale": 1.0, "normalize": False} | options
    dtype = settings.pop("dtype", value.dtype)
    out = poison(count + 7, value.shape[-1], dtype=dtype, device=value.device)
    kernel.capture_rows(out, 3, index, value, minus, other, other_minus, *settings.values())
    assert out[:3].isnan().all()
    assert out[3 + count :].isnan().all()
    return out[3 : 3 + count]


def expect(index, value, *companions, **options):
    doubles = [None if x is None else x.double().flatten(0, -2) for x in (value, *companions)]
    value, minus, other, other_minus = doubles + [None] * (4 - len(doubles))
    return reference.gather_rows(
        value, index, minus=minus, other=other, other_minus=other_minus, **options
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operands", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("normalize", [False, True])
def test_every_combination_of_operands(dtype, operands, normalize, device):
    value, minus, other, other_minus = (rows(40, 37, dtype, device) for _ in range(4))
    given = {
        1: (value,), 2: (value, minus), 3: (value, None, other),
        4: (value, minus, other, other_minus), 5: (value, minus, other),
        6: (value, None, other, other_minus),
    }[operands]  # fmt: skip
    index = torch.randint(40, (29,), device=device)
    options = {"lam": 0.25 if operands > 2 else 0.0, "scale": -1.5, "normalize": normalize}
    # One float32 norm over 37 squares; un-normalised elements reach about 10.
    assert_close(
        capture(29, index, *given, **options),
        expect(index, *given, **options),
        bound(dtype, 37),
        scale=1.0 if normalize else 10.0,
    )


@pytest.mark.parametrize("width", [1, 2, 16, 31, 64, 127, 1000, 2049, 4096])
@pytest.mark.parametrize("count", [1, 5])
def test_odd_shapes(width, count, device):
    value = rows(6, width, torch.bfloat16, device)
    index = torch.randperm(6, device=device)[:count]
    got = capture(count, index, value, normalize=True)
    assert_close(got, expect(index, value, normalize=True), bound(torch.bfloat16, width))


@pytest.mark.parametrize("store", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_casts_between_storage_dtypes(dtype, store, device):
    value = rows(9, 70, dtype, device)
    index = torch.arange(9, device=device)
    got = capture(9, index, value, dtype=store, normalize=True)
    assert_close(got, expect(index, value, normalize=True), bound(store, 70))


def test_batched_input_with_odd_strides(device):
    value = torch.randn(4, 7, 50, device=device)[1:, 2:, 5:38]
    minus = torch.randn(5, 3, 33, device=device).transpose(0, 1)
    index = torch.tensor([14, 0, 3, 7, 7], device=device)
    got = capture(5, index, value, minus)
    assert_close(got, expect(index, value, minus), bound(torch.float32, 1), scale=5.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_norms(dtype, device):
    value = extreme_rows(16, 45, dtype, device)
    index = torch.arange(16, device=device)
    got = capture(16, index, value, normalize=True, scale=3.0, dtype=torch.float32)
    assert_close(got, expect(index, value, normalize=True), bound(torch.float32, 45))
    assert (got[::4] == 0).all()


def test_difference_of_the_largest_floats(device):
    value = torch.full((1, 8), torch.finfo(torch.float32).max, device=device)
    index = torch.zeros(1, dtype=torch.int64, device=device)
    got = capture(1, index, value, -value, normalize=True)
    assert_close(got, torch.full((1, 8), 8**-0.5, device=device).double(), bound(torch.float32, 8))


def test_scale_of_zero_gives_zero_rows(device):
    value = rows(3, 8, torch.float32, device)
    index = torch.arange(3, device=device)
    assert (capture(3, index, value, scale=0.0, normalize=True) == 0).all()


def test_offsets_beyond_32_bits(device):
    value = far_apart(4, 40, 1 << 30, device)
    index = torch.tensor([3, 0, 2], device=device)
    got = capture(3, index, value, normalize=True)
    assert_close(got, expect(index, value, normalize=True), bound(torch.float16, 40))


def test_an_index_out_of_range_gives_nan(device):
    value = rows(9, 40, torch.float32, device).view(3, 3, 40)
    index = torch.tensor([8, -1, 9, 1 << 40, 0], device=device)
    out = poison(5, 40, dtype=torch.float32, device=device)
    kernel.capture_rows(out, 0, index, value, None, None, None, 0.0, 1.0, True)
    assert out.isnan().all(1).tolist() == [False, True, True, True, False]
    assert_close(out[::4], expect(index[::4], value, normalize=True), bound(torch.float32, 40))


def test_a_store_with_gaps_between_channels_is_left_to_the_reference(device):
    from pkt_fast.ops import _registry

    value, index = rows(3, 8, torch.float32, device), torch.arange(3, device=device)
    rest = (0, index, value, None, None, None, 0.0, 1.0, False)
    with _registry.backend("triton"):
        assert _registry.select("capture_rows", device, (value.new_empty(3, 8), *rest)) == "triton"
        with pytest.raises(BackendError, match="capture_rows"):
            _registry.select("capture_rows", device, (value.new_empty(8, 3).T, *rest))


def test_no_rows(device):
    value = rows(3, 8, torch.float32, device)
    capture(0, torch.zeros(0, dtype=torch.int64, device=device), value)


def test_nan_in_an_activation_is_not_hidden(device):
    value = rows(2, 8, torch.float32, device)
    value[1, 3] = float("nan")
    got = capture(2, torch.arange(2, device=device), value, normalize=True)
    assert got[0].isfinite().all()
    assert got[1].isnan().any()
