// The launch of a reduction over feature maps, for the .cu of each.
#pragma once
#include "../map_operators.h"
#include "../maps.h"
#include "launch.h"
#include "maps.cuh"

namespace taylored::cuda {

template <template <class> class Op, class T>
void launch_map(const Tensor& x, const void* g, void* out, const Tensor* results) {
    const Maps<T> maps{static_cast<const T*>(x.const_data_ptr()), static_cast<const T*>(g),
                       static_cast<T*>(out)};
    const uint64_t addresses = reinterpret_cast<uint64_t>(maps.x) | reinterpret_cast<uint64_t>(maps.g) |
                               reinterpret_cast<uint64_t>(maps.out);
    constexpr int sums = Op<T>::sums;
    const MapGrid grid = map_grid<T>(shape_of(view_of(x)), sums, addresses % 16 == 0);
    Results<Sum<T>> to{static_cast<Sum<T>*>(results[0].mutable_data_ptr())};
    if constexpr (sums == 3) {
        to.squares = static_cast<Sum<T>*>(results[1].mutable_data_ptr());
        to.zeros = static_cast<long long*>(results[2].mutable_data_ptr());
    }
    Tensor partial;
    if (grid.splits > 1) {
        const int64_t size = grid.partial_sums(sums);
        partial = torch::stable::new_empty(x, {&size, 1}, result_type(x));
        to.partial = static_cast<Sum<T>*>(partial.mutable_data_ptr());
    }
    const Launcher launch(x);
    reduce_map<Op, T>(maps, grid, to, [&](const char*, int64_t blocks, auto kernel, auto... arguments) {
        launch(blocks, kThreads, kernel, arguments...);
    });
}

// What csrc/map_operators.h calls `reduce`.
template <template <class> class Op>
void launch_maps(const Tensor& x, const void* g, void* out, const Tensor* results) {
    check_on_gpu(x, "taylored: the first map", "another argument is");
    switch (x.scalar_type()) {
        case ScalarType::Double:
            return launch_map<Op, double>(x, g, out, results);
        case ScalarType::Float:
            return launch_map<Op, float>(x, g, out, results);
        case ScalarType::BFloat16:
            return launch_map<Op, __nv_bfloat16>(x, g, out, results);
        default:
            return launch_map<Op, __half>(x, g, out, results);
    }
}

}  // namespace taylored::cuda
