// Looking for what is large in a vector that belongs to several shards.
#pragma once

#include "../flags.hpp"
#include "shards.hpp"

namespace sparse {

constexpr int64_t kSweep = 1 << 9;  // entries at once

// One bit for each of kSweep values: whether its magnitude exceeds its bound.
INLINE void exceed(const float* values, const int32_t* bounds, uint64_t* bits) {
    uint64_t eights[kSweep / 8];
    uint8_t* const flag = reinterpret_cast<uint8_t*>(eights);
    for (int64_t i = 0; i < kSweep; i++) flag[i] = int32_t(sketch::magnitude(values[i])) > bounds[i];
    sketch::pack_flags(eights, reinterpret_cast<uint8_t*>(bits), kSweep / 8);
}

using Exceed = void(const float*, const int32_t*, uint64_t*);

inline void exceed_plain(const float* values, const int32_t* bounds, uint64_t* bits) { exceed(values, bounds, bits); }

#if defined(__x86_64__)
__attribute__((target("avx2"))) inline void exceed_avx2(const float* values, const int32_t* bounds, uint64_t* bits) {
    exceed(values, bounds, bits);
}
Exceed* const fastest = __builtin_cpu_supports("avx2") ? exceed_avx2 : exceed_plain;
#else
Exceed* const fastest = exceed_plain;
#endif

// Which shard each of kSweep entries in a row belongs to, and the bound that it has to exceed there.
class Sweep {
public:
    // For at most kSweep shards; a sweep begins with an entry of the first one.
    void start(const Shards& all) {
        stride_ = kSweep / all.shards * all.shards;
        for (int64_t i = 0; i < kSweep; i++) {
            shard_[i] = uint16_t(i % all.shards);
            row_[i] = uint16_t(i / all.shards);
        }
    }

    // Entries from the beginning of one sweep to that of the next: whole rows of all shards.
    int64_t stride() const { return stride_; }

    template <class Floor>
    void bound(Floor floor) {
        for (int64_t i = 0; i < stride_; i++) bounds_[i] = int32_t(floor(shard_[i]) - 1);
        std::fill(bounds_ + stride_, bounds_ + kSweep, kNever);
    }

    static constexpr uint32_t kUnwanted = 0x80000000u;  // a floor that no magnitude reaches

    // Calls take(shard, row, value) for those that exceed their bounds; row 0 is that of the first value.
    template <class Take>
    void operator()(const float* values, Take take) const {
        uint64_t bits[kSweep / 64];
        fastest(values, bounds_, bits);
        for (int64_t i = 0; i < kSweep / 64; i++)
            for (uint64_t word = bits[i]; word; word &= word - 1) {
                const int64_t at = i * 64 + __builtin_ctzll(word);
                take(shard_[at], row_[at], values[at]);
            }
    }

private:
    static constexpr int32_t kNever = INT32_MAX;
    int64_t stride_ = 0;
    uint16_t shard_[kSweep], row_[kSweep];
    int32_t bounds_[kSweep];
};

}  // namespace sparse
