// The inner loops, written once over GCC's and Clang's vector types. The including file has opened an anonymous
// namespace, switched its instruction set on and defined
//
//   vf                      a vector of floats, kLanes of them
//   vf fma(vf a, vf b, vf c)  a * b + c
//
// Matrix products run along k in the lanes: weights are read as the checkpoint stores them, row by row, and the sum of
// one output is formed in the same order whatever is computed beside it.

constexpr uint32_t kLanes = sizeof(vf) / sizeof(float);
typedef uint32_t vu __attribute__((vector_size(sizeof(vf))));
typedef uint16_t vh __attribute__((vector_size(sizeof(vf) / 2)));
typedef uint8_t vb __attribute__((vector_size(sizeof(vf) / 4)));
typedef float v4 __attribute__((vector_size(16)));
typedef float v8 __attribute__((vector_size(32)));
typedef float v16 __attribute__((vector_size(64)));

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// Not std::min: an inline function of the library, compiled here for this instruction set, could be the copy that the
// linker keeps for every file.
template <class T>
inline T min2(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T max2(T a, T b) {
  return a < b ? b : a;
}

inline vf broadcast(float x) { return x - vf{}; }

inline vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline vf load(const bf16* p) {
  vh h;
  __builtin_memcpy(&h, p, sizeof h);
  return bits_as<vf>(__builtin_convertvector(h, vu) << 16);
}
// As convert.h has it.
inline vf load(const e4m3* p) {
  vb b;
  __builtin_memcpy(&b, p, sizeof b);
  const vu bits = __builtin_convertvector(b, vu), magnitude = bits & 0x7F;
  const vu value = bits_as<vu>(bits_as<vf>(magnitude << 20) * 0x1p120f), nan = bits_as<vu>(magnitude == 0x7F);
  return bits_as<vf>((nan & 0x7FC00000) | (~nan & value) | (bits & 0x80) << 24);
}
// The first n < kLanes elements, zeros behind them.
template <class T>
inline vf load_some(const T* p, uint32_t n) {
  T padded[kLanes] = {};
  __builtin_memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

inline void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
inline void store(bf16* p, vf v) {
  const vu bits = bits_as<vu>(v), nan = bits_as<vu>(v != v);
  const vu rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const vh h = __builtin_convertvector((nan & ((bits >> 16) | 0x40)) | (~nan & rounded), vh);
  __builtin_memcpy(p, &h, sizeof h);
}
inline void store(e4m3* p, vf v) {
  const vu bits = bits_as<vu>(v), nan = bits_as<vu>(v != v);
  vf magnitude = bits_as<vf>(bits & 0x7FFFFFFF);
  magnitude = magnitude > kE4m3Max ? broadcast(kE4m3Max) : magnitude;
  const vu wide = bits_as<vu>(magnitude), small = bits_as<vu>(magnitude < 0x1p-6f);
  const vu normal = ((wide + 0x7FFFF + (wide >> 20 & 1)) >> 20) - (120 << 3);
  const vu subnormal = bits_as<vu>(magnitude + 0x1p14f) - bits_as<vu>(broadcast(0x1p14f));
  const vu rounded = ((small & subnormal) | (~small & normal)) | (bits >> 24 & 0x80);
  const vb b = __builtin_convertvector((nan & 0x7F) | (~nan & rounded), vb);
  __builtin_memcpy(p, &b, sizeof b);
}
template <class T>
inline void store_some(T* p, vf v, uint32_t n) {
  T padded[kLanes];
  store(padded, v);
  __builtin_memcpy(p, padded, n * sizeof(T));
}

// Calls f(i, n) for runs of kLanes elements, and once more for what is left.
template <class F>
inline void for_lanes(uint32_t count, F f) {
  uint32_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(i, kLanes);
  if (i < count) f(i, count - i);
}
template <class T>
inline vf load_run(const T* p, uint32_t n) {
  return n == kLanes ? load(p) : load_some(p, n);
}
template <class T>
inline void store_run(T* p, vf v, uint32_t n) {
  if (n == kLanes)
    store(p, v);
  else
    store_some(p, v, n);
}

inline v4 fold(v4 v) { return v; }
inline v4 fold(v8 v) {
  v4 half[2];
  __builtin_memcpy(half, &v, sizeof v);
  return half[0] + half[1];
}
inline v4 fold(v16 v) {
  v8 half[2];
  __builtin_memcpy(half, &v, sizeof v);
  return fold(half[0] + half[1]);
}

// The sums of four vectors, each formed as (l0 + l2) + (l1 + l3) of its folded lanes.
inline v4 sum4(vf a, vf b, vf c, vf d) {
  v4 r0 = fold(a), r1 = fold(b), r2 = fold(c), r3 = fold(d);
#if defined(__SSE2__)
  __m128 m0 = r0, m1 = r1, m2 = r2, m3 = r3;
  _MM_TRANSPOSE4_PS(m0, m1, m2, m3);
  return (m0 + m2) + (m1 + m3);
#else
  auto sum = [](v4 r) { return (r[0] + r[2]) + (r[1] + r[3]); };
  return v4{sum(r0), sum(r1), sum(r2), sum(r3)};
#endif
}
inline float sum(vf v) { return sum4(v, vf{}, vf{}, vf{})[0]; }

// exp to about 1 ulp for finite x; results below the smallest normal float become 0.
inline vf exp(vf x) {
  const vf low = broadcast(-87.33654f), high = broadcast(88.37f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const vf shifted = fma(x, broadcast(1.44269504f), broadcast(12582912.0f));  // n in the low mantissa bits
  const vf n = shifted - 12582912.0f;
  vf r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  vf p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  const vf y = bits_as<vf>(bits_as<vu>(p) + (bits_as<vu>(shifted) << 23));
  return x <= low ? vf{} : y;
}

inline vf tanh(vf x) { return 1.0f - 2.0f / (exp(2.0f * x) + 1.0f); }

// 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3)
inline vf gelu_tanh(vf x) {
  const vf u = 0.7978845608f * x * fma(0.044715f * x, x, broadcast(1.0f));
  return x / (1.0f + exp(-2.0f * u));
}

// How two rows are multiplied and added up, `kStep` elements at a time.
template <class X, class W>
struct Mac {
  static constexpr uint32_t kStep = kLanes;
  template <class T>
  static vf read(const T* p) {
    return load(p);
  }
  template <class T>
  static vf read_some(const T* p, uint32_t n) {
    return load_some(p, n);
  }
  static vf mac(vf a, vf b, vf c) { return fma(a, b, c); }
};
#if defined(GEMMA_CUDA_DPBF16)
template <>
struct Mac<bf16, bf16> {
  static constexpr uint32_t kStep = 2 * kLanes;
  static __m512bh read(const bf16* p) { return bits_as<__m512bh>(_mm512_loadu_si512(p)); }
  static __m512bh read_some(const bf16* p, uint32_t n) {
    return bits_as<__m512bh>(_mm512_maskz_loadu_epi16((1u << n) - 1, p));
  }
  static vf mac(__m512bh a, __m512bh b, vf c) { return _mm512_dpbf16_ps(c, a, b); }
};
#endif

// out[m][j] = x[m] . w[j]
template <int M, class X, class W>
inline void tile(const X* const (&x)[M], const W* const (&w)[4], uint32_t k, v4 (&out)[M]) {
  using D = Mac<X, W>;
  vf acc[M][4] = {};
  auto step = [&](auto read) {
    const auto b0 = read(w[0]), b1 = read(w[1]), b2 = read(w[2]), b3 = read(w[3]);
    for (int m = 0; m < M; ++m) {
      const auto a = read(x[m]);
      acc[m][0] = D::mac(a, b0, acc[m][0]);
      acc[m][1] = D::mac(a, b1, acc[m][1]);
      acc[m][2] = D::mac(a, b2, acc[m][2]);
      acc[m][3] = D::mac(a, b3, acc[m][3]);
    }
  };
  uint32_t i = 0;
  for (; i + D::kStep <= k; i += D::kStep) step([i](auto p) { return D::read(p + i); });
  if (i < k) step([i, k](auto p) { return D::read_some(p + i, k - i); });
  for (int m = 0; m < M; ++m) out[m] = sum4(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
}

// A token's scale, and what its elements are multiplied by to become FP8.
inline float scale_of(const Quantize& quantize, uint32_t row) {
  return quantize.scale ? *quantize.scale : quantize.row_scales[row];
}

// Writes y(i, n), the row's elements from i on, as T or as FP8; y is asked twice where the scale depends on it.
template <class T, class F>
inline void write_row(const Quantize& quantize, void* out, uint32_t row, uint32_t width, F y) {
  if (!quantize) {
    T* to = static_cast<T*>(out) + size_t{row} * width;
    return for_lanes(width, [&](uint32_t i, uint32_t n) { store_run(to + i, y(i, n), n); });
  }
  if (quantize.row_scales) {
    float largest = 0;
    for_lanes(width, [&](uint32_t i, uint32_t n) {
      const vf v = y(i, n);
      for (uint32_t lane = 0; lane < n; ++lane) largest = max2(largest, v[lane] < 0 ? -v[lane] : v[lane]);
    });
    quantize.row_scales[row] = largest == 0 ? 1.0f : largest / kE4m3Max;
  }
  const float inverse = 1.0f / scale_of(quantize, row);
  e4m3* to = static_cast<e4m3*>(out) + size_t{row} * width;
  for_lanes(width, [&](uint32_t i, uint32_t n) { store_run(to + i, y(i, n) * inverse, n); });
}

void quantize_row(const QuantizeArgs& args, uint32_t row) {
  auto write = [&]<class T>(const T* x) {
    write_row<T>(args.how, args.out, row, args.width,
                 [&](uint32_t i, uint32_t n) { return load_run(x + size_t{row} * args.width + i, n); });
  };
  args.dtype == DType::f32 ? write(static_cast<const float*>(args.x)) : write(static_cast<const bf16*>(args.x));
}

// M rows of out, columns [begin, end). `x` is the first of all rows, `w` that of column `begin`.
template <int M, class X, class W, class Out>
inline void gemm_rows(const GemmArgs& args, const X* all_x, const W* all_w, uint32_t row, uint32_t begin,
                      uint32_t end) {
  const uint32_t k = args.w.cols, n = args.w.rows;
  const X* x[M];
  for (int m = 0; m < M; ++m) x[m] = all_x + size_t{row + m} * k;
  for (uint32_t column = begin; column < end; column += 4) {
    const W* w[4];  // past the end the last row again: computed, not stored
    for (uint32_t j = 0; j < 4; ++j) w[j] = all_w + size_t{min2(column + j, end - 1) - begin} * k;
    v4 sums[M];
    tile<M>(x, w, k, sums);
    for (int m = 0; m < M; ++m)
      for (uint32_t j = 0; j < min2(4u, end - column); ++j) {
        float sum = sums[m][j];
        if (args.w.scales) sum *= scale_of(args.x_scale, row + m) * args.w.scales[column + j];
        static_cast<Out*>(args.out)[size_t{row + m} * n + column + j] = from_float<Out>(sum);
      }
  }
}

// Blocks of columns stay in the second-level cache while the rows pass, four at a time. `block(column, count)` is where
// the rows of w for these columns are.
template <class X, class Out, class F>
inline void gemm_blocks(const GemmArgs& args, const X* x, uint32_t begin, uint32_t end, F block) {
  for (uint32_t column = begin; column < end; column += kGemmBlock) {
    const uint32_t stop = min2(column + kGemmBlock, end);
    const auto* w = block(column, stop - column);
    uint32_t row = 0;
    for (; row + 4 <= args.tokens; row += 4)
      gemm_rows<4, X, std::remove_cvref_t<decltype(*w)>, Out>(args, x, w, row, column, stop);
    for (; row < args.tokens; ++row)
      gemm_rows<1, X, std::remove_cvref_t<decltype(*w)>, Out>(args, x, w, row, column, stop);
  }
}

template <class X, class W, class Out>
inline void gemm_typed(const GemmArgs& args, uint32_t begin, uint32_t end) {
  const W* w = static_cast<const W*>(args.w.data);
  gemm_blocks<X, Out>(args, static_cast<const X*>(args.x), begin, end,
                      [&](uint32_t column, uint32_t) { return w + size_t{column} * args.w.cols; });
}

inline void widen(const e4m3* from, bf16* to, size_t count) {
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = from_float<bf16>(to_float(from[i]));
}

// bf16 holds all of E4M3: x is widened once, w block by block, into `scratch`, [tokens + kGemmBlock, k].
template <class Out>
inline void gemm_fp8(const GemmArgs& args, uint32_t begin, uint32_t end, bf16* scratch) {
  const size_t k = args.w.cols;
  const e4m3* w = static_cast<const e4m3*>(args.w.data);
  bf16* block = scratch + args.tokens * k;
  widen(static_cast<const e4m3*>(args.x), scratch, args.tokens * k);
  gemm_blocks<bf16, Out>(args, scratch, begin, end, [&](uint32_t column, uint32_t count) {
    widen(w + column * k, block, count * k);
    return static_cast<const bf16*>(block);
  });
}

void gemm(const GemmArgs& args, DType act, uint32_t begin, uint32_t end, bf16* scratch) {
  const bool f32_out = args.out_dtype == DType::f32, f32_w = args.w.dtype == DType::f32;
  if (args.w.dtype == DType::e4m3)
    f32_out ? gemm_fp8<float>(args, begin, end, scratch) : gemm_fp8<bf16>(args, begin, end, scratch);
  else if (act == DType::bf16)
    f32_out ? gemm_typed<bf16, bf16, float>(args, begin, end) : gemm_typed<bf16, bf16, bf16>(args, begin, end);
  else
    f32_w ? gemm_typed<float, float, float>(args, begin, end) : gemm_typed<float, bf16, float>(args, begin, end);
}

template <class T>
inline float inverse_rms(const T* x, uint32_t count, float eps) {
  vf squares = {};
  for_lanes(count, [&](uint32_t i, uint32_t n) {
    const vf v = load_run(x + i, n);
    squares = fma(v, v, squares);
  });
  return 1.0f / std::sqrt(sum(squares) / static_cast<float>(count) + eps);
}

template <class T>
inline void norm_typed(const NormArgs& args, uint32_t row) {
  const uint32_t hidden = args.hidden;
  float* residual = args.residual + size_t{args.rows ? args.rows[row] : row} * hidden;
  if (args.delta) {
    const T* delta = static_cast<const T*>(args.delta) + size_t{row} * hidden;
    const float scale = args.delta_weight ? inverse_rms(delta, hidden, args.eps) : 1.0f;
    for_lanes(hidden, [&](uint32_t i, uint32_t n) {
      vf d = load_run(delta + i, n);
      if (args.delta_weight) d = d * scale * (1.0f + load_run(args.delta_weight + i, n));
      store_run(residual + i, load_run(residual + i, n) + d, n);
    });
  }
  if (!args.weight) return;
  const float scale = inverse_rms(residual, hidden, args.eps);
  write_row<T>(args.quantize, args.out, row, hidden, [&](uint32_t i, uint32_t n) {
    return load_run(residual + i, n) * scale * (1.0f + load_run(args.weight + i, n));
  });
}

void norm_row(const NormArgs& args, DType act, uint32_t row) {
  act == DType::bf16 ? norm_typed<bf16>(args, row) : norm_typed<float>(args, row);
}

// One head: norm, then rotation of the halves, then a factor; in and out may not overlap.
template <class T, class Out>
inline void rotate_head(const T* in, Out* out, const float* norm, const float* cosine, const float* sine, float eps,
                        uint32_t head_dim, float factor) {
  const uint32_t half = head_dim / 2;
  const float scale = norm ? inverse_rms(in, head_dim, eps) : 1.0f;
  auto read = [&](uint32_t i, uint32_t n) {
    const vf x = load_run(in + i, n);
    return norm ? x * scale * (1.0f + load_run(norm + i, n)) : x;
  };
  for_lanes(half, [&](uint32_t i, uint32_t n) {
    const vf a = read(i, n), b = read(half + i, n), c = load_run(cosine + i, n), s = load_run(sine + i, n);
    store_run(out + i, (a * c - b * s) * factor, n);
    store_run(out + half + i, (b * c + a * s) * factor, n);
  });
}

// T: activations, C: the cache's elements.
template <class T, class C>
inline void rope_typed(const RopeArgs& args, uint32_t row) {
  const KvLayer& cache = args.cache;
  const uint32_t dim = cache.head_dim, heads = args.heads, kv_heads = cache.kv_heads;
  float cosine[kMaxHeadDim / 2], sine[kMaxHeadDim / 2];
  for (uint32_t i = 0; i < dim / 2; ++i) {
    const float angle = static_cast<float>(args.positions[row]) * args.inverse_frequency[i];
    cosine[i] = std::cos(angle);
    sine[i] = std::sin(angle);
  }
  const T* qkv = static_cast<const T*>(args.qkv) + size_t{row} * (heads + 2 * kv_heads) * dim;
  T* q = static_cast<T*>(args.q) + size_t{row} * heads * dim;
  for (uint32_t h = 0; h < heads; ++h)
    rotate_head(qkv + h * dim, q + h * dim, args.q_norm, cosine, sine, args.eps, dim, 1.0f);

  if (args.slots[row] == kNoSlot) return;
  const T* k = qkv + heads * dim;
  const T* v = k + kv_heads * dim;
  const uint32_t page = args.slots[row] / cache.page_size, offset = args.slots[row] % cache.page_size;
  for (uint32_t h = 0; h < kv_heads; ++h) {
    const size_t at = ((size_t{page} * kv_heads + h) * cache.page_size + offset) * dim;
    const float key_factor = cache.key_scales ? 1.0f / cache.key_scales[h] : 1.0f;
    const float value_factor = cache.value_scales ? 1.0f / cache.value_scales[h] : 1.0f;
    rotate_head(k + h * dim, static_cast<C*>(cache.keys) + at, args.k_norm, cosine, sine, args.eps, dim, key_factor);
    C* values = static_cast<C*>(cache.values) + at;
    for_lanes(dim,
              [&](uint32_t i, uint32_t n) { store_run(values + i, load_run(v + h * dim + i, n) * value_factor, n); });
  }
}

// Calls f with the types of activations and of the cache.
template <class F>
inline void with_types(DType act, DType cache, F f) {
  if (cache == DType::e4m3)
    act == DType::bf16 ? f(bf16{}, e4m3{}) : f(float{}, e4m3{});
  else
    act == DType::bf16 ? f(bf16{}, bf16{}) : f(float{}, float{});
}

void rope_row(const RopeArgs& args, DType act, uint32_t row) {
  with_types(act, args.cache.dtype, [&]<class T, class C>(T, C) { rope_typed<T, C>(args, row); });
}

void soft_cap(float* x, size_t count, float cap) {
  for_lanes(static_cast<uint32_t>(count),
            [&](uint32_t i, uint32_t n) { store_run(x + i, cap * tanh(load_run(x + i, n) / cap), n); });
}

float max(const float* x, size_t count) {
  vf largest = broadcast(-__builtin_inff());
  vu nan = {};
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const vf v = load(x + i);
    largest = v > largest ? v : largest;
    nan |= bits_as<vu>(v != v);
  }
  float best = -__builtin_inff();
  uint32_t any_nan = 0;
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    best = max2(best, largest[lane]);
    any_nan |= nan[lane];
  }
  for (; i < count; ++i) {
    best = max2(best, x[i]);
    any_nan |= x[i] != x[i];
  }
  return any_nan ? __builtin_nanf("") : best;
}

// scores[p - first] = scale q . k_p
template <class T, class C>
inline void attention_scores(const AttentionArgs& args, float scale, const T* q, const C* keys, const uint32_t* pages,
                             size_t page_stride, uint32_t first, uint32_t last, float* scores) {
  const uint32_t dim = args.cache.head_dim, page_size = args.cache.page_size;
  for (uint32_t p = first; p <= last; p += 4) {
    const C* k[4];  // past the end the last key again; `scores` has room for it
    for (uint32_t j = 0; j < 4; ++j) {
      const uint32_t at = min2(p + j, last);
      k[j] = keys + pages[at / page_size] * page_stride + size_t{at % page_size} * dim;
    }
    v4 products[1];
    const T* const x[1] = {q};
    tile<1>(x, k, dim, products);
    const v4 scaled = products[0] * scale;
    __builtin_memcpy(scores + (p - first), &scaled, sizeof scaled);
  }
}

// out = sum_p weights[p] v_p / total, `N` vectors of the head at a time.
template <int N, class T, class C>
inline void weighted_values(const C* values, const uint32_t* pages, size_t page_stride, uint32_t page_size,
                            uint32_t dim, uint32_t first, uint32_t last, const float* weights, float total, T* out) {
  vf acc[N] = {};
  for (uint32_t p = first; p <= last; ++p) {
    const C* v = values + pages[p / page_size] * page_stride + size_t{p % page_size} * dim;
    const vf weight = broadcast(weights[p - first]);
    for (int j = 0; j < N; ++j) acc[j] = fma(weight, load(v + j * kLanes), acc[j]);
  }
  for (int j = 0; j < N; ++j) store(out + j * kLanes, acc[j] / total);
}

// T: activations, C: the cache's elements, Out: the result's, which is multiplied by `factor`.
template <class T, class C, class Out>
inline void attend_typed(const AttentionArgs& args, uint32_t row, uint32_t sequence, uint32_t head, uint32_t first,
                         uint32_t last, float* scores, float factor) {
  const KvLayer& cache = args.cache;
  const uint32_t dim = cache.head_dim, kv_head = head / (args.heads / cache.kv_heads);
  const uint32_t* pages = args.block_table + size_t{sequence} * args.max_pages;
  const size_t page_stride = size_t{cache.kv_heads} * cache.page_size * dim;
  const size_t head_at = size_t{kv_head} * cache.page_size * dim;
  const T* q = static_cast<const T*>(args.q) + (size_t{row} * args.heads + head) * dim;
  Out* out = static_cast<Out*>(args.out) + (size_t{row} * args.heads + head) * dim;

  const uint32_t count = last - first + 1;
  const float scale = cache.key_scales ? args.scale * cache.key_scales[kv_head] : args.scale;
  attention_scores(args, scale, q, static_cast<const C*>(cache.keys) + head_at, pages, page_stride, first, last,
                   scores);
  if (args.soft_cap > 0) soft_cap(scores, count, args.soft_cap);
  const float largest = max(scores, count);
  vf totals = {};
  for_lanes(count, [&](uint32_t i, uint32_t n) {
    vf e = exp(load_run(scores + i, n) - largest);
    if (n < kLanes) {
      store_some(scores + i, e, n);
      e = load_some(scores + i, n);  // nothing behind the last score
    } else {
      store(scores + i, e);
    }
    totals = totals + e;
  });
  if (cache.value_scales) factor *= cache.value_scales[kv_head];
  const float total = sum(totals) / factor;

  const C* values = static_cast<const C*>(cache.values) + head_at;
  uint32_t d = 0;
  for (; d + 8 * kLanes <= dim; d += 8 * kLanes)
    weighted_values<8>(values + d, pages, page_stride, cache.page_size, dim, first, last, scores, total, out + d);
  for (; d + kLanes <= dim; d += kLanes)
    weighted_values<1>(values + d, pages, page_stride, cache.page_size, dim, first, last, scores, total, out + d);
  for (; d < dim; ++d) {
    float acc = 0;
    for (uint32_t p = first; p <= last; ++p)
      acc += scores[p - first] *
             to_float(values[pages[p / cache.page_size] * page_stride + size_t{p % cache.page_size} * dim + d]);
    out[d] = from_float<Out>(acc / total);
  }
}

void attend(const AttentionArgs& args, DType act, uint32_t row, uint32_t sequence, uint32_t head, uint32_t first,
            uint32_t last, float* scores) {
  with_types(act, args.cache.dtype, [&]<class T, class C>(T, C) {
    if (args.quantize)
      attend_typed<T, C, e4m3>(args, row, sequence, head, first, last, scores, 1.0f / *args.quantize.scale);
    else
      attend_typed<T, C, T>(args, row, sequence, head, first, last, scores, 1.0f);
  });
}

template <class T>
inline void geglu_typed(const GegluArgs& args, uint32_t row) {
  const T* gate = static_cast<const T*>(args.gate_up) + size_t{row} * 2 * args.ffn;
  const T* up = gate + args.ffn;
  write_row<T>(args.quantize, args.out, row, args.ffn,
               [&](uint32_t i, uint32_t n) { return gelu_tanh(load_run(gate + i, n)) * load_run(up + i, n); });
}

void geglu_row(const GegluArgs& args, DType act, uint32_t row) {
  act == DType::bf16 ? geglu_typed<bf16>(args, row) : geglu_typed<float>(args, row);
}

double sum_exp(const float* x, size_t count, float largest) {
  double total = 0;
  constexpr size_t kRun = 4096;  // short float sums, added up in double
  for (size_t begin = 0; begin < count; begin += kRun) {
    vf run = {};
    for_lanes(static_cast<uint32_t>(min2(kRun, count - begin)), [&](uint32_t i, uint32_t n) {
      vf e = exp(load_run(x + begin + i, n) - largest);
      if (n < kLanes) {
        float kept[kLanes] = {};
        store_some(kept, e, n);
        e = load(kept);
      }
      run = run + e;
    });
    total += sum(run);
  }
  return total;
}
