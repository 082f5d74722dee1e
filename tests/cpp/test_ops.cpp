// Every operation of the reference backend, for every instruction set this machine has, against the same operation
// written plainly in double precision.
#include <algorithm>
#include <cstring>

#include "check.h"
#include "ops/backend.h"
#include "ops/convert.h"
#include "reference/backend.h"

using namespace gemma_cuda;
using std::vector;

namespace {

// Host values in an operation's type, and what they mean there.
struct Typed {
  DType dtype;
  vector<float> wide;
  vector<bf16> narrow;

  Typed(DType type, vector<float> values) : dtype(type), wide(std::move(values)) {
    if (dtype == DType::f32) return;
    for (float& x : wide) {
      narrow.push_back(to_bf16(x));
      x = to_float(narrow.back());
    }
  }
  const void* data() const { return dtype == DType::f32 ? static_cast<const void*>(wide.data()) : narrow.data(); }
};

// An output of an operation, poisoned so that an element nobody wrote shows.
struct Output {
  DType dtype;
  vector<float> wide;
  vector<bf16> narrow;

  Output(DType type, size_t count) : dtype(type), wide(count, NAN), narrow(count, to_bf16(NAN)) {}
  void* data() { return dtype == DType::f32 ? static_cast<void*>(wide.data()) : narrow.data(); }
  vector<float> values() const {
    if (dtype == DType::f32) return wide;
    vector<float> out;
    for (bf16 x : narrow) out.push_back(to_float(x));
    return out;
  }
};

// Half a unit in the last place of the result, or what float32 sums of some hundred terms lose.
double limit(DType out) { return out == DType::f32 ? 2e-6 : 0x1p-8 * 1.01; }

void gemm(Backend& backend, DType act, DType weight, DType out_type, uint32_t t, uint32_t n, uint32_t k) {
  const Typed x(act, test::normal(size_t{t} * k)), w(weight, test::normal(size_t{n} * k));
  Output out(out_type, size_t{t} * n);
  backend.gemm({.x = x.data(), .w = {w.data(), weight, n, k}, .out = out.data(), .out_dtype = out_type, .tokens = t});
  vector<double> want(size_t{t} * n);
  for (uint32_t i = 0; i < t; ++i)
    for (uint32_t j = 0; j < n; ++j)
      for (uint32_t l = 0; l < k; ++l) want[size_t{i} * n + j] += double(x.wide[i * k + l]) * w.wide[j * k + l];
  CHECK(test::relative_error(out.values(), want) < limit(out_type));

  for (uint32_t i = 0; i < t; ++i) {  // a row alone: the same bits
    Output alone(out_type, n);
    const size_t row = size_t{i} * k * size_of(act);
    backend.gemm({.x = static_cast<const char*>(x.data()) + row,
                  .w = {w.data(), weight, n, k},
                  .out = alone.data(),
                  .out_dtype = out_type,
                  .tokens = 1});
    const vector<float> values = out.values();
    CHECK(std::ranges::equal(alone.values(), std::span(values).subspan(size_t{i} * n, n)));
  }
}

void embed(Backend& backend, DType type) {
  const uint32_t vocab = 11, h = 37;
  const Typed table(type, test::normal(vocab * h));
  const vector<uint32_t> ids{10, 0, 3, 3};
  vector<float> out(ids.size() * h, NAN);
  backend.embed(
      {.ids = ids.data(), .tokens = 4, .table = {table.data(), type, vocab, h}, .scale = 1.5f, .residual = out.data()});
  for (size_t i = 0; i < out.size(); ++i) CHECK(out[i] == 1.5f * table.wide[ids[i / h] * h + i % h]);
}

void gather_rows(Backend& backend) {
  const vector<float> from = test::normal(11 * 8);
  const vector<uint32_t> rows{10, 0, 3, 3};
  vector<float> out(4 * 8 + 1, NAN);
  backend.gather_rows(
      {.from = from.data(), .rows = rows.data(), .count = 4, .row_bytes = 8 * sizeof(float), .to = out.data()});
  for (size_t i = 0; i < 4 * 8; ++i) CHECK(out[i] == from[rows[i / 8] * 8 + i % 8]);
  CHECK(std::isnan(out.back()));
}

vector<double> normed(std::span<const double> x, const vector<float>& w, double eps) {
  double squares = 0;
  for (double v : x) squares += v * v;
  vector<double> out;
  for (size_t i = 0; i < x.size(); ++i)
    out.push_back(x[i] / std::sqrt(squares / double(x.size()) + eps) * (1 + double(w[i])));
  return out;
}

void norm(Backend& backend, DType act, uint32_t t, uint32_t h, bool with_delta, bool post) {
  const vector<float> before = test::normal(size_t{t} * h), w = test::normal(h, 0.2f), post_w = test::normal(h, 0.2f);
  const Typed delta(act, test::normal(size_t{t} * h));
  vector<float> residual = before;
  Output out(act, size_t{t} * h);
  backend.norm({.residual = residual.data(),
                .delta = with_delta ? delta.data() : nullptr,
                .delta_weight = with_delta && post ? post_w.data() : nullptr,
                .weight = w.data(),
                .out = out.data(),
                .tokens = t,
                .hidden = h,
                .eps = 1e-6f});
  vector<double> want_residual, want;
  for (uint32_t i = 0; i < t; ++i) {
    vector<double> row(before.begin() + i * h, before.begin() + (i + 1) * h);
    const vector<double> raw(delta.wide.begin() + i * h, delta.wide.begin() + (i + 1) * h);
    const vector<double> added = post ? normed(raw, post_w, 1e-6) : raw;
    if (with_delta)
      for (uint32_t j = 0; j < h; ++j) row[j] += added[j];
    want_residual.insert(want_residual.end(), row.begin(), row.end());
    // Of the stream as it was rounded: where it nearly cancels, a norm makes much of its last bit.
    const vector<double> rounded(residual.begin() + i * h, residual.begin() + (i + 1) * h);
    const vector<double> y = normed(rounded, w, 1e-6);
    want.insert(want.end(), y.begin(), y.end());
  }
  CHECK(test::relative_error(residual, want_residual) < limit(DType::f32));
  CHECK(test::relative_error(out.values(), want) < limit(act));

  if (with_delta) {  // in place: the same bits
    Typed place = delta;
    vector<float> again = before;
    void* at = act == DType::f32 ? static_cast<void*>(place.wide.data()) : place.narrow.data();
    backend.norm({.residual = again.data(),
                  .delta = at,
                  .delta_weight = post ? post_w.data() : nullptr,
                  .weight = w.data(),
                  .out = at,
                  .tokens = t,
                  .hidden = h,
                  .eps = 1e-6f});
    CHECK(again == residual);
    CHECK(act == DType::f32 ? place.wide == out.wide
                            : std::memcmp(place.narrow.data(), out.narrow.data(), t * h * sizeof(bf16)) == 0);
  }

  const vector<uint32_t> rows{t - 1, 0};  // only some rows, in another order
  Output picked(act, 2 * h);
  backend.norm({.residual = residual.data(),
                .rows = rows.data(),
                .weight = w.data(),
                .out = picked.data(),
                .tokens = 2,
                .hidden = h,
                .eps = 1e-6f});
  for (uint32_t j = 0; j < h; ++j) {
    CHECK(picked.values()[j] == out.values()[(t - 1) * h + j]);
    CHECK(picked.values()[h + j] == out.values()[j]);
  }
}

// A paged cache of random content, and the ragged batch over it.
struct Scene {
  uint32_t heads, kv_heads, dim, page_size, max_pages = 0;
  vector<uint32_t> lengths, news, cu{0}, table, positions, slots;
  Scene(uint32_t heads_, uint32_t kv_heads_, uint32_t dim_, uint32_t page_size_)
      : heads(heads_), kv_heads(kv_heads_), dim(dim_), page_size(page_size_) {
    lengths = {1, 2 + test::below(90), 17, 2 * page_size, 1 + test::below(40)};
    news = {1, 1, 5, page_size, 1};
    for (uint32_t length : lengths) max_pages = std::max(max_pages, (length + page_size - 1) / page_size);
    vector<uint32_t> order(lengths.size() * max_pages);
    for (uint32_t i = 0; i < order.size(); ++i) order[i] = i;
    std::ranges::shuffle(order, test::random());
    table = order;
    for (size_t s = 0; s < lengths.size(); ++s) {
      news[s] = std::min(news[s], lengths[s]);
      cu.push_back(cu.back() + news[s]);
      for (uint32_t p = lengths[s] - news[s]; p < lengths[s]; ++p) {
        positions.push_back(p);
        slots.push_back(table[s * max_pages + p / page_size] * page_size + p % page_size);
      }
    }
  }
  uint32_t tokens() const { return cu.back(); }
  size_t cache_size() const { return table.size() * kv_heads * page_size * dim; }
  size_t at(size_t s, uint32_t position, uint32_t kv_head) const {
    const size_t page = table[s * max_pages + position / page_size];
    return ((page * kv_heads + kv_head) * page_size + position % page_size) * dim;
  }
};

void attention(Backend& backend, DType act, Scene scene, uint32_t window, float cap) {
  const uint32_t dim = scene.dim, heads = scene.heads;
  const Typed q(act, test::normal(size_t{scene.tokens()} * heads * dim));
  Typed keys(act, test::normal(scene.cache_size())), values(act, test::normal(scene.cache_size()));
  Output out(act, q.wide.size());
  backend.attention({.q = q.data(),
                     .cache = {const_cast<void*>(keys.data()), const_cast<void*>(values.data()), act, scene.page_size,
                               scene.kv_heads, dim},
                     .cu_seqlens = scene.cu.data(),
                     .kv_len = scene.lengths.data(),
                     .block_table = scene.table.data(),
                     .sequences = uint32_t(scene.lengths.size()),
                     .max_pages = scene.max_pages,
                     .heads = heads,
                     .window = window,
                     .scale = 0.2f,
                     .soft_cap = cap,
                     .out = out.data(),
                     .tokens = scene.tokens()});
  vector<double> want(q.wide.size());
  for (size_t s = 0; s < scene.lengths.size(); ++s)
    for (uint32_t row = scene.cu[s]; row < scene.cu[s + 1]; ++row)
      for (uint32_t head = 0; head < heads; ++head) {
        const size_t mine = (size_t{row} * heads + head) * dim;
        const uint32_t kv_head = head / (heads / scene.kv_heads), position = scene.positions[row];
        double mass = 0;
        for (uint32_t p = 0; p <= position; ++p) {
          if (window != 0 && position - p >= window) continue;
          double score = 0;
          for (uint32_t d = 0; d < dim; ++d) score += double(q.wide[mine + d]) * keys.wide[scene.at(s, p, kv_head) + d];
          score *= 0.2f;
          if (cap > 0) score = cap * std::tanh(score / cap);
          mass += std::exp(score);
          for (uint32_t d = 0; d < dim; ++d)
            want[mine + d] += std::exp(score) * values.wide[scene.at(s, p, kv_head) + d];
        }
        for (uint32_t d = 0; d < dim; ++d) want[mine + d] /= mass;
      }
  CHECK(test::relative_error(out.values(), want) < limit(act));
}

void rope(Backend& backend, DType act, Scene scene, bool with_norm) {
  const uint32_t dim = scene.dim, heads = scene.heads, kv = scene.kv_heads, width = (heads + 2 * kv) * dim;
  const Typed qkv(act, test::normal(size_t{scene.tokens()} * width));
  const vector<float> q_norm = test::normal(dim, 0.2f), k_norm = test::normal(dim, 0.2f);
  vector<float> frequency;
  for (uint32_t i = 0; i < dim / 2; ++i) frequency.push_back(std::pow(10000.0f, -2.0f * float(i) / float(dim)));
  Output q(act, size_t{scene.tokens()} * heads * dim), keys(act, scene.cache_size()), values(act, scene.cache_size());
  backend.rope({.qkv = qkv.data(),
                .positions = scene.positions.data(),
                .slots = scene.slots.data(),
                .inverse_frequency = frequency.data(),
                .q_norm = with_norm ? q_norm.data() : nullptr,
                .k_norm = with_norm ? k_norm.data() : nullptr,
                .eps = 1e-6f,
                .heads = heads,
                .q = q.data(),
                .cache = {keys.data(), values.data(), act, scene.page_size, kv, dim},
                .tokens = scene.tokens()});
  auto rotated = [&](size_t from, uint32_t position, const vector<float>& w) {
    vector<double> x(qkv.wide.begin() + from, qkv.wide.begin() + from + dim);
    if (with_norm) x = normed(x, w, 1e-6);
    vector<double> out(dim);
    for (uint32_t i = 0; i < dim / 2; ++i) {
      const double angle = double(float(position) * frequency[i]), c = std::cos(angle), s = std::sin(angle);
      out[i] = x[i] * c - x[i + dim / 2] * s;
      out[i + dim / 2] = x[i + dim / 2] * c + x[i] * s;
    }
    return out;
  };
  const vector<float> got_q = q.values(), got_k = keys.values(), got_v = values.values();
  size_t written = 0;
  for (size_t s = 0; s < scene.lengths.size(); ++s)
    for (uint32_t row = scene.cu[s]; row < scene.cu[s + 1]; ++row) {
      const uint32_t position = scene.positions[row];
      for (uint32_t h = 0; h < heads; ++h)
        CHECK(test::relative_error(std::span(got_q).subspan((size_t{row} * heads + h) * dim, dim),
                                   rotated(size_t{row} * width + h * dim, position, q_norm)) < limit(act));
      for (uint32_t h = 0; h < kv; ++h, written += dim) {
        const size_t from = size_t{row} * width + (heads + h) * dim, to = scene.at(s, position, h);
        CHECK(test::relative_error(std::span(got_k).subspan(to, dim), rotated(from, position, k_norm)) < limit(act));
        CHECK(std::ranges::equal(std::span(got_v).subspan(to, dim), std::span(qkv.wide).subspan(from + kv * dim, dim)));
      }
    }
  CHECK(size_t(std::ranges::count_if(got_k, [](float x) { return !std::isnan(x); })) == written);  // and nothing else
}

void geglu(Backend& backend, DType act, uint32_t t, uint32_t ffn) {
  const Typed x(act, test::normal(size_t{t} * 2 * ffn, 3.0f));
  Output out(act, size_t{t} * ffn);
  backend.geglu({.gate_up = x.data(), .out = out.data(), .tokens = t, .ffn = ffn});
  vector<double> want;
  for (uint32_t i = 0; i < t; ++i)
    for (uint32_t j = 0; j < ffn; ++j) {
      const double g = x.wide[i * 2 * ffn + j], u = x.wide[i * 2 * ffn + ffn + j];
      want.push_back(0.5 * g * (1 + std::tanh(std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g))) * u);
    }
  CHECK(test::relative_error(out.values(), want) < limit(act));
}

