// Vectors of float and double for one instruction set, and conversions to storage types.
//
// Included by every kernel source, which is compiled once per instruction set.  Everything lives in
// an unnamed namespace inside pkt::<isa>: an inline function shared between objects could be linked
// from the AVX-512 object into code that must run without it.  For the same reason nothing here
// instantiates a standard library template.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(PKT_ISA_avx512) || defined(PKT_ISA_avx2)
#include <immintrin.h>
#endif

#include "kernels.h"

#if defined(__GNUC__)
#define PKT_INLINE inline __attribute__((always_inline))
#define PKT_PREFETCH(address) __builtin_prefetch(address)
#else
#define PKT_INLINE inline
#define PKT_PREFETCH(address) ((void)0)
#endif

namespace pkt {
namespace PKT_ISA {
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

PKT_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

PKT_INLINE float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

// ------------------------------------------------------------------------------- one value

PKT_INLINE float widen(float x) { return x; }
PKT_INLINE double widen(double x) { return x; }
PKT_INLINE float widen(bf16 x) { return float_of(uint32_t(x.bits) << 16); }

PKT_INLINE void narrow(float x, float* to) { *to = x; }
PKT_INLINE void narrow(double x, double* to) { *to = x; }

PKT_INLINE void narrow(float x, bf16* to) {
  const uint32_t u = bits_of(x);
  // Round to nearest even; a NaN must not be carried into an infinity.
  to->bits = x == x ? uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16) : uint16_t(0x7fc0);
}

#if defined(PKT_ISA_avx512) || defined(PKT_ISA_avx2)
PKT_INLINE float widen(f16 x) { return _cvtsh_ss(x.bits); }
PKT_INLINE void narrow(float x, f16* to) { to->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__aarch64__) && defined(__GNUC__)
PKT_INLINE float widen(f16 x) {
  __fp16 h;
  std::memcpy(&h, &x, 2);
  return h;
}
PKT_INLINE void narrow(float x, f16* to) {
  const __fp16 h = __fp16(x);
  std::memcpy(to, &h, 2);
}
#else
PKT_INLINE float widen(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t rest = uint32_t(x.bits & 0x7fffu);
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // 2^112 moves the exponent bias from 15 to 127 and makes subnormals normal.
  return float_of(sign | bits_of(float_of(rest << 13) * float_of(0x77800000u)));
}
PKT_INLINE void narrow(float x, f16* to) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000u;
  const float magnitude = float_of(bits_of(x) & 0x7fffffffu);
  uint32_t half;
  if (x != x) {
    half = 0x7e00u;
  } else if (magnitude >= 65520.0f) {
    half = 0x7c00u;
  } else if (magnitude < 6.103515625e-05f) {
    // Adding 0.5 leaves the subnormal, rounded to nearest even, in the low mantissa bits.
    half = bits_of(magnitude + 0.5f) - 0x3f000000u;
  } else {
    const uint32_t u = bits_of(magnitude);
    half = (u + 0xfffu + ((u >> 13) & 1u) - (112u << 23)) >> 13;
  }
  to->bits = uint16_t(sign | half);
}
#endif

// ----------------------------------------------------------------------- vectors of float

#if defined(PKT_ISA_avx512)

struct F32 {
  static constexpr int width = 16;
  __m512 r;
};
PKT_INLINE F32 splat(float x) { return {_mm512_set1_ps(x)}; }
PKT_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.r, b.r)}; }
PKT_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.r, b.r)}; }
PKT_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.r, b.r)}; }
PKT_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.r, b.r, c.r)}; }
PKT_INLINE F32 abs(F32 a) { return {_mm512_abs_ps(a.r)}; }
// A NaN stays one: these instructions return their second operand beside it.
PKT_INLINE F32 clamp(F32 a, F32 limit) {
  return {_mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), limit.r), _mm512_min_ps(limit.r, a.r))};
}
PKT_INLINE float sum(F32 a) { return _mm512_reduce_add_ps(a.r); }
PKT_INLINE int equal_lanes(F32 a, F32 b) {
  return _mm_popcnt_u32(_mm512_cmp_ps_mask(a.r, b.r, _CMP_EQ_OQ));
}

