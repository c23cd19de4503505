// W += s·left·right over a list of matrices in one launch: every element is read and written once.
//
// A block takes a tile of 32 × 256 elements.  Its slices of the factors go through shared memory,
// 16 ranks at a time; a thread holds 4 × 8 sums in registers and moves W in 16-byte pieces.  With 128
// registers a thread, two blocks fit a multiprocessor.
#include <cstring>
#include <vector>

#include "cuda/cuda_kernels.h"
#include "cuda/storage.cuh"
#include "philox.h"

namespace pkt {
namespace cuda {
namespace {

constexpr int kTileRows = 32, kTileColumns = 256, kRanks = 16;
constexpr int kWide = 8;  // columns of one thread
constexpr int kAcross = kTileColumns / kWide;  // threads along a row: one warp
constexpr int kThreads = 256;
constexpr int kDown = kThreads / kAcross;  // rows a block touches at once
constexpr int kTall = kTileRows / kDown;  // rows of one thread

struct Entry {
  Matrix matrix;
  int64_t first_tile, tiles_across;
  bool aligned;
};

__device__ __forceinline__ float element(const Factor& factor, int64_t row, int64_t column) {
  const int64_t at = row * factor.row_stride + column * factor.column_stride;
  switch (factor.dtype) {
    case kFloat32: return static_cast<const float*>(factor.data)[at];
    case kFloat64: return float(static_cast<const double*>(factor.data)[at]);
    case kBFloat16: return widen(static_cast<const bf16*>(factor.data)[at]);
    default: return widen(static_cast<const f16*>(factor.data)[at]);
  }
}

__device__ __forceinline__ bool finite(float x) { return fabsf(x) <= 3.4028235e38f; }

__device__ __forceinline__ void stochastic(float x, uint32_t, float* to) { *to = x; }
__device__ __forceinline__ void stochastic(float x, uint32_t word, bf16* to) {
  if (!finite(x)) return narrow(x, to);
  *to = __ushort_as_bfloat16(uint16_t(stochastic_bf16(__float_as_uint(x), word)));
}
__device__ __forceinline__ void stochastic(float x, uint32_t word, f16* to) {
  if (!finite(x)) return narrow(x, to);
  *to = __ushort_as_half(uint16_t(stochastic_f16(fabsf(x), __float_as_uint(x), word)));
}

template <class T>
__device__ void update_tile(const Entry& entry, int64_t tile, uint32_t number, bool random,
                            uint64_t seed, int64_t* unchanged, float (*left)[kRanks],
                            float (*right)[kTileColumns]) {
  const Matrix& matrix = entry.matrix;
  const int64_t top = tile / entry.tiles_across * kTileRows;
  const int64_t start = tile % entry.tiles_across * kTileColumns;
  const int lane = threadIdx.x % kAcross, slot = threadIdx.x / kAcross;
  const int64_t column = start + lane * kWide;

  float sums[kTall][kWide] = {};
  for (int64_t from = 0; from < matrix.rank; from += kRanks) {
    for (int i = threadIdx.x; i < kTileRows * kRanks; i += kThreads) {
      const int64_t row = top + i / kRanks, k = from + i % kRanks;
      left[i / kRanks][i % kRanks] =
          row < matrix.rows && k < matrix.rank ? element(matrix.left, row, k) : 0.0f;
    }
    for (int i = threadIdx.x; i < kRanks * kTileColumns; i += kThreads) {
      const int64_t k = from + i / kTileColumns, at = start + i % kTileColumns;
      right[i / kTileColumns][i % kTileColumns] =
          k < matrix.rank && at < matrix.columns ? element(matrix.right, k, at) : 0.0f;
    }
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < kRanks; ++k) {
      float across[kWide];
#pragma unroll
      for (int i = 0; i < kWide; i += 4) {
        *reinterpret_cast<float4*>(across + i) =
            *reinterpret_cast<const float4*>(&right[k][lane * kWide + i]);
      }
#pragma unroll
      for (int m = 0; m < kTall; ++m) {
        const float down = left[slot + m * kDown][k];
#pragma unroll
        for (int i = 0; i < kWide; ++i) sums[m][i] = fmaf(down, across[i], sums[m][i]);
      }
    }
    __syncthreads();
  }

