// Sparse vectors: the heaviest entries of each shard, their code, and writing them. See hvd_sketch/codec.py and
// hvd_sketch/exchange/select.py for the definitions and the results, which these functions reproduce to the last bit.

#pragma GCC diagnostic ignored "-Wpsabi"  // no vector crosses a function boundary: all is inlined

#include "pool.hpp"
#include "sparse/code.hpp"
#include "sparse/heaviest.hpp"
#include "split.hpp"

namespace {

using namespace sparse;

// The memory of one thread.
thread_local Buffer<uint8_t> nibbles;
thread_local Buffer<int64_t> chosen;
thread_local Finder finder;

// Calls work(begin, end) for parts of the items, on as many threads as there are parts.
template <class Work>
void share(int64_t items, int64_t threads, Work work) {
    struct Job {
        Work& work;
        sketch::Split split;
        int64_t items, parts;
    };
    const int64_t parts = std::min(items, threads);
    Job job{work, {}, items, parts};
    job.split.start(parts, int(parts));
    const auto run = [](void* given, int thread) {
        Job& job = *static_cast<Job*>(given);
        for (int64_t part; (part = job.split.take(thread)) >= 0;)
            job.work(job.items * part / job.parts, job.items * (part + 1) / job.parts);
    };
    sketch::Pool::run(run, &job, int(parts));
}

}  // namespace

extern "C" {

void sparse_heaviest(const float* vector, int64_t size, int64_t stride, int64_t shards, int64_t count, int64_t* rows,
                     float* values, int64_t threads) {
    const Heaviest heaviest{vector, stride, {size, shards}, count, rows, values};
    share(shards, threads, [&](int64_t begin, int64_t end) { heaviest.choose(begin, end, finder); });
}

void sparse_encode(int64_t universe, int64_t count, int64_t vectors, const int64_t* rows, const float* values,
                   uint8_t* code, float* decoded, int64_t threads) {
    const Code codec(universe, count);
    share(vectors, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
            codec.encode(rows + i * count, values + i * count, code + i * codec.nbytes(), decoded + i * count, nibbles);
    });
}

// Whether all are codes.
int sparse_decode(int64_t universe, int64_t count, int64_t vectors, const uint8_t* code, int64_t* rows, float* values,
                  int64_t threads) {
    const Code codec(universe, count);
    std::atomic<bool> good{true};
    share(vectors, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
            if (!codec.decode(code + i * codec.nbytes(), rows + i * count, values + i * count)) good = false;
    });
    return good;
}

void sparse_put(float* vector, int64_t size, int64_t shards, int64_t first_shard, int64_t step, int64_t lists,
                int64_t count, const int64_t* rows, const float* values) {
    const auto put = [](float& entry, float value) { entry = value; };
    scatter({size, shards}, vector, first_shard, step, lists, count, rows, values, chosen, put);
}

void sparse_add(float* vector, int64_t size, int64_t shards, int64_t first_shard, int64_t step, int64_t lists,
                int64_t count, const int64_t* rows, const float* values) {
    const auto add = [](float& entry, float value) { entry += value; };
    scatter({size, shards}, vector, first_shard, step, lists, count, rows, values, chosen, add);
}

}  // extern "C"
