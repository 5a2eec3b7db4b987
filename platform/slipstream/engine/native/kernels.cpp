// The parts of a decode step that are many small operations in torch, one call each: norms, rotary embedding, attention
// over paged keys, the gated activation, adapters. Arithmetic is float32 on values widened from T, rounded to T where
// torch's own operations would round. Every row is computed in one order that does not depend on its company or on the
// number of threads. Portable vectors, which the compiler lowers to whatever the processor has. Products in bfloat16 (base
// GEMM, adapters, attention) have versions for AVX512-BF16, an LM head in 8 bits one for AVX512-VNNI.
//
// Each operation is the work of a team of threads, shared out by `omp for`, at whose end they meet. An export opens a region
// for one operation; `decode` opens one for a whole step.
//
// Pointers and shapes are not checked here: whoever chooses these kernels has (`kernels.py`).
// Widths of hidden states and MLPs, head dimensions and blocks are whole multiples of 16.

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

constexpr int kLanes = 16;
typedef float F __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t I __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t H __attribute__((vector_size(2 * kLanes)));

struct bf16 {
  std::uint16_t bits;
};

inline F splat(float x) { return F{} + x; }

template <class V, class P>
inline V read(const P* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class W>
inline V cast_bits(W w) {
  V v;
  static_assert(sizeof v == sizeof w);
  std::memcpy(&v, &w, sizeof v);
  return v;
}

inline F load(const float* p) { return read<F>(p); }
inline F load(const bf16* p) { return cast_bits<F>(__builtin_convertvector(read<H>(p), U) << 16); }

inline U round_bits(F x) {  // to nearest even, as torch rounds to bfloat16; not-a-number stays that
  U u = cast_bits<U>(x);
  U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  U nan = cast_bits<U>(I(x != x));
  return (rounded & ~nan) | (nan & 0x7fc0u);
}
inline void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
inline void store(bf16* p, F x) {
  H h = __builtin_convertvector(round_bits(x), H);
  std::memcpy(p, &h, sizeof h);
}
inline F rounded(const float*, F x) { return x; }
inline F rounded(const bf16*, F x) { return cast_bits<F>(round_bits(x) << 16); }

// The first `lanes` of a vector: for ends that are no whole vector.
template <class T>
inline F load(const T* p, int lanes) {
  if (lanes == kLanes) return load(p);
  T whole[kLanes] = {};
  std::memcpy(whole, p, lanes * sizeof(T));
  return load(whole);
}
template <class T>
inline void store(T* p, F x, int lanes) {
  if (lanes == kLanes) return store(p, x);
  T whole[kLanes];
  store(whole, x);
  std::memcpy(p, whole, lanes * sizeof(T));
}

// Weights are read once a step and in order, but from matrices of a page or two, at whose ends no processor guesses on.
template <class T>
inline void prefetch(const T* p, int ahead) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + ahead);
}

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return cast_bits<float>(std::uint32_t(x.bits) << 16); }

inline float sum(F x) {
  float a[kLanes];
  std::memcpy(a, &x, sizeof x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) a[i] += a[i + width];
  return a[0];
}
inline float largest(F x) {
  float best = x[0];
  for (int i = 1; i < kLanes; i++) best = x[i] > best ? x[i] : best;
  return best;
}
inline F choose(I mask, F yes, F no) { return mask ? yes : no; }

// e^x for x <= 88; below -87 it is 0. Cephes' polynomial, about one unit in the last place.
inline F exp(F x) {
  I tiny = x < -87.0f;
  F n = x * 1.44269504088896341f;
  n = cast_bits<F>(cast_bits<I>(n + 12582912.0f)) - 12582912.0f;  // to the nearest integer
  F r = x - n * 0.693359375f - n * -2.12194440e-4f;
  F p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  F y = p * r * r + r + 1.0f;
  I scale = (__builtin_convertvector(n, I) + 127) << 23;
  return choose(tiny, F{}, y * cast_bits<F>(scale));
}

inline F silu(F x) {
  F small = exp(choose(x < 0.0f, x, -x));  // of a number that is never positive, so that nothing overflows
  return x * (choose(x < 0.0f, small, splat(1.0f)) / (1.0f + small));
}

// ---- norms and activations ------------------------------------------------------------------------------------------

// RMSNorm of one row of `width`: normalised in float32, rounded, then scaled, as transformers does.
template <class T>
inline void norm_row(T* out, const T* x, const T* weight, float eps, std::int64_t width) {
  F squares{};
  for (std::int64_t i = 0; i < width; i += kLanes) {
    F v = load(x + i);
    squares += v * v;
  }
  float scale = 1.0f / std::sqrt(sum(squares) / float(width) + eps);
  for (std::int64_t i = 0; i < width; i += kLanes)
    store(out + i, rounded(x, load(x + i) * scale) * load(weight + i));
}

template <class T>
void add_norm(T* out, T* x, const T* delta, const T* weight, float eps, std::int64_t rows, std::int64_t width) {
#pragma omp for schedule(static)
  for (std::int64_t row = 0; row < rows; row++) {
    T* mine = x + row * width;
    if (delta)
      for (std::int64_t i = 0; i < width; i += kLanes)
        store(mine + i, load(mine + i) + load(delta + row * width + i));
    norm_row(out + row * width, mine, weight, eps, width);
  }
}

template <class T>
void silu_mul(T* out, const T* gate_up, std::int64_t rows, std::int64_t width) {
#pragma omp for schedule(static)
  for (std::int64_t row = 0; row < rows; row++) {
    const T *gate = gate_up + row * 2 * width, *up = gate + width;
    for (std::int64_t i = 0; i < width; i += kLanes) {
      store(out + row * width + i, rounded(gate, silu(load(gate + i))) * load(up + i));
    }
  }
}

// ---- rotary embedding, and keys and values into their cache --------------------------------------------------------------

template <class T>
inline void finite_row(T* out, const T* in, std::int64_t dim) {  // as torch.nan_to_num: see `KVCache.store`
  float most = sizeof(T) == 4 ? std::numeric_limits<float>::max() : 3.38953138925153547590e38f;
  for (std::int64_t i = 0; i < dim; i += kLanes) {
    F v = load(in + i);
    v = choose(v != v, F{}, v);
    v = choose(v > most, splat(most), v);
    store(out + i, choose(v < -most, splat(-most), v));
  }
}

// sin: of the half that comes in negated, as `flat.py` prepares it.
template <class T>
void rotate_store(T* qkv, const T* cos, const T* sin, const T* q_weight, const T* k_weight, float eps, T* keys, T* values,
                  const std::int64_t* slots, std::int64_t rows, std::int64_t heads, std::int64_t kv_heads,
                  std::int64_t dim, std::int64_t cache_slots) {
  std::int64_t half = dim / 2;
#pragma omp for schedule(static)
  for (std::int64_t row = 0; row < rows; row++) {
    T* mine = qkv + row * (heads + 2 * kv_heads) * dim;
    const T *c = cos + row * dim, *s = sin + row * dim;
    for (std::int64_t head = 0; head < heads + kv_heads; head++) {
      T* x = mine + head * dim;
      const T* weight = head < heads ? q_weight : k_weight;
      if (weight) norm_row(x, x, weight, eps, dim);
      for (std::int64_t i = 0; i < half; i += kLanes) {
        int lanes = half - i < kLanes ? int(half - i) : kLanes;
        F low = load(x + i, lanes), high = load(x + half + i, lanes);
        F turned_low = rounded(x, low * load(c + i, lanes)) + rounded(x, high * load(s + i, lanes));
        F turned_high = rounded(x, high * load(c + half + i, lanes)) + rounded(x, low * load(s + half + i, lanes));
        store(x + i, turned_low, lanes);
        store(x + half + i, turned_high, lanes);
      }
    }
    for (std::int64_t head = 0; head < kv_heads; head++) {
      std::int64_t at = (head * cache_slots + slots[row]) * dim;
      std::memcpy(keys + at, mine + (heads + head) * dim, dim * sizeof(T));
      finite_row(values + at, mine + (heads + kv_heads + head) * dim, dim);
    }
  }
}

// ---- attention -------------------------------------------------------------------------------------------------------

// One stage of transposing 16 x 16 lanes: of rows a and b, exchanges the off-diagonal squares of kStep lanes.
template <int kStep, int... kLane>
inline void swap_lanes(F& a, F& b, std::integer_sequence<int, kLane...>) {
  constexpr I low = {(kLane & kStep ? kLanes + kLane - kStep : kLane)...};
  constexpr I high = {(kLane & kStep ? kLanes + kLane : kLane + kStep)...};
  F x = __builtin_shuffle(a, b, low);
  b = __builtin_shuffle(a, b, high);
  a = x;
}

template <int kStep>
inline void swap_all(F* r) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i++)
    if (!(i & kStep)) swap_lanes<kStep>(r[i], r[i + kStep], std::make_integer_sequence<int, kLanes>());
}

inline void transpose(F* r) {
  swap_all<8>(r);
  swap_all<4>(r);
  swap_all<2>(r);
  swap_all<1>(r);
}

// 16 keys [16, dim] -> out [dim, 16] in float32.
template <class T>
inline void transpose_keys(float* out, const T* keys, std::int64_t dim) {
  constexpr bool kPairs = sizeof(T) == 2;  // move as one lane, and come apart at the end
  std::int64_t d = 0;
  for (; kPairs && d + 2 * kLanes <= dim; d += 2 * kLanes) {
    F r[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) r[i] = read<F>(keys + i * dim + d);
    transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) {
      U pair = cast_bits<U>(r[i]);
      store(out + (d + 2 * i) * kLanes, cast_bits<F>(pair << 16));
      store(out + (d + 2 * i + 1) * kLanes, cast_bits<F>(pair & 0xffff0000u));
    }
  }
  for (; d < dim; d += kLanes) {
    F r[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) r[i] = load(keys + i * dim + d);
    transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) store(out + (d + i) * kLanes, r[i]);
  }
}

