// out [tokens, n] = x [tokens, k] w [n, k]^T in bf16 or FP8 with f32 sums, for up to 64 tokens: the products of a small
// decode step. Reading w takes all the time, so everything here keeps the memory busy, from before the first
// instruction that needs x to after the last product.
//
// Operands are swapped: 64 rows of w are the fixed side of a warpgroup's product, the tokens its flexible one, so few
// tokens cost little. A block multiplies tiles of 128 rows of w, two warpgroups of 64 each. Two more threads bring w
// and x in slots of 128 bytes of a row by tensor copies to a ring of as many slots as shared memory holds; barriers
// tell the products which slot is full and the copies which is empty again. The weights depend on no kernel: the ring
// is full of them before the kernel before has ended (programmatic dependent launch). But few slots are asked for at a
// time, 8 MB by all blocks, 12 in bf16, and 4 as long as other kernels still run: what else is waiting in the memory's
// queues makes their last small accesses slow, on which everything waits. For the same reason code is kept short: every
// layer reads that of all its kernels anew, for together they are more than a multiprocessor keeps.
//
// As many tiles as there are multiprocessors, or a multiple, are computed whole, one block each. The slots of the
// others, in order, are cut into one even run a block, which it takes first (stream-K), so that no multiprocessor is
// ever idle whatever n is. A tile that is cut is summed by the block that comes to its end last: the others have left
// their parts of the sum in global memory, which the L2 cache holds, and it adds all of them in the order of k. So the
// result does not depend on which block that was, nor on the number of tokens: a token's results are the same in every
// batch. No block waits for another, which a GPU shared with other work might never start. Where a norm reads the
// result, all parts are left to it (ProductParts), to add them in the same order: joining them here took 2 to 7 us of a
// product in a step. That is a kernel of its own, of a third of the code. Where tiles of fewer rows are one a block, as
// those of 96 for q, k, v of gemma-7b, none is cut: 2 % of a step of one sequence, though four multiprocessors are
// idle. That is by a kernel without what joins parts.
//
// Gate and up are multiplied in one, eight rows of each by turns, which the copy engine brings in that order: so a
// thread has both for the same column, and GeGLU is all that is written. At 64 tokens that is 5 % of a step in FP8, 3 %
// in bf16: the products, four to eight times the bytes, went to the L2 cache and back.
//
// The vocabulary of a model in bf16 is read packed, in three quarters of its bytes (packed_bf16.h), and unpacked to the
// registers that products take it from. Tiles are of 256 rows then, for four warpgroups: of 128, x would have to come
// from the L2 cache for every 12 KB of w, and at 64 tokens that took 447 us, not 415.
//
// Logits are surveyed while they are in registers, for sample(). A row of which nobody wants more than the likeliest
// token is not written at all: of 64 rows that is 65 MB less each way, 0.7 % of a step.
//
// Reaches, on an H100, in a step of gemma-7b in FP8: what a product adds to the time of the kernels before it (us; what
// its bytes need at the 3.01 TB/s of a copy, which come in part while those still run; benches/NOTES.md):
//             q, k, v (12.5)   attention's output (4.2)   gate and up (50.2)   down (25.1)
//  1 token     9.6              3.0                        46.1                 24.6
// 64 tokens   13.9              4.3                        51.1                 24.8
// (One token before cache_policy.cuh.) On 2026-11-26 all four of 64 tokens added 188 in bf16 for 184 of bytes. The
// output of attention by itself was faster by cuBLASLt, 0.3 % of a step, with parts of eight slots; it stays here, so
// that no row of a product depends on the batch.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/arrival.cuh"
#include "cuda/barrier.cuh"
#include "cuda/check.h"
#include "cuda/launch.cuh"
#include "cuda/packed_bf16.cuh"
#include "cuda/skinny_gemm.h"
#include "cuda/skinny_results.cuh"
#include "cuda/tensor_copy.cuh"
#include "cuda/tensor_map.h"
#include "cuda/wgmma.cuh"

