// compact_'s view of a dense tensor: its dimensions ordered by stride, whole neighbours merged into one. No
// torch header here: the tests of the CUDA kernels use it too.
#pragma once
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace taylored {

// One dimension, as the moves see it. keep == nullptr: all of it.
struct Level {
    int64_t size, stride;  // stride in bytes
    const int64_t* keep;
    int64_t kept;
};

// The dimensions innermost first; cut[d] gives keep and kept where dimension d loses indices, else it is
// null. Throws where memory is not dense.
template <class Ints>
std::vector<Level> levels_of(const Ints& sizes, const Ints& strides, int64_t item,
                             const std::vector<const Level*>& cut) {
    std::vector<int64_t> order;
    for (int64_t d = 0; d < (int64_t)sizes.size(); ++d)
        if (sizes[d] != 1) order.push_back(d);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });

    std::vector<Level> levels;
    int64_t expected = 1;
    for (const int64_t d : order) {
        if (strides[d] != expected)
            throw std::runtime_error("compact_: x is not dense (dimension " + std::to_string(d) +
                                     " has stride " + std::to_string(strides[d]) + ", packed memory has " +
                                     std::to_string(expected) +
                                     "): pass the whole tensor, not a slice or an expanded view");
        if (cut[d])
            levels.push_back({sizes[d], expected * item, cut[d]->keep, cut[d]->kept});
        else if (!levels.empty() && !levels.back().keep)
            levels.back().kept = levels.back().size *= sizes[d];  // two whole dimensions are one
        else
            levels.push_back({sizes[d], expected * item, nullptr, sizes[d]});
        expected *= sizes[d];
    }
    return levels;
}

}  // namespace taylored
