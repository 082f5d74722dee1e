// When every kernel of a program began and ended, as CUPTI sees it while kernels overlap as they always do: what
// table.py makes its tables of. Needs a CUDA toolkit with CUPTI in $CUDA, and no change to the program:
//
//   cupti=$CUDA/extras/CUPTI; g++ -O2 -fPIC -shared benches/kernel_trace/inject.cpp -o kernel_trace.so -I$CUDA/include
//     -I$cupti/include -L$CUDA/lib64 -L$cupti/lib64 -lcupti                                      (one line)
//   CUDA_INJECTION64_PATH=$PWD/kernel_trace.so KERNEL_TRACE=trace.csv gemma-cuda bench …
//   benches/kernel_trace/table.py trace.csv
#include <cupti.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

namespace {

FILE* file = nullptr;
std::mutex mutex;
std::map<std::string, int> numbers;  // of kernels, by name

void check(CUptiResult result, const char* what) {
  if (result == CUPTI_SUCCESS) return;
  const char* why = "";
  cuptiGetResultString(result, &why);
  std::fprintf(stderr, "kernel_trace: %s: %s\n", what, why);
  std::exit(1);
}

void CUPTIAPI give_buffer(uint8_t** buffer, size_t* size, size_t* most) {
  *size = size_t{8} << 20;
  *most = 0;
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(8, *size));
  if (*buffer == nullptr) *size = 0;
}

// A kernel's name is written once, with its number.
void write(const CUpti_ActivityKernel9& kernel) {
  const auto [at, added] = numbers.try_emplace(kernel.name, static_cast<int>(numbers.size()));
  if (added) std::fprintf(file, "name,%d,%s\n", at->second, kernel.name);
  std::fprintf(file, "%d,%llu,%llu\n", at->second, static_cast<unsigned long long>(kernel.start),
               static_cast<unsigned long long>(kernel.end));
}

void CUPTIAPI take_buffer(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t valid) {
  const std::lock_guard lock(mutex);
  CUpti_Activity* record = nullptr;
  while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS)
    if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL)
      write(*reinterpret_cast<const CUpti_ActivityKernel9*>(record));
  std::free(buffer);
}

void finish() {
  cuptiActivityFlushAll(1);
  std::fclose(file);
}

}  // namespace

extern "C" int InitializeInjection() {
  const char* path = std::getenv("KERNEL_TRACE");
  file = std::fopen(path != nullptr ? path : "kernel_trace.csv", "w");
  if (file == nullptr) return std::perror("kernel_trace"), 0;
  check(cuptiActivityRegisterCallbacks(give_buffer, take_buffer), "cuptiActivityRegisterCallbacks");
  check(cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL), "cuptiActivityEnable");
  std::atexit(finish);
  return 1;
}
