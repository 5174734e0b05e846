// CUDA's words for g++: a kernel that includes this header runs on the CPU, one fiber per CUDA thread, under
// a scheduler that means it no good and a checker that sees every access to memory. README.md says what is
// modelled; simt.cpp is the machine; bind.h hands it NumPy arrays.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

// ---- Qualifiers. The compiler's thread sanitizer tells shared from global memory by address: `__shared__`
// variables
// ---- are the module's thread_local segment, each behind a guard that no kernel may touch.
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define SIMT_JOIN(a, b) a##b
#define SIMT_GUARD(n) [[gnu::used]] static thread_local char SIMT_JOIN(simt_guard_, n)[256]
#define __shared__           \
    SIMT_GUARD(__COUNTER__); \
    static thread_local __attribute__((aligned(16)))
#define DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(simt::dynamic_shared())

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
    unsigned x, y, z;
};

extern uint3 threadIdx, blockIdx;  // of the fiber that runs now
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---- The machine.
namespace simt {

struct Options {
    std::string schedule = "random";  // ascending, reverse, random, ahead, behind
    std::uint64_t seed = 0;
    unsigned resident_blocks = 4;
    double timeout = 20;  // seconds of processor time for one launch
};

struct Fault {
    std::string kind, kernel, address, message;  // address: buffer name + offset in bytes
    uint3 block, thread;
    std::uintptr_t pc;      // of the instruction, within the module's file
    std::size_t count = 1;  // how often the same instruction did it
};

struct Traffic {
    std::uint64_t requests = 0, bytes = 0, sectors = 0;  // one request: one instruction of one warp
};
struct Counts {
    Traffic loads, stores, atomics;                         // global memory
    std::uint64_t shared_requests = 0, bank_conflicts = 0;  // conflicts: passes beyond the first
};

struct SharedVariable {
    std::string name;
    std::size_t offset, bytes;  // within the module's thread_local segment
};
void set_shared_variables(
    std::vector<SharedVariable> variables);  // from the symbol table, once the module is loaded

struct Memory;

// Global memory, the launches on it, and what they were seen to do.
class Device {
  public:
    explicit Device(Options options);
    ~Device();
    // A buffer, far from any other; `misalign` bytes past a 256-byte boundary. `written`: the host has filled
    // it.
    void* allocate(const std::string& name, std::size_t bytes, std::size_t element, bool written,
                   std::size_t misalign = 0);
    // What the host does when it copies a buffer back: reading what nobody wrote is a fault.
    void host_reads(const void* buffer);

    template <class... P, class... A>
    void launch(const std::string& name, dim3 grid, dim3 block, std::size_t dynamic_bytes,
                void (*kernel)(P...), A... args) {
        struct Call {
            void (*kernel)(P...);
            std::tuple<P...> args;
        } call{kernel, {static_cast<P>(args)...}};
        auto invoke = [](void* c) { std::apply(static_cast<Call*>(c)->kernel, static_cast<Call*>(c)->args); };
        run(name, grid, block, dynamic_bytes, invoke, &call, sizeof call);
    }

    Options options;
    std::vector<Fault> faults;
    std::map<std::string, Counts> counts;  // by kernel
    std::uint64_t trace = 0;               // a hash of the order in which fibers ran

  private:
    void run(const std::string& name, dim3 grid, dim3 block, std::size_t dynamic_bytes, void (*invoke)(void*),
             const void* call, std::size_t call_bytes);
    std::unique_ptr<Memory> memory_;
};

enum Access { READ = 1, WRITE = 2, ATOMIC = 4, ACQUIRE = 8, RELEASE = 16 };
enum Collective { SYNC, SHUFFLE, BALLOT, REDUCE };

void* dynamic_shared();
void access(const void* p, std::size_t bytes, int how, void* pc);  // told before it is made
void changed();                                                    // what others may wait for
void fence(bool device);
void barrier(int line);
void relax();
unsigned lane();
unsigned active_lanes();
// All lanes of `mask` meet; each brings a word and sees everyone's. Returns the lanes that took part.
unsigned meet(Collective what, unsigned mask, std::uint64_t word, std::uint64_t (&words)[32]);
void undefined_lane(int source);

// An atomic read-modify-write, relaxed as CUDA's are.
template <class T, class F>
__attribute__((noinline, no_sanitize("thread"))) T read_modify_write(T* p, F next) {
    access(p, sizeof(T), READ | WRITE | ATOMIC, __builtin_return_address(0));
    T old = *p;
    *p = next(old);
    if (std::memcmp(&old, p, sizeof(T)) != 0) changed();
    return old;
}

template <class T>
std::uint64_t to_word(T value) {
    static_assert(sizeof(T) <= 8);
    std::uint64_t word = 0;
    std::memcpy(&word, &value, sizeof(T));
    return word;
}
template <class T>
T from_word(std::uint64_t word) {
    T value;
    std::memcpy(&value, &word, sizeof(T));
    return value;
}

template <class T>
T shuffle(unsigned mask, T value, int source, bool in_range) {
    std::uint64_t words[32];
    unsigned present = meet(SHUFFLE, mask, to_word(value), words);
    if (!in_range) return value;
    if (!(present >> source & 1)) undefined_lane(source);
    return from_word<T>(words[source]);
}

}  // namespace simt

