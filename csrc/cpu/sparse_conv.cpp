// sparse_conv: a 3x3 convolution that skips the zeros of its input, row by row on several threads. Which rows
// run together depends on the shape alone, so results do not depend on the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <optional>

#include "kernels/sparse_conv_kernel.h"
#include "maps.h"

namespace taylored {
namespace {

constexpr int64_t kPositions = 512;  // whose sums lie in the level 2 cache while the weights go by

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

Tensor sparse_conv(Tensor x, Tensor weight, std::optional<Tensor> bias) {
    const auto is_float = [](const Tensor& t) { return t.scalar_type() == ScalarType::Float; };
    STD_TORCH_CHECK(x.dim() == 4 && is_float(x), "sparse_conv: x must be float32 [N, C, H, W]");
    STD_TORCH_CHECK(weight.dim() == 4 && is_float(weight) && weight.size(0) == 3 &&
                        weight.size(1) == x.size(1) && weight.size(2) == 3,
                    "sparse_conv: weight must be float32 [3, C, 3, outputs] with x's C");
    const int64_t outputs = weight.size(3);
    STD_TORCH_CHECK(!bias || (bias->dim() == 1 && is_float(*bias) && bias->size(0) == outputs),
                    "sparse_conv: bias must be float32 [outputs]");
    // A map of other strides is copied; memory of shape [N, H, W, C] is one that channels-last strides
    // describe.
    const Tensor rows =
        torch::stable::contiguous(torch::stable::transpose(torch::stable::transpose(x, 1, 2), 2, 3));
    const Tensor packed = torch::stable::contiguous(weight);
    const Tensor shift = torch::stable::contiguous(bias ? *bias : weight);
    const int64_t height = x.size(2), width = x.size(3), all = x.size(0) * height;
    const Tensor out = torch::stable::new_empty(x, std::array<int64_t, 4>{x.size(0), height, width, outputs});
    const SparseConv conv{static_cast<const float*>(rows.const_data_ptr()),
                          static_cast<const float*>(packed.const_data_ptr()),
                          bias ? static_cast<const float*>(shift.const_data_ptr()) : nullptr,
                          static_cast<float*>(out.mutable_data_ptr()),
                          height,
                          width,
                          x.size(1),
                          outputs};
    const Tensor result = torch::stable::transpose(torch::stable::transpose(out, 2, 3), 1, 2);
    if (!all || !width || !outputs) return result;

    const SparseConvKernel kernel = with_isa([]<Isa isa> { return sparse_conv_kernel<isa>(); });
    const int64_t step = std::max<int64_t>(kPositions / width, 1);
    const int64_t blocks = (outputs + kernel.outputs - 1) / kernel.outputs, tiles = (all + step - 1) / step;
    torch::stable::parallel_for(0, tiles * blocks, 1, [&](int64_t begin, int64_t end) {
        const int64_t floats = (3 * kSparseChannels + step * width) * kernel.outputs;
        const std::unique_ptr<float, Free> scratch(
            static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)));
        STD_TORCH_CHECK(scratch, "sparse_conv: out of memory");
        for (int64_t task = begin; task < end; ++task) {
            const int64_t first = task / blocks * step;
            kernel.run(conv, first, std::min(step, all - first), task % blocks * kernel.outputs,
                       scratch.get());
        }
    });
    return result;
}

STABLE_TORCH_LIBRARY_IMPL(taylored, CPU, m) { m.impl("sparse_conv", TORCH_BOX(&sparse_conv)); }

}  // namespace
}  // namespace taylored
