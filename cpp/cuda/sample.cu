// A first kernel surveys each row with many blocks: its best token, the mass of its softmax, whether it is finite; or
// the product has done so that made the logits (skinny_gemm.cu). The second, one block a row, has then only to adjust,
// filter and draw; a greedy row is done. Every filter is a cut in the order "likelier first, equal ones by token":
// top-k and top-p find theirs by radix selection over the bits of the score, digit by digit from the top, with counts
// or probability mass as the weight of a token; no sort. Mass is summed in fixed point (2^-40), so the result does not
// depend on the order of the atomics. The row stays in L2 between its passes.
#include <cmath>

#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/sample.h"
#include "cuda/survey.cuh"
#include "ops/philox.h"

namespace gemma_cuda::cuda {
namespace {

constexpr int kThreads = 1024;

// Larger floats have larger keys.
__device__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 and 0 are equal
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

template <class T, class F>
__device__ T block_reduce(T mine, F combine) {
  __shared__ T partial[32];
  auto shuffle = [](T x, int offset) {
    T out;
    uint32_t words[sizeof(T) / 4];
    memcpy(words, &x, sizeof x);
    for (uint32_t& word : words) word = __shfl_xor_sync(~0u, word, offset);
    memcpy(&out, words, sizeof out);
    return out;
  };
  for (int offset = 16; offset > 0; offset /= 2) mine = combine(mine, shuffle(mine, offset));
  __syncthreads();
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = mine;
  __syncthreads();
  T all = partial[0];
  for (uint32_t warp = 1; warp < blockDim.x / 32; ++warp) all = combine(all, partial[warp]);
  __syncthreads();
  return all;
}

template <class F>
__device__ Best block_best(uint32_t vocab, F value) {
  Best best{-INFINITY, ~0u};
  for (uint32_t i = threadIdx.x; i < vocab; i += kThreads) best.take(value(i), i);
  return block_reduce(best, [](Best a, Best b) {
    a.take(b.value, b.token);
    return a;
  });
}

// The digit at which the weights of the 256 bins, added from the highest down, reach `target`; `above` becomes what the
// bins above it hold.
struct Digit {
  uint32_t digit;
  uint64_t above;
};

__device__ Digit find_digit(const unsigned long long* bins, uint64_t target) {
  __shared__ Digit found;
  if (threadIdx.x < 32) {
    // Lane l owns the eight bins below 256 - 8 l.
    const uint32_t high = 255 - threadIdx.x * 8;
    uint64_t mine = 0;
    for (uint32_t i = 0; i < 8; ++i) mine += bins[high - i];
    uint64_t upto = mine;
    for (int offset = 1; offset < 32; offset *= 2) {
      const uint64_t left = __shfl_up_sync(~0u, upto, offset);
      if (threadIdx.x >= offset) upto += left;
    }
    const uint32_t reached = __ballot_sync(~0u, upto >= target);
    const uint32_t lane = reached ? __ffs(reached) - 1 : 31;
    if (threadIdx.x == lane) {
      uint64_t above = upto - mine;
      uint32_t bin = high;
      while (bin > high - 7 && above + bins[bin] < target) above += bins[bin--];
      found = {bin, above};
    }
  }
  __syncthreads();
  const Digit out = found;
  __syncthreads();
  return out;
}

struct Selected {
  uint32_t key;        // the key at which the weights, from the largest key down, reach the target
  uint64_t remaining;  // of the target, to be had from items with that very key
};

// Selects over the low `bits` bits (a multiple of 8) of the keys. visit(use) calls use(key, weight) for the thread's
// share of the items.
template <class F>
__device__ Selected select(int bits, uint64_t target, F visit) {
  __shared__ unsigned long long bins[256];
  uint32_t prefix = 0;
  for (int shift = bits - 8; shift >= 0; shift -= 8) {
    for (uint32_t i = threadIdx.x; i < 256; i += kThreads) bins[i] = 0;
    __syncthreads();
    visit([&](uint32_t key, uint64_t weight) {
      if (shift + 8 == bits || key >> (shift + 8) == prefix)
        atomicAdd(&bins[key >> shift & 255], static_cast<unsigned long long>(weight));
    });
    __syncthreads();
    const Digit digit = find_digit(bins, target);
    prefix = prefix << 8 | digit.digit;
    target -= digit.above;
  }
  return {prefix, target};
}

// The tokens at or before a place in the order.
struct Cut {
  uint32_t key = 0;
  uint32_t last_token = ~0u;  // among those with that key
  __device__ bool has(uint32_t k, uint32_t token) const { return k > key || (k == key && token <= last_token); }
};

// The cut that leaves the first `count` of the tokens with this key.
template <class F>
__device__ Cut cut_at(uint32_t vocab, uint32_t key, uint64_t count, F key_at) {
  const Selected token = select(24, count, [&](auto use) {
    for (uint32_t i = threadIdx.x; i < vocab; i += kThreads)
      if (key_at(i) == key) use(~i & 0xffffffu, 1);
  });
  return {key, ~token.key & 0xffffffu};
}

template <class F>
__device__ Cut cut_top_k(uint32_t vocab, uint32_t k, F key_at) {
  const Selected found = select(32, k, [&](auto use) {
    for (uint32_t i = threadIdx.x; i < vocab; i += kThreads) use(key_at(i), 1);
  });
  return cut_at(vocab, found.key, found.remaining, key_at);
}

__device__ uint64_t mass_of(float score) {
  return score < -28.0f ? 0 : static_cast<uint64_t>(static_cast<double>(expf(score)) * 0x1p40);
}

// The shortest run of the likeliest within `kept` whose mass reaches top_p of all of it.
template <class S>
__device__ Cut cut_top_p(uint32_t vocab, float top_p, const Cut& kept, S score) {
  auto visit = [&](auto use) {
    for (uint32_t i = threadIdx.x; i < vocab; i += kThreads) {
      const float s = score(i);
      if (s >= -28.0f && kept.has(key_of(s), i)) use(key_of(s), mass_of(s));
    }
  };
  uint64_t mine = 0;
  visit([&](uint32_t, uint64_t mass) { mine += mass; });
  const uint64_t total = block_reduce(mine, [](uint64_t a, uint64_t b) { return a + b; });
  const uint64_t target = max(uint64_t{1}, static_cast<uint64_t>(ceil(static_cast<double>(top_p) * total)));
  const Selected found = select(32, target, visit);
  const uint32_t bits = found.key & 0x80000000u ? found.key & 0x7fffffffu : ~found.key;
  const uint64_t each = max(uint64_t{1}, mass_of(__uint_as_float(bits)));
  const Cut cut =
      cut_at(vocab, found.key, (found.remaining + each - 1) / each, [&](uint32_t i) { return key_of(score(i)); });
  return cut.key == kept.key ? Cut{cut.key, min(cut.last_token, kept.last_token)} : cut;
}

// As reference/sampler.cpp has it.
__device__ float gumbel(uint64_t seed, uint32_t step, uint32_t token) {
  const Philox bits = philox(seed, {token / 4, step, 0, 0});
  const float v = fminf((static_cast<float>(bits[token % 4]) + 0.5f) * 0x1p-32f, 1 - 0x1p-24f);
  return -logf(-log1pf(-v));
}

__device__ uint32_t draw(const SampleTask& task, const float* logits, uint32_t vocab, float top) {
  auto score = [&](uint32_t i) { return (logits[i] - top) / task.temperature; };  // the best is 0
  Cut cut;
  if (task.top_k != 0 && task.top_k < vocab)
    cut = cut_top_k(vocab, task.top_k, [&](uint32_t i) { return key_of(score(i)); });
  if (task.top_p < 1) cut = cut_top_p(vocab, task.top_p, cut, score);
  const float floor = task.min_p > 0 ? logf(task.min_p) : -INFINITY;
  return block_best(vocab,
                    [&](uint32_t i) {
                      const float s = score(i);
                      // Noise spans less than 32, so what lies further below the best cannot win.
                      if (s <= -32.0f || s < floor || !cut.has(key_of(s), i)) return -INFINITY;
                      return s + gumbel(task.seed, task.step, i);
                    })
      .token;
}

__device__ void report_top(const float* logits, uint32_t vocab, uint32_t count, TopEntry* to) {
  __shared__ uint32_t next;
  const Cut cut = cut_top_k(vocab, min(count, vocab), [&](uint32_t i) { return key_of(logits[i]); });
  if (threadIdx.x == 0) next = 0;
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < vocab; i += kThreads)
    if (cut.has(key_of(logits[i]), i)) to[atomicAdd(&next, 1)] = {i, logits[i]};
  __syncthreads();
}

constexpr int kParts = kSurveyParts;
constexpr int kSurveyThreads = 256;
constexpr int kAtOnce = 32;  // elements of a thread: a part of 262144 at once, all asked for before the first is needed

// What `Lanes` neighbours have, to each of them.
template <int Lanes>
__device__ Survey join_lanes(Survey mine) {
#pragma unroll
  for (int offset = Lanes / 2; offset > 0; offset /= 2) {
    const Survey other{__shfl_xor_sync(~0u, mine.best, offset), __shfl_xor_sync(~0u, mine.token, offset),
                       __shfl_xor_sync(~0u, mine.sum, offset), __shfl_xor_sync(~0u, mine.finite, offset)};
    // In the same order on both sides.
    mine = threadIdx.x & offset ? join(other, mine) : join(mine, other);
  }
  return mine;
}

// A thread's elements of [begin, end): its e-th is at place(e). Four neighbours where rows allow it.
template <bool Vectors>
struct Elements {
  float value[kAtOnce];

