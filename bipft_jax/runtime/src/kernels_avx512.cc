// AVX-512 with VPOPCNTDQ: a lane is an output, and each word of a row is compared with eight
// outputs at once.
//
// Index: [outputs / 32][words][32] words; vector v, lane 2 i + j of a block is output 8 i + 2 v + j,
// so that packing four vectors of counts gives 32 counts of 16 bits in order.
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
  return ((size_t)(output / kBlock) * words_of(inputs) + word) * kBlock + within % 8 / 2 * 8 +
         within / 8 * 2 + within % 2;
}

void put_row(uint8_t* index, int inputs, int output, const uint64_t* bits) {
  uint64_t* out = (uint64_t*)index + word_at(inputs, output, 0);
  for (int w = 0; w < words_of(inputs); w++) out[(size_t)w * kBlock] = bits[w];
}

void put_octet(uint8_t* index, int inputs, int outputs, int octet, const uint8_t* bytes) {
  for (int n = 0; n < outputs; n++)
    index[word_at(inputs, n, octet / 8) * 8 + octet % 8] = bytes[n];
}

// 4 rows, `first` and on, by 32 outputs: 16 sums. Part of the loop over tiles, and begun by the
// first word's counts: of 768 inputs, a call and sums that begin at 0 took a sixth of the time.
template <bool kMasked>
[[gnu::always_inline]] inline void tile(const CodeRows& codes, int first, const uint64_t* index,
                                        int words, __m512i size, int16_t* out, size_t stride) {
  const uint64_t* bits = codes.bits + first * codes.stride;
  const uint64_t* mask = kMasked ? codes.mask + first * codes.stride : nullptr;
  __m512i sums[kRows][4];
  for (int i = 0; i < words; i++) {
    __m512i weights[4];
    for (int v = 0; v < 4; v++)
      weights[v] = _mm512_load_si512(index + (size_t)i * kBlock + 8 * v);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      const size_t at = r * codes.stride + i;
      const __m512i code = _mm512_set1_epi64((long long)bits[at]);
      const __m512i live = kMasked ? _mm512_set1_epi64((long long)mask[at]) : code;
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) {
        const __m512i unequal = kMasked  // live & (code ^ weight)
                                    ? _mm512_ternarylogic_epi64(live, code, weights[v], 0x60)
                                    : _mm512_xor_si512(code, weights[v]);
        const __m512i count = _mm512_popcnt_epi64(unequal);
        sums[r][v] = i ? _mm512_add_epi64(sums[r][v], count) : count;
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r++) {
    const __m512i counts = _mm512_packus_epi32(_mm512_packus_epi32(sums[r][0], sums[r][1]),
                                               _mm512_packus_epi32(sums[r][2], sums[r][3]));
    if (kMasked) {
      int live = 0;
      for (int i = 0; i < words; i++) live += __builtin_popcountll(mask[r * codes.stride + i]);
      size = _mm512_set1_epi16((short)live);
    }
    _mm512_storeu_si512(out + r * stride,
                        _mm512_sub_epi16(size, _mm512_add_epi16(counts, counts)));
  }
}

template <bool kMasked>
void all_products(const CodeRows& codes, const uint64_t* index, int outputs, int inputs,
                  int16_t* out, size_t stride) {
  const int words = words_of(inputs);
  const __m512i size = _mm512_set1_epi16((short)inputs);
  // The outer loop is over weights: 32 outputs stay in the first cache for all rows.
  for (int n = 0; n < bipft::padded(outputs); n += kBlock) {
    const uint64_t* block = index + (size_t)n * words;
    for (int first = 0; first < codes.rows; first += kRows)
      tile<kMasked>(codes, first, block, words, size, out + first * stride + n, stride);
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
