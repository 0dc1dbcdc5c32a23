/* The C interface of the compiled encoder. One model may be used from several threads; its calls
 * run one after the other. Nothing here throws, and no pointer is kept after a call. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define BIPFT_API __attribute__((visibility("default")))
#else
#define BIPFT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Changes with every change of this interface. */
#define BIPFT_ABI_VERSION 2

/* bipft_runtime/architecture.py says what the fields mean. The last six are 0 or 1. */
typedef struct {
  int32_t layers, hidden, heads, intermediate, vocab_size, max_positions, segment_types;
  int32_t estimator_rank;
  float epsilon;
  int32_t scales_per_output, softmax, learned_scales, relu, unsigned_ffn, layernorm_residual;
} bipft_architecture;

/* A tensor of the file: its name there, and its bytes as they are there. */
typedef struct {
  const char* name;
  const void* data;
  uint64_t bytes;
} bipft_tensor;

typedef struct bipft_model bipft_model;

BIPFT_API int32_t bipft_abi_version(void);

/* The instruction sets that this processor has, the fastest first, separated by commas. */
BIPFT_API const char* bipft_instruction_sets(void);

/* A model that copies what it needs, for an instruction set (the fastest for null or ""). Null and
 * a message in `error` for an unknown set, or tensors that do not fit the architecture. */
BIPFT_API bipft_model* bipft_new(const bipft_architecture* architecture,
                                 const bipft_tensor* tensors, int32_t count,
                                 const char* instruction_set, char* error, size_t error_bytes);
BIPFT_API void bipft_delete(bipft_model* model);
BIPFT_API const char* bipft_instruction_set(const bipft_model* model);

/* The following return 0, or 1 and a message in `error`. Hidden states are float [tokens][hidden].
 */

/* One sequence without padding: ids and segments [tokens] -> hidden, pooled [hidden]. */
BIPFT_API int32_t bipft_encode(bipft_model* model, const int32_t* ids, const int32_t* segments,
                               int32_t tokens, int32_t threads, float* hidden, float* pooled,
                               char* error, size_t error_bytes);
/* The parts of it. first <= number of a layer < last. */
BIPFT_API int32_t bipft_embed(bipft_model* model, const int32_t* ids, const int32_t* segments,
                              int32_t tokens, float* hidden, char* error, size_t error_bytes);
BIPFT_API int32_t bipft_layers(bipft_model* model, int32_t first, int32_t last,
                               const float* before, int32_t tokens, int32_t threads, float* after,
                               char* error, size_t error_bytes);
BIPFT_API int32_t bipft_pool(bipft_model* model, const float* first_token, float* pooled,
                             char* error, size_t error_bytes);

/* dots[r][n]: products of codes (bits and mask [rows][ceil(inputs / 64)]; mask may be null) with
 * weights [outputs][ceil(inputs / 64)], computed `times` times, for tests and measurements. Rows
 * are a multiple of 4; a row of dots has outputs rounded up to a multiple of 64. Returns seconds
 * of one time, or -1 for an unknown instruction set. */
BIPFT_API double bipft_products(const char* instruction_set, const uint64_t* bits,
                                const uint64_t* mask, int32_t rows, const uint64_t* weights,
                                int32_t outputs, int32_t inputs, int32_t times, int16_t* dots);

#ifdef __cplusplus
}
#endif
