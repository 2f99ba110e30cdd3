// Multiplies inputs by weights that are integers of 8 or 4 bits with a scale for each block of 32 inputs; see block_kernel.py.
//
// Inputs are rounded too, block by block, to integers of 8 bits. A block with a value far beyond its row's others would lose the
// rest, so it gets a second integer of 8 bits for what is left of each input, if the weight asks for that. Products of a block are
// summed as integers, so exactly, and the sums of blocks in float, one block after the other, by operations that give the same
// however many rows there are: what comes out for a row does not depend on the others, to the last bit.
//
//     weight  [panels of 16 outputs][blocks of 32 inputs][groups of 4 inputs][16 outputs][4 inputs], unsigned: the value + a zero point
//             8 bits: 512 bytes a block. 4 bits: 256 bytes, groups 0 to 3 in the low halves of bytes, 4 to 7 in the high ones
//     scales  bfloat16 [panels][blocks][16 outputs]
//
// Plain C for ctypes, and OpenMP.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kLanes = 16, kBlock = 32, kGroup = 4, kGroups = kBlock / kGroup, kGroupBytes = kLanes * kGroup;
constexpr int64_t kBlockBytes = kGroups * kGroupBytes;  // of weights in 8 bits
// Of a register tile: each row times each panel is a sum of integers and one of floats. A few rows take one panel at a time: it is
// read from memory, and one stream of weights is read faster than two. With more rows it is in a cache, and two panels share what is
// loaded of the inputs.
#if defined(__AVX512VNNI__)
constexpr int kFewRows = 12, kPanels = 2, kRows = 6;
#elif defined(__AVX2__)
constexpr int kFewRows = 4, kPanels = 1, kRows = 4;
#else
constexpr int kFewRows = 1, kPanels = 1, kRows = 1;
#endif
// What follows decides how numbers are rounded: if it changes, raise ROUNDING_VERSION in block_kernel.py.
// A second integer counts in steps of 2^-kStepBits of the first.
constexpr int kStepBits = 7;
constexpr int kLimit = 127;
constexpr float kStep = 1.0f / (1 << kStepBits);
// A block with a value beyond so many times the row's root mean square gets second integers.
constexpr float kFar = 4.0f;
constexpr float kRounding = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer, half to even
constexpr float kLeast = 1e-15f;          // blocks that are smaller count as zeros: products of scales are normal numbers
constexpr int64_t kMarks = 16;            // of the rows of a tile, a byte each, which are looked at together
// Rows whose integers are made, and then multiplied by all panels, before the next ones: they stay in a core's cache.
constexpr int64_t kChunkBytes = 512 << 10, kMinChunkRows = 48;
constexpr int64_t kSerialElements = 16384;  // inputs that one thread rounds in less time than it takes to wake others

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

struct BFloat16 {
  uint16_t bits;
};
inline float widen(float value) { return value; }
inline float widen(_Float16 value) { return static_cast<float>(value); }
inline float widen(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
inline void narrow(float value, float& to) { to = value; }
inline void narrow(float value, _Float16& to) { to = static_cast<_Float16>(value); }
inline void narrow(float value, BFloat16& to) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// The largest magnitude of a block; NaN if one of them is.
inline float largest_of(const float* values) {
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int i = 0; i < kBlock; ++i) largest = std::max(largest, bits_of(values[i]) & 0x7fffffffu);
  return float_of(largest);
}

inline int32_t rounded(float value) { return static_cast<int32_t>(bits_of(value + kRounding)) - static_cast<int32_t>(bits_of(kRounding)); }

// ---- Inputs -------------------------------------------------------------------------------------------------------------------

// Rows, rounded, in tiles of `tile_rows` or fewer; what the rows of a tile have at one place lies together:
//
//     integers  [tiles][blocks][num_terms][8 groups][rows][4]
//     scales    [tiles][blocks][rows]
//     offsets   [tiles][blocks][num_terms][rows]; the sum of the integers times the zero point of the weights, negative
//     marks     [tiles][blocks][kMarks]; whether a row has second integers; they are zeros if not
struct Inputs {
  int8_t* integers;
  float* scales;
  int32_t* offsets;
  uint8_t* marks;
  int64_t num_blocks, num_rows, tile_rows;
  int num_terms, zero_point;
  int64_t row_bytes() const { return num_blocks * num_terms * kBlock; }
};