namespace gemma_cuda::cuda {
namespace {

constexpr uint32_t kRowBytes = 128;         // of a slot
constexpr uint32_t kRingBytes = 208 << 10;  // leaves the kernels beside it some
constexpr uint32_t kMaxSlots = 16;
constexpr uint32_t kMostColumns = 1 << 16;  // of w: so Divisor is exact for all slots of two tiles a block
// In a block's part of a tile: fewer take less time than joining another part, or adding it in the norm behind.
constexpr uint32_t kLeastSlots = 8, kLeastLeftSlots = 4;

// What w is, besides bf16 and FP8: bf16 in fewer bytes (packed_bf16.h).
struct Packed {};

template <class Type>
constexpr uint32_t kSlotColumns = std::is_same_v<Type, E4m3> ? kRowBytes : kRowBytes / 2;
static_assert(kSlotColumns<Packed> == kPackedColumns);

template <class Type>
constexpr int kGroupsOf = std::is_same_v<Type, Packed> ? kPackedGroups : kGroups;
template <class Type>
constexpr int kMultiplying = kGroupsOf<Type>* kGroup;  // threads
template <class Type>
constexpr int kThreads = kMultiplying<Type> + 64;

// Of a slot, up to where x begins.
template <class Type>
constexpr uint32_t kWeightBytes = std::is_same_v<Type, Packed> ? (kPackedSlotBytes + 1023) / 1024 * 1024
                                                               : kTileRows* kRowBytes;
template <int Tokens>
constexpr uint32_t kTokenBytes = Tokens* kRowBytes;
template <int Tokens, class Type>
constexpr uint32_t kSlotBytes = kWeightBytes<Type> + kTokenBytes<Tokens>;
template <int Tokens, class Type>
constexpr uint32_t kSlots = std::min(kMaxSlots, kRingBytes / kSlotBytes<Tokens, Type>);

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Slots asked for at once: else, and before x is there.
template <class Type>
constexpr uint32_t kUnderWay = std::is_same_v<Type, Bf16> ? 6 : 4;
template <Kind kKind>
constexpr uint32_t kUnderWayEarly = kKind == Kind::gated ? 3 : 2;

struct Barriers {
  Barrier weights[kMaxSlots], x[kMaxSlots], empty[kMaxSlots];
  Barrier begun;  // over when the kernel before has ended
};

__device__ inline uint32_t whole_tile(const SkinnyGemm& args, uint32_t i) {
  return args.cut.tiles + i * gridDim.x + blockIdx.x;
}

// Walks the slots of a block, in the order in which it multiplies them: of the cut tiles, then of the whole ones.
template <class Type>
class Slots {
 public:
  __device__ explicit Slots(const SkinnyGemm& args) : args_(args) {
    const uint32_t begin = first_slot(args.cut, blockIdx.x);
    of_cut_ = first_slot(args.cut, blockIdx.x + 1) - begin;
    left_ = of_cut_ + args.whole * args.cut.depth;
    tile_ = begin / args.cut.by_depth;
    k_ = begin - tile_ * args.cut.depth;
    if (of_cut_ == 0) enter_whole();
  }
  __device__ bool done() const { return left_ == 0; }
  __device__ uint32_t row() const { return args_.tile_rows * tile_; }
  __device__ uint32_t column() const { return kSlotColumns<Type> * k_; }
  __device__ uint32_t number() const { return tile_ * args_.cut.depth + k_; }
  __device__ void next() {
    --left_;
    ++k_;
    if (--of_cut_ == 0)
      enter_whole();
    else if (k_ == args_.cut.depth)
      k_ = 0, tile_ += step_;
  }

 private:
  __device__ void enter_whole() { k_ = 0, tile_ = whole_tile(args_, 0), step_ = gridDim.x; }

  const SkinnyGemm& args_;
  uint32_t left_, of_cut_, tile_, k_, step_ = 1;
};

// A place in the ring, and how often the ring has been gone around.
template <int Tokens, class Type>
struct Place {
  uint32_t slot = 0, round = 0;

