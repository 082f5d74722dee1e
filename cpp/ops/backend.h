// The operations a model is made of, as one interface. A backend is a device: its memory and these operations.
//
// Notation: t new tokens of all sequences of a step laid end to end (ragged, no padding), s sequences, h hidden_size.
// "act" is the activation type, bf16 or f32, the same for every operation of an engine; accumulation is float32 and
// the residual stream stays float32. Pointers are to the backend's memory unless marked host. An operation may return
// before it is done; download() waits.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ops/dtype.h"
#include "ops/sampling.h"

namespace gemma_cuda {

struct Matrix {  // row-major, contiguous
  const void* data = nullptr;
  DType dtype = DType::f32;
  uint32_t rows = 0, cols = 0;
  const float* scales = nullptr;  // e4m3: [rows], what a row's elements are to be multiplied by
  bool one_scale = false;         // whether they are all the same
  bool fresh = false;             // whether an operation has just written it: else it may be read before others end
  const void* packed = nullptr;   // bf16: the same numbers once more, as Backend::pack() wrote them
};

// How an operation writes what a product of FP8 will read: e4m3(y / scale), rounded to nearest even and saturating at
// 448. The scale is given, one for all rows (static), or it is the row's largest magnitude / 448, 1 for a row of zeros,
// and is written beside it (dynamic). Neither: y stays act.
struct Quantize {
  const float* scale = nullptr;  // one
  float* row_scales = nullptr;   // [rows]
  explicit operator bool() const { return scale != nullptr || row_scales != nullptr; }
};

// An id that stands for last_tokens[id - kPendingToken]: a token that is still being sampled.
constexpr uint32_t kPendingToken = 1u << 31;

// residual[i] = table[ids[i]] * scale
struct EmbedArgs {
  const uint32_t* ids;  // [t], each below table.rows, or pending
  const uint32_t* last_tokens = nullptr;
  uint32_t tokens;
  Matrix table;     // [vocab, h]
  float scale;      // sqrt(h), rounded to act
  float* residual;  // [t, h]
};

// to[i] = from[rows[i]], of rows of so many bytes, a multiple of 16.
struct GatherArgs {
  const void* from;
  const uint32_t* rows;  // [count]
  uint32_t count;
  uint64_t row_bytes;
  void* to;
};

// RMS norm in float32, y = x * rsqrt(mean(x^2) + eps) * (1 + w), fused with what stands around it in a layer:
//   residual += delta_weight ? norm(delta, delta_weight) : delta      where delta is given
//   out = norm(residual[rows], weight)                                where weight is given
struct NormArgs {
  float* residual;                      // [t, h]
  const void* delta = nullptr;          // [t, h] act: the output of the block before; may be where `out` goes
  const float* delta_weight = nullptr;  // [h]
  const uint32_t* rows = nullptr;       // [tokens] rows of residual to norm; all in order where null. Not with delta
  const float* weight = nullptr;        // [h]
  void* out = nullptr;                  // [tokens, h] act, or e4m3 with `quantize`, then not where delta is
  uint32_t tokens;
  uint32_t hidden;
  float eps;
  Quantize quantize{};
};

// out = x w^T. With w in e4m3 x is so too, and a product is multiplied by the scales of its row of x and row of w.
struct GemmArgs {
  const void* x;  // [t, w.cols] act or e4m3
  Matrix w;       // [n, k]
  void* out;      // [t, n]
  DType out_dtype;
  uint32_t tokens;
  uint32_t capacity = 0;  // rows that x and out have room for; those of out past `tokens` may be overwritten
  Quantize x_scale{};     // of x in e4m3: what it was written with
};

// out = gelu_tanh(x gate^T) * (x up^T), the rows of w being those of gate, then those of up.
struct GatedGemmArgs {
  const void* x;  // [t, w.cols] act or e4m3
  Matrix w;       // [2 ffn, k]
  DType act;
  void* gate_up;  // [t, 2 ffn] act: room for the products, where they are not fused
  void* out;      // [t, ffn] act, or e4m3 with `quantize`
  uint32_t tokens;
  uint32_t capacity = 0;  // as for GemmArgs, of x and gate_up
  Quantize x_scale{};
  Quantize quantize{};
};

// One layer of the paged cache. Keys and values each [page][kv_head][page_size][head_dim], act, or e4m3 with a scale
// for each head.
struct KvLayer {
  void* keys;
  void* values;
  DType dtype;
  uint32_t page_size, kv_heads, head_dim;
  const float* key_scales = nullptr;    // [kv_heads]
  const float* value_scales = nullptr;  // [kv_heads]
};

// The slot of a row that only fills up a captured or padded batch.
constexpr uint32_t kNoSlot = ~0u;

// Splits qkv, norms q and k where the model does, rotates both (halves, angles in float32), writes q out and k, v
// into the cache.
struct RopeArgs {
  const void* qkv;            // [t, (heads + 2 kv_heads) head_dim] act
  const uint32_t* positions;  // [t]
  const uint32_t* slots;      // [t] page * page_size + offset: where the token's key and value go; kNoSlot: nowhere
  const float* inverse_frequency;  // [head_dim / 2]
  const float* q_norm = nullptr;   // [head_dim]
  const float* k_norm = nullptr;   // [head_dim]
  float eps;
  uint32_t heads;
  void* q;  // [t, heads head_dim] act
  KvLayer cache;
  uint32_t tokens;
};

// Up to kQueryTile new tokens of one sequence, from its new token `row` on: what a kernel takes at a time where there
// are several.
struct QueryTile {
  uint32_t sequence;  // kNoSequence: nothing, where a captured batch is filled up
  uint32_t row;
  bool operator==(const QueryTile&) const = default;
};
constexpr uint32_t kQueryTile = 128;
constexpr uint32_t kNoSequence = ~0u;

// softmax(cap(scale q k^T)) v over the cached tokens a query may see: those at or before its position, and with a
// window only the last `window` of them. The new tokens of sequence i are rows cu_seqlens[i]..cu_seqlens[i+1], the
// last one at position kv_len[i] - 1. Rows from cu_seqlens[s] on fill up a padded batch: no attention is due for them.
struct AttentionArgs {
  const void* q;  // [t, heads head_dim] act
  KvLayer cache;
  const uint32_t* cu_seqlens;   // [s + 1]
  const uint32_t* kv_len;       // [s] cached tokens, the new ones among them
  const uint32_t* block_table;  // [s, max_pages]
  uint32_t sequences, max_pages;
  // A number for what is in these tables now: calls that give the same one may share what is computed from them. 0:
  // none.
  uint64_t pass = 0;
  const QueryTile* query_tiles = nullptr;  // [tiles] of all sequences with several new tokens; longest work first
  uint32_t tiles = 0;
  uint32_t heads;
  uint32_t window;  // 0: none
  float scale;
  float soft_cap;  // 0: none
  void* out;       // [t, heads head_dim] act, or e4m3 with `quantize`
  uint32_t tokens;
  Quantize quantize{};  // static only: a token's heads are not computed together
};

// out = gelu_tanh(gate) * up
struct GegluArgs {
  const void* gate_up;  // [t, 2 ffn] act: gate, then up
  void* out;            // [t, ffn] act, or e4m3 with `quantize`
  uint32_t tokens, ffn;
  Quantize quantize{};
};

// out = x as FP8
struct QuantizeArgs {
  const void* x;  // [rows, width]
  DType dtype;    // of x: f32, bf16
  Quantize how;
  void* out;  // [rows, width] e4m3
  uint32_t rows, width;
};

// x = cap * tanh(x / cap)
struct SoftCapArgs {
  float* x;  // [rows, cols]
  uint32_t rows, cols;
  float cap;
};

// What is gathered of magnitudes, without forgetting any: the largest, and how many there are in each of the bins that
// the upper bits of float32 make, sixteen of them from one power of two to the next. Counts add up and maxima do not
// depend on the order, so neither do the scales that calibration makes of them. NaN and infinity are in the last bins.
constexpr uint32_t kMagnitudeBins = 4096;
constexpr uint32_t magnitude_bin(uint32_t float_bits) { return (float_bits & 0x7FFFFFFF) >> 19; }
struct Magnitudes {
  float* largest;    // [groups], of those that are finite
  uint64_t* counts;  // [groups][kMagnitudeBins]
};

// Adds the elements of x to what was gathered, the columns in as many groups as there are.
struct ObserveArgs {
  const void* x;  // [rows, width] act
  uint32_t rows, width;
  uint32_t groups = 1;  // divides width
  Magnitudes to;
};

// Adds the keys and values of these tokens, a group for each K/V head. The cache is not in FP8.
struct ObserveCacheArgs {
  KvLayer cache;
  const uint32_t* slots;  // [tokens], as for RopeArgs
  uint32_t tokens;
  Magnitudes keys, values;
};

// Each task's result, kept as number first, first + 1, ... of the step's; a token that is picked also goes to
// last_tokens[its slot]. Tasks without a row come last and have no result.
struct SampleArgs {
  float* logits;  // [rows, vocab]; changed while a task runs, and restored
  uint32_t vocab;
  const SampleTask* tasks;        // [count]
  const Adjustment* adjustments;  // of all these tasks together at most `vocab`
  uint32_t first = 0;
  uint32_t count;
  uint32_t product_rows =
      0;             // of the last sampled_gemm(), where that made these logits: what it has seen of them holds
  uint32_t max_top;  // the most a task reports, the same for all of a step; up to kTopRoom takes no memory
  uint32_t* last_tokens;
};
constexpr uint32_t kTopRoom = 20;

// What an engine will ask of the operations at most.
struct WorkLimits {
  uint32_t head_dim = 0;    // of the widest head
  uint32_t group = 0;       // query heads that share a K/V head
  uint32_t logit_rows = 0;  // sampled or scored in one step
  uint32_t vocab = 0;
};

// Operations recorded once, to be run again on whatever their arguments point to then.
class Graph {
 public:
  virtual ~Graph() = default;
  virtual void launch() = 0;
};

// Bytes a backend has taken from its device, and the most it has had.
struct MemoryUse {
  uint64_t now = 0, peak = 0;

