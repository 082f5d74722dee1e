// bf16 and f16 as bits, and their exact meaning in float32.
#pragma once

#include <bit>
#include <cstdint>

namespace gemma_cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

// Moves exponent and mantissa to their float32 places; the multiplication by 2^112 corrects the exponent's bias and
// makes subnormals exact.
inline float to_float(f16 x) {
  const uint32_t magnitude = x.bits & 0x7FFFu, sign = uint32_t{x.bits & 0x8000u} << 16;
  const float value = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t bits = magnitude >= 0x7C00u ? (magnitude << 13) | 0x7F800000u : std::bit_cast<uint32_t>(value);
  return std::bit_cast<float>(bits | sign);
}

// To nearest even; NaN stays NaN.
inline bf16 to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  return to_bf16(x);
}

}  // namespace gemma_cuda
