// What a GPU machine must have, and for each thing it lacks a sentence that says what would help. Only numbers come in,
// so that the sentences can be tested where there is no GPU. Each is empty where nothing is wrong.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <string>

namespace gemma_cuda::cuda {

// `status` is what the runtime said when asked for devices; versions as CUDA writes them (13000 is 13.0), the driver's
// 0 where there is none.
std::string driver_problem(cudaError_t status, int driver_version, int runtime_version);

std::string index_problem(int index, int devices);

// `capability` is 10 * major + minor.
std::string capability_problem(int index, int capability);

// For a model in FP8.
std::string fp8_problem(int index, int capability);

// `version` as cublasLtGetVersion() gives it (120304 is 12.3.4).
std::string cublaslt_problem(size_t version);

}  // namespace gemma_cuda::cuda