template <typename T>
float mean_square(const T* x, int64_t num_features) {
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= num_features; i += kLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += widen(x[i + lane]) * widen(x[i + lane]);
  }
  for (; i < num_features; ++i) sums[0] += widen(x[i]) * widen(x[i]);
  float sum = 0.0f;
  for (const float part : sums) sum += part;
  return sum / static_cast<float>(num_features);
}

template <typename T>
void round_row(const T* x, int64_t num_features, const Inputs& to, int64_t row) {
  const int64_t tile = row / to.tile_rows, first = tile * to.tile_rows, place = row - first;
  const int64_t count = std::min(to.tile_rows, to.num_rows - first);
  int8_t* at = to.integers + first * to.row_bytes() + place * kGroup;
  float* scale = to.scales + first * to.num_blocks + place;
  int32_t* offset = to.offsets + first * to.num_blocks * to.num_terms + place;
  uint8_t* mark = to.marks + tile * to.num_blocks * kMarks + place;
  const float far = to.num_terms == 1 ? 0.0f : kFar * kFar * mean_square(x, num_features);
  for (int64_t block = 0; block < to.num_blocks; ++block) {
    float values[kBlock];
    const int64_t begin = block * kBlock;
    if (begin + kBlock <= num_features) {
#pragma omp simd
      for (int i = 0; i < kBlock; ++i) values[i] = widen(x[begin + i]);
    } else {
      for (int i = 0; i < kBlock; ++i) values[i] = begin + i < num_features ? widen(x[begin + i]) : 0.0f;
    }
    const float largest = largest_of(values);
    const bool is_zero = largest < kLeast;
    const float inverse = is_zero ? 0.0f : kLimit / largest;
    int8_t terms[2][kBlock];
    int32_t sums[2] = {0, 0};
    const bool is_wide = to.num_terms == 2 && largest * largest > far;
    if (is_wide) {
      int32_t high_sum = 0, low_sum = 0;
#pragma omp simd reduction(+ : high_sum, low_sum)
      for (int i = 0; i < kBlock; ++i) {
        const int32_t number = rounded(values[i] * inverse * (1 << kStepBits));
        const int32_t high = (number + (1 << (kStepBits - 1))) >> kStepBits, low = number - high * (1 << kStepBits);
        terms[0][i] = static_cast<int8_t>(high);
        terms[1][i] = static_cast<int8_t>(low);
        high_sum += high;
        low_sum += low;
      }
      sums[0] = high_sum;
      sums[1] = low_sum;
    } else {
      int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int i = 0; i < kBlock; ++i) {
        terms[0][i] = static_cast<int8_t>(rounded(values[i] * inverse));
        sum += terms[0][i];
      }
      sums[0] = sum;
      std::memset(terms[1], 0, kBlock);
    }
    for (int term = 0; term < to.num_terms; ++term, offset += count) {
      for (int group = 0; group < kGroups; ++group, at += count * kGroup) std::memcpy(at, terms[term] + group * kGroup, kGroup);
      *offset = -to.zero_point * sums[term];
    }
    *scale = is_zero ? 0.0f : largest / kLimit;
    *mark = is_wide;
    scale += count;
    mark += kMarks;
  }
}

// ---- Register tiles: some panels times some rows -------------------------------------------------------------------------------

// Panels one after the other, kPanels of them or one, and where they begin.
//
// ahead: a panel that memory is asked for meanwhile, line by line, since the processor does not look beyond a page by itself; or
// one that is in a cache already.
struct Panels {
  const uint8_t* integers;
  const uint16_t* scales;
  int zero_point;
  const uint8_t* ahead;
};

