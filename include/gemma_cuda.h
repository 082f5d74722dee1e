/* gemma-cuda: Gemma 1, 2 and 3 for programs that are not Rust. Plain C99; C++ may include it as well.
 *
 * A model is a shape, made of the text of config.json. An engine is a model on a device, with its weights, its paged
 * cache of keys and values and the sequences in it. A step is one forward pass over any mix of sequences: prompts,
 * parts of prompts, and single tokens, laid end to end. Files, tokenizers and waiting queues are the host's.
 *
 *     gemma_cuda_model_parse     config.json -> model
 *     gemma_cuda_engine_create   model + options -> engine, all memory taken
 *     gemma_cuda_load_tensor     every tensor by its name, then gemma_cuda_finish_loading
 *     gemma_cuda_add_sequence    a prompt
 *     gemma_cuda_step            feed tokens, sample; gemma_cuda_output says what came of it
 *
 * Rules that hold for every call:
 * - It returns a gemma_cuda_status. Unless it is GEMMA_CUDA_OK, nothing has changed, but for GEMMA_CUDA_DEVICE_FAILED
 *   from a step, after which the engine computes no more (it can be destroyed), and results are not written.
 *   gemma_cuda_last_error has a sentence that names what was wrong.
 * - No exception leaves it, and it never ends the process.
 * - Pointers to data are read during the call only. What a call hands out belongs to the library, and lives as long as
 *   the call's description says. Strings are UTF-8 and end with a zero byte.
 * - Different engines may be used by different threads at the same time, one engine by one thread at a time, whichever.
 *   Models do not change after they are quantized, and may then be shared.
 * - Structs begin with their size, which the _init function of their kind sets with the defaults: later versions may
 *   add members behind, and a host that was built before them goes on working. A size that is larger than the library
 *   knows is refused where something stands behind what it knows.
 */
#ifndef GEMMA_CUDA_H
#define GEMMA_CUDA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Of this header. A library with another number has another layout of calls and must not be used with it. */
#define GEMMA_CUDA_ABI 1u

#if defined(__GNUC__)
#define GEMMA_CUDA_API __attribute__((visibility("default")))
#else
#define GEMMA_CUDA_API
#endif

typedef int32_t gemma_cuda_status;
enum {
  GEMMA_CUDA_OK = 0,
  GEMMA_CUDA_INVALID_ARGUMENT = 1, /* something given cannot be; the sentence names it */
  GEMMA_CUDA_OUT_OF_PAGES = 2,     /* the cache has no room; remove a sequence, or wait until one ends */
  GEMMA_CUDA_DEVICE_FAILED = 3,    /* the device cannot be had, has too little memory, or failed */
  GEMMA_CUDA_OUT_OF_MEMORY = 4,    /* of the host */
  GEMMA_CUDA_INTERNAL = 5          /* a defect of the library; the sentence is worth a report */
};

typedef uint32_t gemma_cuda_dtype;
enum {
  GEMMA_CUDA_F32 = 0,
  GEMMA_CUDA_BF16 = 1,
  GEMMA_CUDA_F16 = 2,
  GEMMA_CUDA_E4M3 = 3 /* FP8 of the OCP standard, without infinities; always with a scale */
};

typedef struct gemma_cuda_model gemma_cuda_model;
typedef struct gemma_cuda_engine gemma_cuda_engine;

/* ---- The library ------------------------------------------------------------------------------------------------ */

/* GEMMA_CUDA_ABI of the library. Any thread. */
GEMMA_CUDA_API uint32_t gemma_cuda_abi(void);
/* Its version, such as "0.1.0". Static. Any thread. */
GEMMA_CUDA_API const char *gemma_cuda_version(void);
/* Whether it was built with the CUDA backend. Any thread. */
GEMMA_CUDA_API uint32_t gemma_cuda_has_cuda(void);
/* How many GPUs this process may use: 0 too where there is no driver, or no CUDA in this build. Any thread. */
GEMMA_CUDA_API uint32_t gemma_cuda_gpu_count(void);
/* Why GPU `index` cannot be used, or with `fp8` not 0 not for a model in FP8: no driver, too old, no such GPU, no
 * cuBLASLt. GEMMA_CUDA_OK if it can. Any thread; takes as long as making a context on the GPU. */
