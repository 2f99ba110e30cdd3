// Multi-token paged attention on the CPU (paper section 4.4.1): one call serves a ragged batch in which every segment, a decode
// or a stretch of prompt, attends to a context whose KV lies in blocks anywhere in the pools. Twin of reference.py, which is
// the oracle; knows nothing of requests.
//
//     pools         [num_blocks, num_kv_heads, chunk_size, dim]     query [num_heads, num_tokens, k_dim]
//     segments      int32 [n, 4]: first row, query_len, context_len, row of block_tables
//     block_tables  int32 [rows, capacity]
//
// Work is cut into jobs (segment, KV heads, tile of query rows, range of the context); the query heads of a KV head are packed
// into the tile, so that K and V are read once for all of them. A job runs the online softmax over panels of keys:
//
//     few rows (decode)    scores as dot products along k_dim, a few K rows at a time: bound by memory, so a job takes several KV
//                          heads, whose K and V lie next to each other in a block: long runs are read faster than short ones
//     many rows (prefill)  in half precision by the matrix kernels that torch has for small tiles (brgemm), where the processor has
//                          AVX-512 and instructions for it that take pairs of rows: a panel of K and V is packed once per tile
//     rows in between,     everything transposed, query rows along the lanes: K and V elements are broadcast straight from
//     and elsewhere        the pools, so nothing of the context is packed or transposed, and no reduction crosses lanes
//
// All sums are in float, whatever the pools hold; brgemm multiplies half-precision elements as they are.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int kLanes = Vec::size();
constexpr int kPanel = 64;                // keys between two updates of the running maximum
constexpr int kFewRows = 4;               // up to so many rows are computed one key at a time
constexpr int kVecs = 3;                  // vectors of query rows in a register tile
constexpr int kKeys = kLanes >= 16 ? 8 : 4;  // keys in a register tile: fills 16 registers of AVX2, 32 of AVX-512
constexpr int kTileRows = 2 * kVecs * kLanes;
constexpr int kMatrixRows = 256;          // rows of a tile for the matrix kernels
constexpr int kMatrixKeys = 128;          // and keys of a panel
constexpr int kMatrixStep = 16;           // rows are padded to a multiple of this: each new size is compiled anew
constexpr int kMinSplit = 256;            // keys that a job has at least before a context is split
constexpr float kNegInf = -std::numeric_limits<float>::infinity();
// The running maximum starts here and not at -inf: -inf minus -inf would be NaN where a row sees no key of a panel.
constexpr float kLowest = -1e38f;

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// f(0), f(1) and so on, written out: GCC keeps an array in registers only if every place in it is known.
template <int kEnd, typename F>
inline __attribute__((always_inline)) void for_each(const F& f) {
  [&]<int... kIndices>(std::integer_sequence<int, kIndices...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, kIndices>{}), ...);
  }(std::make_integer_sequence<int, kEnd>{});
}

inline Vec load(const float* p) { return Vec::loadu(p); }
inline Vec load(const at::BFloat16* p) {
  Vec out;
  at::vec::load_fp32_from_bf16(p, out);
  return out;
}
inline Vec load(const at::Half* p) {
  Vec out;
  at::vec::load_fp32_from_fp16(p, out);
  return out;
}
// The first n elements, zeros behind them.
template <typename T>
inline Vec load(const T* p, int n) {
  float buffer[kLanes] = {};
  for (int i = 0; i < n; ++i) buffer[i] = static_cast<float>(p[i]);
  return Vec::loadu(buffer);
}
inline float sum(Vec v) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, v);
}
// The sums of kLanes vectors, as the lanes of one: halving the number of vectors interleaves what is left of each, so it takes
// fewer operations than one reduction after the other.
template <int kHalf = kLanes / 2>
inline __attribute__((always_inline)) Vec sums(Vec (&v)[kLanes]) {
  for_each<kHalf>([&](auto i) __attribute__((always_inline)) {
    const auto [low, high] = at::vec::interleave2(v[i], v[i + kHalf]);
    v[i] = low + high;
  });
  if constexpr (kHalf > 1) sums<kHalf / 2>(v);
  return v[0];
}
// The larger one of each lane, in one instruction; at::vec::maximum takes several to hand on NaN, which exp does anyway.
inline Vec larger(Vec a, Vec b) { return at::vec::clamp_min(a, b); }
inline float max(Vec v) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return larger(a, b); }, v);
}

// What all jobs of a call share. Strides in elements. `group` query heads share K and V; a KV head with more of them than fit a
// tile is treated as `num_sharers` heads with the same K and V.
struct Call {
  int num_kv_heads, num_sharers, group, k_dim, v_dim, chunk_size;
  int64_t q_head, q_token, k_block, k_head, v_block, v_head, table_stride;
  const int32_t* tables;
  float scaling, softcap;
  int window;           // 0: none
  int min_matrix_rows;  // tiles with fewer rows are not for the matrix kernels
  const float* sinks;   // [num_heads] or null
};

// Rows [first, first + num_tokens) x group of the KV heads from `kv_head` on (one where there are many rows), over keys
// [begin, end) of the context.
struct Job {
  int kv_head, num_heads, first_row, first_position, num_tokens, table_row, begin, end;
  int64_t partial;  // first row of this job's partial results, head by head, or -1 where it writes the output itself
  bool has_sink;
};

// Consecutive keys in one block, of the job's first head.
template <typename T>
struct Run {
  const T* k;
  const T* v;
  int offset, length;  // in the panel
};

template <typename T>
struct Panel {
  Run<T> runs[kPanel];
  int num_runs = 0, start = 0, length = 0;
};

// f(k, v, offset from start, length) for the keys [start, end) of the job's first head, block by block.
template <typename T, typename F>
inline void for_each_run(const Call& c, const Job& job, const T* k_pool, const T* v_pool, int start, int end, const F& f) {
  const int32_t* table = c.tables + job.table_row * c.table_stride;
  const int64_t head = job.kv_head / c.num_sharers;
  for (int key = start; key < end;) {
    const int offset = key % c.chunk_size;
    const int length = std::min(c.chunk_size - offset, end - key);
    const int64_t block = table[key / c.chunk_size];
    f(k_pool + block * c.k_block + head * c.k_head + int64_t(offset) * c.k_dim,
      v_pool + block * c.v_block + head * c.v_head + int64_t(offset) * c.v_dim, key - start, length);
    key += length;
  }
}

