// Selecting: the k coordinates of largest absolute estimate, without estimating them all.
#pragma once

#include <cmath>
#include <utility>

#include "estimate.hpp"
#include "finds.hpp"
#include "marks.hpp"
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
    uint32_t place[kBatch + kLanes];
    Buffer<Chosen> chosen;
    Marks marks;
};

// The four passes over it may each be shared by threads; between them, one thread calls what has no worker. Blocks go in
// batches of kTogether.
struct TopK {
    Layout layout;
    const float* table;
    int64_t dim, k;
    int64_t* index;
    float* estimate;
    Worker* workers;
    int threads;
    Split& split;               // of what the pass goes through: chunks, tiles, workers or batches
    Buffer<int64_t>& starts;    // where what is chosen of each batch goes
    Buffer<const Run*>& found;  // the run of each batch and tile, if any
    Buffer<Place>& edge;        // all that may be the last one chosen

    uint32_t floor = 0;  // estimates below it are not looked at
    uint32_t bin = 0;    // of the last one chosen
    int64_t rank = 0;    // of the last one chosen, within its bin
    Place last = {};

    int64_t blocks() const { return layout.blocks(dim); }
    int64_t batches() const { return (blocks() + kTogether - 1) / kTogether; }
    int64_t batch_size() const { return kTogether * layout.block; }
    int64_t chunks() const { return blocks() * layout.tiles; }
    int64_t stride() const { return kSampleStride * (1 + chunks() / (kSampleStride * kSampleChunks)); }
    int64_t samples() const { return (chunks() + stride() - 1) / stride(); }
    int64_t room() const { return std::min(2 * k, dim) + kBatch; }

    // Everybody's finds are emptied here, for a thread that comes too late would leave its old ones.
    void begin(uint32_t new_floor, int64_t items) {
        floor = new_floor;
        split.start(items, threads);
        for (int i = 0; i < threads; i++) {
            workers[i].finds.start(room(), batches() * layout.tiles);
            workers[i].histogram.start(floor);
        }
    }

