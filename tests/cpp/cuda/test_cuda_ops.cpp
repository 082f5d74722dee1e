// The operations of the CUDA backend, but for products (test_cuda_gemm.cpp), against the reference backend in bf16, at
// the shapes of real models, on ragged batches with single tokens, page boundaries, windows that are crossed and
// thousands of cached tokens. Outputs are poisoned before, inputs are new each run.
#include <cstring>
#include <thread>

#include "core/plan.h"
#include "core/sample_plan.h"
#include "suite.h"

namespace {

class Operations : public Suite {
 public:
  using Suite::Suite;

  // Bytes and converted numbers of sizes around and far beyond a piece of pinned memory arrive as they should.
  void upload() {
    const size_t piece = size_t{2} << 20;
    for (size_t bytes : {size_t{1}, size_t{3}, piece / 4 + 1, piece - 1, piece, piece + 1, 40 * piece + 7}) {
      vector<uint8_t> from(bytes);
      for (size_t i = 0; i < bytes; ++i) from[i] = static_cast<uint8_t>(i * 40503 >> 7 ^ i);
      const Both<uint8_t> data = both(std::move(from));
      CHECK(download(data) == data.host);
    }
    for (size_t count : {size_t{1}, piece / 4 + 1, 5 * piece + 3}) {
      vector<float> wide(count);
      vector<bf16> narrow(count);
      for (size_t i = 0; i < count; ++i) {
        wide[i] = static_cast<float>(i * 40503 % 1000003) * 0.37f - 1e5f;
        narrow[i] = to_bf16(wide[i]);
      }
      Both<bf16> to_narrow = both(vector<bf16>(count));
      gpu_->upload_as(to_narrow.gpu(), DType::bf16, wide.data(), DType::f32, count);
      CHECK(std::memcmp(download(to_narrow).data(), narrow.data(), count * sizeof(bf16)) == 0);
      Both<float> to_wide = both(vector<float>(count));
      gpu_->upload_as(to_wide.gpu(), DType::f32, narrow.data(), DType::bf16, count);
      const vector<float> widened = download(to_wide);
      for (size_t i = 0; i < count; ++i) CHECK(widened[i] == to_float(narrow[i]));
    }
    std::printf("upload\n");
  }

  void embed(const Model& m) {
    auto table = random(size_t{64} * m.hidden);
    auto ids = both(vector<uint32_t>{0, 63, 5, kPendingToken + 1, 17}), last = both(vector<uint32_t>{3, 33});
    auto out = both(vector<float>(5 * size_t{m.hidden}, NAN));
    EmbedArgs args{.ids = ids.host.data(),
                   .last_tokens = last.host.data(),
                   .tokens = 5,
                   .table = {table.host.data(), DType::bf16, 64, m.hidden},
                   .scale = 55.5f,
                   .residual = out.host.data()};
    reference_->embed(args);
    args.ids = ids.gpu(), args.last_tokens = last.gpu(), args.table.data = table.gpu(), args.residual = out.gpu();
    gpu_->embed(args);
    CHECK(download(out) == out.host);
  }

  void gather_rows(const Model& m) {
    auto from = random(size_t{64} * m.hidden), to = poisoned(size_t{6} * m.hidden);
    auto rows = both(vector<uint32_t>{63, 5, 5, 0, 17});
    GatherArgs args{.from = from.host.data(),
                    .rows = rows.host.data(),
                    .count = 5,
                    .row_bytes = m.hidden * sizeof(bf16),
                    .to = to.host.data()};
    reference_->gather_rows(args);
    args.from = from.gpu(), args.rows = rows.gpu(), args.to = to.gpu();
    gpu_->gather_rows(args);
    CHECK(std::memcmp(download(to).data(), to.host.data(), to.host.size() * sizeof(bf16)) == 0);
  }