// Keys from `start` on, as many as a panel holds.
template <typename T>
void fill(Panel<T>& panel, const Call& c, const Job& job, const T* k_pool, const T* v_pool, int start) {
  const int end = std::min(job.end, start + kPanel);
  panel.start = start;
  panel.length = end - start;
  panel.num_runs = 0;
  for_each_run(c, job, k_pool, v_pool, start, end, [&](const T* k, const T* v, int offset, int length) {
    panel.runs[panel.num_runs++] = {k, v, offset, length};
  });
}

// Ask for what is read soon: the hardware does not look past a page. It may lie past the end of a pool: nothing happens then.
template <typename T>
inline void prefetch(const T* p, int64_t num_elements) {
  constexpr int kLine = 64;
  const char* bytes = reinterpret_cast<const char*>(p);
  for (int64_t b = 0; b < num_elements * int64_t(sizeof(T)); b += kLine) __builtin_prefetch(bytes + b, 0, 2);
}

template <typename T>
inline void prefetch(const Call& c, const T* k, const T* v, int length) {
  prefetch(k, int64_t(length) * c.k_dim);
  prefetch(v, int64_t(length) * c.v_dim);
}

// Visible keys of a query position, as a range of the panel.
inline int first_visible(const Call& c, int position, int panel_start) {
  return c.window > 0 ? std::max(0, position - c.window + 1 - panel_start) : 0;
}

// Where a job leaves its rows: the output, or the partial results that are combined later: [m, l, unnormalised sum].
template <typename T>
struct Sink {
  T* out;
  float* partials;
  int num_heads;

  // Row r of the job's head h.
  T* row(const Call& c, const Job& job, int h, int r) const {
    const int64_t token = job.first_row + r / c.group;
    return out + (token * num_heads + (job.kv_head + h) * c.group + r % c.group) * c.v_dim;
  }
  float* partial(const Call& c, const Job& job, int h, int r) const {
    return partials + (job.partial + int64_t(h) * job.num_tokens * c.group + r) * (c.v_dim + 2);
  }
};

template <typename T>
inline const T* query_row(const Call& c, const Job& job, const T* query, int h, int r) {
  return query + (job.first_row + r / c.group) * c.q_token + ((job.kv_head + h) * c.group + r % c.group) * c.q_head;
}

struct Scratch {
  std::vector<float> q, s, o, m, l, alpha, positions, k, v, p;
  Panel<float> panel;
};

// -- few rows --------------------------------------------------------------------------------------------------------------

// s[r][j] = q[r] . k[j]. As many sums as a vector has lanes are finished together; `K` keys where that fits, else one.
template <typename T, int R, int K>
inline void dot_keys(const float* q, int q_stride, const T* k, int k_dim, float* s) {
  static_assert(R * K <= kLanes || K == 1);
  constexpr int G = std::min(K, 4);  // keys side by side; with more, the hardware no longer foresees what is read next
  Vec acc[std::max(R * K, kLanes)];
  for_each<std::max(R * K, kLanes)>([&](auto i) __attribute__((always_inline)) { acc[i] = Vec(0.f); });
  for_each<K / G>([&](auto group) __attribute__((always_inline)) {
    const auto add = [&](auto key, int d, Vec value) __attribute__((always_inline)) {
      for_each<R>([&](auto r) __attribute__((always_inline)) {
        acc[r * K + key] = at::vec::fmadd(Vec::loadu(q + r * q_stride + d), value, acc[r * K + key]);
      });
    };
    const auto for_keys = [&](const auto& f) __attribute__((always_inline)) {
      for_each<G>([&](auto i) __attribute__((always_inline)) { f(std::integral_constant<int, group * G + i>{}); });
    };
    int d = 0;
    for (; d + kLanes <= k_dim; d += kLanes) {
      for_keys([&](auto key) __attribute__((always_inline)) { add(key, d, load(k + key * k_dim + d)); });
    }
    if (d < k_dim) {
      for_keys([&](auto key) __attribute__((always_inline)) { add(key, d, load(k + key * k_dim + d, k_dim - d)); });
    }
  });
  if constexpr (K == 1) {
    for (int r = 0; r < R; ++r) s[r * kPanel] = sum(acc[r]);
  } else if constexpr (R == 1 && K == kLanes) {
    sums(acc).store(s);
  } else {
    alignas(64) float all[kLanes];
    sums(acc).store(all);
    for (int r = 0; r < R; ++r) std::copy_n(all + r * K, K, s + r * kPanel);
  }
}

