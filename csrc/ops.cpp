// Every operator of the compiled side: its schema, and one line on what it does. Kernels live under the same
// names in csrc/cpu and csrc/cuda; formulas, shapes and errors are in python/taylored/ops.py. A trailing
// underscore mutates.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(taylored, m) {
    // [N, C]: sum over positions of x * g.
    m.def("contribution(Tensor x, Tensor g) -> Tensor");

    // ReLU's backward pass and contribution(y, g), from one read of y and g.
    m.def("relu_backward(Tensor y, Tensor g) -> (Tensor, Tensor)");

    // [N, C] each: sum, sum of squares, number of zeros over positions.
    m.def("channel_statistics(Tensor x) -> (Tensor, Tensor, Tensor)");

    // 3x3 convolution, stride 1, padding 1, that skips x's zeros; weight [3, C, 3, outputs].
    m.def("sparse_conv(Tensor x, Tensor weight, Tensor? bias) -> Tensor");

    // d[p] = clamp(clean[rows[p]] + d[p]) - clamp(clean[rows[p]]).
    m.def("clamp_difference_(Tensor(a!) d, Tensor clean, Tensor rows, float low, float high) -> ()");

    // total[u] += what `reduction` (0 abs, 1 batch, 2 square) makes of scale * sum_k t[k][n, u] over examples
    // n.
    m.def("accumulate_(Tensor(a!) total, Tensor[] t, int reduction, float scale) -> ()");

    // Move the kept slices of each of dims to the front of x's own memory, packed in x's own stride order.
    m.def("compact_(Tensor(a!) x, int[] dims, Tensor[] keep) -> ()");

    // The same for many tensors, all of which are checked before anything moves: the first counts[0] of dims
    // and keep are those of x[0], and so on.
    m.def("compact_many_(Tensor(a!)[] x, int[] counts, int[] dims, Tensor[] keep) -> ()");
}