  __device__ static uint32_t place(uint32_t begin, int e) {
    return Vectors ? begin + (e / 4 * kSurveyThreads + threadIdx.x) * 4 + e % 4
                   : begin + e * kSurveyThreads + threadIdx.x;
  }
  __device__ Elements(const float* row, uint32_t begin, uint32_t end) {
#pragma unroll
    for (int e = 0; e < kAtOnce; e += Vectors ? 4 : 1) {
      const uint32_t at = place(begin, e);
      if constexpr (Vectors) {
        const float nothing = -INFINITY;
        const float4 four =
            at < end ? *reinterpret_cast<const float4*>(row + at) : make_float4(nothing, nothing, nothing, nothing);
        value[e] = four.x, value[e + 1] = four.y, value[e + 2] = four.z, value[e + 3] = four.w;
      } else {
        value[e] = at < end ? row[at] : -INFINITY;
      }
    }
  }
};

template <bool Vectors>
__global__ void __launch_bounds__(kSurveyThreads)
    survey_kernel(const float* all, uint32_t vocab, const SampleTask* tasks, Survey* surveys) {
  __shared__ Survey of_warps[kSurveyThreads / 32];
  allow_next();
  wait_for_last();  // also those with nothing to do: whoever waits for this kernel waits for those before it
  const uint32_t row = tasks[blockIdx.y].row;
  if (row == SampleTask::kNoRow) return;
  const float* logits = all + size_t{row} * vocab;
  const uint32_t part = (vocab + 4 * kParts - 1) / (4 * kParts) * 4;
  const uint32_t end = min(vocab, (blockIdx.x + 1) * part);
  Best best{-INFINITY, ~0u};
  float sum = 0;
  for (uint32_t begin = blockIdx.x * part; begin < end; begin += kAtOnce * kSurveyThreads) {
    const Elements<Vectors> x(logits, begin, end);
    const float before = best.value;
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e)
      if (x.value[e] > best.value) best = {x.value[e], x.place(begin, e)};
    const float base = best.value == -INFINITY ? 0 : best.value;
    sum *= exp_of(before - base);
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) sum += exp_of(x.value[e] - base);
  }
  // NaN, or infinity minus itself, is in the sum.
  const Survey of_warp = join_lanes<32>({best.value, best.token, sum, sum == sum});
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = of_warp;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  constexpr int kWarps = kSurveyThreads / 32;
  const Survey whole = join_lanes<kWarps>(of_warps[threadIdx.x % kWarps]);
  if (threadIdx.x == 0) surveys[blockIdx.y * kParts + blockIdx.x] = whole;
}

