// out = x w^T through cuBLASLt.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <tuple>

#include "cuda/cublaslt.h"
#include "ops/backend.h"

namespace gemma_cuda::cuda {

class Gemm {
 public:
  // `workspace` is device memory of kWorkspaceBytes, used by one stream at a time.
  explicit Gemm(void* workspace);
  ~Gemm();
  Gemm(const Gemm&) = delete;
  Gemm& operator=(const Gemm&) = delete;

  // While it is on, the first call of a shape with few tokens times the library's candidates and keeps the fastest.
  void search(bool on) { searches_ = on; }
  void run(GemmArgs args, cudaStream_t stream);

  static constexpr size_t kWorkspaceBytes = size_t{32} << 20;

 private:
  // Everything a call of one shape needs.
  struct Plan {
    cublasLtMatmulDesc_t desc = nullptr;
    cublasLtMatrixLayout_t w = nullptr, x = nullptr, out = nullptr;
    cublasLtMatmulAlgo_t algorithm{};
    bool searched = false;
  };
  using Key = std::tuple<uint32_t, uint32_t, uint32_t, DType>;  // tokens, n, k, type of the output

  Plan describe(const GemmArgs& args) const;
  std::vector<cublasLtMatmulHeuristicResult_t> candidates(const Plan& plan) const;
  void find_fastest(Plan& plan, const GemmArgs& args, cudaStream_t stream) const;
  cublasStatus_t call(const Plan& plan, const cublasLtMatmulAlgo_t& algorithm, const GemmArgs& args,
                      cudaStream_t stream) const;

  const CublasLt& lt_;
  cublasLtHandle_t handle_ = nullptr;
  void* workspace_;
  bool searches_ = false;
  std::map<Key, Plan> plans_;
};

}  // namespace gemma_cuda::cuda