// ---- Synchronisation.
inline void __syncthreads(int line = __builtin_LINE()) { simt::barrier(line); }
inline void __threadfence() { simt::fence(true); }
inline void __threadfence_block() { simt::fence(false); }
inline void __nanosleep(unsigned) { simt::relax(); }
inline void __syncwarp(unsigned mask = ~0u) {
    std::uint64_t words[32];
    simt::meet(simt::SYNC, mask, 0, words);
}

template <class T>
__attribute__((noinline, no_sanitize("thread"))) T load_acquire(const T* p) {
    simt::access(p, sizeof(T), simt::READ | simt::ATOMIC | simt::ACQUIRE, __builtin_return_address(0));
    return *p;
}
template <class T>
__attribute__((noinline, no_sanitize("thread"))) void store_release(T* p, std::type_identity_t<T> value) {
    simt::access(p, sizeof(T), simt::WRITE | simt::ATOMIC | simt::RELEASE, __builtin_return_address(0));
    *p = value;
}

template <class T>
using SameType = std::type_identity_t<T>;  // deduce from the pointer alone, as CUDA's overloads do

template <class T>
__forceinline__ T atomicAdd(T* p, SameType<T> v) {
    return simt::read_modify_write(p, [v](T old) { return T(old + v); });
}
template <class T>
__forceinline__ T atomicMax(T* p, SameType<T> v) {
    return simt::read_modify_write(p, [v](T old) { return old < v ? v : old; });
}
template <class T>
__forceinline__ T atomicMin(T* p, SameType<T> v) {
    return simt::read_modify_write(p, [v](T old) { return v < old ? v : old; });
}
template <class T>
__forceinline__ T atomicOr(T* p, SameType<T> v) {
    return simt::read_modify_write(p, [v](T old) { return T(old | v); });
}
template <class T>
__forceinline__ T atomicExch(T* p, SameType<T> v) {
    return simt::read_modify_write(p, [v](T) { return v; });
}
template <class T>
__forceinline__ T atomicCAS(T* p, SameType<T> expected, SameType<T> v) {
    return simt::read_modify_write(p, [expected, v](T old) { return old == expected ? v : old; });
}

// ---- Warp-wide exchange.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    return simt::shuffle(mask, value, int(simt::lane() & ~(width - 1)) + (source & (width - 1)), true);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    int source = int(simt::lane()) ^ bits, end = int(simt::lane() & ~(width - 1)) + width;
    return simt::shuffle(mask, value, source, source < end);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    int source = int(simt::lane() + delta), end = int(simt::lane() & ~(width - 1)) + width;
    return simt::shuffle(mask, value, source, source < end);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    int source = int(simt::lane()) - int(delta), begin = int(simt::lane() & ~(width - 1));
    return simt::shuffle(mask, value, source, source >= begin);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    std::uint64_t words[32];
    unsigned votes = 0, present = simt::meet(simt::BALLOT, mask, predicate != 0, words);
    for (int i = 0; i < 32; ++i) votes |= unsigned(present >> i & words[i] & 1) << i;
    return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
inline unsigned __activemask() { return simt::active_lanes(); }
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
    std::uint64_t words[32];
    unsigned present = simt::meet(simt::REDUCE, mask, simt::to_word(value), words);
    T sum = 0;
    for (int i = 0; i < 32; ++i)
        if (present >> i & 1) sum += simt::from_word<T>(words[i]);
    return sum;
}

// ---- Vector types and wide accesses.
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) double2 {
    double x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

// One access each, whatever the optimiser makes of the struct.
uint4 load16(const void* p);
void store16(void* p, uint4 value);
template <class T>
__forceinline__ T __ldg(const T* p) {
    return *p;
}

// ---- Arithmetic.
using std::max;
using std::min;
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }

struct __half {
    unsigned short bits;
};
struct __nv_bfloat16 {
    unsigned short bits;
};
inline float __half2float(__half h) { return float(std::bit_cast<_Float16>(h.bits)); }
inline __half __float2half(float f) { return {std::bit_cast<unsigned short>(_Float16(f))}; }
inline float __bfloat162float(__nv_bfloat16 h) { return std::bit_cast<float>(unsigned(h.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float f) {  // to the nearest, ties to even; NaN stays NaN
    unsigned u = std::bit_cast<unsigned>(f);
    if (f != f) return {0x7fff};
    return {static_cast<unsigned short>((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
