// cuBLASLt, loaded when the first CUDA backend is made: a program that was built with CUDA starts without it.
#pragma once

#include <cublasLt.h>

#include <cstddef>
#include <span>
#include <string>

namespace gemma_cuda::cuda {

// Loads the first of these libraries there is. Throws Error::device with the loader's reasons and what would help.
void* open_cublaslt(std::span<const char* const> names);

struct CublasLt {
  decltype(&cublasLtCreate) create;
  decltype(&cublasLtGetVersion) version;
  decltype(&cublasLtGetStatusString) status_string;
  decltype(&cublasLtMatmul) matmul;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic;
  decltype(&cublasLtMatmulAlgoCheck) algorithm_check;
  decltype(&cublasLtMatmulDescCreate) desc_create;
  decltype(&cublasLtMatmulDescDestroy) desc_destroy;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set;
  decltype(&cublasLtMatrixLayoutCreate) layout_create;
  decltype(&cublasLtMatrixLayoutDestroy) layout_destroy;
  decltype(&cublasLtMatmulPreferenceCreate) preference_create;
  decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set;

  // Throws Error::device saying which names were tried, or which version is too old.
  static const CublasLt& get();
  // Of the current device, which has this number; made once, for the life of the process, and for all threads. To make
  // or destroy one waits for the whole device, which would end what other threads are capturing.
  cublasLtHandle_t handle(int device) const;
  // Throws naming the call.
  void check(cublasStatus_t status, const char* call) const;
};

}  // namespace gemma_cuda::cuda
