// What the threads find: candidates, in runs of one tile and kTogether blocks each, and the order of choice among them.
#pragma once

#include "../histogram.hpp"
#include "layout.hpp"

namespace sketch {

struct Candidate {
    float estimate;
    uint32_t place;  // in its run: position place mod kChunk of chunk place / kChunk
};

// The candidates of the chunks of a tile in the blocks block, block + 1, …
struct Run {
    int64_t tile, block;
    Candidate *first, *last;

    INLINE Candidate* begin() const { return first; }
    INLINE Candidate* end() const { return last; }
};

// Which coordinates those of a run are.
class Coordinates {
public:
    INLINE Coordinates(const Layout& layout, const Run& run) : layout_(layout) {
        chunks_.find(layout, run.tile, run.block);
    }
    INLINE int64_t of(const Candidate& candidate) const {
        return layout_.at(chunks_.begin[candidate.place / kChunk], candidate.place % kChunk);
    }

private:
    const Layout& layout_;
    Chunks chunks_;
};

// A place in the order of choice: the larger magnitude first, then the smaller index.
struct Place {
    uint32_t magnitude;
    int64_t index;

    INLINE bool operator<(const Place& other) const {
        return magnitude != other.magnitude ? magnitude > other.magnitude : index < other.index;
    }
};

// What one thread has found, in memory that is kept from call to call.
class Finds {
public:
    void start(int64_t room, int64_t runs) {
        candidates_.reserve(room);
        runs_.reserve(std::min(room, runs));
        size_ = runs_size_ = 0;
    }

    int64_t size() const { return size_; }
    const Run* begin() const { return runs_.data(); }
    const Run* end() const { return runs_.data() + runs_size_; }

    // Those at least as large as the threshold.
    INLINE void append(const float* estimates, const uint32_t* places, int count, uint32_t threshold) {
        Candidate* to = candidates_.data() + size_;
        for (int i = 0; i < count; i++) {
            *to = {estimates[i], places[i]};
            to += magnitude(estimates[i]) >= threshold;
        }
        size_ = to - candidates_.data();
    }

    // Everything since the last run is of this one.
    INLINE void close(int64_t tile, int64_t block) {
        Candidate* const begin = runs_size_ ? runs_.data()[runs_size_ - 1].last : candidates_.data();
        Candidate* const end = candidates_.data() + size_;
        if (end > begin) runs_.data()[runs_size_++] = {tile, block, begin, end};
    }

    void count(Histogram& histogram) const {
        for (int64_t i = 0; i < size_; i++) histogram.add(candidates_.data()[i].estimate);
    }

    // The rank-th (from 1), when all are at least `base`.
    Place place(int64_t rank, const Layout& layout, uint32_t base) const {
        Histogram histogram;
        histogram.start(base);
        count(histogram);
        const uint32_t bin = histogram.find(rank);
        Buffer<Place> places;
        Place* end = places.reserve(size_);
        for (const Run& run : *this) {
            const Coordinates coordinate(layout, run);
            for (const Candidate& c : run)
                if (histogram.bin(c.estimate) == bin) *end++ = {magnitude(c.estimate), coordinate.of(c)};
        }
        std::nth_element(places.data(), places.data() + rank - 1, end);
        return places.data()[rank - 1];
    }

    // Gives up what comes after `last`.
    void keep_until(const Place& last, const Layout& layout) {
        Candidate* to = candidates_.data();
        Run* kept = runs_.data();
        for (const Run run : *this) {
            const Coordinates coordinate(layout, run);
            Candidate* const first = to;
            for (const Candidate c : run)
                if (!(last < Place{magnitude(c.estimate), coordinate.of(c)})) *to++ = c;
            if (to > first) *kept++ = {run.tile, run.block, first, to};
        }
        size_ = to - candidates_.data();
        runs_size_ = kept - runs_.data();
    }

private:
    Buffer<Candidate> candidates_;
    Buffer<Run> runs_;
    int64_t size_ = 0, runs_size_ = 0;
};

}  // namespace sketch
