#include "core/weights.h"

#include <cmath>

#include "core/error.h"

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

// theta^(-2i / head_dim), in float32 as the reference has it; linear scaling divides positions, so it divides this.
std::vector<float> inverse_frequencies(const LayerSpec& layer) {
  std::vector<float> out(layer.head_dim / 2);
  for (uint32_t i = 0; i < out.size(); ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(layer.head_dim);
    out[i] = 1.0f / std::pow(static_cast<float>(layer.rope_theta), exponent) / static_cast<float>(layer.rope_factor);
  }
  return out;
}

bool is_matrix(Slot slot) {
  switch (slot) {
    case Slot::embedding:
    case Slot::lm_head:
    case Slot::qkv:
    case Slot::attention_out:
    case Slot::gate_up:
    case Slot::down: return true;
    default: return false;
  }
}

}  // namespace

Weights::Weights(Backend& backend, const ModelSpec& spec, DType dtype)
    : backend_(backend), spec_(spec), dtype_(dtype), layers_(spec.layers.size()) {
  // A slot is as large as the tensors that share it.
  std::map<Buffer*, uint64_t> sizes;
  for (const TensorSlot& tensor : tensor_table(spec)) {
    sizes[&slot(tensor)] += elements(tensor.shape) * size_of(is_matrix(tensor.slot) ? dtype : DType::f32);
    waiting_.emplace(tensor.name, tensor);
  }
  for (const auto& [buffer, bytes] : sizes) *buffer = Buffer(backend, bytes);
  for (uint32_t i = 0; i < layers_.size(); ++i) {
    const std::vector<float> frequencies = inverse_frequencies(spec.layers[i]);
    layers_[i].inverse_frequency = Buffer(backend, frequencies.size() * sizeof(float));
    backend.upload(layers_[i].inverse_frequency.data(), frequencies.data(), frequencies.size() * sizeof(float));
  }
}

Buffer& Weights::slot(const TensorSlot& tensor) {
  LayerWeights& layer = layers_[tensor.layer];
  switch (tensor.slot) {
    case Slot::embedding: return embedding_;
    case Slot::final_norm: return final_norm_;
    case Slot::lm_head: return lm_head_;
    case Slot::qkv: return layer.qkv;
    case Slot::attention_out: return layer.attention_out;
    case Slot::gate_up: return layer.gate_up;
    case Slot::down: return layer.down;
    case Slot::q_norm: return layer.q_norm;
    case Slot::k_norm: return layer.k_norm;
    case Slot::pre_attention_norm: return layer.pre_attention_norm;
    case Slot::post_attention_norm: return layer.post_attention_norm;
    case Slot::pre_mlp_norm: return layer.pre_mlp_norm;
    case Slot::post_mlp_norm: return layer.post_mlp_norm;
  }
  throw Error::invalid_argument("tensor " + tensor.name + " has no slot");
}

void Weights::load(std::string_view name, DType dtype, std::span<const uint64_t> shape,
                   std::span<const uint8_t> bytes) {
  const auto found = waiting_.find(name);
  if (found == waiting_.end())
    throw Error::invalid_argument("tensor " + std::string(name) +
                                  (loaded_.contains(name) ? " was loaded before" : " is not one of this model's"));
  const TensorSlot& tensor = found->second;
  if (!std::ranges::equal(shape, tensor.shape))
    throw Error::invalid_argument("tensor " + tensor.name + " has shape " + describe(shape) + ", the model wants " +
                                  describe(tensor.shape));
  const uint64_t count = elements(tensor.shape);
  if (bytes.size() != count * size_of(dtype))
    throw Error::invalid_argument("tensor " + tensor.name + " came with " + std::to_string(bytes.size()) +
                                  " bytes, its shape and type make " + std::to_string(count * size_of(dtype)));
  const DType kept = is_matrix(tensor.slot) ? dtype_ : DType::f32;
  const uint64_t offset = tensor.row * (tensor.shape.size() == 2 ? tensor.shape[1] : 1) * size_of(kept);
  backend_.upload_as(slot(tensor).as<char>() + offset, kept, bytes.data(), dtype, count);
  loaded_.insert(waiting_.extract(found));
}

void Weights::load_random(uint64_t seed) {
  constexpr float kDeviation = 0.02f;
  for (const TensorSlot& tensor : tensor_table(spec_)) {
    const uint64_t count = elements(tensor.shape);
    const DType kept = is_matrix(tensor.slot) ? dtype_ : DType::f32;
    const uint64_t offset = tensor.row * (tensor.shape.size() == 2 ? tensor.shape[1] : 1) * size_of(kept);
    backend_.fill_random(slot(tensor).as<char>() + offset, kept, count, ++seed,
                         is_matrix(tensor.slot) ? kDeviation : 0.0f);
  }
  waiting_.clear();
}

void Weights::require_all() const {
  if (!waiting_.empty())
    throw Error::invalid_argument("tensor " + waiting_.begin()->first + " of shape " +
                                  describe(waiting_.begin()->second.shape) + " is missing");
}

uint64_t Weights::bytes(const ModelSpec& spec, DType dtype) {
  uint64_t total = 0;
  for (const TensorSlot& tensor : tensor_table(spec))
    total += elements(tensor.shape) * size_of(is_matrix(tensor.slot) ? dtype : DType::f32);
  for (const LayerSpec& layer : spec.layers) total += layer.head_dim / 2 * sizeof(float);  // inverse frequencies
  return total;
}

}  // namespace gemma_cuda
