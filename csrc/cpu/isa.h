// Which of the instruction sets that the inner loops are compiled for this process uses. No torch header
// here: see map_kernels.h.
#pragma once

namespace taylored {

enum class Isa { baseline, avx2, avx512 };

// The best that the processor runs, or less where ATEN_CPU_CAPABILITY (torch's own variable: default, avx2,
// avx512) asks for less.
Isa isa();

}  // namespace taylored
