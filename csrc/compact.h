// compact_'s arguments, checked, on either device.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "levels.h"

namespace taylored {

// Throws unless each of dims is one of x's and has a strictly increasing index vector within its range. Makes
// dims non-negative and index vectors contiguous. Those on the GPU may be only where x is; their values are
// not read here.
void check_cut(const torch::stable::Tensor& x, std::vector<int64_t>& dims,
               std::vector<torch::stable::Tensor>& keep);

// x's levels, innermost first; none where there is nothing to move. The index vectors are pointed to, not
// read.
std::vector<Level> cut_levels(const torch::stable::Tensor& x, const std::vector<int64_t>& dims,
                              const std::vector<torch::stable::Tensor>& keep);

}  // namespace taylored
