#include "compact.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>

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

static void check(Cut& cut) {
    const Tensor& x = cut.x[0];
    const int64_t rank = x.dim();
    std::vector<bool> seen(rank, false);
    for (size_t i = 0; i < cut.dims.size(); ++i) {
        int64_t& dim = cut.dims[i];
        Tensor& keep = cut.keep[i];
        STD_TORCH_CHECK(dim >= -rank && dim < rank, "compact_: dims[", i, "] is ", dim,
                        ", expected a dimension of x, which has ", rank);
        if (dim < 0) dim += rank;
        STD_TORCH_CHECK(!seen[dim], "compact_: dims names dimension ", dim, " twice");
        seen[dim] = true;
        STD_TORCH_CHECK(keep.scalar_type() == ScalarType::Long && keep.dim() == 1 &&
                            (keep.is_cpu() || keep.device() == x.device()),
                        "compact_: keep[", i, "] must be a vector of int64 indices on the CPU",
                        x.is_cpu() ? "" : " or where x is");
        if (!keep.is_contiguous()) keep = torch::stable::contiguous(keep);
        if (keep.is_cpu()) check_values(keep, x.size(dim), i, dim);
        STD_TORCH_CHECK(keep.numel() <= x.size(dim), "compact_: keep[", i, "] has ", keep.numel(),
                        " indices, more than x's dimension ", dim);
    }
}

std::vector<Cut> cuts_of(const std::vector<Tensor>& x, const std::vector<int64_t>& counts,
                         const std::vector<int64_t>& dims, const std::vector<Tensor>& keep) {
    const auto same = [](auto a, auto b) { return std::equal(a.begin(), a.end(), b.begin(), b.end()); };
    const auto alike = [&](const Tensor& a, const Tensor& b) {
        return same(a.sizes(), b.sizes()) && same(a.strides(), b.strides()) &&
               a.element_size() == b.element_size();
    };
    const auto identical = [&](const Tensor& a, const Tensor& b) {  // each is a handle of its own
        return alike(a, b) && a.scalar_type() == b.scalar_type() && a.const_data_ptr() == b.const_data_ptr();
    };
    const int64_t given = std::accumulate(counts.begin(), counts.end(), int64_t(0));
    STD_TORCH_CHECK(dims.size() == keep.size() && given == static_cast<int64_t>(dims.size()) &&
                        counts.size() == x.size() &&
                        std::all_of(counts.begin(), counts.end(), [](int64_t count) { return count >= 0; }),
                    "compact_: ", dims.size(), " dims and ", keep.size(), " index vectors for ", given,
                    " cuts, expected one of each per cut, and a number of cuts per tensor");
    std::vector<Cut> cuts;
    size_t next = 0;
    for (size_t i = 0; i < x.size(); ++i) {
        STD_TORCH_CHECK(x[i].device() == x[0].device(), "compact_many_: x[", i, "] must be where x[0] is");
        Cut cut{{x[i]}, {}, {}};
        bool as_before = i > 0 && counts[i] == counts[i - 1] && alike(x[i], x[i - 1]);
        for (int64_t c = 0; c < counts[i]; ++c, ++next) {
            cut.dims.push_back(dims[next]);
            cut.keep.push_back(keep[next]);
            as_before = as_before && dims[next] == dims[next - counts[i]] &&
                        identical(keep[next], keep[next - counts[i]]);
        }
        if (as_before) {
            cuts.back().x.push_back(x[i]);
        } else {
            check(cut);
            cuts.push_back(std::move(cut));
        }
    }
    return cuts;
}

std::vector<Level> Cut::levels() const {
    const Tensor& like = x[0];
    std::vector<Level> given(dims.size());
    std::vector<const Level*> cut(like.dim(), nullptr);
    bool empty = like.numel() == 0, whole = true;
    for (size_t i = 0; i < dims.size(); ++i) {
        const int64_t size = like.size(dims[i]), kept = keep[i].numel();
        given[i] = {size, 0, static_cast<const int64_t*>(keep[i].const_data_ptr()), kept};
        if (kept < size) cut[dims[i]] = &given[i];
        whole &= kept == size;
        empty |= kept == 0;
    }
    if (empty) return {};
    std::vector<Level> levels = levels_of(like.sizes(), like.strides(), like.element_size(), cut);
    return whole ? std::vector<Level>{} : levels;
}

}  // namespace taylored
