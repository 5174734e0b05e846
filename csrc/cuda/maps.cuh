// Reductions over the positions of feature maps: the two kernels under contribution, relu_backward and
// channel_statistics, and the geometry of their launches.
//
// Memory is [outer][positions][channels]. Contiguous maps are outer = N * C rows of one channel;
// channels-last ones are outer = N. Small rows: a block takes many of them as one stretch of memory, stages a
// value per element in shared memory, and some lanes sum each row. All else: a thread keeps the sums of V
// adjacent columns in registers over many positions, and the block folds the threads that hold the same
// channel. Where that makes too few blocks for a GPU, positions are split, and a second kernel folds the
// parts.
//
// Memory moves 16 bytes a thread, several loads in flight, from the first 32-byte sector on; the elements at
// either end of a stretch that fill no 16 bytes are taken one by one. Threads sum in float32 over at most
// kStretch additions and the rest in float64 (float64 input: float64 throughout), in an order that depends on
// the shape and the alignment alone: no atomics, so the same bits in every run.
#pragma once
#include <algorithm>
#include <numeric>

#include "../map_view.h"
#include "platform.cuh"

namespace taylored::cuda {

constexpr int kThreads = 256;  // of every block
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 4096;         // float32 values a block of small rows stages; float64: half of it
constexpr int kRows = 512;          // of a tile at most
constexpr int kStretch = 256;       // additions in float32
constexpr int64_t kBlocks = 1024;   // that keep a large GPU busy
constexpr int64_t kMinSplit = 256;  // positions per sum that make a split's own traffic less than 1%

template <class T>
struct SumOf {
    using type = float;
};
template <>
struct SumOf<double> {
    using type = double;
};
template <class T>
using Sum = typename SumOf<T>::type;
template <class T>
constexpr int kTileOf = kTile * sizeof(float) / sizeof(Sum<T>);

// ---- Geometry

struct MapShape {
    int64_t outer, positions, channels;
};

// Adjacent positions make every channel of every outer map a row of its own, and so do maps of one position.
constexpr MapShape shape_of(const MapView& view) {
    const bool rows = view.position_stride == 1 || view.positions <= 1;
    if (rows) return {view.outer * view.channels, view.positions, 1};
    return {view.outer, view.positions, view.channels};
}

struct MapGrid {
    MapShape shape;
    int width;        // elements of one access: 16 bytes of them, or 1 where a pointer is not aligned
    bool small_rows;  // reduce_rows, else reduce_columns
    int64_t blocks;

    int rows_per_block;  // of reduce_rows

    // Of reduce_columns: a block takes `parallel` positions at a time, and of each `period` adjacent
    // channels: all of them, or one of `groups`. Its first access starts at a multiple of `align` elements.
    int period, parallel, align;
    int64_t groups, splits, split_positions;