  __device__ void next() {
    if (++slot == kSlots<Tokens, Type>) slot = 0, ++round;
  }
  __device__ void wait_until_empty(Barriers& barriers) const {
    if (round > 0) wait(barriers.empty[slot], round % 2 ^ 1);
  }
  // Until the weights asked for so many slots before are there.
  __device__ void wait_for_weights(Barriers& barriers, uint32_t before) const {
    const bool around = slot < before;
    if (around && round == 0) return;
    wait(barriers.weights[slot - before + (around ? kSlots<Tokens, Type> : 0)], (round - around) % 2);
  }
};

// Never more of w is asked for and not there yet than keeps the memory busy. More would only wait in its queues, and
// behind it everybody's small accesses: of those the kernels before, which this one waits for, consist at their ends.
template <int Tokens, class Type, Kind kKind>
__device__ void bring_weights(const SkinnyGemm& args, const CUtensorMap& w, uint32_t ring, Barriers& barriers) {
  static_assert(kUnderWay<Type> < kSlots<Tokens, Type>);
  Place<Tokens, Type> at;
#pragma unroll 1
  for (Slots<Type> slots(args); !slots.done(); slots.next(), at.next()) {
    at.wait_until_empty(barriers);
    at.wait_for_weights(barriers, is_over(barriers.begun, 0) ? kUnderWay<Type> : kUnderWayEarly<kKind>);
    Barrier& full = barriers.weights[at.slot];
    const uint32_t to = ring + at.slot * kSlotBytes<Tokens, Type>;
    if constexpr (std::is_same_v<Type, Packed>) {
      arrive_expecting(full, kPackedSlotBytes);
      copy_row(to, args.packed + size_t{slots.number()} * kPackedSlotBytes, kPackedSlotBytes, full, kEvictFirst);
      continue;
    }
    arrive_expecting(full, args.tile_rows * kRowBytes);
    if constexpr (kKind == Kind::gated)
      copy_pairs(to, w, slots.row(), slots.column(), full, kEvictFirst);
    else
      copy_box(to, w, slots.row(), slots.column(), full, kEvictFirst);  // read once; x by all blocks
  }
}

template <int Tokens, class Type>
__device__ void bring_x(const SkinnyGemm& args, const CUtensorMap& x, uint32_t ring, Barriers& barriers) {
  wait_for_last();
  arrive(barriers.begun);
  Place<Tokens, Type> at;
#pragma unroll 1
  for (Slots<Type> slots(args); !slots.done(); slots.next(), at.next()) {
    at.wait_until_empty(barriers);
    arrive_expecting(barriers.x[at.slot], kTokenBytes<Tokens>);
    copy_box(ring + at.slot * kSlotBytes<Tokens, Type> + kWeightBytes<Type>, x, 0, slots.column(), barriers.x[at.slot],
             kEvictLast);
  }
}

// A barrier for the threads of a group that tells each whether one of them said yes.
__device__ inline bool any_of_group(int group, bool yes) {
  uint32_t any;
  asm volatile(
      "{.reg .pred mine, any; setp.ne.b32 mine, %1, 0; "
      "barrier.cta.red.or.pred any, %2, %3, mine; "
      "selp.b32 %0, 1, 0, any;}"
      : "=r"(any)
      : "r"(uint32_t{yes}), "r"(1 + group), "n"(kGroup)
      : "memory");
  return any;
}

// The parts that blocks have of a tile, added in the order of k by the block that brings the last one. Returns whether
// that is this block; `sums` is then the whole.
template <int Groups, int N>
__device__ bool join_parts(float (&sums)[N][4], const SkinnyGemm& args, uint32_t tile, int group) {
  constexpr int kThreads = Groups * kGroup;
  const Blocks blocks(args.cut, tile);
  const uint32_t others = blocks.last - blocks.first;
  const auto part = [&](uint32_t block) {
    return args.partials + size_t{blocks.place(block)} * N * kThreads + threadIdx.x;
  };
  uint32_t& arrived = args.arrivals[tile * Groups + group];
  const bool one = threadIdx.x % kGroup == 0;
  // If all others have left theirs already, this one need not.
  bool complete = any_of_group(group, one && load_acquire(arrived) == others);
  if (!complete) {
    float4* mine = part(blockIdx.x);
#pragma unroll
    for (int i = 0; i < N; ++i)
      store_kept(mine + i * kThreads, make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]));
    any_of_group(group, false);  // all have
    complete = any_of_group(group, one && add_acquire_release(arrived) == others);
  }
  if (!complete) return false;
  if (one) arrived = 0;
  // As many parts at once as registers hold: one by one each would take the way to the L2 cache and back.
  constexpr int kAtOnce = N <= 2 ? 8 : 32 / Groups / N;
  float total[N][4] = {};
  for (uint32_t first = blocks.first; first <= blocks.last; first += kAtOnce) {
    float4 more[kAtOnce][N];
#pragma unroll
    for (int b = 0; b < kAtOnce; ++b)
#pragma unroll
      for (int i = 0; i < N; ++i)
        more[b][i] = first + b > blocks.last   ? make_float4(0, 0, 0, 0)
                     : first + b == blockIdx.x ? make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3])
                                               : __ldcg(part(first + b) + i * kThreads);
