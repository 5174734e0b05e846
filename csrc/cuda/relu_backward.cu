// Launches relu_backward; see relu_backward.cuh.
#include "relu_backward.cuh"

#include "maps.h"

namespace taylored::cuda {

static std::tuple<Tensor, Tensor> relu_backward(Tensor y, Tensor g) {
    return relu_backward_by(launch_maps<ReluBackward>, y, g);
}

STABLE_TORCH_LIBRARY_IMPL(taylored, CUDA, m) { m.impl("relu_backward", TORCH_BOX(&relu_backward)); }

}  // namespace taylored::cuda
