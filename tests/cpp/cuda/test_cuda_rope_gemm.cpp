// The product of q, k and v with its rotation in one kernel (rope_gemm.h), against the reference in
// float32 and against the two operations one after the other on the GPU. Outputs are filled before, inputs are new each
// run. With the argument "tiny": as much as a sanitizer has time for.
#include <cstring>
#include <numeric>
#include <string>

#include "cuda/rope_gemm.h"
#include "suite.h"

namespace {

struct Shape {
  uint32_t heads, kv_heads, head_dim, k, page_size;

  uint32_t rows() const { return (heads + 2 * kv_heads) * head_dim; }
};

// W: of weights and what they are multiplied with. C: of the cache.
template <class W, class C>
class RopeGemm : Suite {
  static constexpr bool kFp8 = std::is_same_v<W, e4m3>, kFp8Cache = std::is_same_v<C, e4m3>;

 public:
  // `whole`: with numbers whose products are exact in float32, whatever the order of adding.
  RopeGemm(std::unique_ptr<Backend> gpu, const Shape& shape, uint32_t t, bool norms, bool whole)
      : Suite(std::move(gpu)),
        s_(shape),
        t_(t),
        norms_(norms),
        whole_(whole),
        pages_((t + shape.page_size - 1) / shape.page_size + 1),
        x_(input(size_t{t} * shape.k)),
        w_(input(size_t{shape.rows()} * shape.k)),
        w_scales_(scales_of(shape.rows())),
        x_scales_(scales_of(t)),
        q_norm_(both(test::normal(shape.head_dim, 0.3f))),
        k_norm_(both(test::normal(shape.head_dim, 0.3f))),
        frequency_(both(frequencies(shape.head_dim))),
        key_scales_(cache_scales(norms   ? 1
                                 : whole ? 100
                                 : kFp8  ? 20
                                         : 1)),
        value_scales_(cache_scales(whole  ? 100
                                   : kFp8 ? 20
                                          : 1)),
        positions_(both(vector<uint32_t>(t))),
        slots_(both(vector<uint32_t>(t))),
        qkv_(poisoned(size_t{t} * shape.rows())) {
    place();
  }

  void run() {
    if (!cuda::rope_gemm_runs(product(qkv_.gpu()), rope(qkv_.gpu(), Outputs(*this)), device_)) {
      CHECK(device_.capability != 90);
      return std::printf("  no kernel for this GPU\n"), void();
    }
    const Outputs fused(*this);
    GEMMA_CUDA_CHECK(cudaDeviceSynchronize());
    cuda::rope_gemm(product(nullptr), rope(nullptr, fused), device_, {});
    GEMMA_CUDA_CHECK(cudaDeviceSynchronize());
    whole_ ? compare_with_two(fused) : compare_with_reference(fused);
    through_backend(fused);
  }

 private:
  // q and the cache, filled with what no result is likely to be; a sentinel stands behind q.
  struct Outputs {
    Both<bf16> q;
    Both<C> keys, values;

    explicit Outputs(RopeGemm& test)
        : q(test.both(vector<bf16>((size_t{test.t_} + 1) * test.s_.heads * test.s_.head_dim, to_bf16(kFill)))),
          keys(test.both(vector<C>(test.cache_size(), filling()))),
          values(test.both(vector<C>(test.cache_size(), filling()))) {}
  };
  static constexpr float kFill = 448;
  static C filling() {
    if constexpr (kFp8Cache)
      return to_e4m3(kFill);
    else
      return to_bf16(kFill);
  }
  size_t cache_size() const { return size_t{pages_} * s_.kv_heads * s_.page_size * s_.head_dim; }

