#include "clamp_difference_kernel.h"

#include <bit>

namespace taylored {
namespace {

// Comparisons in this order keep NaN.
inline float clamp(float x, float low, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

inline uint16_t to_bfloat16(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    return static_cast<uint16_t>(x == x ? rounded : 0x7fc0);
}

void run(uint16_t* __restrict d, const float* __restrict clean, int64_t count, float low, float high) {
    for (int64_t i = 0; i < count; ++i) {
        const float old = clean[i], difference = std::bit_cast<float>(static_cast<uint32_t>(d[i]) << 16);
        d[i] = to_bfloat16(clamp(old + difference, low, high) - clamp(old, low, high));
    }
}

}  // namespace

template <>
ClampDifferenceKernel clamp_difference_kernel<Isa::TAYLORED_ISA>() {
    return run;
}

}  // namespace taylored
