// compact_: keep some indices of some dimensions of a dense tensor, in its own memory, with no copy of it.
//
// Dimensions are ordered by stride. The innermost one that loses indices, with all that lies inside it, is a
// row: a short program of moves, the same for every row. The dimensions outside it enumerate the rows. Row r
// of the result goes to r * row_bytes, which is never beyond its source, so moving rows in order is always
// safe.
//
// Threads: row r may be written as soon as everything that lies where it goes has been read. Once rows [0,
// done) have moved, all memory before the source of row `done` is free: every row whose destination ends
// there can move, in any order. Such waves grow with the gap between source and destination (fourfold each
// when half of two dimensions goes), move every byte once, and need no temporary memory.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace taylored {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kWave = 1 << 20;   // bytes of a wave below which one thread is faster than waking another
constexpr int64_t kLargeUnit = 512;  // bytes from which a call of memmove costs nothing beside its work

// One dimension, as the moves see it. keep == nullptr: all of it.
struct Level {
    int64_t size, stride;  // stride in bytes
    const int64_t* keep;
    int64_t kept;
};

struct Run {
    int64_t source, bytes;
};

// ---- Moving one unit: `bytes` contiguous bytes toward the front, overlap allowed.
// A memmove of a few dozen bytes costs more in its call and its branches
// than in its loads, hence one function per size class, chosen once: every byte of a class is loaded before
// any is stored, the two halves overlapping.

typedef char Vec16 __attribute__((vector_size(16), aligned(1), may_alias));

template <class Int>  // exactly one integer
struct One {
    static void move(char* to, const char* from, int64_t) {
        Int value;
        std::memcpy(&value, from, sizeof(Int));
        std::memcpy(to, &value, sizeof(Int));
    }
};

template <class Int>  // one to two integers, overlapping
struct Two {
    static void move(char* to, const char* from, int64_t bytes) {
        Int head, tail;
        std::memcpy(&head, from, sizeof(Int));
        std::memcpy(&tail, from + bytes - sizeof(Int), sizeof(Int));
        std::memcpy(to, &head, sizeof(Int));
        std::memcpy(to + bytes - sizeof(Int), &tail, sizeof(Int));
    }
};

template <int N>  // 16 * N to 16 * (N + 1) bytes: N vectors and the last 16 bytes
struct Vectors {
    static void move(char* to, const char* from, int64_t bytes) {
        Vec16 part[N];
        const Vec16 tail = *reinterpret_cast<const Vec16*>(from + bytes - 16);
        for (int i = 0; i < N; ++i) part[i] = *reinterpret_cast<const Vec16*>(from + 16 * i);
        for (int i = 0; i < N; ++i) *reinterpret_cast<Vec16*>(to + 16 * i) = part[i];
        *reinterpret_cast<Vec16*>(to + bytes - 16) = tail;
    }
};

struct Long {  // 64 bytes and more
    static void move(char* to, const char* from, int64_t bytes) {
        const Vec16 tail = *reinterpret_cast<const Vec16*>(from + bytes - 16);  // before a store can reach it
        for (int64_t i = 0; i < bytes - 16; i += 16)
            *reinterpret_cast<Vec16*>(to + i) = *reinterpret_cast<const Vec16*>(from + i);
        *reinterpret_cast<Vec16*>(to + bytes - 16) = tail;
    }
};

// ---- Moving one row

struct Row {
    std::vector<Run> runs;  // used where units are long or runs of adjacent ones are
    const int64_t* keep;
    int64_t kept, unit;

    using Move = void (*)(const Row&, char* to, const char* from);
    Move move;
};

void move_runs(const Row& row, char* to, const char* from) {
    for (const Run& run : row.runs) {
        std::memmove(to, from + run.source, run.bytes);
        to += run.bytes;
    }
}

template <class Unit, int64_t Size = 0>  // Size: known to the compiler
void move_units(const Row& row, char* to, const char* from) {
    const int64_t unit = Size ? Size : row.unit, kept = row.kept;
    const int64_t* const keep = row.keep;
    for (int64_t i = 0; i < kept; ++i) Unit::move(to + i * unit, from + keep[i] * unit, unit);
}

