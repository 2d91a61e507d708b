// Sketching: coordinates of a vector into the table.
#pragma once

#include "layout.hpp"
#include "../split.hpp"

namespace sketch {

enum Dtype : int64_t { kFloat32, kFloat16, kBfloat16 };

// `count` elements in memory that are coordinates `start, start + 1, …` of the sketched vector.
struct Segment {
    const char* data;
    int64_t dtype, start, count;

    INLINE int64_t element() const { return dtype == kFloat32 ? 4 : 2; }
    INLINE const char* at(int64_t coordinate) const { return data + (coordinate - start) * element(); }
};

INLINE float from_float16(uint16_t half) {
    // The product moves the exponent's bias, for normal and subnormal numbers alike.
    const float magnitude = bit_cast<float>(uint32_t(half & 0x7FFF) << 13) * 0x1p112f;
    const uint32_t infinite = (half & 0x7C00) == 0x7C00 ? 0x7F800000u : 0;
    return bit_cast<float>(bit_cast<uint32_t>(magnitude) | infinite | uint32_t(half & 0x8000) << 16);
}

INLINE float from_bfloat16(uint16_t half) { return bit_cast<float>(uint32_t(half) << 16); }

INLINE void convert(const Segment& segment, int64_t first, int64_t count, float scale, float* to) {
    const char* from = segment.at(first);
    if (segment.dtype == kFloat32) {
        const float* values = reinterpret_cast<const float*>(from);
        for (int64_t i = 0; i < count; i++) to[i] = values[i] * scale;
        return;
    }
    const uint16_t* values = reinterpret_cast<const uint16_t*>(from);
    if (segment.dtype == kFloat16)
        for (int64_t i = 0; i < count; i++) to[i] = from_float16(values[i]) * scale;
    else
        for (int64_t i = 0; i < count; i++) to[i] = from_bfloat16(values[i]) * scale;
}

// A window of it has its first lanes set.
constexpr uint32_t kUsed[2 * kLanes] = {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u};

// R rows of a tile, as one chunk sees them.
template <int N, int R>
struct Rows {
    using Float = typename Lanes<N>::Float;
    using Word = typename Lanes<N>::Word;

    float* row[R];
    int64_t offset[R], width;
    uint32_t key;
    int bit;  // of the sign word, for row[0]

    INLINE int64_t bucket(int row, int64_t position) const {
        const int64_t at = position + offset[row];
        return at < width ? at : at - width;
    }

    // Whole registers in which no row wraps around; `ahead` is what to fetch meanwhile.
    INLINE void run(const float* values, int64_t first, int64_t last, const char* ahead, int64_t element) const {
        float* to[R];
        for (int j = 0; j < R; j++) to[j] = row[j] + bucket(j, first) - first;
        Word position = lane_numbers<N>() + (key + uint32_t(first));
        for (int64_t q = first; q < last; q += N, position += uint32_t(N)) {
            __builtin_prefetch(ahead + q * element, 0, 2);
            const Word word = mix32(position) >> bit;
            const Word value = (Word)load<N>(values + q);
            for (int j = 0; j < R; j++)
                store(to[j] + q, load<N>(to[j] + q) + (Float)(value ^ sign(word, j)));
        }
    }

    // One register in which rows may wrap around, or that is not full. The idle lanes add -0.0, which changes nothing.
    INLINE void edge(const float* values, int64_t q, int64_t count) const {
        const Word mask = (Word)load<N>(reinterpret_cast<const float*>(kUsed + kLanes - count));
        const Word word = mix32(lane_numbers<N>() + (key + uint32_t(q))) >> bit;
        const Float nothing = (Float)(Word{} + kSignBit);
        float full[N] = {};
        std::memcpy(full, values + q, count * sizeof(float));
        const Word value = (Word)load<N>(full);
        for (int j = 0; j < R; j++) {
            const Float signed_value = (Float)(((value ^ sign(word, j)) & mask) | (~mask & kSignBit));
            const int64_t at = bucket(j, q), before = width - at;
            if (before >= N) {
                store(row[j] + at, load<N>(row[j] + at) + signed_value);
                continue;
            }
            float padded[3 * N];
            store(padded, nothing);
            store(padded + N, signed_value);
            store(padded + 2 * N, nothing);
            float* end = row[j] + width - N;
            store(end, load<N>(end) + load<N>(padded + before));
            store(row[j], load<N>(row[j]) + load<N>(padded + N + before));
        }
    }

    // Positions first … last - 1 of the chunk; values[q] belongs to position q.
    INLINE void add(const float* values, int64_t first, int64_t last, const char* ahead, int64_t element) const {
        int64_t q = first;
        while (q + N <= last) {
            int64_t wrap = last;
            for (int j = 0; j < R; j++) wrap = std::min(wrap, q + width - bucket(j, q));
            const int64_t stop = q + (wrap - q) / N * N;
            run(values, q, stop, ahead, element);
            q = stop;
            if (q + N <= last) {
                edge(values, q, N);
                q += N;
            }
        }
        if (q < last) edge(values, q, last - q);
    }

