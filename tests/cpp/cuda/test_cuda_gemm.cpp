// The products of the CUDA backend against the reference backend, at the shapes of real models: by our own kernels and
// by cuBLASLt, in bf16 and FP8. Outputs are poisoned before, inputs are new each run.
#include <cmath>
#include <cstring>
#include <optional>
#include <type_traits>

#include "core/sample_plan.h"
#include "cuda/gemm.h"
#include "cuda/skinny_gemm.h"
#include "suite.h"

namespace {

class Products : public Suite {
 public:
  using Suite::Suite;

  void gemm(uint32_t t, uint32_t n, uint32_t k, DType out_dtype) {
    auto x = random(size_t{t} * k);
    auto w = random(size_t{n} * k, 0.1f);
    char what[80];
    std::snprintf(what, sizeof what, "gemm %u x %u x %u", t, n, k);
    if (out_dtype == DType::f32) {
      auto out = both(vector<float>(size_t{t} * n, NAN));
      reference_->gemm({x.host.data(), {w.host.data(), DType::bf16, n, k}, out.host.data(), out_dtype, t});
      gpu_->gemm({x.gpu(), {w.gpu(), DType::bf16, n, k}, out.gpu(), out_dtype, t});
      near(what, out, 1e-5);
    } else {
      auto out = poisoned(size_t{t} * n);
      reference_->gemm({x.host.data(), {w.host.data(), DType::bf16, n, k}, out.host.data(), out_dtype, t});
      gpu_->gemm({x.gpu(), {w.gpu(), DType::bf16, n, k}, out.gpu(), out_dtype, t});
      near(what, out, kLimit);
    }
  }

  // The kernel of sm_90a for few rows: right with rows of w that fill no tile, with tiles that are cut and such that
  // are not, and adding in one order, whatever the batch.
  template <class T>
  void skinny_gemm(uint32_t n, uint32_t k) {
    const uint32_t most = cuda::kSkinnyTokens;
    constexpr bool kFp8 = std::is_same_v<T, e4m3>;
    auto x = elements<T>(size_t{most} * k), w = elements<T>(size_t{n} * k);
    auto out = poisoned(size_t{most} * n);
    auto w_scales = scales(n), x_scales = scales(most);
    const auto all_args = [&](bool gpu, uint32_t t) {
      GemmArgs args{gpu ? static_cast<const void*>(x.gpu()) : x.host.data(),
                    {gpu ? static_cast<const void*>(w.gpu()) : w.host.data(), kFp8 ? DType::e4m3 : DType::bf16, n, k},
                    gpu ? static_cast<void*>(out.gpu()) : out.host.data(),
                    DType::bf16,
                    t};
      if (kFp8) args.w.scales = gpu ? w_scales.gpu() : w_scales.host.data();
      if (kFp8) args.x_scale.row_scales = gpu ? x_scales.gpu() : x_scales.host.data();
      return args;
    };
    const auto args = [&](uint32_t t) { return all_args(true, t); };
    if (!cuda::skinny_gemm_fits(args(most), device_)) return;
    const Buffer partials(*gpu_, cuda::skinny_partial_bytes(device_)), arrivals(*gpu_, cuda::kSkinnyArrivalBytes);
    GEMMA_CUDA_CHECK(cudaMemset(arrivals.data(), 0, cuda::kSkinnyArrivalBytes));
    const auto rows = [&](uint32_t t) {
      auto poison = poisoned(out.host.size());
      gpu_->upload(out.gpu(), poison.host.data(), out.host.size() * sizeof(bf16));
      GEMMA_CUDA_CHECK(cudaDeviceSynchronize());
      cuda::skinny_gemm(args(t), device_, partials.data(), arrivals.as<uint32_t>(), {});
      GEMMA_CUDA_CHECK(cudaDeviceSynchronize());
      return download(out);
    };
    reference_->gemm(all_args(false, most));
    const vector<bf16> all = rows(most);
    near(kFp8 ? "skinny gemm, fp8" : "skinny gemm", out, kLimit);
    for (uint32_t t : {1u, 8u, 11u, 16u, 25u, 32u, 33u, 48u}) {
      const vector<bf16> got = rows(t);
      CHECK(std::memcmp(got.data(), all.data(), size_t{t} * n * sizeof(bf16)) == 0);
      CHECK(std::isnan(to_float(got[size_t{t} * n])));  // nothing past the end
    }
  }

