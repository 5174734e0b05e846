#include "compact.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace taylored {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

static void check_values(const Tensor& keep, int64_t size, size_t i, int64_t dim) {
    const auto* index = static_cast<const int64_t*>(keep.const_data_ptr());
    const int64_t count = keep.numel();
    bool increasing = true;
    for (int64_t j = 1; j < count; ++j) increasing &= index[j - 1] < index[j];
    STD_TORCH_CHECK(increasing, "compact_: keep[", i, "] must be strictly increasing");
    STD_TORCH_CHECK(count == 0 || (index[0] >= 0 && index[count - 1] < size), "compact_: keep[", i,
                    "] must lie in [0, ", size, "), the size of x's dimension ", dim, ", but spans ",
                    count ? index[0] : 0, " to ", count ? index[count - 1] : 0);
}

void check_cut(const std::vector<Tensor>& tensors, std::vector<int64_t>& dims, std::vector<Tensor>& keep) {
    const Tensor& x = tensors[0];
    const auto same = [](auto a, auto b) { return std::equal(a.begin(), a.end(), b.begin(), b.end()); };
    for (const Tensor& one : tensors)
        STD_TORCH_CHECK(
            one.device() == x.device() && same(one.sizes(), x.sizes()) && same(one.strides(), x.strides()) &&
                one.element_size() == x.element_size(),
            "compact_many_: all tensors must have the device, shape, strides and element size of the first");
    STD_TORCH_CHECK(dims.size() == keep.size(), "compact_: dims has ", dims.size(), " entries and keep ",
                    keep.size(), ", expected one index vector per dimension");
    const int64_t rank = x.dim();
    std::vector<bool> seen(rank, false);
    for (size_t i = 0; i < dims.size(); ++i) {
        STD_TORCH_CHECK(dims[i] >= -rank && dims[i] < rank, "compact_: dims[", i, "] is ", dims[i],
                        ", expected a dimension of x, which has ", rank);
        if (dims[i] < 0) dims[i] += rank;
        STD_TORCH_CHECK(!seen[dims[i]], "compact_: dims names dimension ", dims[i], " twice");
        seen[dims[i]] = true;
        STD_TORCH_CHECK(keep[i].scalar_type() == ScalarType::Long && keep[i].dim() == 1 &&
                            (keep[i].is_cpu() || keep[i].device() == x.device()),
                        "compact_: keep[", i, "] must be a vector of int64 indices on the CPU",
                        x.is_cpu() ? "" : " or where x is");
        if (!keep[i].is_contiguous()) keep[i] = torch::stable::contiguous(keep[i]);
        if (keep[i].is_cpu()) check_values(keep[i], x.size(dims[i]), i, dims[i]);
        STD_TORCH_CHECK(keep[i].numel() <= x.size(dims[i]), "compact_: keep[", i, "] has ", keep[i].numel(),
                        " indices, more than x's dimension ", dims[i]);
    }
}

std::vector<Level> cut_levels(const Tensor& x, const std::vector<int64_t>& dims,
                              const std::vector<Tensor>& keep) {
    std::vector<Level> given(dims.size());
    std::vector<const Level*> cut(x.dim(), nullptr);
    bool empty = x.numel() == 0, whole = true;
    for (size_t i = 0; i < dims.size(); ++i) {
        const int64_t size = x.size(dims[i]), kept = keep[i].numel();
        given[i] = {size, 0, static_cast<const int64_t*>(keep[i].const_data_ptr()), kept};
        if (kept < size) cut[dims[i]] = &given[i];
        whole &= kept == size;
        empty |= kept == 0;
    }
    if (empty) return {};
    std::vector<Level> levels = levels_of(x.sizes(), x.strides(), x.element_size(), cut);
    return whole ? std::vector<Level>{} : levels;
}

}  // namespace taylored
