// Copies blocks between the GPU tier (in host memory) and records of the cold tiers, see cold_format.py, whose reference
// it agrees with bit for bit. Plain C for ctypes, one thread: who calls it decides beside what it runs.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr float kMinRange = 0x1p-12f, kTiny = 1e-30f, kLeastFp8 = 0x1p-100f;
constexpr int kTopExponent = 7;
constexpr int64_t kLanes = 16;

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

float float_of(uint32_t bits) {
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

struct Unit {
  int64_t is_key, dim, elements, scales, payload;
};

struct Shape {
  int64_t chunk_size;
  int levels;  // 255 of int8, 15 of int4, 0 of fp8
};

// The factor that takes a value above the lower bound to a number; if the bounds are as good as equal, 0, and one bound.
inline float inverse_range(float low, float& high, float levels) {
  const float range = high - low, magnitude = std::max(low < 0 ? -low : low, high < 0 ? -high : high);
  if (range <= magnitude * kMinRange || range < kTiny) {
    high = low;
    return 0.0f;
  }
  return levels / range;
}

inline uint8_t number_of(float above, float inverse, float levels) {
  float number = above * inverse + 0.5f;
  number = number > 0.0f ? number : 0.0f;
  number = number < levels ? number : levels;
  return static_cast<uint8_t>(static_cast<int32_t>(number));
}

void pack_row(const uint8_t* numbers, uint8_t* packed, int64_t dim) {
  const int64_t half = (dim + 1) / 2;
  for (int64_t i = 0; i < dim - half; ++i) packed[i] = numbers[i] | static_cast<uint8_t>(numbers[half + i] << 4);
  if (dim % 2) packed[half - 1] = numbers[half - 1];
}

void unpack_row(const uint8_t* packed, uint8_t* numbers, int64_t dim) {
  const int64_t half = (dim + 1) / 2;
  for (int64_t i = 0; i < half; ++i) numbers[i] = packed[i] & 15;
  for (int64_t i = 0; i < dim - half; ++i) numbers[half + i] = packed[i] >> 4;
}

struct Scratch {
  std::vector<float> values, low, high, inverse;
  std::vector<uint8_t> numbers;
  Scratch(int64_t chunk_size, int64_t dim)
      : values(chunk_size * dim), low(dim), high(dim), inverse(dim), numbers(dim) {}
};

template <typename T>
void store_bound(uint8_t* at, float value) {
  T element;
  narrow(value + 0.0f, element);  // of zeros, the positive one
  std::memcpy(at, &element, sizeof(T));
}

template <typename T>
float load_bound(const uint8_t* at) {
  T element;
  std::memcpy(&element, at, sizeof(T));
  return widen(element);
}

void bounds_of_row(const float* row, int64_t dim, float& low, float& high) {
  float lows[kLanes], highs[kLanes];
  std::fill(lows, lows + kLanes, row[0]);
  std::fill(highs, highs + kLanes, row[0]);
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) {
      lows[k] = row[i + k] < lows[k] ? row[i + k] : lows[k];
      highs[k] = row[i + k] > highs[k] ? row[i + k] : highs[k];
    }
  }
  for (; i < dim; ++i) {
    lows[0] = row[i] < lows[0] ? row[i] : lows[0];
    highs[0] = row[i] > highs[0] ? row[i] : highs[0];
  }
  low = *std::min_element(lows, lows + kLanes);
  high = *std::max_element(highs, highs + kLanes);
}

