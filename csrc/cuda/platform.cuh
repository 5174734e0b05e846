// What the kernels take from outside the language: CUDA's own headers under nvcc, tests/simt's under g++.
// Wide accesses and ordered ones go through the four functions here, so that each is one access to the
// checker.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cuda/atomic>

__device__ __forceinline__ uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
__device__ __forceinline__ void store16(void* p, uint4 value) { *static_cast<uint4*>(p) = value; }
__device__ __forceinline__ unsigned load_acquire(unsigned* p) {
    return cuda::atomic_ref<unsigned, cuda::thread_scope_device>(*p).load(cuda::memory_order_acquire);
}
__device__ __forceinline__ void store_release(unsigned* p, unsigned value) {
    cuda::atomic_ref<unsigned, cuda::thread_scope_device>(*p).store(value, cuda::memory_order_release);
}
#else
#include "simt.h"
#define __grid_constant__  // read where the launch put it, not from a copy per thread
#endif

namespace taylored::cuda {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace taylored::cuda
