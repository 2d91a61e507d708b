// Bits in the order in which they come, eight to a byte, from its highest bit down.
#pragma once

#include "../basics.hpp"

namespace sparse {

// The same bytes, each with its bits in the opposite order.
INLINE uint32_t mirror(uint32_t x) {
    x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
    x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
    return (x >> 4 & 0x0F0F0F0Fu) | (x & 0x0F0F0F0Fu) << 4;
}

class BitWriter {
public:
    explicit BitWriter(uint8_t* to) : to_(to) {}

    // The lowest `width` bits of a value, the lowest first.
    INLINE void put(uint64_t value, int width) {
        for (; width > 32; width -= 32, value >>= 32) put_few(value & 0xFFFFFFFFu, 32);
        put_few(value & ((uint64_t(1) << width) - 1), width);
    }

    void close() {
        for (held_ += 7; held_ >= 8; held_ -= 8, bits_ >>= 8) *to_++ = uint8_t(mirror(bits_ & 255));
    }

private:
    INLINE void put_few(uint64_t value, int width) {
        bits_ |= value << held_;
        held_ += width;
        if (held_ < 32) return;
        const uint32_t word = mirror(uint32_t(bits_));
        for (int i = 0; i < 4; i++) *to_++ = uint8_t(word >> 8 * i);
        bits_ >>= 32;
        held_ -= 32;
    }

    uint8_t* to_;
    uint64_t bits_ = 0;
    int held_ = 0;  // below 32 between two calls
};

class BitReader {
public:
    BitReader(const uint8_t* from, const uint8_t* end) : from_(from), end_(end) {}

    INLINE uint64_t get(int width) {
        uint64_t value = 0;
        int done = 0;
        for (; width - done > 32; done += 32) value |= get_few(32) << done;
        return value | get_few(width - done) << done;
    }

private:
    INLINE uint64_t get_few(int width) {
        if (held_ < width) {
            uint32_t word = 0;
            const int bytes = int(std::min<int64_t>(4, end_ - from_));
            if (bytes == 4)
                for (int i = 0; i < 4; i++) word |= uint32_t(from_[i]) << 8 * i;
            else
                for (int i = 0; i < bytes; i++) word |= uint32_t(from_[i]) << 8 * i;
            from_ += bytes;
            bits_ |= uint64_t(mirror(word)) << held_;
            held_ += 32;
        }
        const uint64_t value = bits_ & ((uint64_t(1) << width) - 1);
        bits_ >>= width;
        held_ -= width;
        return value;
    }

    const uint8_t *from_, *end_;
    uint64_t bits_ = 0;
    int held_ = 0;
};

}  // namespace sparse