    // First pass: a few estimates of many chunks, into the histograms.
    INLINE void sample(Worker& worker) {
        worker.draws.start(layout);
        for (int64_t i; (i = split.take(worker.number)) >= 0;) {
            // One of each `stride` chunks, never the same one: matrices have a period.
            const int64_t m = std::min(i * stride() + Layout::below(mix32(uint32_t(i), 0), stride()), chunks() - 1);
            const int64_t block = m / layout.tiles, slot = m % layout.tiles;
            worker.draws.chunks.set(layout, 0, block, slot);
            const int64_t size = layout.size(worker.draws.chunks.begin[0], dim), count = std::min(kSample, size);
            if (count == 0) continue;
            worker.draws.fill(layout, 1);
            const int64_t first = Layout::below(worker.draws.keys(0)[0], size - count + 1);
            const float* cells = table + layout.tile(block, slot) * layout.width;
            worker.estimator.range(layout, worker.draws, 0, cells, first, int(count));
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
        worker.draws.start(layout);
        for (int64_t tile; (tile = split.take(worker.number)) >= 0;) {
            const float* cells = table + tile * layout.width;
            worker.sieve.fill(layout, cells, threshold);
            for (int64_t block = 0; block < blocks(); block += kTogether) {
                if (worker.finds.size() + kBatch > room()) {
                    const Place cut = worker.finds.place(k, layout, floor);
                    worker.finds.keep_until(cut, layout);
                    threshold = cut.magnitude;
                    worker.sieve.fill(layout, cells, threshold);
                }
                batch<N>(worker, cells, tile, block, threshold);
            }
        }
        worker.finds.count(worker.histogram);
    }

    template <int N>
    INLINE void batch(Worker& worker, const float* cells, int64_t tile, int64_t block, uint32_t threshold) const {
        Draws& draws = worker.draws;
        const int together = int(std::min<int64_t>(kTogether, blocks() - block));
        draws.chunks.find(layout, tile, block);
        draws.fill(layout, together);
        int count = 0;
        for (int i = 0; i < together; i++) {
            const int64_t size = layout.size(draws.chunks.begin[i], dim);
            count += worker.sieve.pass<N>(layout, draws, i, size, uint32_t(i * kChunk), worker.place + count);
        }
        std::fill_n(worker.place + count, kLanes, 0);
        for (int done = 0; done < count; done += kEstimates) {
            const uint32_t* places = worker.place + done;
            const int some = std::min(kEstimates, count - done);
            worker.estimator.list<N>(layout, draws, cells, places, some);
            worker.finds.append(worker.estimator.estimates(), places, some, threshold);
        }
        worker.finds.close(tile, block);
    }

    // Whether k were found. If not, the floor was too high.
    bool rank_found() {
        merge();
        if (workers->histogram.total() < k) return false;
        rank = k;
        bin = workers->histogram.find(rank);
        std::fill_n(starts.reserve(batches()), batches(), 0);
        std::fill_n(found.reserve(batches() * layout.tiles), batches() * layout.tiles, nullptr);
        split.start(threads, threads);
        return true;
    }

    // Third pass: how many of each batch are chosen for certain, and which may be the last.
    void weigh(Worker& who) {
        for (int64_t i; (i = split.take(who.number)) >= 0;) {
            Worker& worker = workers[i];
            Place* to = worker.edge.reserve(worker.finds.size());
            for (const Run& run : worker.finds) {
                int64_t above = 0;
                for (const Candidate& c : run) {
                    const uint32_t its = worker.histogram.bin(c.estimate);
                    above += its > bin;
                    if (its == bin) *to++ = {magnitude(c.estimate), Coordinates(layout, run).of(c)};
                }
                found.data()[run.block / kTogether * layout.tiles + run.tile] = &run;
                __atomic_fetch_add(starts.data() + run.block / kTogether, above, __ATOMIC_RELAXED);
            }
            worker.edge_size = to - worker.edge.data();
        }
    }

    // The last one chosen, and where each batch's choice starts.
    void settle() {
        int64_t total = 0;
        for (int i = 0; i < threads; i++) total += workers[i].edge_size;
        Place* const first = edge.reserve(total);
        Place* end = first;
        for (int i = 0; i < threads; i++) end = std::copy_n(workers[i].edge.data(), workers[i].edge_size, end);
        std::nth_element(first, first + rank - 1, end);
        last = first[rank - 1];
        for (const Place* place = first; place < first + rank; place++) starts.data()[place->index / batch_size()]++;
        int64_t before = 0;
        for (int64_t batch = 0; batch < batches(); batch++) before += std::exchange(starts.data()[batch], before);
        split.start(batches(), threads);
    }

    // Fourth pass: the chosen of a batch, tile by tile, then in order to where they belong.
    INLINE void write(Worker& worker) {
        for (int64_t batch; (batch = split.take(worker.number)) >= 0;) {
            const int64_t first = batch * batch_size(), start = starts.data()[batch];
            const int64_t count = (batch + 1 < batches() ? starts.data()[batch + 1] : k) - start;
            Chosen* const chosen = worker.chosen.reserve(count + 1);
            Chosen* to = chosen;
            for (int64_t tile = 0; tile < layout.tiles; tile++) {
                const Run* run = found.data()[batch * layout.tiles + tile];
                if (run == nullptr) continue;
                const Coordinates coordinate(layout, *run);
                for (const Candidate& c : *run) {
                    const int64_t at = coordinate.of(c);
                    *to = {uint32_t(at - first), c.estimate};
                    to += !(last < Place{magnitude(c.estimate), at});
                }
            }
            worker.marks.write(chosen, count, std::min(batch_size(), dim - first), first, index + start, estimate + start);
        }
    }

private:
    static constexpr int64_t kSample = 32, kSampleChunks = 4096, kSampleStride = 8;
};

}  // namespace sketch
