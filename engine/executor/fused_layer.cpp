// A decoder layer but for its attention: what is in front of it by one call, what is behind it by another, or stage by stage. See
// fused_layers.py.
//
// Everything is rounded to the dtype exactly where torch's operations round it, and each row is computed by itself. Products and
// normalisations are functions of other libraries, given by address.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

namespace {

// Of each thread: fewer take less time than to wake it.
constexpr int64_t kElementsOfAThread = 1 << 13;

struct BFloat16 {
  uint16_t bits;
};
inline float widen(float value) { return value; }
inline float widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}
inline void narrow(float value, float& to) { to = value; }
// To the nearest, ties to even, as torch does it.
inline void narrow(float value, BFloat16& to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
template <typename T>
inline float rounded(float value) {
  T narrowed;
  narrow(value, narrowed);
  return widen(narrowed);
}

// As `Product`, `Norm` and `Layer` of fused_layers.py.
struct Product {
  void (*multiply)(int dtype, const void* weight, const void* x, void* out, int64_t num_rows, int num_threads);
  const void* weight;
};
struct Norm {
  const void* weight;  // null = there is none
  int64_t length;
  float epsilon;
  int32_t scale;
};
struct Layer {
  int32_t dtype, activation;  // 0 = float, 1 = bfloat16; 0 = SiLU, 1 = GELU by tanh
  int64_t hidden, query, key, value, head, rotary, intermediate;  // lengths
  void (*rms_norm)(int is_wide, int scale, const void* x, const void* weight, void* out, int64_t num_rows, int64_t length,
                   float epsilon, int num_threads);
  Norm before_attention, of_queries, of_keys, behind_attention, before_mlp, behind_mlp;
  Product qkv, output, gate_up, down;
};

template <typename T>
std::unique_ptr<T[]> make_rows(int64_t num_rows, int64_t length) {
  return std::unique_ptr<T[]>(new T[num_rows * length]);
}

template <typename F>
void for_rows(int64_t num_rows, int64_t length, int num_threads, const F& f) {
  if (num_rows * length < 2 * kElementsOfAThread) num_threads = 1;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
  for (int64_t row = 0; row < num_rows; ++row) f(row);
}

template <typename T>
void normalize(const Layer& layer, const Norm& norm, const T* x, T* out, int64_t num_rows, int num_threads) {
  layer.rms_norm(layer.dtype == 0, norm.scale, x, norm.weight, out, num_rows, norm.length, norm.epsilon, num_threads);
}

template <typename T>
void multiply(const Layer& layer, const Product& product, const T* x, T* out, int64_t num_rows, int num_threads) {
  product.multiply(layer.dtype, product.weight, x, out, num_rows, num_threads);
}

// The first `length` elements of a head, turned by the angles of its position.
template <typename T>
void turn(T* head, const T* cos, const T* sin, int64_t length) {
  const int64_t half = length / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = widen(head[i]), second = widen(head[i + half]);
    narrow(rounded<T>(first * widen(cos[i])) + rounded<T>(-second * widen(sin[i])), head[i]);
    narrow(rounded<T>(second * widen(cos[i + half])) + rounded<T>(first * widen(sin[i + half])), head[i + half]);
  }
}

// Within two units in the last place, between -87 and 88; beyond them as at them, so that x / (1 + exp(-x)) is nothing there unless
// x is beyond all measure (1e34), for which torch gives -0.
inline float exponential(float x) {
  constexpr float kRounding = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  x = std::min(std::max(x, -87.0f), 88.0f);
  const float shifted = x * 1.44269504f + kRounding, number = shifted - kRounding;
  const float rest = x - number * 0.693359375f - number * -2.12194440e-4f;
  float sum = 1.9875691500e-4f;
  for (const float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    sum = sum * rest + factor;
  }
  sum = sum * rest * rest + rest + 1.0f;
  uint32_t bits, power;
  std::memcpy(&bits, &sum, sizeof(bits));
  std::memcpy(&power, &shifted, sizeof(power));
  bits += power << 23;
  std::memcpy(&sum, &bits, sizeof(sum));
  return sum;
}