    // A tile narrower than a register.
    INLINE void add_narrow(const float* values, int64_t first, int64_t last) const {
        for (int64_t q = first; q < last; q++) {
            const uint32_t word = mix32(key + uint32_t(q)) >> bit;
            for (int j = 0; j < R; j++) {
                row[j][bucket(j, q)] += bit_cast<float>(bit_cast<uint32_t>(values[q]) ^ sign(word, j));
            }
        }
    }
};

// What is done with a chunk, coordinates begin … end - 1, before it is added; `ahead` begins the chunk after it.
struct Nothing {
    INLINE void operator()(int64_t begin, int64_t end, int64_t ahead) const {}
};

struct Add {
    Layout layout;
    float* table;
    const Segment* segments;  // ascending, without overlap
    int64_t count;
    float scale;
    Split& tiles;

    int64_t start() const { return segments[0].start; }
    int64_t stop() const { return segments[count - 1].start + segments[count - 1].count; }

    template <int N, int R>
    INLINE void rows(const Draws& draws, int64_t tile, int64_t first_row, const float* values, int64_t first,
                     int64_t last, const char* ahead, int64_t element) const {
        Rows<N, R> some;
        for (int j = 0; j < R; j++) {
            some.row[j] = table + (first_row + j) * layout.cols + tile * layout.width;
            some.offset[j] = draws.offset.data()[first_row + j];
        }
        some.width = layout.width;
        some.key = draws.key.data()[first_row / 32];
        some.bit = int(first_row % 32);
        if (layout.width >= N)
            some.add(values, first, last, ahead, element);
        else
            some.add_narrow(values, first, last);
    }

    // What of the segment lies in the chunk; `next` is the chunk after it. As many rows are taken at once as there is
    // code for and as share a sign word.
    template <int N>
    INLINE void piece(const Draws& draws, int64_t tile, const Segment& segment, int64_t chunk, int64_t next) const {
        const int64_t base = chunk * layout.width;
        const int64_t first = std::max(segment.start - base, int64_t(0));
        const int64_t last = std::min(segment.start + segment.count - base, layout.width);
        float converted[kMaxWidth];
        const float* values = reinterpret_cast<const float*>(segment.at(base));
        if (segment.dtype != kFloat32 || scale != 1) {
            convert(segment, base + first, last - first, scale, converted + first);
            values = converted;
        }
        const char* ahead = segment.at(next * layout.width);
        for (int64_t row = 0; row < layout.rows;) {
            const int64_t together = std::min(layout.rows - row, 32 - row % 32);
            if (together >= 7) {
                rows<N, 7>(draws, tile, row, values, first, last, ahead, segment.element());
                row += 7;
            } else if (together >= 5) {
                rows<N, 5>(draws, tile, row, values, first, last, ahead, segment.element());
                row += 5;
            } else if (together >= 3) {
                rows<N, 3>(draws, tile, row, values, first, last, ahead, segment.element());
                row += 3;
            } else {
                rows<N, 1>(draws, tile, row, values, first, last, ahead, segment.element());
                row += 1;
            }
        }
    }

    template <int N, class Before>
    INLINE void chunk(Draws& draws, int64_t tile, int64_t chunk, int64_t next, const Before& before) const {
        const int64_t begin = chunk * layout.width, end = begin + layout.width;
        if (begin >= stop() || end <= start()) return;
        before(begin, std::min(end, stop()), next * layout.width);
        draws.fill(layout, chunk);
        const Segment* segment = std::upper_bound(
            segments, segments + count, begin, [](int64_t at, const Segment& s) { return at < s.start + s.count; });
        for (; segment < segments + count && segment->start < end; segment++)
            piece<N>(draws, tile, *segment, chunk, next);
    }

    // At most a block: the chunks as they come, each into another tile.
    template <int N>
    INLINE void by_chunk(Draws& draws) const {
        const int64_t last = (stop() - 1) / layout.width;
        for (int64_t m = start() / layout.width; m <= last; m++)
            chunk<N>(draws, layout.tile_of(m), m, m + 1, Nothing{});
    }

    // A tile stays in the first-level cache while everything that falls into it is added, block after block.
    template <int N, class Before>
    INLINE void by_tile(Draws& draws, int thread, const Before& before) const {
        const int64_t size = layout.width * layout.tiles, first = start() / size, last = (stop() - 1) / size;
        for (int64_t tile; (tile = tiles.take(thread)) >= 0;) {
            int64_t m = layout.chunk_of(tile, first);
            for (int64_t block = first; block <= last; block++) {
                const int64_t next = layout.chunk_of(tile, block + 1);
                chunk<N>(draws, tile, m, next, before);
                m = next;
            }
        }
    }
};

}  // namespace sketch