template <typename T, int R, int N>
inline void add_values(const Panel<T>& panel, int64_t head, const T* const* ahead, const float* s, int v_dim, int d, float* o,
                       int o_stride) {
  Vec acc[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) acc[r][n] = Vec::loadu(o + r * o_stride + d + n * kLanes);
  for (int i = 0; i < panel.num_runs; ++i) {
    const Run<T>& run = panel.runs[i];
    for (int j = 0; j < run.length; ++j) {
      if (ahead[i] != nullptr) prefetch(ahead[i] + j * v_dim + d, N * kLanes);
      const T* v = run.v + head + j * v_dim + d;
      Vec p[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) p[r] = Vec(s[r * kPanel + run.offset + j]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const Vec value = load(v + n * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r][n] = at::vec::fmadd(p[r], value, acc[r][n]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) acc[r][n].store(o + r * o_stride + d + n * kLanes);
}

// o[r] += sum over the panel's keys of s[r][key] * v[key], from feature d on, as far as vectors of N go. ahead: for each run,
// what is read next after all of this, or null.
template <typename T, int R, int N>
inline int add_values_from(const Panel<T>& panel, int64_t head, const T* const* ahead, const float* s, int v_dim, int d,
                           float* o, int o_stride) {
  for (; d + N * kLanes <= v_dim; d += N * kLanes) add_values<T, R, N>(panel, head, ahead, s, v_dim, d, o, o_stride);
  return d;
}

template <typename T, int R>
void attend_few(const Call& c, const Job& job, const T* query, const T* k_pool, const T* v_pool, const Sink<T>& sink,
                Scratch& scratch) {
  constexpr int K = R == 1 ? kLanes : R == 2 ? kLanes / 2 : kLanes / 4;  // keys whose sums fill a vector
  constexpr int N = R == 1 ? 8 : R == 2 ? 4 : 2;  // vectors of features that fill the registers of AVX2
  const int q_stride = ceil_div(c.k_dim, kLanes) * kLanes, o_stride = ceil_div(c.v_dim, kLanes) * kLanes;
  const int num_rows = job.num_heads * R;
  scratch.q.assign(num_rows * q_stride, 0.f);
  scratch.o.assign(num_rows * o_stride, 0.f);
  scratch.m.resize(num_rows);
  scratch.l.resize(num_rows);
  int position[R];
  for (int r = 0; r < R; ++r) position[r] = job.first_position + r / c.group;
  for (int i = 0; i < num_rows; ++i) {
    const T* row = query_row(c, job, query, i / R, i % R);
    for (int d = 0; d < c.k_dim; ++d) scratch.q[i * q_stride + d] = static_cast<float>(row[d]) * c.scaling;
    const bool has_sink = job.has_sink && c.sinks != nullptr;
    scratch.m[i] = has_sink ? c.sinks[(job.kv_head + i / R) * c.group + i % R % c.group] : kLowest;
    scratch.l[i] = has_sink ? 1.f : 0.f;
  }
  alignas(64) float s[R * kPanel];
  Panel<T> panels[2];
  int turn = 0;
  // While a head is computed, the next one's K and V are asked for, row by row; after the last, the next panel's.
  const T *k_ahead[kPanel], *v_ahead[kPanel];
  fill(panels[0], c, job, k_pool, v_pool, job.begin);
  for (int start = job.begin; start < job.end; start += kPanel, turn ^= 1) {
    const Panel<T>& panel = panels[turn];
    Panel<T>& next = panels[turn ^ 1];
    fill(next, c, job, k_pool, v_pool, std::min(start + kPanel, job.end));
    const int padded = ceil_div(panel.length, kLanes) * kLanes;
    for (int h = 0; h < job.num_heads; ++h) {
      for (int i = 0; i < panel.num_runs; ++i) {
        const bool is_last = h + 1 == job.num_heads, is_end = is_last && i >= next.num_runs;
        const Run<T>& run = is_last && !is_end ? next.runs[i] : panel.runs[i];
        k_ahead[i] = is_end ? nullptr : run.k + (is_last ? 0 : (h + 1) * c.k_head);
        v_ahead[i] = is_end ? nullptr : run.v + (is_last ? 0 : (h + 1) * c.v_head);
      }
      const float* q = scratch.q.data() + h * R * q_stride;
      float* o = scratch.o.data() + h * R * o_stride;
      const int64_t k_head = h * c.k_head, v_head = h * c.v_head;
      for (int i = 0; i < panel.num_runs; ++i) {
        const Run<T>& run = panel.runs[i];
        const T* k = run.k + k_head;
        int j = 0;
        for (; j + K <= run.length; j += K) {
          if (k_ahead[i] != nullptr) prefetch(k_ahead[i] + j * c.k_dim, K * c.k_dim);
          dot_keys<T, R, K>(q, q_stride, k + j * c.k_dim, c.k_dim, s + run.offset + j);
        }
        for (; j < run.length; ++j) dot_keys<T, R, 1>(q, q_stride, k + j * c.k_dim, c.k_dim, s + run.offset + j);
      }
      for (int r = 0; r < R; ++r) {
        float* row = s + r * kPanel;
        float &m = scratch.m[h * R + r], &l = scratch.l[h * R + r];
        if (c.softcap > 0.f) {
          for (int j = 0; j < panel.length; ++j) row[j] = c.softcap * std::tanh(row[j] / c.softcap);
        }
        const int visible = std::clamp(position[r] + 1 - start, 0, panel.length);
        for (int j = visible; j < padded; ++j) row[j] = kNegInf;
        const int first = std::min(first_visible(c, position[r], start), panel.length);
        for (int j = 0; j < first; ++j) row[j] = kNegInf;
        Vec highest(m);
        for (int j = 0; j < padded; j += kLanes) highest = larger(highest, Vec::loadu(row + j));
        const float new_m = max(highest);
        if (new_m != m) {
          const float alpha = std::exp(m - new_m);
          l *= alpha;
          for (int d = 0; d < o_stride; d += kLanes)
            (Vec::loadu(o + r * o_stride + d) * Vec(alpha)).store(o + r * o_stride + d);
          m = new_m;
        }
        Vec total(0.f);
        for (int j = 0; j < padded; j += kLanes) {
          const Vec p = (Vec::loadu(row + j) - Vec(new_m)).exp_u20();
          p.store(row + j);
          total = total + p;
        }
        l += sum(total);
      }
      int d = add_values_from<T, R, N>(panel, v_head, v_ahead, s, c.v_dim, 0, o, o_stride);
      if constexpr (N > 4) d = add_values_from<T, R, 4>(panel, v_head, v_ahead, s, c.v_dim, d, o, o_stride);
      d = add_values_from<T, R, 1>(panel, v_head, v_ahead, s, c.v_dim, d, o, o_stride);
      for (; d < c.v_dim; ++d) {
        for (int i = 0; i < panel.num_runs; ++i) {
          const Run<T>& run = panel.runs[i];
          for (int j = 0; j < run.length; ++j)
            for (int r = 0; r < R; ++r)
              o[r * o_stride + d] += s[r * kPanel + run.offset + j] * static_cast<float>(run.v[v_head + j * c.v_dim + d]);
        }
      }
    }
  }
  for (int i = 0; i < num_rows; ++i) {
    const float* o = scratch.o.data() + i * o_stride;
    if (job.partial >= 0) {
      float* partial = sink.partial(c, job, i / R, i % R);
      partial[0] = scratch.m[i];
      partial[1] = scratch.l[i];
      std::copy_n(o, c.v_dim, partial + 2);
    } else {
      T* out = sink.row(c, job, i / R, i % R);
      for (int d = 0; d < c.v_dim; ++d) out[d] = static_cast<T>(o[d] / scratch.l[i]);
    }
  }
}

// -- many rows -------------------------------------------------------------------------------------------------------------

// s[key][row] = sum over d of k[key][d] * q[d][row], for K keys and N vectors of rows.
template <int K, int N>
inline void score_tile(const float* q, const float* k, int k_dim, float* s) {
  Vec acc[K][N];
#pragma GCC unroll 8
  for (int j = 0; j < K; ++j)
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) acc[j][n] = Vec(0.f);
  for (int d = 0; d < k_dim; ++d) {
    Vec x[N];
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) x[n] = Vec::loadu(q + d * kTileRows + n * kLanes);
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) {
      const Vec key(k[j * k_dim + d]);
#pragma GCC unroll 3
      for (int n = 0; n < N; ++n) acc[j][n] = at::vec::fmadd(x[n], key, acc[j][n]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < K; ++j)
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) acc[j][n].store(s + j * kTileRows + n * kLanes);
}

// o[d][row] = alpha[row] * o[d][row] + sum over keys of v[key][d] * p[key][row], for K values of d and N vectors of rows.
template <int K, int N>
inline void value_tile(const Panel<float>& panel, const float* p, const float* alpha, int v_dim, int d, float* o) {
  Vec acc[K][N];
#pragma GCC unroll 3
  for (int n = 0; n < N; ++n) {
    const Vec a = Vec::loadu(alpha + n * kLanes);
#pragma GCC unroll 8
    for (int x = 0; x < K; ++x) acc[x][n] = Vec::loadu(o + (d + x) * kTileRows + n * kLanes) * a;
  }
  for (int i = 0; i < panel.num_runs; ++i) {
    const Run<float>& run = panel.runs[i];
    const float* v = run.v + d;
    const float* weights = p + run.offset * kTileRows;
    for (int j = 0; j < run.length; ++j, v += v_dim, weights += kTileRows) {
      Vec w[N];
#pragma GCC unroll 3
      for (int n = 0; n < N; ++n) w[n] = Vec::loadu(weights + n * kLanes);
#pragma GCC unroll 8
      for (int x = 0; x < K; ++x) {
        const Vec value(v[x]);
#pragma GCC unroll 3
        for (int n = 0; n < N; ++n) acc[x][n] = at::vec::fmadd(w[n], value, acc[x][n]);
      }
    }
  }
#pragma GCC unroll 8
  for (int x = 0; x < K; ++x)
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) acc[x][n].store(o + (d + x) * kTileRows + n * kLanes);
}

