// Launches accumulate_; see accumulate.cuh. The host waits for nothing, and a CUDA graph can capture it.
#include "accumulate.cuh"

#include "../accumulate.h"
#include "launch.h"

namespace taylored::cuda {

static void accumulate_(Tensor total, std::vector<Tensor> t, int64_t reduction, double scale) {
    check_on_gpu(total, "accumulate_: total", "t is");
    check_accumulate(total, t, reduction);
    STD_TORCH_CHECK(t.size() <= kMaxConsumers, "accumulate_: t has ", t.size(), " tensors, expected at most ",
                    kMaxConsumers, ": add some of them up first");
    if (total.numel() == 0) return;
    Consumers consumers{};
    for (const Tensor& one : t) {
        consumers.is_double[consumers.count] = one.scalar_type() == ScalarType::Double;
        consumers.t[consumers.count++] = one.const_data_ptr();
    }
    const Launcher launch(total);
    const auto run = [&](auto* out) {
        launch(accumulate_blocks(total.numel()), 32 * kPhases,
               accumulate<std::remove_pointer_t<decltype(out)>>, out, t[0].size(0), total.numel(), consumers,
               Reduction{reduction}, scale);
    };
    if (total.scalar_type() == ScalarType::Double)
        run(static_cast<double*>(total.mutable_data_ptr()));
    else
        run(static_cast<float*>(total.mutable_data_ptr()));
}

STABLE_TORCH_LIBRARY_IMPL(taylored, CUDA, m) { m.impl("accumulate_", TORCH_BOX(&accumulate_)); }

}  // namespace taylored::cuda
