// The operators over feature maps, the same on either device but for `reduce`, the device's own reduction:
// reduce(map, g or null, out or null, results). Maps of other strides than the two layouts cost one copy each
// way.
#pragma once
#include <array>
#include <tuple>

#include "maps.h"

namespace taylored {

template <class Reduce>
Tensor contribution_by(Reduce reduce, const Tensor& x, const Tensor& g) {
    const Tensor x_map = with_map_layout(x, "contribution", "x");
    const Tensor g_map = in_layout_of(x_map, g, "contribution", "x", "g");
    const Tensor result = empty_result(x_map, result_type(x_map));
    reduce(x_map, g_map.const_data_ptr(), nullptr, &result);
    return result;
}

template <class Reduce>
std::tuple<Tensor, Tensor> relu_backward_by(Reduce reduce, const Tensor& y, const Tensor& g) {
    const Tensor y_map = with_map_layout(y, "relu_backward", "y");
    const Tensor g_map = in_layout_of(y_map, g, "relu_backward", "y", "g");
    Tensor gradient = torch::stable::empty_like(y);
    // Only a y whose layout is neither contiguous nor channels-last needs the detour over a copy.
    const bool direct = y.get() == y_map.get();
    Tensor written = direct ? gradient : torch::stable::empty_like(y_map);
    const Tensor result = empty_result(y_map, result_type(y_map));
    reduce(y_map, g_map.const_data_ptr(), written.mutable_data_ptr(), &result);
    if (!direct) torch::stable::copy_(gradient, written);
    return {gradient, result};
}

template <class Reduce>
std::tuple<Tensor, Tensor, Tensor> channel_statistics_by(Reduce reduce, const Tensor& x) {
    const Tensor map = with_map_layout(x, "channel_statistics", "x");
    const std::array<Tensor, 3> results{empty_result(map, result_type(map)),
                                        empty_result(map, result_type(map)),
                                        empty_result(map, ScalarType::Long)};
    reduce(map, nullptr, nullptr, results.data());
    return {results[0], results[1], results[2]};
}

}  // namespace taylored
