// See maps.h.
#include "maps.h"

#include <algorithm>
#include <array>
#include <string>

namespace taylored {
namespace {

// The strides of `order` (dimensions, innermost first) are those of packed memory. Dimensions of size one
// have no say.
template <class Order>
bool packed(const Tensor& x, const Order& order) {
    const auto sizes = x.sizes(), strides = x.strides();
    int64_t expected = 1;
    for (const int64_t d : order) {
        if (sizes[d] != 1 && strides[d] != expected) return false;
        expected *= sizes[d];
    }
    return true;
}

bool channels_last(const Tensor& x) {
    std::array<int64_t, 16> order{1};
    const int64_t dim = x.dim();
    if (dim > (int64_t)order.size()) return false;
    for (int64_t i = 1; i + 1 < dim; ++i) order[i] = dim - i;
    order[dim - 1] = 0;
    return packed(x, torch::headeronly::IntHeaderOnlyArrayRef(order.data(), dim));
}

bool same(torch::headeronly::IntHeaderOnlyArrayRef a, torch::headeronly::IntHeaderOnlyArrayRef b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

std::string shape(const Tensor& x) {
    std::string text = "[";
    for (const int64_t size : x.sizes()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
    return text + "]";
}

}  // namespace

static void check_dtype(const Tensor& x, const char* op, const char* name) {
    const ScalarType type = x.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::BFloat16 ||
                        type == ScalarType::Half,
                    op, ": ", name, " has dtype ", torch::headeronly::toString(type),
                    ", expected float64, float32, bfloat16 or float16");
}

bool has_map_layout(const Tensor& x) { return x.is_contiguous() || channels_last(x); }

Tensor with_map_layout(const Tensor& x, const char* op, const char* name) {
    check_dtype(x, op, name);
    STD_TORCH_CHECK(x.dim() >= 2, op, ": ", name, " has shape ", shape(x), ", expected [N, C, *spatial]");
    return has_map_layout(x) ? x : torch::stable::contiguous(x);
}

Tensor in_layout_of(const Tensor& x, const Tensor& g, const char* op, const char* x_name,
                    const char* g_name) {
    STD_TORCH_CHECK(x.scalar_type() == g.scalar_type(), op, ": ", g_name, " has dtype ",
                    torch::headeronly::toString(g.scalar_type()), ", expected ", x_name, "'s, ",
                    torch::headeronly::toString(x.scalar_type()));
    STD_TORCH_CHECK(same(x.sizes(), g.sizes()), op, ": ", g_name, " has shape ", shape(g), ", expected ",
                    x_name, "'s, ", shape(x));
    STD_TORCH_CHECK(x.device() == g.device(), op, ": ", g_name, " must be where ", x_name, " is");
    if (same(x.strides(), g.strides()) || (x.is_contiguous() ? g.is_contiguous() : channels_last(g)))
        return g;
    Tensor copy = torch::stable::empty_like(x);
    torch::stable::copy_(copy, g);
    return copy;
}

MapView view_of(const Tensor& x) {
    const int64_t n = x.size(0), c = x.size(1), numel = x.numel();
    int64_t positions = 1;
    if (numel) {
        positions = numel / (n * c);
    } else {
        for (int64_t d = 2; d < x.dim(); ++d) positions *= x.size(d);
    }
    return map_view(n, c, positions, x.is_contiguous());
}

ScalarType result_type(const Tensor& x) {
    return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor empty_result(const Tensor& x, ScalarType dtype) {
    const std::array<int64_t, 2> size{x.size(0), x.size(1)};
    return torch::stable::new_empty(x, size, dtype);
}

}  // namespace taylored
