// AVX-512 with VPOPCNTDQ: a lane is an output, and each word of a row is compared with eight
// outputs at once.
//
// Index: [outputs / 32][words][32] words; vector v, lane l of a block is output 4 l + v, so that
// four vectors of counts interleave to 32 counts of 16 bits in order.
#include "lanes_avx512.h"
//
#include "float_rows.h"

namespace {

using bipft::CodeRows;
using bipft::kRows;
using bipft::words_of;

constexpr int kBlock = 32;

size_t index_bytes(int outputs, int inputs) {
  return (size_t)bipft::padded(outputs) * words_of(inputs) * 8;
}

inline size_t word_at(int inputs, int output, int word) {
  const int within = output % kBlock;
  return ((size_t)(output / kBlock) * words_of(inputs) + word) * kBlock + within % 4 * 8 +
         within / 4;
}

void put_row(uint8_t* index, int inputs, int output, const uint64_t* bits) {
  uint64_t* out = (uint64_t*)index + word_at(inputs, output, 0);
  for (int w = 0; w < words_of(inputs); w++) out[(size_t)w * kBlock] = bits[w];
}

void put_octet(uint8_t* index, int inputs, int outputs, int octet, const uint8_t* bytes) {
  for (int n = 0; n < outputs; n++)
    index[word_at(inputs, n, octet / 8) * 8 + octet % 8] = bytes[n];
}

// 4 rows by 32 outputs: 16 sums.
template <bool kMasked>
inline void tile(const uint64_t* const* bits, const uint64_t* const* mask, const uint64_t* index,
                 int words, const int* sizes, int16_t* out, size_t stride) {
  __m512i sums[kRows][4];
  for (int r = 0; r < kRows; r++)
    for (int v = 0; v < 4; v++) sums[r][v] = _mm512_setzero_si512();
  for (int i = 0; i < words; i++) {
    __m512i weights[4];
    for (int v = 0; v < 4; v++)
      weights[v] = _mm512_load_si512(index + (size_t)i * kBlock + 8 * v);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      const __m512i code = _mm512_set1_epi64((long long)bits[r][i]);
      const __m512i live = kMasked ? _mm512_set1_epi64((long long)mask[r][i]) : code;
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) {
        const __m512i unequal = kMasked  // live & (code ^ weight)
                                    ? _mm512_ternarylogic_epi64(live, code, weights[v], 0x60)
                                    : _mm512_xor_si512(code, weights[v]);
        sums[r][v] = _mm512_add_epi64(sums[r][v], _mm512_popcnt_epi64(unequal));
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r++) {
    const __m512i low = _mm512_or_si512(sums[r][0], _mm512_slli_epi64(sums[r][1], 16));
    const __m512i high = _mm512_or_si512(sums[r][2], _mm512_slli_epi64(sums[r][3], 16));
    const __m512i counts = _mm512_or_si512(low, _mm512_slli_epi64(high, 32));
    const __m512i size = _mm512_set1_epi16((short)sizes[r]);
    _mm512_storeu_si512(out + r * stride,
                        _mm512_sub_epi16(size, _mm512_add_epi16(counts, counts)));
  }
}

template <bool kMasked>
void all_products(const CodeRows& codes, const uint64_t* index, int outputs, int inputs,
                  int16_t* out, size_t stride) {
  const int words = words_of(inputs);
  // The outer loop is over weights: 32 outputs stay in the first cache for all rows.
  for (int n = 0; n < bipft::padded(outputs); n += kBlock) {
    const uint64_t* block = index + (size_t)n * words;
    for (int first = 0; first < codes.rows; first += kRows) {
      const uint64_t *bits[kRows], *mask[kRows];
      int sizes[kRows];
      for (int r = 0; r < kRows; r++) {
        bits[r] = codes.bits + (first + r) * codes.stride;
        sizes[r] = inputs;
        if (!kMasked) continue;
        mask[r] = codes.mask + (first + r) * codes.stride;
        sizes[r] = 0;
        for (int i = 0; i < words; i++) sizes[r] += __builtin_popcountll(mask[r][i]);
      }
      tile<kMasked>(bits, mask, block, words, sizes, out + first * stride + n, stride);
    }
  }
}

void products(const CodeRows& codes, const uint8_t* index, int outputs, int inputs, int16_t* out,
              size_t stride) {
  const uint64_t* words = (const uint64_t*)index;
  if (codes.mask)
    all_products<true>(codes, words, outputs, inputs, out, stride);
  else
    all_products<false>(codes, words, outputs, inputs, out, stride);
}

void threshold_codes(const int16_t* dots, const bipft::ThresholdRows& rows, int n, uint64_t* bits,
                     uint64_t* mask) {
  for (int i = 0; i < words_of(n) * 64; i += 32) {
    const __m512i dot = _mm512_loadu_si512(dots + i);
    const __mmask32 plus = _mm512_cmpgt_epi16_mask(dot, _mm512_loadu_si512(rows.above + i)) |
                           _mm512_cmplt_epi16_mask(dot, _mm512_loadu_si512(rows.below + i));
    set_codes(bits, i, (uint32_t)plus);
    if (!mask) continue;
    const __mmask32 minus = _mm512_cmpge_epi16_mask(dot, _mm512_loadu_si512(rows.minus_from + i)) &
                            _mm512_cmple_epi16_mask(dot, _mm512_loadu_si512(rows.minus_to + i));
    set_codes(mask, i, (uint32_t)(plus | minus));
  }
}

}  // namespace

const bipft::Kernels bipft::kAvx512Kernels = {
    "avx512", index_bytes, put_row, put_octet, products, threshold_codes, sum_codes,
    norm,     scaled,      dot,     add_scaled, attend};
