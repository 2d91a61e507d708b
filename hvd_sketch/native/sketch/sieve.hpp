// Sieving: which coordinates are worth an estimate.
#pragma once

#include "../flags.hpp"
#include "layout.hpp"

namespace sketch {

// An estimate reaches a threshold only if at least half of its cells do, whatever their signs. One bit for each cell of
// a tile makes this a few operations on 64 coordinates at once, before anything is hashed.
class Sieve {
public:
    INLINE void fill(const Layout& layout, const float* tile, uint32_t threshold) {
        threshold = std::min(threshold, bit_cast<uint32_t>(0x1p127f));  // the mean of two less large cells is finite
        words_ = (layout.width + 511) / 512 * 8;
        stride_ = 2 * words_ + 8;
        uint64_t* bits = bits_.reserve(layout.rows * stride_);
        for (int64_t row = 0; row < layout.rows; row++)
            fill_row(bits + row * stride_, tile + row * layout.cols, layout.width, threshold);
    }

    // The positions below `last` that pass, ascending, then zeros to a full kLanes; returns how many they are.
    template <int N>
    INLINE int pass(const Layout& layout, const Draws& draws, int64_t last, uint32_t* position) {
        const int64_t half = (layout.rows + 1) / 2;
        if (half <= 1)
            count<N, 0>(layout.rows, half, draws.offset.data());
        else if (half <= 2)
            count<N, 1>(layout.rows, half, draws.offset.data());
        else if (half <= 4)
            count<N, 2>(layout.rows, half, draws.offset.data());
        else
            count<N, 31>(layout.rows, half, draws.offset.data());
        return collect(last, position);
    }

private:
    static constexpr int kMaxWords = kMaxWidth / 64 + 8;

    // Each coordinate has a counter, one bit of it in each plane, that starts so that it overflows at `half` rows.
    template <int N, int Planes>
    INLINE void count(int64_t rows, int64_t half, const int64_t* offset) {
        using Bits = typename Lanes<N>::Bits;
        constexpr int kWords = sizeof(Bits) / 8;
        const uint64_t start = (uint64_t(1) << Planes) - uint64_t(half);
        for (int i = 0; i < words_; i += kWords) {
            Bits plane[Planes + 1], passed = {};
            for (int p = 0; p < Planes; p++) plane[p] = Bits{} - (start >> p & 1);
            for (int64_t row = 0; row < rows; row++) {
                const uint64_t* from = bits_.data() + row * stride_ + offset[row] / 64 + i;
                const int shift = int(offset[row] % 64);
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

    INLINE int collect(int64_t last, uint32_t* position) {
        int count = 0;
        for (int i = 0; i * 64 < last; i++) {
            uint64_t word = passed_[i];
            if (last - i * 64 < 64) word &= (uint64_t(1) << (last - i * 64)) - 1;
            const int more = __builtin_popcountll(word);
            // Two at a time, wanted or not: fewer jumps that cannot be foreseen.
            for (int done = 0; done == 0 || done < more; done += 2)
                for (int j = 0; j < 2; j++) {
                    position[count + done + j] = uint32_t(i * 64 + __builtin_ctzll(word | uint64_t(1) << 63));
                    word &= word - 1;
                }
            count += more;
        }
        std::fill_n(position + count, kLanes, 0);
        return count;
    }

    // The bits of a row, and once more behind them, so that a shifted reading need not wrap around.
    INLINE void fill_row(uint64_t* bits, const float* row, int64_t width, uint32_t threshold) {
        uint64_t flags[kMaxWords * 8], packed[kMaxWords + 2] = {};
        uint8_t* const flag = reinterpret_cast<uint8_t*>(flags);
        uint8_t* const byte = reinterpret_cast<uint8_t*>(packed + 1);
        for (int i = 0; i < width; i++) flag[i] = magnitude(row[i]) >= threshold;
        for (int i = int(width); i < words_ * 64; i++) flag[i] = 0;
        pack_flags(flags, byte, words_ * 8);
        for (int i = 0; i < words_; i++) bits[i] = packed[i + 1];
        uint64_t* const second = bits + width / 64;
        const int shift = int(width % 64);
        const uint64_t shared = shift > 0 ? second[0] : 0;
        for (int i = 0; i <= words_; i++) second[i] = packed[i + 1] << shift | packed[i] >> 1 >> (63 - shift);
        second[0] |= shared;
    }

    int words_ = 0;
    int64_t stride_ = 0;
    Buffer<uint64_t> bits_;
    uint64_t passed_[kMaxWords];
};

}  // namespace sketch
