// Sampling by the Gumbel-max trick: the token with the largest logit / temperature + g, where g is Gumbel noise drawn
// from (seed, step, token) alone. It is an exact draw from the softmax, needs no sums whose rounding could tip it, and
// filters (top-k, top-p, min-p) only take candidates away. So the same seed gives the same token on any backend
// whose logits agree.
#include "reference/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/philox.h"

namespace gemma_cuda::reference {
namespace {

struct Candidate {
  float score;  // logit after bias, penalties and temperature
  uint32_t token;
};

// Likelier first; equal ones by token, so that an order exists at all.
bool before(const Candidate& a, const Candidate& b) {
  return a.score != b.score ? a.score > b.score : a.token < b.token;
}

// The n first of all tokens, in order.
std::vector<Candidate> largest(std::span<const float> scores, uint32_t n) {
  std::vector<Candidate> heap;  // its front is the last of those kept
  heap.reserve(n + 1);
  for (uint32_t token = 0; token < scores.size(); ++token) {
    const Candidate candidate{scores[token], token};
    if (heap.size() == n && (n == 0 || !before(candidate, heap.front()))) continue;
    heap.push_back(candidate);
    std::push_heap(heap.begin(), heap.end(), before);
    if (heap.size() > n) {
      std::pop_heap(heap.begin(), heap.end(), before);
      heap.pop_back();
    }
  }
  std::sort_heap(heap.begin(), heap.end(), before);
  return heap;
}

void adjust(std::vector<float>& logits, std::span<const Adjustment> adjustments) {
  for (const Adjustment& change : adjustments) {
    float& logit = logits[change.token];
    logit += change.bias;
    logit = (logit > 0 ? logit / change.repetition : logit * change.repetition) - change.subtract;
    if (change.forbidden) logit = -std::numeric_limits<float>::infinity();
  }
}

// Keeps the shortest run of likeliest candidates whose probability reaches top_p. `mass` is the sum of
// exp(score - best) over all that compete.
void keep_top_p(std::vector<Candidate>& sorted, float top_p, float best, double mass) {
  double cumulative = 0;
  size_t kept = 0;
  while (kept < sorted.size() && cumulative < top_p * mass) cumulative += std::exp(double{sorted[kept++].score} - best);
  sorted.resize(std::max<size_t>(kept, 1));
}

// All tokens whose score is within `reach` of the best, likeliest first.
std::vector<Candidate> within(std::span<const float> scores, float best, float reach) {
  std::vector<Candidate> found;
  for (uint32_t token = 0; token < scores.size(); ++token)
    if (scores[token] >= best - reach) found.push_back({scores[token], token});
  std::sort(found.begin(), found.end(), before);
  return found;
}

// The candidates that top-p can keep, without sorting the whole vocabulary: a wider and wider reach below the best.
std::vector<Candidate> nucleus(const Kernels& kernels, std::span<const float> scores, float best, float top_p) {
  const double mass = kernels.sum_exp(scores.data(), scores.size(), best);
  for (float reach = 8;; reach *= 2) {
    std::vector<Candidate> found = within(scores, best, reach);
    double sum = 0;
    for (const Candidate& candidate : found) sum += std::exp(double{candidate.score} - best);
    if (sum >= top_p * mass || reach > 1e4f) {
      keep_top_p(found, top_p, best, mass);
      return found;
    }
  }
}

// The tokens left by the filters.
std::vector<Candidate> candidates(const Kernels& kernels, std::span<const float> scores, float best,
                                  const SampleTask& task) {
  std::vector<Candidate> left;
  if (task.top_k != 0 && task.top_k < scores.size()) {
    left = largest(scores, task.top_k);
    if (task.top_p < 1) {
      double mass = 0;
      for (const Candidate& candidate : left) mass += std::exp(double{candidate.score} - best);
      keep_top_p(left, task.top_p, best, mass);
    }
  } else if (task.top_p < 1) {
    left = nucleus(kernels, scores, best, task.top_p);
  } else {
    // Everything; but noise spans less than 32 (see gumbel), so what lies further below the best cannot win.
    for (uint32_t token = 0; token < scores.size(); ++token)
      if (scores[token] > best - 32) left.push_back({scores[token], token});
  }
  if (task.min_p > 0) {
    const float floor = best + std::log(task.min_p);
    std::erase_if(left, [floor](const Candidate& candidate) { return candidate.score < floor; });
  }
  return left;
}

// -log(-log(u)) for a uniform u = 1 - v; v keeps float's fine steps near 0, where the large values come from.
// Between -3.2 and 23.
float gumbel(uint64_t seed, uint32_t step, uint32_t token) {
  const Philox bits = philox(seed, {token / 4, step, 0, 0});
  const float v = std::min((static_cast<float>(bits[token % 4]) + 0.5f) * 0x1p-32f, 1 - 0x1p-24f);
  return -std::log(-std::log1p(-v));
}

// The log-probability of `token`, and the likeliest ones, of a row of raw logits.
ScoredToken describe(const Kernels& kernels, std::span<const float> logits, float best, uint32_t token, uint32_t top) {
  const double log_mass = best + std::log(kernels.sum_exp(logits.data(), logits.size(), best));
  ScoredToken out{token, static_cast<float>(logits[token] - log_mass), {}};
  for (const Candidate& candidate : top == 0 ? std::vector<Candidate>{} : largest(logits, top))
    out.top.push_back({candidate.token, static_cast<float>(candidate.score - log_mass)});
  return out;
}

uint32_t pick(const Kernels& kernels, std::span<const float> logits, const SampleTask& task,
              std::span<const Adjustment> adjustments) {
  std::vector<float> scores(logits.begin(), logits.end());
  adjust(scores, adjustments);
  if (task.temperature == 0)
    return static_cast<uint32_t>(std::max_element(scores.begin(), scores.end()) - scores.begin());
  const float top = kernels.max(scores.data(), scores.size());
  for (float& score : scores) score = (score - top) / task.temperature;  // the best is 0 at any temperature
  Candidate winner{-std::numeric_limits<float>::infinity(), 0};
  for (const Candidate& candidate : candidates(kernels, scores, 0, task)) {
    const Candidate noisy{candidate.score + gumbel(task.seed, task.step, candidate.token), candidate.token};
    if (before(noisy, winner)) winner = noisy;
  }
  return winner.token;
}

}  // namespace

std::optional<ScoredToken> sample(const Kernels& kernels, std::span<const float> logits, const SampleTask& task,
                                  std::span<const Adjustment> adjustments) {
  const float best = kernels.max(logits.data(), logits.size());
  if (!std::isfinite(best)) return std::nullopt;
  const uint32_t token = task.scored == SampleTask::kPick ? pick(kernels, logits, task, adjustments) : task.scored;
  return describe(kernels, logits, best, token, task.top);
}

}  // namespace gemma_cuda::reference