Row::Move unit_mover(int64_t unit) {
    switch (unit) {
        case 1:
            return move_units<One<uint8_t>, 1>;
        case 2:
            return move_units<One<uint16_t>, 2>;
        case 4:
            return move_units<One<uint32_t>, 4>;
        case 8:
            return move_units<One<uint64_t>, 8>;
        case 36:
            return move_units<Vectors<2>, 36>;  // a 3x3 filter of float32
    }
    if (unit < 4) return move_units<Two<uint16_t>>;
    if (unit < 8) return move_units<Two<uint32_t>>;
    if (unit < 16) return move_units<Two<uint64_t>>;
    if (unit <= 32) return move_units<Vectors<1>>;
    if (unit <= 48) return move_units<Vectors<2>>;
    if (unit <= 64) return move_units<Vectors<3>>;
    return move_units<Long>;
}

Row make_row(const Level& level) {
    Row row{{}, level.keep, level.kept, level.stride, nullptr};
    int64_t runs = 1;
    for (int64_t i = 1; i < level.kept; ++i) runs += level.keep[i] != level.keep[i - 1] + 1;
    if (level.stride < kLargeUnit && level.kept * level.stride / runs < kLargeUnit) {
        row.move = unit_mover(level.stride);
        return row;
    }
    row.move = move_runs;
    row.runs.reserve(runs);
    for (int64_t i = 0; i < level.kept; ++i) {
        if (i == 0 || level.keep[i] != level.keep[i - 1] + 1)
            row.runs.push_back({level.keep[i] * level.stride, 0});
        row.runs.back().bytes += level.stride;
    }
    return row;
}

// ---- Moving all rows

struct Rows {
    Row row;
    int64_t row_bytes;         // of the result
    std::vector<Level> outer;  // innermost first
    int64_t count = 1;

    int64_t source(int64_t r) const {
        int64_t offset = 0;
        for (size_t i = 0; i < outer.size(); ++i) {
            const Level& level = outer[i];
            const bool last = i + 1 == outer.size();
            const int64_t index = last ? r : r % level.kept;
            if (!last) r /= level.kept;
            offset += (level.keep ? level.keep[index] : index) * level.stride;
        }
        return offset;
    }

    void move(char* data, int64_t begin, int64_t end) const {
        for (int64_t r = begin; r < end; ++r) row.move(row, data + r * row_bytes, data + source(r));
    }

    void move_all(char* data) const {
        const int64_t step = std::max<int64_t>(kWave / 2 / row_bytes, 1);
        for (int64_t done = 0; done < count;) {
            const int64_t ready = std::min(source(done) / row_bytes, count);
            if ((ready - done) * row_bytes < kWave) {  // too few, or none: the next rows in order
                const int64_t end = std::min(done + step, count);
                move(data, done, end);
                done = end;
            } else {
                torch::stable::parallel_for(done, ready, step,
                                            [&](int64_t begin, int64_t end) { move(data, begin, end); });
                done = ready;
            }
        }
    }
};

Rows make_rows(const std::vector<Level>& levels) {  // innermost first
    size_t inner = 0;
    while (!levels[inner].keep) ++inner;
    Rows rows{};
    if (levels[inner].stride >= kLargeUnit && levels[inner].kept > 1) {
        // Long slices are rows of their own, so that several threads can share them.
        static constexpr int64_t first = 0;
        rows.row = make_row({1, levels[inner].stride, &first, 1});
        rows.row_bytes = levels[inner].stride;
    } else {
        rows.row = make_row(levels[inner]);
        rows.row_bytes = levels[inner].kept * levels[inner].stride;
        ++inner;
    }
    for (size_t i = inner; i < levels.size(); ++i) {
        rows.outer.push_back(levels[i]);
        rows.count *= levels[i].kept;
    }
    return rows;
}

// ---- Arguments

