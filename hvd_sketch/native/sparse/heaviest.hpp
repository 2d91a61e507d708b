// The heaviest rows of each shard of a vector, all shards in one pass over it.
#pragma once

#include <cmath>
#include <functional>

#include "../histogram.hpp"
#include "shards.hpp"

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

struct Found {
    Entry *begin, *end;
    uint32_t floor;  // no smaller magnitude was looked at
};

// What a thread works with, in memory that is kept from call to call.
struct Finder {
    Buffer<Entry> entries;
    Buffer<Found> found;
    Buffer<uint32_t> sample;
    Buffer<uint64_t> edge;
    Histogram histogram;
};

// A sample gives a threshold that a few more entries than wanted exceed; those alone are ranked.
struct Heaviest {
    const float* vector;
    int64_t stride;  // from one entry of the vector to the next
    Shards all;
    int64_t count;
    int64_t* rows;
    float* values;

    void choose(int64_t begin, int64_t end, Finder& finder) const {
        Found* const found = finder.found.reserve(end - begin);
        int64_t room = 0;
        for (int64_t shard = begin; shard < end; shard++) room += all.rows(shard) + 1;
        Entry* entries = finder.entries.reserve(room);
        for (int64_t shard = begin; shard < end; entries += all.rows(shard++) + 1)
            found[shard - begin] = {entries, entries, guess(shard, finder.sample)};
        all.by_block(begin, 1, end - begin, [&](int64_t i, int64_t first, int64_t last) {
            collect(begin + i, first, last, found[i]);
        });
        for (int64_t shard = begin; shard < end; shard++) {
            Found& its = found[shard - begin];
            if (its.end - its.begin < count) {
                its = {its.begin, its.begin, 0};
                collect(shard, 0, all.rows(shard), its);
            }
            rank(shard, its, finder);
        }
    }

private:
    static constexpr int64_t kSample = 1 << 14;

    INLINE const float* entry(int64_t shard, int64_t row) const { return vector + (row * all.shards + shard) * stride; }

    // A magnitude that probably somewhat more than `count` of a shard's reach.
    uint32_t guess(int64_t shard, Buffer<uint32_t>& kept) const {
        const int64_t step = all.rows(shard) / kSample;
        if (step <= 1) return 0;
        const int64_t size = (all.rows(shard) + step - 1) / step;
        const double expected = double(count) / double(step);
        const int64_t rank = int64_t(expected + 4 * std::sqrt(expected)) + 8;
        if (rank > size) return 0;
        uint32_t* const sample = kept.reserve(size);
        for (int64_t i = 0; i < size; i++) sample[i] = magnitude(*entry(shard, i * step));
        std::nth_element(sample, sample + rank - 1, sample + size, std::greater<uint32_t>());
        return sample[rank - 1];
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

    void rank(int64_t shard, const Found& found, Finder& finder) const {
        Histogram& histogram = finder.histogram;
        histogram.start(found.floor);
        for (const Entry* e = found.begin; e < found.end; e++) histogram.add(e->value);
        int64_t left = count;
        const uint32_t bin = histogram.find(left);
        uint64_t* const edge = finder.edge.reserve(found.end - found.begin + 1);
        uint64_t* end = edge;
        for (const Entry* e = found.begin; e < found.end; e++) {
            *end = e->key();
            end += histogram.bin(e->value) == bin;
        }
        std::nth_element(edge, edge + left - 1, end, std::greater<uint64_t>());
        const uint64_t last = edge[left - 1];
        int64_t to = shard * count;
        for (const Entry* e = found.begin; to < (shard + 1) * count; e++) {
            rows[to] = e->row;
            values[to] = e->value;
            to += e->key() >= last;
        }
    }
};

}  // namespace sparse