// Numbers in FP8, a factor for each run of `width` (a row, or a head's part of a page), and what they mean.
struct Coded {
  vector<e4m3> codes;
  vector<float> scales, wide;

  // `runs`: which scale the i-th run has.
  Coded(size_t count, uint32_t width, uint32_t scale_count, auto run_scale) {
    for (uint32_t i = 0; i < scale_count; ++i) scales.push_back(0.001f * float(1 + test::below(100)));
    for (float x : test::normal(count, 60.0f)) {
      codes.push_back(to_e4m3(x));
      wide.push_back(to_float(codes.back()) * scales[run_scale(wide.size() / width)]);
    }
  }
};

// Within half a unit in the last place of FP8, and of what float32 or bf16 lose before it.
bool rounds_to(e4m3 got, double want, double slack) {
  const double error = std::abs(to_float(got) - std::clamp(want, -448.0, 448.0));
  return error <= std::max(std::abs(want) * (0x1p-4 + slack), 0x1p-10) * 1.001 + 1e-4;  // sums that nearly cancel
}

void quantize(Backend& backend) {
  vector<bf16> all;
  for (uint32_t bits = 0; bits < 65536; ++bits) all.push_back({static_cast<uint16_t>(bits)});
  for (uint32_t width : {65536u, 4096u, 1u}) {
    const float scale = width == 4096 ? 0.37f : 1.0f;
    vector<e4m3> out(all.size(), e4m3{0x7F});
    backend.quantize({.x = all.data(),
                      .dtype = DType::bf16,
                      .how = {.scale = &scale},
                      .out = out.data(),
                      .rows = 65536 / width,
                      .width = width});
    for (size_t i = 0; i < all.size(); ++i) CHECK(out[i].bits == to_e4m3(to_float(all[i]) * (1.0f / scale)).bits);
  }
  const uint32_t rows = 5, width = 83;
  vector<float> x = test::normal(size_t{rows} * width, 3.0f), scales(rows, NAN);
  std::fill_n(x.begin() + 2 * width, width, 0.0f);
  x[3 * width + 80] = -1e4f;
  vector<e4m3> out(x.size());
  backend.quantize({.x = x.data(),
                    .dtype = DType::f32,
                    .how = {.row_scales = scales.data()},
                    .out = out.data(),
                    .rows = rows,
                    .width = width});
  CHECK(scales[2] == 1 && scales[3] == 1e4f / 448 && out[3 * width + 80].bits == 0xFE);
  for (uint32_t i = 0; i < x.size(); ++i) CHECK(out[i].bits == to_e4m3(x[i] * (1.0f / scales[i / width])).bits);
  x[7] = NAN;
  backend.quantize({.x = x.data(),
                    .dtype = DType::f32,
                    .how = {.row_scales = scales.data()},
                    .out = out.data(),
                    .rows = 1,
                    .width = width});
  CHECK(out[7].bits == 0x7F);  // not hidden
}

