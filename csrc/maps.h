// Feature maps [N, C, *spatial] as the operators see them, on either device: which of two memory layouts they
// have, and how a second map is brought to the first one's.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "map_view.h"

namespace taylored {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Whether x is contiguous, or channels-last of any spatial rank.
bool has_map_layout(const Tensor& x);

// x itself, or a contiguous copy where its layout is neither of the two. Checks dtype and rank.
Tensor with_map_layout(const Tensor& x, const char* op, const char* name);

// g itself, or a copy in x's layout. Checks that both have the same shape and dtype.
Tensor in_layout_of(const Tensor& x, const Tensor& g, const char* op, const char* x_name, const char* g_name);

MapView view_of(const Tensor& x);

// An uninitialised [N, C] for x's reductions: float64 for float64, else float32; or the dtype given.
Tensor empty_result(const Tensor& x, ScalarType dtype);
ScalarType result_type(const Tensor& x);

}  // namespace taylored
