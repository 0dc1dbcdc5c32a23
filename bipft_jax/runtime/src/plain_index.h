// The index of sets whose lanes are inputs: the rows as they are, [outputs][words]. And threshold
// codes in plain C++.
#pragma once

#include <cstring>

#include "kernels.h"

namespace {

size_t index_bytes(int outputs, int inputs) {
  return (size_t)bipft::padded(outputs) * bipft::words_of(inputs) * 8;
}

void put_row(uint8_t* index, int inputs, int output, const uint64_t* bits) {
  const size_t bytes = (size_t)bipft::words_of(inputs) * 8;
  std::memcpy(index + output * bytes, bits, bytes);
}

void put_octet(uint8_t* index, int inputs, int outputs, int octet, const uint8_t* bytes) {
  for (int n = 0; n < outputs; n++)
    index[(size_t)n * bipft::words_of(inputs) * 8 + octet] = bytes[n];
}

void threshold_codes(const int16_t* dots, const bipft::ThresholdRows& rows, int n, uint64_t* bits,
                     uint64_t* mask) {
  for (int word = 0; word < bipft::words_of(n); word++) {
    uint64_t plus = 0, minus = 0;
    for (int b = 0; b < 64; b++) {
      const int i = 64 * word + b, dot = dots[i];
      plus |= (uint64_t)((dot > rows.above[i]) | (dot < rows.below[i])) << b;
      minus |= (uint64_t)((dot >= rows.minus_from[i]) & (dot <= rows.minus_to[i])) << b;
    }
    bits[word] = plus;
    if (mask) mask[word] = plus | minus;
  }
}

}  // namespace