// GELU by tanh is x * sigmoid(2 * ...), because (1 + tanh(y)) / 2 = sigmoid(2 * y).
template <int kActivation>
inline float activated(float x) {
  const float z = kActivation == 0 ? x : 1.5957691216f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exponential(-z));
}

template <typename T, int kActivation>
void gate(const T* gates, const T* values, T* out, int64_t length) {
  for (int64_t i = 0; i < length; ++i) {
    narrow(rounded<T>(activated<kActivation>(widen(gates[i]))) * widen(values[i]), out[i]);
  }
}

// What a part of the layer gives is added to what came in. added: overwritten. out: may be `hidden`.
template <typename T>
void add_part(const Layer& layer, const Norm& norm, const T* hidden, T* added, T* out, int64_t num_rows, int num_threads) {
  if (norm.weight != nullptr) normalize(layer, norm, added, added, num_rows, num_threads);
  for_rows(num_rows, layer.hidden, num_threads, [&](int64_t row) {
    const int64_t begin = row * layer.hidden;
    for (int64_t i = begin; i < begin + layer.hidden; ++i) narrow(widen(hidden[i]) + widen(added[i]), out[i]);
  });
}

// ---- The stages of a layer ------------------------------------------------------------------------------------------------------
// What a stage multiplies by, and what comes of it, are buffers of the caller, who may change the latter before the next stage.
//
//     normed  [num_rows, hidden]; not touched if there is no normalisation in front of a product
//     qkv     [num_rows, query + key + value]
//     added   [num_rows, hidden]: what attention, or the MLP, adds
//     gates   [num_rows, 2 * intermediate]
//     gated   [num_rows, intermediate]

template <typename T>
struct Stages {
  const Layer& layer;
  int64_t num_rows;
  int num_threads;

  void make_qkv(const T* hidden, T* normed, T* qkv) const { multiply_normalized(layer.before_attention, layer.qkv, hidden, normed, qkv); }

  // cos, sin: [num_rows, rotary].
  void turn_heads(const T* cos, const T* sin, T* qkv) const {
    const int64_t stride = layer.query + layer.key + layer.value;
    for_rows(num_rows, stride, num_threads, [&](int64_t row) {
      T* const queries = qkv + row * stride;
      T* const keys = queries + layer.query;
      if (layer.of_queries.weight != nullptr) {
        normalize(layer, layer.of_queries, queries, queries, layer.query / layer.of_queries.length, 1);
      }
      if (layer.of_keys.weight != nullptr) normalize(layer, layer.of_keys, keys, keys, layer.key / layer.of_keys.length, 1);
      if (layer.rotary == 0) return;
      for (T* head = queries; head < keys + layer.key; head += layer.head) {
        turn(head, cos + row * layer.rotary, sin + row * layer.rotary, layer.rotary);
      }
    });
  }

  void make_output(const T* attended, T* added) const { multiply(layer, layer.output, attended, added, num_rows, num_threads); }

  void make_gates(const T* hidden, T* added, T* out, T* normed, T* gates) const {
    add_part(layer, layer.behind_attention, hidden, added, out, num_rows, num_threads);
    multiply_normalized(layer.before_mlp, layer.gate_up, out, normed, gates);
  }

  void make_down(const T* gates, T* gated, T* added) const {
    const auto function = layer.activation == 0 ? gate<T, 0> : gate<T, 1>;
    for_rows(num_rows, layer.intermediate, num_threads, [&](int64_t row) {
      const T* const from = gates + row * 2 * layer.intermediate;
      function(from, from + layer.intermediate, gated + row * layer.intermediate, layer.intermediate);
    });
    multiply(layer, layer.down, gated, added, num_rows, num_threads);
  }

  void finish(T* added, T* out) const { add_part(layer, layer.behind_mlp, out, added, out, num_rows, num_threads); }

 private:
  void multiply_normalized(const Norm& norm, const Product& product, const T* x, T* normed, T* out) const {
    if (norm.weight != nullptr) {
      normalize(layer, norm, x, normed, num_rows, num_threads);
      x = normed;
    }
    multiply(layer, product, x, out, num_rows, num_threads);
  }
};

