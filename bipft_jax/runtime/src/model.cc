#include "model.h"

#include <algorithm>
#include <cstring>

namespace bipft {
namespace {

constexpr int kLargestSum = 32000;  // of inputs or positions: dots and thresholds fit 16 bits
constexpr int64_t kLargest = 1 << 24;
constexpr float kSmallestScale = 1e-5f;  // a learned scale below acts as this

class Tensors {
 public:
  Tensors(const bipft_tensor* tensors, int count) : tensors_(tensors), count_(count) {}

  const bipft_tensor* find(const std::string& name) const {
    for (int i = 0; i < count_; i++)
      if (name == tensors_[i].name) return &tensors_[i];
    return nullptr;
  }

  // The tensor of `size` values of T.
  template <class T>
  const T* get(const std::string& name, uint64_t size) const {
    const bipft_tensor* tensor = find(name);
    if (!tensor || !tensor->data) throw ModelError("no tensor " + name);
    if (tensor->bytes != size * sizeof(T))
      throw ModelError(name + ": " + std::to_string(tensor->bytes) + " bytes, expected " +
                       std::to_string(size * sizeof(T)));
    return static_cast<const T*>(tensor->data);
  }

  // Flat indices from first to last of the tensor NAME.zeros, less first; none without it.
  std::vector<int64_t> zeros(const std::string& name, int64_t first, int64_t last) const {
    std::vector<int64_t> list;
    const bipft_tensor* tensor = find(name + ".zeros");
    if (!tensor) return list;
    const int32_t* indices = static_cast<const int32_t*>(tensor->data);
    const int32_t* end = indices + tensor->bytes / sizeof(int32_t);
    for (const int32_t* at = std::lower_bound(indices, end, first); at < end && *at < last; at++)
      list.push_back(*at - first);
    if (!std::is_sorted(list.begin(), list.end()) || (!list.empty() && list.front() < 0))
      throw ModelError(name + ".zeros: not ascending");
    return list;
  }

 private:
  const bipft_tensor* tensors_;
  int count_;
};

void check(const bipft_architecture& shape) {
  const auto within = [](const char* name, int64_t value, int64_t least, int64_t most) {
    if (value < least || value > most)
      throw ModelError(std::string(name) + " is " + std::to_string(value) + ", not from " +
                       std::to_string(least) + " to " + std::to_string(most));
  };
  within("layers", shape.layers, 1, kLargest);
  within("hidden", shape.hidden, 8, kLargestSum);
  within("intermediate", shape.intermediate, 8, kLargestSum);
  within("heads", shape.heads, 1, shape.hidden);
  within("vocab_size", shape.vocab_size, 1, kLargest);
  within("max_positions", shape.max_positions, 1, kLargestSum);
  within("segment_types", shape.segment_types, 1, kLargest);
  within("estimator_rank", shape.estimator_rank, 0, kLargestSum);
  if (shape.hidden % 8 || shape.intermediate % 8 || shape.hidden % shape.heads)
    throw ModelError("hidden is no multiple of 8 and of heads, or intermediate none of 8");
}

Floats padded_row(const float* values, int n, float padding = 0) {
  Floats row(padded(n));
  std::fill(row.data(), row.data() + padded(n), padding);
  std::memcpy(row.data(), values, n * sizeof(float));
  return row;
}

Floats constant_row(int n, float value) {
  const std::vector<float> values(n, value);
  return padded_row(values.data(), n);
}

Floats padded_rows(const float* values, int rows, int n) {
  Floats table((size_t)rows * padded(n));
  for (int r = 0; r < rows; r++)
    std::memcpy(&table[(size_t)r * padded(n)], values + (size_t)r * n, n * sizeof(float));
  return table;
}

// Reads the linears, norms and scales of a stack of layers, or of a single module.
class Reader {
 public:
  Reader(const bipft_architecture& shape, const Tensors& tensors, const Kernels& kernels)
      : shape_(shape), tensors_(tensors), kernels_(kernels) {}

  Linear linear(const std::string& name, int outputs, int inputs, int layer, int layers) const {
    Linear linear;
    linear.inputs = inputs;
    linear.outputs = outputs;
    linear.index.resize(kernels_.index_bytes(outputs, inputs));
    const size_t row_bytes = inputs / 8;
    const uint8_t* bits =
        tensors_.get<uint8_t>(name + ".bits", (uint64_t)layers * outputs * row_bytes) +
        (size_t)layer * outputs * row_bytes;
    std::vector<uint64_t> row(words_of(inputs));
    for (int n = 0; n < outputs; n++) {
      std::memcpy(row.data(), bits + n * row_bytes, row_bytes);
      kernels_.put_row(linear.index.data(), inputs, n, row.data());
    }
    const int64_t size = (int64_t)outputs * inputs;
    linear.zeros = tensors_.zeros(name, layer * size, (layer + 1) * size);
    linear.scales =
        shape_.scales_per_output
            ? padded_row(rows(name + ".weight_scale", outputs, layer, layers), outputs)
            : constant_row(outputs, *rows(name + ".weight_scale", 1, layer, layers));
    linear.bias = padded_row(rows(name + ".bias", outputs, layer, layers), outputs);
    const bool shifted = tensors_.find(name + ".input_shift");
    const std::vector<float> none(inputs, 0.0f);
    linear.shift = padded_row(
        shifted ? rows(name + ".input_shift", inputs, layer, layers) : none.data(), inputs, -1);
    linear.input_scale = scale(name + ".input_scale", layer, layers);
    return linear;
  }

