// What every kernel is written with: inlining, bits, and memory that is kept.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

// Everything between an entry point and its innermost loop is inlined into the entry point, which alone names the
// instruction set; so one source serves all of them.
#define INLINE inline __attribute__((always_inline))

namespace sketch {

constexpr size_t kLine = 128;  // bytes that processors fetch together
constexpr int64_t kAhead = 16;  // entries whose memory is asked for before it is their turn
constexpr uint32_t kSignBit = 0x80000000u;

// Memory that grows to the largest size asked for and is kept; its content is not. It is never so small that two
// threads' buffers could share a cache line.
template <class T>
class Buffer {
public:
    T* reserve(int64_t size) {
        if (size > size_) {
            size_ = std::max(size, int64_t(2 * kLine / sizeof(T)));
            data_.reset(new T[size_]);
        }
        return data_.get();
    }
    T* data() const { return data_.get(); }

private:
    std::unique_ptr<T[]> data_;
    int64_t size_ = 0;
};

template <class To, class From>
INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// Magnitudes are compared as the integers that their bits are; that puts NaN above infinity.
INLINE uint32_t magnitude(float value) { return bit_cast<uint32_t>(value) & ~kSignBit; }

}  // namespace sketch
