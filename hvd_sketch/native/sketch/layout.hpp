// Where a coordinate goes: geometry.py in C++, word for word. See there for the definition.
#pragma once

#include "../basics.hpp"

namespace sketch {

constexpr int64_t kTileWidth = 2048;
constexpr int64_t kMaxWidth = 2 * kTileWidth;  // of a tile: cols / (cols / kTileWidth) stays below
constexpr int kLanes = 16;  // of 32 bits, in the widest register
constexpr uint64_t kSignStream = 1 << 20, kRotationStream = 1 << 21;

// N lanes of 32 bits: one register of the instruction set.
template <int N>
struct Lanes {
    typedef float Float __attribute__((vector_size(4 * N)));
    typedef uint32_t Word __attribute__((vector_size(4 * N)));
    typedef uint64_t Bits __attribute__((vector_size(4 * N)));
};

template <int N>
INLINE typename Lanes<N>::Float load(const float* from) {
    typename Lanes<N>::Float value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class Float>
INLINE void store(float* to, const Float& value) {
    std::memcpy(to, &value, sizeof value);
}

// 0, 1, 2, …
template <int N>
INLINE typename Lanes<N>::Word lane_numbers() {
    typename Lanes<N>::Word value = {};
    for (int lane = 0; lane < N; lane++) value[lane] = uint32_t(lane);
    return value;
}

INLINE uint64_t mix64(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

template <class Word>
INLINE Word mix32(const Word& key) {
    Word x = (key ^ (key >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

// Bit `bit` of a word, moved to where a float has its sign.
template <class Word>
INLINE Word sign(const Word& word, int bit) {
    return (word << (31 - bit)) & kSignBit;
}

struct Layout {
    int64_t rows, cols, tiles, width;
    uint64_t seed;

    Layout(int64_t rows, int64_t cols, uint64_t seed)
        : rows(rows), cols(cols), tiles(std::max<int64_t>(1, cols / kTileWidth)), width(cols / tiles), seed(seed) {}

    INLINE uint64_t draw(uint64_t stream, int64_t index) const {
        return mix64(mix64(seed + stream * 0xD1B54A32D192ED03u) ^ uint64_t(index));
    }
    static INLINE int64_t below(uint64_t bits, int64_t bound) {
        return int64_t(((bits >> 32) * uint64_t(bound)) >> 32);
    }

    INLINE int64_t rotation(int64_t block) const { return below(draw(kRotationStream, block), tiles); }

    INLINE int64_t tile_of(int64_t chunk) const {
        int64_t tile = chunk % tiles + rotation(chunk / tiles);
        return tile < tiles ? tile : tile - tiles;
    }
    INLINE int64_t chunk_of(int64_t tile, int64_t block) const {
        int64_t slot = tile - rotation(block);
        return block * tiles + (slot < 0 ? slot + tiles : slot);
    }
};

// The draws of one chunk: where its coordinate 0 falls in each row of the tile, and the key of each 32 rows' signs.
struct Draws {
    Buffer<int64_t> offset;
    Buffer<uint32_t> key;

    INLINE void fill(const Layout& layout, int64_t chunk) {
        int64_t* offsets = offset.reserve(layout.rows);
        uint32_t* keys = key.reserve(layout.rows / 32 + 1);
        for (int64_t row = 0; row < layout.rows; row++)
            offsets[row] = Layout::below(layout.draw(row, chunk), layout.width);
        for (int64_t group = 0; group * 32 < layout.rows; group++)
            keys[group] = uint32_t(layout.draw(kSignStream + group, chunk));
    }
};

}  // namespace sketch
