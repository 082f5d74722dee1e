// `config.json` to ModelSpec: every form Gemma 1, 2 and 3 have been published in.
#pragma once

#include <string_view>

#include "core/spec.h"

namespace gemma_cuda {

struct ModelConfig {
  ModelSpec spec;  // nothing in FP8: how a checkpoint was quantized is not read here
  // Whether the text gives the vocabulary's size; a nested Gemma 3 config may leave it to the embedding's rows.
  bool vocab_given = true;
};

// Throws Error::invalid_argument naming the member that is wrong, missing, or asks for what this engine does not
// compute.
ModelConfig parse_config(std::string_view json);

}  // namespace gemma_cuda
