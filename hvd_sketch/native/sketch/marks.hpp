// Bringing what was chosen, tile by tile, into ascending order.
#pragma once

#include "../basics.hpp"

namespace sketch {

// A coordinate, counted from the first of some blocks, and its estimate.
struct Chosen {
    uint32_t place;
    float estimate;
};

// One bit for each coordinate of some blocks.
class Marks {
public:
    // Writes the coordinates, each plus `first`, in ascending order, and their estimates likewise. All of them are distinct
    // and below `places`.
    INLINE void write(const Chosen* chosen, int64_t count, int64_t places, int64_t first, int64_t* index,
                      float* estimate) {
        const int64_t words = (places + 63) / 64;
        uint64_t* const bits = bits_.reserve(words);
        uint32_t* const before = before_.reserve(words);
        std::fill_n(bits, words, 0);
        for (int64_t i = 0; i < count; i++) bits[chosen[i].place / 64] |= uint64_t(1) << chosen[i].place % 64;
        uint32_t marked = 0;
        for (int64_t word = 0; word < words; word++) {
            before[word] = marked;
            marked += uint32_t(__builtin_popcountll(bits[word]));
        }
        for (int64_t i = 0; i < count; i++) {
            const uint32_t place = chosen[i].place;
            const uint64_t lower = bits[place / 64] & ((uint64_t(1) << place % 64) - 1);
            const uint32_t to = before[place / 64] + uint32_t(__builtin_popcountll(lower));
            index[to] = first + place;
            estimate[to] = chosen[i].estimate;
        }
    }

private:
    Buffer<uint64_t> bits_;
    Buffer<uint32_t> before_;  // how many are marked before each word
};

}  // namespace sketch
