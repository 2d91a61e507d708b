// Writing memory that is not read again soon.
#pragma once

#include "basics.hpp"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace sketch {

constexpr int64_t kStreamedAtOnce = 4;  // elements

// Whether a part of something large is better written with `stream`. From some ten megabytes on, what is written has left
// the caches before it is read, and a processor that does not fetch it first, as it does for an ordinary store, takes
// less time. Of less, and of a few lines of a cache, it takes more.
INLINE bool streams(int64_t part, int64_t whole) {
#if defined(__SSE2__)
    return part >= 1 << 12 && whole >= 1 << 23;
#else
    return false;
#endif
}

// Four values to an address that is a multiple of 16.
INLINE void stream(float* to, const float* values) {
#if defined(__SSE2__)
    _mm_stream_ps(to, _mm_loadu_ps(values));
#else
    std::memcpy(to, values, kStreamedAtOnce * sizeof(float));
#endif
}

// After the last one, before anybody else may look.
INLINE void end_stream() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// How many elements lie before an address that `stream` can write to.
INLINE int64_t unstreamed(const float* to, int64_t count) {
    const int64_t off = int64_t(reinterpret_cast<uintptr_t>(to) / sizeof(float)) % kStreamedAtOnce;
    return std::min(count, (kStreamedAtOnce - off) % kStreamedAtOnce);
}

// Sets a part of something of `whole` elements to zero.
INLINE void clear(float* to, int64_t count, int64_t whole) {
    if (!streams(count, whole)) {
        std::fill_n(to, count, 0.0f);
        return;
    }
    const float zeros[kStreamedAtOnce] = {};
    int64_t i = unstreamed(to, count);
    std::fill_n(to, i, 0.0f);
    for (; i + kStreamedAtOnce <= count; i += kStreamedAtOnce) stream(to + i, zeros);
    std::fill_n(to + i, count - i, 0.0f);
    end_stream();
}

}  // namespace sketch