template <typename T>
void encode_int(const Shape& shape, const Unit& unit, uint8_t* record, int64_t num_tokens, Scratch& scratch) {
  const int64_t dim = unit.dim, row_bytes = shape.levels == 15 ? (dim + 1) / 2 : dim;
  const float levels = static_cast<float>(shape.levels);
  uint8_t* const scales = record + unit.scales;
  float *const low = scratch.low.data(), *const high = scratch.high.data(), *const inverse = scratch.inverse.data();
  const float* const values = scratch.values.data();
  if (unit.is_key) {
    std::copy(values, values + dim, low);
    std::copy(values, values + dim, high);
    for (int64_t token = 1; token < num_tokens; ++token) {
      const float* const row = values + token * dim;
      for (int64_t i = 0; i < dim; ++i) {
        low[i] = row[i] < low[i] ? row[i] : low[i];
        high[i] = row[i] > high[i] ? row[i] : high[i];
      }
    }
    for (int64_t i = 0; i < dim; ++i) {
      inverse[i] = inverse_range(low[i], high[i], levels);
      store_bound<T>(scales + i * sizeof(T), low[i]);
      store_bound<T>(scales + (dim + i) * sizeof(T), high[i]);
    }
  } else {
    std::memset(scales, 0, shape.chunk_size * 2 * sizeof(T));
  }
  uint8_t* const payload = record + unit.payload;
  for (int64_t token = 0; token < num_tokens; ++token) {
    const float* const row = values + token * dim;
    uint8_t* const to = payload + token * row_bytes;
    uint8_t* const numbers = shape.levels == 15 ? scratch.numbers.data() : to;
    if (unit.is_key) {
      for (int64_t i = 0; i < dim; ++i) numbers[i] = number_of(row[i] - low[i], inverse[i], levels);
    } else {
      float least, greatest;
      bounds_of_row(row, dim, least, greatest);
      const float factor = inverse_range(least, greatest, levels);
      store_bound<T>(scales + (2 * token) * sizeof(T), least);
      store_bound<T>(scales + (2 * token + 1) * sizeof(T), greatest);
      for (int64_t i = 0; i < dim; ++i) numbers[i] = number_of(row[i] - least, factor, levels);
    }
    if (shape.levels == 15) pack_row(numbers, to, dim);
  }
  std::memset(payload + num_tokens * row_bytes, 0, (shape.chunk_size - num_tokens) * row_bytes);
}

template <typename T>
void decode_int(const Shape& shape, const Unit& unit, const uint8_t* record, T* block, Scratch& scratch) {
  const int64_t dim = unit.dim, row_bytes = shape.levels == 15 ? (dim + 1) / 2 : dim;
  const float levels = static_cast<float>(shape.levels);
  const uint8_t* const scales = record + unit.scales;
  float *const low = scratch.low.data(), *const high = scratch.high.data();
  if (unit.is_key) {
    for (int64_t i = 0; i < dim; ++i) {
      low[i] = load_bound<T>(scales + i * sizeof(T));
      high[i] = load_bound<T>(scales + (dim + i) * sizeof(T));
    }
  }
  for (int64_t token = 0; token < shape.chunk_size; ++token) {
    const uint8_t* numbers = record + unit.payload + token * row_bytes;
    T* const to = block + unit.elements + token * dim;
    if (shape.levels == 15) {
      unpack_row(numbers, scratch.numbers.data(), dim);
      numbers = scratch.numbers.data();
    }
    if (unit.is_key) {
      for (int64_t i = 0; i < dim; ++i) {
        const float share = static_cast<float>(numbers[i]) / levels;
        narrow(low[i] * (1.0f - share) + high[i] * share, to[i]);
      }
    } else {
      const float least = load_bound<T>(scales + (2 * token) * sizeof(T));
      const float greatest = load_bound<T>(scales + (2 * token + 1) * sizeof(T));
      for (int64_t i = 0; i < dim; ++i) {
        const float share = static_cast<float>(numbers[i]) / levels;
        narrow(least * (1.0f - share) + greatest * share, to[i]);
      }
    }
  }
}

// The power of two, itself within the range of floats if the exponent is between -126 and 127; else two factors.
inline float scaled_by(float value, int exponent) {
  const int first = exponent / 2, second = exponent - first;
  return value * float_of(static_cast<uint32_t>(127 + first) << 23) * float_of(static_cast<uint32_t>(127 + second) << 23);
}

inline uint8_t e4m3_of(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu, sign = (bits >> 24) & 0x80u;
  const uint32_t normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
  const uint32_t small = bits_of(float_of(magnitude) + 16384.0f) & 0xffu;
  return static_cast<uint8_t>(sign | (magnitude < (121u << 23) ? small : normal));
}

inline float float_of_e4m3(uint8_t number) {
  const uint32_t magnitude = number & 0x7fu, sign = static_cast<uint32_t>(number & 0x80u) << 24;
  const float small = static_cast<float>(magnitude) * 0x1p-9f, normal = float_of((magnitude << 20) + (120u << 23));
  return float_of(bits_of(magnitude < 8 ? small : normal) | sign);
}

