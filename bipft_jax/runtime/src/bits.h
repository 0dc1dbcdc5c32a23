// Parts and transposes of rows of bits.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace bipft {

// Bits first to first + n of a row, as a row.
inline void cut(const uint64_t* row, int first, int n, uint64_t* out) {
  const int shift = first % 64;
  const uint64_t* from = row + first / 64;
  for (int w = 0; w < words_of(n); w++) {
    uint64_t word = from[w] >> shift;
    if (shift && 64 * (w + 1) - shift < n) word |= from[w + 1] << (64 - shift);
    const int left = n - 64 * w;
    out[w] = left < 64 ? word & (((uint64_t)1 << left) - 1) : word;
  }
}

// 8 x 8 bits: bit 8 i + j of x becomes bit 8 j + i.
inline uint64_t transposed(uint64_t x) {
  uint64_t t = (x ^ (x >> 7)) & 0x00AA00AA00AA00AAull;
  x ^= t ^ (t << 7);
  t = (x ^ (x >> 14)) & 0x0000CCCC0000CCCCull;
  x ^= t ^ (t << 14);
  t = (x ^ (x >> 28)) & 0x00000000F0F0F0F0ull;
  return x ^ t ^ (t << 28);
}

}  // namespace bipft
