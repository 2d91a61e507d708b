// Changing a vector on its way into the table.
#pragma once

#include <cmath>

#include "../kept.hpp"

namespace sketch {

// vector += scale * change, rounded once; then what is kept is put in its place.
struct Advance {
    float* vector;
    const float* change;
    float scale;
    Kept kept;
    int64_t width;          // of a chunk
    const int64_t* starts;  // of each chunk: the first index in it

    // Finds the starts of so many chunks, in memory for as many.
    void find(int64_t chunks, int64_t* to) {
        int64_t at = 0;
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            for (; at < kept.count && kept.index[at] < chunk * width;) at++;
            to[chunk] = at;
        }
        starts = to;
    }

    INLINE void operator()(int64_t begin, int64_t end, int64_t ahead) const {
        float* const to = vector + begin;
        const float* const from = change + begin;
        const char* const next = reinterpret_cast<const char*>(change + ahead);
        constexpr int64_t line = kLine / sizeof(float);
        int64_t i = 0;
        for (; i + line <= end - begin; i += line) {
            __builtin_prefetch(next + i * sizeof(float), 0, 2);
            for (int64_t lane = 0; lane < line; lane++) to[i + lane] = std::fma(scale, from[i + lane], to[i + lane]);
        }
        for (; i < end - begin; i++) to[i] = std::fma(scale, from[i], to[i]);
        kept.put(to, begin, end, starts[begin / width]);
    }
};

}  // namespace sketch