  void norm(const Model& m) {
    const uint32_t t = 7;
    auto residual = both(test::normal(size_t{t} * m.hidden, 3));
    auto delta = random(size_t{t} * m.hidden);
    auto weight = both(test::normal(m.hidden, 0.3f)), post = both(test::normal(m.hidden, 0.3f));
    auto out = poisoned(size_t{t} * m.hidden);
    const bool posts = m.post_norms;
    NormArgs args{.residual = residual.host.data(),
                  .delta = delta.host.data(),
                  .delta_weight = posts ? post.host.data() : nullptr,
                  .weight = weight.host.data(),
                  .out = out.host.data(),
                  .tokens = t,
                  .hidden = m.hidden,
                  .eps = 1e-6f};
    reference_->norm(args);
    gpu_->upload(out.gpu(), delta.host.data(), delta.host.size() * sizeof(bf16));  // in place, as in a pass
    args.residual = residual.gpu(), args.delta = out.gpu(), args.delta_weight = posts ? post.gpu() : nullptr;
    args.weight = weight.gpu(), args.out = out.gpu();
    gpu_->norm(args);
    near("norm: residual", residual, 2e-6);
    near("norm", out, kLimit);
    auto rows = both(vector<uint32_t>{t - 1, 2});
    auto picked = poisoned(2 * size_t{m.hidden});
    args = {.residual = residual.host.data(),
            .rows = rows.host.data(),
            .weight = weight.host.data(),
            .out = picked.host.data(),
            .tokens = 2,
            .hidden = m.hidden,
            .eps = 1e-6f};
    reference_->norm(args);
    args.residual = residual.gpu(), args.rows = rows.gpu(), args.weight = weight.gpu(), args.out = picked.gpu();
    gpu_->norm(args);
    near("norm of some rows", picked, kLimit);
  }

  void geglu(const Model& m) {
    auto x = random(size_t{5} * 2 * m.ffn, 3);
    auto out = poisoned(size_t{5} * m.ffn);
    reference_->geglu({x.host.data(), out.host.data(), 5, m.ffn});
    gpu_->geglu({x.gpu(), out.gpu(), 5, m.ffn});
    near("geglu", out, kLimit);
  }

  // Every bf16 there is, with one scale for all and with one a row: bit for bit what the reference makes of it.
  void quantize() {
    const uint32_t rows = 256, width = 256;
    vector<bf16> all(rows * width);
    for (uint32_t i = 0; i < all.size(); ++i) all[i].bits = static_cast<uint16_t>(i);
    auto x = both(all);
    auto widened = both(wide(all));
    auto one = both(vector<float>{0.37f}), each = both(vector<float>(rows, -1));
    for (const bool dynamic : {false, true})
      for (const bool f32 : {false, true}) {
        auto out = poisoned_fp8(all.size());
        QuantizeArgs args{
            .x = f32 ? static_cast<const void*>(widened.host.data()) : x.host.data(),
            .dtype = f32 ? DType::f32 : DType::bf16,
            .how = {.scale = dynamic ? nullptr : one.host.data(), .row_scales = dynamic ? each.host.data() : nullptr},
            .out = out.host.data(),
            .rows = rows,
            .width = width};
        reference_->quantize(args);
        args.x = f32 ? static_cast<const void*>(widened.gpu()) : x.gpu(), args.out = out.gpu();
        args.how = {.scale = dynamic ? nullptr : one.gpu(), .row_scales = dynamic ? each.gpu() : nullptr};
        gpu_->quantize(args);
        const vector<e4m3> got = download(out);
        for (size_t i = 0; i < got.size(); ++i)
          if (got[i].bits != out.host[i].bits) {
            std::fprintf(stderr, "%04x: %02x, not %02x (dynamic %d, f32 %d)\n", all[i].bits, got[i].bits,
                         out.host[i].bits, dynamic, f32);
            CHECK(false);
          }
        if (!dynamic) continue;
        const vector<float> got_scales = download(each);
        CHECK(std::memcmp(got_scales.data(), each.host.data(), rows * sizeof(float)) == 0);
      }
    std::printf("quantize: all of bf16\n");
  }

