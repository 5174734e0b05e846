// map_kernel() of the instruction set in use.
#include "isa.h"
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

MapKernel map_kernel(MapOp op, MapType type) {
#if defined(__x86_64__)
    if (isa() == Isa::avx512) return avx512::map_kernel(op, type);
    if (isa() == Isa::avx2) return avx2::map_kernel(op, type);
#endif
    return baseline::map_kernel(op, type);
}

}  // namespace taylored