// Whether a row of a tile has second integers in this block.
inline bool is_marked(const uint8_t* marks) {
  static_assert(std::max(kRows, kFewRows) <= kMarks);
  uint64_t all[2];
  std::memcpy(all, marks, kMarks);
  return (all[0] | all[1]) != 0;
}

// A tile of the inputs, from row `first` on. out [panels][kNumRows][16].
#if defined(__AVX512VNNI__)

// _mm512_dpbusd_epi32, for which GCC 12 copies the sums from register to register, and to memory where there are many.
inline void add_products(__m512i& sum, __m512i weights, __m512i inputs) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(inputs));
}

// f(0), f(1) and so on, written out: GCC keeps an array in registers only if every place in it is known.
template <int kEnd, typename F>
inline __attribute__((always_inline)) void for_each(const F& f) {
  [&]<int... kIndices>(std::integer_sequence<int, kIndices...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, kIndices>{}), ...);
  }(std::make_integer_sequence<int, kEnd>{});
}

template <int kNumPanels, int kNumRows, int kNumTerms, bool kHalf>
void multiply_tile(const Panels& panels, const Inputs& x, int64_t first, float* out) {
  constexpr int64_t kBytes = kHalf ? kBlockBytes / 2 : kBlockBytes;
  constexpr int kNumSums = kNumPanels * kNumRows;
  const int64_t panel_bytes = x.num_blocks * kBytes, panel_scales = x.num_blocks * kLanes;
  const int8_t* integers = x.integers + first * x.row_bytes();
  const float* x_scales = x.scales + first * x.num_blocks;
  const int32_t* offsets = x.offsets + first * x.num_blocks * kNumTerms;
  const uint8_t* marks = x.marks + first / x.tile_rows * x.num_blocks * kMarks;
  const uint8_t* weight = panels.integers;
  const uint16_t* scales = panels.scales;
  const int64_t ahead = panels.ahead - weight;
  __m512 total[kNumSums];
  for_each<kNumSums>([&](auto i) { total[i] = _mm512_setzero_ps(); });
  for (int64_t block = 0; block < x.num_blocks; ++block) {
    __m512i sum[kNumSums];
    const auto add = [&](const __m512i(&w)[kNumPanels], const int8_t* fours) __attribute__((always_inline)) {
      for_each<kNumRows>([&](auto r) {
        int32_t four;
        std::memcpy(&four, fours + r * kGroup, 4);
        const __m512i inputs = _mm512_set1_epi32(four);
        for_each<kNumPanels>([&](auto p) { add_products(sum[p * kNumRows + r], w[p], inputs); });
      });
    };
    const auto add_all = [&](const int8_t* term) __attribute__((always_inline)) {
      for_each<kHalf ? kGroups / 2 : kGroups>([&](auto group) {
        __m512i w[kNumPanels];
        for_each<kNumPanels>([&](auto p) { w[p] = _mm512_loadu_si512(weight + p * panel_bytes + group * kGroupBytes); });
        // Into the second cache: the first can wait for few lines only, and would hold up the products.
        _mm_prefetch(reinterpret_cast<const char*>(weight + ahead + group * kGroupBytes), _MM_HINT_T1);
        if constexpr (kHalf) {
          const __m512i low = _mm512_set1_epi8(15);
          __m512i high[kNumPanels];
          for_each<kNumPanels>([&](auto p) {
            high[p] = _mm512_and_si512(_mm512_srli_epi16(w[p], 4), low);
            w[p] = _mm512_and_si512(w[p], low);
          });
          add(high, term + (group + kGroups / 2) * kNumRows * kGroup);
        }
        add(w, term + group * kNumRows * kGroup);
      });
    };
    for_each<kNumSums>([&](auto i) { sum[i] = _mm512_set1_epi32(offsets[i % kNumRows]); });
    add_all(integers);
    const bool is_wide = kNumTerms == 2 && is_marked(marks);
    if (is_wide) {
      for_each<kNumSums>([&](auto i) {
        sum[i] = _mm512_add_epi32(_mm512_slli_epi32(sum[i], kStepBits), _mm512_set1_epi32(offsets[kNumRows + i % kNumRows]));
      });
      add_all(integers + kBlock * kNumRows);
    }
    for_each<kNumPanels>([&](auto p) {
      const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + p * panel_scales));
      __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
      if (is_wide) scale = _mm512_mul_ps(scale, _mm512_set1_ps(kStep));
      for_each<kNumRows>([&](auto r) {
        constexpr int i = p * kNumRows + r;
        const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(x_scales[r]));
        total[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[i]), factor, total[i]);
      });
    });
    weight += kBytes;
    scales += kLanes;
    integers += kNumTerms * kBlock * kNumRows;
    x_scales += kNumRows;
    offsets += kNumTerms * kNumRows;
    marks += kMarks;
  }
  for_each<kNumSums>([&](auto i) { _mm512_storeu_ps(out + i * kLanes, total[i]); });
}

