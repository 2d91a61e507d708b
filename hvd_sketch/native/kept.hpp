// Entries of a vector that are given a value.
#pragma once

#include "basics.hpp"

namespace sketch {

// Some by index, ascending, and then a comb: every stride-th from an offset on, none if that is 0. Where both meet, the
// comb's value counts.
struct Kept {
    const int64_t* index;
    int64_t count, offset, stride;
    const float* values;  // by index, then of the comb

    // Sets those of the entries begin … end - 1, which lie at `to`; `at` is the first index that is not before them.
    INLINE void put(float* to, int64_t begin, int64_t end, int64_t at) const {
        for (; at < count && index[at] < end; at++) {
            __builtin_prefetch(to + (index[std::min(at + kAhead, count - 1)] - begin), 1);
            to[index[at] - begin] = values[at];
        }
        if (stride == 0) return;
        int64_t tooth = std::max<int64_t>(0, (begin - offset + stride - 1) / stride);
        for (int64_t entry = offset + tooth * stride; entry < end; entry += stride)
            to[entry - begin] = values[count + tooth++];
    }
};

}  // namespace sketch
