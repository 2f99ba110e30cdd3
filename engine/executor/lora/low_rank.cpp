// What adapters add to a few rows of a linear layer, in one call: out[row] += scale * (x[row] @ a.T) @ b, with those of the row's
// adapter. Twin of layers.py, whose torch operations are for many rows and for GPUs, and the oracle. Knows nothing of requests.
//
//     out     [num_rows, out_features], x [num_rows, in_features]: rows of out may lie apart, the elements of one do not
//     a       of each adapter: [rank, in_features]
//     b       of each adapter: [rank, out_features]
//     rows    of each adapter: int64, which rows get it; no row is in two
//
// A job is an adapter and up to kRows of its rows, for which each weight is read once. All sums are in float.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <vector>

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();
constexpr int64_t kRows = 4;
constexpr int64_t kVecs = 2;               // vectors of output features that are summed at once, for each row
constexpr int64_t kWorthThreads = 1 << 16;  // multiplications of a call with which a second thread pays

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
inline float sum(Vec v) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, v);
}
inline void store(const Vec (&v)[kVecs], float* p) {
  for (int64_t i = 0; i < kVecs; ++i) v[i].store(p + i * kLanes);
}
template <typename T>
void store(const Vec (&v)[kVecs], T* p) {
  static_assert(kVecs == 2);
  at::vec::convert_from_float<T>(v[0], v[1]).store(p);
}

struct Weights {
  const void *a, *b;
  float scale;
  int64_t rank, in_features, out_features;
};

// low[rank][R] = scale * a @ x.T
template <typename T, int64_t R>
void shrink(const Weights& w, const T* const (&x)[R], float* low) {
  const T* a = static_cast<const T*>(w.a);
  const int64_t whole = w.in_features / kLanes * kLanes;
  for (int64_t r = 0; r < w.rank; ++r, a += w.in_features, low += R) {
    Vec sums[R];
    for (auto& s : sums) s = Vec(0.0f);
    for (int64_t i = 0; i < whole; i += kLanes) {
      const Vec weight = load(a + i);
      for (int64_t row = 0; row < R; ++row) sums[row] = at::vec::fmadd(weight, load(x[row] + i), sums[row]);
    }
    for (int64_t row = 0; row < R; ++row) {
      low[row] = sum(sums[row]);
      for (int64_t i = whole; i < w.in_features; ++i)
        low[row] += static_cast<float>(a[i]) * static_cast<float>(x[row][i]);
      low[row] *= w.scale;
    }
  }
}

// out += low.T @ b
template <typename T, int64_t R>
void expand(const Weights& w, const float* low, T* const (&out)[R]) {
  const T* b = static_cast<const T*>(w.b);
  int64_t o = 0;
  for (; o + kVecs * kLanes <= w.out_features; o += kVecs * kLanes) {
    Vec sums[R][kVecs];
    for (int64_t row = 0; row < R; ++row)
      for (int64_t v = 0; v < kVecs; ++v) sums[row][v] = load(out[row] + o + v * kLanes);
    for (int64_t r = 0; r < w.rank; ++r)
      for (int64_t v = 0; v < kVecs; ++v) {
        const Vec weight = load(b + r * w.out_features + o + v * kLanes);
        for (int64_t row = 0; row < R; ++row) sums[row][v] = at::vec::fmadd(weight, Vec(low[r * R + row]), sums[row][v]);
      }
    for (int64_t row = 0; row < R; ++row) store(sums[row], out[row] + o);
  }
  for (; o < w.out_features; ++o)
    for (int64_t row = 0; row < R; ++row) {
      float total = static_cast<float>(out[row][o]);
      for (int64_t r = 0; r < w.rank; ++r) total += low[r * R + row] * static_cast<float>(b[r * w.out_features + o]);
      out[row][o] = static_cast<T>(total);
    }
}

template <typename T, int64_t R>
void add_rows(const Weights& w, const int64_t* rows, T* out, int64_t out_stride, const T* x, int64_t x_stride) {
  const T* inputs[R];
  T* outputs[R];
  for (int64_t i = 0; i < R; ++i) {
    inputs[i] = x + rows[i] * x_stride;
    outputs[i] = out + rows[i] * out_stride;
  }
  std::vector<float> low(w.rank * R);
  shrink<T, R>(w, inputs, low.data());
  expand<T, R>(w, low.data(), outputs);
}

