// accumulate_: the score's epilogue. Adds a batch's contributions to a running total per unit; tensors are
// small ([N, units]), so it is one thread and one pass.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "accumulate.h"

namespace taylored {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kUnits = 256;  // units taken at a time, in buffers on the stack

// sum[u] += one row's stretch.
void add(const Tensor& t, ScalarType type, int64_t offset, int64_t count, double* sum) {
    const auto loop = [&](const auto* row) {
        for (int64_t u = 0; u < count; ++u) sum[u] += row[u];
    };
    if (type == ScalarType::Float)
        loop(static_cast<const float*>(t.const_data_ptr()) + offset);
    else
        loop(static_cast<const double*>(t.const_data_ptr()) + offset);
}

void accumulate_(Tensor total, std::vector<Tensor> t, int64_t reduction, double scale) {
    check_accumulate(total, t, reduction);
    std::vector<ScalarType> types;
    for (const Tensor& tensor : t) types.push_back(tensor.scalar_type());
    const Reduction kind{reduction};
    const int64_t examples = t[0].size(0), units = total.size(0);
    const bool is_double = total.scalar_type() == ScalarType::Double;
    void* const out = total.mutable_data_ptr();

    for (int64_t first = 0; first < units; first += kUnits) {
        const int64_t count = std::min(kUnits, units - first);
        double sum[kUnits] = {}, row[kUnits];
        for (int64_t n = 0; n < examples; ++n) {
            std::fill_n(row, count, 0.0);
            for (size_t k = 0; k < t.size(); ++k) add(t[k], types[k], n * units + first, count, row);
            for (int64_t u = 0; u < count; ++u) row[u] *= scale;
            if (kind == Reduction::abs)
                for (int64_t u = 0; u < count; ++u) sum[u] += std::fabs(row[u]);
            else if (kind == Reduction::square)
                for (int64_t u = 0; u < count; ++u) sum[u] += row[u] * row[u];
            else
                for (int64_t u = 0; u < count; ++u) sum[u] += row[u];
        }
        if (kind == Reduction::batch)
            for (int64_t u = 0; u < count; ++u) sum[u] = std::fabs(sum[u]);
        const auto add_to = [&](auto* result) {
            for (int64_t u = 0; u < count; ++u) result[u] += sum[u];
        };
        if (is_double)
            add_to(static_cast<double*>(out) + first);
        else
            add_to(static_cast<float*>(out) + first);
    }
}

STABLE_TORCH_LIBRARY_IMPL(taylored, CPU, m) { m.impl("accumulate_", TORCH_BOX(&accumulate_)); }

}  // namespace
}  // namespace taylored