#pragma unroll
    for (int b = 0; b < kAtOnce; ++b)
#pragma unroll
      for (int i = 0; i < N; ++i) {
        total[i][0] += more[b][i].x;
        total[i][1] += more[b][i].y;
        total[i][2] += more[b][i].z;
        total[i][3] += more[b][i].w;
      }
  }
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[i][j] = total[i][j];
  return true;
}

// Sums of E4M3 are added up outside the tensor cores, which would not keep them in full, every slot.
template <int N>
__device__ void add(float (&sums)[N][4], const float (&more)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[i][j] += more[i][j];
}

template <int Tokens, class Type, Kind kKind>
__device__ void consume(const SkinnyGemm& args, uint32_t ring, Barriers& barriers) {
  const int group = threadIdx.x / kGroup, lane = threadIdx.x % 32;
  const uint32_t begin = first_slot(args.cut, blockIdx.x), end = first_slot(args.cut, blockIdx.x + 1);
  auto free = [&](uint32_t slot) {
    if (lane == 0) arrive(barriers.empty[slot]);
  };
  uint32_t slot = 0, parity = 0;
  float sums[Tokens / 8][4];
  uint32_t factors[2] = {};  // of packed rows
  auto start_slot = [&](float(&to)[Tokens / 8][4], bool keep) {
    const uint32_t weights = ring + slot * kSlotBytes<Tokens, Type>, x = weights + kWeightBytes<Type>;
    wait(barriers.weights[slot], parity);
    if constexpr (std::is_same_v<Type, Packed>) {
      uint32_t numbers[4][4];
      unpack_slot(numbers, weights, factors);
      wait(barriers.x[slot], parity);
      begin_products();
#pragma unroll
      for (int k = 0; k < 4; ++k) multiply_columns(Bf16{}, to, numbers[k], operand(x + 32 * k, 0), keep || k > 0);
    } else {
      wait(barriers.x[slot], parity);
      begin_products();
#pragma unroll
      for (int k = 0; k < 4; ++k)
        multiply_columns(Type{}, to, operand(weights + group_row(args, group) * kRowBytes + 32 * k, 0),
                         operand(x + 32 * k, 0), keep || k > 0);
    }
    commit_products();
  };
  auto next_slot = [&] {
    if (++slot == kSlots<Tokens, Type>) slot = 0, parity ^= 1;
  };
  auto add_slots = [&](uint32_t count) {
    if constexpr (std::is_same_v<Type, E4m3>) {
#pragma unroll
      for (auto& fragment : sums) fragment[0] = fragment[1] = fragment[2] = fragment[3] = 0;
      for (uint32_t i = 0; i < count; ++i) {  // the other group multiplies while this one adds
        float part[Tokens / 8][4];
        start_slot(part, false);
        wait_products<0>();
        pin(part);
        free(slot);
        next_slot();
        add(sums, part);
      }
    } else if constexpr (std::is_same_v<Type, Packed>) {
      for (uint32_t i = 0; i < count; ++i) {  // other groups multiply while this one unpacks
        start_slot(sums, i > 0);
        wait_products<0>();
        pin(sums);
        __syncwarp();  // every lane has unpacked its own
        free(slot);
        next_slot();
      }
    } else {
      for (uint32_t i = 0; i < count; ++i) {
        start_slot(sums, i > 0);
        wait_products<1>();  // those of the slot before
        if (i > 0) free((slot + kSlots<Tokens, Type> - 1) % kSlots<Tokens, Type>);
        next_slot();
      }
      wait_products<0>();
      pin(sums);
      free((slot + kSlots<Tokens, Type> - 1) % kSlots<Tokens, Type>);
    }
  };
  Finish<Tokens, kKind, kGroupsOf<Type>> finish_tiles(args);
  const uint32_t all = end + args.whole * args.cut.depth;
#pragma unroll 1
  for (uint32_t at = begin; at < all;) {  // the cut tiles' slots, then those of the whole ones
    const uint32_t tile = at < end ? at / args.cut.by_depth : whole_tile(args, (at - end) / args.cut.by_depth);
    const uint32_t count = at < end ? min((tile + 1) * args.cut.depth, end) - at : args.cut.depth;
    if constexpr (kKind == Kind::parts) {
      add_slots(count);
      leave_part(sums, args, tile);
    } else {
      const Rows<kKind> rows(args, tile);
      const Scales scales(args, rows);
      if constexpr (std::is_same_v<Type, Packed>)
        for (int i = 0; i < 2; ++i) factors[i] = rows.row[i] < args.n ? args.packed_factors[rows.row[i]] : 0;
      add_slots(count);
      bool complete = true;
      if constexpr (kKind != Kind::whole)
        complete = count == args.cut.depth || join_parts<kGroupsOf<Type>>(sums, args, tile, group);
      if (complete) {
        scales.apply(sums, args);
        finish_tiles.tile(sums, rows);
      }
    }
    at += count;
  }
  finish_tiles.end();
}

