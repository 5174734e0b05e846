// How a feature map [N, C, *spatial] lies in memory, as the reductions see it. No torch header here: the
// tests of the CUDA kernels use it too.
#pragma once
#include <cstdint>

namespace taylored {

// Channels-last: N outer maps [P, C], channels adjacent. Contiguous: one map whose "channels" are the N * C
// rows, positions adjacent. Either way result (outer, channel) is element outer * channels + channel of
// [N, C].
struct MapView {
    int64_t outer, positions, position_stride, channels, channel_stride;
};

// Of one position or none both layouts are the same; it is taken as channels-last.
constexpr MapView map_view(int64_t n, int64_t c, int64_t positions, bool contiguous) {
    if (positions > 1 && contiguous) return {1, positions, 1, n * c, positions};
    return {n, positions, c, c, 1};
}

}  // namespace taylored
