// Threading of the reductions over feature maps; see reduce_map.h.
#include "reduce_map.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <memory>

namespace taylored {
namespace {

constexpr int64_t kBlock = 1 << 16;  // elements of one block: several fit into a core's level 2 cache
constexpr int64_t kTask = 1 << 13;   // elements worth a task's own bookkeeping
constexpr int64_t kGrain = 1 << 15;  // elements below which another thread costs more than it brings

MapType map_type(const Tensor& x) {
    switch (x.scalar_type()) {
        case ScalarType::Double:
            return MapType::float64;
        case ScalarType::Float:
            return MapType::float32;
        case ScalarType::BFloat16:
            return MapType::bfloat16;
        default:
            return MapType::float16;
    }
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

void reduce_map(MapOp op, const Tensor& x, const void* g, void* out, const Tensor* results) {
    const MapView view = view_of(x);
    const MapType type = map_type(x);
    const MapKernel kernel = with_isa([&]<Isa isa> { return map_kernel<isa>(op, type); });
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
