// Magnitudes of activations, as calibration hands them out.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace gemma_cuda {

// Of the tensor whose scale it will decide: "model.layers.0.self_attn.q_proj.input_scale" for all three that share the
// input, "model.layers.0.self_attn.k_scale" with a group for each K/V head.
struct Observation {
  std::string name;
  std::vector<float> largest;    // [groups], of those that are finite
  std::vector<uint64_t> counts;  // [groups][kMagnitudeBins] (ops/backend.h); NaN and infinity are in the last bins
};

}  // namespace gemma_cuda