// Against float32 products of what the codes mean.
void gemm_fp8(Backend& backend, Backend& exact, DType out_type, uint32_t t, uint32_t n, uint32_t k, bool dynamic) {
  Coded x(size_t{t} * k, k, dynamic ? t : 1, [&](size_t row) { return dynamic ? row : 0; });
  const Coded w(size_t{n} * k, k, n, [](size_t row) { return row; });
  Output out(out_type, size_t{t} * n), want(DType::f32, size_t{t} * n);
  Quantize x_scale;
  if (dynamic)
    x_scale.row_scales = x.scales.data();
  else
    x_scale.scale = x.scales.data();
  backend.gemm({.x = x.codes.data(),
                .w = {w.codes.data(), DType::e4m3, n, k, w.scales.data()},
                .out = out.data(),
                .out_dtype = out_type,
                .tokens = t,
                .x_scale = x_scale});
  exact.gemm({.x = x.wide.data(),
              .w = {w.wide.data(), DType::f32, n, k},
              .out = want.data(),
              .out_dtype = DType::f32,
              .tokens = t});
  CHECK(test::relative_error(out.values(), vector<double>(want.wide.begin(), want.wide.end())) < limit(out_type));
}

// Norm and GeGLU write in FP8 what they would write in float32, rounded once.
void fused_quantization(Backend& backend, DType act, bool dynamic) {
  const uint32_t t = 3, width = 77;
  const float given = 0.02f;
  vector<float> scales(t, NAN);
  const Quantize how =
      dynamic ? Quantize{.row_scales = scales.data()} : Quantize{.scale = &given, .row_scales = nullptr};
  auto check = [&](const vector<e4m3>& got, const vector<double>& want) {
    for (size_t i = 0; i < got.size(); ++i)
      CHECK(rounds_to(got[i], want[i] / (dynamic ? scales[i / width] : given), 1e-5));
  };
  vector<float> residual = test::normal(size_t{t} * width), w = test::normal(width, 0.2f);
  vector<e4m3> out(residual.size());
  backend.norm({.residual = residual.data(),
                .weight = w.data(),
                .out = out.data(),
                .tokens = t,
                .hidden = width,
                .eps = 1e-6f,
                .quantize = how});
  vector<double> want;
  for (uint32_t i = 0; i < t; ++i)
    std::ranges::copy(normed(vector<double>(residual.begin() + i * width, residual.begin() + (i + 1) * width), w, 1e-6),
                      std::back_inserter(want));
  check(out, want);

  const Typed x(act, test::normal(size_t{t} * 2 * width));
  backend.geglu({.gate_up = x.data(), .out = out.data(), .tokens = t, .ffn = width, .quantize = how});
  want.clear();
  for (uint32_t i = 0; i < t; ++i)
    for (uint32_t j = 0; j < width; ++j) {
      const double g = x.wide[i * 2 * width + j], u = x.wide[i * 2 * width + width + j];
      want.push_back(0.5 * g * (1 + std::tanh(std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g))) * u);
    }
  check(out, want);
}