constexpr int kRows = 12;     // query rows (heads of a KV group x tokens) that share a pass over the keys
constexpr int kMaxDim = 256;  // of a head

struct Sequence {  // int64 each, as ops.py writes them
  std::int64_t first_row, rows, start, table;
};

struct Heads {
  std::int64_t group, dim, query_row, query_head, out_row, blocks, block_size, window;
  float scaling, softcap;
};

// Products of queries with keys and of weights with values, for kCount rows at a time, whose sums stay in registers. Blocks lie
// anywhere, and no processor guesses where: the next keys and these keys' values, [16, dim] each, are asked for on the way.
template <class T>
struct Attention {
  using Query = float;

  // scores: of 16 keys, a vector a row.
  template <int kCount>
  static void score(F* scores, std::int64_t stride, const float* q, const T* keys, std::int64_t dim, const T* next_keys,
                    const T* values) {
    alignas(64) float kt[kMaxDim * kLanes];
    transpose_keys(kt, keys, dim);
    F acc[kCount] = {};
    for (std::int64_t d = 0; d < dim; d++) {
      __builtin_prefetch(next_keys + d * kLanes);
      __builtin_prefetch(values + d * kLanes);
      F k = load(kt + d * kLanes);
      for (int r = 0; r < kCount; r++) acc[r] += k * q[r * kMaxDim + d];
    }
    for (int r = 0; r < kCount; r++) scores[r * stride] = acc[r];
  }

  static void keep_weights(F* row, std::int64_t chunk, F weights) { row[chunk] = rounded(static_cast<T*>(nullptr), weights); }

  // out: [kCount, kMaxDim]; place: where the values of a chunk of 16 keys begin.
  template <int kCount, class Place>
  static void mix(float* out, const F* weights, std::int64_t stride, std::int64_t chunks, const T* values, Place place,
                  std::int64_t dim) {
    for (std::int64_t d = 0; d < dim; d += kLanes) {
      F acc[kCount] = {};
      for (std::int64_t chunk = 0; chunk < chunks; chunk++) {
        const T* own = values + place(chunk) + d;
        const float* w = reinterpret_cast<const float*>(weights + chunk);
        for (int i = 0; i < kLanes; i++) {
          F v = load(own + i * dim);
          for (int r = 0; r < kCount; r++) acc[r] += v * w[r * stride * kLanes + i];
        }
      }
      for (int r = 0; r < kCount; r++) store(out + r * kMaxDim + d, acc[r]);
    }
  }
};

#ifdef __AVX512BF16__
// With an instruction for two products: of two inputs of a key, which transposing keeps together, and of two keys' values.
template <>
struct Attention<bf16> {
  using Query = bf16;

  static __m512i half_or_whole(const bf16* p, bool whole) {
    return whole ? _mm512_loadu_si512(p) : _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static __m512bh pair(const bf16* p) { return cast_bits<__m512bh>(_mm512_set1_epi32(read<std::int32_t>(p))); }

  template <int kCount>
  static void score(F* scores, std::int64_t stride, const bf16* q, const bf16* keys, std::int64_t dim, const bf16* next_keys,
                    const bf16* values) {
    __m512 acc[kCount];
#pragma GCC unroll 16
    for (int r = 0; r < kCount; r++) acc[r] = _mm512_setzero_ps();
    for (std::int64_t d = 0; d < dim; d += 2 * kLanes) {
      F inputs[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) {
        __builtin_prefetch(next_keys + i * dim + d);
        __builtin_prefetch(values + i * dim + d);
        inputs[i] = cast_bits<F>(half_or_whole(keys + i * dim + d, d + 2 * kLanes <= dim));
      }
      transpose(inputs);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++)
#pragma GCC unroll 16
        for (int r = 0; r < kCount; r++)
          acc[r] = _mm512_dpbf16_ps(acc[r], cast_bits<__m512bh>(inputs[i]), pair(q + r * kMaxDim + d + 2 * i));
    }
#pragma GCC unroll 16
    for (int r = 0; r < kCount; r++) scores[r * stride] = cast_bits<F>(acc[r]);
  }

  static void keep_weights(F* row, std::int64_t chunk, F weights) { store(reinterpret_cast<bf16*>(row) + chunk * kLanes, weights); }

  template <int kCount, class Place>
  static void mix(float* out, const F* weights, std::int64_t stride, std::int64_t chunks, const bf16* values, Place place,
                  std::int64_t dim) {
    for (std::int64_t d = 0; d < dim; d += 2 * kLanes) {
      bool whole = d + 2 * kLanes <= dim;
      __m512 acc[kCount][2];
#pragma GCC unroll 16
      for (int r = 0; r < kCount; r++) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
      for (std::int64_t chunk = 0; chunk < chunks; chunk++) {
        const bf16 *own = values + place(chunk) + d, *w = reinterpret_cast<const bf16*>(weights) + chunk * kLanes;
        for (int i = 0; i < kLanes; i += 2) {
          __m512i even = half_or_whole(own + i * dim, whole), odd = half_or_whole(own + (i + 1) * dim, whole);
          __m512bh low = cast_bits<__m512bh>(_mm512_unpacklo_epi16(even, odd));
          __m512bh high = cast_bits<__m512bh>(_mm512_unpackhi_epi16(even, odd));
#pragma GCC unroll 16
          for (int r = 0; r < kCount; r++) {
            __m512bh both = pair(w + r * stride * 2 * kLanes + i);
            acc[r][0] = _mm512_dpbf16_ps(acc[r][0], low, both);
            acc[r][1] = _mm512_dpbf16_ps(acc[r][1], high, both);
          }
        }
      }
      // Lane 4 l + j of `low` is output 8 l + j, of `high` 8 l + 4 + j.
      const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
      const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
#pragma GCC unroll 16
      for (int r = 0; r < kCount; r++) {
        _mm512_storeu_ps(out + r * kMaxDim + d, _mm512_permutex2var_ps(acc[r][0], first, acc[r][1]));
        if (whole) _mm512_storeu_ps(out + r * kMaxDim + d + kLanes, _mm512_permutex2var_ps(acc[r][0], second, acc[r][1]));
      }
    }
  }
};
#endif

// Up to kRows query rows of one KV head of one sequence. scores: scratch [kRows, length up to whole 16s].
template <class T>
void attend_rows(T* out, const T* query, const T* keys, const T* values, const std::int32_t* table, const Sequence& seq,
                 const Heads& h, std::int64_t kv_head, std::int64_t first, int count, F* scores, std::int64_t stride) {
  using A = Attention<T>;
  alignas(64) typename A::Query q[kRows * kMaxDim];
  alignas(64) float sums[kRows * kMaxDim];
  std::int64_t last_seen[kRows];
  // Member m of the group's rows: token m / group, head m % group. Rows are padded to kRows or a third by repeating.
  int padded = count <= 4 ? 4 : kRows;
  std::int64_t low = 0, high = 0;
  for (int r = 0; r < padded; r++) {
    std::int64_t member = first + (r < count ? r : count - 1), token = member / h.group;
    const T* from = query + (seq.first_row + token) * h.query_row + (kv_head * h.group + member % h.group) * h.query_head;
    std::int64_t d = 0;
    for (; d < h.dim; d += kLanes) store(q + r * kMaxDim + d, load(from + d));
    if (d % (2 * kLanes)) store(q + r * kMaxDim + d, F{});
    last_seen[r] = seq.start + token;
    if (last_seen[r] + 1 > high) high = last_seen[r] + 1;
  }
  if (h.window) {
    low = last_seen[0] - h.window + 1;
    low = low < 0 ? 0 : low / kLanes * kLanes;
  }
  std::int64_t chunks = (high - low + kLanes - 1) / kLanes;
  auto place = [&](std::int64_t chunk) {  // of the chunk's 16 keys in the cache
    std::int64_t key = low + chunk * kLanes;
    return ((kv_head * h.blocks + table[key / h.block_size]) * h.block_size + key % h.block_size) * h.dim;
  };
  const I lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  F best[kRows];
  for (int r = 0; r < padded; r++) best[r] = splat(-INFINITY);
  for (std::int64_t chunk = 0; chunk < chunks; chunk++) {
    const T *next = keys + place(chunk + 1 < chunks ? chunk + 1 : chunk), *own = values + place(chunk);
    if (padded == 4)
      A::template score<4>(scores + chunk, stride, q, keys + place(chunk), h.dim, next, own);
    else
      A::template score<kRows>(scores + chunk, stride, q, keys + place(chunk), h.dim, next, own);
    I key = lane + std::int32_t(low + chunk * kLanes);
    for (int r = 0; r < count; r++) {
      F s = rounded(query, scores[r * stride + chunk]) * h.scaling;  // a product of T's is a T, in torch
      if (h.softcap > 0.0f) {
        F z = choose(s < 0.0f, s, -s) * (2.0f / h.softcap), e = exp(z), t = (1.0f - e) / (1.0f + e);  // |tanh|
        s = choose(s < 0.0f, -t, t) * h.softcap;
      }
      I hidden = key > std::int32_t(last_seen[r]);
      if (h.window) hidden |= key <= std::int32_t(last_seen[r] - h.window);
      s = choose(hidden, splat(-INFINITY), s);
      scores[r * stride + chunk] = s;
      best[r] = choose((s > best[r]) | (s != s), s, best[r]);
    }
  }
  for (int r = 0; r < count; r++) {
    F most = splat(largest(best[r])), total{};
    for (std::int64_t chunk = 0; chunk < chunks; chunk++) {
      F e = exp(scores[r * stride + chunk] - most);
      scores[r * stride + chunk] = e;
      total += e;
    }
    F whole = splat(sum(total));
    for (std::int64_t chunk = 0; chunk < chunks; chunk++)
      A::keep_weights(scores + r * stride, chunk, scores[r * stride + chunk] / whole);
  }
  for (int r = count; r < padded; r++)
    for (std::int64_t chunk = 0; chunk < chunks; chunk++) A::keep_weights(scores + r * stride, chunk, F{});
  if (padded == 4)
    A::template mix<4>(sums, scores, stride, chunks, values, place, h.dim);
  else
    A::template mix<kRows>(sums, scores, stride, chunks, values, place, h.dim);
  for (int r = 0; r < count; r++) {
    std::int64_t member = first + r;
    T* to = out + (seq.first_row + member / h.group) * h.out_row + (kv_head * h.group + member % h.group) * h.dim;
    for (std::int64_t d = 0; d < h.dim; d += kLanes) store(to + d, load(sums + r * kMaxDim + d));
  }
}

