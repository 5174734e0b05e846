// channel_statistics: sum, sum of squares and number of zeros per example and channel, in one pass: what the
// mean, standard deviation and APoZ criteria are made of.
#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>

#include "reduce_map.h"

namespace taylored {

static std::tuple<Tensor, Tensor, Tensor> channel_statistics(Tensor x) {
    const Tensor map = with_map_layout(x, "channel_statistics", "x");
    const std::array<Tensor, 3> results{empty_result(map, result_type(map)),
                                        empty_result(map, result_type(map)),
                                        empty_result(map, ScalarType::Long)};
    reduce_map(MapOp::statistics, map, nullptr, nullptr, results.data());
    return {results[0], results[1], results[2]};
}

STABLE_TORCH_LIBRARY_IMPL(taylored, CPU, m) { m.impl("channel_statistics", TORCH_BOX(&channel_statistics)); }

}  // namespace taylored
