// Feature maps [N, C, *spatial] as the CPU operators see them: which of two memory layouts they have, how a
// second map is brought to the first one's, and how a reduction over positions is cut into blocks and spread
// over threads. Blocks depend on the shape alone, so results do not depend on the number of threads.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>

#include "map_kernels.h"

namespace taylored {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A map as the kernels take it. Channels-last: N outer maps [P, C], channels adjacent. Contiguous: one map
// whose "channels" are the N * C rows, positions adjacent. Either way result (outer, channel) is element
// outer * channels + channel of [N, C].
struct MapView {
    int64_t outer, positions, position_stride, channels, channel_stride;
};

MapType map_type(const Tensor& x, const char* op, const char* name);

// Whether x is contiguous, or channels-last of any spatial rank.
bool has_map_layout(const Tensor& x);

// x itself, or a contiguous copy where its layout is neither of the two.
Tensor with_map_layout(const Tensor& x, const char* op, const char* name);

// g itself, or a copy in x's layout. Checks that both have the same shape and dtype.
Tensor in_layout_of(const Tensor& x, const Tensor& g, const char* op, const char* x_name, const char* g_name);

MapView view_of(const Tensor& x);

// An uninitialised [N, C] for x's reductions: float64 for float64, else float32; or the dtype given.
Tensor empty_result(const Tensor& x, ScalarType dtype);
ScalarType result_type(const Tensor& x);

// Runs `op` over the whole map; result k goes to results[k], of float32, float64 or int64.
void reduce_map(MapOp op, const Tensor& x, const void* g, void* out, const Tensor* results);

}  // namespace taylored
