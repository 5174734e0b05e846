// Launches contribution; see contribution.cuh.
#include "contribution.cuh"

#include "../map_operators.h"
#include "maps.h"

namespace taylored::cuda {

static Tensor contribution(Tensor x, Tensor g) {
    return contribution_by([](const auto&... map) { reduce_map<Contribution>(map...); }, x, g);
}

STABLE_TORCH_LIBRARY_IMPL(taylored, CUDA, m) { m.impl("contribution", TORCH_BOX(&contribution)); }

}  // namespace taylored::cuda
