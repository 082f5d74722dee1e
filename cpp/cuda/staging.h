// Host data on its way to the device: pieces are copied into pinned memory while the piece before is on the link.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

#include "cuda/check.h"
#include "cuda/memory.h"
#include "cuda/ops.h"
#include "ops/dtype.h"

namespace gemma_cuda::cuda {

class Staging {
 public:
  Staging() = default;
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;
  ~Staging() {
    for (Lane& lane : lanes_)
      if (lane.copied != nullptr) cudaEventDestroy(lane.copied);
  }

  // Returns when the host data has been read; the device has it when the stream gets there.
  void upload(void* to, DType to_type, const void* host, DType host_type, size_t count, cudaStream_t stream) {
    const size_t from_size = size_of(host_type), to_size = size_of(to_type), piece = kPieceBytes / from_size;
    for (size_t begin = 0; begin < count; begin += piece) {
      const size_t n = std::min(piece, count - begin);
      Lane& lane = lanes_[turn_++ % kLanes];
      prepare(lane);
      std::memcpy(lane.pinned.get<char>(kPieceBytes), static_cast<const char*>(host) + begin * from_size,
                  n * from_size);
      char* target = static_cast<char*>(to) + begin * to_size;
      char* landing = to_type == host_type ? target : lane.device.get<char>(kPieceBytes);
      GEMMA_CUDA_CHECK(
          cudaMemcpyAsync(landing, lane.pinned.get<char>(0), n * from_size, cudaMemcpyHostToDevice, stream));
      if (landing != target) convert(target, to_type, landing, host_type, n, stream);
      GEMMA_CUDA_CHECK(cudaEventRecord(lane.copied, stream));
    }
  }

  size_t device_bytes() const {
    size_t bytes = 0;
    for (const Lane& lane : lanes_) bytes += lane.device.bytes();
    return bytes;
  }

 private:
  static constexpr size_t kPieceBytes = size_t{8} << 20;
  static constexpr int kLanes = 3;

  struct Lane {
    PinnedScratch pinned;
    DeviceScratch device;
    cudaEvent_t copied = nullptr;
  };

  static void prepare(Lane& lane) {
    if (lane.copied == nullptr)
      GEMMA_CUDA_CHECK(cudaEventCreateWithFlags(&lane.copied, cudaEventDisableTiming));
    else
      GEMMA_CUDA_CHECK(cudaEventSynchronize(lane.copied));
  }

  Lane lanes_[kLanes];
  size_t turn_ = 0;
};

// Small host data that goes along with every step, through a ring of pinned memory: the host does not wait.
class Tables {
 public:
  static constexpr size_t kBytes = size_t{1} << 20;

  Tables() = default;
  Tables(const Tables&) = delete;
  Tables& operator=(const Tables&) = delete;
  ~Tables() {
    for (Slot& slot : slots_)
      if (slot.copied != nullptr) cudaEventDestroy(slot.copied);
  }

  void upload(void* to, const void* host, size_t bytes, cudaStream_t stream) {
    Slot& slot = slots_[turn_++ % kSlots];
    if (slot.copied == nullptr)
      GEMMA_CUDA_CHECK(cudaEventCreateWithFlags(&slot.copied, cudaEventDisableTiming));
    else
      GEMMA_CUDA_CHECK(cudaEventSynchronize(slot.copied));
    void* pinned = slot.pinned.get<char>(bytes);
    std::memcpy(pinned, host, bytes);
    GEMMA_CUDA_CHECK(cudaMemcpyAsync(to, pinned, bytes, cudaMemcpyHostToDevice, stream));
    GEMMA_CUDA_CHECK(cudaEventRecord(slot.copied, stream));
  }

 private:
  static constexpr int kSlots = 16;
  struct Slot {
    PinnedScratch pinned;
    cudaEvent_t copied = nullptr;
  };
  Slot slots_[kSlots];
  size_t turn_ = 0;
};

}  // namespace gemma_cuda::cuda