#elif defined(__AVX2__)

// Bytes are multiplied in pairs whose sum has 16 bits, which an unsigned weight of 8 bits would exceed: it is taken as magnitude and
// sign instead. Half a panel at a time.
template <int kNumPanels, int kNumRows, int kNumTerms, bool kHalf>
void multiply_tile(const Panels& panels, const Inputs& x, int64_t first, float* out) {
  static_assert(kNumPanels == 1);
  const __m256i ones = _mm256_set1_epi16(1), zeros = _mm256_set1_epi8(static_cast<char>(panels.zero_point));
  const int64_t ahead = panels.ahead - panels.integers;
  for (int half = 0; half < 2; ++half) {
    const int8_t* integers = x.integers + first * x.row_bytes();
    const float* x_scales = x.scales + first * x.num_blocks;
    const uint8_t* weight = panels.integers + half * kGroupBytes / 2;
    const uint16_t* scales = panels.scales + half * kLanes / 2;
    const uint8_t* marks = x.marks + first / x.tile_rows * x.num_blocks * kMarks;
    __m256 total[kNumRows];
    for (int r = 0; r < kNumRows; ++r) total[r] = _mm256_setzero_ps();
    for (int64_t block = 0; block < x.num_blocks; ++block) {
      __m256i sum[kNumRows];
      for (int r = 0; r < kNumRows; ++r) sum[r] = _mm256_setzero_si256();
      const auto add = [&](__m256i w, const int8_t* fours) __attribute__((always_inline)) {
        w = _mm256_sub_epi8(w, zeros);
        const __m256i magnitude = _mm256_abs_epi8(w);
        for (int r = 0; r < kNumRows; ++r) {
          int32_t four;
          std::memcpy(&four, fours + r * kGroup, 4);
          const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(_mm256_set1_epi32(four), w));
          sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(pairs, ones));
        }
      };
      const auto add_all = [&](const int8_t* term) __attribute__((always_inline)) {
        for (int group = 0; group < (kHalf ? kGroups / 2 : kGroups); ++group) {
          const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight + group * kGroupBytes));
          if (half == 0) _mm_prefetch(reinterpret_cast<const char*>(weight + ahead + group * kGroupBytes), _MM_HINT_T1);
          if constexpr (kHalf) {
            const __m256i low = _mm256_set1_epi8(15);
            add(_mm256_and_si256(w, low), term + group * kNumRows * kGroup);
            add(_mm256_and_si256(_mm256_srli_epi16(w, 4), low), term + (group + kGroups / 2) * kNumRows * kGroup);
          } else {
            add(w, term + group * kNumRows * kGroup);
          }
        }
      };
      add_all(integers);
      const bool is_wide = kNumTerms == 2 && is_marked(marks);
      if (is_wide) {
        for (int r = 0; r < kNumRows; ++r) sum[r] = _mm256_slli_epi32(sum[r], kStepBits);
        add_all(integers + kBlock * kNumRows);
      }
      const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
      __m256 scale = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
      if (is_wide) scale = _mm256_mul_ps(scale, _mm256_set1_ps(kStep));
      for (int r = 0; r < kNumRows; ++r) {
        const __m256 factor = _mm256_mul_ps(scale, _mm256_set1_ps(x_scales[r]));
        total[r] = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sum[r]), factor), total[r]);
      }
      weight += kHalf ? kBlockBytes / 2 : kBlockBytes;
      scales += kLanes;
      integers += kNumTerms * kBlock * kNumRows;
      x_scales += kNumRows;
      marks += kMarks;
    }
    for (int r = 0; r < kNumRows; ++r) _mm256_storeu_ps(out + r * kLanes + half * kLanes / 2, total[r]);
  }
}

