// The attention of Encoder.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "bits.h"
#include "encoder.h"

namespace bipft {
namespace {

// Calls `visit` with the channels of a row of n codes that are 0.
template <class Visit>
void visit_zeros(const uint64_t* mask, int n, const Visit& visit) {
  for (int i = 0; i < n; i++)
    if (!(mask[i / 64] >> i % 64 & 1)) visit(i);
}

}  // namespace

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
    const auto all = [&](int part, int e) { return estimates + (part * rank + e) * rows; };
    const auto own = [&](int part, int e) { return all(part, e)[first + r]; };
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
  desk.attended.stride = words_of(tokens_);
  const AttendRows rows_of_head = {count,
                                   tokens_,
                                   desk.dots.data(),
                                   rank ? desk.residuals.data() : beyond_.data(),
                                   rank ? rows : 0,
                                   rank ? &estimates_[turn][4 * rank * rows] : nullptr,
                                   layer.query_scale,
                                   layer.key_scale,
                                   1.0f / std::sqrt((float)width),
                                   layer.attended_above,
                                   model_.shape.softmax != 0};
  float sums[kChunk];
  kernels_.attend(rows_of_head, desk.scores.data(), desk.attended.bits_of(0), sums);
  for (int r = 0; r < count; r++) std::fill_n(&desk.extras[r * hidden + start], width, sums[r]);
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

}  // namespace bipft