  void quantized_ops(const Model& m) {
    const uint32_t t = 7;
    for (const bool dynamic : {false, true}) {
      auto one = both(vector<float>{0.02f}), each = both(vector<float>(t, -1));
      const Quantize host{.scale = dynamic ? nullptr : one.host.data(),
                          .row_scales = dynamic ? each.host.data() : nullptr};
      const Quantize device{.scale = dynamic ? nullptr : one.gpu(), .row_scales = dynamic ? each.gpu() : nullptr};
      auto residual = both(test::normal(size_t{t} * m.hidden, 3));
      auto delta = random(size_t{t} * m.hidden);
      auto weight = both(test::normal(m.hidden, 0.3f));
      auto out = poisoned_fp8(size_t{t} * m.hidden);
      NormArgs args{.residual = residual.host.data(),
                    .delta = delta.host.data(),
                    .weight = weight.host.data(),
                    .out = out.host.data(),
                    .tokens = t,
                    .hidden = m.hidden,
                    .eps = 1e-6f,
                    .quantize = host};
      reference_->norm(args);
      args.residual = residual.gpu(), args.delta = delta.gpu(), args.weight = weight.gpu(), args.out = out.gpu();
      args.quantize = device;
      gpu_->norm(args);
      near_fp8("norm to FP8: differ", out);
      if (dynamic) near("norm to FP8: scales", each, 1e-5);

      auto x = random(size_t{t} * 2 * m.ffn, 3);
      auto activated = poisoned_fp8(size_t{t} * m.ffn);
      reference_->geglu({x.host.data(), activated.host.data(), t, m.ffn, host});
      gpu_->geglu({x.gpu(), activated.gpu(), t, m.ffn, device});
      near_fp8("geglu to FP8: differ", activated);
      if (dynamic) near("geglu to FP8: scales", each, 1e-5);
    }
  }

  void soft_cap() {
    auto x = both(test::normal(3 * 1001, 60));
    reference_->soft_cap({x.host.data(), 3, 1001, 30});
    gpu_->soft_cap({x.gpu(), 3, 1001, 30});
    near("soft cap", x, 1e-6);
  }

  // Sequences of some cached and some new tokens on shuffled pages.
  struct Batch {
    uint32_t page_size, max_pages = 0, pages = 0;
    vector<uint32_t> lengths, news, cu{0}, table, positions, slots;
    Batch(uint32_t size, vector<std::pair<uint32_t, uint32_t>> cached_and_new) : page_size(size) {
      for (auto [cached, fresh] : cached_and_new) {
        lengths.push_back(cached + fresh);
        news.push_back(fresh);
        max_pages = std::max(max_pages, (cached + fresh + size - 1) / size);
      }
      pages = static_cast<uint32_t>(lengths.size()) * max_pages;
      table.resize(pages);
      for (uint32_t i = 0; i < pages; ++i) table[i] = i;
      std::ranges::shuffle(table, test::random());
      for (size_t s = 0; s < lengths.size(); ++s) {
        cu.push_back(cu.back() + news[s]);
        for (uint32_t p = lengths[s] - news[s]; p < lengths[s]; ++p) {
          positions.push_back(p);
          slots.push_back(table[s * max_pages + p / size] * size + p % size);
        }
      }
    }
    uint32_t tokens() const { return cu.back(); }
  };