#else

template <int kNumPanels, int kNumRows, int kNumTerms, bool kHalf>
void multiply_tile(const Panels& panels, const Inputs& x, int64_t first, float* out) {
  static_assert(kNumPanels == 1 && kNumRows == 1);
  const int8_t* integers = x.integers + first * x.row_bytes();
  const uint8_t* weight = panels.integers;
  const uint16_t* scales = panels.scales;
  std::fill(out, out + kLanes, 0.0f);
  for (int64_t block = 0; block < x.num_blocks; ++block) {
    const int64_t at = first * x.num_blocks + block;
    const bool is_wide = kNumTerms == 2 && is_marked(x.marks + at * kMarks);
    int32_t sum[kLanes] = {};
    for (int term = 0; term < (is_wide ? 2 : 1); ++term) {
      const int32_t offset = x.offsets[at * kNumTerms + term];
      for (int lane = 0; lane < kLanes; ++lane) sum[lane] = sum[lane] * (1 << kStepBits) + offset;
      for (int group = 0; group < kGroups; ++group) {
        const bool is_high = kHalf && group >= kGroups / 2;
        const uint8_t* const bytes = weight + (is_high ? group - kGroups / 2 : group) * kGroupBytes;
        const int8_t* const four = integers + term * kBlock + group * kGroup;
        for (int lane = 0; lane < kLanes; ++lane) {
          for (int i = 0; i < kGroup; ++i) {
            const int32_t byte = bytes[lane * kGroup + i];
            sum[lane] += (!kHalf ? byte : is_high ? byte >> 4 : byte & 15) * four[i];
          }
        }
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      const float factor = widen(BFloat16{scales[lane]}) * (is_wide ? kStep : 1.0f) * x.scales[at];
      out[lane] += static_cast<float>(sum[lane]) * factor;
    }
    weight += kHalf ? kBlockBytes / 2 : kBlockBytes;
    scales += kLanes;
    integers += kNumTerms * kBlock;
  }
}

#endif

using Tile = void (*)(const Panels&, const Inputs&, int64_t, float*);

template <int kNumPanels, int kNumRows>
Tile find_tile(int num_rows, int num_terms, bool is_half) {
  if constexpr (kNumRows > 1) {
    if (num_rows < kNumRows) return find_tile<kNumPanels, kNumRows - 1>(num_rows, num_terms, is_half);
  }
  if (num_terms == 1) {
    return is_half ? multiply_tile<kNumPanels, kNumRows, 1, true> : multiply_tile<kNumPanels, kNumRows, 1, false>;
  }
  return is_half ? multiply_tile<kNumPanels, kNumRows, 2, true> : multiply_tile<kNumPanels, kNumRows, 2, false>;
}

// ---- A multiplication -----------------------------------------------------------------------------------------------------------

struct Weight {
  const uint8_t* integers;
  const uint16_t* scales;
  const float* bias;  // or null
  int64_t in_features, out_features;
  int64_t num_bits, num_terms;
  int64_t num_blocks() const { return ceil_div(in_features, kBlock); }
  int64_t num_panels() const { return ceil_div(out_features, kLanes); }
  int64_t block_bytes() const { return num_bits == 4 ? kBlockBytes / 2 : kBlockBytes; }
  int zero_point() const { return num_bits == 4 ? 8 : 128; }
};

// In 8 bits, with the same zero point. ahead: memory is asked for the same number of blocks from there on.
void widen_panels(const uint8_t* halves, int64_t num_blocks, uint8_t* to, const uint8_t* ahead) {
  for (int64_t block = 0; block < num_blocks; ++block, halves += kBlockBytes / 2, to += kBlockBytes) {
    for (int line = 0; line < kBlockBytes / 2; line += kGroupBytes) __builtin_prefetch(ahead + line, 0, 2);
    ahead += kBlockBytes / 2;
    for (int i = 0; i < kBlockBytes / 2; ++i) to[i] = halves[i] & 15;
    for (int i = 0; i < kBlockBytes / 2; ++i) to[kBlockBytes / 2 + i] = halves[i] >> 4;
  }
}

// Memory for the integers of a call, aligned for vectors.
struct Scratch {
  explicit Scratch(int64_t num_bytes) : memory(static_cast<uint8_t*>(::operator new(num_bytes, kAlignment))) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { ::operator delete(memory, kAlignment); }
  static constexpr std::align_val_t kAlignment{64};
  uint8_t* const memory;
};

// products: [num_rows][16], of which num_lanes count. Rows of `out` are `stride` apart.
template <typename T>
void store_products(const float* products, const float* bias, int64_t num_rows, int64_t num_lanes, T* out, int64_t stride) {
  float added[kLanes] = {};
  if (bias != nullptr) std::copy(bias, bias + num_lanes, added);
  for (int64_t row = 0; row < num_rows; ++row, products += kLanes, out += stride) {
    T elements[kLanes];
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) narrow(products[lane] + added[lane], elements[lane]);
    if (num_lanes == kLanes) {
      std::memcpy(out, elements, sizeof(elements));
    } else {
      std::memcpy(out, elements, num_lanes * sizeof(T));
    }
  }
}

