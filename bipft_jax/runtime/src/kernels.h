// What each instruction set provides. Its file is compiled for that set alone and shares no
// function with other files, so that no instruction of it runs on a processor without it.
//
// Codes are -1, 0 and 1. A row of n codes is ceil(n / 64) words of 64 bits, the first code lowest:
// bit 1 is +1. A second plane, the mask, has bit 0 where the code is 0 (and the first plane has 0
// there too); without a mask no code is 0. Bits beyond n are 0 in both planes.
//
// Rows of numbers are padded to a multiple of kPad, and functions may write the padding.
// Floating-point results are the same bits in every set: sums are over 16 lanes in one fixed
// order, and products and sums are not contracted.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bipft {

constexpr int kPad = 64;
constexpr int kRows = 4;    // rows of codes come in multiples of this
constexpr int kChunk = 16;  // tokens that are worked on together

constexpr int words_of(int n) { return (n + 63) / 64; }
constexpr int padded(int n) { return (n + kPad - 1) / kPad * kPad; }

struct CodeRows {
  const uint64_t* bits;
  const uint64_t* mask;  // or null
  size_t stride;         // words from one row to the next
  int rows;              // a multiple of kRows
};

// The code that follows from an integer `dot`: +1 where dot > above or dot < below, -1 where
// minus_from <= dot <= minus_to, else 0. One of each for every channel.
struct ThresholdRows {
  const int16_t *above, *below, *minus_from, *minus_to;
};

struct NormRow {
  const float *scale, *bias, *live;  // live: 1 for each value, 0 in the padding
  float epsilon;
  int size;
};

struct AttendRows {
  int rows, tokens;        // queries, at most kChunk, and keys; below, rows of padded(tokens)
  const int16_t* dots;     // query codes times key codes
  const float* residuals;  // added to the scaled dots; very negative in the padding
  size_t residual_stride;  // 0 for one row for all queries
  const float* values;     // one row, summed where attended: estimates of values; or null
  float query_scale, key_scale, inverse_root, threshold;
  bool softmax;
};

struct Kernels {
  const char* name;

  // Weights, an index of `outputs` rows of `inputs` codes without zeros.
  size_t (*index_bytes)(int outputs, int inputs);
  void (*put_row)(uint8_t* index, int inputs, int output, const uint64_t* bits);
  // Eight inputs, 8 * octet and on, of every output: a byte each.
  void (*put_octet)(uint8_t* index, int inputs, int outputs, int octet, const uint8_t* bytes);

  // out[r * stride + n]: sum over the inputs of code times weight. Writes padded(outputs) a row.
  void (*products)(const CodeRows& codes, const uint8_t* index, int outputs, int inputs,
                   int16_t* out, size_t stride);

  // Codes of a row of n dots; mask may be null.
  void (*threshold_codes)(const int16_t* dots, const ThresholdRows& rows, int n, uint64_t* bits,
                          uint64_t* mask);
  // Codes of the signs of x + shift; returns whether any is 0. shift is not 0 in the padding.
  bool (*sum_codes)(const float* x, const float* shift, int n, uint64_t* bits, uint64_t* mask);

  // A layer normalisation of x; out may be x.
  void (*norm)(const float* x, const NormRow& row, float* out);
  // out = dots * scale * scales + bias + residual; out may be residual.
  void (*scaled)(const int16_t* dots, float scale, const float* scales, const float* bias,
                 const float* residual, int n, float* out);
  // Sum of x[i] * y[i].
  float (*dot)(const float* x, const float* y, int n);
  // out += factor * x.
  void (*add_scaled)(float factor, const float* x, int n, float* out);

  // Where queries attend: bits, rows of words_of(tokens) words; and the sum of values there of each
  // query. scores: scratch rows.
  void (*attend)(const AttendRows& rows, float* scores, uint64_t* bits, float* sums);
};

extern const Kernels kPortableKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kNeonKernels;

}  // namespace bipft