    __host__ __device__ int64_t results() const { return shape.outer * shape.channels; }
    int64_t partial_sums(int sums) const { return splits > 1 ? sums * splits * results() : 0; }
};

constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Lanes that share a sum of `count` values: about eight values each.
__host__ __device__ constexpr int lanes_for(int64_t count) {
    int lanes = 1;
    while (lanes < 32 && lanes * 8 < count) lanes *= 2;
    return lanes;
}

inline MapGrid row_grid(MapGrid grid, int tile) {
    const MapShape& s = grid.shape;
    int64_t rows = std::min<int64_t>(tile / std::max<int64_t>(s.positions, 1), kRows);
    // Sixteen rows of any length begin and end at whole sectors; few of them make many blocks.
    if (rows > 16) rows = 16 * std::clamp<int64_t>(ceil_div(s.outer, 16 * kBlocks), 1, rows / 16);
    grid.small_rows = true;
    grid.rows_per_block = rows;
    grid.blocks = ceil_div(s.outer, grid.rows_per_block);
    return grid;
}

inline MapGrid column_grid(MapGrid grid, int sums) {
    const auto [outer, positions, channels] = grid.shape;
    const int64_t factor =
        grid.width / std::gcd(channels, int64_t(grid.width));  // of positions, to be aligned
    int64_t threads = 1;  // that share the channels of a position evenly: a power of two
    while (threads < kThreads && channels % (2 * threads * grid.width) == 0) threads *= 2;
    if (threads >= 8) {  // 128 bytes: a cache line, at a line's start
        while (threads > 8 && outer * (channels / (threads * grid.width)) < kBlocks / 2) threads /= 2;
        grid.period = threads * grid.width;
    } else if (factor * channels <= kThreads * grid.width) {  // whole positions, one after the other
        grid.period = channels;
        grid.align = 2 * grid.width;
    } else {
        if (channels % grid.width) grid.width = 1;
        grid.period = 64 * grid.width;  // the last group may be short
    }
    grid.groups = ceil_div(channels, grid.period);
    grid.parallel = kThreads * grid.width / grid.period;
    if (grid.period == channels) grid.parallel -= grid.parallel % factor;

    const int64_t least = std::max<int64_t>(kMinSplit * sums, 8 * grid.parallel);
    int64_t splits = std::clamp<int64_t>(kBlocks / std::max<int64_t>(outer * grid.groups, 1), 1,
                                         std::max<int64_t>(positions / least, 1));
    splits = std::max<int64_t>({splits, ceil_div(positions, kStretch * grid.parallel), 1});
    splits = std::max(splits, ceil_div(positions * channels, 1 << 30));  // a block counts in 32 bits
    grid.split_positions =
        std::max<int64_t>(round_up(ceil_div(positions, splits), grid.parallel), grid.parallel);
    grid.splits = std::max<int64_t>(ceil_div(positions, grid.split_positions), 1);
    grid.blocks = outer * grid.groups * grid.splits;
    return grid;
}

// `aligned`: all pointers are multiples of 16 bytes. sums: of the operator.
template <class T>
MapGrid map_grid(const MapShape& shape, int sums, bool aligned) {
    MapGrid grid{};
    grid.shape = shape;
    grid.width = aligned ? 16 / sizeof(T) : 1;
    grid.align = grid.splits = 1;
    const bool small_rows = shape.channels == 1 && shape.positions <= kTileOf<T> / 2;
    return small_rows ? row_grid(grid, kTileOf<T>) : column_grid(grid, sums);
}

// ---- Elements

template <class T>
struct Maps {
    const T* x;
    const T* g;  // null where the operator takes one map
    T* out;      // null where it writes none
};

template <class T, int V>
struct Pack {
    T at[V];
};

template <int V, class T>
__device__ __forceinline__ Pack<T, V> load(const T* p) {
    if constexpr (V == 1)
        return {{*p}};
    else
        return __builtin_bit_cast(Pack<T, V>, load16(p));
}

template <class T, int V>
__device__ __forceinline__ void store(T* p, const Pack<T, V>& pack) {
    if constexpr (V == 1)
        *p = pack.at[0];
    else
        store16(p, __builtin_bit_cast(uint4, pack));
}

__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }

// The maps from element `first` on.
template <template <class> class Op, class T>
__device__ __forceinline__ Maps<T> from(const Maps<T>& maps, int64_t first) {
    return {maps.x + first, Op<T>::inputs == 2 ? maps.g + first : nullptr,
            Op<T>::writes ? maps.out + first : nullptr};
}

// Calls use(i, values, first, last) for the elements i + first .. i + last - 1 of [lo, hi) among those this
// thread sees: V of them at start, at start + step, and so on. Loads of U steps are in flight at a time.
template <template <class> class Op, int V, int U, class T, class Use>
__device__ __forceinline__ void visit(const Maps<T>& maps, int lo, int hi, int start, int step, Use use) {
    for (int base = start; base < hi; base += U * step) {
        Pack<T, V> x[U], g[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int i = base + u * step;
            if (i < lo || i + V > hi) continue;
            x[u] = load<V>(maps.x + i);
            if constexpr (Op<T>::inputs == 2) g[u] = load<V>(maps.g + i);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int i = base + u * step;
            if (i < lo || i + V > hi) continue;
            Sum<T> values[V];
            Pack<T, V> out;
#pragma unroll
            for (int e = 0; e < V; ++e) values[e] = Op<T>::value(x[u].at[e], g[u].at[e], out.at[e]);
            if constexpr (Op<T>::writes) store(maps.out + i, out);
            use(i, values, 0, V);
        }
        if constexpr (V > 1) {  // the ends of the stretch
            if (base >= lo && base + (U - 1) * step + V <= hi) continue;
#pragma unroll 1
            for (int i = base; i < base + U * step; i += step) {
                const int first = max(lo - i, 0), last = min(hi - i, V);
                if (first >= last || last - first == V) continue;
                Sum<T> values[V] = {};
#pragma unroll
                for (int e = 0; e < V; ++e) {
                    if (e < first || e >= last) continue;
                    T out;
                    values[e] = Op<T>::value(maps.x[i + e], Op<T>::inputs == 2 ? maps.g[i + e] : T{}, out);
                    if constexpr (Op<T>::writes) maps.out[i + e] = out;
                }
                use(i, values, first, last);
            }
        }
    }
}

