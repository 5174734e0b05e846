// contribution: t[n, c] = sum over positions of x * g.
#pragma once
#include "maps.cuh"

namespace taylored::cuda {

template <class T>
struct Contribution {
    static constexpr int inputs = 2, sums = 1;
    static constexpr bool writes = false;
    __device__ static Sum<T> value(T x, T g, T&) { return widen(x) * widen(g); }
    __device__ static void add(Sum<T> (&sum)[sums], Sum<T> value) { sum[0] += value; }
};

}  // namespace taylored::cuda
