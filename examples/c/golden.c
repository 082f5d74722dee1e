/* Builds a tiny model from a checkpoint's files, generates from several prompts at once, and compares every token with
 * those that Hugging Face transformers found, which stand beside the model in golden.safetensors.
 *
 *     golden MODEL_FOLDER [DEVICE]          DEVICE: reference (the default), cuda:N or auto
 *
 * Exit code 0: all are equal, as they are on the CPU. A GPU rounds activations to bf16: where two tokens are about as
 * likely it may pick the other one. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gemma_cuda.h"
#include "safetensors.h"

enum { MOST_PROMPTS = 16, MOST_TOKENS = 256 };

typedef struct {
  uint32_t ids[MOST_TOKENS], greedy[MOST_TOKENS];
  size_t prompt, expected;
  uint32_t sequence;
  size_t generated;
} prompt;

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

/* One step for all prompts that are not done: their whole prompt the first time, then the token that came last. */
static size_t step(gemma_cuda_engine *engine, prompt *prompts, size_t count) {
  gemma_cuda_item items[MOST_PROMPTS];
  prompt *of[MOST_PROMPTS];
  size_t live = 0, wrong = 0, i;
  for (i = 0; i < count; ++i) {
    gemma_cuda_item item;
    if (prompts[i].generated == prompts[i].expected) continue;
    item.sequence = prompts[i].sequence;
    item.tokens = prompts[i].generated == 0 ? (uint32_t)prompts[i].prompt : 1;
    item.flags = GEMMA_CUDA_SAMPLE;
    items[live] = item;
    of[live++] = &prompts[i];
  }
  check(gemma_cuda_step(engine, items, live), engine, "step");
  for (i = 0; i < live; ++i) {
    gemma_cuda_output output;
    gemma_cuda_output_init(&output);
    check(gemma_cuda_get_output(engine, i, &output), engine, "output");
    if (output.sampled == NULL) fail("output", output.failure != NULL ? output.failure : "nothing was sampled");
    wrong += output.sampled->token != of[i]->greedy[of[i]->generated++];
  }
  return wrong;
}

int main(int argc, char **argv) {
  static prompt prompts[MOST_PROMPTS];
  size_t count = 0, wrong = 0, total = 0, longest = 0, i;
  gemma_cuda_model *model;
  gemma_cuda_engine *engine;
  gemma_cuda_statistics statistics;
  tensor_file golden;
  if (argc < 2 || argc > 3) fail("usage", "golden MODEL_FOLDER [DEVICE]");
  if (gemma_cuda_abi() != GEMMA_CUDA_ABI) fail("gemma_cuda.h", "is for another version of the library");

  model = read_model(argv[1]);
  engine = make_engine(model, argc > 2 ? argv[2] : "reference");
  load(engine, model, argv[1]);
  gemma_cuda_model_free(model);

  if (!tensor_file_open(&golden, argv[1], "golden.safetensors"))
    fail(argv[1], "there is no golden.safetensors to read");
  for (; count < MOST_PROMPTS; ++count) {
    prompt *next = &prompts[count];
    next->prompt = read_ids(&golden, count, "ids", next->ids);
    next->expected = read_ids(&golden, count, "greedy", next->greedy);
    if (next->prompt == 0) break;
    check(gemma_cuda_add_sequence(engine, next->ids, next->prompt, next->prompt, NULL, 0, &next->sequence), engine,
          "sequence");
    total += next->expected;
    if (next->expected > longest) longest = next->expected;
  }
  tensor_file_close(&golden);
  if (total == 0) fail(argv[1], "golden.safetensors has no prompts");

  for (i = 0; i < longest; ++i) wrong += step(engine, prompts, count);
  gemma_cuda_statistics_init(&statistics);
  check(gemma_cuda_get_statistics(engine, &statistics), engine, "statistics");
  printf("%s: %u prompts, %u tokens in %u steps, %u of them wrong\n", gemma_cuda_engine_device(engine), (unsigned)count,
         (unsigned)total, (unsigned)statistics.steps, (unsigned)wrong);
  gemma_cuda_engine_destroy(engine);
  return wrong == 0 ? 0 : 1;
}
