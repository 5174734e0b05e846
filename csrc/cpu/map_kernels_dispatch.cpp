// Picks the instruction set once, when the first kernel is asked for: the best the processor runs, or less
// where ATEN_CPU_CAPABILITY (torch's own variable: default, avx2, avx512) asks for less.
#include <cstdlib>
#include <string_view>

#include "map_kernels.h"

namespace taylored {

namespace baseline {
MapKernel map_kernel(MapOp op, MapType type);
}
#if defined(__x86_64__)
namespace avx2 {
MapKernel map_kernel(MapOp op, MapType type);
}
namespace avx512 {
MapKernel map_kernel(MapOp op, MapType type);
}
#endif

static auto choose() -> MapKernel (*)(MapOp, MapType) {
#if defined(__x86_64__)
    const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string_view limit = variable ? variable : "avx512";
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl");
    if (has_avx512 && limit == "avx512") return avx512::map_kernel;
    if (has_avx2 && limit != "default") return avx2::map_kernel;  // every processor with AVX2 has F16C
#endif
    return baseline::map_kernel;
}

MapKernel map_kernel(MapOp op, MapType type) {
    static const auto chosen = choose();
    return chosen(op, type);
}

}  // namespace taylored
