#include "cuda/pinned_ring.h"

#include <algorithm>
#include <cstring>
#include <thread>

#include "cuda/check.h"
#include "cuda/ops.h"

namespace gemma_cuda::cuda {
namespace {

constexpr size_t kAloneBytes = size_t{512} << 10;  // at most so much is copied by the caller alone: tables of a step
constexpr size_t kSliceBytes = size_t{128} << 10;  // what one thread copies at a time
constexpr uint32_t kMostThreads = 8;

uint32_t copy_threads() { return std::clamp(std::thread::hardware_concurrency() / 2, 1u, kMostThreads); }

}  // namespace

PinnedRing::~PinnedRing() {
  for (cudaEvent_t copied : copied_)
    if (copied != nullptr) cudaEventDestroy(copied);
}

void PinnedRing::reserve() {
  pinned_.get<char>(kPieces * kPieceBytes);
  landing_.get<char>(kPieceBytes);
}

PinnedRing::Piece PinnedRing::fill(const char* host, size_t bytes) {
  const size_t index = turn_++ % kPieces;
  cudaEvent_t& copied = copied_[index];
  if (copied == nullptr)
    GEMMA_CUDA_CHECK(cudaEventCreateWithFlags(&copied, cudaEventDisableTiming));
  else
    GEMMA_CUDA_CHECK(cudaEventSynchronize(copied));
  char* pinned = pinned_.get<char>(kPieces * kPieceBytes) + index * kPieceBytes;
  if (bytes <= kAloneBytes) {
    std::memcpy(pinned, host, bytes);
    return {pinned, copied};
  }
  if (threads_ == nullptr) threads_ = std::make_unique<ThreadPool>(copy_threads());
  threads_->run(static_cast<uint32_t>((bytes + kSliceBytes - 1) / kSliceBytes), [&](uint32_t slice) {
    const size_t begin = slice * kSliceBytes;
    std::memcpy(pinned + begin, host + begin, std::min(kSliceBytes, bytes - begin));
  });
  return {pinned, copied};
}

void PinnedRing::upload(void* to, const void* host, size_t bytes, cudaStream_t stream) {
  for (size_t begin = 0; begin < bytes; begin += kPieceBytes) {
    const size_t size = std::min(kPieceBytes, bytes - begin);
    const Piece piece = fill(static_cast<const char*>(host) + begin, size);
    GEMMA_CUDA_CHECK(
        cudaMemcpyAsync(static_cast<char*>(to) + begin, piece.pinned, size, cudaMemcpyHostToDevice, stream));
    GEMMA_CUDA_CHECK(cudaEventRecord(piece.copied, stream));
  }
}

void PinnedRing::upload_as(void* to, DType to_type, const void* host, DType host_type, size_t count,
                           cudaStream_t stream) {
  const size_t from_size = size_of(host_type), to_size = size_of(to_type), most = kPieceBytes / from_size;
  if (to_type == host_type) return upload(to, host, count * from_size, stream);
  void* landing = landing_.get<char>(kPieceBytes);  // one is enough: the stream converts a piece before the next lands
  for (size_t begin = 0; begin < count; begin += most) {
    const size_t n = std::min(most, count - begin);
    const Piece piece = fill(static_cast<const char*>(host) + begin * from_size, n * from_size);
    GEMMA_CUDA_CHECK(cudaMemcpyAsync(landing, piece.pinned, n * from_size, cudaMemcpyHostToDevice, stream));
    GEMMA_CUDA_CHECK(cudaEventRecord(piece.copied, stream));
    convert(static_cast<char*>(to) + begin * to_size, to_type, landing, host_type, n, stream);
  }
}

}  // namespace gemma_cuda::cuda