#endif

template <int Tokens, class Type, Kind kKind>
__global__ void __launch_bounds__(kThreads<Type>, 1)
    skinny_gemm_kernel(const __grid_constant__ CUtensorMap w, const __grid_constant__ CUtensorMap x, SkinnyGemm args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char memory[];
  __shared__ Barriers barriers;
  allow_next();
  const uint32_t ring = (shared_address(memory) + 1023) / 1024 * 1024;
  if (threadIdx.x == 0) {
    for (uint32_t slot = 0; slot < kSlots<Tokens, Type>; ++slot) {
      init(barriers.weights[slot], 1);
      init(barriers.x[slot], 1);
      init(barriers.empty[slot], kMultiplying<Type> / 32);
    }
    init(barriers.begun, 1);
    publish_barriers();
  }
  __syncthreads();
  if (args.fresh) wait_for_last();
  if (threadIdx.x < kMultiplying<Type>)
    consume<Tokens, Type, kKind>(args, ring, barriers);
  else if (threadIdx.x == kMultiplying<Type>)
    bring_weights<Tokens, Type, kKind>(args, w, ring, barriers);
  else if (threadIdx.x == kMultiplying<Type> + 32)
    bring_x<Tokens, Type>(args, x, ring, barriers);
#endif
}

bool compiled() {
  static const bool found = has_body(skinny_gemm_kernel<8, Bf16, Kind::plain>);
  return found;
}

uint32_t tiles(const Matrix& w) { return (w.rows + kTileRows - 1) / kTileRows; }

// Where one tile a multiprocessor is all there is to do, and lower tiles make that hardly more than an even share, none
// need be cut: joining them would be the product's end. The number of tokens has no say in it.
uint32_t tile_rows(const Matrix& w, const DeviceInfo& device) {
  const uint32_t share = (w.rows + device.multiprocessors - 1) / device.multiprocessors, rows = (share + 7) / 8 * 8;
  return rows >= kGroupRows && rows <= kTileRows && share * 20 >= rows * 19 ? rows : kTileRows;
}

