// The forward pass of one sequence, without padding.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "kernels.h"
#include "model.h"
#include "team.h"

namespace bipft {

// Codes of rows: both planes, and whether a mask is needed.
struct CodePlanes {
  Buffer<uint64_t> bits, mask;
  size_t stride = 0;
  void resize(int rows, int codes);
  CodeRows rows(int first, int count, bool masked) const;
  uint64_t* bits_of(int row) { return &bits[row * stride]; }
  uint64_t* mask_of(int row) { return &mask[row * stride]; }
};

class Encoder {
 public:
  Encoder(Model model, const Kernels& kernels) : model_(std::move(model)), kernels_(kernels) {}
  ~Encoder() { abandon_foreign_team(); }
  Encoder(const Encoder&) = delete;
  Encoder& operator=(const Encoder&) = delete;

  // Raises: ModelError for ids, segments or a number of tokens that the model has not. Threads
  // change no bit of the result.
  void encode(const int32_t* ids, const int32_t* segments, int tokens, int threads, float* hidden,
              float* pooled);
  void embed(const int32_t* ids, const int32_t* segments, int tokens, float* hidden);
  void layers(int first, int last, const float* before, int tokens, int threads, float* after);
  void pool(const float* first_token, float* pooled);

  const Kernels& kernels() const { return kernels_; }

 private:
  // A thread's tokens begin at a multiple of this: it owns bytes of the index of values.
  static constexpr int kShare = 8;
  struct Zero {  // a key or value with code 0
    int token, channel;
  };
  struct Desk {  // what one thread works on
    Buffer<int16_t> dots, context_dots;
    CodePlanes inputs, head, attended;
    Floats row, extras, residuals, scores;
    std::vector<Zero> key_zeros[2], value_zeros[2];
  };
  struct Span {  // tokens of one thread
    int first, last;
  };

  void check_tokens(int tokens) const;
  void check_inputs(const int32_t* ids, const int32_t* segments, int tokens) const;
  void prepare(int tokens, int threads);
  void abandon_foreign_team();
  void work(int threads, const std::function<void(int)>& part);
  static int shares_of(int tokens) { return (tokens + kShare - 1) / kShare; }
  // How many of `threads` get tokens: another would only wait for them, at every layer.
  static int at_work(int threads, int tokens);
  Span span(int thread, int threads) const;
  void embed_row(int32_t id, int32_t segment, int position, float* row) const;
  void run_layers(int first, int last, int thread, Span span);
  void project(const Layer& layer, int turn, Desk& desk, Span span);
  void key_rows(const Layer& layer, int turn, Desk& desk, int first, int count);
  void value_rows(const Layer& layer, int turn, Desk& desk, int first, int count);
  void estimate(const Layer& layer, int turn, Span span);
  void attend(const Layer& layer, int turn, Desk& desk, int first, int count);
  void attend_head(const Layer& layer, int turn, Desk& desk, int head, int first, int count);
  void feed_forward(const Layer& layer, Desk& desk, Span span);
  bool input_codes(const Linear& linear, CodePlanes& planes, int first, int count);
  void add_and_norm(const Linear& linear, const Norm& norm, Desk& desk, int first, int count);

  float* x_row(int token) { return &x_[(size_t)token * padded(model_.shape.hidden)]; }

  Model model_;
  const Kernels& kernels_;
  std::unique_ptr<Team> team_;
  int tokens_ = 0;
  // Keys, values and estimates are double-buffered: a thread may be one layer ahead of another.
  Floats x_, estimates_[2], beyond_;  // beyond_: 0 for tokens, very negative in the padding
  CodePlanes query_, context_, inner_;
  std::vector<char> context_masked_;  // of each row's chunk
  Buffer<uint8_t> key_index_[2], value_index_[2];
  size_t key_bytes_ = 0, value_bytes_ = 0;  // of one head
  std::vector<Desk> desks_;
};

}  // namespace bipft
