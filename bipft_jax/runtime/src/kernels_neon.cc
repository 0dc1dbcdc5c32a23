// NEON: population counts of bytes, 4 rows by 4 outputs, vectors along the inputs.
#include <arm_neon.h>

#include "lanes_gnu.h"
//
#include "float_rows.h"
#include "plain_index.h"

namespace {

using bipft::kRows;

constexpr int kColumns = 4;
constexpr int kLargestRun = 31;  // vectors whose counts fit a byte: 31 * 8 < 256

// The vector of words i and i + 1, or of word i and zero at an odd end.
inline uint8x16_t pair(const uint64_t* words, int i, int count) {
  const uint64x1_t low = vld1_u64(words + i);
  const uint64x1_t high = i + 1 < count ? vld1_u64(words + i + 1) : vdup_n_u64(0);
  return vreinterpretq_u8_u64(vcombine_u64(low, high));
}

template <bool kMasked>
inline void tile(const uint64_t* const* bits, const uint64_t* const* mask, const uint64_t* index,
                 int words, const int* sizes, int16_t* out, size_t stride) {
  uint16x8_t wide[kRows][kColumns];
  for (int r = 0; r < kRows; r++)
    for (int c = 0; c < kColumns; c++) wide[r][c] = vdupq_n_u16(0);
  for (int start = 0; start < words; start += 2 * kLargestRun) {
    const int end = words - start < 2 * kLargestRun ? words : start + 2 * kLargestRun;
    uint8x16_t sums[kRows][kColumns];
    for (int r = 0; r < kRows; r++)
      for (int c = 0; c < kColumns; c++) sums[r][c] = vdupq_n_u8(0);
    for (int i = start; i < end; i += 2) {
      uint8x16_t weights[kColumns];
      for (int c = 0; c < kColumns; c++) weights[c] = pair(index + (size_t)c * words, i, words);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) {
        const uint8x16_t code = pair(bits[r], i, words);
        const uint8x16_t live = kMasked ? pair(mask[r], i, words) : code;
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; c++) {
          uint8x16_t unequal = veorq_u8(code, weights[c]);
          if (kMasked) unequal = vandq_u8(unequal, live);
          sums[r][c] = vaddq_u8(sums[r][c], vcntq_u8(unequal));
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; c++) wide[r][c] = vpadalq_u8(wide[r][c], sums[r][c]);
  }
  for (int r = 0; r < kRows; r++)
    for (int c = 0; c < kColumns; c++)
      out[r * stride + c] = (int16_t)(sizes[r] - 2 * (int)vaddvq_u16(wide[r][c]));
}

template <bool kMasked>
void all_products(const bipft::CodeRows& codes, const uint64_t* index, int outputs, int inputs,
                  int16_t* out, size_t stride) {
  const int words = bipft::words_of(inputs);
  for (int first = 0; first < codes.rows; first += kRows) {
    const uint64_t *bits[kRows], *mask[kRows];
    int sizes[kRows];
    for (int r = 0; r < kRows; r++) {
      bits[r] = codes.bits + (first + r) * codes.stride;
      mask[r] = kMasked ? codes.mask + (first + r) * codes.stride : nullptr;
      sizes[r] = kMasked ? 0 : inputs;
      if (kMasked)
        for (int i = 0; i < words; i++) sizes[r] += __builtin_popcountll(mask[r][i]);
    }
    for (int n = 0; n < bipft::padded(outputs); n += kColumns)
      tile<kMasked>(bits, mask, index + (size_t)n * words, words, sizes,
                    out + first * stride + n, stride);
  }
}

void products(const bipft::CodeRows& codes, const uint8_t* index, int outputs, int inputs,
              int16_t* out, size_t stride) {
  const uint64_t* words = (const uint64_t*)index;
  if (codes.mask)
    all_products<true>(codes, words, outputs, inputs, out, stride);
  else
    all_products<false>(codes, words, outputs, inputs, out, stride);
}

}  // namespace

const bipft::Kernels bipft::kNeonKernels = {
    "neon", index_bytes, put_row, put_octet, products, threshold_codes, sum_codes,
    norm,   scaled,      dot,     add_scaled, attend};
