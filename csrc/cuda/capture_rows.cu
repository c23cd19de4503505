// Gather, combine, normalise and cast rows of device memory straight into pinned host memory.
//
// One block per row, two passes: the second finds the row in the cache.  Both sides move 16 bytes at a
// time where rows are aligned; the tail of a row, and rows that are not, go element by element.
// Arithmetic is in double, so that no finite row overflows; the bus to the host is the limit, not the
// multiplications.
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

// The combined row, kWide elements at a time, each operand in 16-byte loads where all are aligned.
template <class In, int kWide>
struct Sources {
  const In *value, *minus, *other, *other_minus;
  double a, b;
  bool aligned;

  __device__ __forceinline__ void add(const In* from, int64_t i, int64_t count, double factor,
                                      double (&x)[kWide]) const {
    if (from == nullptr) return;
    Pack<In, kWide> pack;
    pack.load(from + i, count, aligned);
#pragma unroll
    for (int k = 0; k < kWide; ++k) {
      if (k < count) x[k] += factor * widen(pack.values[k]);
    }
  }

  __device__ __forceinline__ void at(int64_t i, int64_t count, double (&x)[kWide]) const {
#pragma unroll
    for (int k = 0; k < kWide; ++k) x[k] = 0;
    add(value, i, count, a, x);
    add(minus, i, count, -a, x);
    add(other, i, count, b, x);
    add(other_minus, i, count, -b, x);
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
    capture_kernel(const CaptureRows job, int64_t rows, bool aligned_in, bool aligned_out) {
  // 16 bytes of the narrower storage, a whole number of them of the wider.
  constexpr int wide = 16 / int(sizeof(In) < sizeof(Out) ? sizeof(In) : sizeof(Out));
  const int64_t n = blockIdx.x, flat = job.index[n];
  Out* const out = static_cast<Out*>(job.out) + n * job.out_stride;
  const bool inside = flat >= 0 && flat < rows;
  const int64_t batch = inside ? flat / job.rows_per_batch : 0;
  const int64_t row = inside ? flat % job.rows_per_batch : 0;
  const Sources<In, wide> from{
      row_of<In>(job.value, batch, row),       row_of<In>(job.minus, batch, row),
      row_of<In>(job.other, batch, row),       row_of<In>(job.other_minus, batch, row),
      job.scale * (job.other.data ? 1 - job.lam : 1), job.scale * job.lam, aligned_in};
  const int64_t first = int64_t(threadIdx.x) * wide, step = int64_t(kThreads) * wide;
  // Nothing is read for an index outside the rows: the tensor may not have a row at all.
  const int64_t readable = inside ? job.dim : 0;
  double x[wide];
  double factor = inside ? 1.0 : __longlong_as_double(0x7ff8000000000000LL);
  if (job.normalize && inside) {
    double squares = 0;
    for (int64_t i = first; i < job.dim; i += step) {
      from.at(i, job.dim - i, x);
#pragma unroll
      for (int k = 0; k < wide; ++k) squares += x[k] * x[k];
    }
    squares = block_sum(squares);
    factor = squares > 0 ? 1 / sqrt(squares) : 0.0;
  }
  for (int64_t i = first; i < job.dim; i += step) {
    from.at(i, readable - i, x);
    Pack<Out, wide> pack;
#pragma unroll
    for (int k = 0; k < wide; ++k) narrow(float(x[k] * factor), &pack.values[k]);
    pack.store(out + i, job.dim - i, aligned_out);
  }
}

bool sixteen_bytes(const Activation& x, int64_t item) {
  return reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 && x.batch_stride * item % 16 == 0 &&
         x.row_stride * item % 16 == 0;
}

template <class In, class Out>
void launch(const CaptureRows& job, int64_t rows, cudaStream_t stream) {
  bool aligned_in = true;
  for (const Activation* x : {&job.value, &job.minus, &job.other, &job.other_minus}) {
    aligned_in = aligned_in && sixteen_bytes(*x, sizeof(In));
  }
  const bool aligned_out = sixteen_bytes({job.out, 0, job.out_stride}, sizeof(Out));
  capture_kernel<In, Out>
      <<<unsigned(job.count), kThreads, 0, stream>>>(job, rows, aligned_in, aligned_out);
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
