// Selecting: the k coordinates of largest absolute estimate, without estimating them all.
#pragma once

#include <cmath>
#include <utility>

#include "estimate.hpp"
#include "finds.hpp"
#include "sieve.hpp"
#include "../split.hpp"

namespace sketch {

// What a thread works with, in memory that is kept from call to call.
struct alignas(kLine) Worker {
    int number;
    Draws draws;
    Estimator estimator;
    Sieve sieve;
    Finds finds;
    Histogram histogram;  // of the finds
    Buffer<Place> edge;   // those of the finds that may be the last one chosen
    int64_t edge_size;
    uint32_t position[kMaxWidth + kLanes];
};

// The four passes over it may each be shared by threads; between them, one thread calls what has no worker.
struct TopK {
    Layout layout;
    const float* table;
    int64_t dim, k;
    int64_t* index;
    float* estimate;
    Worker* workers;
    int threads;
    Split& split;             // of what the pass goes through: chunks, tiles or workers
    Buffer<int64_t>& starts;  // where what is chosen of each chunk goes
    Buffer<Place>& edge;      // all that may be the last one chosen

    uint32_t floor = 0;  // estimates below it are not looked at
    uint32_t bin = 0;    // of the last one chosen
    int64_t rank = 0;    // of the last one chosen, within its bin
    Place last = {};

    int64_t chunks() const { return (dim + layout.width - 1) / layout.width; }
    int64_t size(int64_t chunk) const { return std::min(layout.width, dim - chunk * layout.width); }
    int64_t stride() const { return 1 + chunks() / kSampleChunks; }
    int64_t samples() const { return (chunks() + stride() - 1) / stride(); }
    int64_t room() const { return std::min(2 * k, dim) + kMaxWidth; }

    // Everybody's finds are emptied here, for a thread that comes too late would leave its old ones.
    void begin(uint32_t new_floor, int64_t items) {
        floor = new_floor;
        split.start(items, threads);
        for (int i = 0; i < threads; i++) {
            workers[i].finds.start(room(), chunks());
            workers[i].histogram.start(floor);
        }
    }

    // First pass: a few estimates of many chunks, into the histograms.
    INLINE void sample(Worker& worker) {
        for (int64_t i; (i = split.take(worker.number)) >= 0;) {
            const int64_t m = i * stride(), count = std::min(kSample, size(m));
            worker.draws.fill(layout, m);
            const int64_t first = worker.draws.key.data()[0] % (size(m) - count + 1);
            const float* cells = table + layout.tile_of(m) * layout.width;
            worker.estimator.range(layout, worker.draws, cells, first, int(count));
            for (int j = 0; j < count; j++) worker.histogram.add(worker.estimator.estimates()[j]);
        }
    }

    void merge() {
        for (int i = 1; i < threads; i++) workers->histogram.add(workers[i].histogram);
    }

    // A floor that a few more than k coordinates reach, going by the sample. A wrong guess costs time, no more.
    uint32_t guess() {
        merge();
        const int64_t size = workers->histogram.total();
        const double mean = double(k) * double(size) / double(dim);
        const int64_t rank = int64_t(mean + 4 * std::sqrt(mean)) + 8;
        return rank < size ? workers->histogram.estimate(rank) : 0;
    }

    // Second pass: all that reach the floor, and not more than room for them; `threshold` rises above the floor when
    // k better ones are known.
    template <int N>
    INLINE void search(Worker& worker) {
        uint32_t threshold = floor;
        for (int64_t tile; (tile = split.take(worker.number)) >= 0;) {
            const float* cells = table + tile * layout.width;
            worker.sieve.fill(layout, cells, threshold);
            for (int64_t block = 0; block * layout.tiles * layout.width < dim; block++) {
                const int64_t m = layout.chunk_of(tile, block);
                if (size(m) <= 0) continue;
                if (worker.finds.size() + kMaxWidth > room()) {
                    const Place cut = worker.finds.place(k, layout.width, floor);
                    worker.finds.keep_until(cut, layout.width);
                    threshold = cut.magnitude;
                    worker.sieve.fill(layout, cells, threshold);
                }
                chunk<N>(worker, cells, m, threshold);
            }
        }
        worker.finds.count(worker.histogram);
    }

    template <int N>
    INLINE void chunk(Worker& worker, const float* cells, int64_t m, uint32_t threshold) const {
        worker.draws.fill(layout, m);
        const int count = worker.sieve.pass<N>(layout, worker.draws, size(m), worker.position);
        for (int done = 0; done < count; done += kBatch) {
            const uint32_t* position = worker.position + done;
            const int batch = std::min(kBatch, count - done);
            worker.estimator.list(layout, worker.draws, cells, position, batch);
            worker.finds.append(worker.estimator.estimates(), position, batch, threshold);
        }
        worker.finds.close(m);
    }

    // Whether k were found. If not, the floor was too high.
    bool rank_found() {
        merge();
        if (workers->histogram.total() < k) return false;
        rank = k;
        bin = workers->histogram.find(rank);
        std::fill_n(starts.reserve(chunks()), chunks(), 0);
        split.start(threads, threads);
        return true;
    }

    // Third pass: how many of each chunk are chosen for certain, and which may be the last.
    void weigh(Worker& who) {
        for (int64_t i; (i = split.take(who.number)) >= 0;) {
            Worker& worker = workers[i];
            Place* to = worker.edge.reserve(worker.finds.size());
            for (const Run& run : worker.finds) {
                int64_t above = 0;
                for (const Candidate& c : run) {
                    const uint32_t its = worker.histogram.bin(c.estimate);
                    above += its > bin;
                    if (its == bin) *to++ = {magnitude(c.estimate), run.chunk * layout.width + c.position};
                }
                starts.data()[run.chunk] = above;
            }
            worker.edge_size = to - worker.edge.data();
        }
    }

    // The last one chosen, and where each chunk's choice starts.
    void settle() {
        int64_t total = 0;
        for (int i = 0; i < threads; i++) total += workers[i].edge_size;
        Place* const first = edge.reserve(total);
        Place* end = first;
        for (int i = 0; i < threads; i++) end = std::copy_n(workers[i].edge.data(), workers[i].edge_size, end);
        std::nth_element(first, first + rank - 1, end);
        last = first[rank - 1];
        for (const Place* place = first; place < first + rank; place++) starts.data()[place->index / layout.width]++;
        int64_t before = 0;
        for (int64_t m = 0; m < chunks(); m++) before += std::exchange(starts.data()[m], before);
        split.start(threads, threads);
    }

    // Fourth pass: the chosen go where they belong.
    void write(Worker& who) {
        for (int64_t i; (i = split.take(who.number)) >= 0;)
            for (const Run& run : workers[i].finds) {
                int64_t to = starts.data()[run.chunk];
                for (const Candidate& c : run) {
                    const int64_t at = run.chunk * layout.width + c.position;
                    if (last < Place{magnitude(c.estimate), at}) continue;
                    index[to] = at;
                    estimate[to++] = c.estimate;
                }
            }
    }

private:
    static constexpr int64_t kSample = 32, kSampleChunks = 4096;
};

}  // namespace sketch
