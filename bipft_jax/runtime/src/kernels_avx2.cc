// AVX2: no population counts but look-ups. Four codes of a row give a table of 16 counts, and a
// shuffle of that table by four weights of each of 32 outputs gives the inputs that differ.
//
// Index: [outputs / 64][ceil(inputs / 8)][64] bytes, a byte for 8 inputs of one output. The outputs
// of a vector are ordered so that bytes unpack to 16 bits in order.
#include "lanes_avx2.h"
//
#include "float_rows.h"

namespace {

using bipft::CodeRows;
using bipft::kRows;
using bipft::words_of;

constexpr int kBlock = 64;
constexpr int kLargestRun = 31;   // octets whose counts fit a byte: 31 * 8 < 256
constexpr int kTableOctets = 96;  // whose tables for 4 rows, 12 KiB, stay in the first cache

inline int octets_of(int inputs) { return (inputs + 7) / 8; }

size_t index_bytes(int outputs, int inputs) {
  return (size_t)bipft::padded(outputs) * octets_of(inputs);
}

inline int place_of(int output) {  // within its block
  constexpr int kQuarter[4] = {0, 2, 1, 3};
  return output / 32 * 32 + kQuarter[output % 32 / 8] * 8 + output % 8;
}

inline uint8_t* octet_at(uint8_t* index, int inputs, int output, int octet) {
  return index + ((size_t)(output / kBlock) * octets_of(inputs) + octet) * kBlock +
         place_of(output % kBlock);
}

void put_row(uint8_t* index, int inputs, int output, const uint64_t* bits) {
  uint8_t* out = octet_at(index, inputs, output, 0);
  const uint8_t* bytes = (const uint8_t*)bits;
  for (int i = 0; i < octets_of(inputs); i++) out[(size_t)i * kBlock] = bytes[i];
}

void put_octet(uint8_t* index, int inputs, int outputs, int octet, const uint8_t* bytes) {
  for (int n = 0; n < outputs; n++) *octet_at(index, inputs, n, octet) = bytes[n];
}

struct RowTables {
  alignas(64) uint8_t of[kTableOctets][2][kRows][16];
};

inline __m256i halves(char low, char high) {
  return _mm256_setr_m128i(_mm_set1_epi8(low), _mm_set1_epi8(high));
}

// The tables of a tile's rows, for octets first to last: popcount(mask & (code ^ w)) of four inputs
// for w from 0 to 15. A vector is the tables of an octet's low and high four inputs.
template <bool kMasked>
void make_tables(const CodeRows& codes, int row, int first, int last, RowTables& tables) {
  const __m128i numbers = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m256i weights = _mm256_setr_m128i(numbers, _mm_slli_epi16(numbers, 4));
  const __m256i own_half = halves(15, (char)0xf0), low = _mm256_set1_epi8(15);
  const __m256i shift = _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4);
  const __m256i counts = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  for (int r = 0; r < kRows; r++) {
    const size_t start = (row + r) * codes.stride;
    const char* bits = (const char*)(codes.bits + start);
    const char* mask = kMasked ? (const char*)(codes.mask + start) : nullptr;
    for (int i = first; i < last; i++) {
      __m256i unequal = _mm256_xor_si256(weights, _mm256_set1_epi8(bits[i]));
      unequal = _mm256_and_si256(unequal, kMasked ? _mm256_set1_epi8(mask[i]) : own_half);
      if (kMasked) unequal = _mm256_and_si256(unequal, own_half);
      unequal = _mm256_and_si256(_mm256_srlv_epi32(unequal, shift), low);
      const __m256i table = _mm256_shuffle_epi8(counts, unequal);
      _mm_store_si128((__m128i*)tables.of[i - first][0][r], _mm256_castsi256_si128(table));
      _mm_store_si128((__m128i*)tables.of[i - first][1][r], _mm256_extracti128_si256(table, 1));
    }
  }
}

