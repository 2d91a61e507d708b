// Where a coordinate goes: geometry.py in C++, word for word. See there for the definition.
#pragma once

#include "../basics.hpp"

namespace sketch {

constexpr int64_t kTileWidth = 2048;
constexpr int64_t kMaxWidth = 2 * kTileWidth;  // of a tile: cols / (cols / kTileWidth) stays below
constexpr int64_t kChunk = 256, kPiece = 64;
constexpr int kTogether = 16;  // chunks drawn at once: of one tile, in as many blocks one after the other
constexpr int64_t kBatch = kTogether * kChunk;
constexpr int kLanes = 16;  // of 32 bits, in the widest register
constexpr int64_t kSigns = 16;  // rows that take their signs from one word
constexpr uint64_t kRotation = 1 << 21;

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

template <int N>
INLINE typename Lanes<N>::Word load_words(const uint32_t* from) {
    typename Lanes<N>::Word value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class Element, class Vector>
INLINE void store(Element* to, const Vector& value) {
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

// Shifted to the left by so many bits, at no cost.
template <class Word>
INLINE Word mix32(const Word& key, int shift) {
    const Word x = (key ^ (key >> 16)) * 0x7FEB352Du;
    return (x ^ (x >> 15)) * (0x846CA68Bu << shift);
}

// One of the signs that a word begins with, as a float has it.
template <class Word, class Number>
INLINE Word sign(const Word& word, Number number) {
    return (word << number) & kSignBit;
}

// Of a table with kTogether entries, those with the given numbers.
template <int N>
INLINE typename Lanes<N>::Word look_up(const uint32_t* table, const typename Lanes<N>::Word& number) {
    using Word = typename Lanes<N>::Word;
    static_assert(kTogether == 16);
    if constexpr (N == 16) return __builtin_shuffle(load_words<N>(table), number);
    if constexpr (N == 8) return __builtin_shuffle(load_words<N>(table), load_words<N>(table + 8), number);
    Word found;
    for (int lane = 0; lane < N; lane++) found[lane] = table[number[lane]];
    return found;
}

struct Layout {
    int64_t rows, cols, tiles, width, length, block;
    int64_t apart;  // from one piece of a chunk to the next
    int64_t span;   // from a chunk's first coordinate to behind its last
    int64_t keys;   // of signs, one for each kSigns rows
    uint64_t seed, turn;
    uint32_t hashes;  // byte p: what the words of piece p are hashed from begins with, over kPiece
    uint32_t signs;   // byte p: how many signs of other pieces stand before those of piece p in its words

    Layout(int64_t rows, int64_t cols, uint64_t seed)
        : rows(rows),
          cols(cols),
          tiles(std::max<int64_t>(1, cols / kTileWidth)),
          width(cols / tiles),
          length(std::min(width, kChunk)),
          block(tiles * length),
          apart(tiles * kPiece),
          span(at(0, length - 1) + 1),
          keys((rows + kSigns - 1) / kSigns),
          seed(seed),
          turn(stream(kRotation)),
          hashes(0),
          signs(0) {
        const int64_t together = std::max<int64_t>(1, kSigns / rows);
        for (int64_t piece = 0; piece < kChunk / kPiece; piece++) {
            hashes |= uint32_t(piece / together) << 8 * piece;
            signs |= uint32_t(piece % together * rows % kSigns) << 8 * piece;
        }
    }

    // What the word of a position is hashed from, and how many signs stand before its own.
    template <class Word>
    INLINE Word hashed(const Word& key, const Word& position) const {
        constexpr uint32_t size = kPiece;
        return key + ((Word{} + hashes) >> position / size * 8 & 255) * size + position % size;
    }
    template <class Word>
    INLINE Word before(const Word& position) const {
        return (Word{} + signs) >> position / uint32_t(kPiece) * 8 & 255;
    }

    INLINE int64_t blocks(int64_t dim) const { return (dim + block - 1) / block; }

    // The coordinate at a position of the chunk that begins with coordinate `begin`.
    INLINE int64_t at(int64_t begin, int64_t position) const {
        return begin + position / kPiece * apart + position % kPiece;
    }
    // How many of its positions there are below a coordinate.
    INLINE int64_t size(int64_t begin, int64_t coordinate) const {
        const int64_t there = coordinate - begin;
        if (there >= span) return length;
        return there <= 0 ? 0 : there / apart * kPiece + std::min(there % apart, kPiece);
    }

    // What the words of two numbers in a row are hashed from.
    INLINE uint64_t stream(uint64_t number) const { return mix64(seed + number / 2 * 0xD1B54A32D192ED03u); }

    static INLINE uint32_t below(uint32_t bits, int64_t bound) { return uint32_t(bits * uint64_t(bound) >> 32); }

    INLINE int64_t rotation(int64_t block) const {
        return below(uint32_t(mix64(turn ^ uint64_t(block)) >> 32), tiles);
    }
    INLINE int64_t tile(int64_t block, int64_t slot) const {
        const int64_t turned = slot + rotation(block);
        return turned < tiles ? turned : turned - tiles;
    }
};

// Some chunks, of one tile in as many blocks one after the other: their numbers, and their first coordinates.
struct Chunks {
    int64_t number[kTogether], begin[kTogether];

    INLINE void find(const Layout& layout, int64_t tile, int64_t block) {
        for (int i = 0; i < kTogether; i++) {
            const int64_t turned = tile - layout.rotation(block + i);
            set(layout, i, block + i, turned < 0 ? turned + layout.tiles : turned);
        }
    }
    INLINE void set(const Layout& layout, int i, int64_t block, int64_t slot) {
        number[i] = block * layout.tiles + slot;
        begin[i] = block * layout.block + slot * kPiece;
    }
};

// What is drawn for them: where position 0 falls in each row of the tile, and the keys of the signs.
class Draws {
public:
    Chunks chunks;

    // Before anything is drawn for a sketch.
    INLINE void start(const Layout& layout) {
        const int64_t words = (layout.keys + layout.rows + 1) / 2;
        uint64_t* const to = streams_.reserve(words);
        for (int64_t i = 0; i < words; i++) to[i] = layout.stream(2 * i);
        offsets_ = drawn_.reserve(2 * words * kTogether) + layout.keys * kTogether;
    }

    INLINE void fill(const Layout& layout, int count) {
        if (count == kTogether)
            draw(layout, kTogether);
        else
            draw(layout, count);
    }

    // Of each chunk.
    INLINE const uint32_t* keys(int64_t row) const { return drawn_.data() + row / kSigns * kTogether; }
    INLINE const uint32_t* offsets(int64_t row) const { return offsets_ + row * kTogether; }

private:
    INLINE void draw(const Layout& layout, int count) {
        const int64_t words = (layout.keys + layout.rows + 1) / 2;
        uint32_t* to = drawn_.data();
        for (int64_t i = 0; i < words; i++, to += 2 * kTogether) {
            const uint64_t start = streams_.data()[i];
            for (int c = 0; c < count; c++) {
                const uint64_t word = mix64(start ^ uint64_t(chunks.number[c]));
                to[c] = uint32_t(word >> 32);
                to[kTogether + c] = uint32_t(word);
            }
        }
        for (int64_t row = 0; row < layout.rows; row++)
            for (int c = 0; c < count; c++) {
                uint32_t& offset = offsets_[row * kTogether + c];
                offset = Layout::below(offset, layout.width);
            }
    }

    Buffer<uint64_t> streams_;
    Buffer<uint32_t> drawn_;
    uint32_t* offsets_ = nullptr;
};

}  // namespace sketch
