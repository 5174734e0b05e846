// compact_: move the kept slices of several dimensions to the front of a tensor's own memory.
//
// The result's words, in order, are cut into tiles. A kept word never moves backward, so all that can be lost
// is a source that another tile overwrites before it was read. Hence each tile
//   1. draws a ticket: its number, so that all lower tiles have at least been drawn,
//   2. loads its words into shared memory,
//   3. raises its flag (release): "loaded",
//   4. waits (acquire) for the tiles whose sources lie where its words go: at most two, all of lower number,
//   5. stores.
// No tile waits before it has raised its own flag, and only for lower tickets: no deadlock, however few
// blocks are resident. Destinations are disjoint, so "loaded" is enough. After Gomez-Luna et al., In-place
// data sliding algorithms for many-core architectures, ICPP 2015, who wait for the previous tile instead.
#pragma once
#include <algorithm>
#include <vector>

#include "../levels.h"
#include "platform.cuh"

namespace taylored::cuda {

constexpr int kCompactThreads = 256;
constexpr int kMaxLevels = 16;
constexpr int kMaxTensors = 8;  // per launch: a weight, its gradient, its momenta and averages

// A dimension, or several adjacent ones of which all is kept (keep == nullptr). Strides in words.
struct CompactLevel {
    const int64_t* keep;
    int64_t kept, stride, result_stride;
};

// How every tensor of a launch is cut.
struct Compaction {
    int levels;  // outermost first
    CompactLevel level[kMaxLevels];
    int64_t words;  // of the result
    int64_t tiles;

    // Where word j of the result comes from.
    __device__ int64_t source(int64_t j) const {
        int64_t word = 0;
        for (int l = 0; l < levels; ++l) {
            const CompactLevel& at = level[l];
            const int64_t i = uint64_t(j) / uint64_t(at.result_stride);
            j -= i * at.result_stride;
            word += (at.keep ? at.keep[i] : i) * at.stride;
        }
        return word + j;
    }

    // How many words of the result come from before `word`.
    __device__ int64_t before(int64_t word) const {
        int64_t count = 0;
        for (int l = 0; l < levels; ++l) {
            const CompactLevel& at = level[l];
            int64_t i = uint64_t(word) / uint64_t(at.stride);
            word -= i * at.stride;
            if (at.keep) {
                int64_t first = 0, last = at.kept;  // the first index kept that is not below i
                while (first < last) {
                    const int64_t middle = (first + last) / 2;
                    if (at.keep[middle] < i)
                        first = middle + 1;
                    else
                        last = middle;
                }
                count += first * at.result_stride;
                if (first == at.kept || at.keep[first] != i) return count;
            } else {
                count += i * at.result_stride;
            }
        }
        return count + word;
    }
};

struct CompactTensors {
    void* data[kMaxTensors];
};

template <class Word>
constexpr int kTileWords = 16384 / sizeof(Word);

template <class Word>
__device__ __forceinline__ Word load_word(const Word* p) {
    if constexpr (sizeof(Word) == 16)
        return load16(p);
    else
        return *p;
}
template <class Word>
__device__ __forceinline__ void store_word(Word* p, Word word) {
    if constexpr (sizeof(Word) == 16)
        store16(p, word);
    else
        *p = word;
}

// One block per tile of each tensor. control: the ticket, then a flag per block; zeros.
template <class Word>
__global__ __launch_bounds__(kCompactThreads, 4) void compact(const __grid_constant__ Compaction cut,
                                                              const __grid_constant__ CompactTensors tensors,
                                                              unsigned* control) {
    __shared__ unsigned drawn;
    __shared__ __align__(16) Word staged[kTileWords<Word>];
    if (threadIdx.x == 0) drawn = atomicAdd(control, 1u);
    __syncthreads();
    const int64_t tensor = drawn / cut.tiles, tile = drawn - tensor * cut.tiles;
    Word* const data = static_cast<Word*>(tensors.data[tensor]);
    unsigned* const loaded = control + 1 + tensor * cut.tiles;
    const int64_t begin = tile * kTileWords<Word>, end = min(begin + kTileWords<Word>, cut.words);

    for (int64_t first = begin + threadIdx.x; first < end; first += 4 * kCompactThreads) {
        Word word[4];  // in flight
#pragma unroll
        for (int u = 0; u < 4; ++u) {
            const int64_t j = first + u * kCompactThreads;
            if (j < end) word[u] = load_word(data + cut.source(j));
        }
#pragma unroll
        for (int u = 0; u < 4; ++u) {
            const int64_t j = first + u * kCompactThreads;
            if (j < end) store_word(staged + (j - begin), word[u]);
        }
    }
    __syncthreads();  // the whole tile is loaded
    if (threadIdx.x == 0) {
        store_release(loaded + tile, 1u);
        const int64_t last = min((cut.before(end) - 1) / kTileWords<Word>, tile - 1);
        for (int64_t other = cut.before(begin) / kTileWords<Word>; other <= last; ++other)
            while (load_acquire(loaded + other) == 0) __nanosleep(100);
    }
    __syncthreads();  // nothing unread lies under it
    for (int64_t j = begin + threadIdx.x; j < end; j += kCompactThreads)
        store_word(data + j, load_word(staged + (j - begin)));
}

// The cut of a tensor whose dimensions are `levels` (innermost first, in bytes), in words of `word` bytes.
inline Compaction compaction(const std::vector<Level>& levels, int word, int64_t tile_words) {
    Compaction cut{};
    int64_t words = (levels[0].keep ? levels[0].stride : levels[0].stride * levels[0].kept) / word;
    for (size_t l = !levels[0].keep; l < levels.size(); ++l) {
        cut.level[cut.levels++] = {levels[l].keep, levels[l].kept, levels[l].stride / word, words};
        words *= levels[l].kept;
    }
    std::reverse(cut.level, cut.level + cut.levels);
    cut.words = words;
    cut.tiles = ceil_div(words, tile_words);
    return cut;
}

// The largest word of which the unit that moves as a whole, and all of `addresses` (or-ed), are multiples.
inline int word_bytes(const std::vector<Level>& levels, uint64_t addresses) {
    uint64_t bits = addresses | (levels[0].keep ? levels[0].stride : levels[0].stride * levels[0].kept);
    int word = 16;
    while (bits % word) word /= 2;
    return word;
}

// Calls f(Word{}) with the type of so many bytes.
template <class F>
void with_word(int bytes, F f) {
    switch (bytes) {
        case 1:
            return f(uint8_t{});
        case 2:
            return f(uint16_t{});
        case 4:
            return f(uint32_t{});
        case 8:
            return f(uint64_t{});
        default:
            return f(uint4{});
    }
}

}  // namespace taylored::cuda
