// The inner loop of clamp_difference_; clamp_difference_kernel.cpp is compiled once per instruction set, as
// map_kernels.cpp is. No torch header here either.
#pragma once
#include <cstdint>

namespace taylored {

// d[i] becomes clamp(clean[i] + d[i]) - clamp(clean[i]), for bfloat16 d and float32 clean.
using ClampDifferenceKernel = void (*)(uint16_t* d, const float* clean, int64_t count, float low, float high);
ClampDifferenceKernel clamp_difference_kernel();

}  // namespace taylored
