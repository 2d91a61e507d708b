// Sketching: coordinates of a vector into the table.
#pragma once

#include "advance.hpp"
#include "layout.hpp"
#include "../split.hpp"

namespace sketch {

enum Dtype : int64_t { kFloat32, kFloat16, kBfloat16 };

// `count` elements in memory that are coordinates `start, start + 1, …` of the sketched vector.
struct Segment {
    const char* data;
    int64_t dtype, start, count;

    INLINE int64_t stop() const { return start + count; }
    INLINE int64_t element() const { return dtype == kFloat32 ? 4 : 2; }
    INLINE const char* at(int64_t coordinate) const { return data + (coordinate - start) * element(); }
};

// The pieces of a chunk whose turn comes later, to be fetched; perhaps of a part of the vector that is not there.
struct Ahead {
    uintptr_t address;
    int64_t apart, bytes;  // from piece to piece, and of each

    INLINE void fetch(int64_t piece) const {
        const uintptr_t from = address + uintptr_t(piece * apart);
        for (int64_t byte = 0; byte < bytes; byte += kFetched)
            __builtin_prefetch(reinterpret_cast<const char*>(from + uintptr_t(byte)), 0, 2);
    }

private:
    static constexpr int64_t kFetched = 64;
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

    const Layout& layout;
    float* row[R];
    int64_t offset[R], width;
    uint32_t key;
    uint32_t shift;  // signs between that of row 0 and that of row[0]

    INLINE int64_t cell(int row, int64_t position) const {
        const int64_t at = position + offset[row];
        return at < width ? at : at - width;
    }

    // Whether a row wraps around within some positions; if not, where each row takes them.
    INLINE bool wraps(int64_t first, int64_t count, float** to) const {
        bool any = false;
        for (int j = 0; j < R; j++) {
            const int64_t at = cell(j, first);
            any |= at + count > width;
            to[j] = row[j] + at;
        }
        return any;
    }

    // The signs of N positions in one piece.
    INLINE Word signs(int64_t q) const {
        const Word at = lane_numbers<N>() + layout.hashed(key, uint32_t(q));
        return mix32(at, int(shift + layout.before(uint32_t(q))));
    }

    INLINE void add_register(float* const* to, int64_t i, const float* values, const Word& word) const {
        const Word value = (Word)load<N>(values);
        for (int j = 0; j < R; j++) store(to[j] + i, load<N>(to[j] + i) + (Float)(value ^ sign(word, j)));
    }

    // One register in which rows may wrap around, or that is not full. The idle lanes add -0.0, which changes nothing.
    INLINE void edge(const float* values, int64_t q, int64_t count) const {
        const Word mask = (Word)load<N>(reinterpret_cast<const float*>(kUsed + kLanes - count));
        const Word word = signs(q);
        float full[N] = {};
        if (count < N)
            std::copy_n(values, count, full);
        else
            store(full, load<N>(values));
        const Word value = (Word)load<N>(full);
        for (int j = 0; j < R; j++) {
            const Float signed_value = (Float)(((value ^ sign(word, j)) & mask) | (~mask & kSignBit));
            const int64_t at = cell(j, q), before = width - at;
            if (before >= N) {
                store(row[j] + at, load<N>(row[j] + at) + signed_value);
                continue;
            }
            float padded[3 * N];
            const Float nothing = (Float)(Word{} + kSignBit);
            store(padded, nothing);
            store(padded + N, signed_value);
            store(padded + 2 * N, nothing);
            float* end = row[j] + width - N;
            store(end, load<N>(end) + load<N>(padded + before));
            store(row[j], load<N>(row[j]) + load<N>(padded + N + before));
        }
    }

    // Positions first … last - 1, all in one piece; values[0] is that of the first.
    INLINE void add(const float* values, int64_t first, int64_t last) const {
        for (int64_t q = first; q < last; q += N) {
            float* to[R];
            const int64_t count = std::min<int64_t>(N, last - q);
            if (count == N && !wraps(q, N, to))
                add_register(to, 0, values + q - first, signs(q));
            else
                edge(values + q - first, q, count);
        }
    }

