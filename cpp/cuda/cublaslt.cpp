#include "cuda/cublaslt.h"

#include <dlfcn.h>

#include <map>
#include <mutex>

#include "core/error.h"
#include "cuda/check.h"
#include "cuda/requirements.h"

namespace gemma_cuda::cuda {
namespace {

constexpr const char* kNames[] = {"libcublasLt.so.13", "libcublasLt.so.12"};

template <class F>
void resolve(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  if (function == nullptr) throw Error::device(std::string("the cuBLASLt that was found has no ") + name);
}

CublasLt load() {
  void* library = open_cublaslt(kNames);  // kept for the life of the process
  CublasLt lt;
  resolve(library, "cublasLtGetVersion", lt.version);
  if (const std::string problem = cublaslt_problem(lt.version()); !problem.empty()) throw Error::device(problem);
  resolve(library, "cublasLtCreate", lt.create);
  resolve(library, "cublasLtGetStatusString", lt.status_string);
  resolve(library, "cublasLtMatmul", lt.matmul);
  resolve(library, "cublasLtMatmulAlgoGetHeuristic", lt.heuristic);
  resolve(library, "cublasLtMatmulAlgoCheck", lt.algorithm_check);
  resolve(library, "cublasLtMatmulDescCreate", lt.desc_create);
  resolve(library, "cublasLtMatmulDescDestroy", lt.desc_destroy);
  resolve(library, "cublasLtMatmulDescSetAttribute", lt.desc_set);
  resolve(library, "cublasLtMatrixLayoutCreate", lt.layout_create);
  resolve(library, "cublasLtMatrixLayoutDestroy", lt.layout_destroy);
  resolve(library, "cublasLtMatmulPreferenceCreate", lt.preference_create);
  resolve(library, "cublasLtMatmulPreferenceDestroy", lt.preference_destroy);
  resolve(library, "cublasLtMatmulPreferenceSetAttribute", lt.preference_set);
  return lt;
}

}  // namespace

void* open_cublaslt(std::span<const char* const> names) {
  std::string reasons;
  for (const char* name : names) {
    if (void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return library;
    reasons += std::string("; ") + dlerror();
  }
  throw Error::device("cuBLASLt could not be loaded" + reasons +
                      ". It comes with the CUDA toolkit and with `pip install nvidia-cublas`; put its folder into "
                      "LD_LIBRARY_PATH");
}

const CublasLt& CublasLt::get() {
  static const CublasLt lt = load();
  return lt;
}

cublasLtHandle_t CublasLt::handle(int device) const {
  static std::mutex mutex;
  static std::map<int, cublasLtHandle_t> handles;
  const std::scoped_lock lock(mutex);
  if (const auto found = handles.find(device); found != handles.end()) return found->second;
  cublasLtHandle_t handle = nullptr;
  check(create(&handle), "cublasLtCreate");
  return handles[device] = handle;
}

void CublasLt::check(cublasStatus_t status, const char* call) const {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  // It calls every fault of the device an execution that failed; CUDA knows more.
  size_t free = 0, total = 0;
  if (const cudaError_t fault = cudaMemGetInfo(&free, &total); outlives_the_call(fault)) cuda::check(fault, call);
  throw Error::device(std::string(call) + " failed: " + status_string(status));
}

}  // namespace gemma_cuda::cuda