// Where blocks leave parts of sums, and what they count them by.
struct Scratch {
  void* partials;
  uint32_t* arrivals;
};

// What all kinds have in common.
SkinnyGemm skinny_gemm_of(const GemmArgs& args, const Scratch& scratch) {
  SkinnyGemm work{};
  work.out = args.out;
  work.out_dtype = args.out_dtype;
  work.w_scales = args.w.scales;
  work.x_scales = args.x_scale.scale != nullptr ? args.x_scale.scale : args.x_scale.row_scales;
  work.one_x_scale = args.x_scale.scale != nullptr;
  work.fresh = args.w.fresh;
  work.tokens = args.tokens;
  work.n = args.w.rows;
  work.partials = static_cast<float4*>(scratch.partials);
  work.arrivals = scratch.arrivals;
  return work;
}

// Shares the tiles out among the blocks.
void divide(SkinnyGemm& work, Kind kind, const Matrix& w, uint32_t columns, const DeviceInfo& device) {
  const uint32_t depth = (w.cols + columns - 1) / columns;
  const uint32_t all = (w.rows + work.tile_rows - 1) / work.tile_rows,
                 least = kind == Kind::parts ? kLeastLeftSlots : kLeastSlots,
                 parts = work.tile_rows < kTileRows ? 1 : std::max(1u, depth / least);
  const uint32_t blocks = std::min<uint32_t>(device.multiprocessors, all * parts);
  if (kind != Kind::parts) {
    // Fewer cut tiles than half the blocks would be in too many parts each.
    work.whole = all / blocks;
    if (work.whole > 0 && all % blocks < blocks / 2) --work.whole;
  }
  work.cut = Cut(all - work.whole * blocks, depth, blocks);
}

template <int Tokens, class Type, Kind kKind>
Cut launch(SkinnyGemm work, const GemmArgs& args, const DeviceInfo& device, const Stream& stream) {
  work.tile_rows = kKind == Kind::whole ? tile_rows(args.w, device) : kGroupsOf<Type> * kGroupRows;
  divide(work, kKind, args.w, kSlotColumns<Type>, device);
  constexpr uint32_t kBytes = kSlots<Tokens, Type> * kSlotBytes<Tokens, Type> + 1024;  // to begin at a multiple of it
  const auto kernel = skinny_gemm_kernel<Tokens, Type, kKind>;
  allow_shared(kernel, kBytes);
  const auto map = kKind == Kind::gated ? pair_map : tensor_map;
  launch_early(stream, work.cut.blocks, kThreads<Type>, kBytes, kernel,
               map(args.w.data, args.w.dtype, args.w.rows, args.w.cols, work.tile_rows),
               tensor_map(args.x, args.w.dtype, args.tokens, args.w.cols, Tokens), work);
  return work.cut;
}

// Of how many tokens the kernel for so many is, hence the sums that it leaves.
uint32_t capacity(uint32_t tokens) { return tokens <= 8 ? 8 : tokens <= 16 ? 16 : tokens <= 32 ? 32 : 64; }

template <Kind kKind>
Cut launch(const SkinnyGemm& work, const GemmArgs& args, const DeviceInfo& device, const Stream& stream) {
  const auto by_tokens = [&](auto type) {
    using Type = decltype(type);
    switch (capacity(args.tokens)) {
      case 8: return launch<8, Type, kKind>;
      case 16: return launch<16, Type, kKind>;
      case 32: return launch<32, Type, kKind>;
      default: return launch<64, Type, kKind>;
    }
  };
  if constexpr (kKind == Kind::surveyed)
    if (args.w.packed != nullptr) return by_tokens(Packed{})(work, args, device, stream);
  const auto run = args.w.dtype == DType::e4m3 ? by_tokens(E4m3{}) : by_tokens(Bf16{});
  return run(work, args, device, stream);
}

