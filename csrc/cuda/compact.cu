// Launches compact_; see compact.cuh. Index vectors on the CPU are checked there and sent along; those
// already on the GPU are checked by a kernel, since the host does not wait: bad ones stop the device, as
// torch's own index errors do. The host waits for nothing either way.
#include "compact.cuh"

#include <torch/csrc/stable/ops.h>

#include <cstdio>

#include "../compact.h"
#include "launch.h"

namespace taylored::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Traps unless `keep` is strictly increasing and within [0, size).
static __global__ void check_keep(const int64_t* keep, int64_t kept, int64_t size) {
    const int64_t i = blockIdx.x * int64_t(kCompactThreads) + threadIdx.x;
    if (i >= kept) return;
    if (keep[i] < 0 || keep[i] >= size || (i > 0 && keep[i - 1] >= keep[i])) {
        printf("compact_: keep[%lld] is %lld: indices must be strictly increasing and in [0, %lld)\n",
               static_cast<long long>(i), static_cast<long long>(keep[i]), static_cast<long long>(size));
        __trap();
    }
}

static void compact_many_(std::vector<Tensor> x, std::vector<int64_t> dims, std::vector<Tensor> keep) {
    if (x.empty()) return;
    STD_TORCH_CHECK(x[0].is_cuda(), "compact_: x must be on the GPU, as another argument is");
    check_cut(x, dims, keep);
    const Launcher launch(x[0]);
    for (size_t i = 0; i < keep.size(); ++i) {
        if (!keep[i].is_cpu() && keep[i].numel() > 0)
            launch(ceil_div(keep[i].numel(), kCompactThreads), kCompactThreads, check_keep,
                   static_cast<const int64_t*>(keep[i].const_data_ptr()), keep[i].numel(),
                   x[0].size(dims[i]));
    }
    if (cut_levels(x[0], dims, keep).empty()) return;  // also: x is dense
    for (Tensor& one : keep)
        if (one.is_cpu()) one = torch::stable::to(one, x[0].device(), /*non_blocking=*/true);
    const std::vector<Level> levels = cut_levels(x[0], dims, keep);
    STD_TORCH_CHECK(levels.size() <= kMaxLevels, "compact_: x has ", levels.size(),
                    " dimensions between and beside those that are cut, expected at most ", kMaxLevels);

    for (size_t first = 0; first < x.size(); first += kMaxTensors) {
        CompactTensors tensors{};
        const int count = std::min<size_t>(x.size() - first, kMaxTensors);
        uint64_t addresses = 0;
        for (int i = 0; i < count; ++i) {
            tensors.data[i] = x[first + i].mutable_data_ptr();
            addresses |= reinterpret_cast<uint64_t>(tensors.data[i]);
        }
        with_word(word_bytes(levels, addresses), [&](auto word) {
            using Word = decltype(word);
            const Compaction cut = compaction(levels, sizeof(Word), kTileWords<Word>);
            const int64_t blocks = cut.tiles * count, size = blocks + 1;
            const Tensor control = torch::stable::new_empty(x[0], {&size, 1}, ScalarType::Int);
            auto* flags = static_cast<unsigned*>(control.mutable_data_ptr());
            STD_CUDA_CHECK(cudaMemsetAsync(flags, 0, size * sizeof(unsigned), launch.stream()));
            launch(blocks, kCompactThreads, compact<Word>, cut, tensors, flags);
        });
    }
}

static void compact_(Tensor x, std::vector<int64_t> dims, std::vector<Tensor> keep) {
    compact_many_({x}, dims, keep);
}

STABLE_TORCH_LIBRARY_IMPL(taylored, CUDA, m) {
    m.impl("compact_", TORCH_BOX(&compact_));
    m.impl("compact_many_", TORCH_BOX(&compact_many_));
}

}  // namespace taylored::cuda
