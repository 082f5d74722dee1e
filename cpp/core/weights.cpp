#include "core/weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/error.h"
#include "ops/convert.h"

namespace gemma_cuda {
namespace {

std::string describe(std::span<const uint64_t> shape) {
  std::string text = "[";
  for (uint64_t extent : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(extent);
  return text + "]";
}

uint64_t elements(std::span<const uint64_t> shape) {
  uint64_t product = 1;
  for (uint64_t extent : shape) product *= extent;
  return product;
}

// Rows that are quantized at a time while loading.
constexpr uint64_t kStagingBytes = uint64_t{64} << 20;
uint64_t staged_rows(uint64_t rows, uint64_t cols) {
  return std::clamp<uint64_t>(kStagingBytes / (cols * sizeof(float)), 1, rows);
}

// theta^(-2i / head_dim), in float32 as the reference has it; linear scaling divides positions, so it divides this.
std::vector<float> inverse_frequencies(const LayerSpec& layer) {
  std::vector<float> out(layer.head_dim / 2);
  for (uint32_t i = 0; i < out.size(); ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(layer.head_dim);
    out[i] = 1.0f / std::pow(static_cast<float>(layer.rope_theta), exponent) / static_cast<float>(layer.rope_factor);
  }
  return out;
}

Scheme scheme_of(const ModelSpec& spec, const TensorSlot& tensor) {
  switch (tensor.slot) {
    case Slot::qkv: return spec.layers[tensor.layer].qkv;
    case Slot::attention_out: return spec.layers[tensor.layer].attention_out;
    case Slot::gate_up: return spec.layers[tensor.layer].gate_up;
    case Slot::down: return spec.layers[tensor.layer].down;
    case Slot::lm_head: return spec.lm_head;
    default: return Scheme::plain;
  }
}

bool is_matrix(const TensorSlot& tensor) { return tensor.part == Part::values && tensor.shape.size() == 2; }

DType kept_as(const ModelSpec& spec, const TensorSlot& tensor, DType dtype) {
  if (!is_matrix(tensor)) return DType::f32;
  return kept_in_fp8(scheme_of(spec, tensor)) ? DType::e4m3 : dtype;
}

// One scale stands for all inputs of a matrix, however many tensors share it.
uint64_t kept_elements(const TensorSlot& tensor) {
  return tensor.part == Part::input_scale && tensor.row > 0 ? 0 : elements(tensor.shape);
}

std::vector<float> to_floats(DType dtype, std::span<const uint8_t> bytes) {
  std::vector<float> out(bytes.size() / size_of(dtype));
  auto convert = [&]<class T>(T) {
    for (size_t i = 0; i < out.size(); ++i) {
      T x;
      std::memcpy(&x, bytes.data() + i * sizeof x, sizeof x);
      out[i] = to_float(x);
    }
  };
  switch (dtype) {
    case DType::f32: convert(float{}); break;
    case DType::bf16: convert(bf16{}); break;
    case DType::f16: convert(f16{}); break;
    case DType::e4m3: convert(e4m3{}); break;
  }
  return out;
}

}  // namespace

Weights::Weights(Backend& backend, const ModelSpec& spec, DType dtype)
    : backend_(backend), spec_(spec), dtype_(dtype), layers_(spec.layers.size()) {
  // A buffer is as large as the tensors that share it.
  std::map<Buffer*, uint64_t> sizes;
  for (const TensorSlot& tensor : tensor_table(spec)) {
    sizes[&buffer(tensor)] += kept_elements(tensor) * size_of(kept(tensor));
    if (Linear* matrix = linear(tensor); matrix != nullptr && tensor.part == Part::values) {
      matrix->scheme = scheme_of(spec, tensor);
      matrix->rows += static_cast<uint32_t>(tensor.shape[0]);
      matrix->cols = static_cast<uint32_t>(tensor.shape[1]);
    }
    waiting_.emplace(tensor.name, tensor);
  }
  for (const auto& [buffer, bytes] : sizes) *buffer = Buffer(backend, bytes);
  for (uint32_t i = 0; i < layers_.size(); ++i) {
    const std::vector<float> frequencies = inverse_frequencies(spec.layers[i]);
    layers_[i].inverse_frequency = Buffer(backend, frequencies.size() * sizeof(float));
    backend.upload(layers_[i].inverse_frequency.data(), frequencies.data(), frequencies.size() * sizeof(float));
  }
}

void Linear::note_scales(std::span<const float> scales_of_rows) {
  if (first_scale == 0) first_scale = scales_of_rows[0];
  for (const float scale : scales_of_rows) one_scale = one_scale && scale == first_scale;
}

Linear* Weights::linear(const TensorSlot& tensor) {
  LayerWeights& layer = layers_[tensor.layer];
  switch (tensor.slot) {
    case Slot::lm_head: return &lm_head_;
    case Slot::qkv: return &layer.qkv;
    case Slot::attention_out: return &layer.attention_out;
    case Slot::gate_up: return &layer.gate_up;
    case Slot::down: return &layer.down;
    default: return nullptr;
  }
}

Buffer& Weights::buffer(const TensorSlot& tensor) {
  LayerWeights& layer = layers_[tensor.layer];
  if (Linear* matrix = linear(tensor)) {
    switch (tensor.part) {
      case Part::values: return matrix->values;
      case Part::scales: return matrix->scales;
      case Part::input_scale: return matrix->input_scale;
      case Part::key_scales: return layer.key_scales;
      case Part::value_scales: return layer.value_scales;
    }
  }
  switch (tensor.slot) {
    case Slot::embedding: return embedding_;
    case Slot::final_norm: return final_norm_;
    case Slot::q_norm: return layer.q_norm;
    case Slot::k_norm: return layer.k_norm;
    case Slot::pre_attention_norm: return layer.pre_attention_norm;
    case Slot::post_attention_norm: return layer.post_attention_norm;
    case Slot::pre_mlp_norm: return layer.pre_mlp_norm;
    case Slot::post_mlp_norm: return layer.post_mlp_norm;
    default: throw Error::invalid_argument("tensor " + tensor.name + " has no slot");
  }
}

DType Weights::kept(const TensorSlot& tensor) { return kept_as(spec_, tensor, dtype_); }

void Weights::load(std::string_view name, DType dtype, std::span<const uint64_t> shape,
                   std::span<const uint8_t> bytes) {
  const auto found = waiting_.find(name);
  if (found == waiting_.end()) {
    const auto settled = settled_.find(name);
    throw Error::invalid_argument("tensor " + std::string(name) +
                                  (settled == settled_.end() ? " is not one of this model's" : settled->second));
  }
  const TensorSlot& tensor = found->second;
  const uint64_t count = elements(shape);
  // Scales come as vectors, columns or scalars.
  if (tensor.part == Part::values ? !std::ranges::equal(shape, tensor.shape)
                                  : count != 1 && count != elements(tensor.shape))
    throw Error::invalid_argument("tensor " + tensor.name + " has shape " + describe(shape) + ", the model wants " +
                                  describe(tensor.shape) +
                                  (tensor.part == Part::values || elements(tensor.shape) == 1 ? "" : " or one"));
  if (bytes.size() != count * size_of(dtype))
    throw Error::invalid_argument("tensor " + tensor.name + " came with " + std::to_string(bytes.size()) +
                                  " bytes, its shape and type make " + std::to_string(count * size_of(dtype)));
  tensor.part == Part::values ? load_values(tensor, dtype, bytes) : load_scales(tensor, dtype, bytes);
  settled_.emplace(tensor.name, " was loaded before");
  waiting_.erase(found);
}

void Weights::load_values(const TensorSlot& tensor, DType dtype, std::span<const uint8_t> bytes) {
  const DType to = kept(tensor);
  if (to == DType::e4m3 && dtype != DType::e4m3) return quantize(tensor, dtype, bytes);
  if (to != DType::e4m3 && dtype == DType::e4m3)
    throw Error::invalid_argument("tensor " + tensor.name + " is FP8, but the model is not quantized there");
  const uint64_t offset = tensor.row * (tensor.shape.size() == 2 ? tensor.shape[1] : 1) * size_of(to);
  backend_.upload_as(buffer(tensor).as<char>() + offset, to, bytes.data(), dtype, bytes.size() / size_of(dtype));
}

// Rows of a matrix that is to be FP8, each with a scale of its own, or with the ones that are there already:
// `bring(row, count)` puts some of them into the staging buffer as `staged`.
template <class F>
void Weights::quantize_rows(const TensorSlot& tensor, DType staged, bool scaled, F bring) {
  const uint64_t rows = tensor.shape[0], cols = tensor.shape[1], at_once = staged_rows(rows, cols);
  if (staging_.data() == nullptr) staging_ = Buffer(backend_, std::max(kStagingBytes, cols * sizeof(float)));
  Linear& matrix = *linear(tensor);
  matrix.one_scale = matrix.one_scale && scaled;
  for (uint64_t row = 0; row < rows; row += at_once) {
    const uint64_t count = std::min(at_once, rows - row), at = tensor.row + row;
    float* const scales = matrix.scales.as<float>() + at;
    bring(row, count);
    backend_.quantize({.x = staging_.data(),
                       .dtype = staged,
                       .how = scaled ? Quantize{.scale = scales, .row_scales = nullptr}
                                     : Quantize{.scale = nullptr, .row_scales = scales},
                       .out = matrix.values.as<char>() + at * cols,
                       .rows = static_cast<uint32_t>(count),
                       .width = static_cast<uint32_t>(cols)});
  }
}

void Weights::quantize(const TensorSlot& tensor, DType dtype, std::span<const uint8_t> bytes) {
  const DType staged = dtype == DType::bf16 ? DType::bf16 : DType::f32;
  const uint64_t cols = tensor.shape[1];
  quantize_rows(tensor, staged, false, [&](uint64_t row, uint64_t count) {
    backend_.upload_as(staging_.data(), staged, bytes.data() + row * cols * size_of(dtype), dtype, count * cols);
  });
  const std::string scales = tensor.name + "_scale";
  waiting_.erase(scales);
  settled_.emplace(scales, " is not used: the tensor it belongs to came unquantized");
}

void Weights::load_scales(const TensorSlot& tensor, DType dtype, std::span<const uint8_t> bytes) {
  std::vector<float> scales = to_floats(dtype, bytes);
  for (size_t i = 0; i < scales.size(); ++i)
    if (!(std::isfinite(scales[i]) && scales[i] > 0))
      throw Error::invalid_argument("tensor " + tensor.name + " has " + std::to_string(scales[i]) + " at " +
                                    std::to_string(i) + "; a scale must be positive and finite");
  if (tensor.part == Part::input_scale) {
    // One for all that share the matrix: the largest, so that none saturates.
    float& largest = input_scales_[linear(tensor)];
    scales[0] = largest = std::max(largest, scales[0]);
  }
  scales.resize(elements(tensor.shape), scales[0]);
  if (tensor.part == Part::scales) linear(tensor)->note_scales(scales);
  const uint64_t offset = tensor.part == Part::scales ? tensor.row : 0;
  backend_.upload(buffer(tensor).as<float>() + offset, scales.data(), scales.size() * sizeof(float));
}

void Weights::load_random(uint64_t seed) {
  constexpr float kDeviation = 0.02f, kScale = 0.02f;
  constexpr float kWeightScale = kDeviation * 1.7320508f / kE4m3Max;  // of the largest element: they are drawn evenly
  for (const TensorSlot& tensor : tensor_table(spec_)) {
    const uint64_t count = elements(tensor.shape);
    const DType to = kept(tensor);
    if (to == DType::e4m3) {
      Linear& matrix = *linear(tensor);
      const bool one = matrix.scheme == Scheme::fp8_static;
      if (one) fill_scales(matrix, tensor, kWeightScale);
      quantize_rows(tensor, DType::bf16, one, [&](uint64_t, uint64_t rows) {
        backend_.fill_random(staging_.data(), DType::bf16, rows * tensor.shape[1], ++seed, kDeviation);
      });
    } else if (tensor.part == Part::values) {
      const uint64_t offset = tensor.row * (tensor.shape.size() == 2 ? tensor.shape[1] : 1) * size_of(to);
      backend_.fill_random(buffer(tensor).as<char>() + offset, to, count, ++seed,
                           is_matrix(tensor) ? kDeviation : 0.0f);
    } else if (tensor.part != Part::scales) {
      const std::vector<float> scales(count, kScale);
      backend_.upload(buffer(tensor).data(), scales.data(), count * sizeof(float));
    }
  }
  waiting_.clear();
}

void Weights::fill_scales(Linear& matrix, const TensorSlot& tensor, float scale) {
  const std::vector<float> scales(tensor.shape[0], scale);
  matrix.note_scales(scales);
  backend_.upload(matrix.scales.as<float>() + tensor.row, scales.data(), scales.size() * sizeof(float));
}

void Weights::finish() {
  if (!waiting_.empty())
    throw Error::invalid_argument("tensor " + waiting_.begin()->first + " of shape " +
                                  describe(waiting_.begin()->second.shape) + " is missing");
  staging_ = {};
  pack_lm_head();
}

void Weights::pack_lm_head() {
  constexpr uint64_t kLeft = uint64_t{1} << 30;  // for what drivers keep, kernels and recorded graphs
  const Matrix head = lm_head();
  const uint64_t bytes = backend_.packed_bytes(head);
  if (bytes == 0 || backend_.free_memory().value_or(UINT64_MAX) < bytes + kLeft) return;
  Buffer packed(backend_, bytes);
  if (backend_.pack(head, packed.data())) packed_lm_head_ = std::move(packed);
}

uint64_t Weights::bytes(const ModelSpec& spec, DType dtype) {
  uint64_t total = 0;
  for (const TensorSlot& tensor : tensor_table(spec))
    total += kept_elements(tensor) * size_of(kept_as(spec, tensor, dtype));
  for (const LayerSpec& layer : spec.layers) total += layer.head_dim / 2 * sizeof(float);  // inverse frequencies
  return total;
}

}  // namespace gemma_cuda