bool fits(const Matrix& w, const DeviceInfo& device) {
  return device.capability == 90 && w.dtype != DType::f32 && w.cols * size_of(w.dtype) % 16 == 0 &&
         w.cols <= kMostColumns && tiles(w) * kGroups * sizeof(uint32_t) <= kSkinnyArrivalBytes && aligned(w.data) &&
         compiled();
}
// `Args` are GemmArgs or GatedGemmArgs.
template <class Args>
bool fits(const Args& args, const DeviceInfo& device) {
  return args.tokens <= kSkinnyTokens && aligned(args.x) && fits(args.w, device);
}

}  // namespace

bool skinny_gemm_fits(const GemmArgs& args, const DeviceInfo& device) { return fits(args, device); }

void skinny_gemm(const GemmArgs& args, const DeviceInfo& device, void* partials, uint32_t* arrivals,
                 const Stream& stream) {
  const SkinnyGemm work = skinny_gemm_of(args, {partials, arrivals});
  if (tile_rows(args.w, device) < kTileRows)
    launch<Kind::whole>(work, args, device, stream);
  else
    launch<Kind::plain>(work, args, device, stream);
}

bool skinny_gemm_leaves_parts(const GemmArgs& args, const DeviceInfo& device) {
  return fits(args, device) && tiles(args.w) < static_cast<uint32_t>(device.multiprocessors) && args.w.rows % 8 == 0 &&
         args.out_dtype == DType::bf16 && aligned(args.w.scales);
}

ProductParts skinny_gemm_in_parts(const GemmArgs& args, const DeviceInfo& device, void* partials,
                                  const Stream& stream) {
  const SkinnyGemm work = skinny_gemm_of(args, {partials, nullptr});
  return {.cut = launch<Kind::parts>(work, args, device, stream),
          .sums = static_cast<const float*>(partials),
          .capacity = capacity(args.tokens),
          .w_scales = work.w_scales,
          .x_scales = work.x_scales,
          .one_x_scale = work.one_x_scale,
          .fresh = work.fresh};
}

bool skinny_gated_gemm_fits(const GatedGemmArgs& args, const DeviceInfo& device) {
  return fits(args, device) && args.act == DType::bf16 && args.quantize.row_scales == nullptr &&
         args.w.rows % (2 * kPairRows) == 0;
}

void skinny_gated_gemm(const GatedGemmArgs& args, const DeviceInfo& device, void* partials, uint32_t* arrivals,
                       const Stream& stream) {
  const GemmArgs product{.x = args.x,
                         .w = args.w,
                         .out = args.out,
                         .out_dtype = args.quantize ? DType::e4m3 : DType::bf16,
                         .tokens = args.tokens,
                         .x_scale = args.x_scale};
  SkinnyGemm work = skinny_gemm_of(product, {partials, arrivals});
  work.out_scale = args.quantize.scale;
  launch<Kind::gated>(work, product, device, stream);
}

bool skinny_surveyed_gemm_fits(const GemmArgs& args, const DeviceInfo& device) {
  return fits(args, device) && args.out_dtype == DType::f32;
}

bool skinny_gemm_reads_packed(const Matrix& vocabulary, const DeviceInfo& device) {
  return vocabulary.dtype == DType::bf16 && fits(vocabulary, device);
}

Surveys skinny_surveyed_gemm(const GemmArgs& args, float soft_cap, const SampleArgs& sample, Survey* surveys,
                             const DeviceInfo& device, void* partials, uint32_t* arrivals, const Stream& stream) {
  SkinnyGemm work = skinny_gemm_of(args, {partials, arrivals});
  work.soft_cap = soft_cap;
  work.tasks = sample.tasks;
  work.task_count = sample.count;
  work.surveys = surveys;
  if (args.w.packed != nullptr) {
    work.packed = static_cast<const char*>(args.w.packed);
    work.packed_factors = packed_factors(args.w);
  }
  return {surveys, launch<Kind::surveyed>(work, args, device, stream).blocks, true};
}

size_t skinny_partial_bytes(const DeviceInfo& device) {
  return size_t{2} * device.multiprocessors * std::max(kTileRows, kPackedRows) * kSkinnyTokens * sizeof(float);
}

}  // namespace gemma_cuda::cuda
