// Launches channel_statistics; see channel_statistics.cuh. Maps of other strides than the two layouts cost
// one copy.
#include "channel_statistics.cuh"

#include <array>
#include <tuple>

#include "maps.h"

namespace taylored::cuda {

static std::tuple<Tensor, Tensor, Tensor> channel_statistics(Tensor x) {
    const Tensor map = with_map_layout(x, "channel_statistics", "x");
    const std::array<Tensor, 3> results{empty_result(map, result_type(map)),
                                        empty_result(map, result_type(map)),
                                        empty_result(map, ScalarType::Long)};
    reduce_map<Statistics>(map, nullptr, nullptr, results.data());
    return {results[0], results[1], results[2]};
}

STABLE_TORCH_LIBRARY_IMPL(taylored, CUDA, m) { m.impl("channel_statistics", TORCH_BOX(&channel_statistics)); }

}  // namespace taylored::cuda