template <typename T>
void run(const std::vector<Weights>& weights, at::TensorList rows, at::Tensor& out, const at::Tensor& x) {
  struct Job {
    const Weights* weights;
    const int64_t* rows;
    int64_t num_rows;
  };
  std::vector<Job> jobs;
  int64_t work = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t* first = rows[i].const_data_ptr<int64_t>();
    for (int64_t n = rows[i].numel(); n > 0; n -= kRows, first += kRows) jobs.push_back({&weights[i], first, std::min(n, kRows)});
    work += rows[i].numel() * weights[i].rank * (weights[i].in_features + weights[i].out_features);
  }
  T* to = out.mutable_data_ptr<T>();
  const T* from = x.const_data_ptr<T>();
  const int64_t num_jobs = static_cast<int64_t>(jobs.size()), grain = work < kWorthThreads ? num_jobs : 1;
  at::parallel_for(0, num_jobs, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Job& job = jobs[i];
      const auto call = [&](auto add) { add(*job.weights, job.rows, to, out.stride(0), from, x.stride(0)); };
      switch (job.num_rows) {
        case 1: call(add_rows<T, 1>); break;
        case 2: call(add_rows<T, 2>); break;
        case 3: call(add_rows<T, 3>); break;
        default: call(add_rows<T, 4>);
      }
    }
  });
}

void add_low_rank(at::Tensor& out, const at::Tensor& input, at::TensorList a, at::TensorList b,
                  at::ArrayRef<double> scales, at::TensorList rows) {
  TORCH_CHECK(out.dim() == 2 && input.dim() == 2 && out.size(0) == input.size(0) && out.stride(1) == 1,
              "out and x must be [num_rows, features], with the elements of a row of out next to each other");
  const at::Tensor x = input.stride(1) == 1 ? input : input.contiguous();
  TORCH_CHECK(a.size() == b.size() && a.size() == scales.size() && a.size() == rows.size(),
              "a, b, scales and rows must have one element for each adapter");
  std::vector<Weights> weights;
  for (size_t i = 0; i < a.size(); ++i) {
    TORCH_CHECK(a[i].dim() == 2 && b[i].dim() == 2 && a[i].size(0) == b[i].size(0) && a[i].size(1) == x.size(1) &&
                    b[i].size(1) == out.size(1) && a[i].is_contiguous() && b[i].is_contiguous(),
                "a must be [rank, in_features] and b [rank, out_features]");
    TORCH_CHECK(a[i].scalar_type() == out.scalar_type() && b[i].scalar_type() == out.scalar_type() &&
                    x.scalar_type() == out.scalar_type(),
                "out, x, a and b must have the same dtype");
    TORCH_CHECK(rows[i].scalar_type() == at::kLong && rows[i].is_contiguous(), "rows must be int64");
    const int64_t* row = rows[i].const_data_ptr<int64_t>();
    for (int64_t j = 0; j < rows[i].numel(); ++j)
      TORCH_CHECK(row[j] >= 0 && row[j] < out.size(0), "there is no row ", row[j], " among ", out.size(0));
    const float scale = static_cast<float>(scales[i]);
    weights.push_back({a[i].const_data_ptr(), b[i].const_data_ptr(), scale, a[i].size(0), a[i].size(1), b[i].size(1)});
  }
  switch (out.scalar_type()) {
    case at::kFloat: run<float>(weights, rows, out, x); break;
    case at::kBFloat16: run<at::BFloat16>(weights, rows, out, x); break;
    case at::kHalf: run<at::Half>(weights, rows, out, x); break;
    default: TORCH_CHECK(false, "no kernel for ", out.scalar_type());
  }
}

}  // namespace

TORCH_LIBRARY(pensieve_lora, m) {
  m.def("add_low_rank(Tensor(a!) out, Tensor x, Tensor[] a, Tensor[] b, float[] scales, Tensor[] rows) -> ()");
}

TORCH_LIBRARY_IMPL(pensieve_lora, CPU, m) { m.impl("add_low_rank", &add_low_rank); }