GEMMA_CUDA_API gemma_cuda_status gemma_cuda_check_gpu(uint32_t index, uint32_t fp8);

/* The sentence of the last call with this engine that failed; with NULL, of this thread's last failed call that had no
 * engine. "" if none failed. Lives until the next such call. */
GEMMA_CUDA_API const char *gemma_cuda_last_error(const gemma_cuda_engine *engine);

/* ---- Models ------------------------------------------------------------------------------------------------------ */

/* Makes a model of `bytes` of text in any form of config.json that Gemma 1, 2 and 3 were published in. How a checkpoint
 * was quantized is not read: see gemma_cuda_model_quantize. `model` is to be given to gemma_cuda_model_free. */
GEMMA_CUDA_API gemma_cuda_status gemma_cuda_model_parse(const char *json, size_t bytes, gemma_cuda_model **model);
/* NULL is no error. Engines made of the model live on. */
GEMMA_CUDA_API void gemma_cuda_model_free(gemma_cuda_model *model);

typedef struct gemma_cuda_model_info {
  uint32_t size;
  uint32_t vocab_size;  /* rows of the embedding; token ids are below */
  uint32_t hidden_size; /* width of the residual stream */
  uint32_t layers;
  uint32_t max_positions; /* longest sequence, in tokens */
  uint32_t tensors;       /* see gemma_cuda_model_tensor */
} gemma_cuda_model_info;
GEMMA_CUDA_API void gemma_cuda_model_info_init(gemma_cuda_model_info *info);
GEMMA_CUDA_API gemma_cuda_status gemma_cuda_model_get_info(const gemma_cuda_model *model, gemma_cuda_model_info *info);

/* The name and shape (row-major, [out, in] for matrices) of tensor `index`, of those an engine of this model takes, in
 * the order of the forward pass. `name` and `shape` live as long as the model is not quantized or freed. */
GEMMA_CUDA_API gemma_cuda_status gemma_cuda_model_tensor(const gemma_cuda_model *model, uint32_t index,
                                                         const char **name, const uint64_t **shape, uint32_t *rank);

/* How a matrix is kept and multiplied. */
typedef uint32_t gemma_cuda_scheme;
enum {
  GEMMA_CUDA_PLAIN = 0,      /* as the engine's options say */
  GEMMA_CUDA_FP8_STATIC = 1, /* in E4M3 with a scale for each row; inputs with one scale, which calibration found */
  GEMMA_CUDA_FP8_DYNAMIC = 2 /* in E4M3 with a scale for each row; inputs with a scale for each token */
};
typedef struct gemma_cuda_quantization {
  uint32_t size;
  gemma_cuda_scheme matrices;   /* of the layers */
  gemma_cuda_scheme lm_head;    /* the output embedding; in FP8 it is a matrix of its own, tied or not */
  uint32_t fp8_cache;           /* keys and values in E4M3, with a scale for each head */
  const uint32_t *plain_layers; /* [plain_layer_count] layers whose matrices stay as they are */
  size_t plain_layer_count;
} gemma_cuda_quantization;
GEMMA_CUDA_API void gemma_cuda_quantization_init(gemma_cuda_quantization *quantization);
/* Changes which tensors the model has: matrices in FP8 have a "…weight_scale" and perhaps an "…input_scale", a cache in
 * FP8 "…k_scale" and "…v_scale". A matrix in FP8 may also be loaded unquantized, without its "…weight_scale": it is
 * then quantized row by row on its way to the device. */
GEMMA_CUDA_API gemma_cuda_status gemma_cuda_model_quantize(gemma_cuda_model *model,
                                                           const gemma_cuda_quantization *quantization);

/* ---- Engines ----------------------------------------------------------------------------------------------------- */

/* Level 0: something to know, 1: something to mend. `text` lives during the call, by the thread that uses the engine.
 */
typedef void (*gemma_cuda_log)(void *user, int32_t level, const char *text);

