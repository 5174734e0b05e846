// Small kernels with a planted fault each, and their corrected twins, for tests/test_simt.py.
#include "bind.h"

namespace py = pybind11;
using simt::Session;

// Each block reverses its 64 elements. Planted: no barrier between writing and reading the tile.
template <bool fault>
__global__ void reverse(const float* x, float* y) {
    __shared__ float tile[64];
    int t = threadIdx.x, i = blockIdx.x * 64 + t;
    tile[t] = x[i];
    if constexpr (!fault) __syncthreads();
    y[i] = tile[63 - t];
}

// As above within a warp, through dynamic shared memory. Planted: warps are taken to run in lock step.
template <bool fault>
__global__ void reverse_warp(const float* x, float* y) {
    DYNAMIC_SHARED(float, tile);
    int t = threadIdx.x, i = blockIdx.x * 64 + t;
    tile[t] = x[i];
    if constexpr (!fault) __syncwarp();
    y[i] = tile[t ^ 31];
}

// y[i] = x[i] + x[i + 1], the last element alone. Planted: one past the end of x, of y, or of shared memory.
enum class Past { NOTHING, READ, WRITE, SHARED };
template <Past fault>
__attribute__((no_sanitize("bounds", "object-size"))) __global__ void neighbours(const float* x, float* y,
                                                                                 int n) {
    __shared__ float first[64];
    __shared__ float guarded[64];
    int t = threadIdx.x, i = blockIdx.x * 64 + t;
    guarded[t] = first[t] = i < n ? x[i] : 0;
    if (fault == Past::SHARED && t == 63) guarded[t + 1] = 0;
    __syncthreads();
    if (i < n + (fault == Past::WRITE))
        y[i] = guarded[t] + (i + 1 < n + (fault == Past::READ) ? x[i + 1] : 0);
}

// y += x. The fault is in the launch: y was never written.
__global__ void accumulate(const float* x, float* y) { y[threadIdx.x] += x[threadIdx.x]; }

// In-place compaction: x[target[i]] = x[i] where target[i] >= 0; targets ascend and target[i] <= i. A tile
// may store once every tile whose source lies under its targets has loaded.
enum class Lost { NOTHING, WAIT, RELEASE, TICKET };
template <Lost fault>
__global__ void compact(float* x, const int* target, int n, unsigned* ticket, unsigned* loaded) {
    __shared__ unsigned tile;
    if (threadIdx.x == 0) tile = fault == Lost::TICKET ? blockIdx.x : atomicAdd(ticket, 1);
    __syncthreads();
    int i = tile * 64 + threadIdx.x, to = i < n ? target[i] : -1;
    float value = i < n ? x[i] : 0;
    __syncthreads();
    if (threadIdx.x == 0) {
        if (fault == Lost::RELEASE)
            atomicExch(loaded + tile, 1);
        else
            store_release(loaded + tile, 1);
    }
    if (fault != Lost::WAIT && to >= 0)
        while (load_acquire(loaded + to / 64) == 0) __nanosleep(20);
    if (to >= 0) x[to] = value;
}

// Each block sums 64 elements; the last to finish sums the sums. Planted: no fence before the ticket is
// drawn, one of too small a scope, or none after.
enum class Fence { RIGHT, LOST, BLOCK, LOST_BY_READER };
template <Fence fence>
__global__ void sum(const float* x, float* partial, unsigned* ticket, float* total) {
    __shared__ bool last;
    float v = x[blockIdx.x * 64 + threadIdx.x];
    for (int d = 16; d; d /= 2) v += __shfl_down_sync(~0u, v, d);
    if (threadIdx.x % 32 == 0) partial[blockIdx.x * 2 + threadIdx.x / 32] = v;
    __syncthreads();
    if (threadIdx.x == 0) {
        if (fence == Fence::BLOCK) __threadfence_block();
        if (fence == Fence::RIGHT || fence == Fence::LOST_BY_READER) __threadfence();
        last = atomicAdd(ticket, 1) == gridDim.x - 1;
        if (fence != Fence::LOST_BY_READER) __threadfence();
    }
    __syncthreads();
    if (!last || threadIdx.x) return;
    float s = 0;
    for (unsigned b = 0; b < 2 * gridDim.x; ++b) s += partial[b];
    *total = s;
}