// kNumPanels panels from `panel` on, with all rows of `inputs`. out: [rows, out_features]. wide: room for the panels in 8 bits.
// next: the panel that this thread multiplies then.
template <int kNumPanels, int kMaxRows, typename T>
void multiply_panels(const Weight& w, int64_t panel, int64_t next, const Inputs& inputs, T* out, uint8_t* wide) {
  const int64_t blocks = panel * inputs.num_blocks, panel_bytes = inputs.num_blocks * w.block_bytes();
  Panels panels{w.integers + blocks * w.block_bytes(), w.scales + blocks * kLanes, w.zero_point(), nullptr};
  const uint8_t* ahead = w.integers + next * panel_bytes;
  bool is_half = w.num_bits == 4;
  if (is_half && inputs.num_rows > inputs.tile_rows) {  // once for all tiles
    widen_panels(panels.integers, kNumPanels * inputs.num_blocks, wide, ahead);
    panels.integers = wide;
    is_half = false;
  }
  alignas(64) float products[kNumPanels * kMaxRows * kLanes];
  for (int64_t first = 0; first < inputs.num_rows; first += inputs.tile_rows) {
    const int64_t count = std::min(inputs.tile_rows, inputs.num_rows - first);
    const int64_t tile = first / inputs.tile_rows;
    panels.ahead = tile < kNumPanels && panels.integers != wide ? ahead + tile * panel_bytes : panels.integers;
    find_tile<kNumPanels, kMaxRows>(static_cast<int>(count), inputs.num_terms, is_half)(panels, inputs, first, products);
    for (int64_t p = 0; p < kNumPanels; ++p) {
      const int64_t feature = (panel + p) * kLanes, num_lanes = std::min(kLanes, w.out_features - feature);
      T* const to = out + first * w.out_features + feature;
      store_products(products + p * count * kLanes, w.bias == nullptr ? nullptr : w.bias + feature, count, num_lanes, to,
                     w.out_features);
    }
  }
}

