// The sampler against its definition: known random numbers, the distribution it draws from, each filter and penalty.
#include <algorithm>
#include <map>
#include <set>

#include "check.h"
#include "core/sample_plan.h"
#include "ops/philox.h"
#include "reference/sampler.h"

using namespace gemma_cuda;
using std::vector;

namespace {

const reference::Kernels& kernels() { return *reference::usable_kernels().back(); }

std::optional<ScoredToken> try_sample(const vector<float>& logits, const SamplingConfig& config,
                                      const vector<uint32_t>& tokens, uint32_t prompt) {
  SamplePlan plan;
  plan.pick(0, 0, config, tokens, prompt);
  return reference::sample(kernels(), logits, plan.tasks[0], plan.adjustments);
}
ScoredToken sample(const vector<float>& logits, const SamplingConfig& config, vector<uint32_t> tokens = {0},
                   uint32_t prompt = 1) {
  return try_sample(logits, config, tokens, prompt).value();
}

// The known answers of the Random123 distribution.
void philox_gives_the_known_answers() {
  CHECK((philox(0, {0, 0, 0, 0}) == Philox{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  CHECK((philox(~0ull, {~0u, ~0u, ~0u, ~0u}) == Philox{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  CHECK((philox(0x299f31d0a4093822, {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}) ==
         Philox{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

void greedy_takes_the_first_of_the_best() {
  CHECK(sample({1, 3, 2, 3}, {}).token == 1);
  SamplingConfig cold;
  cold.temperature = 1e-38f;  // as good as greedy, and nothing overflows
  CHECK(sample({1, 3, 2, -3}, cold).token == 1);
}

// How often each token comes in many draws, seed by seed.
vector<double> frequencies(const vector<float>& logits, SamplingConfig config, uint32_t draws) {
  vector<double> seen(logits.size());
  for (uint32_t i = 0; i < draws; ++i) {
    config.seed = (uint64_t{test::random()()} << 32) | i;
    seen[sample(logits, config).token] += 1.0 / draws;
  }
  return seen;
}

void draws_follow_the_softmax() {
  const vector<float> logits{0.3f, -1.0f, 2.0f, 0.0f, 1.2f, -4.0f};
  for (float temperature : {0.5f, 1.0f, 2.0f}) {
    SamplingConfig config;
    config.temperature = temperature;
    constexpr uint32_t kDraws = 40000;
    const vector<double> seen = frequencies(logits, config, kDraws);
    double mass = 0;
    for (float x : logits) mass += std::exp(x / temperature);
    for (size_t i = 0; i < logits.size(); ++i) {
      const double p = std::exp(logits[i] / temperature) / mass;
      // Six sigmas, and some draws more: where hardly any is expected, their number is far from normal.
      CHECK(std::abs(seen[i] - p) < 6 * std::sqrt(p * (1 - p) / kDraws) + 6.0 / kDraws);
    }
  }
}

void the_seed_and_the_step_decide() {
  const vector<float> logits = test::normal(5000);
  SamplingConfig config;
  config.temperature = 1;
  config.seed = 42;
  std::set<uint32_t> tokens;
  for (uint32_t step = 0; step < 50; ++step) {
    const vector<uint32_t> history(3 + step, 7);
    const uint32_t token = sample(logits, config, history, 3).token;
    CHECK(sample(logits, config, history, 3).token == token);
    tokens.insert(token);
  }
  CHECK(tokens.size() > 25);
}

// The tokens a filter leaves, found by drawing often from nearly flat logits.
std::set<uint32_t> support(const vector<float>& logits, SamplingConfig config) {
  std::set<uint32_t> out;
  const vector<double> seen = frequencies(logits, config, 4000);
  for (uint32_t i = 0; i < seen.size(); ++i)
    if (seen[i] > 0) out.insert(i);
  return out;
}

void filters_keep_what_they_should() {
  // Probabilities 0.4, 0.3, 0.2, 0.1 for tokens 2, 0, 3, 1.
  const vector<float> logits{std::log(0.3f), std::log(0.1f), std::log(0.4f), std::log(0.2f)};
  using Tokens = std::set<uint32_t>;
  SamplingConfig config;
  config.temperature = 1;
  CHECK((support(logits, config) == Tokens{0, 1, 2, 3}));
  config.top_k = 2;
  CHECK((support(logits, config) == Tokens{0, 2}));
  config.top_p = 0.5f;  // of the two left: 4/7 is enough
  CHECK((support(logits, config) == Tokens{2}));
  config.top_k = 0;
  CHECK((support(logits, config) == Tokens{0, 2}));
  config.top_p = 0.75f;
  CHECK((support(logits, config) == Tokens{0, 2, 3}));
  config.top_p = 1e-9f;  // never empty
  CHECK((support(logits, config) == Tokens{2}));
  config.top_p = 1;
  config.min_p = 0.45f;  // of the likeliest: 0.18
  CHECK((support(logits, config) == Tokens{0, 2, 3}));
}

void a_wide_nucleus_is_exact() {
  // 3000 equal tokens far below one: top_p must reach down to some of them, in order of their ids.
  vector<float> logits(3001, -20.0f);
  logits[1234] = 0;
  double mass = 1 + 3000 * std::exp(-20.0);
  SamplingConfig config;
  config.temperature = 1;
  config.top_p = static_cast<float>(1 / mass);
  CHECK((support(logits, config) == std::set<uint32_t>{1234}));
}

void penalties_and_bias_move_the_logits() {
  SamplingConfig config;
  config.repetition_penalty = 2;  // prompt and output; divides what is positive, multiplies what is negative
  CHECK(sample({4, 3, 1}, config, {0}, 1).token == 1);
  CHECK(sample({-1, -1.5f, -9}, config, {0}, 1).token == 1);
  config = {};
  config.presence_penalty = 2;  // output only
  CHECK(sample({4, 3, 1}, config, {0}, 1).token == 0);
  CHECK(sample({4, 3, 1}, config, {2, 0}, 1).token == 1);
  CHECK(sample({6, 3, 1}, config, {2, 0, 0}, 1).token == 0);  // once, however often it came
  config = {};
  config.frequency_penalty = 2;
  CHECK(sample({6, 3, 1}, config, {2, 0}, 1).token == 0);
  CHECK(sample({6, 3, 1}, config, {2, 0, 0}, 1).token == 1);
  config = {};
  config.logit_bias = {{2, 10}, {0, -1}};
  CHECK(sample({4, 3, 1}, config).token == 2);
  config = {};
  config.stop_tokens = {0};
  config.min_new_tokens = 2;
  CHECK(sample({4, 3, 1}, config, {2, 1}, 1).token == 1);
  CHECK(sample({4, 3, 1}, config, {2, 1, 1}, 1).token == 0);
}

void log_probabilities_are_the_models() {
  SamplingConfig config;
  config.logit_bias = {{2, 10}};
  config.temperature = 3;
  config.top_k = 1;
  config.top_logprobs = 2;
  const ScoredToken token = sample({4, 3, 1}, config);
  const double mass = std::log(std::exp(4.0) + std::exp(3.0) + std::exp(1.0));
  CHECK(token.token == 2 && std::abs(token.logprob - (1 - mass)) < 1e-6);
  CHECK(token.top.size() == 2 && token.top[0].token == 0 && token.top[1].token == 1);
  CHECK(std::abs(token.top[0].logprob - (4 - mass)) < 1e-6);
}

void damaged_logits_have_no_result() {
  for (float bad : {NAN, INFINITY}) CHECK(!try_sample({1, bad, 2}, {}, {0}, 1).has_value());
}

// Whatever the room, each task keeps its place and its own adjustments.
void a_plan_in_parts_is_the_same_plan() {
  SamplingConfig penalized, plain;
  penalized.repetition_penalty = 2;
  plain.top_logprobs = 3;
  SamplePlan plan;
  plan.pick(0, 5, penalized, vector<uint32_t>{1, 2, 3}, 1);
  plan.score(1, 9, 2);
  plan.pick(2, 6, plain, vector<uint32_t>{1, 2}, 1);
  plan.pick(3, 7, penalized, vector<uint32_t>{4, 4, 5}, 1);
  CHECK(plan.tasks.size() == 4 && plan.adjustments.size() == 5 && plan.max_top == 3);
  for (size_t room : {3, 4, 5, 100}) {
    const vector<SamplePlan> parts = plan.parts(room);
    CHECK(parts.size() == (room < 5 ? 2 : 1));
    size_t next = 0;
    for (const SamplePlan& part : parts) {
      CHECK(part.adjustments.size() <= room && part.max_top == 3);
      for (const SampleTask& task : part.tasks) {
        const SampleTask& whole = plan.tasks[next++];
        CHECK(task.row == whole.row && task.slot == whole.slot && task.scored == whole.scored);
        CHECK(task.end_adjustment - task.first_adjustment == whole.end_adjustment - whole.first_adjustment);
        for (uint32_t i = task.first_adjustment; i < task.end_adjustment; ++i)
          CHECK(part.adjustments[i].token ==
                plan.adjustments[whole.first_adjustment + i - task.first_adjustment].token);
      }
    }
    CHECK(next == plan.tasks.size());
  }
}

}  // namespace

int main() {
  philox_gives_the_known_answers();
  greedy_takes_the_first_of_the_best();
  draws_follow_the_softmax();
  the_seed_and_the_step_decide();
  filters_keep_what_they_should();
  a_wide_nucleus_is_exact();
  penalties_and_bias_move_the_logits();
  log_probabilities_are_the_models();
  damaged_logits_have_no_result();
  a_plan_in_parts_is_the_same_plan();
}