template <int N>
void score_panel(const Panel<float>& panel, const float* q, int k_dim, float* s) {
  for (int i = 0; i < panel.num_runs; ++i) {
    const Run<float>& run = panel.runs[i];
    int j = 0;
    for (; j + kKeys <= run.length; j += kKeys)
      score_tile<kKeys, N>(q, run.k + j * k_dim, k_dim, s + (run.offset + j) * kTileRows);
    for (; j < run.length; ++j) score_tile<1, N>(q, run.k + j * k_dim, k_dim, s + (run.offset + j) * kTileRows);
  }
}

template <int N>
void value_panel(const Panel<float>& panel, const float* p, const float* alpha, int v_dim, float* o) {
  int d = 0;
  for (; d + kKeys <= v_dim; d += kKeys) value_tile<kKeys, N>(panel, p, alpha, v_dim, d, o);
  for (; d < v_dim; ++d) value_tile<1, N>(panel, p, alpha, v_dim, d, o);
}

// f<N>(first row) for the row groups of a tile: whole ones of kVecs vectors, then what is left.
template <typename Full, typename Two, typename One>
inline void for_row_groups(int num_rows, const Full& full, const Two& two, const One& one) {
  int vecs = ceil_div(num_rows, kLanes), row = 0;
  for (; vecs >= kVecs; vecs -= kVecs, row += kVecs * kLanes) full(row);
  if (vecs == 2) two(row);
  if (vecs == 1) one(row);
}

inline const Panel<float>& as_float(const Panel<float>& panel, const Call&, Scratch&) { return panel; }

// A panel of reduced precision as floats, once for the whole tile.
template <typename T>
const Panel<float>& as_float(const Panel<T>& panel, const Call& c, Scratch& scratch) {
  scratch.k.resize(kPanel * c.k_dim);
  scratch.v.resize(kPanel * c.v_dim);
  const auto convert = [](const T* from, float* to, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) load(from + i).store(to + i);
    for (; i < n; ++i) to[i] = static_cast<float>(from[i]);
  };
  for (int i = 0; i < panel.num_runs; ++i) {
    const Run<T>& run = panel.runs[i];
    convert(run.k, scratch.k.data() + int64_t(run.offset) * c.k_dim, int64_t(run.length) * c.k_dim);
    convert(run.v, scratch.v.data() + int64_t(run.offset) * c.v_dim, int64_t(run.length) * c.v_dim);
  }
  Panel<float>& out = scratch.panel;
  out.start = panel.start;
  out.length = panel.length;
  out.num_runs = 1;
  out.runs[0] = {scratch.k.data(), scratch.v.data(), 0, panel.length};
  return out;
}

template <typename T>
void attend_many(const Call& c, const Job& job, const T* query, const T* k_pool, const T* v_pool, const Sink<T>& sink,
                 Scratch& scratch) {
  const int num_rows = job.num_tokens * c.group;
  scratch.q.assign(int64_t(c.k_dim) * kTileRows, 0.f);
  scratch.o.assign(int64_t(c.v_dim) * kTileRows, 0.f);
  scratch.s.resize(kPanel * kTileRows);
  for (auto* rows : {&scratch.m, &scratch.l, &scratch.alpha, &scratch.positions}) rows->resize(kTileRows);
  float *q = scratch.q.data(), *o = scratch.o.data(), *s = scratch.s.data();
  float *m = scratch.m.data(), *l = scratch.l.data(), *alpha = scratch.alpha.data(), *positions = scratch.positions.data();
  const bool has_sink = job.has_sink && c.sinks != nullptr;
  for (int r = 0; r < kTileRows; ++r) {
    // Lanes without a row compute on zeros, as if at the first position, and are not written out.
    m[r] = has_sink && r < num_rows ? c.sinks[job.kv_head * c.group + r % c.group] : kLowest;
    l[r] = has_sink ? 1.f : 0.f;
    positions[r] = job.first_position + (r < num_rows ? r / c.group : 0);
    if (r < num_rows) {
      const T* row = query_row(c, job, query, 0, r);
      for (int d = 0; d < c.k_dim; ++d) q[d * kTileRows + r] = static_cast<float>(row[d]) * c.scaling;
    }
  }
  const int last_position = job.first_position + job.num_tokens - 1;
  const int padded_rows = ceil_div(num_rows, kLanes) * kLanes;
  Panel<T> stored[2];
  fill(stored[0], c, job, k_pool, v_pool, job.begin);
  for (int start = job.begin, turn = 0; start < job.end; start += kPanel, turn ^= 1) {
    if (start + kPanel < job.end) {
      fill(stored[turn ^ 1], c, job, k_pool, v_pool, start + kPanel);
      const Panel<T>& next = stored[turn ^ 1];
      for (int i = 0; i < next.num_runs; ++i) prefetch(c, next.runs[i].k, next.runs[i].v, next.runs[i].length);
    }
    const Panel<float>& panel = as_float(stored[turn], c, scratch);
    for_row_groups(
        num_rows, [&](int row) { score_panel<kVecs>(panel, q + row, c.k_dim, s + row); },
        [&](int row) { score_panel<2>(panel, q + row, c.k_dim, s + row); },
        [&](int row) { score_panel<1>(panel, q + row, c.k_dim, s + row); });
    const bool all_visible = start + panel.length - 1 <= job.first_position &&
                             (c.window <= 0 || start > last_position - c.window);
    for (int row = 0; row < padded_rows; row += kLanes) {
      const Vec position = Vec::loadu(positions + row), old_m = Vec::loadu(m + row);
      Vec new_m = old_m;
      for (int j = 0; j < panel.length; ++j) {
        Vec x = Vec::loadu(s + j * kTileRows + row);
        if (c.softcap > 0.f) x = Vec(c.softcap) * (x * Vec(1.f / c.softcap)).tanh();
        if (!all_visible) {
          const Vec key(static_cast<float>(start + j));
          x = Vec::blendv(Vec(kNegInf), x, position >= key);
          if (c.window > 0) x = Vec::blendv(Vec(kNegInf), x, key > position - Vec(static_cast<float>(c.window)));
        }
        if (c.softcap > 0.f || !all_visible) x.store(s + j * kTileRows + row);
        new_m = larger(new_m, x);
      }
      const Vec a = (old_m - new_m).exp_u20();
      Vec total = Vec::loadu(l + row) * a;
      for (int j = 0; j < panel.length; ++j) {
        const Vec p = (Vec::loadu(s + j * kTileRows + row) - new_m).exp_u20();
        p.store(s + j * kTileRows + row);
        total = total + p;
      }
      a.store(alpha + row);
      total.store(l + row);
      new_m.store(m + row);
    }
    for_row_groups(
        num_rows, [&](int row) { value_panel<kVecs>(panel, s + row, alpha + row, c.v_dim, o + row); },
        [&](int row) { value_panel<2>(panel, s + row, alpha + row, c.v_dim, o + row); },
        [&](int row) { value_panel<1>(panel, s + row, alpha + row, c.v_dim, o + row); });
  }
  for (int r = 0; r < num_rows; ++r) {
    if (job.partial >= 0) {
      float* partial = sink.partial(c, job, 0, r);
      partial[0] = m[r];
      partial[1] = l[r];
      for (int d = 0; d < c.v_dim; ++d) partial[2 + d] = o[d * kTileRows + r];
    } else {
      T* out = sink.row(c, job, 0, r);
      const float scale = 1.f / l[r];
      for (int d = 0; d < c.v_dim; ++d) out[d] = static_cast<T>(o[d * kTileRows + r] * scale);
    }
  }
}

