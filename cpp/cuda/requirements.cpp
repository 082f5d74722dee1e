#include "cuda/requirements.h"

namespace gemma_cuda::cuda {
namespace {

constexpr int kLeastCapability = 80;
constexpr int kLeastFp8Capability = 89;
constexpr size_t kLeastCublasLt = 120200;

std::string cuda_version(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string cublaslt_version(size_t version) {
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

// The first series of drivers for a major version of CUDA, which runs programs made with any of its minor versions.
std::string first_driver(int runtime_version) {
  switch (runtime_version / 1000) {
    case 12: return " (525 or newer)";
    case 13: return " (580 or newer)";
    default: return "";
  }
}

}  // namespace

std::string driver_problem(cudaError_t status, int driver_version, int runtime_version) {
  if (status == cudaSuccess || status == cudaErrorNoDevice) return {};
  const std::string none = "no usable NVIDIA driver: ";
  if (driver_version == 0) return none + "none is installed, or this machine has no NVIDIA GPU";
  if (status == cudaErrorInsufficientDriver)
    return none + "the one installed is for CUDA " + cuda_version(driver_version) + ", this program was built with " +
           cuda_version(runtime_version) + "; install a driver for CUDA " + std::to_string(runtime_version / 1000) +
           first_driver(runtime_version) + ", or build with a toolkit as old as the driver (12.8 at least)";
  return none + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ", driver for CUDA " +
         cuda_version(driver_version) + ")";
}

std::string index_problem(int index, int devices) {
  if (index >= 0 && index < devices) return {};
  const std::string last = devices > 1 ? " to cuda:" + std::to_string(devices - 1) : "";
  return "there is no device cuda:" + std::to_string(index) + "; this machine has " +
         (devices == 0 ? "no NVIDIA GPU that this process may use" : "cuda:0" + last);
}

std::string capability_problem(int index, int capability) {
  if (capability >= kLeastCapability) return {};
  return "cuda:" + std::to_string(index) + " is sm_" + std::to_string(capability) + "; bf16 needs sm_" +
         std::to_string(kLeastCapability) + " (Ampere) or newer. The device `reference` is the CPU";
}

std::string fp8_problem(int index, int capability) {
  if (capability >= kLeastFp8Capability) return {};
  return "cuda:" + std::to_string(index) + " is sm_" + std::to_string(capability) + "; FP8 needs sm_" +
         std::to_string(kLeastFp8Capability) +
         " (Ada, Hopper) or newer. The bf16 checkpoint this one was made of works there, and the device `reference` "
         "(the "
         "CPU) takes FP8 too";
}

std::string cublaslt_problem(size_t version) {
  if (version >= kLeastCublasLt) return {};
  return "cuBLASLt is version " + cublaslt_version(version) + ", older than the " + cublaslt_version(kLeastCublasLt) +
         " that is needed; `pip install nvidia-cublas` has a newer one, put its folder first in LD_LIBRARY_PATH";
}

}  // namespace gemma_cuda::cuda