typedef struct gemma_cuda_options {
  uint32_t size;
  gemma_cuda_dtype compute;  /* activations, and keys and values that are not FP8: BF16 or, on the CPU, F32 */
  gemma_cuda_dtype weights;  /* plain matrices: BF16 or, with `compute` F32, F32 */
  uint32_t page_size;        /* tokens in a page of the cache */
  uint32_t pages;            /* of the cache */
  uint32_t max_batch_tokens; /* new tokens in a step, over all sequences */
  uint32_t max_sequences;    /* alive at once */
  uint32_t max_logit_rows;   /* positions in a step whose logits are computed */
  uint32_t threads;          /* of the CPU backend; 0: all cores */
  uint32_t graphs;           /* capture steps as CUDA graphs */
  uint32_t prefix_cache;     /* keep pages of removed sequences for prompts that start alike */
  const char *device;        /* "auto", "reference" (the CPU) or "cuda:N" */
  gemma_cuda_log log;        /* NULL: none */
  void *log_user;            /* its first argument */
} gemma_cuda_options;
GEMMA_CUDA_API void gemma_cuda_options_init(gemma_cuda_options *options);

/* Bytes of device memory that an engine takes, all of it before its first step. Where more is left on a Hopper GPU, a
 * packed copy of an output embedding in bf16 comes on top: three quarters of its bytes. */
typedef struct gemma_cuda_memory {
  uint32_t size;
  uint32_t reserved;
  uint64_t weights, kv_cache, activations, logits, workspace, total;
} gemma_cuda_memory;
GEMMA_CUDA_API void gemma_cuda_memory_init(gemma_cuda_memory *memory);
/* What an engine would take; allocates nothing. Any thread. */
GEMMA_CUDA_API gemma_cuda_status gemma_cuda_memory_budget(const gemma_cuda_model *model,
                                                          const gemma_cuda_options *options, gemma_cuda_memory *memory);

/* Takes the memory. GEMMA_CUDA_DEVICE_FAILED has the numbers and what would fit. `engine` is to be given to
 * gemma_cuda_engine_destroy; the model may be freed before. */
GEMMA_CUDA_API gemma_cuda_status gemma_cuda_engine_create(const gemma_cuda_model *model,
                                                          const gemma_cuda_options *options,
                                                          gemma_cuda_engine **engine);
/* With all its sequences, and steps under way. NULL is no error. */
GEMMA_CUDA_API void gemma_cuda_engine_destroy(gemma_cuda_engine *engine);
/* One line: backend, GPU or instruction set. Lives as long as the engine. */
GEMMA_CUDA_API const char *gemma_cuda_engine_device(const gemma_cuda_engine *engine);

/* `data` is the row-major tensor `name`, of `bytes` bytes; `shape` has `rank` extents. Names are those of checkpoints
 * ("model.layers.0.self_attn.q_proj.weight"), also with the prefixes of models that see ("language_model.…"). It is
 * converted to what the engine keeps. Scales are F32 or BF16, one or as many as the matrix has rows (the cache heads).
 * A tensor of a vision tower is GEMMA_CUDA_INVALID_ARGUMENT, as any that the model has not. */
GEMMA_CUDA_API gemma_cuda_status gemma_cuda_load_tensor(gemma_cuda_engine *engine, const char *name,
                                                        gemma_cuda_dtype dtype, const uint64_t *shape, uint32_t rank,
                                                        const void *data, size_t bytes);
/* Random weights instead, for measuring. */
GEMMA_CUDA_API gemma_cuda_status gemma_cuda_load_random(gemma_cuda_engine *engine, uint64_t seed);
/* After the last tensor. GEMMA_CUDA_INVALID_ARGUMENT names the first that is missing. Captures steps: may take seconds.
 */
GEMMA_CUDA_API gemma_cuda_status gemma_cuda_finish_loading(gemma_cuda_engine *engine);

/* ---- Sequences --------------------------------------------------------------------------------------------------- */

typedef struct gemma_cuda_logprob {
  uint32_t token;
  float logprob; /* under the model: before bias, penalties and temperature */
} gemma_cuda_logprob;
typedef struct gemma_cuda_bias {
  uint32_t token;
  float bias; /* added to its logit */
} gemma_cuda_bias;

/* How tokens are picked. In this order: bias, penalties, stop tokens before min_new_tokens, temperature, top_k, top_p,
 * min_p. The same seed picks the same tokens. */
