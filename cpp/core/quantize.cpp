#include "core/quantize.h"

#include <cmath>
#include <cstring>
#include <string>

#include "core/error.h"

namespace gemma_cuda {
namespace {

template <class T>
void convert(std::span<const uint8_t> bytes, std::span<const float> scales, std::vector<e4m3>& out) {
  const size_t width = out.size() / scales.size();
  for (size_t i = 0; i < out.size(); ++i) {
    T x;
    std::memcpy(&x, bytes.data() + i * sizeof x, sizeof x);
    out[i] = to_e4m3(to_float(x) * (1.0f / scales[i / width]));
  }
}

}  // namespace

std::vector<e4m3> quantize_rows(DType dtype, std::span<const uint8_t> bytes, std::span<const float> scales) {
  for (float scale : scales)
    if (!(std::isfinite(scale) && scale > 0))
      throw Error::invalid_argument("a scale is " + std::to_string(scale) + "; it must be positive and finite");
  std::vector<e4m3> out(bytes.size() / size_of(dtype));
  if (scales.empty() || out.empty() || out.size() % scales.size() != 0 || bytes.size() % size_of(dtype) != 0)
    throw Error::invalid_argument(std::to_string(bytes.size()) + " bytes of " + name_of(dtype) + " are not " +
                                  std::to_string(scales.size()) + " rows");
  switch (dtype) {
    case DType::f32: convert<float>(bytes, scales, out); break;
    case DType::bf16: convert<bf16>(bytes, scales, out); break;
    case DType::f16: convert<f16>(bytes, scales, out); break;
    case DType::e4m3: throw Error::invalid_argument("this is FP8 already");
  }
  return out;
}

}  // namespace gemma_cuda