  void attention(const char* what, const Model& m, const Batch& batch, uint32_t window) {
    attention<bf16>(what, m, batch, window, false);
    if (!fp8_) return;
    attention<e4m3>(what, m, batch, window, false);
    if (batch.page_size == 32) attention<e4m3>(what, m, batch, window, true);
  }
  // Of a cache of bf16 or FP8, to bf16 or FP8.
  template <class C>
  void attention(const char* what, const Model& m, const Batch& batch, uint32_t window, bool to_fp8) {
    constexpr bool kFp8 = std::is_same_v<C, e4m3>;
    const size_t cache = size_t{batch.pages} * m.kv_heads * batch.page_size * m.head_dim;
    const size_t rows = size_t{batch.tokens()} * m.heads * m.head_dim;
    auto q = random(rows);
    auto keys = elements<C>(cache), values = elements<C>(cache);
    auto key_scales = scales(m.kv_heads), value_scales = scales(m.kv_heads);
    auto out = poisoned(to_fp8 ? 0 : rows);
    auto narrow = poisoned_fp8(to_fp8 ? rows : 0);
    auto out_scale = both(vector<float>{0.001f});
    auto cu = both(batch.cu), kv_len = both(batch.lengths), table = both(batch.table);
    auto tiles = both(query_tiles(batch.cu, batch.lengths));
    const float deviation = kFp8 ? 0.8f : 0.3f;  // of the keys, about
    AttentionArgs args{
        .q = q.host.data(),
        .cache = {keys.host.data(), values.host.data(), kFp8 ? DType::e4m3 : DType::bf16, batch.page_size, m.kv_heads,
                  m.head_dim, kFp8 ? key_scales.host.data() : nullptr, kFp8 ? value_scales.host.data() : nullptr},
        .cu_seqlens = cu.host.data(),
        .kv_len = kv_len.host.data(),
        .block_table = table.host.data(),
        .sequences = static_cast<uint32_t>(batch.lengths.size()),
        .max_pages = batch.max_pages,
        .query_tiles = tiles.gpu(),
        .tiles = static_cast<uint32_t>(tiles.host.size()),
        .heads = m.heads,
        .window = window,
        .scale = 1.5f / std::sqrt(static_cast<float>(m.head_dim)) / deviation,
        .soft_cap = m.soft_cap,
        .out = to_fp8 ? static_cast<void*>(narrow.host.data()) : out.host.data(),
        .tokens = batch.tokens(),
        .quantize = {.scale = to_fp8 ? out_scale.host.data() : nullptr, .row_scales = nullptr}};
    reference_->attention(args);
    args.q = q.gpu(), args.cache.keys = keys.gpu(), args.cache.values = values.gpu();
    args.out = to_fp8 ? static_cast<void*>(narrow.gpu()) : out.gpu();
    args.cu_seqlens = cu.gpu(), args.kv_len = kv_len.gpu(), args.block_table = table.gpu();
    if (kFp8) args.cache.key_scales = key_scales.gpu(), args.cache.value_scales = value_scales.gpu();
    if (to_fp8) args.quantize.scale = out_scale.gpu();
    gpu_->attention(args);
    char name[80];
    std::snprintf(name, sizeof name, "%s%s%s", what, kFp8 ? ", FP8" : "", to_fp8 ? " to FP8" : "");
    if (to_fp8) return near(name, narrow, 0x1p-5);  // half a step of three bits of mantissa, twice
    near(name, out, 2 * kLimit);
    const vector<bf16> first = download(out), nothing(rows, to_bf16(NAN));
    const auto same = [&](const auto& run) {
      gpu_->upload(out.gpu(), nothing.data(), rows * sizeof(bf16));
      run();
      const vector<bf16> again = download(out);
      CHECK(std::memcmp(again.data(), first.data(), again.size() * sizeof(bf16)) == 0);
    };
    // The second of a pass has the plan of the first.
    for (const uint64_t pass : {uint64_t{0}, passes_ + 1, passes_ + 1, passes_ + 2}) {
      args.pass = pass;
      same([&] { gpu_->attention(args); });
    }
    args.pass = passes_ += 3;
    const auto graph = gpu_->capture([&] {
      for (int i = 0; i < 2; ++i) gpu_->attention(args);
    });
    same([&] { graph->launch(); });
  }

