// What the tests of the CUDA operations share: shapes of real models, data on both devices, comparisons with the
// reference.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "../check.h"
#include "cuda/check.h"
#include "cuda/ops.h"
#include "gpu.h"
#include "ops/backend.h"
#include "ops/convert.h"

using namespace gemma_cuda;
using std::vector;

namespace {

struct Model {
  const char* name;
  uint32_t hidden, ffn, vocab, heads, kv_heads, head_dim, window;
  float soft_cap;
  bool qk_norm, post_norms;
};

constexpr Model kModels[] = {
    {"gemma-7b", 3072, 24576, 256000, 16, 16, 256, 0, 0, false, false},
    {"gemma-2b", 2048, 16384, 256000, 8, 1, 256, 0, 0, false, false},
    {"gemma-2-27b", 4608, 36864, 256000, 32, 16, 128, 4096, 50, false, true},
    {"gemma-3-270m", 640, 2048, 262144, 4, 1, 256, 512, 0, true, true},
    {"gemma-3-4b", 2560, 10240, 262208, 8, 4, 256, 1024, 0, true, true},
    {"tiny", 96, 192, 512, 4, 2, 32, 8, 30, true, true},
    {"narrow", 64, 136, 509, 16, 1, 16, 5, 0, false, false},
    {"middle", 256, 512, 1000, 6, 2, 64, 33, 0, true, false},
};

// Two rounded results of nearly equal float32 values; where P is rounded too, twice that.
constexpr double kLimit = 0x1p-8;

class Suite {
 public:
  explicit Suite(std::unique_ptr<Backend> gpu)
      : gpu_(std::move(gpu)), reference_(make_reference_backend(0, DType::bf16)) {}

  // Data on both devices.
  template <class T>
  struct Both {
    vector<T> host;  // the reference's
    Buffer device;
    T* gpu() const { return device.as<T>(); }
  };
  template <class T>
  Both<T> both(vector<T> values) {
    Both<T> out{std::move(values), Buffer(*gpu_, values.size() * sizeof(T))};
    out.device = Buffer(*gpu_, out.host.size() * sizeof(T));
    if (!out.host.empty()) gpu_->upload(out.device.data(), out.host.data(), out.host.size() * sizeof(T));
    return out;
  }
  Both<bf16> random(size_t count, float deviation = 1) {
    vector<bf16> out;
    out.reserve(count);
    for (float x : test::normal(count, deviation)) out.push_back(to_bf16(x));
    return both(std::move(out));
  }
  Both<bf16> poisoned(size_t count) { return both(vector<bf16>(count, to_bf16(NAN))); }
  template <class T>
  static vector<float> wide(const vector<T>& narrow) {
    vector<float> out;
    out.reserve(narrow.size());
    for (T x : narrow) out.push_back(to_float(x));
    return out;
  }
  template <class T>
  vector<T> download(const Both<T>& data) {
    vector<T> out(data.host.size());
    gpu_->download(out.data(), data.device.data(), out.size() * sizeof(T));
    return out;
  }
  void near(const char* what, const Both<float>& data, double limit) {
    report(what, test::relative_error(download(data), data.host), limit);
  }
  template <class T>
  void near(const char* what, const Both<T>& data, double limit) {
    report(what, test::relative_error(wide(download(data)), wide(data.host)), limit);
  }
  static void report(const char* what, double error, double limit) {
    std::printf("  %-28s %.2e (limit %.1e)\n", what, error, limit);
    CHECK(error < limit);
  }

  // What a product of FP8 reads is the same bytes as the reference's where both have the same numbers to round, and a
  // neighbour of them now and then where those are a sum.
  void near_fp8(const char* what, const Both<e4m3>& data) {
    const vector<e4m3> got = download(data);
    size_t differ = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      const int a = ordered(got[i]), b = ordered(data.host[i]);
      CHECK(std::abs(a - b) <= 1);
      differ += a != b;
    }
    report(what, static_cast<double>(differ) / static_cast<double>(got.size()), 0.01);
  }
  // Numbers in the order of their values: neighbours differ by one.
  static int ordered(e4m3 x) { return x.bits & 0x80 ? -(x.bits & 0x7F) : x.bits; }
  Both<e4m3> poisoned_fp8(size_t count) { return both(vector<e4m3>(count, e4m3{0x7F})); }
  Both<e4m3> random_fp8(size_t count, float deviation = 60) {
    vector<e4m3> out;
    out.reserve(count);
    for (float x : test::normal(count, deviation)) out.push_back(to_e4m3(x));
    return both(std::move(out));
  }
  Both<float> scales(size_t count) {
    vector<float> out = test::normal(count, 0.3f);
    for (float& x : out) x = 0.01f * (1 + std::abs(x));
    return both(std::move(out));
  }
  template <class T>
  Both<T> elements(size_t count) {
    if constexpr (std::is_same_v<T, e4m3>)
      return random_fp8(count);
    else
      return random(count, 0.3f);
  }

 protected:
  // What launchers are told.
  static cuda::DeviceInfo device_info() {
    cuda::DeviceInfo info;
    int major = 0, minor = 0;
    GEMMA_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    GEMMA_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0));
    GEMMA_CUDA_CHECK(cudaDeviceGetAttribute(&info.multiprocessors, cudaDevAttrMultiProcessorCount, 0));
    info.capability = 10 * major + minor;
    return info;
  }

  std::unique_ptr<Backend> gpu_, reference_;
  const cuda::DeviceInfo device_ = device_info();
  const bool fp8_ = device_.capability >= 89;
};

// Runs suite.model() for every model, or for the one that is named: what a sanitizer has time for. Returns that name.
template <class S>
std::string run_models(S& suite, int argc, char** argv) {
  const std::string only = argc > 1 ? argv[1] : "";
  for (const Model& model : kModels)
    if (only.empty() || only == model.name) {
      std::printf("%s\n", model.name);
      suite.model(model);
    }
  return only;
}

}  // namespace