  Both<W> input(size_t count) {
    if (!whole_) return elements<W>(count);
    vector<W> out(count);
    for (W& x : out) {
      const float value = static_cast<float>(test::below(5)) - 2;
      if constexpr (kFp8)
        x = to_e4m3(value);
      else
        x = to_bf16(value);
    }
    return both(std::move(out));
  }
  Both<float> scales_of(size_t count) {
    if (!whole_) return scales(count);
    vector<float> out(count);
    for (float& x : out) x = std::ldexp(1.0f, -static_cast<int>(test::below(4)));
    return both(std::move(out));
  }
  // Such that few results are too large for FP8.
  Both<float> cache_scales(float factor) {
    vector<float> out = scales(s_.kv_heads).host;
    for (float& x : out) x *= factor;
    return both(std::move(out));
  }
  static vector<float> frequencies(uint32_t head_dim) {
    vector<float> out;
    for (uint32_t i = 0; i < head_dim / 2; ++i)
      out.push_back(std::pow(10000.0f, -2.0f * static_cast<float>(i) / static_cast<float>(head_dim)));
    return out;
  }
  // Small and large positions; slots in no order, and some tokens without one.
  void place() {
    vector<uint32_t> all(size_t{pages_} * s_.page_size);
    std::iota(all.begin(), all.end(), 0);
    std::ranges::shuffle(all, test::random());
    for (uint32_t i = 0; i < t_; ++i) {
      positions_.host[i] = i % 3 == 0 ? 100000 + i : i % 3 == 1 ? 131071 - i : i;
      slots_.host[i] = i % 7 == 3 || i + 1 == t_ ? kNoSlot : all[i];
    }
    positions_ = both(std::move(positions_.host));
    slots_ = both(std::move(slots_.host));
  }

  GemmArgs product(void* out) const {
    return {.x = x_.gpu(),
            .w = {w_.gpu(), kFp8 ? DType::e4m3 : DType::bf16, s_.rows(), s_.k, kFp8 ? w_scales_.gpu() : nullptr},
            .out = out,
            .out_dtype = DType::bf16,
            .tokens = t_,
            .x_scale = {.scale = kFp8 && norms_ ? x_scales_.gpu() : nullptr,
                        .row_scales = kFp8 && !norms_ ? x_scales_.gpu() : nullptr}};
  }
  RopeArgs rope(const void* qkv, const Outputs& to) const {
    return {.qkv = qkv,
            .positions = positions_.gpu(),
            .slots = slots_.gpu(),
            .inverse_frequency = frequency_.gpu(),
            .q_norm = norms_ ? q_norm_.gpu() : nullptr,
            .k_norm = norms_ ? k_norm_.gpu() : nullptr,
            .eps = 1e-6f,
            .heads = s_.heads,
            .q = to.q.gpu(),
            .cache = {to.keys.gpu(), to.values.gpu(), kFp8Cache ? DType::e4m3 : DType::bf16, s_.page_size, s_.kv_heads,
                      s_.head_dim, kFp8Cache ? key_scales_.gpu() : nullptr, kFp8Cache ? value_scales_.gpu() : nullptr},
            .tokens = t_};
  }

  // Where enough tiles, by the backend's stream and choice: the same bits.
  void through_backend(const Outputs& want) {
    const bool fits = cuda::rope_gemm_fits(product(qkv_.gpu()), rope(qkv_.gpu(), want), device_);
    CHECK(fits || size_t{t_} * s_.rows() < size_t{1000} * 48 * 256);
    if (!fits) return;
    const Outputs got(*this);
    const Both<bf16> qkv = poisoned(qkv_.host.size());
    gpu_->rope_gemm(product(qkv.gpu()), rope(qkv.gpu(), got));
    CHECK(same(got.q, want.q) && same(got.keys, want.keys) && same(got.values, want.values));
    for (bf16 x : download(qkv)) CHECK(std::isnan(to_float(x)));  // not needed
  }
  template <class T>
  bool same(const Both<T>& a, const Both<T>& b) {
    const vector<T> left = download(a), right = download(b);
    return std::memcmp(left.data(), right.data(), left.size() * sizeof(T)) == 0;
  }

  // The products are the same bits: so are values, and what is rotated but for the last bit now and then.
  void compare_with_two(const Outputs& fused) {
    const Outputs two(*this);
    gpu_->gemm(product(qkv_.gpu()));
    gpu_->rope(rope(qkv_.gpu(), two));
    CHECK(same(fused.values, two.values));
    const auto nearly = [&](const char* what, const auto& a, const auto& b) {
      const vector<float> got = wide(download(a)), want = wide(download(b));
      size_t differ = 0;
      for (size_t i = 0; i < got.size(); ++i) differ += !(got[i] == want[i]);
      report(what, static_cast<double>(differ) / static_cast<double>(got.size()), 0.01);
      CHECK(test::relative_error(got, want) < 5e-3);
    };
    nearly("q differ from the two's", fused.q, two.q);
    nearly("keys differ from the two's", fused.keys, two.keys);
  }

