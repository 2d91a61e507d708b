// Estimating: the median over the rows of what the table holds for a coordinate.
#pragma once

#include "layout.hpp"
#include "../split.hpp"

namespace sketch {

constexpr int kBatch = 256;  // coordinates estimated together

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
            for (int j = 0; j < R; j++) x[j] = rows[j * kBatch + i];
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
            const float value = x[j * kBatch];
            int64_t at = j;
            for (; at > 0 && value < x[(at - 1) * kBatch]; at--)
                x[at * kBatch] = x[(at - 1) * kBatch];
            x[at * kBatch] = value;
        }
        const float upper = x[row_count / 2 * kBatch];
        to[i] = row_count % 2 ? upper : (x[(row_count / 2 - 1) * kBatch] + upper) * 0.5f;
    }
}

INLINE float flip(float value, uint32_t word, int bit) {
    return bit_cast<float>(bit_cast<uint32_t>(value) ^ sign(word, bit));
}

// Estimates of up to kBatch coordinates of one chunk.
class Estimator {
public:
    const float* estimates() const { return estimates_; }

    // Positions first, first + 1, …
    INLINE void range(const Layout& layout, const Draws& draws, const float* tile, int64_t first, int count) {
        float* rows = rows_.reserve(layout.rows * kBatch);
        for (int64_t row = 0; row < layout.rows; row++, tile += layout.cols) {
            if (row % 32 == 0)
                for (int i = 0; i < count; i++) word_[i] = mix32(draws.key.data()[row / 32] + uint32_t(first + i));
            int64_t at = first + draws.offset.data()[row];
            if (at >= layout.width) at -= layout.width;
            const int before = int(std::min<int64_t>(count, layout.width - at)), bit = int(row % 32);
            float* to = rows + row * kBatch;
            for (int i = 0; i < before; i++) to[i] = flip(tile[at + i], word_[i], bit);
            for (int i = before; i < count; i++) to[i] = flip(tile[i - before], word_[i], bit);
        }
        median(rows, layout.rows, count);
    }

    // The positions listed. The list is full, with any positions, up to a multiple of kLanes.
    INLINE void list(const Layout& layout, const Draws& draws, const float* tile, const uint32_t* position, int count) {
        float* rows = rows_.reserve(layout.rows * kBatch);
        const uint32_t width = uint32_t(layout.width);
        for (int64_t row = 0; row < layout.rows; row++, tile += layout.cols) {
            if (row % 32 == 0)
                for (int first = 0; first < count; first += kLanes)
                    for (int i = first; i < first + kLanes; i++)
                        word_[i] = mix32(draws.key.data()[row / 32] + position[i]);
            const uint32_t offset = uint32_t(draws.offset.data()[row]);
            float* to = rows + row * kBatch;
            for (int first = 0; first < count; first += kLanes)
                for (int i = first; i < first + kLanes; i++)
                    bucket_[i] = std::min(position[i] + offset, position[i] + offset - width);
            for (int i = 0; i < count; i++) to[i] = tile[bucket_[i]];
            for (int first = 0; first < count; first += kLanes)
                for (int i = first; i < first + kLanes; i++) to[i] = flip(to[i], word_[i], int(row % 32));
        }
        median(rows, layout.rows, count);
    }

private:
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
    uint32_t word_[kBatch], bucket_[kBatch];
    float estimates_[kBatch];
};

// The estimates of all coordinates, for a caller who has room for them.
struct EstimateAll {
    Layout layout;
    const float* table;
    int64_t dim;
    float* to;
    Split& tiles;

    INLINE void by_tile(Draws& draws, Estimator& estimator, int thread) const {
        for (int64_t tile; (tile = tiles.take(thread)) >= 0;)
            for (int64_t block = 0; block * layout.tiles * layout.width < dim; block++) {
                const int64_t m = layout.chunk_of(tile, block), base = m * layout.width;
                const int64_t last = std::min(layout.width, dim - base);
                if (last <= 0) continue;
                draws.fill(layout, m);
                for (int64_t q = 0; q < last; q += kBatch) {
                    const int count = int(std::min<int64_t>(kBatch, last - q));
                    estimator.range(layout, draws, table + tile * layout.width, q, count);
                    std::memcpy(to + base + q, estimator.estimates(), count * sizeof(float));
                }
            }
    }
};

}  // namespace sketch
