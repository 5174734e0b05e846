// What accumulate_ makes of a batch's contributions, as its schema counts them.
#pragma once
#include <cstdint>

namespace taylored {

enum class Reduction : int64_t { abs = 0, batch = 1, square = 2 };

}  // namespace taylored
