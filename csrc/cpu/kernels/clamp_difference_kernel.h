// The inner loop of clamp_difference_, for each instruction set as map_kernels.h is.
#pragma once
#include <cstdint>

#include "../isa.h"

namespace taylored {

// d[i] becomes clamp(clean[i] + d[i]) - clamp(clean[i]), for bfloat16 d and float32 clean.
using ClampDifferenceKernel = void (*)(uint16_t* d, const float* clean, int64_t count, float low, float high);
template <Isa isa>
ClampDifferenceKernel clamp_difference_kernel();

}  // namespace taylored