  void rope(const Model& m, const Batch& batch) {
    rope<bf16>(m, batch);
    if (fp8_) rope<e4m3>(m, batch);
  }
  template <class C>
  void rope(const Model& m, const Batch& batch) {
    constexpr bool kFp8 = std::is_same_v<C, e4m3>;
    const uint32_t t = batch.tokens(), d = m.head_dim;
    auto qkv = random(size_t{t} * (m.heads + 2 * m.kv_heads) * d);
    auto q_norm = both(test::normal(d, 0.3f)), k_norm = both(test::normal(d, 0.3f));
    vector<float> inverse;
    for (uint32_t i = 0; i < d / 2; ++i) inverse.push_back(std::pow(10000.0f, -2.0f * float(i) / float(d)));
    auto frequency = both(inverse);
    const size_t cache = size_t{batch.pages} * m.kv_heads * batch.page_size * d;
    auto keys = both(vector<C>(cache, C{})), values = both(vector<C>(cache, C{}));
    auto key_scales = scales(m.kv_heads), value_scales = scales(m.kv_heads);
    auto q = poisoned(size_t{t} * m.heads * d);
    auto positions = both(batch.positions), slots = both(batch.slots);
    RopeArgs args{
        .qkv = qkv.host.data(),
        .positions = positions.host.data(),
        .slots = slots.host.data(),
        .inverse_frequency = frequency.host.data(),
        .q_norm = m.qk_norm ? q_norm.host.data() : nullptr,
        .k_norm = m.qk_norm ? k_norm.host.data() : nullptr,
        .eps = 1e-6f,
        .heads = m.heads,
        .q = q.host.data(),
        .cache = {keys.host.data(), values.host.data(), kFp8 ? DType::e4m3 : DType::bf16, batch.page_size, m.kv_heads,
                  d, kFp8 ? key_scales.host.data() : nullptr, kFp8 ? value_scales.host.data() : nullptr},
        .tokens = t};
    reference_->rope(args);
    args.qkv = qkv.gpu(), args.positions = positions.gpu(), args.slots = slots.gpu();
    args.inverse_frequency = frequency.gpu(), args.q_norm = m.qk_norm ? q_norm.gpu() : nullptr;
    args.k_norm = m.qk_norm ? k_norm.gpu() : nullptr, args.q = q.gpu();
    args.cache.keys = keys.gpu(), args.cache.values = values.gpu();
    if (kFp8) args.cache.key_scales = key_scales.gpu(), args.cache.value_scales = value_scales.gpu();
    gpu_->rope(args);
    near("rope: q", q, kLimit);
    if constexpr (kFp8) {
      near_fp8("rope: keys in FP8 differ", keys);
      near_fp8("rope: values in FP8 differ", values);
    } else {
      near("rope: keys", keys, kLimit);
      near("rope: values", values, 1e-9);
    }
  }

  // Counts and maxima are the reference's, exactly; also of what is not finite.
  void observe(const Model& m) {
    const uint32_t rows = 37, groups = m.kv_heads, width = m.kv_heads * m.head_dim;
    auto x = random(size_t{rows} * width, 5);
    x.host[3] = to_bf16(INFINITY), x.host[width] = to_bf16(NAN), x.host[5] = to_bf16(0);
    x = both(std::move(x.host));
    const auto compare = [&](auto run) {
      auto largest = both(vector<float>(groups, 0.25f));
      auto counts = both(vector<uint64_t>(size_t{groups} * kMagnitudeBins, 2));
      run(*reference_, false, Magnitudes{largest.host.data(), counts.host.data()});
      run(*gpu_, true, Magnitudes{largest.gpu(), counts.gpu()});
      CHECK(download(largest) == largest.host);
      CHECK(download(counts) == counts.host);
    };
    compare([&](Backend& backend, bool gpu, Magnitudes to) {
      backend.observe({gpu ? x.gpu() : x.host.data(), rows, width, groups, to});
    });
    const uint32_t page_size = 5, pages = 9;
    auto cache = random(size_t{pages} * page_size * width, 2);
    auto slots = both(vector<uint32_t>{44, 0, kNoSlot, 7, 13, kNoSlot, 21});
    auto none = both(vector<float>(groups, 0)), others = both(vector<float>(groups, 0));
    for (const bool values : {false, true})
      compare([&](Backend& backend, bool gpu, Magnitudes to) {
        vector<uint64_t> host_counts(size_t{groups} * kMagnitudeBins);
        auto rest = both(std::move(host_counts));
        const Magnitudes other{gpu ? none.gpu() : none.host.data(), gpu ? rest.gpu() : rest.host.data()};
        void* data = gpu ? static_cast<void*>(cache.gpu()) : cache.host.data();
        backend.observe_cache({.cache = {data, data, DType::bf16, page_size, m.kv_heads, m.head_dim},
                               .slots = gpu ? slots.gpu() : slots.host.data(),
                               .tokens = 7,
                               .keys = values ? other : to,
                               .values = values ? to : other});
        if (gpu) download(slots);  // before `rest` goes
      });
    std::printf("  observe: equal\n");
  }