// -- matrix kernels --------------------------------------------------------------------------------------------------------

// Whether `multiply`, called like brgemm, takes its second matrix as pack_panel lays it out (pairs of rows beside each other).
// Torch's takes half precision so only where oneDNN has such a kernel for the processor: with AVX512-FP16 but without AMX-FP16
// it takes float16 row by row. So the elements differ from their neighbours, and each of the two shapes of attend_matrix is
// compared with the plain sums, which are exact in float.
template <typename T, typename Multiply>
bool takes_pairs(const Multiply& multiply) {
  constexpr int m = kMatrixStep;
  const auto is_right = [&](int n, int depth) {
    uint32_t state = 1;
    const auto next = [&] { return static_cast<float>(static_cast<int>((state = state * 1664525u + 1013904223u) >> 24) % 15 - 7); };
    std::vector<T> a(m * depth), b(depth * n);
    std::vector<float> product(m * n, 1.f), expected(m * n, 1.f);
    for (T& x : a) x = T(next());
    for (int d = 0; d < depth; ++d) {
      for (int j = 0; j < n; ++j) {
        const float x = next();
        b[(d / 2 * n + j) * 2 + d % 2] = T(x);
        for (int i = 0; i < m; ++i) expected[i * n + j] += static_cast<float>(a[i * depth + d]) * x;
      }
    }
    multiply(m, n, depth, depth, n, n, true, a.data(), b.data(), product.data());
    return product == expected;
  };
  return is_right(kMatrixKeys, 36) && is_right(20, kMatrixKeys);
}

// Torch's, by `takes_pairs`; false where it throws because the processor lacks the instructions.
template <typename T>
bool torch_takes_pairs() {
  try {
    const bool does = takes_pairs<T>([](int m, int n, int k, int lda, int ldb, int ldc, bool add, const T* a, const T* b, float* c) {
      at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, true);
    });
    at::native::cpublas::brgemm_release(true);
    return does;
  } catch (const std::exception&) {
    return false;
  }
}

// Whether torch has a brgemm for T here that attend_matrix can use. In float it is no faster than attend_many.
template <typename T>
bool has_brgemm() {
  if constexpr (sizeof(T) != 2 || kLanes < 16) {
    return false;
  } else {
    static const bool has = torch_takes_pairs<T>();
    return has;
  }
}

// For tests: the verdict of `takes_pairs` on torch's brgemm ("torch"), or on an emulation of one that takes its second matrix
// row by row ("rows") or in pairs of rows ("pairs").
template <typename T>
bool brgemm_verdict(c10::string_view whose) {
  if (whose == "torch") return torch_takes_pairs<T>();
  const bool pairs = whose == "pairs";
  TORCH_CHECK(pairs || whose == "rows", "brgemm_takes_pairs: 'torch', 'rows' or 'pairs', not ", whose);
  return takes_pairs<T>([&](int m, int n, int k, int lda, int ldb, int ldc, bool, const T* a, const T* b, float* c) {
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < n; ++j)
        for (int d = 0; d < k; ++d) {
          const T& x = pairs ? b[(d / 2 * ldb + j) * 2 + d % 2] : b[d * ldb + j];
          c[i * ldc + j] += static_cast<float>(a[i * lda + d]) * static_cast<float>(x);
        }
  });
}

bool brgemm_takes_pairs(at::ScalarType dtype, c10::string_view whose) {
  TORCH_CHECK(dtype == at::kHalf || dtype == at::kBFloat16, "brgemm_takes_pairs: of half precision, not ", dtype);
  return dtype == at::kHalf ? brgemm_verdict<at::Half>(whose) : brgemm_verdict<at::BFloat16>(whose);
}

