// A packed output embedding (packed_bf16.h): every number comes back as it was, products are the same to the bit as
// those of the matrix itself, and what cannot be packed is refused. With the argument "tiny": as much as a sanitizer
// has time for.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <string>

#include "core/sample_plan.h"
#include "cuda/packed_bf16.h"
#include "cuda/skinny_gemm.h"
#include "suite.h"

namespace {

constexpr uint32_t kTokens = cuda::kSkinnyTokens;

class PackedHead : Suite {
 public:
  // As weights are, with zeros, rows of zeros, rows of other sizes and numbers far below the others of their row.
  PackedHead(uint32_t rows, uint32_t cols) : Suite(test::gpu()), rows_(rows), cols_(cols) {
    vector<bf16> w;
    for (float x : test::normal(size_t{rows} * cols, 0.02f)) w.push_back(to_bf16(x));
    for (uint32_t row = 0; row < rows; ++row) {
      const float scale = row % 7 == 1 ? 1e5f : row % 7 == 2 ? 1e-30f : row % 7 == 3 ? 0.0f : 1.0f;
      for (uint32_t i = 0; i < cols; ++i) w[at(row, i)] = to_bf16(to_float(w[at(row, i)]) * scale);
      if (row % 13 == 0) w[at(row, test::below(cols))] = to_bf16(1.37e-12f * scale);
      if (row % 5 == 1) w[at(row, test::below(cols))] = to_bf16(-0.0f);
      if (row % 5 == 2) w[at(row, test::below(cols))] = to_bf16(-0x1.8p-24f * scale);
      if (row % 32 == 9) w[at(row, test::below(cols))] = bf16{0x0047};  // below what is normal
    }
    w_ = both(std::move(w));
  }

  bool works() { return gpu_->packed_bytes(matrix()) > 0; }

  void pack() {
    packed_ = Buffer(*gpu_, gpu_->packed_bytes(matrix()));
    CHECK(gpu_->pack(matrix(), packed_.data()));
  }

  // Logits of ones in one column at a time are the weights themselves.
  void numbers_come_back() {
    for (uint32_t first = 0; first < cols_; first += kTokens) {
      vector<bf16> x(size_t{kTokens} * cols_);
      const uint32_t count = std::min(kTokens, cols_ - first);
      for (uint32_t i = 0; i < count; ++i) x[size_t{i} * cols_ + first + i] = to_bf16(1);
      const vector<float> got = logits(both(std::move(x)), kTokens, true);
      for (uint32_t i = 0; i < count; ++i)
        for (uint32_t row = 0; row < rows_; ++row)
          CHECK(got[size_t{i} * rows_ + row] == to_float(w_.host[at(row, first + i)]));
    }
  }

  // As of the matrix itself, whose sums may be added in other parts; a token's the same to the bit in every batch.
  void products_are_right() {
    const Both<bf16> x = random(size_t{kTokens} * cols_);
    const vector<float> all = logits(x, kTokens, true);
    CHECK(test::relative_error(all, logits(x, kTokens, false)) < 1e-6);
    for (uint32_t t : {1u, 7u, 16u, 31u})
      CHECK(std::memcmp(logits(x, t, true).data(), all.data(), size_t{t} * rows_ * sizeof(float)) == 0);
  }

  // What a slot and a row have no room for.
  void refuses() {
    const vector<bf16> before = w_.host;
    const auto packs = [&](const std::function<void(vector<bf16>&)>& change) {
      vector<bf16> w = before;
      change(w);
      w_ = both(std::move(w));
      const bool done = gpu_->pack(matrix(), packed_.data());
      w_ = both(before);
      return done;
    };
    const auto tiny = [&](uint32_t count) {
      return [this, count](vector<bf16>& w) {
        for (uint32_t row = 0; row < std::min(rows_, cuda::kPackedRows); ++row)
          for (uint32_t i = 0; i < cols_; ++i) w[at(row, i)] = to_bf16(1);
        for (uint32_t i = 0; i < count; ++i) w[at(3 + i / 8, 5 + i % 8)] = to_bf16(1e-9f);
      };
    };
    CHECK(packs(tiny(cuda::kMostExceptions)));
    CHECK(!packs(tiny(cuda::kMostExceptions + 1)));
    const auto last_row = [&](float x) {
      return [this, x](vector<bf16>& w) { std::fill(w.end() - cols_, w.end(), to_bf16(x)); };
    };
    CHECK(packs(last_row(65280)) && packs(last_row(1e-39f)));
    for (const float x : {65535.0f, -65536.0f, INFINITY, NAN}) CHECK(!packs(last_row(x)));
  }

 private:
  size_t at(uint32_t row, uint32_t column) const { return size_t{row} * cols_ + column; }
  Matrix matrix() const { return {w_.gpu(), DType::bf16, rows_, cols_}; }

  vector<float> logits(const Both<bf16>& x, uint32_t t, bool packed) {
    SamplePlan plan;
    for (uint32_t row = 0; row < t; ++row) plan.score(row, 0, 0);
    auto tasks = both(plan.tasks);
    auto adjustments = both(plan.adjustments);
    auto out = both(vector<float>(size_t{t} * rows_, NAN));
    auto last = both(vector<uint32_t>(t));
    GemmArgs product{x.gpu(), matrix(), out.gpu(), DType::f32, t};
    if (packed) product.w.packed = packed_.data();
    CHECK(cuda::skinny_surveyed_gemm_fits(product, device_));
    gpu_->sampled_gemm(product, 0,
                       {.logits = out.gpu(),
                        .vocab = rows_,
                        .tasks = tasks.gpu(),
                        .adjustments = adjustments.gpu(),
                        .count = t,
                        .max_top = plan.max_top,
                        .last_tokens = last.gpu()});
    gpu_->start_results(t, plan.max_top);
    gpu_->finish_results();
    return download(out);
  }

  const uint32_t rows_, cols_;
  Both<bf16> w_;
  Buffer packed_;
};

void run(uint32_t rows, uint32_t cols) {
  PackedHead head(rows, cols);
  if (!head.works()) return std::puts("  this GPU reads no packed weights"), void();
  head.pack();
  head.numbers_come_back();
  head.products_are_right();
  head.refuses();
  std::printf("  %u x %u: as it was\n", rows, cols);
}

}  // namespace

int main(int argc, char** argv) {
  const bool tiny = argc > 1 && std::string(argv[1]) == "tiny";
  run(128, 64);
  run(517, 200);               // neither tiles nor slots are full
  run(2000, 640);              // tiles that several blocks have
  if (!tiny) run(60000, 320);  // and such that one has
}
