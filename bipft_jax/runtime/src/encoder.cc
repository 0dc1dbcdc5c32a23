#include "encoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "bits.h"

namespace bipft {
namespace {

constexpr int kChunk = 16;  // tokens whose products are computed together
constexpr int kShare = 8;   // a thread's tokens begin at a multiple: it owns bytes of value rows
constexpr int kMostThreads = 1024;
constexpr float kNever = -1e30f;  // a score that is never attended

int up_to_rows(int count) { return (count + kRows - 1) / kRows * kRows; }

}  // namespace

void CodePlanes::resize(int rows, int codes) {
  stride = words_of(codes);
  bits.resize(rows * stride);
  mask.resize(rows * stride);
}

CodeRows CodePlanes::rows(int first, int count, bool masked) const {
  return {bits.data() + first * stride, masked ? mask.data() + first * stride : nullptr, stride,
          up_to_rows(count)};
}

void Encoder::check_tokens(int tokens) const {
  if (tokens < 1 || tokens > model_.shape.max_positions)
    throw ModelError(std::to_string(tokens) + " tokens, not from 1 to " +
                     std::to_string(model_.shape.max_positions));
}

void Encoder::check_inputs(const int32_t* ids, const int32_t* segments, int tokens) const {
  check_tokens(tokens);
  for (int i = 0; i < tokens; i++) {
    if (ids[i] < 0 || ids[i] >= model_.shape.vocab_size)
      throw ModelError("token " + std::to_string(i) + " has id " + std::to_string(ids[i]) +
                       ", not from 0 to " + std::to_string(model_.shape.vocab_size - 1));
    if (segments[i] < 0 || segments[i] >= model_.shape.segment_types)
      throw ModelError("token " + std::to_string(i) + " has segment " +
                       std::to_string(segments[i]));
  }
}

void Encoder::prepare(int tokens, int threads) {
  const bipft_architecture& shape = model_.shape;
  const int hidden = shape.hidden, width = model_.width(), rows = padded(tokens);
  tokens_ = tokens;
  x_.resize((size_t)rows * padded(hidden));
  beyond_.resize(rows);
  for (int i = 0; i < rows; i++) beyond_[i] = i < tokens ? 0.0f : kNever;
  query_.resize(rows, hidden);
  context_.resize(rows, hidden);
  inner_.resize(rows, shape.intermediate);
  context_masked_.assign(rows, 0);
  key_bytes_ = kernels_.index_bytes(rows, width);
  value_bytes_ = kernels_.index_bytes(width, rows);
  for (int turn = 0; turn < 2; turn++) {
    key_index_[turn].resize(shape.heads * key_bytes_);
    value_index_[turn].resize(shape.heads * value_bytes_);
    estimates_[turn].resize((size_t)(4 * shape.estimator_rank + 1) * rows);
  }
  while ((int)desks_.size() < threads) desks_.emplace_back();
  for (Desk& desk : desks_)  // also of threads that do not work this time
    for (int turn = 0; turn < 2; turn++) {
      desk.key_zeros[turn].clear();
      desk.value_zeros[turn].clear();
    }
  const int widest = std::max({padded(hidden), padded(shape.intermediate), rows});
  for (int i = 0; i < threads; i++) {
    Desk& desk = desks_[i];
    desk.dots.resize((size_t)kChunk * widest);
    // The last head's padding goes beyond the row.
    desk.context_dots.resize((size_t)kChunk * (padded(hidden) + padded(width)));
    desk.inputs.resize(kChunk, hidden);
    desk.head.resize(kChunk, width);
    desk.attended.resize(kChunk, rows);
    desk.row.resize(std::max(padded(hidden), rows));
    desk.extras.resize((size_t)kChunk * padded(hidden));
    desk.residuals.resize((size_t)kChunk * rows);
  }
}

Encoder::Span Encoder::span(int thread, int threads) const {
  const int shares = (tokens_ + kShare - 1) / kShare;
  return {shares * thread / threads * kShare,
          std::min(tokens_, shares * (thread + 1) / threads * kShare)};
}

void Encoder::embed_row(int32_t id, int32_t segment, int position, float* row) const {
  const int hidden = model_.shape.hidden, stride = padded(hidden);
  const uint8_t* bits = model_.words.data() + (size_t)id * (hidden / 8);
  const float scale = model_.word_scales[id], signed_scale[2] = {-scale, scale};
  for (int i = 0; i < hidden; i++) row[i] = signed_scale[bits[i / 8] >> i % 8 & 1];
  const int64_t base = (int64_t)id * hidden;
  const std::vector<int64_t>& zeros = model_.word_zeros;
  auto zero = std::lower_bound(zeros.begin(), zeros.end(), base);
  for (; zero != zeros.end() && *zero < base + hidden; zero++) row[*zero - base] = 0;
  const float* place = &model_.positions[(size_t)position * stride];
  const float* kind = &model_.segments[(size_t)segment * stride];
  for (int i = 0; i < hidden; i++) row[i] = row[i] + place[i] + kind[i];
  std::fill(row + hidden, row + stride, 0.0f);
  kernels_.norm(row, model_.norm_row(model_.norm), row);
}

void Encoder::embed(const int32_t* ids, const int32_t* segments, int tokens, float* hidden) {
  check_inputs(ids, segments, tokens);
  const int size = model_.shape.hidden;
  Floats row(padded(size));
  for (int i = 0; i < tokens; i++) {
    embed_row(ids[i], segments[i], i, row.data());
    std::memcpy(hidden + (size_t)i * size, row.data(), size * sizeof(float));
  }
}

void Encoder::encode(const int32_t* ids, const int32_t* segments, int tokens, int threads,
                     float* hidden, float* pooled) {
  check_inputs(ids, segments, tokens);
  threads = std::clamp(threads, 1, kMostThreads);
  prepare(tokens, threads);
  const int size = model_.shape.hidden;
  work(threads, [&](int thread) {
    const Span own = span(thread, threads);
    for (int i = own.first; i < own.last; i++) embed_row(ids[i], segments[i], i, x_row(i));
    run_layers(0, model_.shape.layers, thread, own);
    for (int i = own.first; i < own.last; i++)
      std::memcpy(hidden + (size_t)i * size, x_row(i), size * sizeof(float));
  });
  pool(hidden, pooled);
}

void Encoder::layers(int first, int last, const float* before, int tokens, int threads,
                     float* after) {
  check_tokens(tokens);
  if (first < 0 || first > last || last > model_.shape.layers)
    throw ModelError("layers " + std::to_string(first) + " to " + std::to_string(last) + " of " +
                     std::to_string(model_.shape.layers));
  threads = std::clamp(threads, 1, kMostThreads);
  prepare(tokens, threads);
  const int size = model_.shape.hidden;
  work(threads, [&](int thread) {
    const Span own = span(thread, threads);
    for (int i = own.first; i < own.last; i++) {
      std::memcpy(x_row(i), before + (size_t)i * size, size * sizeof(float));
      std::fill(x_row(i) + size, x_row(i) + padded(size), 0.0f);
    }
    run_layers(first, last, thread, own);
    for (int i = own.first; i < own.last; i++)
      std::memcpy(after + (size_t)i * size, x_row(i), size * sizeof(float));
  });
}

void Encoder::pool(const float* first_token, float* pooled) {
  const int hidden = model_.shape.hidden;
  const Linear& linear = model_.pooler;
  Floats first(padded(hidden)), row(padded(hidden));
  std::memcpy(first.data(), first_token, hidden * sizeof(float));
  CodePlanes codes;
  codes.resize(kRows, hidden);
  const bool masked = kernels_.sum_codes(first.data(), linear.shift.data(), hidden, codes.bits_of(0),
                                         codes.mask_of(0));
  Buffer<int16_t> dots((size_t)kRows * padded(hidden));
  linear.products(kernels_, codes.rows(0, 1, masked), dots.data(), padded(hidden));
  kernels_.scaled(dots.data(), linear.input_scale, linear.scales.data(), linear.bias.data(),
                  model_.nothing.data(), hidden, row.data());
  if (model_.shape.layernorm_residual) {
    kernels_.norm(row.data(), model_.norm_row(model_.pooler_norm), row.data());
    for (int i = 0; i < hidden; i++) row[i] += first[i];
  }
  for (int i = 0; i < hidden; i++) pooled[i] = std::tanh(row[i]);
}

void Encoder::run_layers(int first, int last, int thread, Span span) {
  Desk& desk = desks_[thread];
  for (int number = first; number < last; number++) {
    const Layer& layer = model_.layers[number];
    const int turn = number % 2;
    project(layer, turn, desk, span);
    if (model_.shape.estimator_rank) estimate(layer, turn, span);
    team_.wait_for_all();
    for (int at = span.first; at < span.last; at += kChunk)
      attend(layer, turn, desk, at, std::min(kChunk, span.last - at));
    for (int at = span.first; at < span.last; at += kChunk) {
      const int count = std::min(kChunk, span.last - at);
      layer.attention_output.products(kernels_, context_.rows(at, count, context_masked_[at]),
                                      desk.dots.data(), padded(model_.shape.hidden));
      add_and_norm(layer.attention_output, layer.attention_norm, desk, at, count);
    }
    feed_forward(layer, desk, span);
  }
}

// Codes of a linear's input, rows first and on of x; returns whether any is 0.
bool Encoder::input_codes(const Linear& linear, CodePlanes& planes, int first, int count) {
  bool zeros = false;
  for (int r = 0; r < count; r++)
    zeros |= kernels_.sum_codes(x_row(first + r), linear.shift.data(), linear.inputs,
                                planes.bits_of(r), planes.mask_of(r));
  return zeros;
}

void Encoder::add_and_norm(const Linear& linear, const Norm& norm, Desk& desk, int first,
                           int count) {
  const size_t stride = padded(linear.outputs);
  for (int r = 0; r < count; r++) {
    float* row = x_row(first + r);
    kernels_.scaled(&desk.dots[r * stride], linear.input_scale, linear.scales.data(),
                    linear.bias.data(), row, linear.outputs, row);
    kernels_.norm(row, model_.norm_row(norm), row);
  }
}

void Encoder::project(const Layer& layer, int turn, Desk& desk, Span span) {
  const int hidden = model_.shape.hidden;
  const size_t stride = padded(hidden);
  desk.key_zeros[turn].clear();
  desk.value_zeros[turn].clear();
  for (const Linear* linear : {&layer.query, &layer.key, &layer.value})
    for (int at = span.first; at < span.last; at += kChunk) {
      const int count = std::min(kChunk, span.last - at);
      const bool masked = input_codes(*linear, desk.inputs, at, count);
      linear->products(kernels_, desk.inputs.rows(0, count, masked), desk.dots.data(), stride);
      if (linear == &layer.key) {
        key_rows(layer, turn, desk, at, count);
      } else if (linear == &layer.value) {
        value_rows(layer, turn, desk, at, count);
      } else {
        for (int r = 0; r < count; r++)
          kernels_.threshold_codes(&desk.dots[r * stride], layer.query_codes.rows(), hidden,
                                   query_.bits_of(at + r), query_.mask_of(at + r));
      }
    }
}

namespace {

// Calls `visit` with the channels of a row of n codes that are 0.
template <class Visit>
void visit_zeros(const uint64_t* mask, int n, const Visit& visit) {
  for (int i = 0; i < n; i++)
    if (!(mask[i / 64] >> i % 64 & 1)) visit(i);
}

}  // namespace

void Encoder::key_rows(const Layer& layer, int turn, Desk& desk, int first, int count) {
  const int hidden = model_.shape.hidden, width = model_.width();
  CodePlanes& codes = desk.inputs;  // no longer needed as inputs
  for (int r = 0; r < count; r++) {
    kernels_.threshold_codes(&desk.dots[(size_t)r * padded(hidden)], layer.key_codes.rows(), hidden,
                             codes.bits_of(r), codes.mask_of(r));
    for (int head = 0; head < model_.shape.heads; head++) {
      cut(codes.bits_of(r), head * width, width, desk.head.bits_of(0));
      kernels_.put_row(key_index_[turn].data() + head * key_bytes_, width, first + r,
                       desk.head.bits_of(0));
    }
    if (layer.key_codes.zeros())
      visit_zeros(codes.mask_of(r), hidden,
                  [&](int channel) { desk.key_zeros[turn].push_back({first + r, channel}); });
  }
}

void Encoder::value_rows(const Layer& layer, int turn, Desk& desk, int first, int count) {
  const int hidden = model_.shape.hidden, width = model_.width();
  CodePlanes& codes = desk.inputs;
  for (int r = 0; r < count; r++) {
    kernels_.threshold_codes(&desk.dots[(size_t)r * padded(hidden)], layer.value_codes.rows(),
                             hidden, codes.bits_of(r), codes.mask_of(r));
    if (layer.value_codes.zeros())
      visit_zeros(codes.mask_of(r), hidden,
                  [&](int channel) { desk.value_zeros[turn].push_back({first + r, channel}); });
  }
  // The index has tokens as inputs: eight tokens by eight channels are transposed at once.
  const int octets = (width + 7) / 8;
  uint8_t* bytes = reinterpret_cast<uint8_t*>(desk.row.data());
  for (int eight = 0; eight < count; eight += kShare)
    for (int head = 0; head < model_.shape.heads; head++) {
      const int rows = std::min(kShare, count - eight);
      for (int r = 0; r < rows; r++)
        cut(codes.bits_of(eight + r), head * width, width, desk.head.bits_of(r));
      for (int octet = 0; octet < octets; octet++) {
        uint64_t square = 0;
        for (int r = 0; r < rows; r++)
          square |= (desk.head.bits_of(r)[octet / 8] >> octet % 8 * 8 & 255) << 8 * r;
        square = transposed(square);
        for (int c = 0; c < 8; c++) bytes[8 * octet + c] = (uint8_t)(square >> 8 * c);
      }
      kernels_.put_octet(value_index_[turn].data() + head * value_bytes_, tokens_, width,
                         (first + eight) / 8, bytes);
    }
}

void Encoder::estimate(const Layer& layer, int turn, Span span) {
  const int hidden = model_.shape.hidden, rank = model_.shape.estimator_rank;
  const size_t rows = padded(tokens_);
  for (int e = 0; e <= 4 * rank; e++)
    for (int i = span.first; i < span.last; i++) {
      const float* kernel = &layer.estimator_kernel[(size_t)e * padded(hidden)];
      const float value = kernels_.dot(x_row(i), kernel, hidden) + layer.estimator_bias[e];
      // Values enter as they do in the context: times the scale of probabilities.
      estimates_[turn][e * rows + i] = e == 4 * rank ? value * layer.probs_scale : value;
    }
}

void Encoder::attend(const Layer& layer, int turn, Desk& desk, int first, int count) {
  const int hidden = model_.shape.hidden, rank = model_.shape.estimator_rank;
  const size_t rows = padded(tokens_), stride = padded(hidden) + padded(model_.width());
  const float* estimates = estimates_[turn].data();
  for (int r = 0; rank && r < count; r++) {
    float* residual = &desk.residuals[r * rows];
    std::memcpy(residual, beyond_.data(), rows * sizeof(float));
    const auto own = [&](int part, int e) { return estimates[(part * rank + e) * rows + first + r]; };
    const auto all = [&](int part, int e) { return estimates + (part * rank + e) * rows; };
    for (int e = 0; e < rank; e++)
      kernels_.add_scaled(own(0, e) + own(1, e), all(3, e), tokens_, residual);
    for (int e = 0; e < rank; e++)
      kernels_.add_scaled(own(1, e), all(2, e), tokens_, residual);
  }
  for (int head = 0; head < model_.shape.heads; head++)
    attend_head(layer, turn, desk, head, first, count);
  bool masked = false;
  for (int r = 0; r < count; r++) {
    kernels_.scaled(&desk.context_dots[r * stride], layer.probs_scale, layer.value_scales.data(),
                    model_.nothing.data(), &desk.extras[(size_t)r * padded(hidden)], hidden,
                    desk.row.data());
    masked |= kernels_.sum_codes(desk.row.data(), layer.attention_output.shift.data(), hidden,
                                 context_.bits_of(first + r), context_.mask_of(first + r));
  }
  context_masked_[first] = masked;
}

void Encoder::attend_head(const Layer& layer, int turn, Desk& desk, int head, int first,
                          int count) {
  const int width = model_.width(), start = head * width, rank = model_.shape.estimator_rank;
  const size_t rows = padded(tokens_), hidden = padded(model_.shape.hidden);
  const size_t stride = hidden + padded(width);
  const bool query_zeros = layer.query_codes.zeros();
  for (int r = 0; r < count; r++) {
    cut(query_.bits_of(first + r), start, width, desk.head.bits_of(r));
    if (query_zeros) cut(query_.mask_of(first + r), start, width, desk.head.mask_of(r));
  }
  const CodeRows queries = desk.head.rows(0, count, query_zeros);
  kernels_.products(queries, key_index_[turn].data() + head * key_bytes_, tokens_, width,
                    desk.dots.data(), rows);
  // A key's code 0 counted as -1.
  for (const Desk& other : desks_)
    for (const Zero& zero : other.key_zeros[turn]) {
      const int channel = zero.channel - start;
      if (channel < 0 || channel >= width) continue;
      for (int r = 0; r < count; r++) {
        const size_t word = r * queries.stride + channel / 64;
        if (queries.mask && !(queries.mask[word] >> channel % 64 & 1)) continue;
        desk.dots[r * rows + zero.token] += queries.bits[word] >> channel % 64 & 1 ? 1 : -1;
      }
    }
  const float* values = rank ? &estimates_[turn][4 * rank * rows] : nullptr;
  desk.attended.stride = words_of(tokens_);
  for (int r = 0; r < count; r++) {
    const float* residual = rank ? &desk.residuals[r * rows] : beyond_.data();
    const AttendRow row = {&desk.dots[r * rows], residual,
                           values,               layer.query_scale,
                           layer.key_scale,      1.0f / std::sqrt((float)width),
                           layer.attended_above, model_.shape.softmax != 0,
                           tokens_};
    const float extra = kernels_.attend(row, desk.row.data(), desk.attended.bits_of(r));
    std::fill_n(&desk.extras[r * hidden + start], width, extra);
  }
  // Probabilities have codes 0 and 1: they are their own mask.
  CodeRows attended = desk.attended.rows(0, count, false);
  attended.mask = attended.bits;
  int16_t* context = desk.context_dots.data() + start;
  kernels_.products(attended, value_index_[turn].data() + head * value_bytes_, width, tokens_,
                    context, stride);
  for (const Desk& other : desks_)
    for (const Zero& zero : other.value_zeros[turn]) {
      const int channel = zero.channel - start;
      if (channel < 0 || channel >= width) continue;
      for (int r = 0; r < count; r++)
        context[r * stride + channel] +=
            desk.attended.bits_of(r)[zero.token / 64] >> zero.token % 64 & 1;
    }
}

void Encoder::feed_forward(const Layer& layer, Desk& desk, Span span) {
  const Linear &input = layer.ffn_input, &output = layer.ffn_output;
  const size_t stride = padded(input.outputs);
  const bool inner_zeros = layer.inner_codes.zeros();
  for (int at = span.first; at < span.last; at += kChunk) {
    const int count = std::min(kChunk, span.last - at);
    const bool masked = input_codes(input, desk.inputs, at, count);
    input.products(kernels_, desk.inputs.rows(0, count, masked), desk.dots.data(), stride);
    for (int r = 0; r < count; r++)
      kernels_.threshold_codes(&desk.dots[r * stride], layer.inner_codes.rows(), input.outputs,
                               inner_.bits_of(at + r),
                               inner_zeros ? inner_.mask_of(at + r) : nullptr);
  }
  for (int at = span.first; at < span.last; at += kChunk) {
    const int count = std::min(kChunk, span.last - at);
    output.products(kernels_, inner_.rows(at, count, inner_zeros), desk.dots.data(),
                    padded(output.outputs));
    add_and_norm(output, layer.ffn_norm, desk, at, count);
  }
}

}  // namespace bipft
