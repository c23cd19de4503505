// Storage types and the conversions every CUDA kernel needs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels.h"

namespace pkt {
namespace cuda {
namespace {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(f16 x) { return __half2float(x); }

__device__ __forceinline__ void narrow(float x, float* to) { *to = x; }
__device__ __forceinline__ void narrow(float x, bf16* to) { *to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, f16* to) { *to = __float2half_rn(x); }

// kCount values moved in 16-byte pieces when the address allows it.
template <class T, int kCount>
struct alignas(16) Pack {
  static constexpr int pieces = int(kCount * sizeof(T) / 16);
  T values[kCount];

  __device__ __forceinline__ void load(const T* from, int64_t count, bool aligned) {
    if (aligned && count >= kCount) {
#pragma unroll
      for (int i = 0; i < pieces; ++i) {
        reinterpret_cast<int4*>(values)[i] = reinterpret_cast<const int4*>(from)[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (i < count) values[i] = from[i];
      }
    }
  }

  __device__ __forceinline__ void store(T* to, int64_t count, bool aligned) const {
    if (aligned && count >= kCount) {
#pragma unroll
      for (int i = 0; i < pieces; ++i) {
        reinterpret_cast<int4*>(to)[i] = reinterpret_cast<const int4*>(values)[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (i < count) to[i] = values[i];
      }
    }
  }
};

}  // namespace
}  // namespace cuda
}  // namespace pkt
