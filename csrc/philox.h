// The random words of stochastic rounding, the same on every backend (see pkt_fast/ops/inject.py).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define PKT_BOTH __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define PKT_BOTH inline __attribute__((always_inline))
#else
#define PKT_BOTH inline
#endif

namespace pkt {
namespace {

constexpr uint32_t kPhiloxFactor0 = 0xD2511F53u, kPhiloxFactor1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxStep0 = 0x9E3779B9u, kPhiloxStep1 = 0xBB67AE85u;

// Philox-4x32-10 with key `seed` and counter (quad, row, matrix, 0): the words of elements
// 4·quad … 4·quad + 3 of one row of one matrix.
PKT_BOTH void philox(uint64_t seed, uint32_t quad, uint32_t row, uint32_t matrix, uint32_t* words) {
  uint32_t c0 = quad, c1 = row, c2 = matrix, c3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#if defined(__CUDACC__)
#pragma unroll
#elif defined(__GNUC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(kPhiloxFactor0) * c0, p1 = uint64_t(kPhiloxFactor1) * c2;
    const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    c0 = n0;
    c2 = n2;
    k0 += kPhiloxStep0;
    k1 += kPhiloxStep1;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// Bits of bfloat16 and float16 neighbours of a finite float, chosen by a random word: away from zero
// where the word's high 24 bits are below the fraction of the way there.
PKT_BOTH uint32_t stochastic_bf16(uint32_t bits, uint32_t word) {
  return (bits >> 16) + ((word >> 8) < ((bits & 0xffffu) << 8) ? 1u : 0u);
}

PKT_BOTH uint32_t stochastic_f16(float magnitude, uint32_t bits, uint32_t word) {
  if (magnitude >= 65536.0f) return (bits >> 16 & 0x8000u) | 0x7c00u;
  const uint32_t exponent = bits >> 23 & 0xffu;
  // Steps of 2^(e-10), and of 2^-24 where float16 is subnormal; then the bits count the steps.
  const uint32_t base = exponent > 113u ? exponent : 113u;
  // 2^(10 - e) has the biased exponent 137 + 127 - base.
  const uint32_t inverse_bits = (264u - base) << 23;
  float inverse;
#if defined(__CUDA_ARCH__)
  inverse = __uint_as_float(inverse_bits);
#else
  std::memcpy(&inverse, &inverse_bits, 4);
#endif
  const float steps = magnitude * inverse;
  const uint32_t whole = uint32_t(steps);
  const float fraction = steps - float(whole);
  const uint32_t up = float(word >> 8) < fraction * 16777216.0f ? 1u : 0u;
  // A normal number holds 1024 steps of its own exponent already.
  const uint32_t offset = exponent >= 113u ? (exponent - 113u) << 10 : 0u;
  return (bits >> 16 & 0x8000u) | (offset + whole + up);
}

}  // namespace
}  // namespace pkt