    // A tile narrower than a register.
    INLINE void add_narrow(const float* values, int64_t first, int64_t last) const {
        for (int64_t q = first; q < last; q++) {
            const uint32_t word = mix32(layout.hashed(key, uint32_t(q)), int(shift + layout.before(uint32_t(q))));
            for (int j = 0; j < R; j++)
                row[j][cell(j, q)] += bit_cast<float>(bit_cast<uint32_t>(values[q - first]) ^ sign(word, j));
        }
    }

    // All of a chunk, in pieces that are so many values apart.
    INLINE void whole(const float* values, int64_t apart, const Ahead& ahead) const {
        constexpr int kRegisters = kPiece / N, kTogether = kSigns / R;
        float* to[R];
        const bool any = wraps(0, kChunk, to), shared = layout.rows == R;
        Word word[kRegisters] = {};
#pragma GCC unroll 4
        for (int64_t q = 0; q < kChunk; q += kPiece, values += apart) {
            ahead.fetch(q / kPiece);
            for (int i = 0; i < kRegisters; i++)
                word[i] = shared && q / kPiece % kTogether > 0 ? word[i] << R : signs(q + i * N);
            if (any && wraps(q, kPiece, to))
                add(values, q, q + kPiece);
            else
                for (int i = 0; i < kRegisters; i++) add_register(to, i * N, values + i * N, word[i]);
            if (!any)
                for (int j = 0; j < R; j++) to[j] += kPiece;
        }
    }
};

// A chunk's values: those of positions first … last - 1; if they are all there are, in pieces so many values apart.
struct Values {
    const float* from;
    int64_t apart, first, last;
};

struct Add {
    Layout layout;
    float* table;
    const Segment* segments;  // ascending, without overlap
    int64_t count;
    float scale;
    const Advance* advance;  // what is done to the vector before it is added, if anything
    Split& split;

    int64_t start() const { return segments[0].start; }
    int64_t stop() const { return segments[count - 1].stop(); }

    // Whether there is at most a piece of each chunk. Then they are taken as they come, each of which goes into another
    // tile; else tile by tile.
    bool short_slice() const { return stop() - start() <= layout.apart - kPiece; }
    int64_t first_piece() const { return start() / kPiece; }
    int64_t items() const { return short_slice() ? (stop() - 1) / kPiece + 1 - first_piece() : layout.tiles; }

    template <int N, int R>
    INLINE void some_rows(const Draws& draws, int i, int64_t tile, int64_t first_row, const Values& values,
                          const Ahead& ahead) const {
        Rows<N, R> some{layout, {}, {}, layout.width, draws.keys(first_row)[i],
                           uint32_t(first_row % kSigns)};
        for (int j = 0; j < R; j++) {
            some.row[j] = table + (first_row + j) * layout.cols + tile * layout.width;
            some.offset[j] = draws.offsets(first_row + j)[i];
        }
        if (values.last - values.first == kChunk) {
            some.whole(values.from, values.apart, ahead);
            return;
        }
        for (int64_t q = values.first, next; q < values.last; q = next) {
            next = std::min(values.last, (q / kPiece + 1) * kPiece);
            if (layout.width >= N)
                some.add(values.from + q - values.first, q, next);
            else
                some.add_narrow(values.from + q - values.first, q, next);
        }
    }

    // As many rows are taken at once as there is code for and as share a sign word.
    template <int N>
    INLINE void rows(const Draws& draws, int i, int64_t tile, const Values& values, Ahead ahead) const {
        for (int64_t row = 0; row < layout.rows; ahead.bytes = 0) {
            const int64_t together = std::min(layout.rows - row, kSigns - row % kSigns);
            if (together >= 7) {
                some_rows<N, 7>(draws, i, tile, row, values, ahead);
                row += 7;
            } else if (together >= 5) {
                some_rows<N, 5>(draws, i, tile, row, values, ahead);
                row += 5;
            } else if (together >= 3) {
                some_rows<N, 3>(draws, i, tile, row, values, ahead);
                row += 3;
            } else {
                some_rows<N, 1>(draws, i, tile, row, values, ahead);
                row += 1;
            }
        }
    }

