// Three reductions over the positions of a feature map, for both layouts and four dtypes. Sums run in float32
// vector lanes over short stretches (at most kStretch additions a lane), whose totals are added in float64,
// so the error does not grow with the map; float64 input is float64 throughout. The order of additions
// depends on the shape alone.
#include "map_kernels.h"

#include <cstring>
#include <type_traits>
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace taylored {
namespace {

#if defined(__AVX512F__)
constexpr int kRegister = 64;
#elif defined(__AVX2__)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif
constexpr int64_t kStretch = 256;

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

template <class T, int W>
struct Vector {
    typedef T type __attribute__((vector_size(W * sizeof(T))));
};
template <class T, int W>
using Vec = typename Vector<T, W>::type;

template <class T>
struct Traits {  // bfloat16 and float16
    using Sum = float;
    using Bits = uint16_t;
    using Mask = int32_t;
};
template <>
struct Traits<float> {
    using Sum = float;
    using Bits = uint32_t;
    using Mask = int32_t;
};
template <>
struct Traits<double> {
    using Sum = double;
    using Bits = uint64_t;
    using Mask = int64_t;
};
template <class T, int W>
using Sums = Vec<typename Traits<T>::Sum, W>;
template <class T>
constexpr int kLanes = kRegister / sizeof(typename Traits<T>::Sum);

template <class To, class From>
inline To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

template <class V>
inline V read(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
}

// W elements, widened to the type they are summed in.
template <int W, class T>
inline Sums<T, W> load(const T* p) {
    return read<Vec<T, W>>(p);
}

template <int W>
inline Vec<float, W> load(const BFloat16* p) {
    return bit_cast<Vec<float, W>>(__builtin_convertvector(read<Vec<uint16_t, W>>(p), Vec<uint32_t, W>)
                                   << 16);
}

template <int W>
inline Vec<float, W> load(const Float16* p) {
#if defined(__AVX512F__)
    if constexpr (W == 16) return bit_cast<Vec<float, W>>(_mm512_cvtph_ps(read<__m256i>(p)));
#elif defined(__F16C__)
    if constexpr (W == 8) return bit_cast<Vec<float, W>>(_mm256_cvtph_ps(read<__m128i>(p)));
#endif
    // Exponent and mantissa moved into float32's places and scaled by 2^112 to mend the bias: right for
    // subnormals too. Only infinity and NaN need their exponent completed.
    const auto half = __builtin_convertvector(read<Vec<uint16_t, W>>(p), Vec<uint32_t, W>);
    const Vec<uint32_t, W> magnitude = (half & 0x7fff) << 13;
    const auto scaled = bit_cast<Vec<uint32_t, W>>(bit_cast<Vec<float, W>>(magnitude) * 0x1p112f);
    const auto special = (Vec<uint32_t, W>)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
    return bit_cast<Vec<float, W>>(scaled | special | (half & 0x8000) << 16);
}

// ---- What is summed. A body's step sees every element exactly once.

template <class T>
struct Contribution {
    using Type = T;
    static constexpr int sums = map_sums(MapOp::contribution);
    const T *x, *g;
    explicit Contribution(const MapBlock& b) : x((const T*)b.x), g((const T*)b.g) {}

    template <int W>
    inline void step(Sums<T, W>* sum, int64_t i) const {
        sum[0] += load<W>(x + i) * load<W>(g + i);
    }
};

template <class T>
struct ReluBackward {
    using Type = T;
    using Bits = typename Traits<T>::Bits;
    static constexpr int sums = map_sums(MapOp::relu_backward);
    const T *y, *g;
    T* out;
    explicit ReluBackward(const MapBlock& b) : y((const T*)b.x), g((const T*)b.g), out((T*)b.out) {}

    template <int W>
    inline void step(Sums<T, W>* sum, int64_t i) const {
        const Sums<T, W> activation = load<W>(y + i);
        sum[0] += activation * load<W>(g + i);
        const Vec<typename Traits<T>::Mask, W> positive = activation > 0;
        const auto masked = read<Vec<Bits, W>>(g + i) & __builtin_convertvector(positive, Vec<Bits, W>);
        std::memcpy(out + i, &masked, sizeof(masked));
    }
};

template <class T>
struct Statistics {
    using Type = T;
    static constexpr int sums = map_sums(MapOp::statistics);
    const T* x;
    explicit Statistics(const MapBlock& b) : x((const T*)b.x) {}

    template <int W>
    inline void step(Sums<T, W>* sum, int64_t i) const {
        const Sums<T, W> value = load<W>(x + i);
        sum[0] += value;
        sum[1] += value * value;
        const Vec<typename Traits<T>::Mask, W> zero = value == 0;
        sum[2] -= __builtin_convertvector(zero, Sums<T, W>);  // true is -1
    }
};

// ---- How the elements are walked

template <class V>
inline auto sum_lanes(const V& v) {
    constexpr int lanes = sizeof(v) / sizeof(v[0]);
    if constexpr (lanes == 1) {
        return v[0];
    } else {
        using Half = Vec<std::remove_cvref_t<decltype(v[0])>, lanes / 2>;
        return sum_lanes(read<Half>(&v) + read<Half>(reinterpret_cast<const char*>(&v) + sizeof(Half)));
    }
}

// One channel, positions adjacent: several vectors per sum in flight, folded into float64 after each stretch.
template <class Body>
inline void reduce_row(const Body& body, int64_t begin, int64_t length, double (&total)[Body::sums]) {
    using T = typename Body::Type;
    constexpr int K = Body::sums, U = K == 1 ? 4 : 2, W = kLanes<T>;
    for (int64_t i = begin, last = begin + length; i < last;) {
        const int64_t end = last - i > kStretch * W * U ? i + kStretch * W * U : last;
        Sums<T, W> wide[U][K] = {};
        Sums<T, 4> narrow[K] = {};
        Sums<T, 1> single[K] = {};
        for (; i + W * U <= end; i += W * U)
            for (int u = 0; u < U; ++u) body.template step<W>(wide[u], i + W * u);
        for (; i + W <= end; i += W) body.template step<W>(wide[0], i);
        for (; i + 4 <= end; i += 4) body.template step<4>(narrow, i);
        for (; i < end; ++i) body.template step<1>(single, i);
        for (int k = 0; k < K; ++k) {
            for (int u = 1; u < U; ++u) wide[0][k] += wide[u][k];
            total[k] += sum_lanes(wide[0][k]) + (sum_lanes(narrow[k]) + single[k][0]);
        }
    }
}

template <class Body>
void reduce_rows(const Body& body, const MapBlock& block, double* sums) {
    for (int64_t c = 0; c < block.channels; ++c) {
        double total[Body::sums] = {};
        reduce_row(body, c * block.channel_stride, block.positions, total);
        for (int k = 0; k < Body::sums; ++k) sums[k * block.channels + c] = total[k];
    }
}

// R rows of `width` adjacent elements, added element by element to acc[k * kMaxChannels + j]. Taking several
// rows at a time shares the accumulator's load and store.
template <int R, class Body>
inline void add_rows(const Body& body, int64_t offset, int64_t stride, int64_t width,
                     typename Traits<typename Body::Type>::Sum* acc) {
    using T = typename Body::Type;
    constexpr int K = Body::sums;
    const auto add = [&]<int W>(int64_t j) {
        Sums<T, W> sum[K];
        for (int k = 0; k < K; ++k) sum[k] = read<Sums<T, W>>(acc + k * kMaxChannels + j);
        for (int r = 0; r < R; ++r) body.template step<W>(sum, offset + r * stride + j);
        for (int k = 0; k < K; ++k) std::memcpy(acc + k * kMaxChannels + j, &sum[k], sizeof(sum[k]));
    };
    int64_t j = 0;
    for (; j + kLanes<T> <= width; j += kLanes<T>) add.template operator()<kLanes<T>>(j);
    for (; j < width; ++j) add.template operator()<1>(j);
}

// Channels adjacent. `fold` positions are taken as one row of fold * channels elements, so that few channels
// still fill the vectors.
template <class Body>
void reduce_columns(const Body& body, const MapBlock& block, int64_t fold, int64_t offset, int64_t rows,
                    double* sums) {
    constexpr int K = Body::sums;
    const int64_t stride = block.position_stride * fold, width = block.channels * fold;
    typename Traits<typename Body::Type>::Sum acc[K * kMaxChannels];
    for (int64_t row = 0; row < rows;) {
        const int64_t end = rows - row > kStretch ? row + kStretch : rows;
        for (int k = 0; k < K; ++k) std::memset(acc + k * kMaxChannels, 0, width * sizeof(acc[0]));
        for (; row + 4 <= end; row += 4) add_rows<4>(body, offset + row * stride, stride, width, acc);
        for (; row < end; ++row) add_rows<1>(body, offset + row * stride, stride, width, acc);
        for (int k = 0; k < K; ++k)
            for (int64_t f = 0; f < fold; ++f)
                for (int64_t c = 0; c < block.channels; ++c)
                    sums[k * block.channels + c] += acc[k * kMaxChannels + f * block.channels + c];
    }
}

template <class Body>
void reduce(const MapBlock& block, double* sums) {
    const Body body(block);
    if (block.position_stride == 1) return reduce_rows(body, block, sums);

    for (int64_t i = 0; i < Body::sums * block.channels; ++i) sums[i] = 0;
    const bool dense = block.position_stride == block.channels;
    const int64_t fold = dense && block.channels < 128 ? 256 / block.channels : 1;
    const int64_t rows = block.positions / fold, rest = block.positions % fold;
    reduce_columns(body, block, fold, 0, rows, sums);
    if (rest) reduce_columns(body, block, rest, rows * fold * block.position_stride, 1, sums);
}

template <template <class> class Body>
MapKernel kernel_of(MapType type) {
    switch (type) {
        case MapType::float64:
            return reduce<Body<double>>;
        case MapType::float32:
            return reduce<Body<float>>;
        case MapType::bfloat16:
            return reduce<Body<BFloat16>>;
        case MapType::float16:
            return reduce<Body<Float16>>;
    }
    return nullptr;
}

}  // namespace

template <>
MapKernel map_kernel<Isa::TAYLORED_ISA>(MapOp op, MapType type) {
    switch (op) {
        case MapOp::contribution:
            return kernel_of<Contribution>(type);
        case MapOp::relu_backward:
            return kernel_of<ReluBackward>(type);
        case MapOp::statistics:
            return kernel_of<Statistics>(type);
    }
    return nullptr;
}

}  // namespace taylored
