// The C interface: errors become messages.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <mutex>
#include <string>

#include "bipft_runtime.h"
#include "dispatch.h"
#include "encoder.h"

struct bipft_model {
  std::mutex mutex;
  bipft::Encoder encoder;
};

namespace {

using bipft::Kernels;

const std::string& names_of_sets() {
  static const std::string names = [] {
    std::string text;
    for (const Kernels* const* set = bipft::supported_kernels(); *set; set++)
      text += (text.empty() ? "" : ",") + std::string((*set)->name);
    return text;
  }();
  return names;
}

// Whether `action` ended without an exception; else its message is in error.
template <class Action>
bool succeeds(char* error, size_t error_bytes, const Action& action) {
  const char* message = "unknown error";
  std::string text;
  try {
    action();
    return true;
  } catch (const std::bad_alloc&) {
    message = "out of memory";
  } catch (const std::exception& exception) {
    text = exception.what();
    message = text.c_str();
  }
  if (error && error_bytes) {
    std::strncpy(error, message, error_bytes - 1);
    error[error_bytes - 1] = 0;
  }
  return false;
}

template <class Action>
int32_t locked(bipft_model* model, char* error, size_t error_bytes, const Action& action) {
  return !succeeds(error, error_bytes, [&] {
    const std::lock_guard<std::mutex> lock(model->mutex);
    action(model->encoder);
  });
}

}  // namespace

int32_t bipft_abi_version(void) { return BIPFT_ABI_VERSION; }

const char* bipft_instruction_sets(void) { return names_of_sets().c_str(); }

bipft_model* bipft_new(const bipft_architecture* architecture, const bipft_tensor* tensors,
                       int32_t count, const char* instruction_set, char* error,
                       size_t error_bytes) {
  bipft_model* model = nullptr;
  succeeds(error, error_bytes, [&] {
    const Kernels* kernels = bipft::kernels_named(instruction_set);
    if (!kernels)
      throw bipft::ModelError("no instruction set " + std::string(instruction_set) +
                              " on this processor: it has " + names_of_sets());
    model = new bipft_model{
        {}, bipft::Encoder(bipft::Model(*architecture, tensors, count, *kernels), *kernels)};
  });
  return model;
}

void bipft_delete(bipft_model* model) { delete model; }

const char* bipft_instruction_set(const bipft_model* model) {
  return model->encoder.kernels().name;
}

int32_t bipft_encode(bipft_model* model, const int32_t* ids, const int32_t* segments,
                     int32_t tokens, int32_t threads, float* hidden, float* pooled, char* error,
                     size_t error_bytes) {
  return locked(model, error, error_bytes, [&](bipft::Encoder& encoder) {
    encoder.encode(ids, segments, tokens, threads, hidden, pooled);
  });
}

int32_t bipft_embed(bipft_model* model, const int32_t* ids, const int32_t* segments,
                    int32_t tokens, float* hidden, char* error, size_t error_bytes) {
  return locked(model, error, error_bytes,
                [&](bipft::Encoder& encoder) { encoder.embed(ids, segments, tokens, hidden); });
}

int32_t bipft_layers(bipft_model* model, int32_t first, int32_t last, const float* before,
                     int32_t tokens, int32_t threads, float* after, char* error,
                     size_t error_bytes) {
  return locked(model, error, error_bytes, [&](bipft::Encoder& encoder) {
    encoder.layers(first, last, before, tokens, threads, after);
  });
}

int32_t bipft_pool(bipft_model* model, const float* first_token, float* pooled, char* error,
                   size_t error_bytes) {
  return locked(model, error, error_bytes,
                [&](bipft::Encoder& encoder) { encoder.pool(first_token, pooled); });
}

double bipft_products(const char* instruction_set, const uint64_t* bits, const uint64_t* mask,
                      int32_t rows, const uint64_t* weights, int32_t outputs, int32_t inputs,
                      int32_t times, int16_t* dots) {
  const Kernels* kernels = bipft::kernels_named(instruction_set);
  if (!kernels) return -1;
  double seconds = -1;
  succeeds(nullptr, 0, [&] {
    const size_t words = bipft::words_of(inputs);
    bipft::Buffer<uint8_t> index(kernels->index_bytes(outputs, inputs));
    for (int n = 0; n < outputs; n++)
      kernels->put_row(index.data(), inputs, n, weights + n * words);
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < times; i++)
      kernels->products({bits, mask, words, rows}, index.data(), outputs, inputs, dots,
                        bipft::padded(outputs));
    seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() /
              std::max(times, 1);
  });
  return seconds;
}
