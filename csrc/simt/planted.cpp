// Small kernels with planted faults, and their corrected twins, for tests/test_simt.py: `fault` false is the
// twin.
#include "bind.h"

namespace py = pybind11;

template <bool fault>
__global__ void reverse(const float* x, float* y, int n) {
    __shared__ float tile[64];
    int t = threadIdx.x, i = blockIdx.x * 64 + t;
    if (i < n) tile[t] = x[i];
    if constexpr (!fault) __syncthreads();
    if (i < n) y[i] = tile[63 - t];
}

PYBIND11_MODULE(planted, m) {
    simt::bind(m);
    m.def("reverse", [](const py::dict& options, bool fault, py::array x, py::array y) {
        simt::Session s(options);
        auto* in = s.input<float>("x", x);
        auto* out = s.output<float>("y", y);
        s.launch("reverse", dim3(x.size() / 64), dim3(64), 0, fault ? reverse<true> : reverse<false>, in, out,
                 x.size());
        return s.report();
    });
}