PKT_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
PKT_INLINE F32 load(const bf16* p) {
  const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(u), 16))};
}
PKT_INLINE F32 load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// The bfloat16 bits, rounded to nearest even, in the high half of every 32-bit lane.
PKT_INLINE __m512i rounded(F32 a) {
  const __m512i u = _mm512_castps_si512(a.r);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.r, a.r, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(sum, nan, _mm512_set1_epi32(0x7fc00000));
}
PKT_INLINE __m256i packed(F32 a, const bf16*) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(a), 16));
}
PKT_INLINE __m256i packed(F32 a, const f16*) {
  return _mm512_cvtps_ph(a.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
PKT_INLINE void store(float* p, F32 a) { _mm512_storeu_ps(p, a.r); }
PKT_INLINE void stream(float* p, F32 a) { _mm512_stream_ps(p, a.r); }
template <class Half>
PKT_INLINE void store(Half* p, F32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed(a, p));
}
template <class Half>
PKT_INLINE void stream(Half* p, F32 a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), packed(a, p));
}

#elif defined(PKT_ISA_avx2)

struct F32 {
  static constexpr int width = 8;
  __m256 r;
};
PKT_INLINE F32 splat(float x) { return {_mm256_set1_ps(x)}; }
PKT_INLINE F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.r, b.r)}; }
PKT_INLINE F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.r, b.r)}; }
PKT_INLINE F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.r, b.r)}; }
PKT_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.r, b.r, c.r)}; }
PKT_INLINE F32 abs(F32 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.r)}; }
// A NaN stays one: these instructions return their second operand beside it.
PKT_INLINE F32 clamp(F32 a, F32 limit) {
  return {_mm256_max_ps(_mm256_sub_ps(_mm256_setzero_ps(), limit.r), _mm256_min_ps(limit.r, a.r))};
}
PKT_INLINE float sum(F32 a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.r), _mm256_extractf128_ps(a.r, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}
PKT_INLINE int equal_lanes(F32 a, F32 b) {
  return _mm_popcnt_u32(uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.r, b.r, _CMP_EQ_OQ))));
}

PKT_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
PKT_INLINE F32 load(const bf16* p) {
  const __m128i u = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(u), 16))};
}
PKT_INLINE F32 load(const f16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
// The bfloat16 bits, rounded to nearest even, in the high half of every 32-bit lane.
PKT_INLINE __m256i rounded(F32 a) {
  const __m256i u = _mm256_castps_si256(a.r);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  // All bits set is a NaN too.
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.r, a.r, _CMP_UNORD_Q));
  return _mm256_or_si256(sum, nan);
}
PKT_INLINE __m128i packed(F32 a, const bf16*) {
  const __m256i high = _mm256_srli_epi32(rounded(a), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
PKT_INLINE __m128i packed(F32 a, const f16*) {
  return _mm256_cvtps_ph(a.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
PKT_INLINE void store(float* p, F32 a) { _mm256_storeu_ps(p, a.r); }
PKT_INLINE void stream(float* p, F32 a) { _mm256_stream_ps(p, a.r); }
template <class Half>
PKT_INLINE void store(Half* p, F32 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed(a, p));
}
template <class Half>
PKT_INLINE void stream(Half* p, F32 a) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), packed(a, p));
}

#else

#if defined(__GNUC__)
typedef float FloatLanes __attribute__((vector_size(16)));
constexpr int kFloatLanes = 4;
PKT_INLINE float& lane(FloatLanes& r, int i) { return reinterpret_cast<float*>(&r)[i]; }
#else
typedef float FloatLanes;
constexpr int kFloatLanes = 1;
PKT_INLINE float& lane(FloatLanes& r, int) { return r; }
#endif

struct F32 {
  static constexpr int width = kFloatLanes;
  FloatLanes r;
};
PKT_INLINE F32 operator+(F32 a, F32 b) { return {a.r + b.r}; }
PKT_INLINE F32 operator-(F32 a, F32 b) { return {a.r - b.r}; }
PKT_INLINE F32 operator*(F32 a, F32 b) { return {a.r * b.r}; }
PKT_INLINE F32 fma(F32 a, F32 b, F32 c) { return {a.r * b.r + c.r}; }
PKT_INLINE F32 splat(float x) {
  F32 a;
  for (int i = 0; i < F32::width; ++i) lane(a.r, i) = x;
  return a;
}
PKT_INLINE F32 abs(F32 a) {
  for (int i = 0; i < F32::width; ++i) lane(a.r, i) = std::fabs(lane(a.r, i));
  return a;
}
PKT_INLINE F32 clamp(F32 a, F32 limit) {
  for (int i = 0; i < F32::width; ++i) {
    const float top = lane(limit.r, i);
    lane(a.r, i) = lane(a.r, i) > top ? top : lane(a.r, i) < -top ? -top : lane(a.r, i);
  }
  return a;
}
PKT_INLINE int equal_lanes(F32 a, F32 b) {
  int count = 0;
  for (int i = 0; i < F32::width; ++i) count += lane(a.r, i) == lane(b.r, i);
  return count;
}
PKT_INLINE float sum(F32 a) {
  float total = lane(a.r, 0);
  for (int i = 1; i < F32::width; ++i) total += lane(a.r, i);
  return total;
}
template <class T>
PKT_INLINE F32 load(const T* p) {
  F32 a;
  for (int i = 0; i < F32::width; ++i) lane(a.r, i) = widen(p[i]);
  return a;
}
template <class T>
PKT_INLINE void store(T* p, F32 a) {
  for (int i = 0; i < F32::width; ++i) narrow(lane(a.r, i), p + i);
}
template <class T>
PKT_INLINE void stream(T* p, F32 a) {
  store(p, a);
}

