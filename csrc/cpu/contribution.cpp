// contribution: [N, C], the sum over positions of activation times gradient (arXiv:1611.06440, eq. 8, before
// |.|).
#include <torch/csrc/stable/library.h>

#include <functional>

#include "map_operators.h"
#include "reduce_map.h"

namespace taylored {

static Tensor contribution(Tensor x, Tensor g) {
    return contribution_by(std::bind_front(reduce_map, MapOp::contribution), x, g);
}

STABLE_TORCH_LIBRARY_IMPL(taylored, CPU, m) { m.impl("contribution", TORCH_BOX(&contribution)); }

}  // namespace taylored