// Leaves V values in shared memory.
template <class S, int V>
__device__ __forceinline__ void stage(S* to, const S (&values)[V]) {
    constexpr int width = V == 1 ? 1 : 16 / sizeof(S);
#pragma unroll
    for (int e = 0; e < V; e += width) {
        Pack<S, width> pack;
#pragma unroll
        for (int i = 0; i < width; ++i) pack.at[i] = values[e + i];
        store(to + e, pack);
    }
}

// ---- Results

template <class S>
struct Results {
    S* sum;
    S* squares;        // channel_statistics
    long long* zeros;  // channel_statistics
    S* partial;        // [sums][splits][results], where there are splits
};

template <class S>
__device__ __forceinline__ void put(const Results<S>& results, int k, int64_t i, double value) {
    if (k == 0)
        results.sum[i] = value;
    else if (k == 1)
        results.squares[i] = value;
    else
        results.zeros[i] = static_cast<long long>(value);
}

// The sum over groups of `lanes` adjacent lanes, each of which gets it.
__device__ __forceinline__ double sum_over(int lanes, double value) {
    for (int d = lanes / 2; d > 0; d /= 2) value += __shfl_xor_sync(~0u, value, d);
    return value;
}

// ---- Kernels

// Where reduce_rows stages value i: with a gap of 16 bytes after every 128, since rows of 16 or 64 values
// would else begin in the same few banks.
template <class S>
__host__ __device__ constexpr int slot(int i) {
    return i + i / (128 / int(sizeof(S))) * (16 / int(sizeof(S)));
}

template <template <class> class Op, class T, int V>
__global__ __launch_bounds__(kThreads, 3) void reduce_rows(Maps<T> maps, MapGrid grid,
                                                           Results<Sum<T>> results) {
    constexpr int sums = Op<T>::sums, loads = kTileOf<T> / (kThreads * V);
    // The first sector may begin before the first row.
    __shared__ __align__(16) Sum<T> staged[slot<Sum<T>>(kTileOf<T> + 32)];
    __shared__ Sum<T> totals[sums][kRows];
    const int thread = threadIdx.x, positions = grid.shape.positions;
    const int64_t first_row = blockIdx.x * int64_t(grid.rows_per_block), first = first_row * positions;
    const int rows = min(int64_t(grid.rows_per_block), grid.shape.outer - first_row);
    const int lo = first & (2 * V - 1), hi = lo + rows * positions;  // from a sector's begin on

    visit<Op, V, (loads < 4 ? loads : 4)>(
        from<Op>(maps, first - lo), lo, hi, thread * V, kThreads * V,
        [&](int i, const Sum<T>(&values)[V], int, int) { stage(staged + slot<Sum<T>>(i), values); });
    __syncthreads();

    const int lanes = lanes_for(positions), lane = thread % lanes;
    for (int base = 0; base < rows; base += kThreads / lanes) {
        const int row = base + thread / lanes;
        Sum<T> sum[sums] = {};
        if (row < rows)
            for (int i = lane; i < positions; i += lanes)
                Op<T>::add(sum, staged[slot<Sum<T>>(lo + row * positions + i)]);
#pragma unroll
        for (int k = 0; k < sums; ++k) {
            const double total = sum_over(lanes, sum[k]);
            if (lane == 0 && row < rows) totals[k][row] = total;
        }
    }
    __syncthreads();
    for (int row = thread; row < rows; row += kThreads)  // whole sectors
#pragma unroll
        for (int k = 0; k < sums; ++k) put(results, k, first_row + row, totals[k][row]);
}

