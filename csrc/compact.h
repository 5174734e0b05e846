// compact_'s arguments, checked, on either device.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "levels.h"

namespace taylored {

// Tensors that differ in nothing but what they hold, and how all of them are cut.
struct Cut {
    std::vector<torch::stable::Tensor> x;
    std::vector<int64_t> dims;                // none negative
    std::vector<torch::stable::Tensor> keep;  // contiguous

    // Their levels, innermost first; none where there is nothing to move. The index vectors are pointed to,
    // not read. Throws where x is not dense.
    std::vector<Level> levels() const;
};

// The arguments of compact_many_, neighbours that are cut alike together. Throws unless all tensors are on
// one device and each of a tensor's dims is one of its own and has a strictly increasing index vector within
// its range. Index vectors on the GPU may be only where the tensors are; their values are not read here.
std::vector<Cut> cuts_of(const std::vector<torch::stable::Tensor>& x, const std::vector<int64_t>& counts,
                         const std::vector<int64_t>& dims, const std::vector<torch::stable::Tensor>& keep);

}  // namespace taylored
