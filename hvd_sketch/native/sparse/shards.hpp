// Shards of a vector: entry i belongs to shard i mod shards, as its row i / shards.
#pragma once

#include "../pieces.hpp"

namespace sparse {

struct Shards {
    int64_t size, shards;

    INLINE int64_t rows(int64_t shard) const { return (size - shard + shards - 1) / shards; }

    // Rows at once.
    INLINE int64_t block() const { return std::max<int64_t>(kBlock / shards, 64); }

    // Calls visit(i, first, last) for all rows of the shards first_shard, first_shard + step, … of `lists` lists, in
    // blocks that all of them see while the block is in the processor's cache; of entries begin … end - 1 only.
    template <class Visit>
    INLINE void by_block(int64_t begin, int64_t end, int64_t first_shard, int64_t step, int64_t lists,
                         Visit visit) const {
        const auto below = [=](int64_t i, int64_t entry) {
            return Shards{entry, shards}.rows(first_shard + i * step);
        };
        for (int64_t entry = begin, next; entry < end; entry = next) {
            next = std::min(end, entry + block() * shards);
            for (int64_t i = 0; i < lists; i++) visit(i, below(i, entry), below(i, next));
        }
    }

private:
    static constexpr int64_t kBlock = 1 << 14;  // entries
};

// Calls change(entry, value) for lists of `count` rows, each ascending; list i is of shard first_shard + i * step. Of the
// vector there are only pieces, ascending; with `clears` they are cleared first.
template <class Change>
INLINE void scatter(int64_t shards, const sketch::Piece* pieces, int64_t number, bool clears, int64_t first_shard,
                    int64_t step, int64_t lists, int64_t count, const int64_t* rows, const float* values,
                    sketch::Buffer<int64_t>& kept, Change change) {
    int64_t* const next = kept.reserve(lists);
    for (int64_t i = 0; i < lists; i++) next[i] = i * count;
    const int64_t whole = sketch::whole(pieces, number);
    for (const sketch::Piece* piece = pieces; piece < pieces + number; piece++) {
        if (clears) sketch::clear(piece->data, piece->count, whole);
        const int64_t stop = piece->start + piece->count;
        Shards{stop, shards}.by_block(piece->start, stop, first_shard, step, lists, [&](int64_t i, int64_t first,
                                                                                      int64_t last) {
            int64_t at = next[i];
            const int64_t end = (i + 1) * count;
            while (at < end && rows[at] < first) at++;
            float* const shard = piece->data - piece->start + first_shard + i * step;
            for (; at < end && rows[at] < last; at++) {
                __builtin_prefetch(shard + rows[std::min(at + sketch::kAhead, end - 1)] * shards, 1);
                change(shard[rows[at] * shards], values[at]);
            }
            next[i] = at;
        });
    }
}

}  // namespace sparse