#endif

// Streaming stores are weakly ordered: fence before another thread may read.
PKT_INLINE void stream_fence() {
#if defined(PKT_ISA_avx512) || defined(PKT_ISA_avx2)
  _mm_sfence();
#endif
}

// ---------------------------------------------------------------------- vectors of double

#if defined(PKT_ISA_avx512)
typedef double DoubleLanes __attribute__((vector_size(64)));
constexpr int kDoubleLanes = 8;
PKT_INLINE double& lane(DoubleLanes& r, int i) { return reinterpret_cast<double*>(&r)[i]; }
#elif defined(__GNUC__)
typedef double DoubleLanes __attribute__((vector_size(32)));
constexpr int kDoubleLanes = 4;
PKT_INLINE double& lane(DoubleLanes& r, int i) { return reinterpret_cast<double*>(&r)[i]; }
#else
typedef double DoubleLanes;
constexpr int kDoubleLanes = 1;
PKT_INLINE double& lane(DoubleLanes& r, int) { return r; }
#endif

struct F64 {
  static constexpr int width = kDoubleLanes;
  DoubleLanes r;
};
PKT_INLINE F64 operator+(F64 a, F64 b) { return {a.r + b.r}; }
PKT_INLINE F64 operator-(F64 a, F64 b) { return {a.r - b.r}; }
PKT_INLINE F64 operator*(F64 a, F64 b) { return {a.r * b.r}; }
PKT_INLINE F64 fma(F64 a, F64 b, F64 c) { return {a.r * b.r + c.r}; }
PKT_INLINE F64 splat(double x) {
#if defined(PKT_ISA_avx512)
  return {_mm512_set1_pd(x)};
#elif defined(PKT_ISA_avx2)
  return {_mm256_set1_pd(x)};
#else
  F64 a;
  for (int i = 0; i < F64::width; ++i) lane(a.r, i) = x;
  return a;
#endif
}
PKT_INLINE F64 abs(F64 a) {
  for (int i = 0; i < F64::width; ++i) lane(a.r, i) = std::fabs(lane(a.r, i));
  return a;
}
PKT_INLINE F64 clamp(F64 a, F64 limit) {
  for (int i = 0; i < F64::width; ++i) {
    const double top = lane(limit.r, i);
    lane(a.r, i) = lane(a.r, i) > top ? top : lane(a.r, i) < -top ? -top : lane(a.r, i);
  }
  return a;
}
PKT_INLINE int equal_lanes(F64 a, F64 b) {
  int count = 0;
  for (int i = 0; i < F64::width; ++i) count += lane(a.r, i) == lane(b.r, i);
  return count;
}
PKT_INLINE double sum(F64 a) {
  double total = lane(a.r, 0);
  for (int i = 1; i < F64::width; ++i) total += lane(a.r, i);
  return total;
}
PKT_INLINE F64 load(const double* p) {
  F64 a;
  std::memcpy(&a.r, p, sizeof a.r);
  return a;
}
PKT_INLINE void store(double* p, F64 a) { std::memcpy(p, &a.r, sizeof a.r); }
PKT_INLINE void stream(double* p, F64 a) { store(p, a); }

// The vector and scalar type in which storage type T is computed.
template <class T>
struct Math {
  using Vector = F32;
  using Scalar = float;
};
template <>
struct Math<double> {
  using Vector = F64;
  using Scalar = double;
};

}  // namespace
}  // namespace PKT_ISA
}  // namespace pkt
