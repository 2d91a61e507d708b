// A vector of which only pieces are there.
#pragma once

#include "stream.hpp"

namespace sketch {

// Entries start … start + count - 1 of a vector.
struct Piece {
    float* data;
    int64_t start, count;
};

inline int64_t whole(const Piece* pieces, int64_t number) {
    int64_t count = 0;
    for (const Piece* piece = pieces; piece < pieces + number; piece++) count += piece->count;
    return count;
}

}  // namespace sketch
