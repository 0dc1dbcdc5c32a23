// Sixteen floats as two vectors of AVX2. See lanes_gnu.h for what the functions do.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Lanes {
  __m256 lo, hi;
};

inline Lanes load(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
inline void store(float* x, Lanes a) {
  _mm256_storeu_ps(x, a.lo);
  _mm256_storeu_ps(x + 8, a.hi);
}
inline Lanes all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes operator+(Lanes a, Lanes b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline Lanes operator-(Lanes a, Lanes b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline Lanes operator*(Lanes a, Lanes b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline Lanes largest(Lanes a, Lanes b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
inline __m256 eight_of_int16(const int16_t* x) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)x)));
}
inline Lanes of_int16(const int16_t* x) { return {eight_of_int16(x), eight_of_int16(x + 8)}; }
inline unsigned bits_of(Lanes mask) {
  return (unsigned)_mm256_movemask_ps(mask.lo) | (unsigned)_mm256_movemask_ps(mask.hi) << 8;
}
inline Lanes mask_above(Lanes a, Lanes b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ)};
}
inline unsigned above(Lanes a, Lanes b) { return bits_of(mask_above(a, b)); }
inline unsigned different(Lanes a, Lanes b) {
  return bits_of(
      {_mm256_cmp_ps(a.lo, b.lo, _CMP_NEQ_UQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_NEQ_UQ)});
}
inline Lanes where_above(Lanes a, Lanes b, Lanes x) {
  const Lanes mask = mask_above(a, b);
  return {_mm256_and_ps(mask.lo, x.lo), _mm256_and_ps(mask.hi, x.hi)};
}
inline float sum_of(Lanes a) {
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest_of(Lanes a) {
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline __m256 eight_times_power(__m256 x, __m256 raised) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(raised), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), exponent));
}
inline Lanes times_power(Lanes x, Lanes raised) {
  return {eight_times_power(x.lo, raised.lo), eight_times_power(x.hi, raised.hi)};
}

}  // namespace