// tasks: int64 [num_tasks, 3] = sequence, first member, members; each for every KV head.
template <class T>
void attend(T* out, const T* query, const T* keys, const T* values, const Sequence* sequences, const std::int64_t* tasks,
            const std::int32_t* tables, std::int64_t num_tasks, std::int64_t kv_heads, std::int64_t longest,
            const Heads& h) {
  std::int64_t stride = (longest + kLanes - 1) / kLanes + 1, chunk = num_tasks * kv_heads < 32 ? 1 : 4;
  F* scores = new (std::align_val_t(64)) F[kRows * stride];
#pragma omp for schedule(dynamic, chunk)
  for (std::int64_t i = 0; i < num_tasks * kv_heads; i++) {
    if (i + 1 < num_tasks * kv_heads) {  // most likely the next one is ours
      std::int64_t block = tables[sequences[tasks[(i + 1) / kv_heads * 3]].table];
      const T* first = keys + ((i + 1) % kv_heads * h.blocks + block) * h.block_size * h.dim;
      for (std::int64_t d = 0; d < h.dim; d++) __builtin_prefetch(first + d * kLanes);
    }
    const std::int64_t* task = tasks + i / kv_heads * 3;
    const Sequence& seq = sequences[task[0]];
    attend_rows(out, query, keys, values, tables + seq.table, seq, h, i % kv_heads, task[1], int(task[2]), scores, stride);
  }
  operator delete[](scores, std::align_val_t(64));
}

// ---- adapters ----------------------------------------------------------------------------------------------------------

constexpr int kPanel = 32;    // outputs whose weights lie side by side
constexpr int kLoraRows = 4;  // rows of one adapter that share a pass over its weights
constexpr int kShrinkAhead = 2048, kExpandAhead = 1024;  // bytes

// How many inputs one instruction takes, whose weights then lie side by side: [inputs / kInputs, outputs, kInputs].
template <class T>
struct Single {
  using Number = T;
  using Inner = float;  // what a shrunk row is kept as
  static constexpr int kInputs = 1;
  static F weights(const T* p) { return load(p); }
  template <class X>
  static float inputs(const X* x) { return widen(*x); }
  static F add(F sum, F w, float x) { return sum + w * x; }
};

#ifdef __AVX512BF16__
struct Pairs {
  using Number = bf16;
  using Inner = bf16;
  static constexpr int kInputs = 2;
  static __m512bh weights(const bf16* p) { return read<__m512bh>(p); }
  static __m512bh inputs(const bf16* x) { return cast_bits<__m512bh>(_mm512_set1_epi32(read<std::int32_t>(x))); }
  static F add(F sum, __m512bh w, __m512bh x) { return cast_bits<F>(_mm512_dpbf16_ps(cast_bits<__m512>(sum), w, x)); }
};
#endif

// out[r, c] = sum of x[r, i] a[i, c] over steps of K's inputs first ... last, for kWide vectors of columns. They are summed in
// kTurns interleaved parts, the same for any number of rows, so that additions need not wait for each other.
template <class K, int kCount, int kWide, class T>
inline void shrink_columns(float* out, std::int64_t columns, const T* x, std::int64_t x_row, const T* a, std::int64_t first,
                           std::int64_t last) {
  constexpr int kTurns = kWide == 1 ? 4 : 2;
  F acc[kTurns][kCount][kWide] = {};
  auto add = [&](int turn, std::int64_t i) {
    const T* own = a + i * columns * K::kInputs;
    decltype(K::weights(own)) column[kWide];
    prefetch(own, kShrinkAhead);
    for (int w = 0; w < kWide; w++) column[w] = K::weights(own + w * kLanes * K::kInputs);
    for (int r = 0; r < kCount; r++) {
      auto value = K::inputs(x + r * x_row + i * K::kInputs);
      for (int w = 0; w < kWide; w++) acc[turn][r][w] = K::add(acc[turn][r][w], column[w], value);
    }
  };
  std::int64_t i = first;
  for (; i + kTurns <= last; i += kTurns)
#pragma GCC unroll 4
    for (int turn = 0; turn < kTurns; turn++) add(turn, i + turn);
#pragma GCC unroll 4
  for (int turn = 0; turn < kTurns - 1; turn++)
    if (i < last) add(turn, i++);
  for (int r = 0; r < kCount; r++)
    for (int w = 0; w < kWide; w++) {
      F total = acc[0][r][w];
      for (int turn = 1; turn < kTurns; turn++) total += acc[turn][r][w];
      store(out + r * columns + w * kLanes, total);
    }
}

template <class K, int kCount, class T>
inline void shrink_rows(float* out, const T* x, std::int64_t x_row, const T* a, std::int64_t columns, std::int64_t first,
                        std::int64_t last) {
  std::int64_t c = 0;
  for (; c + 3 * kLanes <= columns; c += 3 * kLanes)
    shrink_columns<K, kCount, 3>(out + c, columns, x, x_row, a + c * K::kInputs, first, last);
  if (c + 2 * kLanes <= columns)
    shrink_columns<K, kCount, 2>(out + c, columns, x, x_row, a + c * K::kInputs, first, last), c += 2 * kLanes;
  if (c < columns) shrink_columns<K, kCount, 1>(out + c, columns, x, x_row, a + c * K::kInputs, first, last);
}

// y[r, o] += sum of shrunk[r, k] b[k, o] for the outputs of panels first ... last. b: [panels, rank / kInputs, kPanel, kInputs].
template <class K, int kCount, class T>
inline void expand_rows(T* y, std::int64_t y_row, const typename K::Inner* shrunk, std::int64_t columns, const T* b,
                        std::int64_t rank, std::int64_t width, std::int64_t first, std::int64_t last) {
  constexpr int kWide = kPanel / kLanes;
  for (std::int64_t panel = first; panel < last; panel++) {
    F acc[kCount][kWide] = {};
    const T* own = b + panel * kPanel * rank;
    for (std::int64_t k = 0; k < rank; k += K::kInputs, own += kPanel * K::kInputs) {
      decltype(K::weights(own)) column[kWide];
      for (int w = 0; w < kWide; w++) {
        prefetch(own + w * kLanes * K::kInputs, kExpandAhead);
        column[w] = K::weights(own + w * kLanes * K::kInputs);
      }
      for (int r = 0; r < kCount; r++) {
        auto value = K::inputs(shrunk + r * columns + k);
        for (int w = 0; w < kWide; w++) acc[r][w] = K::add(acc[r][w], column[w], value);
      }
    }
    for (int w = 0; w < kWide; w++) {
      std::int64_t o = panel * kPanel + w * kLanes;
      int lanes = int(std::min<std::int64_t>(width - o, kLanes));
      if (lanes <= 0) break;
      for (int r = 0; r < kCount; r++) {
        T* to = y + r * y_row + o;
        store(to, load(to, lanes) + rounded(to, acc[r][w]), lanes);
      }
    }
  }
}

struct Member {  // of a group of siblings, int64 each: where its columns lie and its weights, a place after the other
  std::int64_t column, width, expand;
};

// tiles: int64 [num_tiles, 3] = first row, rows (up to kLoraRows), place. scratch: float32 [num_tiles, 4, kLoraRows, columns].
// Inputs are summed in two halves, so that two threads can share one tile and the sum is the same when one does both.
template <class K, class T>
void lora_shrink(const T* x, std::int64_t x_row, std::int64_t inputs, const T* shrink, std::int64_t columns,
                 const std::int64_t* tiles, std::int64_t num_tiles, float* scratch) {
  std::int64_t steps = inputs / K::kInputs, half = (steps + 1) / 2, part = kLoraRows * columns;
#pragma omp for schedule(static)
  for (std::int64_t i = 0; i < 2 * num_tiles; i++) {
    const std::int64_t* tile = tiles + i / 2 * 3;
    const T *a = shrink + tile[2] * inputs * columns, *from = x + tile[0] * x_row;
    std::int64_t first = i % 2 ? half : 0, last = i % 2 ? steps : half;
    float* to = scratch + (i / 2 * 4 + i % 2) * part;
    switch (tile[1]) {
      case 1: shrink_rows<K, 1>(to, from, x_row, a, columns, first, last); break;
      case 2: shrink_rows<K, 2>(to, from, x_row, a, columns, first, last); break;
      case 3: shrink_rows<K, 3>(to, from, x_row, a, columns, first, last); break;
      default: shrink_rows<K, 4>(to, from, x_row, a, columns, first, last);
    }
  }
}

// Each member's panels in two halves too: the work of one tile is shared. Both sides add the shrunk halves up for themselves.
template <class K, class T>
void lora_expand(T* y, std::int64_t y_row, std::int64_t columns, std::int64_t rank, const Member* members,
                 std::int64_t num_members, const std::int64_t* tiles, std::int64_t num_tiles, float* scratch) {
  std::int64_t part = kLoraRows * columns;
#pragma omp for schedule(static)
  for (std::int64_t i = 0; i < 2 * num_tiles; i++) {
    const std::int64_t* tile = tiles + i / 2 * 3;
    const float *low = scratch + i / 2 * 4 * part, *high = low + part;
    auto* shrunk = reinterpret_cast<typename K::Inner*>(scratch + (i / 2 * 4 + 2 + i % 2) * part);
    for (std::int64_t c = 0; c < tile[1] * columns; c += kLanes) store(shrunk + c, rounded(y, load(low + c) + load(high + c)));
    for (std::int64_t m = 0; m < num_members; m++) {
      const Member& member = members[m];
      if (!member.expand) continue;
      std::int64_t panels = (member.width + kPanel - 1) / kPanel, middle = panels / 2;
      std::int64_t first = i % 2 ? middle : 0, last = i % 2 ? panels : middle;
      const T* b = reinterpret_cast<const T*>(member.expand) + tile[2] * rank * panels * kPanel;
      const auto* from = shrunk + m * rank;
      T* to = y + tile[0] * y_row + member.column;
      switch (tile[1]) {
        case 1: expand_rows<K, 1>(to, y_row, from, columns, b, rank, member.width, first, last); break;
        case 2: expand_rows<K, 2>(to, y_row, from, columns, b, rank, member.width, first, last); break;
        case 3: expand_rows<K, 3>(to, y_row, from, columns, b, rank, member.width, first, last); break;
        default: expand_rows<K, 4>(to, y_row, from, columns, b, rank, member.width, first, last);
      }
    }
  }
}

