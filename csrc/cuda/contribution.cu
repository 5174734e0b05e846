// Launches contribution; see contribution.cuh. Maps of other strides than the two layouts cost one copy.
#include "contribution.cuh"

#include "maps.h"

namespace taylored::cuda {

static Tensor contribution(Tensor x, Tensor g) {
    const Tensor x_map = with_map_layout(x, "contribution", "x");
    const Tensor g_map = in_layout_of(x_map, g, "contribution", "x", "g");
    const Tensor result = empty_result(x_map, result_type(x_map));
    reduce_map<Contribution>(x_map, g_map.const_data_ptr(), nullptr, &result);
    return result;
}

STABLE_TORCH_LIBRARY_IMPL(taylored, CUDA, m) { m.impl("contribution", TORCH_BOX(&contribution)); }

}  // namespace taylored::cuda
