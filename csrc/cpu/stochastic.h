// Stochastic rounding of a pair of vectors, in one row of a matrix, with the words of philox.h.
//
// Everywhere else 16-bit values are rounded as they are stored.  Here a sum is first moved to one of
// its neighbours in the storage type, still as float, so that storing it rounds nothing.
#pragma once

#include "cpu/pair.h"
#include "philox.h"

namespace pkt {
namespace PKT_ISA {
namespace {

// Where a pair lies in its matrix, which decides its random words.
struct Place {
  uint64_t seed;
  uint32_t row, column, matrix;
};

#if defined(PKT_ISA_avx512) || defined(PKT_ISA_avx2)

typedef uint32_t Bits __attribute__((vector_size(4 * F32::width)));
typedef int32_t Signed __attribute__((vector_size(4 * F32::width)));
typedef float Floats __attribute__((vector_size(4 * F32::width)));
typedef uint64_t Wide __attribute__((vector_size(4 * F32::width)));

// Products of the low halves of the lanes.
PKT_INLINE Wide times32(Wide a, uint32_t b) {
#if defined(PKT_ISA_avx512)
  return (Wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(int64_t(b)));
#else
  return (Wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(int64_t(b)));
#endif
}

// Lanes 0 and 1 of every 128 bits: first and second of a beside those of b.
PKT_INLINE Bits firsts(Wide a, Wide b) {
#if defined(PKT_ISA_avx512)
  return (Bits)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
#else
  return (Bits)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
#endif
}
PKT_INLINE Bits seconds(Wide a, Wide b) {
#if defined(PKT_ISA_avx512)
  return (Bits)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b);
#else
  return (Bits)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
#endif
}

// The quads of a pair in such an order that in_pair_order() has an easy time.
#if defined(PKT_ISA_avx512)
PKT_INLINE Wide quads_of(const bf16*) { return Wide{0, 1, 2, 3, 4, 5, 6, 7}; }
PKT_INLINE Wide quads_of(const f16*) { return Wide{0, 4, 1, 5, 2, 6, 3, 7}; }
#else
PKT_INLINE Wide quads_of(const bf16*) { return Wide{0, 1, 2, 3}; }
PKT_INLINE Wide quads_of(const f16*) { return Wide{0, 2, 1, 3}; }
#endif

// Words 0 to 3 of every quad, in the low halves of the lanes of c0 to c3, as load_pair() has them.
PKT_INLINE void in_pair_order(Wide c0, Wide c1, Wide c2, Wide c3, const bf16*, Bits* first,
                              Bits* second) {
  const Wide low = (c0 ^ c0) + 0xffffffffu;
  *first = Bits((c0 & low) | c2 << 32);
  *second = Bits((c1 & low) | c3 << 32);
}
PKT_INLINE void in_pair_order(Wide c0, Wide c1, Wide c2, Wide c3, const f16*, Bits* first,
                              Bits* second) {
  const Wide low = (c0 ^ c0) + 0xffffffffu;
  const Wide words01 = (c0 & low) | c1 << 32, words23 = (c2 & low) | c3 << 32;
  *first = firsts(words01, words23);
  *second = seconds(words01, words23);
}

// philox() for the quads of a pair, one in the low half of each lane; what is left in the high
// halves is never read.
template <class Half>
PKT_INLINE void random_words(const Place& at, const Half* storage, Bits* first, Bits* second) {
  const Wide quads = quads_of(storage);
  const Wide zero = quads - quads;
  Wide c0 = quads + at.column / 4, c1 = zero + at.row, c2 = zero + at.matrix, c3 = zero;
  uint32_t k0 = uint32_t(at.seed), k1 = uint32_t(at.seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Wide p0 = times32(c0, kPhiloxFactor0), p1 = times32(c2, kPhiloxFactor1);
    c0 = (p1 >> 32) ^ c1 ^ (zero + k0);
    c2 = (p0 >> 32) ^ c3 ^ (zero + k1);
    c1 = p1;
    c3 = p0;
    k0 += kPhiloxStep0;
    k1 += kPhiloxStep1;
  }
  in_pair_order(c0, c1, c2, c3, storage, first, second);
}

PKT_INLINE Bits neighbour_bits(Floats x, Bits words, const bf16*) {
  const Bits bits = (Bits)x;
  const Signed up = Signed(words >> 8) < Signed((bits & 0xffffu) << 8);
  return (bits & 0xffff0000u) + ((Bits)up & 0x10000u);
}

// stochastic_f16() of philox.h; from 65536 on storing gives infinity by itself.
PKT_INLINE Bits neighbour_bits(Floats x, Bits words, const f16*) {
  const Bits bits = (Bits)x, magnitude = bits & 0x7fffffffu;
  const Signed exponent = Signed(magnitude >> 23), least = exponent - exponent + 113;
  const Signed normal = exponent > least;
  const Bits base = Bits((normal & exponent) | (~normal & least));
  const Floats steps = (Floats)magnitude * (Floats)((264u - base) << 23);
  const Signed whole = __builtin_convertvector(steps, Signed);
  const Floats fraction = steps - __builtin_convertvector(whole, Floats);
  const Signed up = __builtin_convertvector(Signed(words >> 8), Floats) < fraction * 16777216.0f;
  const Floats chosen = __builtin_convertvector(whole - up, Floats) * (Floats)((base - 10u) << 23);
  return (Bits)chosen | (bits & 0x80000000u);
}

template <class Half>
PKT_INLINE F32 neighbour(F32 x, Bits words, const Half* storage) {
  const Bits bits = (Bits)x.r, exponent = bits & 0x7f800000u;
  const Bits finite = (Bits)(Signed(exponent) != 0x7f800000);
  const Bits chosen = neighbour_bits((Floats)x.r, words, storage);
  return {(decltype(x.r))((finite & chosen) | (~finite & bits))};
}

// Moves both vectors to values of the storage type.
template <class Half>
PKT_INLINE void round_stochastically(const Place& at, const Half* storage, F32* first,
                                     F32* second) {
  Bits words, more;
  random_words(at, storage, &words, &more);
  *first = neighbour(*first, words, storage);
  *second = neighbour(*second, more, storage);
}

#else

PKT_INLINE float neighbour(float x, uint32_t word, const bf16*) {
  return widen(bf16{uint16_t(stochastic_bf16(bits_of(x), word))});
}
PKT_INLINE float neighbour(float x, uint32_t word, const f16*) {
  return widen(f16{uint16_t(stochastic_f16(std::fabs(x), bits_of(x), word))});
}

template <class Half>
PKT_INLINE void round_stochastically(const Place& at, const Half* storage, F32* first,
                                     F32* second) {
  float sums[2 * F32::width];
  store(sums, *first);
  store(sums + F32::width, *second);
  uint32_t words[4];
  for (uint32_t i = 0; i < 2 * F32::width; ++i) {
    const uint32_t column = at.column + i;
    if (i == 0 || column % 4 == 0) philox(at.seed, column / 4, at.row, at.matrix, words);
    if (std::fabs(sums[i]) <= 3.4028235e38f) sums[i] = neighbour(sums[i], words[column % 4], storage);
  }
  *first = load(sums);
  *second = load(sums + F32::width);
}

#endif

}  // namespace
}  // namespace PKT_ISA
}  // namespace pkt
