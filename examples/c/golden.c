/* Builds a tiny model from a checkpoint's files, generates from several prompts at once, and compares every token with
 * those that Hugging Face transformers found, which stand beside the model in golden.safetensors.
 *
 *     golden MODEL_FOLDER [DEVICE]          DEVICE: reference (the default), cuda:N or auto
 *
 * Exit code 0: all are equal, as they are on the CPU. A GPU rounds activations to bf16: where two tokens are about as
 * likely (NEAR_TIE) it may pick the other one, and what follows in that prompt is another text, not a wrong one. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gemma_cuda.h"
#include "safetensors.h"

enum { MOST_PROMPTS = 16, MOST_TOKENS = 256, TOP = 4 };
static const float NEAR_TIE = 0.1f; /* between log-probabilities */

typedef struct {
  uint32_t ids[MOST_TOKENS], greedy[MOST_TOKENS];
  size_t prompt, expected;
  uint32_t sequence;
  size_t generated;
} prompt;

typedef struct {
  size_t equal, parted, wrong;
} verdict;

static void fail(const char *what, const char *why) {
  fprintf(stderr, "%s: %s\n", what, why);
  exit(2);
}

/* Every call says whether it worked; the sentence is kept for whoever asks. */
static void check(gemma_cuda_status status, const gemma_cuda_engine *engine, const char *what) {
  if (status != GEMMA_CUDA_OK) fail(what, gemma_cuda_last_error(engine));
}

static void say(void *user, int32_t level, const char *text) {
  (void)user;
  fprintf(stderr, "%s%s\n", level > 0 ? "warning: " : "", text);
}

static gemma_cuda_model *read_model(const char *folder) {
  gemma_cuda_model *model = NULL;
  size_t size;
  char *json = read_file(folder, "config.json", &size);
  if (json == NULL) fail(folder, "there is no config.json to read");
  check(gemma_cuda_model_parse(json, size, &model), NULL, "config.json");
  free(json);
  return model;
}

static gemma_cuda_engine *make_engine(const gemma_cuda_model *model, const char *device) {
  gemma_cuda_engine *engine = NULL;
  gemma_cuda_options options;
  gemma_cuda_options_init(&options);
  options.device = device;
  options.log = say;
  /* On the CPU as exact as the golden values, which are float32. */
  if (strcmp(device, "reference") == 0) options.compute = options.weights = GEMMA_CUDA_F32;
  check(gemma_cuda_engine_create(model, &options, &engine), NULL, "engine");
  return engine;
}

static void load(gemma_cuda_engine *engine, const gemma_cuda_model *model, const char *folder) {
  tensor_file file;
  gemma_cuda_model_info info;
  uint32_t i;
  gemma_cuda_model_info_init(&info);
  check(gemma_cuda_model_get_info(model, &info), NULL, "model");
  if (!tensor_file_open(&file, folder, "model.safetensors")) fail(folder, "there is no model.safetensors to read");
  for (i = 0; i < info.tensors; ++i) {
    const char *name;
    const uint64_t *shape;
    uint32_t rank;
    tensor found;
    check(gemma_cuda_model_tensor(model, i, &name, &shape, &rank), NULL, "tensor");
    if (!tensor_file_find(&file, name, &found) || found.dtype == NO_DTYPE) fail(name, "is not in model.safetensors");
    check(gemma_cuda_load_tensor(engine, name, found.dtype, found.shape, found.rank, found.data, found.bytes), engine,
          name);
  }
  check(gemma_cuda_finish_loading(engine), engine, "loading");
  tensor_file_close(&file);
}

static size_t read_ids(const tensor_file *file, size_t number, const char *what, uint32_t *out) {
  char name[64];
  tensor found;
  size_t i, count;
  snprintf(name, sizeof name, "p%u.%s", (unsigned)number, what);
  if (!tensor_file_find(file, name, &found)) return 0;
  count = found.bytes / sizeof(int64_t);
  if (count > MOST_TOKENS) fail(name, "is longer than this program has room for");
  for (i = 0; i < count; ++i) {
    int64_t id;
    memcpy(&id, (const char *)found.data + i * sizeof id, sizeof id);
    out[i] = (uint32_t)id;
  }
  return count;
}

