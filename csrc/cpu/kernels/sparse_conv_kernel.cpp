// A 3x3 convolution whose work is in proportion to the input elements that are not zero, of which ReLU leaves
// few (after Gong et al., SparseTrain, arXiv:1911.10175). A broadcast element of the input meets a vector of
// weights for many output channels at three neighbouring outputs, all held in registers; the channels that
// are not zero are the set bits of a comparison's mask. So a skipped element costs nothing, and one that is
// not costs as many multiply-adds as in a dense kernel. The weights of 16 input channels stay in the level 1
// cache, the sums of many positions in level 2.
#include "sparse_conv_kernel.h"

#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace taylored {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 8;  // 3 * 8 of 32 registers hold sums
#elif defined(__AVX2__)
constexpr int kLanes = 8, kVectors = 4;  // 3 * 4 of 16
#else
constexpr int kLanes = 4, kVectors = 4;
#endif
constexpr int kOutputs = kLanes * kVectors;
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));

inline Vec& at(float* p) { return *reinterpret_cast<Vec*>(p); }
inline const Vec& at(const float* p) { return *reinterpret_cast<const Vec*>(p); }

// Bit c: whether x[c] is not zero.
inline uint32_t nonzeros(const float* x, int count) {
#if defined(__AVX512F__)
    const __mmask16 all = (1u << count) - 1;
    return _mm512_mask_cmp_ps_mask(all, _mm512_maskz_loadu_ps(all, x), _mm512_setzero_ps(), _CMP_NEQ_UQ);
#else
    uint32_t bits = 0;
    int c = 0;
#if defined(__AVX2__)
    for (; c + 8 <= count; c += 8)
        bits |= _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x + c), _mm256_setzero_ps(), _CMP_NEQ_UQ))
                << c;
#endif
    for (; c < count; ++c) bits |= uint32_t(x[c] != 0) << c;
    return bits;
#endif
}

// The sums of the outputs to the left of a position, at it, and to its right.
typedef Vec Sums[3][kVectors];

// What the input at one position gives to them. weight: [16, 3, kOutputs]; the kernel's left column reaches
// the output on the right.
template <bool kLeft, bool kRight>
inline __attribute__((always_inline)) void give(const float* x, int count, const float* weight, Sums& sums) {
    for (uint32_t bits = nonzeros(x, count); bits; bits &= bits - 1) {
        const int c = __builtin_ctz(bits);
        const Vec value = x[c] - Vec{};
        const float* w = weight + c * 3 * kOutputs;
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            if (kRight) sums[2][v] += value * at(w + v * kLanes);
            sums[1][v] += value * at(w + kOutputs + v * kLanes);
            if (kLeft) sums[0][v] += value * at(w + 2 * kOutputs + v * kLanes);
        }
    }
}

inline __attribute__((always_inline)) void load(Vec (&sums)[kVectors], const float* p) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[v] = at(p + v * kLanes);
}

inline __attribute__((always_inline)) void store(const Vec (&sums)[kVectors], float* p) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) at(p + v * kLanes) = sums[v];
}

inline __attribute__((always_inline)) void shift(Sums& sums) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
        sums[0][v] = sums[1][v];
        sums[1][v] = sums[2][v];
    }
}

// One row of up to 16 channels of the input, added to one row of sums [width, kOutputs].
void add_row(const float* x, int64_t stride, int64_t width, int count, const float* weight, float* total) {
    Sums sums;
    load(sums[1], total);
    if (width == 1) {
        give<false, false>(x, count, weight, sums);
        return store(sums[1], total);
    }
    load(sums[2], total + kOutputs);
    give<false, true>(x, count, weight, sums);
    for (int64_t i = 1; i < width - 1; ++i) {
        shift(sums);
        load(sums[2], total + (i + 1) * kOutputs);
        give<true, true>(x + i * stride, count, weight, sums);
        store(sums[0], total + (i - 1) * kOutputs);
    }
    shift(sums);
    give<true, false>(x + (width - 1) * stride, count, weight, sums);
    store(sums[0], total + (width - 2) * kOutputs);
    store(sums[1], total + (width - 1) * kOutputs);
}

void run(const SparseConv& conv, int64_t first_row, int64_t rows, int64_t first_output, float* scratch) {
    const int64_t rest = conv.outputs - first_output, outputs = rest < kOutputs ? rest : kOutputs;
    const int64_t positions = rows * conv.width;
    float* const weight = scratch;  // [16, 3, kOutputs], zero where there are fewer outputs
    float* const total = scratch + 3 * kSparseChannels * kOutputs;
    std::memset(scratch, 0, (3 * kSparseChannels + positions) * kOutputs * sizeof(float));
    if (conv.bias)
        for (int64_t p = 0; p < positions; ++p)
            std::memcpy(total + p * kOutputs, conv.bias + first_output, outputs * sizeof(float));

    for (int64_t c = 0; c < conv.channels; c += kSparseChannels) {
        const int count = conv.channels - c < kSparseChannels ? conv.channels - c : kSparseChannels;
        for (int64_t dy = -1; dy <= 1; ++dy) {
            const float* source =
                conv.weight + ((dy + 1) * conv.channels + c) * 3 * conv.outputs + first_output;
            for (int64_t i = 0; i < 3 * count; ++i)
                std::memcpy(weight + i * kOutputs, source + i * conv.outputs, outputs * sizeof(float));
            for (int64_t row = first_row; row < first_row + rows; ++row) {
                const int64_t y = row % conv.height + dy;
                if (y >= 0 && y < conv.height)
                    add_row(conv.x + (row + dy) * conv.width * conv.channels + c, conv.channels, conv.width,
                            count, weight, total + (row - first_row) * conv.width * kOutputs);
            }
        }
    }
    for (int64_t p = 0; p < positions; ++p)
        std::memcpy(conv.out + (first_row * conv.width + p) * conv.outputs + first_output,
                    total + p * kOutputs, outputs * sizeof(float));
}

}  // namespace

template <>
SparseConvKernel sparse_conv_kernel<Isa::TAYLORED_ISA>() {
    return {kOutputs, run};
}

}  // namespace taylored