template <class K, class T>
void lora(T* y, std::int64_t y_row, const T* x, std::int64_t x_row, std::int64_t inputs, const T* shrink, std::int64_t columns,
          std::int64_t rank, const Member* members, std::int64_t num_members, const std::int64_t* tiles,
          std::int64_t num_tiles, float* scratch) {
  lora_shrink<K>(x, x_row, inputs, shrink, columns, tiles, num_tiles, scratch);
  lora_expand<K>(y, y_row, columns, rank, members, num_members, tiles, num_tiles, scratch);
}

// ---- laying adapters out -------------------------------------------------------------------------------------------------

// a: [inputs, own]; shrink: [inputs / k, columns, k], to whose columns from `first` on it goes. b: [own, outputs]; expand:
// [panels, rank / k, kPanel, k], zeros where it has no ranks or outputs. Numbers of any kind, by their size.
struct ModulePlace {
  const void *a, *b;
  void *shrink, *expand;
  std::int64_t inputs, columns, first, own, rank, outputs;
};

template <class Bits, int k>
void put_module(const ModulePlace& m) {
  const Bits *a = static_cast<const Bits*>(m.a), *b = static_cast<const Bits*>(m.b);
  Bits *shrink = static_cast<Bits*>(m.shrink) + m.first * k, *expand = static_cast<Bits*>(m.expand);
  for (std::int64_t i = 0; i < m.inputs / k; i++, shrink += m.columns * k, a += k * m.own)
    for (std::int64_t c = 0; c < m.own; c++)
      for (int j = 0; j < k; j++) shrink[c * k + j] = a[j * m.own + c];
  for (std::int64_t o = 0; o < m.outputs; o += kPanel)
    for (std::int64_t r = 0; r < m.rank; r += k, expand += kPanel * k)
      for (int j = 0; j < k; j++) {
        std::int64_t width = r + j < m.own ? std::min<std::int64_t>(kPanel, m.outputs - o) : 0;
        const Bits* from = b + (r + j) * m.outputs + o;
        for (std::int64_t lane = 0; lane < kPanel; lane++) expand[lane * k + j] = lane < width ? from[lane] : Bits(0);
      }
}

template <class Bits>
void put_modules(const ModulePlace* modules, std::int64_t count, std::int64_t k) {
#pragma omp parallel for schedule(dynamic, 4)
  for (std::int64_t i = 0; i < count; i++) k == 2 ? put_module<Bits, 2>(modules[i]) : put_module<Bits, 1>(modules[i]);
}

// ---- Turbo streams -------------------------------------------------------------------------------------------------------

// One stream of one sequence. down, cond: [rank, hidden]; up: [hidden, rank]. cond null: it is not conditioned; up null: it is
// dense, and its rank the hidden size.
template <class T>
struct Stream {
  const T *h, *e, *down, *cond, *up, *bias;  // h: final hidden state; e: embedding of the token just decided
  T* out;
  std::int64_t rank;
};

constexpr int kStreamParts = 4;  // of a stream's work, so that few streams are shared out as well

// Products of kCount rows of weights [.., width] with x, rounded.
template <int kCount, class T, class X>
inline void dot_rows(float* out, const T* weights, const X* x, std::int64_t width) {
  F acc[kCount] = {};
  for (std::int64_t i = 0; i < width; i += kLanes) {
    int lanes = width - i < kLanes ? int(width - i) : kLanes;
    F v = load(x + i, lanes);
    for (int j = 0; j < kCount; j++) {
      prefetch(weights + j * width + i, 1024);
      acc[j] += load(weights + j * width + i, lanes) * v;
    }
  }
  for (int j = 0; j < kCount; j++) out[j] = rounded(weights, splat(sum(acc[j])))[0];
}

template <class T, class X>
inline void dot_all(float* out, const T* weights, const X* x, std::int64_t width, std::int64_t rows) {
  std::int64_t j = 0;
  for (; j + 4 <= rows; j += 4) dot_rows<4>(out + j, weights + j * width, x, width);
  for (; j < rows; j++) dot_rows<1>(out + j, weights + j * width, x, width);
}

// scratch: float32 [count, 2, most].
template <class T>
void stream_inner(const Stream<T>* streams, std::int64_t count, std::int64_t hidden, float* scratch, std::int64_t most) {
#pragma omp for schedule(static)
  for (std::int64_t i = 0; i < count * kStreamParts; i++) {
    const Stream<T>& s = streams[i / kStreamParts];
    std::int64_t part = (s.rank + kStreamParts - 1) / kStreamParts, first = i % kStreamParts * part;
    std::int64_t rows = std::min(part, s.rank - first);
    if (rows <= 0) continue;
    float *inner = scratch + i / kStreamParts * 2 * most + first, *more = inner + most;
    dot_all(inner, s.down + first * hidden, s.h, hidden, rows);
    if (!s.cond) continue;
    dot_all(more, s.cond + first * hidden, s.e, hidden, rows);
    for (std::int64_t j = 0; j < rows; j++) inner[j] = rounded(s.h, splat(inner[j] + more[j]))[0];
  }
}

template <class T>
void stream_states(const Stream<T>* streams, std::int64_t count, std::int64_t hidden, const float* scratch, std::int64_t most) {
#pragma omp for schedule(static)
  for (std::int64_t i = 0; i < count * kStreamParts; i++) {
    const Stream<T>& s = streams[i / kStreamParts];
    const float* inner = scratch + i / kStreamParts * 2 * most;
    std::int64_t part = (hidden / kLanes + kStreamParts - 1) / kStreamParts * kLanes, first = i % kStreamParts * part;
    for (std::int64_t o = first; o < std::min(first + part, hidden); o += kLanes) {
      float own[kLanes];
      if (s.up) dot_all(own, s.up + o * s.rank, inner, s.rank, kLanes);
      F x = rounded(s.h, load(s.up ? own : inner + o) + load(s.bias + o));
      store(s.out + o, load(s.h + o) + rounded(s.h, silu(x)));
    }
  }
}

// ---- a few logits --------------------------------------------------------------------------------------------------------

struct Candidates {  // int64 each: where the ids of some rows are, how many, and which rows
  const std::int32_t* ids;
  std::int64_t count, row, rows;
};

constexpr int kIds = 4;  // whose weights share a pass over rows of x
constexpr int kIdRows = 4;