  void take(uint64_t bytes) { peak = std::max(peak, now += bytes); }
  void give_back(uint64_t bytes) { now -= bytes; }
};

class Backend {
 public:
  virtual ~Backend() = default;
  // One line for a person: kind, instruction set or GPU, threads.
  virtual std::string name() const = 0;
  // Bytes that can be allocated, where that is known.
  virtual std::optional<uint64_t> free_memory() const = 0;
  // Bytes the operations need for themselves within the limits; reserve() takes them, so that no operation has to.
  virtual uint64_t workspace_bytes(const WorkLimits& limits) const = 0;
  virtual void reserve(const WorkLimits& limits) = 0;
  // What it has taken itself, for buffers and for the operations' own use. A driver takes some more.
  virtual MemoryUse memory() const = 0;
  // Bytes read and written in a second by a copy within the device's memory, measured now: what bounds everything that
  // is bound by memory. Takes up to 2 GiB while it runs, not counted in memory().
  virtual double copy_bandwidth() = 0;

  virtual void* allocate(size_t bytes) = 0;  // aligned for any operation; throws Error::device with the numbers
  virtual void release(void* memory, size_t bytes) noexcept = 0;  // as many as were allocated
  virtual void upload(void* to, const void* host, size_t bytes) = 0;
  virtual void download(void* host, const void* from, size_t bytes) = 0;
  // Uploads `count` elements, converted (to nearest even where it narrows); to e4m3 only from e4m3.
  virtual void upload_as(void* to, DType to_type, const void* host, DType host_type, size_t count) = 0;