// Planted: only some threads come to the barrier; the others exit, or wait at another one.
enum class Odd { NOTHING, EXIT, OTHER_BARRIER };
template <Odd fault>
__global__ void meet(float* y) {
    if (fault == Odd::EXIT && threadIdx.x == 40) return;
    if (fault == Odd::OTHER_BARRIER && threadIdx.x >= 40)
        __syncthreads();
    else
        __syncthreads();
    y[threadIdx.x] = 1;
}

// Block 1 waits for block 0. Planted: it looks once, which is what a compiler may make of a plain read in a
// loop.
template <bool fault>
__global__ void wait(volatile unsigned* flag) {
    if (blockIdx.x == 0) {
        *flag = 1;
    } else {
        unsigned seen;
        do seen = *flag;
        while (!fault && !seen);
        while (!seen) asm volatile("" : "+r"(seen));
    }
}

// A warp writes 32 floats, `stride` apart, into shared memory, and reads each other's back.
__global__ void banks(float* y, int stride) {
    __shared__ float tile[32 * 33];
    tile[threadIdx.x * stride] = threadIdx.x;
    __syncwarp();
    y[threadIdx.x] = tile[(threadIdx.x ^ 1) * stride];
}

__global__ void stride(const float* x, float* y, int stride, int offset) {
    y[threadIdx.x] = x[threadIdx.x * stride + offset];
}

__global__ void copy16(const float* x, float* y) {
    store16(y + 4 * threadIdx.x, load16(x + 4 * threadIdx.x));
}

// One row of results per intrinsic.
__global__ void intrinsics(const int* x, int* y) {
    int t = threadIdx.x, v = x[t], row = 0;
    auto put = [&](int value) { y[row++ * 32 + t] = value; };
    put(__shfl_sync(~0u, v, 5));
    put(__shfl_xor_sync(~0u, v, 3));
    put(__shfl_down_sync(~0u, v, 2, 8));
    put(__shfl_up_sync(~0u, v, 1));
    put(__ballot_sync(~0u, v & 1));
    put(__any_sync(~0u, v == 7) + 2 * __all_sync(~0u, v < 1000));
    put(t < 16 ? __reduce_add_sync(0xffff, v) : __popc(v) + __ffs(v) + __clz(v));
    put(__float2bfloat16(float(v) / 3).bits);
    put(__float2half(float(v) / 3).bits);
}

__global__ void atomics(int* y, float* f) {
    atomicAdd(y, 1);
    atomicMax(y + 1, int(threadIdx.x));
    atomicAdd(f, 0.5f);
    for (int old = y[3], seen; (seen = atomicCAS(y + 2, old, old + 2)) != old; old = seen) {
    }
}

using Options = const py::dict&;