  // Tokens equal the reference's, for every kind of request; log-probabilities nearly.
  void sample(uint32_t vocab) {
    const uint32_t rows = 24;
    auto logits = both(test::normal(size_t{rows} * vocab, 3));
    for (uint32_t r = 0; r < rows; r += 5) logits.host[size_t{r} * vocab + 7] = 40;  // one that dominates
    logits.host[size_t{11} * vocab + vocab / 2] = INFINITY;                          // this row alone has no result
    logits = both(std::move(logits.host));
    vector<vector<uint32_t>> tokens;
    vector<SamplingConfig> configs(rows);
    for (uint32_t r = 0; r < rows; ++r) {
      SamplingConfig& c = configs[r];
      c.temperature = r % 3 == 0 ? 0.0f : 0.5f + 0.1f * float(r % 7);
      c.top_k = r % 4 == 1 ? 1 + test::below(60) : r % 4 == 3 ? vocab - 1 : 0;
      c.top_p = r % 5 == 2 ? 0.9f : r % 5 == 4 ? 0.3f : 1.0f;
      c.min_p = r % 6 == 5 ? 0.05f : 0.0f;
      c.seed = test::below(1u << 30) * uint64_t{1000003};
      c.top_logprobs = r % 4 * 3;
      if (r % 2) c.repetition_penalty = 1.3f, c.presence_penalty = 0.5f, c.frequency_penalty = 0.25f;
      if (r % 7 == 3) c.logit_bias = {{3, 5.0f}, {7, -100.0f}}, c.stop_tokens = {1, 7}, c.min_new_tokens = 500;
      vector<uint32_t>& seen = tokens.emplace_back();
      // Long enough that the penalties of all rows together touch more tokens than the smaller vocabulary has.
      for (uint32_t i = 0; i < 200; ++i) seen.push_back(test::below(i % 2 ? 10 : vocab));
    }
    SamplePlan picked, again, looked_up;
    for (uint32_t r = 0; r < rows; ++r) picked.pick(r, rows - 1 - r, configs[r], tokens[r], 10);
    again.pick(0, 0, configs[0], tokens[0], 10);
    for (uint32_t r = 0; r < rows; ++r) looked_up.score(rows - 1 - r, test::below(vocab), r % 3);
    auto last = both(vector<uint32_t>(rows, ~0u)), other = both(vector<uint32_t>(rows, ~0u));
    gpu_->reserve({.head_dim = 256, .group = 16, .logit_rows = rows + 1, .vocab = vocab});
    run(picked, logits, last, vocab);
    run(again, logits, other, vocab);  // before the first is finished
    run(looked_up, logits, other, vocab);
    const auto want = reference_->finish_results();
    compare(gpu_->finish_results(), want);
    for (int i = 0; i < 2; ++i) {
      const auto more = reference_->finish_results();
      compare(gpu_->finish_results(), more);
    }
    CHECK(download(last) == last.host && download(other) == other.host);
    CHECK(download(logits) == logits.host);  // restored
    std::printf("  sample, vocabulary %u: %u rows equal\n", vocab, rows);
  }
  // On both devices, and a task of nothing at the end of each part.
  void run(const SamplePlan& plan, Both<float>& logits, Both<uint32_t>& last, uint32_t vocab) {
    uint32_t first = 0;
    for (SamplePlan& part : plan.parts(vocab)) {
      part.tasks.push_back(SampleTask::nothing());
      auto tasks = both(part.tasks);
      auto adjustments = both(part.adjustments);
      SampleArgs args{.logits = logits.host.data(),
                      .vocab = vocab,
                      .tasks = tasks.host.data(),
                      .adjustments = adjustments.host.data(),
                      .first = first,
                      .count = static_cast<uint32_t>(part.tasks.size()),
                      .max_top = plan.max_top,
                      .last_tokens = last.host.data()};
      reference_->sample(args);
      args.logits = logits.gpu(), args.tasks = tasks.gpu(), args.adjustments = adjustments.gpu();
      args.last_tokens = last.gpu();
      gpu_->sample(args);
      first += args.count - 1;
    }
    for (Backend* backend : {reference_.get(), gpu_.get()}) backend->start_results(first, plan.max_top);
  }
  using Results = vector<std::optional<ScoredToken>>;
  static void compare(const Results& got, const Results& want) {
    CHECK(got.size() == want.size());
    for (size_t i = 0; i < want.size(); ++i) {
      CHECK(got[i].has_value() == want[i].has_value());
      if (want[i].has_value()) compare(i, *got[i], *want[i]);
    }
  }
  static void compare(size_t row, const ScoredToken& got, const ScoredToken& want) {
    if (got.token != want.token) std::fprintf(stderr, "row %zu: %u, not %u\n", row, got.token, want.token);
    CHECK(got.token == want.token);
    CHECK(std::abs(got.logprob - want.logprob) < 2e-5f * std::max(1.0f, std::abs(want.logprob)));
    CHECK(got.top.size() == want.top.size());
    for (size_t j = 0; j < want.top.size(); ++j) CHECK(got.top[j].token == want.top[j].token);
  }

