// The plans of decode attention: the layers of a pass that see alike share one (decode_plan.cuh).
#pragma once

#include <array>
#include <cstdint>

#include "cuda/memory.h"
#include "cuda/ops.h"

namespace gemma_cuda::cuda {

class DecodePlans {
 public:
  struct Found {
    const void* plan;
    bool made;  // just now: what reads it must not overlap with the launch before
  };

  static size_t reserved_bytes(const DeviceInfo& device) { return kKinds * decode_plan_bytes(device); }
  void reserve(const DeviceInfo& device) { memory_.get<char>(reserved_bytes(device)); }
  size_t bytes() const { return memory_.bytes(); }

  // Launches the planning where no call of the same pass has.
  Found get(const AttentionArgs& args, const DeviceInfo& device, const DeviceInfo& part, const Stream& stream) {
    const Kind kind{args.pass,           args.sequences,      args.heads,
                    args.cache.kv_heads, args.cache.head_dim, args.cache.key_scales != nullptr,
                    args.window,         part.multiprocessors};
    const size_t bytes = decode_plan_bytes(device);
    char* const memory = memory_.get<char>(kKinds * bytes);
    for (size_t i = 0; i < kKinds; ++i)
      if (args.pass != 0 && kinds_[i] == kind) return {memory + i * bytes, false};
    const size_t at = next_++ % kKinds;
    kinds_[at] = {};
    plan_decode_attention(args, part, memory + at * bytes, stream);
    kinds_[at] = kind;
    return {memory + at * bytes, true};
  }

 private:
  static constexpr size_t kKinds = 2;  // Gemma's layers see a window, or all

  struct Kind {
    uint64_t pass = 0;
    uint32_t sequences = 0, heads = 0, kv_heads = 0, head_dim = 0;
    bool fp8 = false;
    uint32_t window = 0;
    int multiprocessors = 0;
    bool operator==(const Kind&) const = default;
  };
  std::array<Kind, kKinds> kinds_;
  size_t next_ = 0;
  DeviceScratch memory_;
};

}  // namespace gemma_cuda::cuda
