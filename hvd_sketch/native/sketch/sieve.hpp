// Sieving: which coordinates are worth an estimate.
#pragma once

#include "../flags.hpp"
#include "layout.hpp"

namespace sketch {

// An estimate reaches a threshold only if at least half of its cells do, whatever their signs. One bit for each cell of
// a tile makes this a few operations on 64 coordinates at once, before anything is hashed.
class Sieve {
public:
    INLINE void fill(const Layout& layout, const float* cells, uint32_t threshold) {
        threshold = std::min(threshold, bit_cast<uint32_t>(0x1p127f));  // the mean of two less large cells is finite
        words_ = int(layout.width + 63) / 64;
        stride_ = words_ + 2 * kWords;
        uint64_t* bits = bits_.reserve(layout.rows * stride_);
        for (int64_t row = 0; row < layout.rows; row++)
            fill_row(bits + row * stride_, cells + row * layout.cols, layout.width, threshold);
    }

    // Lists those positions of a chunk that pass, of the first `size`, ascending, from `place` on, each with `base` added.
    // Returns how many they are; one more may be written to.
    template <int N>
    INLINE int pass(const Layout& layout, const Draws& draws, int chunk, int64_t size, uint32_t base, uint32_t* place) {
        const int64_t half = (layout.rows + 1) / 2;
        const uint32_t* const offsets = draws.offsets(0) + chunk;
        if (half <= 1)
            count<N, 0>(layout.rows, half, offsets);
        else if (half <= 2)
            count<N, 1>(layout.rows, half, offsets);
        else if (half <= 4)
            count<N, 2>(layout.rows, half, offsets);
        else
            count<N, 31>(layout.rows, half, offsets);
        return collect(size, base, place);
    }

private:
    static constexpr int kWords = kChunk / 64, kMaxWords = kMaxWidth / 64;

    // Each coordinate has a counter, one bit of it in each plane, that starts so that it overflows at `half` rows.
    template <int N, int Planes>
    INLINE void count(int64_t rows, int64_t half, const uint32_t* offsets) {
        using Bits = typename Lanes<std::min(N, 2 * kWords)>::Bits;
        const uint64_t start = (uint64_t(1) << Planes) - uint64_t(half);
        for (int i = 0; i < kWords; i += int(sizeof(Bits) / 8)) {
            Bits plane[Planes + 1], passed = {};
            for (int p = 0; p < Planes; p++) plane[p] = Bits{} - (start >> p & 1);
            for (int64_t row = 0; row < rows; row++) {
                const uint32_t offset = offsets[row * kTogether];
                const uint64_t* from = bits_.data() + row * stride_ + offset / 64 + i;
                const int shift = int(offset % 64);
                Bits low, high;
                std::memcpy(&low, from, sizeof low);
                std::memcpy(&high, from + 1, sizeof high);
                Bits carry = low >> shift | high << 1 << (63 - shift);
                for (int p = 0; p < Planes; p++) {
                    const Bits old = plane[p];
                    plane[p] = old ^ carry;
                    carry &= old;
                }
                passed |= carry;
            }
            std::memcpy(passed_ + i, &passed, sizeof passed);
        }
    }

    INLINE int collect(int64_t size, uint32_t base, uint32_t* place) {
        int count = 0;
        for (int i = 0; i * 64 < size; i++, base += 64) {
            uint64_t word = passed_[i];
            if (size - i * 64 < 64) word &= (uint64_t(1) << (size - i * 64)) - 1;
            const int more = __builtin_popcountll(word);
            // Two at a time, wanted or not: fewer jumps that cannot be foreseen.
            for (int done = 0; done == 0 || done < more; done += 2)
                for (int j = 0; j < 2; j++) {
                    place[count + done + j] = base + uint32_t(__builtin_ctzll(word | uint64_t(1) << 63));
                    word &= word - 1;
                }
            count += more;
        }
        return count;
    }

    // The bits of a row, and behind them a chunk's length of them again, so that a shifted reading need not wrap around.
    INLINE void fill_row(uint64_t* bits, const float* row, int64_t width, uint32_t threshold) {
        uint64_t flags[kMaxWords * 8], packed[kMaxWords + kWords + 2] = {};
        uint8_t* const flag = reinterpret_cast<uint8_t*>(flags);
        for (int i = 0; i < width; i++) flag[i] = magnitude(row[i]) >= threshold;
        for (int i = int(width); i < words_ * 64; i++) flag[i] = 0;
        pack_flags(flags, reinterpret_cast<uint8_t*>(packed + 1), words_ * 8);
        std::copy_n(packed + 1, words_, bits);
        std::fill_n(bits + words_, 2 * kWords, 0);
        uint64_t* const second = bits + width / 64;
        const int shift = int(width % 64);
        second[0] |= packed[1] << shift;
        for (int i = 1; i <= kWords; i++) second[i] |= packed[i + 1] << shift | packed[i] >> 1 >> (63 - shift);
    }

    int words_ = 0;
    int64_t stride_ = 0;
    Buffer<uint64_t> bits_;
    uint64_t passed_[kWords];
};

}  // namespace sketch
