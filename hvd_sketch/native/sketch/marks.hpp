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
        int64_t* to = index;
        for (int64_t word = 0; word < words; word++) {
            before[word] = uint32_t(to - index);
            for (uint64_t rest = bits[word]; rest; rest &= rest - 1)
                *to++ = first + word * 64 + __builtin_ctzll(rest);
        }
        for (int64_t i = 0; i < count; i++) {
            const uint32_t word = chosen[i].place / 64;
            const uint64_t lower = bits[word] & ((uint64_t(1) << chosen[i].place % 64) - 1);
            estimate[before[word] + __builtin_popcountll(lower)] = chosen[i].estimate;
        }
    }

private:
    Buffer<uint64_t> bits_;
    Buffer<uint32_t> before_;  // how many are marked before each word
};

}  // namespace sketch