  void model(const Model& m) {
    embed(m);
    gather_rows(m);
    norm(m);
    geglu(m);
    observe(m);
    if (fp8_ && m.ffn % 16 == 0) quantized_ops(m);
    const uint32_t w = m.window;
    for (uint32_t page_size : {1u, 5u, 32u}) {
      const Batch ragged(page_size, {{0, 1}, {17, 1}, {31, 2}, {0, 70}, {100, 33}, {3, 1}, {1, 64}, {63, 65}});
      rope(m, ragged);
      attention("attention, ragged", m, ragged, 0);
      attention("attention, ragged, window", m, ragged, w == 0 ? 20 : std::min(w, 40u));
    }
    rope(m, Batch(32, {{5, 1}, {40, 1}, {63, 1}}));
    const Batch decode(32, {{0, 1}, {2999, 1}, {31, 1}, {32, 1}, {33, 1}, {511, 1}, {512, 1}, {700, 1}, {4200, 1}});
    attention("attention, decode", m, decode, 0);
    attention("attention, decode, window", m, decode, w == 0 ? 100 : w);
    const Batch one(32, {{2500, 1}});
    attention("attention, one row", m, one, w);
    const Batch prefill(32, {{0, 700}, {1500, 130}, {900, 1}});
    attention("attention, prefill", m, prefill, 0);
    attention("attention, prefill, window", m, prefill, w == 0 ? 100 : w);
  }

