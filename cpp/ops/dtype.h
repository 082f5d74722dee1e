// Element types of tensors.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gemma_cuda {

enum class DType : uint8_t { f32, bf16, f16 };  // f16 only on the way in: Gemma overflows in it

constexpr size_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }
constexpr const char* name_of(DType type) { return type == DType::f32 ? "f32" : type == DType::bf16 ? "bf16" : "f16"; }

}  // namespace gemma_cuda