// out[r, j] = x[r] W[ids[j]] for kCount rows and kIds ids; `ahead` are the ids after these. x and W have the same width.
template <int kCount, class T>
[[gnu::noinline]] void score_tile(float* out, std::int64_t out_row, const T* weight, const std::int32_t* ids,
                                  const std::int32_t* ahead, const T* x, std::int64_t width) {
  F acc[kIds][kCount] = {};
  for (std::int64_t i = 0; i < width; i += kLanes) {
    F rows[kCount];
#pragma GCC unroll 16
    for (int r = 0; r < kCount; r++) rows[r] = load(x + r * width + i);
#pragma GCC unroll 16
    for (int j = 0; j < kIds; j++) {
      __builtin_prefetch(weight + ahead[j] * width + i);
      F w = load(weight + ids[j] * width + i);
#pragma GCC unroll 16
      for (int r = 0; r < kCount; r++) acc[j][r] += w * rows[r];
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kIds; j++)
#pragma GCC unroll 16
    for (int r = 0; r < kCount; r++) out[r * out_row + j] = sum(acc[j][r]);
}

template <int kCount, class T>
void score_rows(std::int64_t count, float* out, std::int64_t out_row, const T* weight, const std::int32_t* ids,
                const std::int32_t* ahead, const T* x, std::int64_t width) {
  if (count == kCount)
    score_tile<kCount>(out, out_row, weight, ids, ahead, x, width);
  else if constexpr (kCount > 1)
    score_rows<kCount - 1>(count, out, out_row, weight, ids, ahead, x, width);
}

// out: [rows, most], each row's logits of its own candidates, -inf after the last.
template <class T>
void scores(float* out, std::int64_t most, const T* weight, std::int64_t width, const T* x, const Candidates* candidates,
            std::int64_t count) {
  for (const Candidates* own = candidates; own < candidates + count; own++) {
    std::int64_t tiles = (own->count + kIds - 1) / kIds;
#pragma omp for schedule(static) nowait
    for (std::int64_t t = 0; t < tiles; t++) {
      std::int32_t ids[2 * kIds];
      for (int j = 0; j < 2 * kIds; j++) ids[j] = own->ids[std::min(t * kIds + j, own->count - 1)];
      for (std::int64_t r = 0; r < own->rows; r += kIdRows) {
        float found[kIdRows * kIds];
        std::int64_t rows = std::min<std::int64_t>(kIdRows, own->rows - r);
        score_rows<kIdRows>(rows, found, kIds, weight, ids, ids + kIds, x + (own->row + r) * width, width);
        for (std::int64_t i = 0; i < rows; i++)
          for (std::int64_t j = t * kIds; j < std::min((t + 1) * kIds, own->count); j++)
            out[(own->row + r + i) * most + j] = found[i * kIds + j - t * kIds];
      }
    }
#pragma omp for schedule(static) nowait
    for (std::int64_t r = own->row; r < own->row + own->rows; r++)
      for (std::int64_t j = own->count; j < most; j++) out[r * most + j] = -INFINITY;
  }
}

// ---- picking tokens ------------------------------------------------------------------------------------------------------

// Of each row of `width` logits: the place of the largest (the first, among equals), its value, and how far the next is.
template <class T>
void best(std::int64_t* places, float* values, float* gaps, const T* logits, std::int64_t row, std::int64_t rows,
          std::int64_t width) {
#pragma omp for schedule(static)
  for (std::int64_t r = 0; r < rows; r++) {
    const T* mine = logits + r * row;
    F first = splat(-INFINITY), second = first;
    for (std::int64_t i = 0; i < width; i += kLanes) {
      F v;
      if (width - i >= kLanes) {
        v = load(mine + i);
      } else {
        for (int lane = 0; lane < kLanes; lane++) v[lane] = i + lane < width ? widen(mine[i + lane]) : -INFINITY;
      }
      F lower = choose(v < first, v, first);
      second = choose(lower > second, lower, second);
      first = choose(v > first, v, first);
    }
    float top = largest(first), next = -INFINITY;
    bool met = false;  // the largest itself, once
    for (int lane = 0; lane < kLanes; lane++) {
      float candidate = first[lane];
      if (candidate == top && !met) {
        met = true;
        candidate = second[lane];
      }
      next = candidate > next ? candidate : next;
    }
    std::int64_t place = 0;
    while (place < width - 1 && !(widen(mine[place]) == top)) place++;
    places[r] = place;
    values[r] = top;
    gaps[r] = top - next;
  }
}

// Natural logarithm of positive numbers. Cephes' polynomial, about one unit in the last place.
inline F log(F x) {
  I bits = cast_bits<I>(x);
  F e = __builtin_convertvector((bits >> 23) - 126, F), m = cast_bits<F>((bits & 0x7fffff) | 0x3f000000);  // in [0.5, 1)
  I low = m < 0.707106781186547524f;
  e = choose(low, e - 1.0f, e);
  m = choose(low, m + m, m) - 1.0f;
  F p = splat(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  F z = m * m, y = m * z * p + e * -2.12194440e-4f - 0.5f * z;
  return m + y + e * 0.693359375f;
}

inline U spread(U x) {  // MurmurHash3's 32-bit finaliser
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// Standard Gumbel noise of 16 vocabulary ids under one key: `noise.py`, whose last bit it may not have.
inline F gumbel(U ids, std::uint32_t low, std::uint32_t high) {
  F u = __builtin_convertvector(cast_bits<I>(spread(spread(ids ^ low) + high)), F) + 0.5f;
  u = choose(u < 0.0f, u + 4294967296.0f, u) * 2.3283064365386963e-10f;
  u = choose(u > 1.0f - 5.9604644775390625e-8f, splat(1.0f - 5.9604644775390625e-8f), u);
  F w = 1.0f - u;  // log(1 - u), exact where u is small and the noise large: log(w) times what rounding took from u
  F minus = choose(w == 1.0f, u, log(w) * (u / (w - 1.0f)));
  return -log(minus);
}

struct Draw {  // how a row is sampled
  std::int64_t key;
  float temperature, top_p, min_p;
  std::int32_t top_k;  // 0 = all
};

// The largest value at or above which lie `share` of all weight. values, weights: scratch, in any order, and reordered.
inline float nucleus(float* values, float* weights, std::int64_t count, double need) {
  std::int64_t first = 0, last = count;
  float answer = -INFINITY;
  while (first < last) {
    float a = values[first], b = values[first + (last - first) / 2], c = values[last - 1];
    float pivot = a > b ? (b > c ? b : (a > c ? c : a)) : (a > c ? a : (b > c ? c : b));
    std::int64_t above = first, same = first;  // [first, above) > pivot, [above, same) = pivot, [same, i) < pivot
    double better = 0, equal = 0;
    for (std::int64_t i = first; i < last; i++) {
      float v = values[i], w = weights[i];
      if (v < pivot) continue;
      std::swap(values[i], values[same]), std::swap(weights[i], weights[same]);
      if (v > pivot) {
        std::swap(values[same], values[above]), std::swap(weights[same], weights[above]);
        above++, better += w;
      } else {
        equal += w;
      }
      same++;
    }
    if (better >= need) {
      last = above;
    } else if (better + equal >= need) {
      return pivot;
    } else {
      answer = pivot, need -= better + equal, first = same;
    }
  }
  return answer;  // rounding left nothing over: everything is in
}

// Of each row: the `most` columns whose scaled logits, as far as truncation keeps them, are largest with their noise, best first,
// -1 where fewer are kept; their noise and those sums. Top-k, then top-p of what is left, then min-p (methods.md 2.5).
template <class T>
void draw(std::int64_t* places, float* noise, float* sums, const T* logits, std::int64_t row, std::int64_t rows,
          std::int64_t width, const Draw* draws, std::int64_t most) {
  const U lane_ids = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  std::int64_t padded = (width + kLanes - 1) / kLanes * kLanes;
  float* scaled = new (std::align_val_t(64)) float[3 * padded];
  float *values = scaled + padded, *weights = values + padded;
#pragma omp for schedule(dynamic, 1)
  for (std::int64_t r = 0; r < rows; r++) {
    const T* mine = logits + r * row;
    const Draw& d = draws[r];
    F most_of = splat(-INFINITY);
    for (std::int64_t i = 0; i < padded; i += kLanes) {
      F v = splat(-INFINITY);
      if (width - i >= kLanes)
        v = load(mine + i) / d.temperature;
      else
        for (int lane = 0; lane < width - i; lane++) v[lane] = widen(mine[i + lane]) / d.temperature;
      v = choose(v != v, splat(-INFINITY), v);
      store(scaled + i, v);
      most_of = choose(v > most_of, v, most_of);
    }
    float top = largest(most_of), least = -INFINITY;
    if (d.top_k > 0 && d.top_k < width) {
      std::memcpy(values, scaled, width * sizeof(float));
      std::nth_element(values, values + d.top_k - 1, values + width, [](float a, float b) { return a > b; });
      least = values[d.top_k - 1];
    }
    if (d.top_p < 1.0f) {
      double total = 0, near = 0;
      std::int64_t count = 0;
      for (std::int64_t i = 0; i < padded; i += kLanes) {
        F v = load(scaled + i), e = exp(choose(v >= least, v - top, splat(-100.0f)));
        total += sum(e);
        for (int lane = 0; lane < kLanes; lane++)
          if (v[lane] >= least && v[lane] - top > -12.0f) values[count] = v[lane], weights[count] = e[lane], near += e[lane], count++;
      }
      if (near < d.top_p * total) {  // a flat one: its nucleus reaches into what is hardly likely
        count = 0;
        for (std::int64_t i = 0; i < padded; i += kLanes) {
          F v = load(scaled + i), e = exp(choose(v >= least, v - top, splat(-100.0f)));
          for (int lane = 0; lane < kLanes; lane++)
            if (v[lane] >= least) values[count] = v[lane], weights[count] = e[lane], count++;
        }
      }
      float edge = nucleus(values, weights, count, std::max(d.top_p * total, 1e-30));  // the best is always in
      least = edge > least ? edge : least;
    }
    if (d.min_p > 0.0f) {
      float edge = top + std::log(d.min_p);
      least = edge > least ? edge : least;
    }
    std::uint32_t low = std::uint32_t(d.key), high = std::uint32_t(std::uint64_t(d.key) >> 32);
    std::int64_t* own = places + r * most;
    float *own_noise = noise + r * most, *own_sums = sums + r * most;
    for (std::int64_t j = 0; j < most; j++) own[j] = -1, own_noise[j] = 0.0f, own_sums[j] = -INFINITY;
    for (std::int64_t i = 0; i < padded; i += kLanes) {
      F v = load(scaled + i);
      I kept = (v >= least) & (v > -INFINITY);
      if (largest(choose(kept, splat(1.0f), F{})) == 0.0f) continue;
      F g = gumbel(lane_ids + std::uint32_t(i), low, high), noisy = choose(kept, v + g, splat(-INFINITY));
      if (!(largest(noisy) > own_sums[most - 1])) continue;
      for (int lane = 0; lane < kLanes; lane++) {
        std::int64_t j = most;
        while (j > 0 && noisy[lane] > own_sums[j - 1]) j--;
        if (j == most) continue;
        for (std::int64_t to = most - 1; to > j; to--)
          own[to] = own[to - 1], own_noise[to] = own_noise[to - 1], own_sums[to] = own_sums[to - 1];
        own[j] = i + lane, own_noise[j] = g[lane], own_sums[j] = noisy[lane];
      }
    }
  }
  operator delete[](scaled, std::align_val_t(64));
}

// ---- base GEMMs --------------------------------------------------------------------------------------------------------

// y = x W^T + bias in bfloat16, summed in float32, on processors with AVX512-BF16. W lies in panels as an adapter's does, in
// pairs: [panels, inputs / 2, kPanel, 2]. Each output is one chain of products in the order of the inputs. W may be bytes,
// which are widened on their way: then sums are multiplied by each output's step before the bias.
constexpr int kTile = 12;             // most rows whose sums stay in registers
constexpr std::int64_t kBlock = 192;  // most rows that share a pass over the weights
constexpr int kLine = 64;             // bytes of a cache line
constexpr int kAhead = 8192;          // bytes of weights: computing on few rows leaves time to ask for them so early

#ifdef __AVX512BF16__
inline __m512bh half_pair(const bf16* p) { return read<__m512bh>(p); }

inline __m512bh half_pair(const std::int8_t* p) {  // whole numbers below 256 are bfloat16 numbers
  auto wide = [](const std::int8_t* q) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(read<__m128i>(q))); };
  return _mm512_cvtne2ps_pbh(wide(p + kLanes), wide(p));
}

enum class Panel {
  kWhole,    // of bfloat16 weights
  kBytes,    // of weights in 8 bits, with a step (`scale`) for each output, …
  kKept,     // … which is kept in `wide`, as bfloat16, for other tiles
  kWidened,  // such a one
};

template <Panel kind>
using Kind = std::integral_constant<Panel, kind>;

// A function of its own with every loop over sums unrolled, or GCC keeps them in memory. next: where a line of
// memory is asked for with each pair of inputs; null = nowhere.
template <int kCount, Panel kind, class W>
[[gnu::noinline]] void product_tile(bf16* y, std::int64_t y_row, const bf16* x, std::int64_t x_row, const W* panel,
                                    std::int64_t inputs, const float* scale, const bf16* bias, int lanes, bf16* wide,
                                    const char* next) {
  __m512 acc[kCount][2];
  int low = lanes < kLanes ? lanes : kLanes, high = lanes - low;
  auto shift = [&](int h) { return bias && (h ? high : low) ? load(bias + h * kLanes, h ? high : low) : F{}; };
#pragma GCC unroll 2
  for (int h = 0; h < 2; h++) {
    F from = kind == Panel::kWhole ? shift(h) : F{};
#pragma GCC unroll 16
    for (int r = 0; r < kCount; r++) acc[r][h] = cast_bits<__m512>(from);
  }
  for (std::int64_t i = 0; i < inputs; i += 2, panel += 2 * kPanel) {
    __m512bh w0 = half_pair(panel), w1 = half_pair(panel + kPanel);
    if constexpr (kCount > 3) {  // with fewer the processor's own prefetching is as quick as memory
      prefetch(panel, kAhead);
      if constexpr (sizeof(W) > 1) prefetch(panel + kPanel, kAhead);
    }
    if constexpr (kind == Panel::kWhole)
      if (next) _mm_prefetch(next, _MM_HINT_T1), next += kLine;
    if constexpr (kind == Panel::kKept) {
      std::memcpy(wide, &w0, sizeof w0);
      std::memcpy(wide + kPanel, &w1, sizeof w1);
      wide += 2 * kPanel;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kCount; r++) {
      __m512bh pair = cast_bits<__m512bh>(_mm512_set1_epi32(read<std::int32_t>(x + r * x_row + i)));
      acc[r][0] = _mm512_dpbf16_ps(acc[r][0], w0, pair);
      acc[r][1] = _mm512_dpbf16_ps(acc[r][1], w1, pair);
    }
  }
#pragma GCC unroll 2
  for (int h = 0; h < 2; h++) {
    int own = h ? high : low;
    if (!own) break;
    F step = splat(1.0f), after{};
    if constexpr (kind != Panel::kWhole) step = load(scale + h * kLanes), after = shift(h);
#pragma GCC unroll 16
    for (int r = 0; r < kCount; r++) {
      F sum = cast_bits<F>(acc[r][h]);
      store(y + r * y_row + h * kLanes, kind == Panel::kWhole ? sum : sum * step + after, own);
    }
  }
}

template <int kCount, Panel kind, class W>
void product_rows(int count, bf16* y, std::int64_t y_row, const bf16* x, std::int64_t x_row, const W* panel,
                  std::int64_t inputs, const float* scale, const bf16* bias, int lanes, bf16* wide, const char* next) {
  if (count == kCount)
    product_tile<kCount, kind>(y, y_row, x, x_row, panel, inputs, scale, bias, lanes, wide, next);
  else if constexpr (kCount > 1)
    product_rows<kCount - 1, kind>(count, y, y_row, x, x_row, panel, inputs, scale, bias, lanes, wide, next);
}

bf16* panel_room(std::int64_t size) {  // of each thread, for a panel that several tiles of rows read
  static thread_local std::vector<bf16> room;
  if (std::int64_t(room.size()) < size) room.resize(size);
  return room.data();
}

template <class W>
void product(bf16* y, const bf16* x, std::int64_t x_row, const W* weight, const float* scale, const bf16* bias,
             std::int64_t rows, std::int64_t inputs, std::int64_t outputs) {
  // Blocks of rows and tiles of a block are as even as can be: threads get as much each, and no tile is left with one row.
  auto cut = [](std::int64_t count, std::int64_t most) { return (count + most - 1) / most; };
  std::int64_t panels = cut(outputs, kPanel), blocks = cut(rows, kBlock), block_rows = cut(rows, blocks);
#pragma omp for collapse(2) schedule(static)
  for (std::int64_t block = 0; block < blocks; block++)
    for (std::int64_t p = 0; p < panels; p++) {
      std::int64_t column = p * kPanel, row = block * block_rows;
      std::int64_t end = row + block_rows < rows ? row + block_rows : rows;
      int lanes = outputs - column < kPanel ? int(outputs - column) : kPanel;
      const float* steps = scale ? scale + column : nullptr;
      std::int64_t tiles = cut(end - row, kTile);
      const W* panel = weight + column * inputs;
      // While later tiles compute on what the first one has read memory would idle: the first two ask for a half each of the
      // next panel. (Bytes come twice as fast, and widening them has no time to ask.)
      int asking = sizeof(W) > 1 && tiles > 1 ? 2 : 0;
      const char* next = reinterpret_cast<const char*>(panel + kPanel * inputs);
      auto tile = [&](auto kind, const auto* panel, bf16* wide) {
        int count = int(cut(end - row, tiles--));
        product_rows<kTile, decltype(kind)::value>(count, y + row * outputs + column, outputs, x + row * x_row, x_row, panel,
                                                   inputs, steps, bias ? bias + column : nullptr, lanes, wide,
                                                   asking ? next : nullptr);
        row += count;
        if (asking) asking--, next += inputs / 2 * kLine;
      };
      if constexpr (sizeof(W) > 1) {
        while (tiles > 0) tile(Kind<Panel::kWhole>{}, panel, nullptr);
      } else if (tiles == 1) {
        tile(Kind<Panel::kBytes>{}, panel, nullptr);
      } else {
        bf16* wide = panel_room(inputs * kPanel);
        tile(Kind<Panel::kKept>{}, panel, wide);
        while (tiles > 0) tile(Kind<Panel::kWidened>{}, static_cast<const bf16*>(wide), nullptr);
      }
    }
}
#endif

// ---- the best token of a row, without all its logits -----------------------------------------------------------------------

// An LM head in 8 bits says within known bounds what each logit is; only ids that may be the best are scored with its own
// weights. weights: 8 bits, [panels, inputs / 4, kPanel, 4]; by output: its step, 128 times the sum of its weights, and the
// Euclidean lengths of what rounding took from it (`lost`) and of what it left (`length`).
struct Filter {
  const std::int8_t* weights;
  const float* step;
  const std::int32_t* sums;
  const float *lost, *length;
  const bf16* exact;  // [outputs, inputs]
  std::int64_t outputs, inputs;
};

constexpr int kFilterRows = 12;  // most rows whose sums stay in registers
constexpr int kMostScored = 4096;
constexpr float kUsual = 3.0f;  // standard deviations of a row that 8 bits hold

struct FilterRow {  // x = step * (low - 128 + 256 * (up - down))
  float step, length, lost;
  std::int32_t ups, downs;
};

struct Outliers {  // of four inputs of a row, some do not fit 8 bits: by how many times 256 each is above, or below
  std::int32_t index, by;
};

struct FilterScratch {  // for a number of rows
  FilterRow* rows;     // [rows]
  Outliers* outliers;  // [rows, inputs / 2]: the ups, and from the middle on the downs
  float* upper;        // [rows, panels * kPanel]: what each logit is at most
  float* best;         // [rows, panels, 2]: of each panel, the largest of these, and of what logits are most likely
  std::int32_t* ids;   // [rows, kMostScored]
  std::uint8_t* low;   // [rows, inputs]
};

inline std::int64_t filter_panels(const Filter& f) { return (f.outputs + kPanel - 1) / kPanel; }

inline std::int64_t filter_bytes(const Filter& f, std::int64_t rows) {  // all of the above
  std::int64_t floats = filter_panels(f) * (kPanel + 2), ids = kMostScored;
  return rows * std::int64_t(sizeof(FilterRow) + f.inputs / 2 * sizeof(Outliers) + (floats + ids) * 4 + f.inputs);
}

inline FilterScratch filter_scratch(const Filter& f, std::int64_t rows, void* memory) {
  std::int64_t panels = filter_panels(f);
  FilterScratch s;
  s.rows = static_cast<FilterRow*>(memory);
  s.outliers = reinterpret_cast<Outliers*>(s.rows + rows);
  s.upper = reinterpret_cast<float*>(s.outliers + rows * f.inputs / 2);
  s.best = s.upper + rows * panels * kPanel;
  s.ids = reinterpret_cast<std::int32_t*>(s.best + rows * panels * 2);
  s.low = reinterpret_cast<std::uint8_t*>(s.ids + rows * kMostScored);
  return s;
}

#ifdef __AVX512VNNI__
// A row's step is for its usual inputs: a few are so much larger that with theirs the others would hardly be told apart.
void filter_row(FilterRow& row, Outliers* outliers, std::uint8_t* low, const bf16* x, std::int64_t inputs) {
  float most = 1e-30f;
  double squares = 0.0;
  for (std::int64_t i = 0; i < inputs; i++) most = std::max(most, std::fabs(widen(x[i])));
  for (std::int64_t i = 0; i < inputs; i++) {
    double v = widen(x[i]);
    squares += v * v;
  }
  row.length = float(std::sqrt(squares)) * 1.0001f;
  row.step = std::max(kUsual / 127.0f * float(std::sqrt(squares / double(inputs))), most / 32512.0f);
  row.ups = row.downs = 0;
  if (!(row.length < INFINITY)) return;  // not numbers, or such that no bound says anything
  float left = 0.0f;
  for (std::int64_t i = 0; i < inputs; i += 4) {
    Outliers up{std::int32_t(i / 4), 0}, down = up;
    for (int j = 0; j < 4; j++) {
      float scaled = widen(x[i + j]) / row.step;
      std::int32_t q = std::int32_t(std::lrint(scaled)), times = (q + 128) >> 8;
      float off = scaled - float(q);
      left += off * off;
      low[i + j] = std::uint8_t(q - 256 * times + 128);
      (times > 0 ? up : down).by |= std::abs(times) << 8 * j;
    }
    if (up.by) outliers[row.ups++] = up;
    if (down.by) outliers[inputs / 4 + row.downs++] = down;
  }
  // The second is what sums in float32 may be off by, the exact logit's and these.
  row.lost = std::sqrt(left) * row.step * 1.001f + (float(inputs) / kLanes + 16.0f) * 1.2e-7f * row.length;
}

// sums: [kCount, kPanel] = x W^T of one panel. A function of its own, or its sums would not stay in registers.
template <int kCount>
[[gnu::noinline]] void dot_bytes(std::int32_t* sums, const std::int8_t* w, const std::uint8_t* x, std::int64_t inputs) {
  __m512i acc[kCount][2];
#pragma GCC unroll 16
  for (int r = 0; r < kCount; r++) acc[r][0] = acc[r][1] = _mm512_setzero_si512();
  for (std::int64_t i = 0; i < inputs; i += 4, w += 4 * kPanel) {
    __m512i w0 = read<__m512i>(w), w1 = read<__m512i>(w + 2 * kPanel);
    prefetch(w, kAhead / 2);
    prefetch(w + 2 * kPanel, kAhead / 2);
#pragma GCC unroll 16
    for (int r = 0; r < kCount; r++) {
      __m512i four = _mm512_set1_epi32(read<std::int32_t>(x + r * inputs + i));
      acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], four, w0);
      acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], four, w1);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kCount; r++)
    for (int h = 0; h < 2; h++) std::memcpy(sums + r * kPanel + h * kLanes, &acc[r][h], sizeof(__m512i));
}