  // A norm of a product's sums, wherever they are: as the reference has it, and a token's the same to the bit in every
  // batch. In FP8 with a scale for each row of x, or one, which is asked for early.
  template <class T>
  void gemm_norm(uint32_t t, uint32_t hidden, uint32_t k, bool post, bool last) {
    constexpr bool kFp8 = std::is_same_v<T, e4m3>;
    const vector<float> before = test::normal(size_t{t} * hidden, 3);
    auto x = elements<T>(size_t{t} * k), w = elements<T>(size_t{hidden} * k);
    auto w_scales = scales(hidden), x_scales = scales(t);
    auto residual = both(before), weight = both(test::normal(hidden, 0.3f)),
         delta_weight = both(test::normal(hidden, 0.3f));
    auto delta = poisoned(size_t{t} * hidden), out = poisoned(size_t{t} * hidden);
    const auto run = [&](Backend& backend, bool gpu, uint32_t first, uint32_t count) {
      const auto at = [&](auto& data) { return gpu ? data.gpu() : data.host.data(); };
      const auto row = [&](auto& data, size_t width) { return at(data) + first * width; };
      GemmArgs product{
          row(x, k), {at(w), kFp8 ? DType::e4m3 : DType::bf16, hidden, k}, row(delta, hidden), DType::bf16, count};
      if (kFp8) product.w.scales = at(w_scales);
      if (kFp8 && post) product.x_scale.row_scales = row(x_scales, 1);
      if (kFp8 && !post) product.x_scale.scale = at(x_scales);
      backend.gemm_norm(product, {.residual = row(residual, hidden),
                                  .delta = row(delta, hidden),
                                  .delta_weight = post ? at(delta_weight) : nullptr,
                                  .weight = last ? nullptr : at(weight),
                                  .out = row(out, hidden),
                                  .tokens = count,
                                  .hidden = hidden,
                                  .eps = 1e-6f});
      return gpu && cuda::skinny_gemm_fits(product, device_);
    };
    const bool own = run(*gpu_, true, 0, t);
    const vector<float> streams = download(residual);
    const vector<bf16> normed = download(out);
    const uint32_t checked = std::min(t, 8u), first = t - checked;  // the reference takes its time
    run(*reference_, false, first, checked);
    const auto same = [&](const char* what, const auto& got, const auto& wanted) {
      const auto rows = [&](const auto& all) { return vector(all.begin() + size_t{first} * hidden, all.end()); };
      report(what, test::relative_error(wide(rows(got)), wide(rows(wanted))), kLimit);
    };
    same("gemm and norm", streams, residual.host);
    CHECK(std::isnan(to_float(normed[0])) == last);
    CHECK(streams != before);
    if (!last) same("gemm and norm, normed", normed, out.host);
    if (!own) return;
    gpu_->upload(residual.gpu(), before.data(), before.size() * sizeof(float));
    for (uint32_t at = 0; at < t; at += 8) run(*gpu_, true, at, std::min(t - at, 8u));
    CHECK(download(residual) == streams);
    CHECK(std::memcmp(download(out).data(), normed.data(), normed.size() * sizeof(bf16)) == 0);
  }

  // The gated product, fused or not, from the reference's products in float32. Fused it is rounded once.
  template <class T>
  void gated_gemm(uint32_t t, uint32_t ffn, uint32_t k) {
    constexpr bool kFp8 = std::is_same_v<T, e4m3>;
    auto x = elements<T>(size_t{t} * k), w = elements<T>(size_t{2} * ffn * k);
    auto w_scales = scales(2 * ffn), x_scales = scales(t), out_scale = both(vector<float>{0.7f});
    Matrix matrix{w.host.data(), kFp8 ? DType::e4m3 : DType::bf16, 2 * ffn, k};
    if (kFp8) matrix.scales = w_scales.host.data();
    vector<float> products(size_t{t} * 2 * ffn);
    reference_->gemm({.x = x.host.data(),
                      .w = matrix,
                      .out = products.data(),
                      .out_dtype = DType::f32,
                      .tokens = t,
                      .x_scale = {.scale = nullptr, .row_scales = kFp8 ? x_scales.host.data() : nullptr}});
    auto out = poisoned(size_t{t} * ffn), room = poisoned(size_t{t} * 2 * ffn);
    auto narrow = poisoned_fp8(size_t{t} * ffn);
    for (uint32_t row = 0; row < t; ++row)
      for (uint32_t i = 0; i < ffn; ++i) {
        const float g = products[size_t{row} * 2 * ffn + i], u = products[size_t{row} * 2 * ffn + ffn + i];
        const float y = 0.5f * g * (1 + std::tanh(0.79788456f * (g + 0.044715f * g * g * g))) * u;
        out.host[size_t{row} * ffn + i] = to_bf16(y);
        narrow.host[size_t{row} * ffn + i] = to_e4m3(y / 0.7f);
      }
    matrix.data = w.gpu();
    if (kFp8) matrix.scales = w_scales.gpu();
    GatedGemmArgs args{.x = x.gpu(),
                       .w = matrix,
                       .act = DType::bf16,
                       .gate_up = room.gpu(),
                       .out = out.gpu(),
                       .tokens = t,
                       .x_scale = {.scale = nullptr, .row_scales = kFp8 ? x_scales.gpu() : nullptr}};
    gpu_->gated_gemm(args);
    char what[80];
    std::snprintf(what, sizeof what, "gated gemm%s %u x %u x %u", kFp8 ? ", fp8" : "", t, ffn, k);
    near(what, out, 3 * kLimit);
    if (!kFp8) return;
    args.out = narrow.gpu(), args.quantize.scale = out_scale.gpu();
    gpu_->gated_gemm(args);
    // Where gelu is steep, the sums' last bits decide on a code; of few results one may be most of the error.
    near("gated gemm, to fp8", narrow, t < 33 ? 0x1p-3 : 0.03);
  }

