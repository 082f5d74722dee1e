// The tests' few tools: checks that say what failed and where, random numbers, comparison by norm.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "core/error.h"

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                \
    }                                                                              \
  } while (false)

namespace test {

// Fresh numbers each run; the seed is printed so that a failure can be repeated (GEMMA_CUDA_TEST_SEED).
inline std::mt19937& random() {
  static std::mt19937 engine = [] {
    const char* given = std::getenv("GEMMA_CUDA_TEST_SEED");
    const uint32_t seed = given ? static_cast<uint32_t>(std::strtoul(given, nullptr, 10)) : std::random_device{}();
    std::printf("GEMMA_CUDA_TEST_SEED=%u\n", seed);
    std::fflush(stdout);
    return std::mt19937(seed);
  }();
  return engine;
}

inline uint32_t below(uint32_t n) { return std::uniform_int_distribution<uint32_t>(0, n - 1)(random()); }

inline std::vector<float> normal(size_t count, float deviation = 1.0f) {
  std::normal_distribution<float> distribution(0.0f, deviation);
  std::vector<float> out(count);
  for (float& x : out) x = distribution(random());
  return out;
}

// ||got - want|| / ||want||; NaN never passes a comparison with it.
template <class A, class B>
double relative_error(const A& got, const B& want) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    difference += (double(got[i]) - double(want[i])) * (double(got[i]) - double(want[i]));
    norm += double(want[i]) * double(want[i]);
  }
  return std::sqrt(difference) / std::max(std::sqrt(norm), 1e-30);
}

// Runs `call`, which must throw an Error whose text holds `text`.
inline void check_throws(const std::string& text, const std::function<void()>& call) {
  try {
    call();
  } catch (const gemma_cuda::Error& error) {
    if (std::string(error.what()).find(text) != std::string::npos) return;
    std::fprintf(stderr, "expected an error with '%s', got: %s\n", text.c_str(), error.what());
    std::exit(1);
  }
  std::fprintf(stderr, "expected an error with '%s', got none\n", text.c_str());
  std::exit(1);
}

}  // namespace test