    // Chunk i of those drawn; `segment` is the first that does not end before it, `ahead` begins one to be fetched.
    template <int N>
    INLINE void chunk(const Draws& draws, int i, int64_t tile, const Segment* segment, int64_t ahead) const {
        const int64_t begin = draws.chunks.begin[i], element = segment->element();
        const Ahead next = {uintptr_t(segment->data) + uintptr_t((ahead - segment->start) * element),
                            layout.apart * element, kPiece * element};
        const bool inside = segment->start <= begin && begin + layout.span <= segment->stop();
        float gathered[kChunk];
        Values values = {gathered, kPiece, 0, 0};
        bool more = inside || find_piece(begin, segment, gathered, values);
        if (inside && layout.length == kChunk && segment->dtype == kFloat32 && scale == 1)
            values = {reinterpret_cast<const float*>(segment->at(begin)), layout.apart, 0, kChunk};
        else if (inside)
            for (; values.last < layout.length; values.last = std::min(layout.length, values.last + kPiece))
                convert(*segment, layout.at(begin, values.last), std::min(kPiece, layout.length - values.last), scale,
                        gathered + values.last);
        for (; more; more = !inside && find_piece(begin, segment, gathered, values))
            rows<N>(draws, i, tile, values, next);
    }

    // The next positions, from values.last on, that a segment has of the chunk; at most a piece.
    bool find_piece(int64_t begin, const Segment*& segment, float* to, Values& values) const {
        for (int64_t q = values.last, end; q < layout.length; q = end) {
            end = std::min(layout.length, (q / kPiece + 1) * kPiece);
            const int64_t from = layout.at(begin, q);
            segment = find(segment, from);
            if (segment == segments + count) return false;
            const int64_t left = std::max(from, segment->start), right = std::min(from + end - q, segment->stop());
            if (left >= right) continue;
            convert(*segment, left, right - left, scale, to);
            values = {to, kPiece, q + left - from, q + right - from};
            return true;
        }
        return false;
    }

    // The first segment, from a given one on, that does not end before a coordinate.
    const Segment* find(const Segment* from, int64_t coordinate) const {
        return std::upper_bound(from, segments + count, coordinate,
                                [](int64_t at, const Segment& segment) { return at < segment.stop(); });
    }

    template <int N>
    INLINE void some(Draws& draws, int thread) const {
        draws.start(layout);
        for (int64_t item; (item = split.take(thread)) >= 0;) {
            int64_t tile = item, begin = start() / layout.block, end = layout.blocks(stop());
            if (short_slice()) {
                const int64_t piece = first_piece() + item;
                begin = piece * kPiece / layout.block;
                end = begin + 1;
                tile = layout.tile(begin, piece % layout.tiles);
            }
            blocks<N>(draws, tile, begin, end);
        }
    }

    // A tile stays in the first-level cache while what falls into it is added, block after block.
    template <int N>
    INLINE void blocks(Draws& draws, int64_t tile, int64_t begin, int64_t end) const {
        const Segment* segment = segments;
        const Put* put = advance ? advance->puts.begin(tile) : nullptr;
        for (int64_t block = begin; block < end; block += kTogether) {
            const int together = int(std::min<int64_t>(kTogether, end - block));
            draws.chunks.find(layout, tile, block);
            draws.fill(layout, together);
            Chunks ahead;
            ahead.find(layout, tile, block + kTogether);
            for (int i = 0; i < together; i++) {
                const int64_t first = draws.chunks.begin[i];
                while (segment < segments + count && segment->stop() <= first) segment++;
                if (segment == segments + count) return;
                if (advance) put = advance->chunk(first, ahead.begin[i], put, advance->puts.end(tile));
                chunk<N>(draws, i, tile, segment, ahead.begin[i]);
            }
        }
    }
};

}  // namespace sketch