  const float scale = float(matrix.scale);
  const int64_t count = matrix.columns - column;  // not positive beyond the last column
  int same = 0;
#pragma unroll
  for (int m = 0; m < kTall; ++m) {
    const int64_t row = top + slot + m * kDown;
    if (row >= matrix.rows || count <= 0) continue;
    T* const w = static_cast<T*>(matrix.weight) + row * matrix.stride + column;
    Pack<T, kWide> old, now;
    old.load(w, count, entry.aligned);
    if (matrix.backup) {
      T* const backup = static_cast<T*>(matrix.backup) + row * matrix.backup_stride + column;
      old.store(backup, count, entry.aligned);
    }
    uint32_t words[kWide];
    if (random) {
      philox(seed, uint32_t(column / 4), uint32_t(row), number, words);
      philox(seed, uint32_t(column / 4 + 1), uint32_t(row), number, words + 4);
    }
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      if (i >= count) break;
      const float x = fmaf(sums[m][i], scale, widen(old.values[i]));
      if (random) {
        stochastic(x, words[i], &now.values[i]);
      } else {
        narrow(x, &now.values[i]);
      }
      same += widen(now.values[i]) == widen(old.values[i]);
    }
    now.store(w, count, entry.aligned);
  }
#pragma unroll
  for (int shift = 16; shift > 0; shift /= 2) same += __shfl_down_sync(0xffffffffu, same, shift);
  if (lane == 0 && same > 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(unchanged + number),
              static_cast<unsigned long long>(same));
  }
}

__global__ void __launch_bounds__(kThreads)
    inject_kernel(const Entry* entries, int count, bool random, uint64_t seed,
                  int64_t* unchanged) {
  __shared__ float left[kTileRows][kRanks];
  __shared__ __align__(16) float right[kRanks][kTileColumns];
  // The last matrix whose first tile is not beyond this block's.
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (entries[middle].first_tile <= int64_t(blockIdx.x)) low = middle;
    else high = middle - 1;
  }
  const Entry entry = entries[low];
  const int64_t tile = int64_t(blockIdx.x) - entry.first_tile;
  const uint32_t number = uint32_t(low);
  switch (entry.matrix.dtype) {
    case kFloat32:
      return update_tile<float>(entry, tile, number, false, seed, unchanged, left, right);
    case kBFloat16:
      return update_tile<bf16>(entry, tile, number, random, seed, unchanged, left, right);
    default:
      return update_tile<f16>(entry, tile, number, random, seed, unchanged, left, right);
  }
}

bool sixteen_bytes(const void* data, int64_t stride, int dtype) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride * item_size(dtype) % 16 == 0;
}

const char* message(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* problem() {
  // Fails where the driver is older than the runtime, and where no code for the device is here.
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, inject_kernel);
  cudaGetLastError();  // so that a later call does not find this error
  return message(error);
}

std::size_t inject_table_bytes(std::int64_t count) { return std::size_t(count) * sizeof(Entry); }

const char* inject(const Inject& job, void* table, std::uintptr_t stream_handle) {
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  std::vector<Entry> entries;
  int64_t tiles = 0;
  for (int64_t g = 0; g < job.count; ++g) {
    const Matrix& m = job.matrices[g];
    const int64_t across = (m.columns + kTileColumns - 1) / kTileColumns;
    const int64_t down = (m.rows + kTileRows - 1) / kTileRows;
    const bool aligned =
        sixteen_bytes(m.weight, m.stride, m.dtype) &&
        (m.backup == nullptr || sixteen_bytes(m.backup, m.backup_stride, m.dtype));
    entries.push_back({m, tiles, across, aligned});
    tiles += across * down;
  }
  if (tiles == 0) return nullptr;
  if (tiles > 0x7fffffff) return "too many tiles for one launch";
  // Pageable memory: the copy has read `entries` when the call returns.
  const cudaError_t error = cudaMemcpyAsync(table, entries.data(), inject_table_bytes(job.count),
                                            cudaMemcpyHostToDevice, stream);
  if (error != cudaSuccess) return message(error);
  inject_kernel<<<unsigned(tiles), kThreads, 0, stream>>>(static_cast<const Entry*>(table),
                                                         int(entries.size()), job.stochastic,
                                                         job.seed, job.unchanged);
  return message(cudaGetLastError());
}

}  // namespace cuda
}  // namespace pkt