  // A token's results are the same in every batch of up to kSkinnyTokens, where the kernel is ours.
  template <class T>
  void gated_rows(uint32_t ffn, uint32_t k) {
    constexpr bool kFp8 = std::is_same_v<T, e4m3>;
    const uint32_t most = cuda::kSkinnyTokens;
    auto x = elements<T>(size_t{most} * k), w = elements<T>(size_t{2} * ffn * k);
    auto w_scales = scales(2 * ffn), x_scale = both(vector<float>{0.013f});
    GatedGemmArgs args{.x = x.gpu(),
                       .w = {w.gpu(), kFp8 ? DType::e4m3 : DType::bf16, 2 * ffn, k},
                       .act = DType::bf16,
                       .gate_up = nullptr,
                       .out = nullptr,
                       .tokens = most};
    if (kFp8) args.w.scales = w_scales.gpu(), args.x_scale.scale = x_scale.gpu();
    if (!gpu_->fuses_gated_gemm(args)) return;
    const auto rows = [&](uint32_t t) {
      auto out = poisoned(size_t{most} * ffn);
      args.out = out.gpu(), args.tokens = t;
      gpu_->gated_gemm(args);
      return download(out);
    };
    const vector<bf16> all = rows(most);
    for (uint32_t t : {1u, 11u, 16u, 25u, 48u}) {
      const vector<bf16> got = rows(t);
      CHECK(std::memcmp(got.data(), all.data(), size_t{t} * ffn * sizeof(bf16)) == 0);
      CHECK(std::isnan(to_float(got[size_t{t} * ffn])));  // nothing past the end
    }
  }

