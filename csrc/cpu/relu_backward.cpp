// relu_backward: the gradient through ReLU (g where its output y is positive) and contribution(y, g), from
// one read of both: the score rides on a pass that training makes anyway.
#include <torch/csrc/stable/library.h>

#include <functional>

#include "map_operators.h"
#include "reduce_map.h"

namespace taylored {

static std::tuple<Tensor, Tensor> relu_backward(Tensor y, Tensor g) {
    return relu_backward_by(std::bind_front(reduce_map, MapOp::relu_backward), y, g);
}

STABLE_TORCH_LIBRARY_IMPL(taylored, CPU, m) { m.impl("relu_backward", TORCH_BOX(&relu_backward)); }

}  // namespace taylored