// The panel's keys [0, length) as brgemm takes a matrix: pairs of rows beside each other. k: of K transposed, [k_dim / 2]
// [kMatrixKeys][2]; v: of V, [kMatrixKeys / 2][v_dim][2], zeros behind `length`: what weighs nothing must not be NaN.
template <typename T>
void pack_panel(const Call& c, const Job& job, const T* k_pool, const T* v_pool, int start, int length, float* k, uint32_t* v) {
  const int words = c.k_dim / 2, v_dim = c.v_dim;
  for_each_run(c, job, k_pool, v_pool, start, start + length, [&](const T* k_run, const T* v_run, int offset, int n) {
    at::vec::transpose_mxn<float>(reinterpret_cast<const float*>(k_run), words, k + offset, kMatrixKeys, n, words);
    for (int j = 0; j < n; ++j) {
      const auto* __restrict row = reinterpret_cast<const uint16_t*>(v_run) + int64_t(j) * v_dim;
      uint32_t* __restrict out = v + int64_t(offset + j) / 2 * v_dim;
      if ((offset + j) % 2 != 0) {  // the run before ended between two
        for (int d = 0; d < v_dim; ++d) out[d] |= uint32_t(row[d]) << 16;
      } else if (j + 1 < n) {
        const uint16_t* __restrict next = row + v_dim;
        for (int d = 0; d < v_dim; ++d) out[d] = row[d] | uint32_t(next[d]) << 16;
        ++j;
      } else {
        for (int d = 0; d < v_dim; ++d) out[d] = row[d];
      }
    }
  });
  const int num_pairs = ceil_div(length, 2);
  std::fill(v + int64_t(num_pairs) * v_dim, v + int64_t(kMatrixKeys / 2) * v_dim, 0u);
}

template <typename T>
void attend_matrix(const Call& c, const Job& job, const T* query, const T* k_pool, const T* v_pool, const Sink<T>& sink,
                   Scratch& scratch) {
  const int num_rows = job.num_tokens * c.group, padded_rows = ceil_div(num_rows, kMatrixStep) * kMatrixStep;
  scratch.q.assign(padded_rows * c.k_dim / 2, 0.f);
  scratch.k.resize(c.k_dim / 2 * kMatrixKeys);
  scratch.v.resize(kMatrixKeys / 2 * c.v_dim);
  scratch.s.resize(padded_rows * kMatrixKeys);
  scratch.p.assign(padded_rows * kMatrixKeys / 2, 0.f);
  scratch.o.assign(padded_rows * c.v_dim, 0.f);
  scratch.m.resize(num_rows);
  scratch.l.resize(num_rows);
  T *q = reinterpret_cast<T*>(scratch.q.data()), *p = reinterpret_cast<T*>(scratch.p.data());
  const T *k = reinterpret_cast<const T*>(scratch.k.data()), *v = reinterpret_cast<const T*>(scratch.v.data());
  float *s = scratch.s.data(), *o = scratch.o.data();
  const bool has_sink = job.has_sink && c.sinks != nullptr;
  for (int r = 0; r < num_rows; ++r) {
    std::copy_n(query_row(c, job, query, 0, r), c.k_dim, q + int64_t(r) * c.k_dim);
    scratch.m[r] = has_sink ? c.sinks[job.kv_head * c.group + r % c.group] : kLowest;
    scratch.l[r] = has_sink ? 1.f : 0.f;
  }
  for (int start = job.begin; start < job.end; start += kMatrixKeys) {
    const int length = std::min(kMatrixKeys, job.end - start);
    pack_panel(c, job, k_pool, v_pool, start, length, scratch.k.data(), reinterpret_cast<uint32_t*>(scratch.v.data()));
    for_each_run(c, job, k_pool, v_pool, start + length, std::min(start + length + kMatrixKeys, job.end),
                 [&](const T* next_k, const T* next_v, int, int n) { prefetch(c, next_k, next_v, n); });
    at::native::cpublas::brgemm(padded_rows, kMatrixKeys, c.k_dim, c.k_dim, kMatrixKeys, kMatrixKeys, false, q, k, s, true);
    for (int r = 0; r < num_rows; ++r) {
      const int position = job.first_position + r / c.group;
      const int visible = std::clamp(position + 1 - start, 0, length), first = first_visible(c, position, start);
      float* row = s + r * kMatrixKeys;
      T* weights = p + r * kMatrixKeys;
      if (first >= visible) {
        std::fill(weights, weights + kMatrixKeys, T(0.f));
        continue;
      }
      const int end = ceil_div(visible, 2 * kLanes) * 2 * kLanes;
      Vec highest(kNegInf);
      if (c.softcap > 0.f) {
        const Vec to_cap(c.scaling / c.softcap), cap(c.softcap / c.scaling);
        for (int j = 0; j < end; j += kLanes) ((Vec::loadu(row + j) * to_cap).tanh() * cap).store(row + j);
      }
      for (int j = visible; j < end; ++j) row[j] = kNegInf;
      for (int j = 0; j < first; ++j) row[j] = kNegInf;
      for (int j = 0; j < end; j += kLanes) highest = larger(highest, Vec::loadu(row + j));
      const float new_m = std::max(scratch.m[r], max(highest) * c.scaling);
      if (new_m != scratch.m[r]) {
        const float alpha = std::exp(scratch.m[r] - new_m);
        scratch.l[r] *= alpha;
        scratch.m[r] = new_m;
        float* sums = o + int64_t(r) * c.v_dim;
        int d = 0;
        for (; d + kLanes <= c.v_dim; d += kLanes) (Vec::loadu(sums + d) * Vec(alpha)).store(sums + d);
        for (; d < c.v_dim; ++d) sums[d] *= alpha;
      }
      const Vec scaling(c.scaling), lowered(-new_m);
      Vec total(0.f);
      for (int j = 0; j < end; j += 2 * kLanes) {
        const Vec a = at::vec::fmadd(Vec::loadu(row + j), scaling, lowered).exp_u20();
        const Vec b = at::vec::fmadd(Vec::loadu(row + j + kLanes), scaling, lowered).exp_u20();
        total = total + a + b;
        at::vec::convert_from_float<T>(a, b).store(weights + j);
      }
      scratch.l[r] += sum(total);
      std::fill(weights + end, weights + kMatrixKeys, T(0.f));
    }
    at::native::cpublas::brgemm(padded_rows, c.v_dim, kMatrixKeys, kMatrixKeys, c.v_dim, c.v_dim, true, p, v, o, true);
  }
  at::native::cpublas::brgemm_release(true);
  for (int r = 0; r < num_rows; ++r) {
    const float* sums = o + int64_t(r) * c.v_dim;
    if (job.partial >= 0) {
      float* partial = sink.partial(c, job, 0, r);
      partial[0] = scratch.m[r];
      partial[1] = scratch.l[r];
      std::copy_n(sums, c.v_dim, partial + 2);
    } else {
      T* out = sink.row(c, job, 0, r);
      const float scale = 1.f / scratch.l[r];
      for (int d = 0; d < c.v_dim; ++d) out[d] = static_cast<T>(sums[d] * scale);
    }
  }
}