typedef struct gemma_cuda_sampling {
  uint32_t size;
  float temperature;        /* 0: the likeliest token */
  uint32_t top_k;           /* 0: all */
  float top_p;              /* 1: all */
  float min_p;              /* 0: all */
  float repetition_penalty; /* 1: none; over prompt and generated tokens */
  float presence_penalty;   /* over generated tokens */
  float frequency_penalty;  /* over generated tokens, for each occurrence */
  uint64_t seed;
  uint32_t min_new_tokens; /* before so many, no stop token is picked */
  uint32_t top_logprobs;   /* likeliest tokens to report with each */
  const gemma_cuda_bias *logit_bias;
  size_t logit_bias_count;
  const uint32_t *stop_tokens;
  size_t stop_token_count;
} gemma_cuda_sampling;
GEMMA_CUDA_API void gemma_cuda_sampling_init(gemma_cuda_sampling *sampling); /* greedy */

/* Starts a sequence of `count` known tokens, of which the first `prompt_count` are the prompt; the rest counts as
 * generated. `sampling` NULL is greedy. With `reuse_prefix` not 0, whole pages that other sequences filled with the
 * same tokens are taken over and need not be fed: see gemma_cuda_sequence_state. */
GEMMA_CUDA_API gemma_cuda_status gemma_cuda_add_sequence(gemma_cuda_engine *engine, const uint32_t *tokens,
                                                         size_t count, size_t prompt_count,
                                                         const gemma_cuda_sampling *sampling, uint32_t reuse_prefix,
                                                         uint32_t *sequence);
/* Appends known tokens, as if they had been generated. */
GEMMA_CUDA_API gemma_cuda_status gemma_cuda_extend_sequence(gemma_cuda_engine *engine, uint32_t sequence,
                                                            const uint32_t *tokens, size_t count);
/* A new sequence with the tokens of another, which is not under way, and another sampling. It shares the other's full
 * pages where prefix_cache is on; what is in a page that is not full must be fed again. */
GEMMA_CUDA_API gemma_cuda_status gemma_cuda_fork_sequence(gemma_cuda_engine *engine, uint32_t sequence,
                                                          const gemma_cuda_sampling *sampling, uint32_t *fork);
/* Its pages are free for others. Steps under way that have it end without results for it. */
GEMMA_CUDA_API gemma_cuda_status gemma_cuda_remove_sequence(gemma_cuda_engine *engine, uint32_t sequence);
/* How many tokens are known, and how many of them have their keys and values in the cache: the others are to be fed. */
GEMMA_CUDA_API gemma_cuda_status gemma_cuda_sequence_state(const gemma_cuda_engine *engine, uint32_t sequence,
                                                           uint32_t *tokens, uint32_t *cached);
/* Pages that are free, those kept only for reuse among them; and those that feeding so many tokens would take. */
GEMMA_CUDA_API gemma_cuda_status gemma_cuda_free_pages(const gemma_cuda_engine *engine, uint32_t *pages);
GEMMA_CUDA_API gemma_cuda_status gemma_cuda_pages_for(const gemma_cuda_engine *engine, uint32_t sequence,
                                                      uint32_t tokens, uint32_t *pages);

/* ---- Steps ------------------------------------------------------------------------------------------------------- */

enum {
  GEMMA_CUDA_SAMPLE = 1, /* pick the next token after the last one fed, which must be the last one known; append it */
  GEMMA_CUDA_SCORE = 2,  /* the log-probability of every known token that follows one fed */
  GEMMA_CUDA_LOGITS = 4, /* [tokens][vocab_size] */
  GEMMA_CUDA_HIDDEN = 8  /* [layers + 1][tokens][hidden_size]: scaled embeddings, then each layer's output, the last one
                          * after the final norm */
};
/* A sequence's part in a step: feed its next `tokens` tokens that are not in the cache yet. */
typedef struct gemma_cuda_item {
  uint32_t sequence;
  uint32_t tokens; /* at least 1 */
  uint32_t flags;
} gemma_cuda_item;

/* One forward pass over `count` different sequences; waits for its results, which gemma_cuda_get_output hands out. */
GEMMA_CUDA_API gemma_cuda_status gemma_cuda_step(gemma_cuda_engine *engine, const gemma_cuda_item *items, size_t count);
/* The halves of a step. Two may be launched before the first is collected, so that a GPU never waits for the host: a
 * sequence whose token is not collected yet can be fed it all the same. gemma_cuda_collect waits for the oldest. */
GEMMA_CUDA_API gemma_cuda_status gemma_cuda_launch(gemma_cuda_engine *engine, const gemma_cuda_item *items,
                                                   size_t count);
