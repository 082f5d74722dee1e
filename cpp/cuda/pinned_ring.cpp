#include "cuda/pinned_ring.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>

#include "cuda/check.h"
#include "cuda/ops.h"

namespace gemma_cuda::cuda {
namespace {

constexpr size_t kAloneBytes = size_t{512} << 10;  // at most so much is copied by the caller alone: tables of a step
constexpr uint32_t kMostThreads = PinnedRing::kPieces / 2;

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

PinnedRing::Piece PinnedRing::fill(size_t index, const char* host, size_t bytes) {
  cudaEvent_t& copied = copied_[index];
  if (copied == nullptr)
    GEMMA_CUDA_CHECK(cudaEventCreateWithFlags(&copied, cudaEventDisableTiming));
  else
    GEMMA_CUDA_CHECK(cudaEventSynchronize(copied));
  char* pinned = pinned_.get<char>(kPieces * kPieceBytes) + index * kPieceBytes;
  std::memcpy(pinned, host, bytes);
  return {pinned, copied};
}

template <class F>
void PinnedRing::send_all(const char* host, size_t bytes, F send) {
  if (bytes <= kAloneBytes) {
    if (bytes > 0) send(fill(turn_++ % kPieces, host, bytes), 0, bytes);
    return;
  }
  pinned_.get<char>(kPieces * kPieceBytes);  // before threads share it
  if (threads_ == nullptr) threads_ = std::make_unique<ThreadPool>(copy_threads());
  int device = 0;
  GEMMA_CUDA_CHECK(cudaGetDevice(&device));
  std::atomic<size_t> next{0};
  std::mutex sending;
  std::exception_ptr error;
  threads_->run(threads_->threads(), [&](uint32_t thread) {
    try {
      GEMMA_CUDA_CHECK(cudaSetDevice(device));  // a thread of the pool begins with the first one
      size_t begin = 0;
      for (size_t turn = 0; (begin = next.fetch_add(kPieceBytes)) < bytes; ++turn) {
        const size_t size = std::min(kPieceBytes, bytes - begin);
        const Piece piece = fill(2 * thread + turn % 2, host + begin, size);
        const std::scoped_lock lock(sending);
        send(piece, begin, size);
      }
    } catch (...) {
      next = bytes;  // the others need not go on
      const std::scoped_lock lock(sending);
      error = std::current_exception();
    }
  });
  if (error != nullptr) std::rethrow_exception(error);
}

void PinnedRing::upload(void* to, const void* host, size_t bytes, cudaStream_t stream) {
  send_all(static_cast<const char*>(host), bytes, [&](const Piece& piece, size_t begin, size_t size) {
    copy_pinned(static_cast<char*>(to) + begin, piece.pinned, size, stream);
    GEMMA_CUDA_CHECK(cudaEventRecord(piece.copied, stream));
  });
}

void PinnedRing::upload_as(void* to, DType to_type, const void* host, DType host_type, size_t count,
                           cudaStream_t stream) {
  const size_t from_size = size_of(host_type), to_size = size_of(to_type);
  if (to_type == host_type) return upload(to, host, count * from_size, stream);
  void* landing = landing_.get<char>(kPieceBytes);  // one is enough: the stream converts a piece before the next lands
  send_all(static_cast<const char*>(host), count * from_size, [&](const Piece& piece, size_t begin, size_t size) {
    GEMMA_CUDA_CHECK(cudaMemcpyAsync(landing, piece.pinned, size, cudaMemcpyHostToDevice, stream));
    GEMMA_CUDA_CHECK(cudaEventRecord(piece.copied, stream));
    convert(static_cast<char*>(to) + begin / from_size * to_size, to_type, landing, host_type, size / from_size,
            stream);
  });
}

}  // namespace gemma_cuda::cuda