PYBIND11_MODULE(planted, m) {
    simt::bind(m);
    m.def("reverse", [](Options options, bool fault, py::array x, py::array y) {
        Session s(options);
        auto *in = s.input<float>("x", x), *out = s.output<float>("y", y);
        s.launch("reverse", x.size() / 64, 64, 0, fault ? reverse<true> : reverse<false>, in, out);
        return s.report();
    });
    m.def("reverse_warp", [](Options options, bool fault, py::array x, py::array y) {
        Session s(options);
        auto *in = s.input<float>("x", x), *out = s.output<float>("y", y);
        s.launch("reverse_warp", x.size() / 64, 64, 256, fault ? reverse_warp<true> : reverse_warp<false>, in,
                 out);
        return s.report();
    });
    m.def("neighbours", [](Options options, int fault, py::array x, py::array y) {
        Session s(options);
        auto *in = s.input<float>("x", x), *out = s.output<float>("y", y);
        auto kernels = {neighbours<Past::NOTHING>, neighbours<Past::READ>, neighbours<Past::WRITE>,
                        neighbours<Past::SHARED>};
        s.launch("neighbours", (x.size() + 63) / 64, 64, 0, kernels.begin()[fault], in, out, x.size());
        return s.report();
    });
    m.def("accumulate", [](Options options, bool fault, py::array x, py::array y) {
        Session s(options);
        auto* in = s.input<float>("x", x);
        auto* out = fault ? s.output<float>("y", y) : s.inout<float>("y", y);
        s.launch("accumulate", 1, x.size(), 0, accumulate, in, out);
        return s.report();
    });
    m.def("compact", [](Options options, int fault, py::array x, py::array target) {
        Session s(options);
        auto* data = s.inout<float>("x", x);
        auto* to = s.input<int>("target", target);
        unsigned blocks = (x.size() + 63) / 64;
        auto* ticket = s.scratch<unsigned>("ticket", 1, true);
        auto* loaded = s.scratch<unsigned>("loaded", blocks, true);
        auto kernels = {compact<Lost::NOTHING>, compact<Lost::WAIT>, compact<Lost::RELEASE>,
                        compact<Lost::TICKET>};
        s.launch("compact", blocks, 64, 0, kernels.begin()[fault], data, to, x.size(), ticket, loaded);
        return s.report();
    });
    m.def("sum", [](Options options, int fault, py::array x, py::array total) {
        Session s(options);
        auto *in = s.input<float>("x", x), *out = s.output<float>("total", total);
        auto kernels = {sum<Fence::RIGHT>, sum<Fence::LOST>, sum<Fence::BLOCK>, sum<Fence::LOST_BY_READER>};
        auto* partial = s.scratch<float>("partial", x.size() / 32);
        auto* ticket = s.scratch<unsigned>("ticket", 1, true);
        s.launch("sum", x.size() / 64, 64, 0, kernels.begin()[fault], in, partial, ticket, out);
        return s.report();
    });
    m.def("meet", [](Options options, int fault, py::array y) {
        Session s(options);
        auto kernels = {meet<Odd::NOTHING>, meet<Odd::EXIT>, meet<Odd::OTHER_BARRIER>};
        s.launch("meet", 1, y.size(), 0, kernels.begin()[fault], s.output<float>("y", y));
        return s.report();
    });
    m.def("wait", [](Options options, bool fault) {
        Session s(options);
        s.launch("wait", 2, 1, 0, fault ? wait<true> : wait<false>, s.scratch<unsigned>("flag", 1, true));
        return s.report();
    });
    m.def("banks", [](Options options, int stride, py::array y) {
        Session s(options);
        s.launch("banks", 1, 32, 0, banks, s.output<float>("y", y), stride);
        return s.report();
    });
    m.def("stride", [](Options options, int step, int offset, py::array x, py::array y) {
        Session s(options);
        auto *in = s.input<float>("x", x), *out = s.output<float>("y", y);
        s.launch("stride", 1, y.size(), 0, stride, in, out, step, offset);
        return s.report();
    });
    m.def("copy16", [](Options options, py::array x, py::array y) {
        Session s(options);
        auto *in = s.input<float>("x", x), *out = s.output<float>("y", y);
        s.launch("copy16", 1, x.size() / 4, 0, copy16, in, out);
        return s.report();
    });
    m.def("intrinsics", [](Options options, py::array x, py::array y) {
        Session s(options);
        auto *in = s.input<int>("x", x), *out = s.output<int>("y", y);
        s.launch("intrinsics", 1, 32, 0, intrinsics, in, out);
        return s.report();
    });
    m.def("atomics", [](Options options, unsigned blocks, py::array y, py::array f) {
        Session s(options);
        auto* counts = s.inout<int>("y", y);
        auto* sum = s.inout<float>("f", f);
        s.launch("atomics", blocks, 64, 0, atomics, counts, sum);
        return s.report();
    });
}
