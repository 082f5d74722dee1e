// bf16, f16 and FP8 against their definitions, every one of the 65,536 patterns.
#include <algorithm>
#include <vector>

#include "check.h"
#include "ops/convert.h"

using namespace gemma_cuda;

namespace {

// Sign, exponent and mantissa put together by arithmetic.
double meaning(uint16_t bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}

bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

void widening_is_exact() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const uint16_t pattern = static_cast<uint16_t>(bits);
    CHECK(same(to_float(bf16{pattern}), meaning(pattern, 8)));
    CHECK(same(to_float(f16{pattern}), meaning(pattern, 5)));
  }
}

void narrowing_rounds_to_nearest_even() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float x = to_float(bf16{static_cast<uint16_t>(bits)});
    if (std::isnan(x)) {
      CHECK(std::isnan(to_float(to_bf16(x))));
      continue;
    }
    CHECK(to_bf16(x).bits == bits);  // what bf16 holds stays as it is
    if (!std::isfinite(x) || (bits & 0x7FFF) == 0x7F7F) continue;
    const uint32_t up = (bits << 16) + 0x8000;  // half way to the next one away from zero
    const uint16_t next = static_cast<uint16_t>(bits + 1);
    CHECK(to_bf16(std::bit_cast<float>(up - 1)).bits == bits);
    CHECK(to_bf16(std::bit_cast<float>(up)).bits == (bits % 2 == 0 ? bits : next));
    CHECK(to_bf16(std::bit_cast<float>(up + 1)).bits == next);
  }
  CHECK(std::isnan(to_float(to_bf16(std::bit_cast<float>(0x7FFFFFFFu)))));
}

// Every finite magnitude of E4M3, by arithmetic; the pattern is the index.
std::vector<double> e4m3_magnitudes() {
  std::vector<double> out;
  for (int bits = 0; bits < 127; ++bits)
    out.push_back(bits < 8 ? std::ldexp(bits, -9) : std::ldexp(8 + bits % 8, bits / 8 - 7 - 3));
  return out;
}

void e4m3_is_what_the_standard_says() {
  const std::vector<double> magnitudes = e4m3_magnitudes();
  CHECK(magnitudes.back() == 448);
  for (uint8_t bits = 0; bits < 127; ++bits) {
    CHECK(same(to_float(e4m3{bits}), magnitudes[bits]));
    CHECK(same(to_float(e4m3{static_cast<uint8_t>(bits | 0x80)}), -magnitudes[bits]));
  }
  CHECK(std::isnan(to_float(e4m3{0x7F})) && std::isnan(to_float(e4m3{0xFF})));
}

// The pattern of the nearest magnitude, of two equally near ones the even pattern.
uint8_t nearest_e4m3(const std::vector<double>& magnitudes, double x) {
  const auto above = std::ranges::lower_bound(magnitudes, std::abs(x));
  size_t at = above - magnitudes.begin();
  if (above == magnitudes.end()) {
    at = magnitudes.size() - 1;
  } else if (at > 0) {
    const double up = *above - std::abs(x), down = std::abs(x) - magnitudes[at - 1];
    if (down < up || (down == up && at % 2 == 1)) --at;
  }
  return static_cast<uint8_t>(at | (std::signbit(x) ? 0x80 : 0));
}

void narrowing_to_e4m3_rounds_to_nearest_even_and_saturates() {
  const std::vector<double> magnitudes = e4m3_magnitudes();
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float x = to_float(bf16{static_cast<uint16_t>(bits)});
    CHECK(to_e4m3(x).bits == (std::isnan(x) ? 0x7F : nearest_e4m3(magnitudes, x)));
  }
  for (size_t i = 0; i + 1 < magnitudes.size(); ++i)  // half way, and as near to it as float32 comes
    for (double sign : {1.0, -1.0}) {
      const float half = static_cast<float>(sign * (magnitudes[i] + magnitudes[i + 1]) / 2);
      for (float x : {half, std::nextafter(half, 0.0f), std::nextafter(half, 1000.0f * half)})
        CHECK(to_e4m3(x).bits == nearest_e4m3(magnitudes, x));
    }
  CHECK(to_e4m3(INFINITY).bits == 0x7E && to_e4m3(-INFINITY).bits == 0xFE);
}

}  // namespace

int main() {
  widening_is_exact();
  e4m3_is_what_the_standard_says();
  narrowing_to_e4m3_rounds_to_nearest_even_and_saturates();
  narrowing_rounds_to_nearest_even();
}
