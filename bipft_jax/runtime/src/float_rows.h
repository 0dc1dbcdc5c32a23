// Everything that stays in floating point, on `Lanes`: included once by each instruction set, after
// its lanes. One order of operations for all sets, that of NumpyEncoder but for sums along a row.
#pragma once

#include <cstring>

#include "kernels.h"

namespace {

// Codes `at` and on of a row.
template <class Word>
inline void set_codes(uint64_t* bits, int at, Word word) {
  std::memcpy((uint8_t*)bits + at / 8, &word, sizeof word);
}

inline uint64_t last_word(int n) { return n % 64 ? ((uint64_t)1 << n % 64) - 1 : ~(uint64_t)0; }

bool sum_codes(const float* x, const float* shift, int n, uint64_t* bits, uint64_t* mask) {
  const Lanes zero = all(0);
  unsigned every = 0xffff;
  for (int i = 0; i < bipft::padded(n); i += 16) {
    const Lanes sum = load(x + i) + load(shift + i);
    const unsigned not_zero = different(sum, zero);
    set_codes(bits, i, (uint16_t)above(sum, zero));
    set_codes(mask, i, (uint16_t)not_zero);
    every &= not_zero;
  }
  const int last = bipft::words_of(n) - 1;
  bits[last] &= last_word(n);
  mask[last] &= last_word(n);
  return every != 0xffff;
}

void norm(const float* x, const bipft::NormRow& row, float* out) {
  const int n = bipft::padded(row.size);
  Lanes sum = all(0), squares = all(0);
  for (int i = 0; i < n; i += 16) sum = sum + load(x + i);
  const Lanes mean = all(sum_of(sum) / (float)row.size);
  for (int i = 0; i < n; i += 16) {
    const Lanes centred = (load(x + i) - mean) * load(row.live + i);
    squares = squares + centred * centred;
  }
  const float variance = sum_of(squares) / (float)row.size;
  const Lanes factor = all(1.0f / __builtin_sqrtf(variance + row.epsilon));
  for (int i = 0; i < n; i += 16) {
    const Lanes centred = (load(x + i) - mean) * load(row.live + i);
    store(out + i, centred * factor * load(row.scale + i) + load(row.bias + i));
  }
}

void scaled(const int16_t* dots, float scale, const float* scales, const float* bias,
            const float* residual, int n, float* out) {
  const Lanes s = all(scale);
  for (int i = 0; i < bipft::padded(n); i += 16)
    store(out + i,
          of_int16(dots + i) * s * load(scales + i) + load(bias + i) + load(residual + i));
}

float dot(const float* x, const float* y, int n) {
  Lanes sum = all(0);
  for (int i = 0; i < bipft::padded(n); i += 16) sum = sum + load(x + i) * load(y + i);
  return sum_of(sum);
}

void add_scaled(float factor, const float* x, int n, float* out) {
  const Lanes f = all(factor);
  for (int i = 0; i < bipft::padded(n); i += 16) store(out + i, load(out + i) + f * load(x + i));
}

// e^x for x <= 0, within 2 units of the last place; e^-87 below -87. Cody and Waite's reduction
// and the polynomial of Cephes.
inline Lanes exponential(const Lanes& limited) {
  const Lanes x = largest(limited, all(-87.0f));
  const Lanes raise = all(12582912.0f);  // 1.5 * 2^23: a sum's lowest bits are an integer
  const Lanes raised = x * all(1.44269504088896341f) + raise;
  const Lanes n = raised - raise;
  const Lanes r = x - n * all(0.693359375f) - n * all(-2.12194440e-4f);
  constexpr float kTerms[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                              1.6666665459e-1f, 5.0000001201e-1f};
  Lanes p = all(1.9875691500e-4f);
  for (const float& term : kTerms) p = p * r + all(term);
  return times_power(p * r * r + r + all(1.0f), raised);
}

// Three passes over all rows, so that the sums at the end of one row overlap with the next row.
void attend(const bipft::AttendRows& a, float* scores, uint64_t* bits, float* sums) {
  const int n = (a.tokens + 15) / 16 * 16, stride = bipft::padded(a.tokens);
  const Lanes query = all(a.query_scale), key = all(a.key_scale), root = all(a.inverse_root);
  float limits[bipft::kChunk];
  for (int r = 0; r < a.rows; r++) {
    const int16_t* dots = a.dots + r * stride;
    const float* residual = a.residuals + r * a.residual_stride;
    Lanes top = all(-3e38f);
    for (int i = 0; i < n; i += 16) {
      const Lanes score = (of_int16(dots + i) * query * key + load(residual + i)) * root;
      store(scores + r * stride + i, score);
      top = largest(top, score);
    }
    limits[r] = largest_of(top);
  }
  for (int r = 0; r < a.rows; r++) {
    if (!a.softmax) {
      limits[r] = a.threshold;
      continue;
    }
    const Lanes maximum = all(limits[r]);
    float* row = scores + r * stride;
    Lanes sum = all(0);
    for (int i = 0; i < n; i += 16) {
      const Lanes e = exponential(load(row + i) - maximum);
      store(row + i, e);
      sum = sum + e;
    }
    limits[r] = a.threshold * sum_of(sum);  // a share of the sum exceeds the threshold: no division
  }
  const int words = bipft::words_of(a.tokens);
  for (int r = 0; r < a.rows; r++) {
    uint64_t* row_bits = bits + r * words;
    row_bits[words - 1] = 0;
    Lanes sum = all(0);
    const Lanes limit = all(limits[r]);
    for (int i = 0; i < n; i += 16) {
      const Lanes value = load(scores + r * stride + i);
      set_codes(row_bits, i, (uint16_t)above(value, limit));
      if (a.values) sum = sum + where_above(value, limit, load(a.values + i));
    }
    row_bits[words - 1] &= last_word(a.tokens);
    sums[r] = a.values ? sum_of(sum) : 0;
  }
}

}  // namespace
