// Shards of a vector: entry i belongs to shard i mod shards, as its row i / shards.
#pragma once

#include "../basics.hpp"

namespace sparse {

struct Shards {
    int64_t size, shards;

    INLINE int64_t rows(int64_t shard) const { return (size - shard + shards - 1) / shards; }

    // Rows at once.
    INLINE int64_t block() const { return std::max<int64_t>(kBlock / shards, 64); }

    // Calls visit(i, first, last) for all rows of the shards first_shard, first_shard + step, … of `lists` lists, in
    // blocks that all of them see while the block is in the processor's cache.
    template <class Visit>
    INLINE void by_block(int64_t first_shard, int64_t step, int64_t lists, Visit visit) const {
        for (int64_t first = 0; first * shards < size; first += block())
            for (int64_t i = 0; i < lists; i++)
                visit(i, first, std::min(first + block(), rows(first_shard + i * step)));
    }

private:
    static constexpr int64_t kBlock = 1 << 14;  // entries
};

// Calls change(entry, value) for lists of `count` rows, each ascending; list i is of shard first_shard + i * step.
template <class Change>
INLINE void scatter(const Shards& all, float* vector, int64_t first_shard, int64_t step, int64_t lists, int64_t count,
                    const int64_t* rows, const float* values, sketch::Buffer<int64_t>& kept, Change change) {
    int64_t* const next = kept.reserve(lists);
    for (int64_t i = 0; i < lists; i++) next[i] = i * count;
    all.by_block(first_shard, step, lists, [&](int64_t i, int64_t, int64_t last) {
        int64_t at = next[i];
        float* const shard = vector + first_shard + i * step;
        for (const int64_t end = (i + 1) * count; at < end && rows[at] < last; at++) {
            __builtin_prefetch(shard + rows[std::min(at + sketch::kAhead, end - 1)] * all.shards, 1);
            change(shard[rows[at] * all.shards], values[at]);
        }
        next[i] = at;
    });
}

}  // namespace sparse
