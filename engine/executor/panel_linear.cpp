// Multiplies rows by a weight that oneDNN laid out; see panel_kernel.py.
//
//     float32   [panels of 64 outputs][inputs, padded to 16][64 outputs]
//     bfloat16  [panels of 64 outputs][pairs of inputs, padded to 32 inputs][64 outputs][2 inputs]
//
// A panel is one stream of memory, which a decode reads once and as fast as memory gives it. Each output of a row is summed over
// the inputs in their order, whatever other rows there are: what comes out for a row does not depend on them, to the last bit.
//
// Plain C for ctypes, and OpenMP. For AVX-512 (bfloat16 with its instructions for that) and AVX2.
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace {

constexpr int64_t kPanel = 64;
constexpr int kCacheLine = 64;
// Bytes of a panel that some rows are multiplied with before the next ones: in the first cache for few tiles of rows, or else
// sums are loaded and stored too often, in the second.
constexpr int64_t kBlockBytes = 8 << 10, kLargeBlockBytes = 64 << 10;
constexpr int64_t kFewTiles = 4;
// Rows that are multiplied with all of a panel before the next ones, at most. There are fewer, but no fewer than the second
// number, while the threads would have too little to do.
constexpr int64_t kMostChunkRows = 96, kLeastChunkRows = 24;

#if defined(__AVX512F__)
using Vector = __m512;
constexpr int kLanes = 16, kRows = 6;
inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Vector value) { _mm512_storeu_ps(to, value); }
inline Vector add_product(Vector sum, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sum); }
inline Vector repeat(float value) { return _mm512_set1_ps(value); }
#else
using Vector = __m256;
constexpr int kLanes = 8, kRows = 2;
inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Vector value) { _mm256_storeu_ps(to, value); }
inline Vector add_product(Vector sum, Vector a, Vector b) { return _mm256_fmadd_ps(a, b, sum); }
inline Vector repeat(float value) { return _mm256_set1_ps(value); }
#endif
// Sums of a row that are in registers at once, so many outputs of the panel.
constexpr int kVectors = 4;
constexpr int64_t kPart = kVectors * kLanes;
static_assert(kPanel % kPart == 0);

struct BFloat16 {
  uint16_t bits;
};
inline void narrow(float value, float& to) { to = value; }
// To the nearest, ties to even.
inline void narrow(float value, BFloat16& to) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Inputs that are multiplied by one instruction, and how far a panel is padded.
template <typename T>
struct Layout;
template <>
struct Layout<float> {
  static constexpr int64_t kGroup = 1, kPadding = 16;
};
template <>
struct Layout<BFloat16> {
  static constexpr int64_t kGroup = 2, kPadding = 32;
};

template <int kEnd, typename F>
inline __attribute__((always_inline)) void for_each(const F& f) {
  [&]<int... kIndices>(std::integer_sequence<int, kIndices...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, kIndices>{}), ...);
  }(std::make_integer_sequence<int, kEnd>{});
}

inline void add_group(Vector* sums, const Vector* weights, const float* x) {
  const Vector input = repeat(*x);
  for_each<kVectors>([&](auto i) __attribute__((always_inline)) { sums[i] = add_product(sums[i], weights[i], input); });
}

#if defined(__AVX512BF16__)
inline void add_group(Vector* sums, const Vector* weights, const BFloat16* x) {
  int32_t pair;
  std::memcpy(&pair, x, sizeof(pair));
  const __m512bh inputs = (__m512bh)_mm512_set1_epi32(pair);
  for_each<kVectors>([&](auto i) __attribute__((always_inline)) {
    sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)weights[i], inputs);
  });
}
#endif

// Cache lines of a group of inputs, and passes over it with a tile of rows.
constexpr int kGroupLines = 4;
constexpr int64_t kParts = kPanel / kPart;
static_assert(kGroupLines <= kVectors);  // a line is asked for beside the load of a vector
static_assert(kGroupLines * kCacheLine == kPanel * Layout<float>::kGroup * sizeof(float));
static_assert(kGroupLines * kCacheLine == kPanel * Layout<BFloat16>::kGroup * sizeof(BFloat16));

