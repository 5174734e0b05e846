// Layout and threading of the reductions over feature maps; see maps.h.
#include "maps.h"

#include <array>
#include <string>

namespace taylored {
namespace {

constexpr int64_t kBlock = 1 << 16;  // elements of one block: several fit into a core's level 2 cache
constexpr int64_t kTask = 1 << 13;   // elements worth a task's own bookkeeping
constexpr int64_t kGrain = 1 << 15;  // elements below which another thread costs more than it brings

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

void store(const Tensor& result, ScalarType type, int64_t first, const double* values, int64_t count) {
    const auto copy = [&](auto* out) { std::copy_n(values, count, out + first); };
    switch (type) {
        case ScalarType::Float:
            return copy(static_cast<float*>(result.mutable_data_ptr()));
        case ScalarType::Double:
            return copy(static_cast<double*>(result.mutable_data_ptr()));
        default:
            return copy(static_cast<int64_t*>(result.mutable_data_ptr()));
    }
}

}  // namespace

MapType map_type(const Tensor& x, const char* op, const char* name) {
    switch (x.scalar_type()) {
        case ScalarType::Double:
            return MapType::float64;
        case ScalarType::Float:
            return MapType::float32;
        case ScalarType::BFloat16:
            return MapType::bfloat16;
        case ScalarType::Half:
            return MapType::float16;
        default:
            STD_TORCH_CHECK(false, op, ": ", name, " has dtype ",
                            torch::headeronly::toString(x.scalar_type()),
                            ", expected float64, float32, bfloat16 or float16");
    }
}

bool has_map_layout(const Tensor& x) { return x.is_contiguous() || channels_last(x); }

Tensor with_map_layout(const Tensor& x, const char* op, const char* name) {
    map_type(x, op, name);
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
    STD_TORCH_CHECK(g.is_cpu(), op, ": ", g_name, " must be on the CPU, as ", x_name, " is");
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
    if (positions > 1 && x.is_contiguous()) return {1, positions, 1, n * c, positions};
    return {n, positions, c, c, 1};
}

ScalarType result_type(const Tensor& x) {
    return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor empty_result(const Tensor& x, ScalarType dtype) {
    const std::array<int64_t, 2> size{x.size(0), x.size(1)};
    return torch::stable::new_empty(x, size, dtype);
}

void reduce_map(MapOp op, const Tensor& x, const void* g, void* out, const Tensor* results) {
    const MapView view = view_of(x);
    const MapKernel kernel = map_kernel(op, map_type(x, "reduce_map", "x"));
    const int sums = map_sums(op);
    const auto* x_data = static_cast<const char*>(x.const_data_ptr());
    const auto* g_data = static_cast<const char*>(g);
    auto* out_data = static_cast<char*>(out);
    const int64_t item = x.element_size();
    std::array<ScalarType, 3> types{};
    for (int k = 0; k < sums; ++k) types[k] = results[k].scalar_type();

    // A task is (outer, block of positions, chunk of channels). Several blocks leave float64 partial sums
    // behind.
    const bool rows = view.position_stride == 1;
    const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    const int64_t widest = std::clamp<int64_t>(
        rows ? kTask / std::max<int64_t>(view.positions, 1) : kMaxChannels, 1, kMaxChannels);
    const int64_t chunk = std::clamp<int64_t>(view.channels, 1, widest);
    const int64_t block = rows ? kBlock : std::max<int64_t>(kBlock / chunk, 256);
    const int64_t chunks = ceil_div(view.channels, chunk),
                  blocks = std::max<int64_t>(ceil_div(view.positions, block), 1);
    const int64_t tasks = view.outer * blocks * chunks;
    const int64_t task_size = std::max<int64_t>(std::min(block, view.positions) * chunk, 1);
    const int64_t columns = view.outer * view.channels;  // of [N, C], flat
    std::unique_ptr<double[]> partial(blocks > 1 ? new double[sums * blocks * columns] : nullptr);

    torch::stable::parallel_for(
        0, tasks, std::max<int64_t>(kGrain / task_size, 1), [&](int64_t begin, int64_t end) {
            double values[3 * kMaxChannels];
            for (int64_t task = begin; task < end; ++task) {
                const int64_t c = task % chunks * chunk, p = task / chunks % blocks * block,
                              o = task / chunks / blocks;
                const int64_t channels = std::min(chunk, view.channels - c);
                const int64_t offset = item * (o * view.positions * view.channels + p * view.position_stride +
                                               c * view.channel_stride);
                kernel({x_data + offset, g_data ? g_data + offset : nullptr,
                        out_data ? out_data + offset : nullptr, std::min(block, view.positions - p),
                        view.position_stride, channels, view.channel_stride},
                       values);
                for (int k = 0; k < sums; ++k) {
                    const int64_t first = o * view.channels + c;
                    if (blocks == 1)
                        store(results[k], types[k], first, values + k * channels, channels);
                    else
                        std::copy_n(values + k * channels, channels,
                                    &partial[(k * blocks + p / block) * columns + first]);
                }
            }
        });
    if (blocks == 1) return;

    for (int k = 0; k < sums; ++k) {
        double* total = &partial[k * blocks * columns];
        for (int64_t b = 1; b < blocks; ++b)
            for (int64_t i = 0; i < columns; ++i) total[i] += total[b * columns + i];
        store(results[k], types[k], 0, total, columns);
    }
}

}  // namespace taylored
