// The inner loops over feature maps, behind one function type. This folder's .cpp files are compiled once per
// instruction set, with TAYLORED_ISA naming it. No torch header here: they also get compiler flags (AVX-512)
// under which no shared inline function may be emitted.
#pragma once
#include <cstdint>

#include "../isa.h"

namespace taylored {

enum class MapOp { contribution, relu_backward, statistics };
enum class MapType { float64, float32, bfloat16, float16 };

// Accumulated quantities per channel: x*g | y*g | x, x*x, x == 0.
constexpr int map_sums(MapOp op) { return op == MapOp::statistics ? 3 : 1; }

// Some positions of some channels: element (p, c) is at p * position_stride + c * channel_stride from each
// pointer. One of the two strides is 1: channels-last maps have adjacent channels, contiguous ones adjacent
// positions.
struct MapBlock {
    const void* x;
    const void* g;  // null for statistics
    void* out;      // relu_backward's gradient, else null
    int64_t positions, position_stride, channels, channel_stride;
};
constexpr int64_t kMaxChannels = 1024;  // of one block: bounds the accumulators on the stack

// Writes sums[k * block.channels + c].
using MapKernel = void (*)(const MapBlock& block, double* sums);
template <Isa isa>
MapKernel map_kernel(MapOp op, MapType type);

}  // namespace taylored