// Adds to the sums of some rows with a part of a panel. weight: its groups are kPanel * kGroup apart. x: rows `stride` apart.
// sums: rows kPanel apart. ahead: kLines cache lines from there on are asked of memory beside each group.
template <typename T, int kLines, int kNumRows>
void multiply_tile(const T* weight, const T* x, int64_t stride, int64_t num_groups, float* sums, const char* ahead) {
  constexpr int64_t kGroup = Layout<T>::kGroup;
  Vector total[kNumRows * kVectors];
  for_each<kNumRows * kVectors>([&](auto i) { total[i] = load(sums + i / kVectors * kPanel + i % kVectors * kLanes); });
  for (int64_t group = 0; group < num_groups; ++group, weight += kPanel * kGroup, x += kGroup) {
    Vector weights[kVectors];
    for_each<kVectors>([&](auto i) {
      weights[i] = load(reinterpret_cast<const float*>(weight + i * kLanes * kGroup));
      // Into the second cache: the first can wait for few lines only, and would hold up the products.
      if constexpr (i < kLines) _mm_prefetch(ahead + i * kCacheLine, _MM_HINT_T1);
    });
    ahead += kLines * kCacheLine;
    for_each<kNumRows>([&](auto row) { add_group(total + row * kVectors, weights, x + row * stride); });
  }
  for_each<kNumRows * kVectors>([&](auto i) { store(sums + i / kVectors * kPanel + i % kVectors * kLanes, total[i]); });
}

template <typename T, int kLines, int kNumRows = kRows>
void multiply_rows(const T* weight, const T* x, int64_t stride, int64_t num_groups, float* sums, int64_t num_rows,
                   const char* ahead) {
  if constexpr (kNumRows > 1) {
    if (num_rows < kNumRows) {
      return multiply_rows<T, kLines, kNumRows - 1>(weight, x, stride, num_groups, sums, num_rows, ahead);
    }
  }
  multiply_tile<T, kLines, kNumRows>(weight, x, stride, num_groups, sums, ahead);
}

// All of a panel times up to kMostChunkRows rows. next: the panel that this thread multiplies then.
//
// Memory gives the next block while this one is multiplied, the same number of lines in each pass over it: asked for by the
// first pass alone, the others would wait for nothing, and memory for them.
template <typename T>
void multiply_chunk(const T* weight, const T* next, const T* x, int64_t stride, int64_t num_groups, float* sums,
                    int64_t num_rows) {
  constexpr int64_t kGroup = Layout<T>::kGroup, kGroupBytes = kGroupLines * kCacheLine;
  const int64_t num_tiles = (num_rows + kRows - 1) / kRows, tile_rows = (num_rows + num_tiles - 1) / num_tiles;
  const int64_t num_passes = num_tiles * kParts;
  const int64_t block = (num_tiles > kFewTiles ? kLargeBlockBytes : kBlockBytes) / kGroupBytes;
  std::fill(sums, sums + num_rows * kPanel, 0.0f);
  for (int64_t group = 0; group < num_groups; group += block) {
    const int64_t count = std::min(block, num_groups - group);
    const char* const ahead = reinterpret_cast<const char*>(
        group + block < num_groups ? weight + (group + block) * kPanel * kGroup : next);
    for (int64_t pass = 0; pass < num_passes; ++pass) {
      const int64_t row = pass / kParts * tile_rows, part = pass % kParts * kPart;
      const int64_t first_line = (pass * kGroupLines + num_passes - 1) / num_passes;
      const auto multiply = [&](auto lines) {
        multiply_rows<T, lines>(weight + (group * kPanel + part) * kGroup, x + row * stride + group * kGroup, stride, count,
                                sums + row * kPanel + part, std::min(tile_rows, num_rows - row),
                                ahead + first_line * count * kCacheLine);
      };
      switch (((pass + 1) * kGroupLines + num_passes - 1) / num_passes - first_line) {
        case 0: multiply(std::integral_constant<int, 0>{}); break;
        case 1: multiply(std::integral_constant<int, 1>{}); break;
        case 2: multiply(std::integral_constant<int, 2>{}); break;
        default: multiply(std::integral_constant<int, kGroupLines>{});  // a single pass
      }
    }
  }
}