template <typename T>
void multiply(const Weight& w, const T* x, T* out, int64_t num_rows, int num_threads) {
  const int64_t num_blocks = w.num_blocks(), num_panels = w.num_panels(), row_bytes = num_blocks * kBlock * w.num_terms;
  const int64_t chunk_rows = std::min(num_rows, std::max(kMinChunkRows, kChunkBytes / row_bytes / kMinChunkRows * kMinChunkRows));
  const Scratch scratch(chunk_rows * (row_bytes + num_blocks * (4 + 4 * w.num_terms + kMarks)));
  float* const scales = reinterpret_cast<float*>(scratch.memory + chunk_rows * row_bytes);
  int32_t* const offsets = reinterpret_cast<int32_t*>(scales + chunk_rows * num_blocks);
  uint8_t* const marks = reinterpret_cast<uint8_t*>(offsets + chunk_rows * num_blocks * w.num_terms);
  const int64_t job_panels = std::max<int64_t>(1, num_panels / (8 * num_threads) / kPanels) * kPanels;
  for (int64_t first = 0; first < num_rows; first += chunk_rows) {
    const int64_t count = std::min(chunk_rows, num_rows - first);
    const bool is_few = count <= kFewRows;
    const int64_t tile_rows = is_few ? count : ceil_div(count, ceil_div(count, kRows));
    const Inputs inputs{
        .integers = reinterpret_cast<int8_t*>(scratch.memory),
        .scales = scales,
        .offsets = offsets,
        .marks = marks,
        .num_blocks = num_blocks,
        .num_rows = count,
        .tile_rows = tile_rows,
        .num_terms = static_cast<int>(w.num_terms),
        .zero_point = w.zero_point(),
    };
    std::memset(marks, 0, ceil_div(count, tile_rows) * num_blocks * kMarks);
    const T* const from = x + first * w.in_features;
    T* const to = out + first * w.out_features;
    const bool is_serial = count * w.in_features <= kSerialElements;
    if (is_serial) {
      for (int64_t row = 0; row < count; ++row) round_row(from + row * w.in_features, w.in_features, inputs, row);
    }
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(num_threads)
    {
      if (!is_serial) {
#pragma omp for
        for (int64_t row = 0; row < count; ++row) round_row(from + row * w.in_features, w.in_features, inputs, row);
      }
      const Scratch wide(w.num_bits == 4 && !is_few ? kPanels * num_blocks * kBlockBytes : 0);
      // Each thread knows what comes next before it begins with what it has.
      int64_t following = next.fetch_add(job_panels);
      for (int64_t panel = following; panel < num_panels; panel = following) {
        following = next.fetch_add(job_panels);
        const int64_t end = std::min(panel + job_panels, num_panels);
        const auto after = [&](int64_t i) { return std::min(i < end ? i : following, num_panels - 1); };
        int64_t i = panel;
        if (is_few) {
          for (; i < end; ++i) multiply_panels<1, kFewRows>(w, i, after(i + 1), inputs, to, wide.memory);
        }
        for (; i + kPanels <= end; i += kPanels) {
          multiply_panels<kPanels, kRows>(w, i, after(i + kPanels), inputs, to, wide.memory);
        }
        for (; i < end; ++i) multiply_panels<1, kRows>(w, i, after(i + 1), inputs, to, wide.memory);
      }
    }
  }
}

// ---- Rounding of weights ----------------------------------------------------------------------------------------------------------

// The bfloat16 nearest to it.
inline float as_scale(float value) {
  BFloat16 element;
  narrow(value, element);
  return widen(element);
}

// The integers of a block, from -limit or so to limit; returns their scale.
float round_to_8_bits(const float* values, int32_t* numbers) {
  const float largest = largest_of(values);
  if (largest < kLeast) {
    std::fill(numbers, numbers + kBlock, 0);
    return 0.0f;
  }
  const float scale = as_scale(largest / kLimit), inverse = 1.0f / scale;
  for (int i = 0; i < kBlock; ++i) numbers[i] = std::clamp(rounded(values[i] * inverse), -kLimit, kLimit);
  return scale;
}

