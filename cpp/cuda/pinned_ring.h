// Host data on its way to the device, through pieces of pinned memory that are used in turn: a piece is filled while
// those before it are on the link. Tables of a step take a piece each, and the host does not wait. Of weights several
// threads bring one piece after the other, each by two pieces of its own, since one core copies (and faults a mapped
// file's pages in) at a tenth of the link's speed; none waits for another, but at the end.
#pragma once

#include <cuda_runtime.h>

#include <memory>

#include "cuda/memory.h"
#include "ops/dtype.h"
#include "support/thread_pool.h"

namespace gemma_cuda::cuda {

class PinnedRing {
 public:
  PinnedRing() = default;
  PinnedRing(const PinnedRing&) = delete;
  PinnedRing& operator=(const PinnedRing&) = delete;
  ~PinnedRing();

  // Both return when the host data has been read; the device has it when the stream gets there.
  void upload(void* to, const void* host, size_t bytes, cudaStream_t stream);
  void upload_as(void* to, DType to_type, const void* host, DType host_type, size_t count, cudaStream_t stream);

  // Takes all the memory it will ever need: kPieceBytes of the device's, kPieces times as much of the host's.
  void reserve();
  size_t device_bytes() const { return landing_.bytes(); }
  static constexpr size_t kPieceBytes = size_t{2} << 20;
  static constexpr size_t kPieces = 16;  // more than the tables of all steps that can be under way

 private:
  struct Piece {
    char* pinned;
    cudaEvent_t copied;  // to be recorded behind the copy that reads it
  };
  // The piece with this number, once it is free, with these bytes.
  Piece fill(size_t index, const char* host, size_t bytes);
  // Calls send(piece, begin, bytes) for every part of the host data, one call at a time, in any order.
  template <class F>
  void send_all(const char* host, size_t bytes, F send);

  PinnedScratch pinned_;
  DeviceScratch landing_;  // of data that is converted on the device
  cudaEvent_t copied_[kPieces] = {};
  size_t turn_ = 0;
  std::unique_ptr<ThreadPool> threads_;  // from the first large upload on
};

}  // namespace gemma_cuda::cuda
