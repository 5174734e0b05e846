// Which of the instruction sets that csrc/cpu/kernels is compiled for this process uses: the one place that
// chooses. No torch header here: see kernels/map_kernels.h.
#pragma once

namespace taylored {

enum class Isa { baseline, avx2, avx512 };

// The best that the processor runs, or less where ATEN_CPU_CAPABILITY (torch's own variable: default, avx2,
// avx512) asks for less.
Isa isa();

// f.operator()<isa>() of the instruction set in use.
template <class F>
auto with_isa(F f) {
#if defined(__x86_64__)  // elsewhere there is the baseline alone
    if (isa() == Isa::avx512) return f.template operator()<Isa::avx512>();
    if (isa() == Isa::avx2) return f.template operator()<Isa::avx2>();
#endif
    return f.template operator()<Isa::baseline>();
}

}  // namespace taylored
