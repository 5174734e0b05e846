// Launches compact_; see compact.cuh. Index vectors on the CPU are checked there and sent along; those
// already on the GPU are checked by a kernel, since the host does not wait: bad ones stop the device, as
// torch's own index errors do. The host waits for nothing either way.
#include "compact.cuh"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <utility>

#include "../compact.h"
#include "launch.h"

namespace taylored::cuda {

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

// One launch.
struct Move {
    Compaction cut;
    CompactTensors tensors;
    int word;
    int64_t blocks, control;  // where its control words begin
};

static void compact_many_(std::vector<Tensor> x, std::vector<int64_t> counts, std::vector<int64_t> dims,
                          std::vector<Tensor> keep) {
    if (x.empty()) return;
    check_on_gpu(x[0], "compact_: x", "another argument is");
    const std::vector<Cut> cuts = cuts_of(x, counts, dims, keep);
    const Launcher launch(x[0]);

    // All memory is there before the first move is launched.
    std::vector<Move> moves;
    std::map<std::pair<const void*, int64_t>, Tensor> copies;  // of index vectors: many cuts share one
    int64_t control_words = 0;
    for (Cut cut : cuts) {
        for (size_t i = 0; i < cut.keep.size(); ++i) {
            Tensor& index = cut.keep[i];
            if (!index.is_cpu()) {
                if (index.numel() > 0)
                    launch(ceil_div(index.numel(), kCompactThreads), kCompactThreads, check_keep,
                           static_cast<const int64_t*>(index.const_data_ptr()), index.numel(),
                           cut.x[0].size(cut.dims[i]));
                continue;
            }
            const auto [copy, is_new] = copies.try_emplace({index.const_data_ptr(), index.numel()}, index);
            if (is_new) copy->second = torch::stable::to(index, x[0].device(), /*non_blocking=*/true);
            index = copy->second;
        }
        const std::vector<Level> levels = cut.levels();  // also: x is dense
        STD_TORCH_CHECK(levels.size() <= kMaxLevels, "compact_: x has ", levels.size(),
                        " dimensions between and beside those that are cut, expected at most ", kMaxLevels);
        for (size_t first = 0; first < cut.x.size() && !levels.empty(); first += kMaxTensors) {
            Move move{};
            const size_t count = std::min<size_t>(cut.x.size() - first, kMaxTensors);
            uint64_t addresses = 0;
            for (size_t i = 0; i < count; ++i) {
                move.tensors.data[i] = cut.x[first + i].mutable_data_ptr();
                addresses |= reinterpret_cast<uint64_t>(move.tensors.data[i]);
            }
            move.word = word_bytes(levels, addresses);
            with_word(move.word, [&](auto word) {
                move.cut = compaction(levels, sizeof(word), kTileWords<decltype(word)>);
            });
            move.blocks = move.cut.tiles * count;
            move.control = control_words;
            control_words += move.blocks + 1;
            moves.push_back(move);
        }
    }
    if (moves.empty()) return;
    const Tensor control = torch::stable::new_empty(x[0], {&control_words, 1}, ScalarType::Int);
    auto* flags = static_cast<unsigned*>(control.mutable_data_ptr());
    STD_CUDA_CHECK(cudaMemsetAsync(flags, 0, control_words * sizeof(unsigned), launch.stream()));
    for (const Move& move : moves)
        with_word(move.word, [&](auto word) {
            launch(move.blocks, kCompactThreads, compact<decltype(word)>, move.cut, move.tensors,
                   flags + move.control);
        });
}

static void compact_(Tensor x, std::vector<int64_t> dims, std::vector<Tensor> keep) {
    compact_many_({x}, {static_cast<int64_t>(dims.size())}, dims, keep);
}

STABLE_TORCH_LIBRARY_IMPL(taylored, CUDA, m) {
    m.impl("compact_", TORCH_BOX(&compact_));
    m.impl("compact_many_", TORCH_BOX(&compact_many_));
}

}  // namespace taylored::cuda