// RoPE into an FP8 cache and attention over one, against a float32 cache.
void fp8_cache(Backend& backend, Backend& exact, DType act, Scene scene) {
  const uint32_t dim = scene.dim, heads = scene.heads, kv = scene.kv_heads, width = (heads + 2 * kv) * dim;
  const Typed qkv(act, test::normal(size_t{scene.tokens()} * width));
  vector<float> frequency;
  for (uint32_t i = 0; i < dim / 2; ++i) frequency.push_back(std::pow(10000.0f, -2.0f * float(i) / float(dim)));
  const auto head_of = [&](size_t run) { return run / scene.page_size % kv; };
  Coded keys(scene.cache_size(), dim, kv, head_of), values(scene.cache_size(), dim, kv, head_of);
  Output q(act, size_t{scene.tokens()} * heads * dim), wide_q(DType::f32, q.wide.size());
  const KvLayer cache{keys.codes.data(),  values.codes.data(), DType::e4m3, scene.page_size, kv, dim,
                      keys.scales.data(), values.scales.data()};
  const KvLayer wide_cache{keys.wide.data(), values.wide.data(), DType::f32, scene.page_size, kv, dim};
  RopeArgs rope{.qkv = qkv.data(),
                .positions = scene.positions.data(),
                .slots = scene.slots.data(),
                .inverse_frequency = frequency.data(),
                .eps = 1e-6f,
                .heads = heads,
                .q = q.data(),
                .cache = cache,
                .tokens = scene.tokens()};
  backend.rope(rope);
  rope.qkv = qkv.wide.data(), rope.q = wide_q.data(), rope.cache = wide_cache;
  exact.rope(rope);
  for (size_t s = 0; s < scene.lengths.size(); ++s)
    for (uint32_t row = scene.cu[s]; row < scene.cu[s + 1]; ++row)
      for (uint32_t h = 0; h < kv; ++h)
        for (size_t at = scene.at(s, scene.positions[row], h), i = at; i < at + dim; ++i) {
          CHECK(rounds_to(keys.codes[i], double(keys.wide[i]) / keys.scales[h], 1e-5));
          CHECK(rounds_to(values.codes[i], double(values.wide[i]) / values.scales[h], 1e-5));
          keys.wide[i] = to_float(keys.codes[i]) * keys.scales[h];
          values.wide[i] = to_float(values.codes[i]) * values.scales[h];
        }

  const vector<float> queries = q.values();
  Output out(act, q.wide.size()), want(DType::f32, q.wide.size());
  AttentionArgs args{.q = q.data(),
                     .cache = cache,
                     .cu_seqlens = scene.cu.data(),
                     .kv_len = scene.lengths.data(),
                     .block_table = scene.table.data(),
                     .sequences = uint32_t(scene.lengths.size()),
                     .max_pages = scene.max_pages,
                     .heads = heads,
                     .window = 0,
                     .scale = 0.2f,
                     .soft_cap = 3,
                     .out = out.data(),
                     .tokens = scene.tokens()};
  backend.attention(args);
  vector<e4m3> quantized(q.wide.size());
  const float scale = 0.05f;
  args.out = quantized.data(), args.quantize.scale = &scale;
  backend.attention(args);
  args.q = queries.data(), args.cache = wide_cache, args.out = want.data(), args.quantize = {};
  exact.attention(args);
  CHECK(test::relative_error(out.values(), vector<double>(want.wide.begin(), want.wide.end())) < limit(act));
  for (size_t i = 0; i < quantized.size(); ++i) CHECK(rounds_to(quantized[i], double(want.wide[i]) / scale, 1e-4));
}

