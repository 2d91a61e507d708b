// Sparse vectors: the heaviest entries of each shard, their code, and writing them. See hvd_sketch/codec.py and
// hvd_sketch/exchange/select.py for the definitions and the results, which these functions reproduce to the last bit.

#pragma GCC diagnostic ignored "-Wpsabi"  // no vector crosses a function boundary: all is inlined

#include "kept.hpp"
#include "share.hpp"
#include "sparse/code.hpp"
#include "sparse/heaviest.hpp"

namespace {

using namespace sparse;

// The memory of one thread.
thread_local Buffer<uint8_t> nibbles;
thread_local Buffer<int64_t> chosen;
thread_local Finder finder;

}  // namespace

extern "C" {

void sparse_heaviest(const float* vector, int64_t size, int64_t stride, int64_t shards, int64_t count, int64_t* rows,
                     float* values, int64_t threads) {
    const Heaviest heaviest{vector, stride, {size, shards}, count, rows, values};
    sketch::share(shards, threads, [&](int64_t begin, int64_t end) { heaviest.choose(begin, end, finder); });
}

void sparse_encode(int64_t universe, int64_t count, int64_t vectors, const int64_t* rows, const float* values,
                   uint8_t* code, float* decoded, int64_t threads) {
    const Code codec(universe, count);
    sketch::share(vectors, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
            codec.encode(rows + i * count, values + i * count, code + i * codec.nbytes(), decoded + i * count, nibbles);
    });
}

// Also which of them are codes.
void sparse_decode(int64_t universe, int64_t count, int64_t vectors, const uint8_t* code, int64_t* rows, float* values,
                   bool* known, int64_t threads) {
    const Code codec(universe, count);
    sketch::share(vectors, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
            known[i] = codec.decode(code + i * codec.nbytes(), rows + i * count, values + i * count);
    });
}

void sparse_keep(const sketch::Piece* pieces, int64_t number, const int64_t* index, int64_t count, int64_t offset,
                 int64_t stride, const float* values, int64_t clear) {
    const sketch::Kept kept = {index, count, offset, stride, values};
    const int64_t whole = sketch::whole(pieces, number);
    for (const sketch::Piece* piece = pieces; piece < pieces + number; piece++) {
        if (clear) sketch::clear(piece->data, piece->count, whole);
        const int64_t first = std::lower_bound(index, index + count, piece->start) - index;
        kept.put(piece->data, piece->start, piece->start + piece->count, first);
    }
}

void sparse_put(const sketch::Piece* pieces, int64_t number, int64_t shards, int64_t first_shard, int64_t step,
                int64_t lists, int64_t count, const int64_t* rows, const float* values, int64_t clears) {
    const auto put = [](float& entry, float value) { entry = value; };
    scatter(shards, pieces, number, clears, first_shard, step, lists, count, rows, values, chosen, put);
}

void sparse_add(const sketch::Piece* pieces, int64_t number, int64_t shards, int64_t first_shard, int64_t step,
                int64_t lists, int64_t count, const int64_t* rows, const float* values) {
    const auto add = [](float& entry, float value) { entry += value; };
    scatter(shards, pieces, number, false, first_shard, step, lists, count, rows, values, chosen, add);
}

}  // extern "C"
