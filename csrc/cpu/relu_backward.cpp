// relu_backward: the gradient through ReLU (g where its output y is positive) and contribution(y, g), from
// one read of both: the score rides on a pass that training makes anyway.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "reduce_map.h"

namespace taylored {

static std::tuple<Tensor, Tensor> relu_backward(Tensor y, Tensor g) {
    const Tensor y_map = with_map_layout(y, "relu_backward", "y");
    const Tensor g_map = in_layout_of(y_map, g, "relu_backward", "y", "g");
    Tensor gradient = torch::stable::empty_like(y);
    // Only a y whose layout is neither contiguous nor channels-last needs the detour over a copy.
    const bool direct = y.get() == y_map.get();
    Tensor written = direct ? gradient : torch::stable::empty_like(y_map);
    Tensor result = empty_result(y_map, result_type(y_map));
    reduce_map(MapOp::relu_backward, y_map, g_map.const_data_ptr(), written.mutable_data_ptr(), &result);
    if (!direct) torch::stable::copy_(gradient, written);
    return {gradient, result};
}

STABLE_TORCH_LIBRARY_IMPL(taylored, CPU, m) { m.impl("relu_backward", TORCH_BOX(&relu_backward)); }

}  // namespace taylored
