// accumulate_: the score's epilogue. A warp takes 32 units and every eighth example, summing over consumers;
// the block folds its eight warps in order and adds to the running total: one small launch, no workspace, and
// nothing the host has to wait for.
#pragma once
#include "../reduction.h"
#include "platform.cuh"

namespace taylored::cuda {

constexpr int kMaxConsumers = 256;
constexpr int kPhases = 8;

struct Consumers {  // travels as a kernel argument: no copy, so that a CUDA graph can hold it
    int count;
    bool is_double[kMaxConsumers];
    const void* t[kMaxConsumers];  // [examples, units] each
};

constexpr int64_t accumulate_blocks(int64_t units) { return ceil_div(units, 32); }

template <class Total>
__global__ __launch_bounds__(32 * kPhases) void accumulate(Total* total, int64_t examples, int64_t units,
                                                           const __grid_constant__ Consumers consumers,
                                                           Reduction reduction, double scale) {
    __shared__ double staged[kPhases][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t unit = blockIdx.x * int64_t(32) + lane;
    double sum = 0;
    if (unit < units) {
        for (int64_t n = warp; n < examples; n += kPhases) {
            const int64_t i = n * units + unit;
            double s = 0;
            for (int k = 0; k < consumers.count; ++k)
                s += consumers.is_double[k] ? static_cast<const double*>(consumers.t[k])[i]
                                            : static_cast<const float*>(consumers.t[k])[i];
            s *= scale;
            sum += reduction == Reduction::abs ? fabs(s) : reduction == Reduction::square ? s * s : s;
        }
    }
    staged[warp][lane] = sum;
    __syncthreads();
    if (warp != 0 || unit >= units) return;
    for (int w = 1; w < kPhases; ++w) sum += staged[w][lane];
    total[unit] += reduction == Reduction::batch ? fabs(sum) : sum;
}

}  // namespace taylored::cuda
