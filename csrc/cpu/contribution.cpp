// contribution: [N, C], the sum over positions of activation times gradient (arXiv:1611.06440, eq. 8, before
// |.|).
#include <torch/csrc/stable/library.h>

#include "reduce_map.h"

namespace taylored {

static Tensor contribution(Tensor x, Tensor g) {
    const Tensor x_map = with_map_layout(x, "contribution", "x");
    const Tensor g_map = in_layout_of(x_map, g, "contribution", "x", "g");
    Tensor result = empty_result(x_map, result_type(x_map));
    reduce_map(MapOp::contribution, x_map, g_map.const_data_ptr(), nullptr, &result);
    return result;
}

STABLE_TORCH_LIBRARY_IMPL(taylored, CPU, m) { m.impl("contribution", TORCH_BOX(&contribution)); }

}  // namespace taylored
