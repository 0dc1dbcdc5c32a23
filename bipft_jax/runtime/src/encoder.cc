#include "encoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace bipft {
namespace {

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
    desk.row.resize(padded(hidden));
    desk.scores.resize((size_t)kChunk * rows);
    desk.extras.resize((size_t)kChunk * padded(hidden));
    desk.residuals.resize((size_t)kChunk * rows);
  }
}

void Encoder::abandon_foreign_team() {
  if (team_ && !team_->of_this_process()) (void)team_.release();
}

void Encoder::work(int threads, const std::function<void(int)>& part) {
  abandon_foreign_team();
  if (!team_) team_ = std::make_unique<Team>();
  team_->run(threads, part);
}

int Encoder::at_work(int threads, int tokens) {
  return std::clamp(threads, 1, std::min(shares_of(tokens), kMostThreads));
}

Encoder::Span Encoder::span(int thread, int threads) const {
  const int shares = shares_of(tokens_);
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
  threads = at_work(threads, tokens);
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
  threads = at_work(threads, tokens);
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
  const bool masked = kernels_.sum_codes(first.data(), linear.shift.data(), hidden,
                                         codes.bits_of(0), codes.mask_of(0));
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
    team_->wait_for_all();
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
