// compact_'s arguments, checked, on either device.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "levels.h"

namespace taylored {

// Throws unless the tensors, one at least, are alike but for what they hold, and each of dims is one of
// theirs and has a strictly increasing index vector within its range. Makes dims non-negative and index
// vectors contiguous. Those on the GPU may be only where the tensors are; their values are not read here.
void check_cut(const std::vector<torch::stable::Tensor>& tensors, std::vector<int64_t>& dims,
               std::vector<torch::stable::Tensor>& keep);

// x's levels, innermost first; none where there is nothing to move. The index vectors are pointed to, not
// read.
std::vector<Level> cut_levels(const torch::stable::Tensor& x, const std::vector<int64_t>& dims,
                              const std::vector<torch::stable::Tensor>& keep);

}  // namespace taylored
