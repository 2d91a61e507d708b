// Changing a vector on its way into the table.
#pragma once

#include <cmath>
#include <numeric>

#include "layout.hpp"
#include "../kept.hpp"

namespace sketch {

// An entry that is given a value.
struct Put {
    int64_t index;
    float value;
};

// What is kept by index, by the tile that it falls into; ascending in each.
class Puts {
public:
    void sort(const Layout& layout, const Kept& kept) {
        int64_t* const end = ends_.reserve(layout.tiles + 1);
        Put* const put = puts_.reserve(kept.count);
        std::fill_n(end, layout.tiles + 1, 0);
        by_tile(layout, kept, [=](int64_t tile, int64_t) { end[tile + 1]++; });
        std::partial_sum(end, end + layout.tiles + 1, end);
        by_tile(layout, kept, [=](int64_t tile, int64_t at) { put[end[tile]++] = {kept.index[at], kept.values[at]}; });
    }

    const Put* begin(int64_t tile) const { return puts_.data() + (tile > 0 ? ends_.data()[tile - 1] : 0); }
    const Put* end(int64_t tile) const { return puts_.data() + ends_.data()[tile]; }

private:
    // Calls visit(tile, at) for each; pieces follow each other in the order of tiles, from where the block begins.
    template <class Visit>
    static void by_tile(const Layout& layout, const Kept& kept, Visit visit) {
        int64_t first = 0, last = 0, turn = 0;  // of the pieces that have one tile after the other
        for (int64_t at = 0; at < kept.count; at++) {
            const int64_t index = kept.index[at];
            if (index >= last) {
                const int64_t block = index / layout.block, begin = block * layout.block;
                first = begin + (index - begin) / layout.apart * layout.apart;
                last = std::min(first + layout.apart, begin + layout.block);
                turn = layout.rotation(block);
            }
            const int64_t turned = (index - first) / kPiece + turn;
            visit(turned < layout.tiles ? turned : turned - layout.tiles, at);
        }
    }

    Buffer<int64_t> ends_;
    Buffer<Put> puts_;
};

// vector += scale * change, rounded once; then what is kept is put in its place.
struct Advance {
    const Layout& layout;
    int64_t dim;
    float* vector;
    const float* change;
    float scale;
    Kept kept;
    const Puts& puts;

    // A chunk; of what is kept in its tile, `put` comes next. Returns what comes after it.
    INLINE const Put* chunk(int64_t begin, int64_t ahead, const Put* put, const Put* end) const {
        for (int64_t q = 0; q < layout.length; q += kPiece)
            piece(layout.at(begin, q), std::min(kPiece, layout.length - q), layout.at(ahead, q));
        for (; put < end && put->index < begin + layout.span; put++) vector[put->index] = put->value;
        if (kept.stride > 0)
            for (int64_t q = 0; q < layout.length; q += kPiece)
                comb(layout.at(begin, q), std::min(kPiece, layout.length - q));
        return put;
    }

private:
    INLINE void piece(int64_t first, int64_t count, int64_t ahead) const {
        fetch(change, ahead);
        float* const to = vector + first;
        const float* const from = change + first;
        count = std::min(count, dim - first);
        if (count == kPiece)
            for (int64_t i = 0; i < kPiece; i++) to[i] = std::fma(scale, from[i], to[i]);
        else
            for (int64_t i = 0; i < count; i++) to[i] = std::fma(scale, from[i], to[i]);
    }

    static INLINE void fetch(const float* from, int64_t ahead) {
        const uintptr_t next = reinterpret_cast<uintptr_t>(from) + uintptr_t(ahead) * sizeof(float);
        for (uintptr_t byte = 0; byte < kPiece * sizeof(float); byte += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(next + byte), 0, 2);
    }

    // The division is exact: the numbers are far below 2^53.
    INLINE void comb(int64_t first, int64_t count) const {
        const int64_t past = first - kept.offset + kept.stride - 1, end = std::min(first + count, dim);
        int64_t tooth = past > 0 ? int64_t(double(past) / double(kept.stride)) : 0;
        for (int64_t entry = kept.offset + tooth * kept.stride; entry < end; entry += kept.stride)
            vector[entry] = kept.values[kept.count + tooth++];
    }
};

}  // namespace sketch
