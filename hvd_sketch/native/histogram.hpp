// Finding the rank of a magnitude by counting.
#pragma once

#include <numeric>

#include "basics.hpp"

namespace sketch {

// Magnitudes counted in bins: those of one octave above `base`, or, when that is 0, of all there are.
class Histogram {
public:
    void start(uint32_t base) {
        base_ = base;
        shift_ = base > 0 ? 11 : 19;
        std::fill_n(count_, kBins, 0);
    }

    INLINE uint32_t bin(float estimate) const {
        return std::min<uint32_t>((magnitude(estimate) - base_) >> shift_, kBins - 1);
    }
    INLINE void add(float estimate) { count_[bin(estimate)]++; }

    void add(const Histogram& other) {
        for (uint32_t bin = 0; bin < kBins; bin++) count_[bin] += other.count_[bin];
    }

    int64_t total() const { return std::accumulate(count_, count_ + kBins, int64_t(0)); }

    // The bin of the rank-th largest (from 1); leaves its rank within the bin.
    uint32_t find(int64_t& rank) const {
        uint32_t bin = kBins - 1;
        for (; rank > count_[bin]; bin--) rank -= count_[bin];
        return bin;
    }

    // Where the rank-th largest is if each bin's content is spread evenly over it.
    uint32_t estimate(int64_t rank) const {
        const uint32_t bin = find(rank);
        return base_ + (bin << shift_) + uint32_t(((count_[bin] - rank) << shift_) / count_[bin]);
    }

private:
    static constexpr uint32_t kBins = 4096;
    uint32_t base_;
    int shift_;
    int64_t count_[kBins];
};

}  // namespace sketch