// Of several scales, the one with the least squared error. -8 is used for the value that is the largest of the block, or none.
float round_to_4_bits(const float* values, int32_t* numbers) {
  const float largest = largest_of(values);
  std::fill(numbers, numbers + kBlock, 0);
  if (largest < kLeast) return 0.0f;
  static constexpr float kCandidates[] = {7.0f, 7.3f, 7.6f, 8.0f, 8.4f, 8.8f, 9.3f, 9.8f};
  float best_scale = 0.0f, least_error = float_of(0x7f800000u);
  for (const float sign : {1.0f, -1.0f}) {
    for (const float candidate : kCandidates) {
      const float scale = as_scale(sign * largest / candidate), inverse = 1.0f / scale;
      float error = 0.0f;
      for (int i = 0; i < kBlock; ++i) {
        const float integer = std::clamp(values[i] * inverse + kRounding - kRounding, -8.0f, 7.0f);
        const float difference = integer * scale - values[i];
        error += difference * difference;
      }
      if (error < least_error) {
        least_error = error;
        best_scale = scale;
      }
    }
  }
  const float inverse = 1.0f / best_scale;
  for (int i = 0; i < kBlock; ++i) numbers[i] = std::clamp(rounded(values[i] * inverse), -8, 7);
  return best_scale;
}

template <typename T>
void pack(const T* weight, int64_t in_features, int64_t out_features, int num_bits, uint8_t* integers, uint16_t* scales,
          int num_threads) {
  const int64_t num_blocks = ceil_div(in_features, kBlock), num_panels = ceil_div(out_features, kLanes);
  const int64_t block_bytes = num_bits == 4 ? kBlockBytes / 2 : kBlockBytes;
#pragma omp parallel for num_threads(num_threads)
  for (int64_t panel = 0; panel < num_panels; ++panel) {
    for (int64_t block = 0; block < num_blocks; ++block) {
      uint8_t* const to = integers + (panel * num_blocks + block) * block_bytes;
      std::memset(to, 0, block_bytes);
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t row = panel * kLanes + lane;
        float values[kBlock] = {};
        int32_t numbers[kBlock];
        for (int64_t i = 0; row < out_features && i < std::min(kBlock, in_features - block * kBlock); ++i) {
          values[i] = widen(weight[row * in_features + block * kBlock + i]);
        }
        const float scale = num_bits == 4 ? round_to_4_bits(values, numbers) : round_to_8_bits(values, numbers);
        scales[(panel * num_blocks + block) * kLanes + lane] = static_cast<uint16_t>(bits_of(scale) >> 16);
        for (int64_t i = 0; i < kBlock; ++i) {
          const int64_t group = i / kGroup, place = lane * kGroup + i % kGroup;
          if (num_bits == 4) {
            const int number = numbers[i] + 8;
            to[group % (kGroups / 2) * kGroupBytes + place] |=
                static_cast<uint8_t>(group < kGroups / 2 ? number : number << 4);
          } else {
            to[group * kGroupBytes + place] = static_cast<uint8_t>(numbers[i] + 128);
          }
        }
      }
    }
  }
}

}  // namespace

// dtype: 0 = float, 1 = bfloat16, 2 = float16.
extern "C" void block_pack(int dtype, const void* weight, int64_t in_features, int64_t out_features, int num_bits,
                           uint8_t* integers, uint16_t* scales, int num_threads) {
  if (dtype == 0) pack(static_cast<const float*>(weight), in_features, out_features, num_bits, integers, scales, num_threads);
  if (dtype == 1) pack(static_cast<const BFloat16*>(weight), in_features, out_features, num_bits, integers, scales, num_threads);
  if (dtype == 2) pack(static_cast<const _Float16*>(weight), in_features, out_features, num_bits, integers, scales, num_threads);
}

// x: [num_rows, in_features]. out: [num_rows, out_features].
extern "C" void block_multiply(int dtype, const Weight* weight, const void* x, void* out, int64_t num_rows, int num_threads) {
  if (dtype == 0) multiply(*weight, static_cast<const float*>(x), static_cast<float*>(out), num_rows, num_threads);
  if (dtype == 1) multiply(*weight, static_cast<const BFloat16*>(x), static_cast<BFloat16*>(out), num_rows, num_threads);
  if (dtype == 2) multiply(*weight, static_cast<const _Float16*>(x), static_cast<_Float16*>(out), num_rows, num_threads);
}
