// clamp_difference_: what a clamp (ReLU, ReLU6) makes of a difference, in place, row by row on several
// threads.
#include <torch/csrc/stable/library.h>

#include "kernels/clamp_difference_kernel.h"
#include "maps.h"

namespace taylored {
namespace {

// The elements of each row fill a stretch of memory, and the rows follow one another.
bool has_dense_rows(const Tensor& x) {
    int64_t extent = 1;
    for (int64_t d = 1; d < x.dim(); ++d) extent += (x.size(d) - 1) * x.stride(d);
    const int64_t row = x.size(0) ? x.numel() / x.size(0) : 0;
    return extent == row && (x.size(0) <= 1 || x.stride(0) == row);
}

void clamp_difference_(Tensor d, Tensor clean, Tensor rows, double low, double high) {
    STD_TORCH_CHECK(d.scalar_type() == ScalarType::BFloat16 && clean.scalar_type() == ScalarType::Float,
                    "clamp_difference_: d must be bfloat16, clean float32");
    STD_TORCH_CHECK(d.dim() >= 1 && d.dim() == clean.dim(),
                    "clamp_difference_: d and clean must have the same dimensions but the first");
    STD_TORCH_CHECK(rows.dim() == 1 && rows.scalar_type() == ScalarType::Long && rows.size(0) == d.size(0),
                    "clamp_difference_: rows must be int64 [P], with d's P");
    bool alike = true;
    for (int64_t i = 1; i < d.dim(); ++i)
        alike &= d.size(i) == clean.size(i) && (d.size(i) == 1 || d.stride(i) == clean.stride(i));
    if (!d.numel()) return;
    STD_TORCH_CHECK(alike && has_dense_rows(d) && has_dense_rows(clean),
                    "clamp_difference_: d and clean must have rows of one shape, dense in the same layout");
    const Tensor index = torch::stable::contiguous(rows);
    const int64_t* row = static_cast<const int64_t*>(index.const_data_ptr());
    for (int64_t p = 0; p < d.size(0); ++p)
        STD_TORCH_CHECK(row[p] >= 0 && row[p] < clean.size(0), "clamp_difference_: rows[", p, "] is ", row[p],
                        ", clean has ", clean.size(0), " rows");

    const ClampDifferenceKernel kernel = with_isa([]<Isa isa> { return clamp_difference_kernel<isa>(); });
    uint16_t* out = static_cast<uint16_t*>(d.mutable_data_ptr());
    const float* from = static_cast<const float*>(clean.const_data_ptr());
    const int64_t size = d.numel() / d.size(0);
    torch::stable::parallel_for(0, d.size(0), 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p)
            kernel(out + p * size, from + row[p] * size, size, static_cast<float>(low),
                   static_cast<float>(high));
    });
}

STABLE_TORCH_LIBRARY_IMPL(taylored, CPU, m) { m.impl("clamp_difference_", TORCH_BOX(&clamp_difference_)); }

}  // namespace
}  // namespace taylored
