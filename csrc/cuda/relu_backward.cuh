// relu_backward: the gradient through ReLU (g where its output y is positive) and contribution(y, g), from
// one read of both.
#pragma once
#include "maps.cuh"

namespace taylored::cuda {

template <class T>
struct ReluBackward {
    static constexpr int inputs = 2, sums = 1;
    static constexpr bool writes = true;
    __device__ static Sum<T> value(T y, T g, T& gradient) {
        gradient = widen(y) > 0 ? g : T{};
        return widen(y) * widen(g);
    }
    __device__ static void add(Sum<T> (&sum)[sums], Sum<T> value) { sum[0] += value; }
};

}  // namespace taylored::cuda