/* Whether the expected token is so near the picked one that rounding to bf16 decides. */
static int is_near_tie(const gemma_cuda_token *picked, uint32_t expected) {
  size_t i;
  for (i = 0; i < picked->top_count; ++i)
    if (picked->top[i].token == expected) return picked->logprob - picked->top[i].logprob < NEAR_TIE;
  return 0;
}

static void judge(const gemma_cuda_token *picked, prompt *from, int exact, verdict *out) {
  const uint32_t expected = from->greedy[from->generated++];
  if (picked->token == expected) {
    ++out->equal;
    return;
  }
  if (!exact && is_near_tie(picked, expected))
    ++out->parted;
  else
    ++out->wrong;
  from->expected = from->generated; /* another text from here on */
}

/* One step for all prompts that are not done: their whole prompt the first time, then the token that came last. */
static size_t step(gemma_cuda_engine *engine, prompt *prompts, size_t count, int exact, verdict *out) {
  gemma_cuda_item items[MOST_PROMPTS];
  prompt *of[MOST_PROMPTS];
  size_t live = 0, i;
  for (i = 0; i < count; ++i) {
    gemma_cuda_item item;
    if (prompts[i].generated == prompts[i].expected) continue;
    item.sequence = prompts[i].sequence;
    item.tokens = prompts[i].generated == 0 ? (uint32_t)prompts[i].prompt : 1;
    item.flags = GEMMA_CUDA_SAMPLE;
    items[live] = item;
    of[live++] = &prompts[i];
  }
  if (live == 0) return 0;
  check(gemma_cuda_step(engine, items, live), engine, "step");
  for (i = 0; i < live; ++i) {
    gemma_cuda_output output;
    gemma_cuda_output_init(&output);
    check(gemma_cuda_get_output(engine, i, &output), engine, "output");
    if (output.sampled == NULL) fail("output", output.failure != NULL ? output.failure : "nothing was sampled");
    judge(output.sampled, of[i], exact, out);
  }
  return live;
}

static size_t read_prompts(gemma_cuda_engine *engine, const char *folder, prompt *prompts) {
  size_t count;
  tensor_file golden;
  gemma_cuda_sampling sampling;
  gemma_cuda_sampling_init(&sampling);
  sampling.top_logprobs = TOP;
  if (!tensor_file_open(&golden, folder, "golden.safetensors")) fail(folder, "there is no golden.safetensors to read");
  for (count = 0; count < MOST_PROMPTS; ++count) {
    prompt *next = &prompts[count];
    next->prompt = read_ids(&golden, count, "ids", next->ids);
    next->expected = read_ids(&golden, count, "greedy", next->greedy);
    if (next->prompt == 0) break;
    check(gemma_cuda_add_sequence(engine, next->ids, next->prompt, next->prompt, &sampling, 0, &next->sequence), engine,
          "sequence");
  }
  tensor_file_close(&golden);
  if (count == 0) fail(folder, "golden.safetensors has no prompts");
  return count;
}

int main(int argc, char **argv) {
  static prompt prompts[MOST_PROMPTS];
  verdict found = {0, 0, 0};
  const char *device = argc > 2 ? argv[2] : "reference";
  const int exact = strcmp(device, "reference") == 0;
  size_t count;
  gemma_cuda_model *model;
  gemma_cuda_engine *engine;
  gemma_cuda_statistics statistics;
  if (argc < 2 || argc > 3) fail("usage", "golden MODEL_FOLDER [DEVICE]");
  if (gemma_cuda_abi() != GEMMA_CUDA_ABI) fail("gemma_cuda.h", "is for another version of the library");

  model = read_model(argv[1]);
  engine = make_engine(model, device);
  load(engine, model, argv[1]);
  gemma_cuda_model_free(model);

  count = read_prompts(engine, argv[1], prompts);
  while (step(engine, prompts, count, exact, &found) != 0) {
  }
  gemma_cuda_statistics_init(&statistics);
  check(gemma_cuda_get_statistics(engine, &statistics), engine, "statistics");
  printf("%s: %u prompts, %u steps: %u tokens equal, %u prompts parted at a near tie, %u tokens wrong\n",
         gemma_cuda_engine_device(engine), (unsigned)count, (unsigned)statistics.steps, (unsigned)found.equal,
         (unsigned)found.parted, (unsigned)found.wrong);
  gemma_cuda_engine_destroy(engine);
  return found.wrong == 0 && found.equal > 0 ? 0 : 1;
}