template <template <class> class Op, class T, int V>
__global__ __launch_bounds__(kThreads, 2) void reduce_columns(Maps<T> maps, MapGrid grid,
                                                              Results<Sum<T>> results) {
    constexpr int sums = Op<T>::sums;
    __shared__ __align__(16) Sum<T> staged[sums][kThreads * V];
    const int thread = threadIdx.x, period = grid.period;
    const int64_t channels = grid.shape.channels, positions = grid.shape.positions;
    const int64_t group = blockIdx.x % grid.groups, split = blockIdx.x / grid.groups % grid.splits,
                  outer = blockIdx.x / grid.groups / grid.splits;
    const int64_t begin = split * grid.split_positions, end = min(begin + grid.split_positions, positions);
    const int64_t first = (outer * positions + begin) * channels;
    const int lo = first & (grid.align - 1), hi = lo + (end - begin) * channels;  // from a sector's begin on

    // This thread's column of the `parallel` positions that the block takes at a time.
    const int column = thread * V;
    const int64_t channel = group * period + column % period;
    const bool active = column < grid.parallel * period && channel < channels;
    Sum<T> sum[V][sums] = {};
    visit<Op, V, (V == 1 ? 8 : 4)>(
        from<Op>(maps, first - lo), lo, hi, active ? column / period * channels + channel : hi,
        grid.parallel * channels, [&](int, const Sum<T>(&values)[V], int from, int to) {
#pragma unroll
            for (int e = 0; e < V; ++e)
                if (e >= from && e < to) Op<T>::add(sum[e], values[e]);
        });

    const bool one = channels == 1;  // all columns are one channel: the thread's own are folded first
#pragma unroll
    for (int k = 0; k < sums; ++k) {
        Sum<T> values[V], total = 0;
#pragma unroll
        for (int e = 0; e < V; ++e) total += values[e] = sum[e][k];
        if (one)
            staged[k][thread] = total;
        else
            stage(staged[k] + column, values);
    }
    __syncthreads();

    const int count = one ? kThreads : grid.parallel, lanes = lanes_for(count), lane = thread % lanes;
    const int width = min(int64_t(period), channels - group * period);
    for (int base = 0; base < width; base += kThreads / lanes) {
        const int c = base + thread / lanes;
        const int start = (c + lo) % period;
#pragma unroll
        for (int k = 0; k < sums; ++k) {
            double total = 0;
            if (c < width)
                for (int i = lane; i < count; i += lanes) total += staged[k][start + i * period];
            total = sum_over(lanes, total);
            if (lane != 0 || c >= width) continue;
            const int64_t result = outer * channels + group * period + c;
            if (grid.splits > 1)
                results.partial[(k * grid.splits + split) * grid.results() + result] = total;
            else
                put(results, k, result, total);
        }
    }
}

// The second stage: a warp takes 32 results and every eighth split; the block adds up its warps in order.
template <class S, int sums>
__global__ __launch_bounds__(kThreads) void fold_splits(MapGrid grid, Results<S> results) {
    __shared__ double staged[kWarps][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t i = blockIdx.x * int64_t(32) + lane, count = grid.results();
    for (int k = 0; k < sums; ++k) {
        double total = 0;
        if (i < count)
            for (int64_t split = warp; split < grid.splits; split += kWarps)
                total += results.partial[(k * grid.splits + split) * count + i];
        staged[warp][lane] = total;
        __syncthreads();
        if (warp == 0 && i < count) {
            for (int w = 1; w < kWarps; ++w) total += staged[w][lane];
            put(results, k, i, total);
        }
        __syncthreads();
    }
}

// Everything an operator launches, by launch(name, blocks, kernel, arguments...).
template <template <class> class Op, class T, class Launch>
void reduce_map(const Maps<T>& maps, const MapGrid& grid, const Results<Sum<T>>& results, Launch launch) {
    constexpr int V = 16 / sizeof(T), sums = Op<T>::sums;
    if (grid.blocks == 0) return;
    if (grid.small_rows)
        launch("reduce_rows", grid.blocks, grid.width == 1 ? reduce_rows<Op, T, 1> : reduce_rows<Op, T, V>,
               maps, grid, results);
    else
        launch("reduce_columns", grid.blocks,
               grid.width == 1 ? reduce_columns<Op, T, 1> : reduce_columns<Op, T, V>, maps, grid, results);
    if (grid.splits > 1)
        launch("fold_splits", ceil_div(grid.results(), 32), fold_splits<Sum<T>, sums>, grid, results);
}

}  // namespace taylored::cuda