GEMMA_CUDA_API gemma_cuda_status gemma_cuda_collect(gemma_cuda_engine *engine);

typedef struct gemma_cuda_token {
  uint32_t token;
  float logprob;
  const gemma_cuda_logprob *top; /* [top_count] the likeliest tokens, in order */
  size_t top_count;
} gemma_cuda_token;
typedef struct gemma_cuda_output {
  uint32_t size;
  uint32_t sequence;
  const gemma_cuda_token *sampled; /* NULL: none was asked for, or none could be picked */
  const gemma_cuda_token *scored;  /* [scored_count] */
  size_t scored_count;
  const float *logits; /* NULL: not asked for */
  size_t logit_count;
  const float *hidden; /* NULL: not asked for */
  size_t hidden_count;
  const char *failure; /* NULL, or why the sequence can only be removed: its logits are not finite */
} gemma_cuda_output;
GEMMA_CUDA_API void gemma_cuda_output_init(gemma_cuda_output *output);
/* Of item `index` of the step that was collected last. What it points to lives until the next step is collected. */
GEMMA_CUDA_API gemma_cuda_status gemma_cuda_get_output(const gemma_cuda_engine *engine, size_t index,
                                                       gemma_cuda_output *output);

/* ---- Calibration ------------------------------------------------------------------------------------------------- */

/* From now on every step adds the magnitudes of all activations to what is counted, beginning with nothing; until it is
 * stopped. Steps are not captured meanwhile. A model in FP8 is refused. */
GEMMA_CUDA_API gemma_cuda_status gemma_cuda_start_calibration(gemma_cuda_engine *engine);
GEMMA_CUDA_API gemma_cuda_status gemma_cuda_stop_calibration(gemma_cuda_engine *engine);

#define GEMMA_CUDA_MAGNITUDE_BINS 4096u
typedef struct gemma_cuda_observation {
  uint32_t size;
  uint32_t groups;   /* K/V heads, for keys and values; else 1 */
  const char *name;  /* of the scale it decides: "model.layers.0.mlp.down_proj.input_scale", "….self_attn.k_scale" */
  const float *amax; /* [groups] largest finite magnitudes; amax / 448 is the scale with which nothing saturates */
  const uint64_t *counts; /* [groups][GEMMA_CUDA_MAGNITUDE_BINS]: bin i begins at the float32 with the bits i << 19 */
} gemma_cuda_observation;
GEMMA_CUDA_API void gemma_cuda_observation_init(gemma_cuda_observation *observation);
/* Brings what was counted since gemma_cuda_start_calibration to the host, and says of how many tensors. */
GEMMA_CUDA_API gemma_cuda_status gemma_cuda_read_calibration(gemma_cuda_engine *engine, size_t *count);
/* One of them. What it points to lives until the next gemma_cuda_read_calibration. */
GEMMA_CUDA_API gemma_cuda_status gemma_cuda_get_observation(const gemma_cuda_engine *engine, size_t index,
                                                            gemma_cuda_observation *observation);

/* ---- What was done ----------------------------------------------------------------------------------------------- */

typedef struct gemma_cuda_statistics {
  uint32_t size;
  uint32_t reserved;
  uint64_t steps;
  uint64_t captured_steps; /* that were a captured graph */
  uint64_t tokens;         /* fed */
  uint64_t bytes_read;     /* that the steps had to read at least: weights once a step, keys and values that are seen */
  uint64_t flops;          /* of products with weights */
  uint64_t memory, peak_memory; /* bytes allocated on the device, and the most that were */
  double load_seconds;          /* in gemma_cuda_load_tensor, gemma_cuda_load_random and gemma_cuda_finish_loading */
  double launch_seconds;        /* in the first halves of steps: planning, and what the host had to wait for a device */
  double collect_seconds;       /* in the second halves: waiting for results, and copying them */
} gemma_cuda_statistics;
GEMMA_CUDA_API void gemma_cuda_statistics_init(gemma_cuda_statistics *statistics);
/* Since the engine was made; of a stretch it is the difference of two of these. */
GEMMA_CUDA_API gemma_cuda_status gemma_cuda_get_statistics(const gemma_cuda_engine *engine,
                                                           gemma_cuda_statistics *statistics);

#ifdef __cplusplus
}
#endif

#endif
