// accumulate_: the score's epilogue. Adds a batch's contributions to a running total per unit; tensors are
// small
// ([N, units]), so it is one thread and one pass.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace taylored {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum Reduction : int64_t { abs = 0, batch = 1, square = 2 };
constexpr int64_t kUnits = 256;  // units taken at a time, in buffers on the stack

bool is_float(ScalarType type) { return type == ScalarType::Float || type == ScalarType::Double; }

void check(const Tensor& total, const std::vector<Tensor>& t, int64_t reduction) {
    STD_TORCH_CHECK(total.dim() == 1 && is_float(total.scalar_type()) && total.is_contiguous(),
                    "accumulate_: total must be a contiguous vector [units] of float32 or float64");
    STD_TORCH_CHECK(!t.empty(), "accumulate_: t is empty, expected at least one tensor [N, units]");
    STD_TORCH_CHECK(reduction >= abs && reduction <= square, "accumulate_: reduction is ", reduction,
                    ", expected 0 (abs), 1 (batch) or 2 (square)");
    for (size_t k = 0; k < t.size(); ++k) {
        STD_TORCH_CHECK(is_float(t[k].scalar_type()) && t[k].is_cpu(), "accumulate_: t[", k,
                        "] must be float32 or float64, on the CPU");
        STD_TORCH_CHECK(t[k].dim() == 2 && t[k].size(1) == total.size(0) && t[k].size(0) == t[0].size(0),
                        "accumulate_: t[", k, "] must have shape [N, units], with total's ", total.size(0),
                        " units and the N of t[0]");
    }
}

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
    check(total, t, reduction);
    std::vector<ScalarType> types;
    for (Tensor& tensor : t) {
        if (!tensor.is_contiguous()) tensor = torch::stable::contiguous(tensor);
        types.push_back(tensor.scalar_type());
    }
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
            if (reduction == abs)
                for (int64_t u = 0; u < count; ++u) sum[u] += std::fabs(row[u]);
            else if (reduction == square)
                for (int64_t u = 0; u < count; ++u) sum[u] += row[u] * row[u];
            else
                for (int64_t u = 0; u < count; ++u) sum[u] += row[u];
        }
        if (reduction == batch)
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
