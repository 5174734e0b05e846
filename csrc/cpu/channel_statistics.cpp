// channel_statistics: sum, sum of squares and number of zeros per example and channel, in one pass: what the
// mean, standard deviation and APoZ criteria are made of.
#include <torch/csrc/stable/library.h>

#include <functional>

#include "map_operators.h"
#include "reduce_map.h"

namespace taylored {

static std::tuple<Tensor, Tensor, Tensor> channel_statistics(Tensor x) {
    return channel_statistics_by(std::bind_front(reduce_map, MapOp::statistics), x);
}

STABLE_TORCH_LIBRARY_IMPL(taylored, CPU, m) { m.impl("channel_statistics", TORCH_BOX(&channel_statistics)); }

}  // namespace taylored