// out -= 2 * counts for 4 rows and 64 outputs, over `octets` octets of inputs.
inline void tile(const uint8_t (*tables)[2][kRows][16], const uint8_t* index, int octets,
                 int16_t* out, size_t stride) {
  const __m256i zero = _mm256_setzero_si256(), low = _mm256_set1_epi8(15);
  __m256i sums[kRows][2];
  for (int r = 0; r < kRows; r++) sums[r][0] = sums[r][1] = zero;
  for (int i = 0; i < octets; i++) {
    __m256i weights[2], nibbles[2];
    for (int h = 0; h < 2; h++)
      weights[h] = _mm256_load_si256((const __m256i*)(index + (size_t)i * kBlock + 32 * h));
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      for (int h = 0; h < 2; h++)
        nibbles[h] =
            _mm256_and_si256(half ? _mm256_srli_epi16(weights[h], 4) : weights[h], low);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) {
        const __m256i table =
            _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)tables[i][half][r]));
        for (int h = 0; h < 2; h++)
          sums[r][h] = _mm256_add_epi8(sums[r][h], _mm256_shuffle_epi8(table, nibbles[h]));
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      __m256i* to = (__m256i*)(out + r * stride + 32 * h);
      const __m256i a = _mm256_slli_epi16(_mm256_unpacklo_epi8(sums[r][h], zero), 1);
      const __m256i b = _mm256_slli_epi16(_mm256_unpackhi_epi8(sums[r][h], zero), 1);
      _mm256_storeu_si256(to, _mm256_sub_epi16(_mm256_loadu_si256(to), a));
      _mm256_storeu_si256(to + 1, _mm256_sub_epi16(_mm256_loadu_si256(to + 1), b));
    }
}

inline int size_of(const CodeRows& codes, int row, int inputs) {
  if (!codes.mask) return inputs;
  int size = 0;
  for (int i = 0; i < words_of(inputs); i++)
    size += (int)_mm_popcnt_u64(codes.mask[row * codes.stride + i]);
  return size;
}

void products(const CodeRows& codes, const uint8_t* index, int outputs, int inputs, int16_t* out,
              size_t stride) {
  const int octets = octets_of(inputs), width = bipft::padded(outputs);
  RowTables tables;
  for (int row = 0; row < codes.rows; row += kRows) {
    int16_t* to = out + row * stride;
    for (int r = 0; r < kRows; r++) {
      const __m256i size = _mm256_set1_epi16((short)size_of(codes, row + r, inputs));
      for (int n = 0; n < width; n += 16)
        _mm256_storeu_si256((__m256i*)(to + r * stride + n), size);
    }
    for (int first = 0; first < octets; first += kTableOctets) {
      const int count = octets - first < kTableOctets ? octets - first : kTableOctets;
      if (codes.mask)
        make_tables<true>(codes, row, first, first + count, tables);
      else
        make_tables<false>(codes, row, first, first + count, tables);
      const int runs = (count + kLargestRun - 1) / kLargestRun, run = (count + runs - 1) / runs;
      for (int n = 0; n < width; n += kBlock) {
        const uint8_t* weights = index + (size_t)n * octets + (size_t)first * kBlock;
        for (int i = 0; i < count; i += run)
          tile(tables.of + i, weights + (size_t)i * kBlock, count - i < run ? count - i : run,
               to + n, stride);
      }
    }
  }
}

inline uint32_t bits_of_32(__m256i a, __m256i b) {  // of comparisons of 16 bits
  return (uint32_t)_mm256_movemask_epi8(
      _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xD8));
}

inline __m256i sixteen(const int16_t* x) { return _mm256_loadu_si256((const __m256i*)x); }

void threshold_codes(const int16_t* dots, const bipft::ThresholdRows& rows, int n, uint64_t* bits,
                     uint64_t* mask) {
  for (int i = 0; i < words_of(n) * 64; i += 32) {
    __m256i plus[2], not_minus[2];
    for (int h = 0; h < 2; h++) {
      const int at = i + 16 * h;
      const __m256i dot = sixteen(dots + at);
      plus[h] = _mm256_or_si256(_mm256_cmpgt_epi16(dot, sixteen(rows.above + at)),
                                _mm256_cmpgt_epi16(sixteen(rows.below + at), dot));
      if (mask)
        not_minus[h] = _mm256_or_si256(_mm256_cmpgt_epi16(sixteen(rows.minus_from + at), dot),
                                       _mm256_cmpgt_epi16(dot, sixteen(rows.minus_to + at)));
    }
    const uint32_t word = bits_of_32(plus[0], plus[1]);
    set_codes(bits, i, word);
    if (mask) set_codes(mask, i, word | ~bits_of_32(not_minus[0], not_minus[1]));
  }
}

}  // namespace

const bipft::Kernels bipft::kAvx2Kernels = {
    "avx2", index_bytes, put_row, put_octet, products, threshold_codes, sum_codes,
    norm,   scaled,      dot,     add_scaled, attend};