void soft_cap(Backend& backend) {
  vector<float> x = test::normal(3 * 1001, 40.0f);
  x[0] = 1e30f, x[1] = -1e30f, x[2] = 0;
  const vector<float> before = x;
  backend.soft_cap({.x = x.data(), .rows = 3, .cols = 1001, .cap = 30.0f});
  for (size_t i = 0; i < x.size(); ++i) CHECK(std::abs(x[i] - 30 * std::tanh(double(before[i]) / 30)) < 1e-5);
}

void reductions(const reference::Kernels& kernels) {
  for (size_t count : {1u, 3u, 16u, 17u, 5000u}) {
    vector<float> x = test::normal(count, 5.0f);
    const float largest = *std::ranges::max_element(x);
    CHECK(kernels.max(x.data(), count) == largest);
    double want = 0;
    for (float v : x) want += std::exp(double(v) - largest);
    CHECK(std::abs(kernels.sum_exp(x.data(), count, largest) / want - 1) < 1e-5);
    x[test::below(uint32_t(count))] = NAN;
    CHECK(std::isnan(kernels.max(x.data(), count)));
  }
}

void all(const reference::Kernels& kernels, DType act) {
  const auto backend = reference::make_backend(2, kernels, act);
  for (DType weight : {DType::f32, DType::bf16}) {
    if (act == DType::bf16 && weight == DType::f32) continue;
    for (DType out : {DType::f32, act})
      for (auto [t, n, k] : {std::array{1u, 1u, 1u}, {1u, 5u, 31u}, {3u, 70u, 33u}, {4u, 64u, 640u}, {9u, 35u, 97u}})
        gemm(*backend, act, weight, out, t, n, k);
    embed(*backend, weight);
    gather_rows(*backend);
  }
  for (uint32_t h : {1u, 40u, 641u})
    for (bool delta : {false, true})
      for (bool post : {false, true}) norm(*backend, act, 3, h, delta, post);
  for (auto [heads, kv_heads, dim] : {std::array{4u, 1u, 256u}, {4u, 4u, 128u}, {8u, 2u, 18u}, {3u, 3u, 2u}})
    for (uint32_t page_size : {1u, 4u, 16u}) {
      for (uint32_t window : {0u, 1u, 7u})
        for (float cap : {0.0f, 3.0f}) attention(*backend, act, {heads, kv_heads, dim, page_size}, window, cap);
      for (bool with_norm : {false, true}) rope(*backend, act, {heads, kv_heads, dim, page_size}, with_norm);
    }
  for (uint32_t ffn : {1u, 48u, 129u}) geglu(*backend, act, 3, ffn);
  const auto exact = reference::make_backend(2, kernels, DType::f32);
  quantize(*backend);
  for (bool dynamic : {false, true}) {
    for (DType out : {DType::f32, act})
      for (auto [t, n, k] : {std::array{1u, 1u, 1u}, {3u, 70u, 33u}, {9u, 35u, 640u}})
        gemm_fp8(*backend, *exact, out, t, n, k, dynamic);
    fused_quantization(*backend, act, dynamic);
  }
  for (auto [heads, kv_heads, dim] : {std::array{4u, 1u, 256u}, {4u, 4u, 128u}, {8u, 2u, 18u}})
    for (uint32_t page_size : {1u, 16u}) fp8_cache(*backend, *exact, act, {heads, kv_heads, dim, page_size});
  soft_cap(*backend);
}

}  // namespace

int main() {
  for (const reference::Kernels* kernels : reference::usable_kernels()) {
    std::printf("%s\n", kernels->name);
    reductions(*kernels);
    for (DType act : {DType::f32, DType::bf16}) all(*kernels, act);
  }
}
