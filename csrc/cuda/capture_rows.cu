// Gather, combine, normalise and cast rows of device memory straight into pinned host memory.
//
// One block per row, two passes: the second finds the row in the cache.  Arithmetic is in double,
// so that no finite row overflows; the bus to the host is the limit, not the multiplications.
#include "cuda/cuda_kernels.h"
#include "cuda/storage.cuh"

namespace pkt {
namespace cuda {
namespace {

constexpr int kThreads = 256;

template <class In>
__device__ __forceinline__ const In* row_of(const Activation& x, int64_t batch, int64_t row) {
  if (x.data == nullptr) return nullptr;
  return static_cast<const In*>(x.data) + batch * x.batch_stride + row * x.row_stride;
}

template <class In>
struct Sources {
  const In *value, *minus, *other, *other_minus;
  double a, b;

  __device__ __forceinline__ double at(int64_t i) const {
    double x = widen(value[i]);
    if (minus) x -= widen(minus[i]);
    x *= a;
    if (other) {
      double y = widen(other[i]);
      if (other_minus) y -= widen(other_minus[i]);
      x += b * y;
    }
    return x;
  }
};

__device__ double block_sum(double x) {
  __shared__ double partial[kThreads / 32];
#pragma unroll
  for (int shift = 16; shift > 0; shift /= 2) x += __shfl_down_sync(0xffffffffu, x, shift);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) total += partial[i];
  return total;
}

template <class In, class Out>
__global__ void __launch_bounds__(kThreads)
    capture_kernel(const CaptureRows job, int64_t rows, bool aligned) {
  constexpr int wide = int(16 / sizeof(Out));
  const int64_t n = blockIdx.x, flat = job.index[n];
  Out* const out = static_cast<Out*>(job.out) + n * job.out_stride;
  const bool inside = flat >= 0 && flat < rows;
  const int64_t batch = inside ? flat / job.rows_per_batch : 0;
  const int64_t row = inside ? flat % job.rows_per_batch : 0;
  const Sources<In> from{row_of<In>(job.value, batch, row), row_of<In>(job.minus, batch, row),
                         row_of<In>(job.other, batch, row), row_of<In>(job.other_minus, batch, row),
                         job.scale * (job.other.data ? 1 - job.lam : 1), job.scale * job.lam};
  double factor = inside ? 1.0 : __longlong_as_double(0x7ff8000000000000LL);
  if (job.normalize && inside) {
    double squares = 0;
    for (int64_t i = threadIdx.x; i < job.dim; i += kThreads) {
      const double x = from.at(i);
      squares += x * x;
    }
    squares = block_sum(squares);
    factor = squares > 0 ? 1 / sqrt(squares) : 0.0;
  }
  for (int64_t i = int64_t(threadIdx.x) * wide; i < job.dim; i += int64_t(kThreads) * wide) {
    const int64_t count = job.dim - i;
    Pack<Out, wide> pack;
#pragma unroll
    for (int k = 0; k < wide; ++k) {
      if (k < count) narrow(float((inside ? from.at(i + k) : 1.0) * factor), &pack.values[k]);
    }
    pack.store(out + i, count, aligned);
  }
}

template <class In, class Out>
void launch(const CaptureRows& job, int64_t rows, cudaStream_t stream) {
  const bool aligned = reinterpret_cast<std::uintptr_t>(job.out) % 16 == 0 &&
                       job.out_stride * int64_t(sizeof(Out)) % 16 == 0;
  capture_kernel<In, Out><<<unsigned(job.count), kThreads, 0, stream>>>(job, rows, aligned);
}

template <class In>
void launch_to(const CaptureRows& job, int64_t rows, cudaStream_t stream) {
  if (job.out_dtype == kFloat32) launch<In, float>(job, rows, stream);
  if (job.out_dtype == kBFloat16) launch<In, bf16>(job, rows, stream);
  if (job.out_dtype == kFloat16) launch<In, f16>(job, rows, stream);
}

}  // namespace

const char* capture_rows_pinned(const CaptureRows& job, int64_t rows,
                                std::uintptr_t stream_handle) {
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  if (job.count == 0 || job.dim == 0) return nullptr;
  if (job.count > 0x7fffffff) return "too many rows for one launch";
  if (job.dtype == kFloat32) launch_to<float>(job, rows, stream);
  if (job.dtype == kBFloat16) launch_to<bf16>(job, rows, stream);
  if (job.dtype == kFloat16) launch_to<f16>(job, rows, stream);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace pkt
