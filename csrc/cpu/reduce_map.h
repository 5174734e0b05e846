// How the CPU cuts a reduction over positions into blocks and spreads them over threads. Blocks depend on the
// shape alone, so results do not depend on the number of threads.
#pragma once
#include "kernels/map_kernels.h"
#include "maps.h"

namespace taylored {

// Runs `op` over the whole map; result k goes to results[k], of float32, float64 or int64.
void reduce_map(MapOp op, const Tensor& x, const void* g, void* out, const Tensor* results);

}  // namespace taylored
