// bf16 and f16 against their definitions, every one of the 65,536 patterns.
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

}  // namespace

int main() {
  widening_is_exact();
  narrowing_rounds_to_nearest_even();
}
