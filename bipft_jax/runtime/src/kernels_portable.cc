// Population counts of 64-bit words, for every processor (x86-64-v2 has an instruction for them).
#include "lanes_gnu.h"
//
#include "float_rows.h"
#include "plain_index.h"

namespace {

template <bool kMasked>
void all_products(const bipft::CodeRows& codes, const uint64_t* index, int outputs, int inputs,
                  int16_t* out, size_t stride) {
  constexpr int kColumns = 4;
  const int words = bipft::words_of(inputs);
  for (int n = 0; n < bipft::padded(outputs); n += kColumns) {
    const uint64_t* weights = index + (size_t)n * words;
    for (int r = 0; r < codes.rows; r++) {
      const uint64_t* bits = codes.bits + r * codes.stride;
      const uint64_t* mask = kMasked ? codes.mask + r * codes.stride : nullptr;
      int size = kMasked ? 0 : inputs, counts[kColumns] = {0, 0, 0, 0};
      for (int i = 0; i < words; i++) {
        if (kMasked) size += __builtin_popcountll(mask[i]);
        for (int c = 0; c < kColumns; c++) {
          const uint64_t unequal = bits[i] ^ weights[(size_t)c * words + i];
          counts[c] += __builtin_popcountll(kMasked ? unequal & mask[i] : unequal);
        }
      }
      for (int c = 0; c < kColumns; c++) out[r * stride + n + c] = (int16_t)(size - 2 * counts[c]);
    }
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

const bipft::Kernels bipft::kPortableKernels = {
    "portable", index_bytes, put_row, put_octet, products, threshold_codes, sum_codes,
    norm,       scaled,      dot,     add_scaled, attend};