void encode_fp8(const Shape& shape, const Unit& unit, uint8_t* record, int64_t num_tokens, const Scratch& scratch) {
  const int64_t count = num_tokens * unit.dim;
  const float* const values = scratch.values.data();
  uint32_t greatest = 0;
  for (int64_t i = 0; i < count; ++i) greatest = std::max(greatest, bits_of(values[i]) & 0x7fffffffu);
  const bool is_zero = float_of(greatest) < kLeastFp8;
  const int exponent = is_zero ? 0 : std::min(127, static_cast<int>((greatest + (1u << 19)) >> 23) - 127);
  record[unit.scales] = static_cast<uint8_t>(static_cast<int8_t>(exponent));
  uint8_t* const payload = record + unit.payload;
  if (is_zero) {
    std::memset(payload, 0, shape.chunk_size * unit.dim);
    return;
  }
  for (int64_t i = 0; i < count; ++i) payload[i] = e4m3_of(scaled_by(values[i], kTopExponent - exponent));
  std::memset(payload + count, 0, shape.chunk_size * unit.dim - count);
}

template <typename T>
void decode_fp8(const Shape& shape, const Unit& unit, const uint8_t* record, T* block) {
  const int exponent = static_cast<int8_t>(record[unit.scales]);
  const uint8_t* const numbers = record + unit.payload;
  T* const to = block + unit.elements;
  for (int64_t i = 0; i < shape.chunk_size * unit.dim; ++i) {
    narrow(scaled_by(float_of_e4m3(numbers[i]), exponent - kTopExponent), to[i]);
  }
}

int64_t widest(const Unit* units, int64_t num_units) {
  int64_t dim = 1;
  for (int64_t i = 0; i < num_units; ++i) dim = std::max(dim, units[i].dim);
  return dim;
}

template <typename T>
void encode(const T* block, uint8_t* record, const Unit* units, int64_t num_units, const Shape& shape, int64_t num_tokens) {
  Scratch scratch(shape.chunk_size, widest(units, num_units));
  for (int64_t i = 0; i < num_units; ++i) {
    const Unit& unit = units[i];
    for (int64_t j = 0; j < num_tokens * unit.dim; ++j) scratch.values[j] = widen(block[unit.elements + j]);
    if (shape.levels == 0) {
      encode_fp8(shape, unit, record, num_tokens, scratch);
    } else {
      encode_int<T>(shape, unit, record, num_tokens, scratch);
    }
  }
}

template <typename T>
void decode(const uint8_t* record, T* block, const Unit* units, int64_t num_units, const Shape& shape) {
  Scratch scratch(1, widest(units, num_units));
  for (int64_t i = 0; i < num_units; ++i) {
    if (shape.levels == 0) {
      decode_fp8(shape, units[i], record, block);
    } else {
      decode_int(shape, units[i], record, block, scratch);
    }
  }
}

}  // namespace

// dtype: 0 = float, 1 = bfloat16, 2 = float16. levels: 255, 15, or 0 of fp8. num_tokens: at least 1.
extern "C" void cold_encode(int dtype, const void* block, uint8_t* record, const int64_t* units, int64_t num_units,
                            int64_t chunk_size, int levels, int64_t num_tokens) {
  const Unit* const rows = reinterpret_cast<const Unit*>(units);
  const Shape shape{chunk_size, levels};
  if (dtype == 0) encode(static_cast<const float*>(block), record, rows, num_units, shape, num_tokens);
  if (dtype == 1) encode(static_cast<const BFloat16*>(block), record, rows, num_units, shape, num_tokens);
  if (dtype == 2) encode(static_cast<const _Float16*>(block), record, rows, num_units, shape, num_tokens);
}

extern "C" void cold_decode(int dtype, const uint8_t* record, void* block, const int64_t* units, int64_t num_units,
                            int64_t chunk_size, int levels) {
  const Unit* const rows = reinterpret_cast<const Unit*>(units);
  const Shape shape{chunk_size, levels};
  if (dtype == 0) decode(record, static_cast<float*>(block), rows, num_units, shape);
  if (dtype == 1) decode(record, static_cast<BFloat16*>(block), rows, num_units, shape);
  if (dtype == 2) decode(record, static_cast<_Float16*>(block), rows, num_units, shape);
}
