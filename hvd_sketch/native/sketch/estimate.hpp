// Estimating: the median over the rows of what the table holds for a coordinate.
#pragma once

#include "layout.hpp"
#include "../split.hpp"

namespace sketch {

constexpr int kEstimates = kChunk;  // at once

// Ascending order of two values; equal ones, 0.0 and -0.0, stay as they are.
INLINE void order(float& low, float& high) {
    const float smaller = high < low ? high : low;
    high = high < low ? low : high;
    low = smaller;
}

// The median of R rows (R odd), as a stable sort has it: only neighbours are compared.
template <int R>
INLINE void median_of(const float* __restrict rows, int count, float* __restrict to) {
    for (int first = 0; first < count; first += kLanes)
        for (int i = first; i < first + kLanes; i++) {
            float x[R];
            for (int j = 0; j < R; j++) x[j] = rows[j * kEstimates + i];
#pragma GCC unroll 8
            for (int top = R - 1; top >= R / 2; top--)
#pragma GCC unroll 8
                for (int j = 0; j < top; j++) order(x[j], x[j + 1]);
            to[i] = x[R / 2];
        }
}

// Any number of rows, one coordinate after the other.
INLINE void median_of_many(float* rows, int64_t row_count, int count, float* to) {
    for (int i = 0; i < count; i++) {
        float* x = rows + i;
        for (int64_t j = 1; j < row_count; j++) {
            const float value = x[j * kEstimates];
            int64_t at = j;
            for (; at > 0 && value < x[(at - 1) * kEstimates]; at--)
                x[at * kEstimates] = x[(at - 1) * kEstimates];
            x[at * kEstimates] = value;
        }
        const float upper = x[row_count / 2 * kEstimates];
        to[i] = row_count % 2 ? upper : (x[(row_count / 2 - 1) * kEstimates] + upper) * 0.5f;
    }
}

INLINE float flip(float value, uint32_t word, int64_t number) {
    return bit_cast<float>(bit_cast<uint32_t>(value) ^ sign(word, number));
}

// Estimates of up to kEstimates coordinates that fall into one tile, of which `cells` is the first row's.
class Estimator {
public:
    const float* estimates() const { return estimates_; }

    // Positions first, first + 1, … of chunk i of those drawn.
    INLINE void range(const Layout& layout, const Draws& draws, int chunk, const float* cells, int64_t first,
                      int count) {
        float* rows = rows_.reserve(layout.rows * kEstimates);
        for (int64_t row = 0; row < layout.rows; row++, cells += layout.cols) {
            if (row % kSigns == 0)
                for (int i = 0; i < count; i++) word_[i] = word(layout, draws.keys(row)[chunk], uint32_t(first + i));
            int64_t at = first + draws.offsets(row)[chunk];
            if (at >= layout.width) at -= layout.width;
            const int before = int(std::min<int64_t>(count, layout.width - at));
            float* to = rows + row * kEstimates;
            for (int i = 0; i < before; i++) to[i] = flip(cells[at + i], word_[i], row % kSigns);
            for (int i = before; i < count; i++) to[i] = flip(cells[i - before], word_[i], row % kSigns);
        }
        median(rows, layout.rows, count);
    }

    // Those listed: position p mod kChunk of chunk p / kChunk. The list is full, with any of them, up to a multiple of
    // kLanes.
    template <int N>
    INLINE void list(const Layout& layout, const Draws& draws, const float* cells, const uint32_t* place, int count) {
        using Word = typename Lanes<N>::Word;
        float* rows = rows_.reserve(layout.rows * kEstimates);
        const uint32_t width = uint32_t(layout.width);
        for (int64_t row = 0; row < layout.rows; row++, cells += layout.cols) {
            for (int i = 0; i < count; i += N) {
                const Word listed = load_words<N>(place + i), chunk = listed / uint32_t(kChunk);
                const Word position = listed % uint32_t(kChunk);
                if (row % kSigns == 0) store(word_ + i, word(layout, look_up<N>(draws.keys(row), chunk), position));
                const Word at = position + look_up<N>(draws.offsets(row), chunk), wrapped = at - width;
                store(cell_ + i, at < wrapped ? at : wrapped);
            }
            float* to = rows + row * kEstimates;
            for (int i = 0; i < count; i++) to[i] = cells[cell_[i]];
            for (int first = 0; first < count; first += kLanes)
                for (int i = first; i < first + kLanes; i++) to[i] = flip(to[i], word_[i], row % kSigns);
        }
        median(rows, layout.rows, count);
    }

private:
    // That begins with the position's own signs.
    template <class Word>
    static INLINE Word word(const Layout& layout, const Word& key, const Word& position) {
        return mix32(layout.hashed(key, position), 0) << layout.before(position);
    }

    INLINE void median(float* rows, int64_t row_count, int count) {
        switch (row_count) {
            case 1: return median_of<1>(rows, count, estimates_);
            case 3: return median_of<3>(rows, count, estimates_);
            case 5: return median_of<5>(rows, count, estimates_);
            case 7: return median_of<7>(rows, count, estimates_);
            default: return median_of_many(rows, row_count, count, estimates_);
        }
    }

    Buffer<float> rows_;
    uint32_t word_[kEstimates], cell_[kEstimates];
    float estimates_[kEstimates];
};

// The estimates of all coordinates, for a caller who has room for them.
struct EstimateAll {
    Layout layout;
    const float* table;
    int64_t dim;
    float* to;
    Split& tiles;

    INLINE void by_tile(Draws& draws, Estimator& estimator, int thread) const {
        const int64_t blocks = layout.blocks(dim);
        draws.start(layout);
        for (int64_t tile; (tile = tiles.take(thread)) >= 0;)
            for (int64_t block = 0; block < blocks; block += kTogether) {
                const int together = int(std::min<int64_t>(kTogether, blocks - block));
                draws.chunks.find(layout, tile, block);
                draws.fill(layout, together);
                for (int i = 0; i < together; i++) chunk(draws, i, tile, estimator);
            }
    }

private:
    INLINE void chunk(const Draws& draws, int i, int64_t tile, Estimator& estimator) const {
        const int64_t begin = draws.chunks.begin[i], count = layout.size(begin, dim);
        if (count == 0) return;
        estimator.range(layout, draws, i, table + tile * layout.width, 0, int(count));
        for (int64_t q = 0; q < count; q += kPiece)
            std::memcpy(to + layout.at(begin, q), estimator.estimates() + q,
                        std::min(kPiece, count - q) * sizeof(float));
    }
};

}  // namespace sketch
