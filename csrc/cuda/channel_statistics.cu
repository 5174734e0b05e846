// Launches channel_statistics; see channel_statistics.cuh.
#include "channel_statistics.cuh"

#include "maps.h"

namespace taylored::cuda {

static std::tuple<Tensor, Tensor, Tensor> channel_statistics(Tensor x) {
    return channel_statistics_by(launch_maps<Statistics>, x);
}

STABLE_TORCH_LIBRARY_IMPL(taylored, CUDA, m) { m.impl("channel_statistics", TORCH_BOX(&channel_statistics)); }

}  // namespace taylored::cuda
