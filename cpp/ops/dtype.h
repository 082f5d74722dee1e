// Element types of tensors.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gemma_cuda {

enum class DType : uint8_t {
  f32,
  bf16,
  f16,   // only on the way in: Gemma overflows in it
  e4m3,  // FP8 (convert.h), always with a scale
};

constexpr size_t size_of(DType type) { return type == DType::f32 ? 4 : type == DType::e4m3 ? 1 : 2; }
constexpr const char* name_of(DType type) {
  switch (type) {
    case DType::f32: return "f32";
    case DType::bf16: return "bf16";
    case DType::f16: return "f16";
    case DType::e4m3: return "e4m3";
  }
  return "unknown";
}

}  // namespace gemma_cuda
