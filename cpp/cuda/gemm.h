// out = x w^T: by our own kernel for a few rows where there is one (skinny_gemm.h), else through cuBLASLt.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/cublaslt.h"
#include "cuda/memory.h"
#include "cuda/ops.h"
#include "cuda/skinny_gemm.h"
#include "ops/backend.h"
#include "support/algorithm_cache.h"

namespace gemma_cuda::cuda {

class Gemm {
  static constexpr size_t kWorkspaceBytes = size_t{32} << 20;
  static constexpr size_t kScaleBytes = size_t{256} << 10;  // of the most rows of an FP8 product, 65536

 public:
  // `device` is the current one; `kind` names it to the cache of algorithms.
  Gemm(const DeviceInfo& device, std::string kind);
  ~Gemm();
  Gemm(const Gemm&) = delete;
  Gemm& operator=(const Gemm&) = delete;

  // While it is on, the first call of a shape takes the algorithm that the cache has, or times the
  // library's candidates and keeps the fastest there.
  void search(bool on);
  void run(GemmArgs args, const Stream& stream);
  // The sums as several blocks leave them, where there is a kernel that does: up to the next product.
  std::optional<ProductParts> run_in_parts(const GemmArgs& args, const Stream& stream);
  // Gate, up and GeGLU at once, where there is a kernel for so few rows; else nothing.
  bool run_gated(const GatedGemmArgs& args, const Stream& stream);
  // Logits with the surveys of their rows (skinny_gemm.h); to be called only where skinny_surveyed_gemm_fits().
  Surveys run_surveyed(const GemmArgs& args, float soft_cap, const SampleArgs& sample, Survey* surveys,
                       const Stream& stream);

  // Takes the memory that products need; it is used by one stream at a time.
  void reserve();
  size_t device_bytes() const { return workspace_.bytes() + arrivals_.bytes() + x_scales_.bytes(); }
  static constexpr size_t kReservedBytes = kWorkspaceBytes + kSkinnyArrivalBytes + kScaleBytes;

 private:
  // How the scales of FP8 come into a product.
  enum class Scaling : uint8_t {
    none,    // bf16
    one,     // a number for w, a number for x
    rows,    // a vector for the rows of each
    behind,  // by a kernel behind the product, where the library cannot take vectors
  };
  // Everything a call of one shape needs.
  struct Plan {
    cublasLtMatmulDesc_t desc = nullptr;
    cublasLtMatrixLayout_t w = nullptr, x = nullptr, out = nullptr;
    cublasLtMatmulAlgo_t algorithm{};
    bool searched = false;
  };
  using Key = std::tuple<uint32_t, uint32_t, uint32_t, DType, Scaling>;  // tokens, n, k, type of the output

  Scaling scaling(const GemmArgs& args) const;
  Plan describe(const GemmArgs& args, Scaling scaling) const;
  void set_scales(Plan& plan, Scaling scaling, const GemmArgs& args, cudaStream_t stream);
  std::vector<cublasLtMatmulHeuristicResult_t> candidates(const Plan& plan) const;
  std::string cache_key(const Key& shape) const;
  bool can_run(const Plan& plan, const cublasLtMatmulAlgo_t& algorithm, const GemmArgs& args, cudaStream_t stream);
  void choose(Plan& plan, const Key& shape, const GemmArgs& args, cudaStream_t stream);
  cublasLtMatmulAlgo_t find_fastest(const Plan& plan, const GemmArgs& args, cudaStream_t stream);
  cublasStatus_t call(const Plan& plan, const cublasLtMatmulAlgo_t& algorithm, const GemmArgs& args,
                      cudaStream_t stream);

  const CublasLt& lt_;
  AlgorithmCache& cache_;
  const DeviceInfo device_;
  const std::string kind_;
  const cublasLtHandle_t handle_;
  DeviceScratch workspace_, arrivals_, x_scales_;
  bool searches_ = false;
  std::map<Key, Plan> plans_;
};

}  // namespace gemma_cuda::cuda