template <typename T>
void attend(const Call& c, const Job& job, const T* query, const T* k_pool, const T* v_pool, const Sink<T>& sink,
            Scratch& scratch) {
  switch (job.num_tokens * c.group) {
    case 1: return attend_few<T, 1>(c, job, query, k_pool, v_pool, sink, scratch);
    case 2: return attend_few<T, 2>(c, job, query, k_pool, v_pool, sink, scratch);
    case 3: return attend_few<T, 3>(c, job, query, k_pool, v_pool, sink, scratch);
    case 4: return attend_few<T, 4>(c, job, query, k_pool, v_pool, sink, scratch);
    default:
      if constexpr (sizeof(T) == 2) {
        if (job.num_tokens * c.group >= c.min_matrix_rows) return attend_matrix<T>(c, job, query, k_pool, v_pool, sink, scratch);
      }
      return attend_many<T>(c, job, query, k_pool, v_pool, sink, scratch);
  }
}

// -- the work of a call ----------------------------------------------------------------------------------------------------

// f(i) for i in [0, n), in that order, each by the next thread that is free: jobs differ a lot in size.
template <typename F>
void for_each_job(int64_t n, const F& f) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), n), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t i = next.fetch_add(1); i < n; i = next.fetch_add(1)) f(i);
  });
}

template <typename T>
void run(Call& c, const at::Tensor& query, const at::Tensor& k_pool, const at::Tensor& v_pool,
         const at::Tensor& segments, at::Tensor& out) {
  struct Segment {
    int32_t row, query_len, context_len, table_row;
  };
  const auto* all = reinterpret_cast<const Segment*>(segments.const_data_ptr<int32_t>());
  const int num_segments = static_cast<int>(segments.size(0));
  // The largest first, so that no thread is left alone with it at the end.
  std::vector<int> order(num_segments);
  std::iota(order.begin(), order.end(), 0);
  const auto cost = [&](int i) { return int64_t(all[i].query_len) * all[i].context_len; };
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return cost(a) > cost(b); });

  const bool has_matrix = has_brgemm<T>() && c.k_dim % 2 == 0 && c.scaling > 0.f;
  c.min_matrix_rows = has_matrix ? kMatrixStep / 2 : std::numeric_limits<int>::max();
  const int max_tile_tokens = std::max(1, (has_matrix ? kMatrixRows : kTileRows) / c.group);
  const auto is_few = [&](int num_tokens) { return num_tokens * c.group <= kFewRows; };
  int64_t num_tiles = 0, num_few = 0;
  for (int i = 0; i < num_segments; ++i) {
    num_tiles += int64_t(ceil_div(all[i].query_len, max_tile_tokens)) * c.num_kv_heads;
    num_few += is_few(all[i].query_len);
  }
  // Heads that a job of few rows takes: many, but not so many that there are too few jobs for the threads to share evenly; one
  // where the next head is in the same place.
  const int64_t min_jobs = int64_t(4) * at::get_num_threads();
  const int max_few_heads = c.num_sharers > 1 ? 1 : c.num_kv_heads;
  const int few_heads = std::clamp(static_cast<int>(num_few * c.num_kv_heads / min_jobs), 1, max_few_heads);
  const int max_splits = static_cast<int>(ceil_div(2 * at::get_num_threads(), static_cast<int>(std::max<int64_t>(1, num_tiles))));

  struct Combination {
    int first_job, num_splits;
  };
  std::vector<Job> jobs;
  std::vector<Combination> combinations;
  jobs.reserve(num_tiles);
  int64_t num_partials = 0;
  for (const int i : order) {
    const Segment& segment = all[i];
    if (segment.query_len == 0) continue;  // pads a batch of decodes
    const int first_position = segment.context_len - segment.query_len;
    const int tile_tokens = ceil_div(segment.query_len, ceil_div(segment.query_len, max_tile_tokens));  // of equal size
    for (int t = 0; t < segment.query_len; t += tile_tokens) {
      const int num_tokens = std::min(tile_tokens, segment.query_len - t);
      const int position = first_position + t, end = position + num_tokens;
      const int begin = c.window > 0 ? std::max(0, position - c.window + 1) : 0;
      const int num_splits = std::clamp((end - begin) / kMinSplit, 1, max_splits);
      const int split = ceil_div(end - begin, num_splits);
      const int step = is_few(num_tokens) ? few_heads : 1;
      for (int head = 0; head < c.num_kv_heads; head += step) {
        const int num_heads = std::min(step, c.num_kv_heads - head);
        if (num_splits > 1) combinations.push_back({static_cast<int>(jobs.size()), ceil_div(end - begin, split)});
        for (int from = begin; from < end; from += split) {
          const bool is_split = num_splits > 1;
          jobs.push_back({head, num_heads, segment.row + t, position, num_tokens, segment.table_row, from,
                          std::min(end, from + split), is_split ? num_partials : -1, from == begin});
          if (is_split) num_partials += num_heads * num_tokens * c.group;
        }
      }
    }
  }
  std::vector<float> partials(num_partials * (c.v_dim + 2));
  const T* q = query.const_data_ptr<T>();
  const T* k = k_pool.const_data_ptr<T>();
  const T* v = v_pool.const_data_ptr<T>();
  const Sink<T> sink{out.mutable_data_ptr<T>(), partials.data(), static_cast<int>(query.size(0))};
  for_each_job(static_cast<int64_t>(jobs.size()), [&](int64_t i) {
    static thread_local Scratch scratch;
    attend<T>(c, jobs[i], q, k, v, sink, scratch);
  });
  for_each_job(static_cast<int64_t>(combinations.size()), [&](int64_t i) {
    const Job* parts = jobs.data() + combinations[i].first_job;
    const int n = combinations[i].num_splits;
    const int rows_per_head = parts[0].num_tokens * c.group;
    for (int i = 0; i < parts[0].num_heads * rows_per_head; ++i) {
      const int h = i / rows_per_head, r = i % rows_per_head;
      float m = kLowest, l = 0.f;
      for (int p = 0; p < n; ++p) m = std::max(m, sink.partial(c, parts[p], h, r)[0]);
      for (int p = 0; p < n; ++p) {
        float* partial = sink.partial(c, parts[p], h, r);
        partial[0] = std::exp(partial[0] - m);  // the weight of this part from here on
        l += partial[0] * partial[1];
      }
      T* row = sink.row(c, parts[0], h, r);
      for (int d = 0; d < c.v_dim; ++d) {
        float total = 0.f;
        for (int p = 0; p < n; ++p) {
          const float* partial = sink.partial(c, parts[p], h, r);
          total += partial[0] * partial[2 + d];
        }
        row[d] = static_cast<T>(total / l);
      }
    }
  });
}

