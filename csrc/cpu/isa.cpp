// See isa.h.
#include "isa.h"

#include <cstdlib>
#include <string_view>

namespace taylored {

static Isa choose() {
#if defined(__x86_64__)
    const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string_view limit = variable ? variable : "avx512";
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl");
    if (has_avx512 && limit == "avx512") return Isa::avx512;
    if (has_avx2 && limit != "default") return Isa::avx2;  // every processor with AVX2 has F16C
#endif
    return Isa::baseline;
}

Isa isa() {
    static const Isa chosen = choose();
    return chosen;
}

}  // namespace taylored
