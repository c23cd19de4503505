"""A launch of the kernels' tanh alone."""

import triton
import triton.language as tl
from pkt_fast.kernels._heads import tanh


@triton.jit
def tanh_kernel(X, Out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < count, other=0.0)
    tl.store(Out + at, tanh(x), mask=at < count)