void check_pools(const at::Tensor& k_pool, const at::Tensor& v_pool) {
  for (const auto* pool : {&k_pool, &v_pool}) {
    TORCH_CHECK(pool->dim() == 4 && pool->stride(3) == 1 && pool->stride(2) == pool->size(3),
                "a pool must be [num_blocks, num_kv_heads, chunk_size, dim] with its tokens next to each other");
  }
  TORCH_CHECK(k_pool.sizes().slice(0, 3) == v_pool.sizes().slice(0, 3), "the pools of K and V differ in shape");
}

at::Tensor paged_attention(const at::Tensor& query, const at::Tensor& k_pool, const at::Tensor& v_pool,
                           const at::Tensor& segments, const at::Tensor& block_tables, double scaling,
                           int64_t sliding_window, double softcap, const std::optional<at::Tensor>& sinks) {
  check_pools(k_pool, v_pool);
  TORCH_CHECK(query.dim() == 3 && query.stride(2) == 1 && query.size(2) == k_pool.size(3),
              "query must be [num_heads, num_tokens, k_dim]");
  TORCH_CHECK(query.scalar_type() == k_pool.scalar_type() && query.scalar_type() == v_pool.scalar_type(),
              "query and pools must have the same dtype");
  TORCH_CHECK(query.size(0) % k_pool.size(1) == 0, "num_heads must be a multiple of num_kv_heads");
  TORCH_CHECK(segments.scalar_type() == at::kInt && segments.is_contiguous() && segments.dim() == 2 && segments.size(1) == 4,
              "segments must be int32 [num_segments, 4]");
  TORCH_CHECK(block_tables.scalar_type() == at::kInt && block_tables.dim() == 2 && block_tables.stride(1) == 1,
              "block_tables must be int32 [rows, capacity]");
  at::Tensor sink_values;
  if (sinks.has_value()) {
    sink_values = sinks->to(at::kFloat).contiguous();
    TORCH_CHECK(sink_values.numel() == query.size(0), "sinks must be [num_heads]");
  }
  Call c;
  const int num_heads = static_cast<int>(query.size(0)), group = num_heads / static_cast<int>(k_pool.size(1));
  c.group = std::min(group, kTileRows);
  while (group % c.group != 0) --c.group;
  c.num_sharers = group / c.group;
  c.num_kv_heads = num_heads / c.group;
  c.k_dim = static_cast<int>(k_pool.size(3));
  c.v_dim = static_cast<int>(v_pool.size(3));
  c.chunk_size = static_cast<int>(k_pool.size(2));
  c.q_head = query.stride(0);
  c.q_token = query.stride(1);
  c.k_block = k_pool.stride(0);
  c.k_head = k_pool.stride(1);
  c.v_block = v_pool.stride(0);
  c.v_head = v_pool.stride(1);
  c.table_stride = block_tables.stride(0);
  c.tables = block_tables.const_data_ptr<int32_t>();
  c.scaling = static_cast<float>(scaling);
  c.softcap = static_cast<float>(softcap);
  c.window = static_cast<int>(sliding_window);
  c.sinks = sink_values.defined() ? sink_values.const_data_ptr<float>() : nullptr;
  at::Tensor out = at::empty({query.size(1), query.size(0), v_pool.size(3)}, query.options());
  switch (query.scalar_type()) {
    case at::kFloat: run<float>(c, query, k_pool, v_pool, segments, out); break;
    case at::kBFloat16: run<at::BFloat16>(c, query, k_pool, v_pool, segments, out); break;
    case at::kHalf: run<at::Half>(c, query, k_pool, v_pool, segments, out); break;
    default: TORCH_CHECK(false, "paged_attention: dtype ", query.scalar_type(), " is not supported");
  }
  return out;
}

// K and V of this step to their slots (block_id * chunk_size + offset), but for slots of -1. key, value: [num_kv_heads,
// num_tokens, dim].
void write_kv(const at::Tensor& k_pool, const at::Tensor& v_pool, const at::Tensor& key, const at::Tensor& value,
              const at::Tensor& slot_mapping) {
  check_pools(k_pool, v_pool);
  TORCH_CHECK(slot_mapping.scalar_type() == at::kLong && slot_mapping.is_contiguous(), "slot_mapping must be int64");
  const int64_t num_tokens = slot_mapping.numel(), chunk_size = k_pool.size(2), num_heads = k_pool.size(1);
  const int64_t* slots = slot_mapping.const_data_ptr<int64_t>();
  const std::pair<const at::Tensor*, const at::Tensor*> pairs[] = {{&k_pool, &key}, {&v_pool, &value}};
  for (const auto& [pool, source] : pairs) {
    TORCH_CHECK(source->dim() == 3 && source->size(0) == num_heads && source->size(1) == num_tokens &&
                    source->size(2) == pool->size(3) && source->stride(2) == 1,
                "key and value must be [num_kv_heads, num_tokens, dim]");
    TORCH_CHECK(source->scalar_type() == pool->scalar_type(), "key, value and pools must have the same dtype");
    const int64_t size = source->element_size(), row_bytes = source->size(2) * size;
    char* to = static_cast<char*>(pool->mutable_data_ptr());
    const char* from = static_cast<const char*>(source->const_data_ptr());
    const int64_t block = pool->stride(0) * size, to_head = pool->stride(1) * size;
    const int64_t from_head = source->stride(0) * size, from_token = source->stride(1) * size;
    at::parallel_for(0, num_tokens, 64, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        if (slots[t] < 0) continue;
        char* target = to + slots[t] / chunk_size * block + slots[t] % chunk_size * row_bytes;
        for (int64_t h = 0; h < num_heads; ++h)
          std::memcpy(target + h * to_head, from + h * from_head + t * from_token, row_bytes);
      }
    });
  }
}

}  // namespace

TORCH_LIBRARY(pensieve, m) {
  m.def("paged_attention(Tensor query, Tensor k_pool, Tensor v_pool, Tensor segments, Tensor block_tables, float scaling, "
        "int sliding_window, float softcap, Tensor? sinks) -> Tensor");
  m.def("write_kv(Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor key, Tensor value, Tensor slot_mapping) -> ()");
  m.def("brgemm_takes_pairs(ScalarType dtype, str whose) -> bool", &brgemm_takes_pairs);
}

TORCH_LIBRARY_IMPL(pensieve, CPU, m) {
  m.impl("paged_attention", &paged_attention);
  m.impl("write_kv", &write_kv);
}
