// What is said where a GPU cannot be used. Needs none.
#include <cuda_runtime.h>

#include <algorithm>

#include "../check.h"
#include "cuda/cublaslt.h"
#include "cuda/requirements.h"

using namespace gemma_cuda;
using namespace gemma_cuda::cuda;

namespace {

void check_says(const std::string& sentence, std::initializer_list<const char*> parts) {
  for (const char* part : parts)
    if (sentence.find(part) == std::string::npos) {
      std::fprintf(stderr, "'%s' is not in: %s\n", part, sentence.c_str());
      std::exit(1);
    }
}

void drivers() {
  CHECK(driver_problem(cudaSuccess, 13000, 13000).empty());
  CHECK(driver_problem(cudaErrorNoDevice, 13000, 13000).empty());  // for index_problem to say
  check_says(driver_problem(cudaErrorInsufficientDriver, 0, 13000), {"no usable NVIDIA driver", "none is installed"});
  check_says(driver_problem(cudaErrorInsufficientDriver, 12040, 13000),
             {"no usable NVIDIA driver", "for CUDA 12.4", "built with 13.0", "580 or newer", "12.8 at least"});
  check_says(driver_problem(cudaErrorInsufficientDriver, 11080, 12080), {"for CUDA 11.8", "12.8", "525 or newer"});
  check_says(driver_problem(cudaErrorSystemDriverMismatch, 13000, 13000),
             {"no usable NVIDIA driver", "cudaErrorSystemDriverMismatch", "13.0"});
}

void devices() {
  CHECK(index_problem(0, 1).empty() && index_problem(3, 4).empty());
  check_says(index_problem(0, 0), {"no device cuda:0", "no NVIDIA GPU"});
  check_says(index_problem(1, 1), {"no device cuda:1", "this machine has cuda:0"});
  check_says(index_problem(8, 8), {"no device cuda:8", "cuda:0 to cuda:7"});
  check_says(index_problem(-1, 2), {"cuda:-1"});
  CHECK(capability_problem(0, 80).empty() && capability_problem(0, 120).empty());
  check_says(capability_problem(2, 75), {"cuda:2", "sm_75", "sm_80", "reference"});
  CHECK(fp8_problem(0, 89).empty() && fp8_problem(0, 90).empty() && fp8_problem(0, 120).empty());
  check_says(fp8_problem(1, 86), {"cuda:1", "sm_86", "sm_89", "bf16", "reference"});
}

void libraries() {
  CHECK(cublaslt_problem(120200).empty() && cublaslt_problem(130002).empty());
  check_says(cublaslt_problem(110502), {"11.5.2", "12.2.0", "pip install nvidia-cublas"});
  const char* const missing[] = {"libnothing-of-this-name.so.1", "libnor-of-this.so.2"};
  for (const char* part : {"could not be loaded", missing[0], missing[1], "pip install nvidia-cublas"})
    test::check_throws(part, [&] { open_cublaslt(missing); });
}

}  // namespace

int main() {
  drivers();
  devices();
  libraries();
}
