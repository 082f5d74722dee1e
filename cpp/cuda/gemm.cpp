// cuBLASLt sees column-major matrices: our row-major w [n, k] is its k x n, x [t, k] its k x t, out [t, n] its n x t.
// So out^T = (w as it sees it)^T x: both inputs run along k, the form for which it has the most kernels.
//
// The algorithm the library guesses first is up to a fifth slower than its best; so the candidates are timed before the
// first step, on the model's own weights, for every shape that will be recorded and for the largest. What was found is
// shared by all engines of the machine: by timing alone each would come to another choice and other bits.
//
// FP8 takes the library's fast accumulation: its sums, of K = 24576 random elements, are a relative 4e-3 off, E4M3
// itself ten times as much, and without it large products take up to a fifth longer (H100, cuBLASLt 13.1). Where all
// rows of w share a scale and those of x do, the library has its fastest kernels; else it takes a vector of each.
#include "cuda/gemm.h"

#include <algorithm>
#include <bit>

#include "cuda/check.h"
#include "cuda/timer.h"

namespace gemma_cuda::cuda {
namespace {

constexpr int kCandidates = 8;
constexpr int kRepeats = 6;

constexpr size_t kLeastForVectors = 120900;  // the version that knows vectors of scales

cudaDataType_t data_type(DType dtype) {
  return dtype == DType::f32 ? CUDA_R_32F : dtype == DType::e4m3 ? CUDA_R_8F_E4M3 : CUDA_R_16BF;
}

// Rows that are computed for so many: few shapes, so that each is planned once, and none much too large.
uint32_t rounded_rows(uint32_t rows) {
  for (uint32_t small : {1u, 2u, 4u})
    if (rows <= small) return small;
  const uint32_t step = rows <= 64 ? 8 : rows <= 256 ? 32 : rows <= 1024 ? 64 : 256;
  return (rows + step - 1) / step * step;
}

}  // namespace

Gemm::Gemm(const DeviceInfo& device, std::string kind)
    : lt_(CublasLt::get()),
      cache_(AlgorithmCache::shared()),
      device_(device),
      kind_(std::move(kind)),
      handle_(lt_.handle(device.index)) {}

Gemm::~Gemm() {
  for (auto& [key, plan] : plans_) {
    lt_.layout_destroy(plan.w);
    lt_.layout_destroy(plan.x);
    lt_.layout_destroy(plan.out);
    lt_.desc_destroy(plan.desc);
  }
}

void Gemm::search(bool on) {
  searches_ = on;
  if (!on) cache_.save();
}

void Gemm::reserve() {
  workspace_.get<char>(std::max(kWorkspaceBytes, skinny_partial_bytes(device_)));
  if (arrivals_.bytes() > 0) return;
  GEMMA_CUDA_CHECK(cudaMemset(arrivals_.get<char>(kSkinnyArrivalBytes), 0, kSkinnyArrivalBytes));
  x_scales_.get<char>(kScaleBytes);
}

Gemm::Scaling Gemm::scaling(const GemmArgs& args) const {
  if (args.w.dtype != DType::e4m3) return Scaling::none;
  if (args.w.one_scale && args.x_scale.scale != nullptr) return Scaling::one;
  return device_.capability == 90 && lt_.version() >= kLeastForVectors ? Scaling::rows : Scaling::behind;
}

void Gemm::run(GemmArgs args, const Stream& on) {
  reserve();
  if (skinny_gemm_fits(args, device_))
    return skinny_gemm(args, device_, workspace_.get<char>(0), arrivals_.get<uint32_t>(0), on);
  const cudaStream_t stream = on.stream;
  if (const uint32_t rows = rounded_rows(args.tokens); rows <= args.capacity) args.tokens = rows;
  const Scaling how = scaling(args);
  const Key key{args.tokens, args.w.rows, args.w.cols, args.out_dtype, how};
  const auto found = plans_.find(key);
  Plan& plan = found != plans_.end() ? found->second : plans_.emplace(key, describe(args, how)).first->second;
  set_scales(plan, how, args, stream);
  if (found == plans_.end()) plan.algorithm = candidates(plan).front().algo;  // which looks at the scales too
  if (searches_ && !plan.searched) choose(plan, key, args, stream);
  lt_.check(call(plan, plan.algorithm, args, stream), "cublasLtMatmul");
  if (how == Scaling::behind) scale_product(args, on);
}

std::optional<ProductParts> Gemm::run_in_parts(const GemmArgs& args, const Stream& on) {
  if (!skinny_gemm_leaves_parts(args, device_)) return std::nullopt;
  reserve();
  return skinny_gemm_in_parts(args, device_, workspace_.get<char>(0), on);
}

bool Gemm::run_gated(const GatedGemmArgs& args, const Stream& on) {
  if (!skinny_gated_gemm_fits(args, device_)) return false;
  reserve();
  skinny_gated_gemm(args, device_, workspace_.get<char>(0), arrivals_.get<uint32_t>(0), on);
  return true;
}

Surveys Gemm::run_surveyed(const GemmArgs& args, float soft_cap, const SampleArgs& sample, Survey* surveys,
                           const Stream& on) {
  reserve();
  return skinny_surveyed_gemm(args, soft_cap, sample, surveys, device_, workspace_.get<char>(0),
                              arrivals_.get<uint32_t>(0), on);
}

void Gemm::set_scales(Plan& plan, Scaling scaling, const GemmArgs& args, cudaStream_t stream) {
  if (scaling != Scaling::one && scaling != Scaling::rows) return;
  const float* x = args.x_scale.scale != nullptr ? args.x_scale.scale : args.x_scale.row_scales;
  if (scaling == Scaling::rows && args.x_scale.scale != nullptr) {
    if (args.tokens * sizeof(float) > kScaleBytes)
      throw Error::invalid_argument("an FP8 product of " + std::to_string(args.tokens) + " rows is too large");
    float* all = x_scales_.get<float>(0);
    fill_scales(all, x, args.tokens, stream);
    x = all;
  }
  lt_.check(lt_.desc_set(plan.desc, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &args.w.scales, sizeof args.w.scales),
            "cublasLtMatmulDescSetAttribute");
  lt_.check(lt_.desc_set(plan.desc, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &x, sizeof x),
            "cublasLtMatmulDescSetAttribute");
}

Gemm::Plan Gemm::describe(const GemmArgs& args, Scaling scaling) const {
  const uint64_t t = args.tokens, n = args.w.rows, k = args.w.cols;
  const cublasOperation_t transposed = CUBLAS_OP_T;
  Plan plan;
  lt_.check(lt_.desc_create(&plan.desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescCreate");
  lt_.check(lt_.desc_set(plan.desc, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed),
            "cublasLtMatmulDescSetAttribute");
  if (scaling != Scaling::none) {
    const int8_t fast = 1;
    lt_.check(lt_.desc_set(plan.desc, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &fast, sizeof fast),
              "cublasLtMatmulDescSetAttribute");
  }
  if (scaling == Scaling::rows) {
    const cublasLtMatmulMatrixScale_t vector = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    for (const auto which : {CUBLASLT_MATMUL_DESC_A_SCALE_MODE, CUBLASLT_MATMUL_DESC_B_SCALE_MODE})
      lt_.check(lt_.desc_set(plan.desc, which, &vector, sizeof vector), "cublasLtMatmulDescSetAttribute");
  }
  const cudaDataType_t in = data_type(args.w.dtype);
  lt_.check(lt_.layout_create(&plan.w, in, k, n, static_cast<int64_t>(k)), "cublasLtMatrixLayoutCreate");
  lt_.check(lt_.layout_create(&plan.x, in, k, t, static_cast<int64_t>(k)), "cublasLtMatrixLayoutCreate");
  lt_.check(lt_.layout_create(&plan.out, data_type(args.out_dtype), n, t, static_cast<int64_t>(n)),
            "cublasLtMatrixLayoutCreate");
  return plan;
}

std::vector<cublasLtMatmulHeuristicResult_t> Gemm::candidates(const Plan& plan) const {
  cublasLtMatmulPreference_t preference;
  lt_.check(lt_.preference_create(&preference), "cublasLtMatmulPreferenceCreate");
  const size_t workspace = kWorkspaceBytes;
  cublasStatus_t status =
      lt_.preference_set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace);
  std::vector<cublasLtMatmulHeuristicResult_t> results(kCandidates);
  int found = 0;
  if (status == CUBLAS_STATUS_SUCCESS)
    status = lt_.heuristic(handle_, plan.desc, plan.w, plan.x, plan.out, plan.out, preference, kCandidates,
                           results.data(), &found);
  lt_.preference_destroy(preference);
  lt_.check(status, "cublasLtMatmulAlgoGetHeuristic");
  results.resize(found);
  std::erase_if(results, [](const auto& result) { return result.state != CUBLAS_STATUS_SUCCESS; });
  if (results.empty()) throw Error::device("cuBLASLt has no algorithm for a product of this shape");
  return results;
}

std::string Gemm::cache_key(const Key& shape) const {
  const auto& [tokens, n, k, out, scaling] = shape;
  const char* inputs[] = {"bf16 ", "e4m3 with a scale ", "e4m3 with vectors of scales ", "e4m3 without scales "};
  return kind_ + "; cuBLASLt " + std::to_string(lt_.version()) + "; " + inputs[static_cast<int>(scaling)] +
         std::to_string(tokens) + " x " + std::to_string(n) + " x " + std::to_string(k) + " to " +
         (out == DType::f32 ? "f32" : "bf16") + "; workspace " + std::to_string(kWorkspaceBytes);
}

// Whether the library takes the algorithm for this product: one from a file may be anything.
bool Gemm::can_run(const Plan& plan, const cublasLtMatmulAlgo_t& algorithm, const GemmArgs& args, cudaStream_t stream) {
  cublasLtMatmulHeuristicResult_t result{};
  const cublasStatus_t status =
      lt_.algorithm_check(handle_, plan.desc, plan.w, plan.x, plan.out, plan.out, &algorithm, &result);
  return status == CUBLAS_STATUS_SUCCESS && result.workspaceSize <= kWorkspaceBytes &&
         call(plan, algorithm, args, stream) == CUBLAS_STATUS_SUCCESS;
}

void Gemm::choose(Plan& plan, const Key& shape, const GemmArgs& args, cudaStream_t stream) {
  const std::string key = cache_key(shape);
  std::optional<Algorithm> kept = cache_.find(key);
  if (kept && !can_run(plan, std::bit_cast<cublasLtMatmulAlgo_t>(*kept), args, stream)) {
    cache_.forget(key);
    kept.reset();
  }
  if (!kept) kept = cache_.keep(key, std::bit_cast<Algorithm>(find_fastest(plan, args, stream)));
  plan.algorithm = std::bit_cast<cublasLtMatmulAlgo_t>(*kept);
  plan.searched = true;
}

cublasLtMatmulAlgo_t Gemm::find_fastest(const Plan& plan, const GemmArgs& args, cudaStream_t stream) {
  cublasLtMatmulAlgo_t fastest = plan.algorithm;
  Timer timer;
  double best = 0;
  bool first = true;
  for (const cublasLtMatmulHeuristicResult_t& candidate : candidates(plan)) {
    if (call(plan, candidate.algo, args, stream) != CUBLAS_STATUS_SUCCESS) continue;  // warm-up; some cannot run
    const double time = timer.seconds(stream, [&] {
      for (int i = 0; i < kRepeats; ++i) lt_.check(call(plan, candidate.algo, args, stream), "cublasLtMatmul");
    });
    if (!first && time >= best) continue;
    first = false;
    best = time;
    fastest = candidate.algo;
  }
  return fastest;
}

cublasStatus_t Gemm::call(const Plan& plan, const cublasLtMatmulAlgo_t& algorithm, const GemmArgs& args,
                          cudaStream_t stream) {
  const float one = 1, zero = 0;
  return lt_.matmul(handle_, plan.desc, &one, args.w.data, plan.w, args.x, plan.x, &zero, args.out, plan.out, args.out,
                    plan.out, &algorithm, workspace_.get<char>(kWorkspaceBytes), kWorkspaceBytes, stream);
}

}  // namespace gemma_cuda::cuda