  void many_sequences() {
    vector<std::pair<uint32_t, uint32_t>> sequences;
    for (int i = 0; i < 300; ++i) sequences.push_back({test::below(200), 1});
    attention("attention, 300 rows", kModels[3], Batch(32, sequences), 0);
    attention("attention, 300 rows", kModels[2], Batch(32, sequences), 50);
    // Of much the same length, so that a warp has whole rows: one, or some; among them some that are not of one token.
    for (const auto& [count, spread] : {std::pair{64u, 50u}, std::pair{130u, 20u}}) {
      vector<std::pair<uint32_t, uint32_t>> alike;
      for (uint32_t i = 0; i < count; ++i) alike.push_back({250 + test::below(spread), i % 19 == 7 ? 2 : 1});
      attention("attention, rows alike", kModels[0], Batch(32, alike), 0);
      attention("attention, rows alike", kModels[2], Batch(16, alike), 200);
    }
    // Prompts whose attention runs beside that of sequences with one new token.
    vector<std::pair<uint32_t, uint32_t>> both{{0, 100}, {70, 60}};
    for (int i = 0; i < 40; ++i) both.push_back({test::below(600), 1});
    attention("attention, prompts beside", kModels[0], Batch(32, both), 0);
    attention("attention, prompts beside", kModels[2], Batch(16, both), 50);
    // More tiles than multiprocessors, dealt out in sections of heads.
    vector<std::pair<uint32_t, uint32_t>> prompts;
    for (int i = 0; i < 16; ++i) prompts.push_back({test::below(100), 257 + test::below(128)});
    attention("attention, 16 prompts", kModels[0], Batch(32, prompts), 0);
    attention("attention, 16 prompts", kModels[2], Batch(16, prompts), 50);
  }

  // Engines in threads launch the same kernels with different needs of shared memory at the same time.
  static void in_threads() {
    const Batch few(32, {{40, 1}}), many(32, vector<std::pair<uint32_t, uint32_t>>(300, {40, 1}));
    std::thread other([&] { Operations(test::gpu()).attend_often(few); });
    Operations(test::gpu()).attend_often(many);
    other.join();
    std::printf("attention in two threads\n");
  }

 private:
  void attend_often(const Batch& batch) {
    const Model& m = kModels[3];
    const size_t cache = size_t{batch.pages} * m.kv_heads * batch.page_size * m.head_dim;
    const size_t rows = size_t{batch.tokens()} * m.heads * m.head_dim;
    const auto q = both(vector<bf16>(rows)), keys = both(vector<bf16>(cache)), values = both(vector<bf16>(cache));
    const auto out = both(vector<bf16>(rows, to_bf16(1)));
    const auto cu = both(batch.cu), kv_len = both(batch.lengths), table = both(batch.table);
    const AttentionArgs args{.q = q.gpu(),
                             .cache = {keys.gpu(), values.gpu(), DType::bf16, batch.page_size, m.kv_heads, m.head_dim},
                             .cu_seqlens = cu.gpu(),
                             .kv_len = kv_len.gpu(),
                             .block_table = table.gpu(),
                             .sequences = static_cast<uint32_t>(batch.lengths.size()),
                             .max_pages = batch.max_pages,
                             .heads = m.heads,
                             .window = 0,
                             .scale = 1,
                             .soft_cap = 0,
                             .out = out.gpu(),
                             .tokens = batch.tokens()};
    for (int i = 0; i < 3000; ++i) gpu_->attention(args);
    for (const bf16 x : download(out)) CHECK(to_float(x) == 0);
  }

  uint64_t passes_ = 0;  // numbers that attention's tables have had
};

}  // namespace

// With the name of a model: that one; with "many": attention of many sequences.
int main(int argc, char** argv) {
  Operations suite(test::gpu());
  const std::string only = run_models(suite, argc, argv);
  if (only.empty()) suite.upload();
  suite.soft_cap();
  suite.quantize();
  for (uint32_t vocab : {509u, 262144u})
    if (only.empty() || vocab < 1000) suite.sample(vocab);
  if (only.empty() || only == "many") suite.many_sequences();
  if (only.empty()) Operations::in_threads();  // thousands of launches: more than racecheck has memory for
}