inline void dot_outliers(__m512i* sums, const std::int8_t* panel, const Outliers* outliers, std::int32_t count) {
  for (const Outliers* o = outliers; o < outliers + count; o++) {
    __m512i by = _mm512_set1_epi32(o->by);
    const std::int8_t* w = panel + std::int64_t(o->index) * 4 * kPanel;
    sums[0] = _mm512_dpbusd_epi32(sums[0], by, read<__m512i>(w));
    sums[1] = _mm512_dpbusd_epi32(sums[1], by, read<__m512i>(w + 2 * kPanel));
  }
}

// What each logit of some rows of one panel is at most.
template <int kCount>
void filter_tile(const Filter& f, const FilterScratch& s, std::int64_t row, std::int64_t panel, std::int64_t panels) {
  const std::int8_t* w = f.weights + panel * kPanel * f.inputs;
  alignas(64) std::int32_t sums[kCount * kPanel];
  dot_bytes<kCount>(sums, w, s.low + row * f.inputs, f.inputs);
  const I lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (std::int64_t r = row; r < row + kCount; r++) {
    const FilterRow& own = s.rows[r];
    const Outliers* outliers = s.outliers + r * f.inputs / 2;
    __m512i up[2] = {}, down[2] = {};
    dot_outliers(up, w, outliers, own.ups);
    dot_outliers(down, w, outliers + f.inputs / 4, own.downs);
    F most[2] = {splat(-INFINITY), splat(-INFINITY)};
    for (int h = 0; h < 2; h++) {
      std::int64_t at = panel * kPanel + h * kLanes;
      I whole = read<I>(sums + (r - row) * kPanel + h * kLanes) - read<I>(f.sums + at);
      whole += (cast_bits<I>(up[h]) - cast_bits<I>(down[h])) << 8;
      F logit = __builtin_convertvector(whole, F) * (load(f.step + at) * own.step);
      F at_most = logit + load(f.lost + at) * own.length + load(f.length + at) * own.lost;
      if (at + kLanes > f.outputs) {
        I there = lane + std::int32_t(at) < std::int32_t(f.outputs);
        at_most = choose(there, at_most, splat(-INFINITY)), logit = choose(there, logit, splat(-INFINITY));
      }
      at_most = choose(at_most == at_most, at_most, splat(INFINITY));  // nothing is known of it
      store(s.upper + r * panels * kPanel + at, at_most);
      most[0] = choose(at_most > most[0], at_most, most[0]);
      most[1] = choose(logit > most[1], logit, most[1]);
    }
    for (int i = 0; i < 2; i++) s.best[(r * panels + panel) * 2 + i] = _mm512_reduce_max_ps(cast_bits<__m512>(most[i]));
  }
}