__global__ void __launch_bounds__(kThreads)
    sample_kernel(const SampleArgs args, const Surveys surveys, const SampleMemory memory) {
  allow_next();
  wait_for_last();
  const SampleTask task = args.tasks[blockIdx.x];
  if (task.row == SampleTask::kNoRow) return;
  const uint32_t vocab = args.vocab;
  float* logits = args.logits + size_t{task.row} * vocab;

  const Survey* parts = surveys.data + size_t{surveys.by_row ? task.row : blockIdx.x} * surveys.parts;
  Survey row{-INFINITY, ~0u, 0, 1};
  for (uint32_t part = threadIdx.x % 32; part < surveys.parts; part += 32) row = join(row, parts[part]);
  row = join_lanes<32>(row);
  const Best best{row.best, row.token};
  const bool finite = row.finite && isfinite(row.best);

  uint32_t token = task.scored;
  const bool picks = task.scored == SampleTask::kPick;
  if (finite && picks) {
    const bool adjusted = task.first_adjustment != task.end_adjustment;
    for (uint32_t i = task.first_adjustment + threadIdx.x; i < task.end_adjustment; i += kThreads) {
      const Adjustment change = args.adjustments[i];
      float x = memory.saved[i] = logits[change.token];
      x += change.bias;
      x = (x > 0 ? x / change.repetition : x * change.repetition) - change.subtract;
      logits[change.token] = change.forbidden ? -INFINITY : x;
    }
    __syncthreads();
    Best competing = best;
    if (adjusted) competing = block_best(vocab, [&](uint32_t i) { return logits[i]; });
    token = task.temperature == 0 ? competing.token : draw(task, logits, vocab, competing.value);
    __syncthreads();
    for (uint32_t i = task.first_adjustment + threadIdx.x; i < task.end_adjustment; i += kThreads)
      logits[args.adjustments[i].token] = memory.saved[i];
    __syncthreads();
  }
  if (finite && task.top > 0) report_top(logits, vocab, task.top, memory.tops + size_t{blockIdx.x} * args.max_top);
  if (threadIdx.x == 0) {
    // The row of a task that wants no more than its best may be nowhere else.
    const float logit = !finite ? 0 : token == row.token ? row.best : logits[token];
    memory.results[blockIdx.x] = {token, logit, row.best + logf(row.sum), finite, min(task.top, vocab)};
    if (picks) args.last_tokens[task.slot] = finite ? token : 0;
  }
}

}  // namespace

void survey(const SampleArgs& args, Survey* surveys, const Stream& stream) {
  launch_early(stream, dim3(kParts, args.count), kSurveyThreads, 0,
               args.vocab % 4 == 0 ? survey_kernel<true> : survey_kernel<false>, args.logits, args.vocab, args.tasks,
               surveys);
}

void sample(const SampleArgs& args, const Surveys& surveys, const SampleMemory& memory, const Stream& stream) {
  launch_early(stream, args.count, kThreads, 0, sample_kernel, args, surveys, memory);
}

}  // namespace gemma_cuda::cuda