struct Weight {
  const void* panels;
  const float* bias;  // or null
  int64_t in_features, out_features;
};

template <typename T>
void multiply(const Weight& w, const T* x, T* out, int64_t num_rows, int num_threads) {
  if (num_rows == 0) return;
  constexpr int64_t kGroup = Layout<T>::kGroup, kPadding = Layout<T>::kPadding;
  const int64_t num_panels = (w.out_features + kPanel - 1) / kPanel;
  const int64_t padded = (w.in_features + kPadding - 1) / kPadding * kPadding;
  const int64_t num_groups = (w.in_features + kGroup - 1) / kGroup;
  std::vector<T> padded_x;  // rows whose last group is not whole
  int64_t stride = w.in_features;
  if (w.in_features % kGroup != 0) {
    stride = num_groups * kGroup;
    padded_x.resize(num_rows * stride);
    for (int64_t row = 0; row < num_rows; ++row) {
      std::copy_n(x + row * w.in_features, w.in_features, padded_x.data() + row * stride);
    }
    x = padded_x.data();
  }
  int64_t num_chunks = (num_rows + kMostChunkRows - 1) / kMostChunkRows;
  while (num_panels * num_chunks < 16 * num_threads && num_rows >= 2 * num_chunks * kLeastChunkRows) num_chunks *= 2;
  const int64_t chunk_rows = ((num_rows + num_chunks - 1) / num_chunks + kRows - 1) / kRows * kRows;
  // Each thread knows what comes next before it begins with what it has.
  const int64_t num_items = num_panels * num_chunks, job = std::max<int64_t>(1, num_items / (8 * num_threads));
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(num_threads)
  {
    alignas(kCacheLine) float sums[kMostChunkRows * kPanel];
    const auto panel_of = [&](int64_t item) {
      return static_cast<const T*>(w.panels) + std::min(item / num_chunks, num_panels - 1) * kPanel * padded;
    };
    int64_t following = next.fetch_add(job);
    for (int64_t first = following; first < num_items; first = following) {
      following = next.fetch_add(job);
      const int64_t end = std::min(first + job, num_items);
      for (int64_t item = first; item < end; ++item) {
        const int64_t begin = item % num_chunks * chunk_rows, count = std::min(chunk_rows, num_rows - begin);
        if (count <= 0) continue;
        multiply_chunk(panel_of(item), panel_of(item + 1 < end ? item + 1 : following), x + begin * stride, stride, num_groups,
                       sums, count);
        const int64_t output = item / num_chunks * kPanel, num_outputs = std::min(kPanel, w.out_features - output);
        float bias[kPanel] = {};
        if (w.bias != nullptr) std::copy_n(w.bias + output, num_outputs, bias);
        for (int64_t row = 0; row < count; ++row) {
          T* const to = out + (begin + row) * w.out_features + output;
          for (int64_t i = 0; i < num_outputs; ++i) narrow(sums[row * kPanel + i] + bias[i], to[i]);
        }
      }
    }
  }
}

}  // namespace

// dtype: 0 = float, 1 = bfloat16. x: [num_rows, in_features]. out: [num_rows, out_features].
extern "C" void panel_multiply(int dtype, const Weight* weight, const void* x, void* out, int64_t num_rows, int num_threads) {
  if (dtype == 0) multiply(*weight, static_cast<const float*>(x), static_cast<float*>(out), num_rows, num_threads);
#if defined(__AVX512BF16__)
  if (dtype == 1) multiply(*weight, static_cast<const BFloat16*>(x), static_cast<BFloat16*>(out), num_rows, num_threads);
#endif
}