template <int kCount>
void filter_rows(int count, const Filter& f, const FilterScratch& s, std::int64_t row, std::int64_t panel, std::int64_t panels) {
  if (count == kCount)
    filter_tile<kCount>(f, s, row, panel, panels);
  else if constexpr (kCount > 1)
    filter_rows<kCount - 1>(count, f, s, row, panel, panels);
}

struct Best {
  std::int64_t id;
  float margin;  // to the next logit, as the 8 bits have it
};

// The id with the largest logit in float32, the first among equals; -1 where so many would have to be scored that all logits
// cost no more, and for a row that is not all numbers.
Best best_of_row(const Filter& f, const FilterRow& row, const bf16* x, const float* upper, const float* panel_best,
                 std::int32_t* ids, std::int64_t panels) {
  const Best none{-1, 0.0f};
  if (!(row.length < INFINITY)) return none;
  auto score = [&](std::int64_t id, std::int64_t next) {
    const bf16 *own = f.exact + id * f.inputs, *ahead = f.exact + next * f.inputs;
    F sums{};
    for (std::int64_t i = 0; i < f.inputs; i += kLanes) {
      __builtin_prefetch(ahead + i);
      sums += load(own + i) * load(x + i);
    }
    return sum(sums);
  };
  std::int64_t likely = 0, count = 0;
  for (std::int64_t p = 1; p < panels; p++)
    if (panel_best[2 * p + 1] > panel_best[2 * likely + 1]) likely = p;
  auto guess = [&](std::int64_t o) { return upper[o] - (f.lost[o] * row.length + f.length[o] * row.lost); };
  std::int64_t id = likely * kPanel;
  for (std::int64_t o = id + 1; o < std::min((likely + 1) * kPanel, f.outputs); o++)
    if (guess(o) > guess(id)) id = o;
  float found = score(id, id);  // hardly any other can be as large
  for (std::int64_t p = 0; p < panels; p++) {
    if (panel_best[2 * p] < found) continue;
    if (count > kMostScored - kPanel) return none;
    for (std::int64_t o = p * kPanel; o < std::min((p + 1) * kPanel, f.outputs); o++)
      if (!(upper[o] < found)) ids[count++] = std::int32_t(o);
  }
  found = -INFINITY;
  for (std::int64_t j = 0; j < count; j++) {
    float logit = score(ids[j], ids[std::min(j + 1, count - 1)]);
    if (logit > found) found = logit, id = ids[j];
  }
  float next = -INFINITY;
  for (std::int64_t p = 0; p < panels; p++)
    if (p != id / kPanel) next = std::max(next, panel_best[2 * p + 1]);
  for (std::int64_t o = id / kPanel * kPanel; o < std::min((id / kPanel + 1) * kPanel, f.outputs); o++)
    if (o != id) next = std::max(next, guess(o));
  return {id, std::max(found - next, 0.0f)};
}

// The best id of each row of x [rows, inputs], or -1, and its margin.
void best_ids(std::int64_t* ids, float* margins, const Filter& f, const bf16* x, std::int64_t rows, const FilterScratch& s) {
  std::int64_t panels = filter_panels(f);
#pragma omp for schedule(static)
  for (std::int64_t r = 0; r < rows; r++)
    filter_row(s.rows[r], s.outliers + r * f.inputs / 2, s.low + r * f.inputs, x + r * f.inputs, f.inputs);
#pragma omp for schedule(static)
  for (std::int64_t p = 0; p < panels; p++)
    for (std::int64_t row = 0, tiles = (rows + kFilterRows - 1) / kFilterRows; tiles > 0; tiles--) {
      int count = int((rows - row + tiles - 1) / tiles);
      filter_rows<kFilterRows>(count, f, s, row, p, panels);
      row += count;
    }
#pragma omp for schedule(dynamic, 1)
  for (std::int64_t r = 0; r < rows; r++) {
    Best best = best_of_row(f, s.rows[r], x + r * f.inputs, s.upper + r * panels * kPanel, s.best + r * panels * 2,
                            s.ids + r * kMostScored, panels);
    ids[r] = best.id, margins[r] = best.margin;
  }
}
#endif

#ifdef __AVX512BF16__
// ---- a whole decoder ------------------------------------------------------------------------------------------------------

struct Projection {  // siblings that read the same input; scale null: weights are bfloat16, else 8 bits
  const void* weight;
  const float* scale;
  const bf16* bias;
  std::int64_t inputs, outputs;
};

struct Layer {
  const bf16 *before, *after, *q_norm, *k_norm;  // the last two: null where queries and keys are not normalised
  Projection qkv, out, gate_up, down;
  bf16 *keys, *values;
  std::int64_t window;
};

struct Decoder {
  const Layer* layers;
  const bf16* norm;
  std::int64_t num_layers, hidden, heads, kv_heads, dim, width, blocks, block_size;  // width: of an MLP
  float eps, scaling;
};

struct Lora {  // of one projection, for all adapters of a stack; shrink null: none has it
  const bf16* shrink;
  std::int64_t columns;
  const Member* members;
  std::int64_t num_members;
};

struct Stack {
  const Lora* loras;  // [num_layers, 4]
  std::int64_t rank;
  const std::int64_t* tiles;
  std::int64_t num_tiles;
  float* scratch;
};

struct Step {
  bf16 *hidden, *out;  // [rows, hidden]: embeddings, which are overwritten; final hidden states
  const bf16 *cos, *sin;
  const std::int64_t* slots;
  const Sequence* sequences;
  const std::int64_t* tasks;
  const std::int32_t* tables;
  const Stack* stacks;
  bf16* scratch;  // [rows, 2 * hidden + (heads + 2 * kv_heads) * dim + heads * dim + 3 * width]
  std::int64_t rows, num_tasks, longest, num_stacks;
};

