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
#include <utility>
#include <vector>

#include "compact.h"

namespace taylored {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kWave = 1 << 20;   // bytes of a wave below which one thread is faster than waking another
constexpr int64_t kLargeUnit = 512;  // bytes from which a call of memmove costs nothing beside its work

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

void compact_many_(std::vector<Tensor> x, std::vector<int64_t> counts, std::vector<int64_t> dims,
                   std::vector<Tensor> keep) {
    const std::vector<Cut> cuts = cuts_of(x, counts, dims, keep);
    std::vector<std::pair<const Cut*, Rows>> moves;  // all of them are known before the first is made
    for (const Cut& cut : cuts)
        if (const std::vector<Level> levels = cut.levels(); !levels.empty())
            moves.emplace_back(&cut, make_rows(levels));
    for (const auto& [cut, rows] : moves)
        for (const Tensor& one : cut->x) rows.move_all(static_cast<char*>(one.mutable_data_ptr()));
}

void compact_(Tensor x, std::vector<int64_t> dims, std::vector<Tensor> keep) {
    compact_many_({x}, {static_cast<int64_t>(dims.size())}, dims, keep);
}

STABLE_TORCH_LIBRARY_IMPL(taylored, CPU, m) {
    m.impl("compact_", TORCH_BOX(&compact_));
    m.impl("compact_many_", TORCH_BOX(&compact_many_));
}

}  // namespace
}  // namespace taylored
