// What every operator on the GPU needs of torch: the words for tensors, a check that they are there, the
// current stream of their device, and errors as exceptions.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

namespace taylored::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// torch calls the operator as soon as one argument is on a GPU; `other` says which that may be.
inline void check_on_gpu(const Tensor& x, const char* name, const char* other) {
    STD_TORCH_CHECK(x.is_cuda(), name, " must be on the GPU, as ", other);
}

// Makes x's device the current one while it lives.
class Launcher {
  public:
    explicit Launcher(const Tensor& x) : guard_(x.get_device_index()) {
        void* stream = nullptr;  // torch::stable has a word for it from 2.13 on
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
        stream_ = static_cast<cudaStream_t>(stream);
    }
    cudaStream_t stream() const { return stream_; }

    template <class... P, class... A>
    void operator()(int64_t blocks, int threads, void (*kernel)(P...), A... arguments) const {
        kernel<<<static_cast<unsigned>(blocks), threads, 0, stream_>>>(static_cast<P>(arguments)...);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
    }

  private:
    torch::stable::accelerator::DeviceGuard guard_;
    cudaStream_t stream_;
};

}  // namespace taylored::cuda