  // Elements drawn evenly around zero with this deviation; each a function of the seed and its index.
  virtual void fill_random(void* to, DType type, size_t count, uint64_t seed, float deviation) = 0;

  // The bytes in which a matrix of bf16 can be packed, without loss, for products of few rows to read in less time.
  // Sums may be added in another order then. 0: the backend has no use for that.
  virtual uint64_t packed_bytes(const Matrix&) const { return 0; }
  // Packs it; false if its numbers cannot be, and then `to` holds nothing of use.
  virtual bool pack(const Matrix&, void*) { return false; }

  // Records the operations that `work` asks for, without running them; to be called only where captures().
  virtual std::unique_ptr<Graph> capture(const std::function<void()>& work) = 0;
  virtual bool captures() const = 0;
  // While it is on, a product of a new shape may take the time to find its fastest algorithm.
  virtual void tune(bool on) = 0;
  // Whether operations go on while the host prepares the next ones.
  virtual bool asynchronous() const = 0;

  virtual void embed(const EmbedArgs& args) = 0;
  virtual void gather_rows(const GatherArgs& args) = 0;
  virtual void norm(const NormArgs& args) = 0;
  virtual void gemm(const GemmArgs& args) = 0;
  virtual void rope(const RopeArgs& args) = 0;
  virtual void attention(const AttentionArgs& args) = 0;
  virtual void geglu(const GegluArgs& args) = 0;
  // By gemm() and norm(), whose delta `product` is, unless a backend can do better: then it has no use for its memory.
  virtual void gemm_norm(const GemmArgs& product, const NormArgs& norm) {
    gemm(product);
    this->norm(norm);
  }
  // By gemm() and geglu(), unless a backend can do better: then it has no use for gate_up.
  virtual bool fuses_gated_gemm(const GatedGemmArgs&) const { return false; }
  virtual void gated_gemm(const GatedGemmArgs& args) {
    gemm({.x = args.x,
          .w = args.w,
          .out = args.gate_up,
          .out_dtype = args.act,
          .tokens = args.tokens,
          .capacity = args.capacity,
          .x_scale = args.x_scale});
    geglu({.gate_up = args.gate_up,
           .out = args.out,
           .tokens = args.tokens,
           .ffn = args.w.rows / 2,
           .quantize = args.quantize});
  }
  // By gemm() and rope(), of whose qkv `product` is all, unless a backend can do better: then it has no use for qkv.
  virtual void rope_gemm(const GemmArgs& product, const RopeArgs& rope) {
    gemm(product);
    this->rope(rope);
  }
  // By gemm(), soft_cap() (where it is not 0) and sample(), whose logits `product` is, unless a backend can do better:
  // then it may leave out the rows of those that only pick the likeliest token.
  virtual void sampled_gemm(const GemmArgs& product, float soft_cap, const SampleArgs& sample) {
    gemm(product);
    if (soft_cap > 0)
      this->soft_cap({.x = sample.logits, .rows = product.tokens, .cols = sample.vocab, .cap = soft_cap});
    this->sample(sample);
  }
  virtual void soft_cap(const SoftCapArgs& args) = 0;
  virtual void quantize(const QuantizeArgs& args) = 0;
  virtual void observe(const ObserveArgs& args) = 0;
  virtual void observe_cache(const ObserveCacheArgs& args) = 0;

  virtual void sample(const SampleArgs& args) = 0;

  // The results of sample() on their way to the host: starts with the first `count`, of tasks that had this max_top (or
  // 0, where none reports any). finish_results() waits for the calls in their order; a row that is not finite has none.
  virtual void start_results(uint32_t count, uint32_t max_top) = 0;
  virtual std::vector<std::optional<ScoredToken>> finish_results() = 0;
};

// A backend's memory, given back at the end of its life.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Backend& backend, size_t bytes) : backend_(&backend), data_(backend.allocate(bytes)), bytes_(bytes) {}
  Buffer(Buffer&& other) noexcept
      : backend_(std::exchange(other.backend_, nullptr)),
        data_(std::exchange(other.data_, nullptr)),
        bytes_(std::exchange(other.bytes_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(backend_, other.backend_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Buffer() {
    if (backend_ != nullptr) backend_->release(data_, bytes_);
  }

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  Backend* backend_ = nullptr;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// The plain C++ backend, with activations of type `act`. `threads` 0: all cores this process may use.
std::unique_ptr<Backend> make_reference_backend(uint32_t threads, DType act);

}  // namespace gemma_cuda
