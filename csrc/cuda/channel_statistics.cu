// Launches channel_statistics; see channel_statistics.cuh.
#include "channel_statistics.cuh"

#include "../map_operators.h"
#include "maps.h"

namespace taylored::cuda {

static std::tuple<Tensor, Tensor, Tensor> channel_statistics(Tensor x) {
    return channel_statistics_by([](const auto&... map) { reduce_map<Statistics>(map...); }, x);
}

STABLE_TORCH_LIBRARY_IMPL(taylored, CUDA, m) { m.impl("channel_statistics", TORCH_BOX(&channel_statistics)); }

}  // namespace taylored::cuda
