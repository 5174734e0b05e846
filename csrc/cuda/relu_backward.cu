// Launches relu_backward; see relu_backward.cuh. Maps of other strides than the two layouts cost one copy
// each way.
#include "relu_backward.cuh"

#include <tuple>

#include "maps.h"

namespace taylored::cuda {

static std::tuple<Tensor, Tensor> relu_backward(Tensor y, Tensor g) {
    const Tensor y_map = with_map_layout(y, "relu_backward", "y");
    const Tensor g_map = in_layout_of(y_map, g, "relu_backward", "y", "g");
    Tensor gradient = torch::stable::empty_like(y);
    const bool direct = y.get() == y_map.get();
    Tensor written = direct ? gradient : torch::stable::empty_like(y_map);
    const Tensor result = empty_result(y_map, result_type(y_map));
    reduce_map<ReluBackward>(y_map, g_map.const_data_ptr(), written.mutable_data_ptr(), &result);
    if (!direct) torch::stable::copy_(gradient, written);
    return {gradient, result};
}

STABLE_TORCH_LIBRARY_IMPL(taylored, CUDA, m) { m.impl("relu_backward", TORCH_BOX(&relu_backward)); }

}  // namespace taylored::cuda
