// The inner loops of sparse_conv, behind one function type, for each instruction set as map_kernels.h is.
#pragma once
#include <cstdint>

#include "../isa.h"

namespace taylored {

// Maps are dense and channels-last; the rows of all examples are counted through. weight is [3, channels, 3,
// outputs]: vertical offset, input channel, horizontal offset, output channel.
struct SparseConv {
    const float* x;
    const float* weight;
    const float* bias;  // or null
    float* out;
    int64_t height, width, channels, outputs;
};

constexpr int kSparseChannels = 16;  // input channels taken at a time

struct SparseConvKernel {
    int64_t outputs;  // output channels computed together
    // Some rows of some output channels. scratch: 64-byte aligned, for `outputs` floats of each position of
    // the rows and of 3 * kSparseChannels more.
    void (*run)(const SparseConv& conv, int64_t first_row, int64_t rows, int64_t first_output,
                float* scratch);
};
template <Isa isa>
SparseConvKernel sparse_conv_kernel();

}  // namespace taylored
