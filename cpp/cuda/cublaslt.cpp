#include "cuda/cublaslt.h"

#include <dlfcn.h>

#include "core/error.h"

namespace gemma_cuda::cuda {
namespace {

constexpr size_t kLeastVersion = 120200;  // 12.2
constexpr const char* kNames[] = {"libcublasLt.so.13", "libcublasLt.so.12"};

void* open_library() {
  std::string reasons;
  for (const char* name : kNames) {
    if (void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return library;
    reasons += std::string("; ") + dlerror();
  }
  throw Error::device("cuBLASLt could not be loaded" + reasons +
                      ". It comes with the CUDA toolkit and with `pip install nvidia-cublas`; put its folder into "
                      "LD_LIBRARY_PATH");
}

template <class F>
void resolve(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  if (function == nullptr) throw Error::device(std::string("the cuBLASLt that was found has no ") + name);
}

CublasLt load() {
  void* library = open_library();  // kept for the life of the process
  CublasLt lt;
  resolve(library, "cublasLtCreate", lt.create);
  resolve(library, "cublasLtDestroy", lt.destroy);
  resolve(library, "cublasLtGetVersion", lt.version);
  resolve(library, "cublasLtGetStatusString", lt.status_string);
  resolve(library, "cublasLtMatmul", lt.matmul);
  resolve(library, "cublasLtMatmulAlgoGetHeuristic", lt.heuristic);
  resolve(library, "cublasLtMatmulDescCreate", lt.desc_create);
  resolve(library, "cublasLtMatmulDescDestroy", lt.desc_destroy);
  resolve(library, "cublasLtMatmulDescSetAttribute", lt.desc_set);
  resolve(library, "cublasLtMatrixLayoutCreate", lt.layout_create);
  resolve(library, "cublasLtMatrixLayoutDestroy", lt.layout_destroy);
  resolve(library, "cublasLtMatmulPreferenceCreate", lt.preference_create);
  resolve(library, "cublasLtMatmulPreferenceDestroy", lt.preference_destroy);
  resolve(library, "cublasLtMatmulPreferenceSetAttribute", lt.preference_set);
  if (lt.version() < kLeastVersion)
    throw Error::device("cuBLASLt is version " + std::to_string(lt.version()) + ", older than the " +
                        std::to_string(kLeastVersion) + " that is needed");
  return lt;
}

}  // namespace

const CublasLt& CublasLt::get() {
  static const CublasLt lt = load();
  return lt;
}

void CublasLt::check(cublasStatus_t status, const char* call) const {
  if (status != CUBLAS_STATUS_SUCCESS) throw Error::device(std::string(call) + " failed: " + status_string(status));
}

}  // namespace gemma_cuda::cuda
