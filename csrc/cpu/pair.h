// Two vectors of one row at a time: read, written back, compared with what was there.
//
// A pair of bfloat16 vectors holds even columns in its first vector and odd ones in its second.  Both
// halves of a 32-bit lane then become floats by a shift and a mask, and go back by a blend.
#pragma once

#include "cpu/simd.h"

namespace pkt {
namespace PKT_ISA {
namespace {

// The column of the pair that `lane`, counted over both vectors, holds.
template <class T>
constexpr int pair_column(int lane) {
  return lane;
}

template <class T, class Vector>
PKT_INLINE void load_pair(const T* p, Vector* a, Vector* b) {
  *a = load(p);
  *b = load(p + Vector::width);
}

// Stores the pair at p; returns how many values there stayed what they were.
template <class T, class Vector>
PKT_INLINE int exchange(T* p, Vector a, Vector b) {
  const Vector old_a = load(p), old_b = load(p + Vector::width);
  store(p, a);
  store(p + Vector::width, b);
  return equal_lanes(load(p), old_a) + equal_lanes(load(p + Vector::width), old_b);
}

#if defined(PKT_ISA_avx512) || defined(PKT_ISA_avx2)

template <>
constexpr int pair_column<bf16>(int lane) {
  return lane < F32::width ? 2 * lane : 2 * (lane - F32::width) + 1;
}

#if defined(PKT_ISA_avx512)

typedef __m512i Halves;

PKT_INLINE Halves load_halves(const void* p) { return _mm512_loadu_si512(p); }
PKT_INLINE void store_halves(void* p, Halves x) { _mm512_storeu_si512(p, x); }
PKT_INLINE F32 low_halves(Halves x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))}; }
PKT_INLINE F32 high_halves(Halves x) {
  return {_mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000u))))};
}
// The upper and the lower 16 bits of every lane of two vectors, in turn.
alignas(64) constexpr uint16_t kUpper16[32] = {
    1, 33, 3, 35, 5, 37, 7, 39, 9, 41, 11, 43, 13, 45, 15, 47,
    17, 49, 19, 51, 21, 53, 23, 55, 25, 57, 27, 59, 29, 61, 31, 63};
alignas(64) constexpr uint16_t kLower16[32] = {
    0, 32, 2, 34, 4, 36, 6, 38, 8, 40, 10, 42, 12, 44, 14, 46,
    16, 48, 18, 50, 20, 52, 22, 54, 24, 56, 26, 58, 28, 60, 30, 62};

// All 32 values are rounded to nearest even at once: upper += (lower + 0x7fff + its last bit) >> 16,
// where the average, (lower + other + 1) >> 1 in 17 bits, has that carry as its first bit.  It would
// run over for a NaN of nothing but ones, so none may come here.
PKT_INLINE Halves packed_pair(F32 a, F32 b, const bf16*) {
  const Halves x = _mm512_castps_si512(a.r), y = _mm512_castps_si512(b.r);
  const Halves upper = _mm512_permutex2var_epi16(x, _mm512_load_si512(kUpper16), y);
  const Halves lower = _mm512_permutex2var_epi16(x, _mm512_load_si512(kLower16), y);
  const Halves odd = _mm512_and_si512(upper, _mm512_set1_epi16(1));
  const Halves other = _mm512_or_si512(odd, _mm512_set1_epi16(0x7ffe));
  const Halves carry = _mm512_srli_epi16(_mm512_avg_epu16(lower, other), 15);
  return _mm512_add_epi16(upper, carry);
}
PKT_INLINE Halves packed_pair(F32 a, F32 b, const f16* p) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(packed(a, p)), packed(b, p), 1);
}
PKT_INLINE int same_halves(Halves x, Halves y) {
  const __mmask32 zeros =
      _mm512_testn_epi16_mask(_mm512_or_si512(x, y), _mm512_set1_epi16(0x7fff));
  return _mm_popcnt_u32(_mm512_cmpeq_epi16_mask(x, y) | zeros);
}

#else

typedef __m256i Halves;

PKT_INLINE Halves load_halves(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
PKT_INLINE void store_halves(void* p, Halves x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), x);
}
PKT_INLINE F32 low_halves(Halves x) { return {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16))}; }
PKT_INLINE F32 high_halves(Halves x) {
  return {_mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(int(0xffff0000u))))};
}
PKT_INLINE Halves packed_pair(F32 a, F32 b, const bf16*) {
  return _mm256_blend_epi16(_mm256_srli_epi32(rounded(a), 16), rounded(b), 0xaa);
}
PKT_INLINE Halves packed_pair(F32 a, F32 b, const f16* p) {
  return _mm256_set_m128i(packed(b, p), packed(a, p));
}
PKT_INLINE int same_halves(Halves x, Halves y) {
  const Halves magnitude = _mm256_and_si256(_mm256_or_si256(x, y), _mm256_set1_epi16(0x7fff));
  const Halves zeros = _mm256_cmpeq_epi16(magnitude, _mm256_setzero_si256());
  const Halves same = _mm256_or_si256(_mm256_cmpeq_epi16(x, y), zeros);
  return _mm_popcnt_u32(uint32_t(_mm256_movemask_epi8(same))) / 2;
}

#endif

PKT_INLINE void load_pair(const bf16* p, F32* a, F32* b) {
  const Halves both = load_halves(p);
  *a = low_halves(both);
  *b = high_halves(both);
}

template <class Half>
PKT_INLINE int exchange_halves(Half* p, F32 a, F32 b) {
  const Halves old = load_halves(p), now = packed_pair(a, b, p);
  store_halves(p, now);
  return same_halves(old, now);
}
PKT_INLINE int exchange(bf16* p, F32 a, F32 b) { return exchange_halves(p, a, b); }
PKT_INLINE int exchange(f16* p, F32 a, F32 b) { return exchange_halves(p, a, b); }

#endif

}  // namespace
}  // namespace PKT_ISA
}  // namespace pkt
