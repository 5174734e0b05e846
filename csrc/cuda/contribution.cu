// Launches contribution; see contribution.cuh.
#include "contribution.cuh"

#include "maps.h"

namespace taylored::cuda {

static Tensor contribution(Tensor x, Tensor g) { return contribution_by(launch_maps<Contribution>, x, g); }

STABLE_TORCH_LIBRARY_IMPL(taylored, CUDA, m) { m.impl("contribution", TORCH_BOX(&contribution)); }

}  // namespace taylored::cuda
