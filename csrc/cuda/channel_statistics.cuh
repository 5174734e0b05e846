// channel_statistics: sum, sum of squares and number of zeros over positions.
#pragma once
#include "maps.cuh"

namespace taylored::cuda {

template <class T>
struct Statistics {
    static constexpr int inputs = 1, sums = 3;
    static constexpr bool writes = false;
    __device__ static Sum<T> value(T x, T, T&) { return widen(x); }
    __device__ static void add(Sum<T> (&sum)[sums], Sum<T> value) {
        sum[0] += value;
        sum[1] += value * value;
        sum[2] += value == 0;
    }
};

}  // namespace taylored::cuda
