// What calibration gathers on the device: of the inputs of every matrix, and of the keys and values of every head.
#pragma once

#include <cstdint>
#include <vector>

#include "core/observation.h"
#include "core/spec.h"
#include "ops/backend.h"

namespace gemma_cuda {

class Calibration {
 public:
  Calibration(Backend& backend, const ModelSpec& spec);

  struct Layer {
    Magnitudes qkv, attention_out, gate_up, down, keys, values;
  };
  const Layer& layer(uint32_t index) const { return layers_[index]; }
  const Magnitudes& lm_head() const { return lm_head_; }

  std::vector<Observation> download() const;

 private:
  Backend& backend_;
  const ModelSpec& spec_;
  Buffer largest_, counts_;  // of all groups of all tensors, in the order of the names
  std::vector<Layer> layers_;
  Magnitudes lm_head_{};
};

}  // namespace gemma_cuda