  Norm norm(const std::string& name, int layer, int layers) const {
    return {padded_row(rows(name + ".scale", shape_.hidden, layer, layers), shape_.hidden),
            padded_row(rows(name + ".bias", shape_.hidden, layer, layers), shape_.hidden)};
  }

  float scale(const std::string& name, int layer, int layers) const {
    return shape_.learned_scales ? std::max(*rows(name, 1, layer, layers), kSmallestScale) : 1.0f;
  }

  // The n floats of a layer.
  const float* rows(const std::string& name, uint64_t n, int layer, int layers) const {
    return tensors_.get<float>(name, layers * n) + layer * n;
  }

 private:
  const bipft_architecture& shape_;
  const Tensors& tensors_;
  const Kernels& kernels_;
};

Thresholds signs_of(const Linear& linear) {
  Thresholds codes(linear.outputs);
  for (int n = 0; n < linear.outputs; n++)
    codes.set(n, linear.inputs, (double)linear.input_scale * linear.scales[n], linear.bias[n],
              Activation::kNone, 0, false, 0);
  return codes;
}

Layer read_layer(const bipft_architecture& shape, const Reader& reader, int number) {
  const int count = shape.layers, hidden = shape.hidden;
  const auto linear = [&](const char* name, int outputs, int inputs) {
    return reader.linear(std::string("layers.") + name, outputs, inputs, number, count);
  };
  Layer layer;
  layer.query = linear("query", hidden, hidden);
  layer.key = linear("key", hidden, hidden);
  layer.value = linear("value", hidden, hidden);
  layer.attention_output = linear("attention_output", hidden, hidden);
  layer.ffn_input = linear("ffn_input", shape.intermediate, hidden);
  layer.ffn_output = linear("ffn_output", hidden, shape.intermediate);

  layer.query_codes = signs_of(layer.query);
  layer.key_codes = signs_of(layer.key);
  layer.value_codes = signs_of(layer.value);
  layer.inner_codes = Thresholds(shape.intermediate);
  const Linear& inner = layer.ffn_input;
  for (int n = 0; n < shape.intermediate; n++)
    layer.inner_codes.set(n, hidden, (double)inner.input_scale * inner.scales[n], inner.bias[n],
                          shape.relu ? Activation::kRelu : Activation::kGelu,
                          layer.ffn_output.shift[n], shape.unsigned_ffn,
                          0.5 * layer.ffn_output.input_scale);

  layer.query_scale = reader.scale("layers.query_scale", number, count);
  layer.key_scale = reader.scale("layers.key_scale", number, count);
  layer.probs_scale = reader.scale("layers.probs_scale", number, count);
  layer.value_scales = constant_row(hidden, reader.scale("layers.value_scale", number, count));
  layer.attended_above = shape.learned_scales ? 0.5f * layer.probs_scale : 0.0f;
  layer.attention_norm = reader.norm("layers.attention_norm", number, count);
  layer.ffn_norm = reader.norm("layers.ffn_norm", number, count);

  if (shape.estimator_rank) {
    const int estimates = 4 * shape.estimator_rank + 1;
    const float* kernel =
        reader.rows("layers.estimators.kernel", (uint64_t)estimates * hidden, number, count);
    layer.estimator_kernel = padded_rows(kernel, estimates, hidden);
    const float* bias = reader.rows("layers.estimators.bias", estimates, number, count);
    layer.estimator_bias.assign(bias, bias + estimates);
  }
  return layer;
}

}  // namespace

void Linear::products(const Kernels& kernels, const CodeRows& codes, int16_t* out,
                      size_t stride) const {
  kernels.products(codes, index.data(), outputs, inputs, out, stride);
  for (const int64_t zero : zeros) {  // its bit is 0: it counted as -1
    const int n = (int)(zero / inputs), i = (int)(zero % inputs);
    for (int r = 0; r < codes.rows; r++) {
      const size_t word = r * codes.stride + i / 64;
      if (codes.mask && !(codes.mask[word] >> i % 64 & 1)) continue;
      out[r * stride + n] += codes.bits[word] >> i % 64 & 1 ? 1 : -1;
    }
  }
}

Model::Model(const bipft_architecture& architecture, const bipft_tensor* list, int count,
             const Kernels& kernels)
    : shape(architecture) {
  check(shape);
  const Tensors tensors(list, count);
  const Reader reader(shape, tensors, kernels);
  const int hidden = shape.hidden;
  const uint64_t bytes = (uint64_t)shape.vocab_size * hidden / 8;
  const uint8_t* bits = tensors.get<uint8_t>("words.bits", bytes);
  words.resize(bytes);
  std::memcpy(words.data(), bits, bytes);
  word_zeros = tensors.zeros("words", 0, (int64_t)shape.vocab_size * hidden);
  const float* scales = tensors.get<float>("words.scale", shape.vocab_size);
  word_scales.assign(scales, scales + shape.vocab_size);
  const auto table = [&](const char* name, int rows) {
    return padded_rows(tensors.get<float>(name, (uint64_t)rows * hidden), rows, hidden);
  };
  positions = table("positions", shape.max_positions);
  segments = table("segments", shape.segment_types);
  norm = reader.norm("norm", 0, 1);
  for (int number = 0; number < shape.layers; number++)
    layers.push_back(read_layer(shape, reader, number));
  pooler = reader.linear("pooler", hidden, hidden, 0, 1);
  if (shape.layernorm_residual) pooler_norm = reader.norm("pooler_norm", 0, 1);
  live = constant_row(hidden, 1);
  nothing = constant_row(hidden, 0);
}

}  // namespace bipft
