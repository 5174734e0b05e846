// accumulate_'s arguments, on either device.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "reduction.h"

namespace taylored {

// Throws unless they fit; makes every t contiguous.
inline void check_accumulate(const torch::stable::Tensor& total, std::vector<torch::stable::Tensor>& t,
                             int64_t reduction) {
    using torch::headeronly::ScalarType;
    const auto is_float = [](ScalarType type) {
        return type == ScalarType::Float || type == ScalarType::Double;
    };
    STD_TORCH_CHECK(total.dim() == 1 && is_float(total.scalar_type()) && total.is_contiguous(),
                    "accumulate_: total must be a contiguous vector [units] of float32 or float64");
    STD_TORCH_CHECK(!t.empty(), "accumulate_: t is empty, expected at least one tensor [N, units]");
    STD_TORCH_CHECK(reduction >= 0 && reduction <= 2, "accumulate_: reduction is ", reduction,
                    ", expected 0 (abs), 1 (batch) or 2 (square)");
    for (size_t k = 0; k < t.size(); ++k) {
        STD_TORCH_CHECK(is_float(t[k].scalar_type()) && t[k].device() == total.device(), "accumulate_: t[", k,
                        "] must be float32 or float64, and where total is");
        STD_TORCH_CHECK(t[k].dim() == 2 && t[k].size(1) == total.size(0) && t[k].size(0) == t[0].size(0),
                        "accumulate_: t[", k, "] must have shape [N, units], with total's ", total.size(0),
                        " units and the N of t[0]");
        if (!t[k].is_contiguous()) t[k] = torch::stable::contiguous(t[k]);
    }
}

}  // namespace taylored