  // Logits that are sampled from: results as from a product and what follows it, one after the other, and every row
  // that is read by more than the pick of its best.
  template <class T>
  void sampled_gemm(uint32_t t, uint32_t vocab, uint32_t k, float soft_cap) {
    constexpr bool kFp8 = std::is_same_v<T, e4m3>;
    auto x = elements<T>(size_t{t} * k), w = elements<T>(size_t{vocab} * k);
    if (t > 6) x.host[size_t{6} * k] = not_a_number<T>();  // this row alone has no result
    x = both(std::move(x.host));
    auto w_scales = scales(vocab), x_scales = scales(t);
    auto logits = both(vector<float>(size_t{t} * vocab, NAN)), logits_apart = both(logits.host);
    auto last = both(vector<uint32_t>(t, ~0u)), last_apart = both(last.host);
    SamplePlan plan;
    vector<bool> read(t, true);
    const vector<uint32_t> prompt = {1, 2, 3};
    for (uint32_t r = 0; r < t; ++r) {
      SamplingConfig config;
      config.temperature = r % 6 == 3 ? 0.7f : 0.0f;
      config.top_logprobs = r % 12 == 1 ? 2 : 0;
      config.repetition_penalty = r % 18 == 12 ? 1.2f : 1.0f;
      config.seed = r;
      if (r % 6 == 4) plan.score(r, test::below(vocab), 1);
      if (r % 6 < 4) plan.pick(r, r, config, prompt, 3, r % 6 == 2);
      read[r] = r % 6 >= 2 || config.top_logprobs > 0 || config.repetition_penalty != 1;
    }
    const uint32_t results = static_cast<uint32_t>(plan.tasks.size());
    plan.tasks.resize(t, SampleTask::nothing());
    auto tasks = both(plan.tasks);
    auto adjustments = both(plan.adjustments);
    const auto product_to = [&](const Both<float>& out) {
      GemmArgs product{x.gpu(), {w.gpu(), kFp8 ? DType::e4m3 : DType::bf16, vocab, k}, out.gpu(), DType::f32, t};
      if (kFp8) product.w.scales = w_scales.gpu(), product.x_scale.row_scales = x_scales.gpu();
      return product;
    };
    const auto sampling = [&](const Both<float>& from, const Both<uint32_t>& to) {
      return SampleArgs{.logits = from.gpu(),
                        .vocab = vocab,
                        .tasks = tasks.gpu(),
                        .adjustments = adjustments.gpu(),
                        .count = t,
                        .max_top = plan.max_top,
                        .last_tokens = to.gpu()};
    };
    const auto finish = [&] {
      gpu_->start_results(results, plan.max_top);
      return gpu_->finish_results();
    };
    gpu_->sampled_gemm(product_to(logits), soft_cap, sampling(logits, last));
    const auto got = finish();
    gpu_->Backend::sampled_gemm(product_to(logits_apart), soft_cap, sampling(logits_apart, last_apart));
    const auto want = finish();
    CHECK(got.size() == want.size());
    for (size_t i = 0; i < want.size(); ++i) {
      CHECK(got[i].has_value() == want[i].has_value() && want[i].has_value() == (plan.tasks[i].row != 6));
      if (!want[i].has_value()) continue;
      CHECK(got[i]->token == want[i]->token && got[i]->top.size() == want[i]->top.size());
      CHECK(std::abs(got[i]->logprob - want[i]->logprob) < 2e-5f * std::max(1.0f, std::abs(want[i]->logprob)));
    }
    CHECK(download(last) == download(last_apart));
    const bool leaves_out = cuda::skinny_surveyed_gemm_fits(product_to(logits), device_);
    const vector<float> all = download(logits), all_apart = download(logits_apart);
    for (uint32_t r = 0; r < t; ++r) {
      const auto row = [&](const vector<float>& of) {
        return vector<float>(of.begin() + size_t{r} * vocab, of.begin() + (size_t{r} + 1) * vocab);
      };
      if (read[r])
        CHECK(test::relative_error(row(all), row(all_apart)) < 1e-6);
      else if (leaves_out)
        for (float y : row(all)) CHECK(std::isnan(y));
    }
    std::printf("  sampled gemm%s %u x %u x %u: equal\n", kFp8 ? ", fp8" : "", t, vocab, k);
  }

  // A product of FP8 with the scales of rows, or one for all of them, of either side.
  struct Fp8Product {
    Both<e4m3> x, w;
    Both<float> w_scales, x_scales, one_w;
    uint32_t t, n, k;

    GemmArgs args(bool gpu, void* out, DType out_dtype, bool one_w_scale, bool one_x_scale) const {
      const auto on = [&]<class T>(const Both<T>& data) { return gpu ? data.gpu() : const_cast<T*>(data.host.data()); };
      float* xs = on(x_scales);
      return {.x = on(x),
              .w = {on(w), DType::e4m3, n, k, on(one_w_scale ? one_w : w_scales), one_w_scale},
              .out = out,
              .out_dtype = out_dtype,
              .tokens = t,
              .x_scale = {.scale = one_x_scale ? xs : nullptr, .row_scales = one_x_scale ? nullptr : xs}};
    }
  };
  Fp8Product fp8_product(uint32_t t, uint32_t n, uint32_t k) {
    return {random_fp8(size_t{t} * k),
            random_fp8(size_t{n} * k),
            scales(n),
            scales(t),
            both(vector<float>(n, 0.013f)),
            t,
            n,
            k};
  }

  void gemm_fp8(uint32_t t, uint32_t n, uint32_t k, DType out_dtype) {
    const Fp8Product product = fp8_product(t, n, k);
    char what[80];
    // What is large takes the reference long: there all scales of rows, or none.
    const bool large = size_t{t} * n * k > size_t{1} << 28;
    for (const bool one_w : {false, true})
      for (const bool one_x : {false, true}) {
        if (large && one_w != one_x) continue;
        std::snprintf(what, sizeof what, "fp8 gemm %u x %u x %u, %d %d", t, n, k, one_w, one_x);
        // Up to kSkinnyTokens sums are float32 on sm_90; those of the library less exact.
        const double limit = kLimit + (t > cuda::kSkinnyTokens ? 0x1p-8 : 0);
        const auto check = [&](auto out) {
          reference_->gemm(product.args(false, out.host.data(), out_dtype, one_w, one_x));
          gpu_->gemm(product.args(true, out.gpu(), out_dtype, one_w, one_x));
          near(what, out, limit);
        };
        out_dtype == DType::f32 ? check(both(vector<float>(size_t{t} * n, NAN))) : check(poisoned(size_t{t} * n));
      }
  }