// The layers of `flat.py`'s decoder, one after the other, by one team: what it does by a call each.
void decode(const Decoder& d, const Step& s) {
  std::int64_t qkv_width = (d.heads + 2 * d.kv_heads) * d.dim, mixed_width = d.heads * d.dim;
  bf16 *x = s.scratch, *delta = x + s.rows * d.hidden, *qkv = delta + s.rows * d.hidden, *mixed = qkv + s.rows * qkv_width;
  bf16 *gate_up = mixed + s.rows * mixed_width, *gated = gate_up + s.rows * 2 * d.width;
  auto project = [&](bf16* y, const bf16* from, const Projection& p, std::int64_t index) {
    auto weight = [&](const auto* w) { product(y, from, p.inputs, w, p.scale, p.bias, s.rows, p.inputs, p.outputs); };
    p.scale ? weight(static_cast<const std::int8_t*>(p.weight)) : weight(static_cast<const bf16*>(p.weight));
    for (std::int64_t i = 0; i < s.num_stacks; i++) {
      const Stack& stack = s.stacks[i];
      const Lora& l = stack.loras[index];
      if (!l.shrink) continue;
      lora<Pairs>(y, p.outputs, from, p.inputs, p.inputs, l.shrink, l.columns, stack.rank, l.members, l.num_members, stack.tiles,
                  stack.num_tiles, stack.scratch);
    }
  };
#pragma omp parallel
  for (std::int64_t i = 0; i < d.num_layers; i++) {
    const Layer& layer = d.layers[i];
    add_norm(x, s.hidden, i ? delta : nullptr, layer.before, d.eps, s.rows, d.hidden);
    project(qkv, x, layer.qkv, 4 * i);
    rotate_store(qkv, s.cos, s.sin, layer.q_norm, layer.k_norm, d.eps, layer.keys, layer.values, s.slots, s.rows, d.heads,
                 d.kv_heads, d.dim, d.blocks * d.block_size);
    Heads h{d.heads / d.kv_heads, d.dim, qkv_width, d.dim, mixed_width, d.blocks, d.block_size, layer.window, d.scaling, 0.0f};
    attend(mixed, qkv, layer.keys, layer.values, s.sequences, s.tasks, s.tables, s.num_tasks, d.kv_heads, s.longest, h);
    project(delta, mixed, layer.out, 4 * i + 1);
    add_norm(x, s.hidden, delta, layer.after, d.eps, s.rows, d.hidden);
    project(gate_up, x, layer.gate_up, 4 * i + 2);
    silu_mul(gated, gate_up, s.rows, d.width);
    project(delta, gated, layer.down, 4 * i + 3);
    if (i + 1 == d.num_layers) add_norm(s.out, s.hidden, delta, d.norm, d.eps, s.rows, d.hidden);
  }
}
#endif

}  // namespace

#define EXPORT(T, suffix)                                                                                                  \
  extern "C" void slipstream_add_norm_##suffix(T* out, T* x, const T* delta, const T* weight, float eps, std::int64_t rows, \
                                               std::int64_t width) {                                                       \
    _Pragma("omp parallel if (rows > 3)") add_norm(out, x, delta, weight, eps, rows, width);                               \
  }                                                                                                                        \
  extern "C" void slipstream_silu_mul_##suffix(T* out, const T* gate_up, std::int64_t rows, std::int64_t width) {           \
    _Pragma("omp parallel if (rows > 3)") silu_mul(out, gate_up, rows, width);                                             \
  }                                                                                                                        \
  extern "C" void slipstream_rotate_store_##suffix(                                                                        \
      T* qkv, const T* cos, const T* sin, const T* q_weight, const T* k_weight, float eps, T* keys, T* values,             \
      const std::int64_t* slots, std::int64_t rows, std::int64_t heads, std::int64_t kv_heads, std::int64_t dim,           \
      std::int64_t cache_slots) {                                                                                          \
    _Pragma("omp parallel if (rows > 3)")                                                                                  \
    rotate_store(qkv, cos, sin, q_weight, k_weight, eps, keys, values, slots, rows, heads, kv_heads, dim, cache_slots);    \
  }                                                                                                                        \
  extern "C" void slipstream_attend_##suffix(                                                                              \
      T* out, const T* query, const T* keys, const T* values, const Sequence* sequences, const std::int64_t* tasks,        \
      const std::int32_t* tables, std::int64_t num_tasks, std::int64_t kv_heads, std::int64_t longest,                     \
      std::int64_t group, std::int64_t dim, std::int64_t query_row, std::int64_t query_head, std::int64_t out_row,         \
      std::int64_t blocks, std::int64_t block_size, std::int64_t window, float scaling, float softcap) {                   \
    Heads h{group, dim, query_row, query_head, out_row, blocks, block_size, window, scaling, softcap};                     \
    _Pragma("omp parallel if (num_tasks * kv_heads > 1)")                                                                  \
    attend(out, query, keys, values, sequences, tasks, tables, num_tasks, kv_heads, longest, h);                           \
  }                                                                                                                        \
  extern "C" void slipstream_lora_##suffix(T* y, std::int64_t y_row, const T* x, std::int64_t x_row, std::int64_t inputs,  \
                                           const T* shrink, std::int64_t columns, std::int64_t rank,                       \
                                           const Member* members, std::int64_t num_members, const std::int64_t* tiles,     \
                                           std::int64_t num_tiles, float* scratch) {                                       \
    _Pragma("omp parallel") lora<Single<T>>(y, y_row, x, x_row, inputs, shrink, columns, rank, members, num_members, tiles, \
                                            num_tiles, scratch);                                                           \
  }                                                                                                                        \
  extern "C" void slipstream_streams_##suffix(const Stream<T>* streams, std::int64_t count, std::int64_t hidden,           \
                                              float* scratch, std::int64_t most) {                                         \
    _Pragma("omp parallel") {                                                                                              \
      stream_inner(streams, count, hidden, scratch, most);                                                                 \
      stream_states(streams, count, hidden, scratch, most);                                                                \
    }                                                                                                                      \
  }                                                                                                                        \
  extern "C" void slipstream_scores_##suffix(float* out, std::int64_t most, const T* weight, std::int64_t width, const T* x, \
                                             const Candidates* candidates, std::int64_t count) {                           \
    _Pragma("omp parallel") scores(out, most, weight, width, x, candidates, count);                                        \
  }                                                                                                                        \
  extern "C" void slipstream_best_##suffix(std::int64_t* places, float* values, float* gaps, const T* logits,              \
                                           std::int64_t row, std::int64_t rows, std::int64_t width) {                      \
    _Pragma("omp parallel") best(places, values, gaps, logits, row, rows, width);                                          \
  }                                                                                                                        \
  extern "C" void slipstream_draw_##suffix(std::int64_t* places, float* noise, float* sums, const T* logits,               \
                                           std::int64_t row, std::int64_t rows, std::int64_t width, const Draw* draws,     \
                                           std::int64_t most) {                                                            \
    _Pragma("omp parallel") draw(places, noise, sums, logits, row, rows, width, draws, most);                              \
  }

EXPORT(float, f32)
EXPORT(bf16, bf16)

// size: bytes of a number, 2 or 4. k: inputs that an instruction takes, 1 or 2.
extern "C" void slipstream_put_modules(const ModulePlace* modules, std::int64_t count, std::int64_t k, std::int64_t size) {
  size == 2 ? put_modules<std::uint16_t>(modules, count, k) : put_modules<std::uint32_t>(modules, count, k);
}

extern "C" int slipstream_has_product() {
#ifdef __AVX512BF16__
  return 1;
#else
  return 0;
#endif
}

extern "C" void slipstream_product_bf16(bf16* y, const bf16* x, std::int64_t x_row, const bf16* weight, const bf16* bias,
                                        std::int64_t rows, std::int64_t inputs, std::int64_t outputs) {
#ifdef __AVX512BF16__
#pragma omp parallel
  product(y, x, x_row, weight, nullptr, bias, rows, inputs, outputs);
#endif
}

extern "C" void slipstream_product_bytes(bf16* y, const bf16* x, std::int64_t x_row, const std::int8_t* weight,
                                         const float* scale, const bf16* bias, std::int64_t rows, std::int64_t inputs,
                                         std::int64_t outputs) {
#ifdef __AVX512BF16__
#pragma omp parallel
  product(y, x, x_row, weight, scale, bias, rows, inputs, outputs);
#endif
}

extern "C" void slipstream_lora_pairs(bf16* y, std::int64_t y_row, const bf16* x, std::int64_t x_row, std::int64_t inputs,
                                      const bf16* shrink, std::int64_t columns, std::int64_t rank, const Member* members,
                                      std::int64_t num_members, const std::int64_t* tiles, std::int64_t num_tiles,
                                      float* scratch) {
#ifdef __AVX512BF16__
#pragma omp parallel
  lora<Pairs>(y, y_row, x, x_row, inputs, shrink, columns, rank, members, num_members, tiles, num_tiles, scratch);
#endif
}

extern "C" void slipstream_decode_bf16(const void* decoder, const void* step) {
#ifdef __AVX512BF16__
  decode(*static_cast<const Decoder*>(decoder), *static_cast<const Step*>(step));
#endif
}

extern "C" int slipstream_has_filter() {
#ifdef __AVX512VNNI__
  return 1;
#else
  return 0;
#endif
}

extern "C" std::int64_t slipstream_filter_bytes(const void* filter, std::int64_t rows) {
  return filter_bytes(*static_cast<const Filter*>(filter), rows);
}

// scratch: so many bytes.
extern "C" void slipstream_best_ids_bf16(std::int64_t* ids, float* margins, const void* filter, const bf16* x, std::int64_t rows,
                                         void* scratch) {
#ifdef __AVX512VNNI__
  const Filter& f = *static_cast<const Filter*>(filter);
#pragma omp parallel
  best_ids(ids, margins, f, x, rows, filter_scratch(f, rows, scratch));
#endif
}