// x's dimensions as levels, innermost first; throws where memory is not dense.
std::vector<Level> levels_of(const Tensor& x, const std::vector<const Level*>& cut) {
    const auto sizes = x.sizes(), strides = x.strides();
    std::vector<int64_t> order;
    for (int64_t d = 0; d < x.dim(); ++d)
        if (sizes[d] != 1) order.push_back(d);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });

    std::vector<Level> levels;
    const int64_t item = x.element_size();
    int64_t expected = 1;
    for (const int64_t d : order) {
        STD_TORCH_CHECK(strides[d] == expected, "compact_: x is not dense (dimension ", d, " has stride ",
                        strides[d], ", packed memory has ", expected,
                        "): pass the whole tensor, not a slice or an expanded view");
        if (cut[d])
            levels.push_back({sizes[d], expected * item, cut[d]->keep, cut[d]->kept});
        else if (!levels.empty() && !levels.back().keep)
            levels.back().kept = levels.back().size *= sizes[d];  // two whole dimensions are one
        else
            levels.push_back({sizes[d], expected * item, nullptr, sizes[d]});
        expected *= sizes[d];
    }
    return levels;
}

void check_keep(const Tensor& keep, int64_t size, size_t i, int64_t dim) {
    const auto* index = static_cast<const int64_t*>(keep.const_data_ptr());
    const int64_t count = keep.numel();
    bool increasing = true;
    for (int64_t j = 1; j < count; ++j) increasing &= index[j - 1] < index[j];
    STD_TORCH_CHECK(increasing, "compact_: keep[", i, "] must be strictly increasing");
    STD_TORCH_CHECK(count == 0 || (index[0] >= 0 && index[count - 1] < size), "compact_: keep[", i,
                    "] must lie in [0, ", size, "), the size of x's dimension ", dim, ", but spans ",
                    count ? index[0] : 0, " to ", count ? index[count - 1] : 0);
}

void compact_(Tensor x, std::vector<int64_t> dims, std::vector<Tensor> keep) {
    STD_TORCH_CHECK(dims.size() == keep.size(), "compact_: dims has ", dims.size(), " entries and keep ",
                    keep.size(), ", expected one index vector per dimension");
    const int64_t rank = x.dim();
    std::vector<Level> given(dims.size());
    std::vector<const Level*> cut(rank, nullptr);
    std::vector<bool> seen(rank, false);
    bool empty = x.numel() == 0;
    for (size_t i = 0; i < dims.size(); ++i) {
        STD_TORCH_CHECK(dims[i] >= -rank && dims[i] < rank, "compact_: dims[", i, "] is ", dims[i],
                        ", expected a dimension of x, which has ", rank);
        const int64_t d = dims[i] < 0 ? dims[i] + rank : dims[i];
        STD_TORCH_CHECK(!seen[d], "compact_: dims names dimension ", d, " twice");
        seen[d] = true;
        STD_TORCH_CHECK(keep[i].scalar_type() == ScalarType::Long && keep[i].dim() == 1 && keep[i].is_cpu(),
                        "compact_: keep[", i, "] must be a vector of int64 indices on the CPU");
        if (!keep[i].is_contiguous()) keep[i] = torch::stable::contiguous(keep[i]);
        check_keep(keep[i], x.size(d), i, d);
        given[i] = {x.size(d), 0, static_cast<const int64_t*>(keep[i].const_data_ptr()), keep[i].numel()};
        if (given[i].kept < given[i].size) cut[d] = &given[i];
        empty |= given[i].kept == 0;
    }
    if (empty) return;
    const std::vector<Level> levels = levels_of(x, cut);
    if (std::none_of(levels.begin(), levels.end(), [](const Level& level) { return level.keep; })) return;
    make_rows(levels).move_all(static_cast<char*>(x.mutable_data_ptr()));
}

STABLE_TORCH_LIBRARY_IMPL(taylored, CPU, m) { m.impl("compact_", TORCH_BOX(&compact_)); }

}  // namespace
}  // namespace taylored