  // The product and its rotation in float32, where only the results are rounded.
  void compare_with_reference(const Outputs& fused) {
    vector<float> qkv(size_t{t_} * s_.rows()), q(size_t{t_} * s_.heads * s_.head_dim);
    GemmArgs gemm = product(qkv.data());
    gemm.x = x_.host.data(), gemm.w.data = w_.host.data(), gemm.out_dtype = DType::f32;
    if (kFp8) gemm.w.scales = w_scales_.host.data();
    if (gemm.x_scale.scale != nullptr) gemm.x_scale.scale = x_scales_.host.data();
    if (gemm.x_scale.row_scales != nullptr) gemm.x_scale.row_scales = x_scales_.host.data();
    reference_->gemm(gemm);
    using Wide = std::conditional_t<kFp8Cache, e4m3, float>;
    vector<Wide> keys(cache_size()), values(cache_size());
    RopeArgs args = rope(qkv.data(), fused);
    args.positions = positions_.host.data(), args.slots = slots_.host.data();
    args.inverse_frequency = frequency_.host.data(), args.q = q.data();
    if (norms_) args.q_norm = q_norm_.host.data(), args.k_norm = k_norm_.host.data();
    args.cache.keys = keys.data(), args.cache.values = values.data();
    args.cache.dtype = kFp8Cache ? DType::e4m3 : DType::f32;
    if (kFp8Cache) args.cache.key_scales = key_scales_.host.data(), args.cache.value_scales = value_scales_.host.data();
    make_reference_backend(0, DType::f32)->rope(args);

    vector<float> got = wide(download(fused.q));
    for (size_t i = q.size(); i < got.size(); ++i) CHECK(got[i] == kFill);  // nothing past the end
    got.resize(q.size());
    const double limit = (kFp8 ? 3 : 2) * kLimit;
    report("q", test::relative_error(got, q), limit);
    // Of FP8 half a step of three bits of mantissa, twice, where the numbers that are rounded differ a little.
    compare_cache("keys", fused.keys, keys, kFp8Cache ? 0x1p-4 : limit);
    compare_cache("values", fused.values, values, kFp8Cache ? 0x1p-4 : limit);
  }
  template <class Wide>
  void compare_cache(const char* what, const Both<C>& cache, const vector<Wide>& want, double limit) {
    vector<bool> written(size_t{pages_} * s_.page_size);
    for (uint32_t slot : slots_.host)
      if (slot != kNoSlot) written[slot] = true;
    const vector<float> got = wide(download(cache));
    vector<float> got_rows, want_rows;
    for (size_t i = 0; i < got.size(); ++i) {
      const size_t row = i / s_.head_dim, page = row / s_.page_size / s_.kv_heads;
      if (!written[page * s_.page_size + row % s_.page_size]) {
        CHECK(got[i] == kFill);
        continue;
      }
      got_rows.push_back(got[i]);
      want_rows.push_back(widened(want[i]));
    }
    report(what, test::relative_error(got_rows, want_rows), limit);
  }
  static float widened(float x) { return x; }
  static float widened(e4m3 x) { return to_float(x); }

  const Shape s_;
  const uint32_t t_;
  const bool norms_, whole_;
  const uint32_t pages_;
  Both<W> x_, w_;
  Both<float> w_scales_, x_scales_, q_norm_, k_norm_, frequency_, key_scales_, value_scales_;
  Both<uint32_t> positions_, slots_;
  Both<bf16> qkv_;
};

constexpr Shape kShapes[] = {
    {16, 16, 256, 640, 32},  // at 1000 tokens enough tiles for the backend to take the kernel
    {4, 1, 256, 720, 5},     // a depth that fills no slot
    {6, 3, 128, 704, 32},    // a tile with the last head of k and the first of v
};

template <class W, class C>
void run(const char* what, bool tiny) {
  for (const Shape& shape : kShapes)
    for (uint32_t t : {65u, 200u, 1000u}) {
      if (tiny && size_t{t} * shape.rows() > size_t{65} * 1536) continue;
      for (const bool norms : {false, true})
        for (const bool whole : {false, true}) {
          std::printf("%s, %u x %u x %u, heads of %u%s%s\n", what, t, shape.rows(), shape.k, shape.head_dim,
                      norms ? ", normed" : "", whole ? ", whole numbers" : "");
          RopeGemm<W, C>(test::gpu(), shape, t, norms, whole).run();
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
  const bool tiny = argc > 1 && std::string(argv[1]) == "tiny";
  run<bf16, bf16>("bf16", tiny);
  run<bf16, e4m3>("bf16, cache in FP8", tiny);
  run<e4m3, bf16>("FP8, cache in bf16", tiny);
  run<e4m3, e4m3>("FP8, cache in FP8", tiny);
}
