// A packed model as the kernels need it: weights in an instruction set's order, and thresholds.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "bipft_runtime.h"
#include "buffer.h"
#include "kernels.h"
#include "thresholds.h"

namespace bipft {

struct ModelError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Floats = Buffer<float>;

struct Linear {
  int inputs = 0, outputs = 0;
  Buffer<uint8_t> index;
  std::vector<int64_t> zeros;  // output * inputs + input of weights with code 0, ascending
  Floats scales, bias;         // of each output
  Floats shift;                // added to each input; -1 in the padding
  float input_scale = 1;

  // Dots of code rows, exact for zero weights too.
  void products(const Kernels& kernels, const CodeRows& codes, int16_t* out, size_t stride) const;
};

struct Norm {
  Floats scale, bias;
};

struct Layer {
  Linear query, key, value, attention_output, ffn_input, ffn_output;
  Thresholds query_codes, key_codes, value_codes, inner_codes;
  float query_scale = 1, key_scale = 1, probs_scale = 1;
  Floats value_scales;  // the one scale of values, for each channel
  float attended_above = 0;  // the probability above which a query attends
  Norm attention_norm, ffn_norm;
  // [4 * rank + 1][padded(hidden)]: rank rows each of query, query_residual, key, key_residual; and
  // one of value.
  Floats estimator_kernel;
  std::vector<float> estimator_bias;
};

class Model {
 public:
  // Raises: ModelError naming what is wrong.
  Model(const bipft_architecture& architecture, const bipft_tensor* tensors, int count,
        const Kernels& kernels);

  int width() const { return shape.hidden / shape.heads; }  // of a head
  NormRow norm_row(const Norm& norm) const {
    return {norm.scale.data(), norm.bias.data(), live.data(), shape.epsilon, shape.hidden};
  }

  bipft_architecture shape;
  Buffer<uint8_t> words;           // [vocab_size][hidden / 8]
  std::vector<int64_t> word_zeros;  // token * hidden + channel of codes 0, ascending
  std::vector<float> word_scales;
  Floats positions, segments;  // [rows][padded(hidden)]
  Norm norm, pooler_norm;
  std::vector<Layer> layers;
  Linear pooler;
  Floats live, nothing;  // 1 for each of hidden values, 0 in the padding; zeros
};

}  // namespace bipft
