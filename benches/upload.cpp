// How fast weights get from a mapped file to the GPU: what loading a checkpoint does, without one.
//
//   bench_upload [GIB [FOLDER]]     default 4 GiB, in the folder for temporary files
//
// The file is new, so it is in the page cache. Each row uploads all of it in pieces of a tensor's size to the same
// place on the device; "mapped anew" has every page of the file still to be faulted in, as a process that loads once
// has.
#include <cuda_runtime.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "core/error.h"
#include "cuda/backend.h"
#include "cuda/check.h"

using namespace gemma_cuda;

namespace {

constexpr size_t kTensorBytes = size_t{256} << 20;  // about that of a 7B model's larger matrices

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "%s: %s\n", what.c_str(), std::strerror(errno));
  std::exit(1);
}

// A file of its own that is gone with the program.
class TemporaryFile {
 public:
  TemporaryFile(const std::string& folder, size_t bytes) {
    std::string path = folder + "/gemma-cuda-upload-XXXXXX";
    file_ = mkstemp(path.data());
    if (file_ < 0) fail(path);
    unlink(path.c_str());
    std::vector<uint16_t> numbers(size_t{8} << 20);
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<uint16_t>(0x3f80 ^ (i * 40503 >> 5 & 0x7f));
    for (size_t written = 0; written < bytes;) {
      const size_t wanted = std::min(numbers.size() * sizeof(uint16_t), bytes - written);
      const ssize_t size = write(file_, numbers.data(), wanted);
      if (size <= 0) fail("writing " + std::to_string(bytes) + " bytes to " + folder);
      written += static_cast<size_t>(size);
    }
  }
  ~TemporaryFile() { close(file_); }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  int descriptor() const { return file_; }

 private:
  int file_;
};

class Map {
 public:
  Map(const TemporaryFile& file, size_t bytes)
      : bytes_(bytes), data_(mmap(nullptr, bytes, PROT_READ, MAP_SHARED, file.descriptor(), 0)) {
    if (data_ == MAP_FAILED) fail("mmap");
  }
  ~Map() { munmap(data_, bytes_); }
  Map(const Map&) = delete;
  Map& operator=(const Map&) = delete;
  const char* data() const { return static_cast<const char*>(data_); }

 private:
  size_t bytes_;
  void* data_;
};

template <class F>
void report(const char* what, size_t bytes, F work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  std::printf("%-44s %6.2f GB/s  %6.3f s\n", what, static_cast<double>(bytes) / seconds / 1e9, seconds);
  std::fflush(stdout);
}

// All of the file, a tensor at a time, and the wait for the last.
void upload(Backend& gpu, void* to, DType to_type, const char* from, DType from_type, size_t bytes) {
  for (size_t begin = 0; begin < bytes; begin += kTensorBytes)
    gpu.upload_as(to, to_type, from + begin, from_type, std::min(kTensorBytes, bytes - begin) / size_of(from_type));
  char last = 0;
  gpu.download(&last, to, 1);
}

// The link by itself: pinned memory to the device, as large pieces as there are.
void copy_pinned(void* to, size_t bytes) {
  void* pinned = nullptr;
  GEMMA_CUDA_CHECK(cudaMallocHost(&pinned, kTensorBytes));
  std::memset(pinned, 1, kTensorBytes);
  report("pinned memory, the link's own speed", bytes, [&] {
    for (size_t begin = 0; begin < bytes; begin += kTensorBytes)
      GEMMA_CUDA_CHECK(cudaMemcpyAsync(to, pinned, std::min(kTensorBytes, bytes - begin), cudaMemcpyHostToDevice));
    GEMMA_CUDA_CHECK(cudaDeviceSynchronize());
  });
  GEMMA_CUDA_CHECK(cudaFreeHost(pinned));
}

void run(size_t bytes, const std::string& folder) {
  const std::unique_ptr<Backend> gpu = cuda::make_backend(0);
  gpu->reserve({.head_dim = 16, .group = 1, .logit_rows = 1, .vocab = 1});
  const Buffer target(*gpu, kTensorBytes);
  const TemporaryFile file(folder, bytes);
  std::printf("%s, %.1f GiB in %s\n", gpu->name().c_str(), static_cast<double>(bytes) / (1u << 30), folder.c_str());
  copy_pinned(target.data(), bytes);
  for (int round = 0; round < 2; ++round) {
    const Map map(file, bytes);
    const auto row = [&](const char* what, DType to, DType from) {
      report(what, bytes, [&] { upload(*gpu, target.data(), to, map.data(), from, bytes); });
    };
    row("bf16 to bf16, mapped anew", DType::bf16, DType::bf16);
    row("bf16 to bf16, once more", DType::bf16, DType::bf16);
  }
  for (int round = 0; round < 2; ++round) {
    const Map map(file, bytes);
    report("f32 to bf16, mapped anew (f32 bytes)", bytes,
           [&] { upload(*gpu, target.data(), DType::bf16, map.data(), DType::f32, bytes); });
  }
}

}  // namespace

int main(int argc, char** argv) {
  const double gib = argc > 1 ? std::atof(argv[1]) : 4;
  if (!(gib > 0 && gib < 1024)) {
    std::fprintf(stderr, "usage: %s [GIB [FOLDER]]\n", argv[0]);
    return 2;
  }
  const auto bytes = static_cast<size_t>(gib * (1u << 30)) / kTensorBytes * kTensorBytes;
  try {
    run(std::max(bytes, kTensorBytes), argc > 2 ? argv[2] : std::filesystem::temp_directory_path().string());
  } catch (const Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