  // Scales that are applied behind the product, as on GPUs whose library takes no vectors of them.
  void gemm_scaled_behind(uint32_t t, uint32_t n, uint32_t k) {
    const Fp8Product product = fp8_product(t, n, k);
    cuda::Gemm gemm({.index = 0, .capability = 89}, "a GPU without vectors of scales");
    for (const bool one_x : {false, true}) {
      auto out = poisoned(size_t{t} * n);
      reference_->gemm(product.args(false, out.host.data(), DType::bf16, false, one_x));
      gemm.run(product.args(true, out.gpu(), DType::bf16, false, one_x), {});
      GEMMA_CUDA_CHECK(cudaDeviceSynchronize());
      near("fp8 gemm, scaled behind", out, 2 * kLimit);  // rounded twice
    }
  }

  void model(const Model& m) {
    const uint32_t width = m.heads * m.head_dim, qkv = (m.heads + 2 * m.kv_heads) * m.head_dim;
    for (uint32_t t : {1u, 3u, 9u, 17u, 32u, 64u}) {
      gemm(t, qkv, m.hidden, DType::bf16);
      gemm(t, m.hidden, width, DType::bf16);
    }
    gemm(5, m.hidden, m.ffn, DType::bf16);
    gemm(300, qkv, m.hidden, DType::bf16);
    gemm(2, m.vocab / 8, m.hidden, DType::f32);
    gemm(33, m.vocab / 8 + 1, m.hidden, DType::f32);
    own_kernels<bf16>(m, qkv);
    if (fp8_ && m.ffn % 16 == 0) model_fp8(m, width, qkv);
  }

 private:
  template <class T>
  static T not_a_number() {
    if constexpr (std::is_same_v<T, e4m3>)
      return {0x7F};
    else
      return to_bf16(NAN);
  }

  template <class T>
  void own_kernels(const Model& m, uint32_t qkv) {
    skinny_gemm<T>(m.hidden, m.ffn);
    skinny_gemm<T>(qkv + 8, m.hidden);
    skinny_gemm<T>(m.vocab / 8 + 1, m.hidden);
    for (uint32_t t : {1u, 7u, 16u, 31u, 64u, 70u}) {
      gemm_norm<T>(t, m.hidden, m.ffn, t % 2 == 0, t == 31);
      gemm_norm<T>(t, m.hidden, m.hidden, m.post_norms, false);
    }
    gemm_norm<T>(5, 96, 64, false, false);   // a tile, which one block has
    gemm_norm<T>(5, 640, 256, true, false);  // some, which a block each has
    gated_gemm<T>(5, m.ffn, m.hidden);
    for (uint32_t t : {1u, 13u, 32u, 64u, 200u}) gated_gemm<T>(t, 264, m.hidden);
    gated_rows<T>(m.ffn, m.hidden);
    for (uint32_t t : {1u, 7u, 16u, 31u, 64u}) sampled_gemm<T>(t, m.vocab / 16 + 3, m.hidden, t % 2 ? 0.0f : 30.0f);
    sampled_gemm<T>(70, m.vocab / 64 * 16, m.hidden, 30.0f);  // the library takes FP8 by sixteens only
    for (uint32_t t : {65u, 200u, 1100u}) gated_gemm<T>(t, 256, std::max(m.hidden, 640u));
  }

  void model_fp8(const Model& m, uint32_t width, uint32_t qkv) {
    for (uint32_t t : {1u, 9u, 33u}) gemm_fp8(t, qkv, m.hidden, DType::bf16);
    gemm_fp8(5, m.hidden, m.ffn, DType::bf16);
    gemm_fp8(130, qkv, m.hidden, DType::bf16);
    gemm_fp8(100, m.hidden, m.ffn, DType::bf16);
    gemm_fp8(3, m.vocab / 32 * 4, m.hidden, DType::f32);
    gemm_fp8(70, m.vocab / 32 * 16, m.hidden, DType::f32);
    gemm_scaled_behind(5, qkv, m.hidden);
    gemm_scaled_behind(96, m.hidden, width);
    own_kernels<e4m3>(m, qkv);
  }
};

}  // namespace

int main(int argc, char** argv) {
  Products products(test::gpu());
  run_models(products, argc, argv);
}