// All stages in front of attention, or all behind it.
template <typename T>
void before_attention(const Stages<T>& stages, const T* hidden, const T* cos, const T* sin, T* qkv) {
  const auto normed = make_rows<T>(stages.num_rows, stages.layer.hidden);
  stages.make_qkv(hidden, normed.get(), qkv);
  stages.turn_heads(cos, sin, qkv);
}

template <typename T>
void behind_attention(const Stages<T>& stages, const T* hidden, const T* attended, T* out) {
  const int64_t num_rows = stages.num_rows, intermediate = stages.layer.intermediate;
  const auto added = make_rows<T>(num_rows, stages.layer.hidden), normed = make_rows<T>(num_rows, stages.layer.hidden);
  const auto gates = make_rows<T>(num_rows, 2 * intermediate), gated = make_rows<T>(num_rows, intermediate);
  stages.make_output(attended, added.get());
  stages.make_gates(hidden, added.get(), out, normed.get(), gates.get());
  stages.make_down(gates.get(), gated.get(), added.get());
  stages.finish(added.get(), out);
}

// f(stages, pointers...), with pointers to the elements of the layer.
template <typename F, typename... Pointers>
void call(const F& f, const Layer* layer, int64_t num_rows, int num_threads, Pointers*... pointers) {
  if (layer->dtype == 0) {
    f(Stages<float>{*layer, num_rows, num_threads}, reinterpret_cast<float*>(pointers)...);
  } else {
    f(Stages<BFloat16>{*layer, num_rows, num_threads}, reinterpret_cast<BFloat16*>(pointers)...);
  }
}

}  // namespace

extern "C" {

// hidden: [num_rows, hidden], what comes into the layer.
void layer_before_attention(const Layer* layer, char* hidden, char* cos, char* sin, char* qkv, int64_t num_rows, int num_threads) {
  call([](const auto& stages, auto... p) { before_attention(stages, p...); }, layer, num_rows, num_threads, hidden, cos, sin, qkv);
}

// attended: [num_rows, query heads * length of values]. out: [num_rows, hidden].
void layer_behind_attention(const Layer* layer, char* hidden, char* attended, char* out, int64_t num_rows, int num_threads) {
  call([](const auto& stages, auto... p) { behind_attention(stages, p...); }, layer, num_rows, num_threads, hidden, attended, out);
}

// The same, stage by stage.

void layer_make_qkv(const Layer* layer, char* hidden, char* normed, char* qkv, int64_t num_rows, int num_threads) {
  call([](const auto& stages, auto... p) { stages.make_qkv(p...); }, layer, num_rows, num_threads, hidden, normed, qkv);
}

void layer_turn_heads(const Layer* layer, char* cos, char* sin, char* qkv, int64_t num_rows, int num_threads) {
  call([](const auto& stages, auto... p) { stages.turn_heads(p...); }, layer, num_rows, num_threads, cos, sin, qkv);
}

void layer_make_output(const Layer* layer, char* attended, char* added, int64_t num_rows, int num_threads) {
  call([](const auto& stages, auto... p) { stages.make_output(p...); }, layer, num_rows, num_threads, attended, added);
}

void layer_make_gates(const Layer* layer, char* hidden, char* added, char* out, char* normed, char* gates, int64_t num_rows,
                      int num_threads) {
  call([](const auto& stages, auto... p) { stages.make_gates(p...); }, layer, num_rows, num_threads, hidden, added, out, normed, gates);
}

void layer_make_down(const Layer* layer, char* gates, char* gated, char* added, int64_t num_rows, int num_threads) {
  call([](const auto& stages, auto... p) { stages.make_down(p...); }, layer, num_rows, num_threads, gates, gated, added);
}

void layer_finish(const Layer* layer, char* added, char* out, int64_t num_rows, int num_threads) {
  call([](const auto& stages, auto... p) { stages.finish(p...); }, layer, num_rows, num_threads, added, out);
}

}  // extern "C"
