// bf16, f16 and FP8 as bits, and their exact meaning in float32.
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
// FP8 as the OCP standard has it (E4M3FN): a sign, four bits of exponent with bias 7, three of mantissa; no infinities,
// 0x7f and 0xff are NaN.
struct e4m3 {
  uint8_t bits;
};
constexpr float kE4m3Max = 448;

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

// As for f16, with a factor of 2^120.
inline float to_float(e4m3 x) {
  const uint32_t magnitude = x.bits & 0x7Fu, sign = uint32_t{x.bits & 0x80u} << 24;
  const float value = std::bit_cast<float>(magnitude << 20) * 0x1p120f;
  return std::bit_cast<float>((magnitude == 0x7Fu ? 0x7FC00000u : std::bit_cast<uint32_t>(value)) | sign);
}

// To nearest even; NaN stays NaN.
inline bf16 to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
}

// To nearest even; what is beyond 448, infinities included, becomes 448; NaN becomes 0x7f.
inline e4m3 to_e4m3(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 24 & 0x80u;
  if (x != x) return {0x7F};
  float magnitude = std::bit_cast<float>(bits & 0x7FFFFFFFu);
  if (magnitude > kE4m3Max) magnitude = kE4m3Max;
  if (magnitude < 0x1p-6f)  // subnormal: a multiple of 2^-9, which is the last place of 2^14
    return {
        static_cast<uint8_t>((std::bit_cast<uint32_t>(magnitude + 0x1p14f) - std::bit_cast<uint32_t>(0x1p14f)) | sign)};
  const uint32_t wide = std::bit_cast<uint32_t>(magnitude);
  return {static_cast<uint8_t>((((wide + 0x7FFFFu + (wide >> 20 & 1u)) >> 20) - (120u << 3)) | sign)};
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
template <>
inline e4m3 from_float<e4m3>(float x) {
  return to_e4m3(x);
}

}  // namespace gemma_cuda
