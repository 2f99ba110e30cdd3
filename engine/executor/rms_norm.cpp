// Root-mean-square normalisation of rows, in one pass where torch's operations are eight.
//
// Each row is computed by itself and in one order, whatever other rows there are. Called by rms_norm.py, which says what is
// computed.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 16;
// Elements that are worth a second thread.
constexpr int64_t MIN_ELEMENTS_OF_A_THREAD = 1 << 16;

float widen(float value) { return value; }

struct BFloat16 {
    uint16_t bits;
};

float widen(BFloat16 value) {
    uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

void narrow(float value, float& out) { out = value; }

// To the nearest, ties to even, as torch does it.
void narrow(float value, BFloat16& out) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    out.bits = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

template <typename T>
float rounded(float value) {
    T narrowed;
    narrow(value, narrowed);
    return widen(narrowed);
}

// SCALE: see rms_norm.py.
template <typename T, int SCALE>
void normalize(const T* x, const T* weight, T* out, int64_t length, float epsilon) {
    float sums[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= length; i += LANES) {
        for (int lane = 0; lane < LANES; ++lane) {
            const float value = widen(x[i + lane]);
            sums[lane] += value * value;
        }
    }
    float sum = 0;
    for (; i < length; ++i) sum += widen(x[i]) * widen(x[i]);
    for (int lane = 0; lane < LANES; ++lane) sum += sums[lane];
    const float inverse = 1.0f / std::sqrt(sum / static_cast<float>(length) + epsilon);
    for (i = 0; i < length; ++i) {
        const float value = widen(x[i]) * inverse;
        if constexpr (SCALE == 0) narrow(rounded<T>(value) * widen(weight[i]), out[i]);
        if constexpr (SCALE == 1) narrow(value * (1.0f + widen(weight[i])), out[i]);
        if constexpr (SCALE == 2) narrow(value * widen(weight[i]), out[i]);
    }
}

template <typename T, int SCALE>
void normalize_rows(const void* x, const void* weight, void* out, int64_t rows, int64_t length, float epsilon,
                    int num_threads) {
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(out);
    if (rows * length < 2 * MIN_ELEMENTS_OF_A_THREAD) num_threads = 1;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
    for (int64_t row = 0; row < rows; ++row) {
        normalize<T, SCALE>(from + row * length, static_cast<const T*>(weight), to + row * length, length, epsilon);
    }
}

template <typename T>
void choose_scale(int scale, const void* x, const void* weight, void* out, int64_t rows, int64_t length, float epsilon,
                  int num_threads) {
    auto* function = scale == 0   ? normalize_rows<T, 0>
                     : scale == 1 ? normalize_rows<T, 1>
                                  : normalize_rows<T, 2>;
    function(x, weight, out, rows, length, epsilon, num_threads);
}

}  // namespace

// is_wide: float32 and not bfloat16. x, out: [rows, length], contiguous. weight: [length].
extern "C" void rms_norm(int is_wide, int scale, const void* x, const void* weight, void* out, int64_t rows,
                         int64_t length, float epsilon, int num_threads) {
    auto* function = is_wide ? choose_scale<float> : choose_scale<BFloat16>;
    function(scale, x, weight, out, rows, length, epsilon, num_threads);
}
