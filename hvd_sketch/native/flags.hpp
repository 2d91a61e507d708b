// Bytes that are 0 or 1, as bits.
#pragma once

#include "basics.hpp"

namespace sketch {

// Eight flags to a byte, the first one lowest.
INLINE void pack_flags(const uint64_t* eights, uint8_t* to, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = uint8_t(eights[i] * 0x0102040810204080u >> 56);
}

}  // namespace sketch
