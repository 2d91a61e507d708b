// The heaviest rows of each shard of a vector, all shards in one pass over it.
#pragma once

#include <cmath>
#include <functional>

#include "../histogram.hpp"
#include "sweep.hpp"

namespace sparse {

using sketch::Buffer;
using sketch::Histogram;
using sketch::magnitude;

struct Entry {
    float value;
    uint32_t row;

    // The order of choice: the larger magnitude first, then the smaller row.
    INLINE uint64_t key() const { return uint64_t(magnitude(value)) << 32 | uint32_t(~row); }
};

// Entries of a shard in ascending order, among them all that may yet be chosen.
struct Found {
    Entry *begin, *end;
    uint32_t least;  // no magnitude among them is smaller
    uint32_t floor;  // no smaller magnitude is looked at

    int64_t size() const { return end - begin; }
};

// What a thread works with, in memory that is kept from call to call.
struct Finder {
    Buffer<Entry> entries;
    Buffer<Found> found;
    Buffer<uint32_t> sample;
    Buffer<uint64_t> edge;
    Histogram histogram;
    Sweep sweep;
};

// A sample gives a threshold that a few more entries than wanted exceed; those alone are ranked. Should they be too few,
// everything is looked at again; should they become too many, all but the best of them are given up.
struct Heaviest {
    const float* vector;
    int64_t stride;  // from one entry of the vector to the next
    Shards all;
    int64_t count;
    int64_t* rows;
    float* values;

    void choose(int64_t begin, int64_t end, Finder& finder) const {
        Found* const found = finder.found.reserve(end - begin);
        Entry* const entries = finder.entries.reserve((end - begin) * room());
        for (int64_t i = 0; i < end - begin; i++) {
            const uint32_t floor = guess(begin + i, finder.sample);
            found[i] = {entries + i * room(), entries + i * room(), floor, floor};
        }
        gather(begin, end - begin, found, finder);
        for (int64_t i = 0; i < end - begin; i++) {
            if (found[i].size() < count) {
                found[i] = {found[i].begin, found[i].begin, 0, 0};
                gather(begin + i, 1, found + i, finder);
            }
            keep_heaviest(found[i], finder);
            for (int64_t j = 0; j < count; j++) {
                rows[(begin + i) * count + j] = found[i].begin[j].row;
                values[(begin + i) * count + j] = found[i].begin[j].value;
            }
        }
    }

private:
    static constexpr int64_t kSample = 1 << 14, kSweepsAtOnce = 16;

    INLINE const float* entry(int64_t shard, int64_t row) const { return vector + (row * all.shards + shard) * stride; }

    // A magnitude that probably somewhat more than `count` of a shard's reach.
    uint32_t guess(int64_t shard, Buffer<uint32_t>& kept) const {
        const int64_t step = all.rows(shard) / kSample;
        if (step <= 1) return 0;
        const int64_t size = all.rows(shard) / step;
        const double expected = double(count) / double(step);
        const int64_t rank = int64_t(expected + 4 * std::sqrt(expected)) + 8;
        if (rank > size) return 0;
        uint32_t* const sample = kept.reserve(size);
        // One of each `step` rows, never the same one: matrices have a period.
        for (int64_t i = 0; i < size; i++) {
            const uint64_t drawn = uint32_t(uint64_t(i) * 0x9e3779b97f4a7c15u >> 32);
            sample[i] = magnitude(*entry(shard, i * step + int64_t(drawn * uint64_t(step) >> 32)));
        }
        std::nth_element(sample, sample + rank - 1, sample + size, std::greater<uint32_t>());
        return sample[rank - 1];
    }

    int64_t room() const { return 2 * count + all.block() + 1; }

    void gather(int64_t shard, int64_t shards, Found* found, Finder& finder) const {
        if (stride == 1 && all.shards <= kSweep) {
            sweep(shard, shards, found, finder);
            return;
        }
        all.by_block(0, all.size, shard, 1, shards, [&](int64_t i, int64_t first, int64_t last) {
            make_room(found[i], finder);
            collect(shard + i, first, last, found[i]);
        });
    }

    void sweep(int64_t shard, int64_t shards, Found* found, Finder& finder) const {
        Sweep& sweep = finder.sweep;
        sweep.start(all);
        const int64_t sweeps = all.size < kSweep ? 0 : (all.size - kSweep) / sweep.stride() + 1;
        const int64_t rows_a_sweep = sweep.stride() / all.shards;
        for (int64_t i = 0; i < sweeps; i++) {
            if (i % kSweepsAtOnce == 0) {
                for (int64_t j = 0; j < shards; j++) make_room(found[j], finder);
                sweep.bound([&](int64_t at) {
                    return at < shard || at >= shard + shards ? Sweep::kUnwanted : found[at - shard].floor;
                });
            }
            const int64_t first = i * rows_a_sweep;
            sweep(vector + i * sweep.stride(), [&](int64_t at, int64_t row, float value) {
                *found[at - shard].end++ = {value, uint32_t(first + row)};
            });
        }
        for (int64_t j = 0; j < shards; j++)
            collect(shard + j, sweeps * rows_a_sweep, all.rows(shard + j), found[j]);
    }

    void make_room(Found& found, Finder& finder) const {
        if (found.size() > 2 * count) keep_heaviest(found, finder);
    }

    INLINE void collect(int64_t shard, int64_t first, int64_t last, Found& found) const {
        Entry* to = found.end;
        const float* from = entry(shard, first);
        for (int64_t row = first; row < last; row++, from += all.shards * stride) {
            *to = {*from, uint32_t(row)};
            to += magnitude(*from) >= found.floor;
        }
        found.end = to;
    }

    // Leaves `count` of at least as many. Of those to come, whose rows are larger, only a larger magnitude matters.
    void keep_heaviest(Found& found, Finder& finder) const {
        const uint64_t last = last_key(found, finder);
        Entry* to = found.begin;
        for (const Entry* e = found.begin; e < found.end; e++) {
            *to = *e;
            to += e->key() >= last;
        }
        found = {found.begin, to, uint32_t(last >> 32), uint32_t(last >> 32) + 1};
    }

    // The key of the last one chosen of these.
    uint64_t last_key(const Found& found, Finder& finder) const {
        Histogram& histogram = finder.histogram;
        histogram.start(found.least);
        for (const Entry* e = found.begin; e < found.end; e++) histogram.add(e->value);
        int64_t rank = count;
        const uint32_t bin = histogram.find(rank);
        uint64_t* const edge = finder.edge.reserve(found.size() + 1);
        uint64_t* end = edge;
        for (const Entry* e = found.begin; e < found.end; e++) {
            *end = e->key();
            end += histogram.bin(e->value) == bin;
        }
        std::nth_element(edge, edge + rank - 1, end, std::greater<uint64_t>());
        return edge[rank - 1];
    }
};

}  // namespace sparse
