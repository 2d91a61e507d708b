// The CPU kernel of the sketch, as a plain shared library. See hvd_sketch/sketch: geometry.py for the definition and
// reference.py for the results, which these functions reproduce to the last bit with any number of threads.
//
// The same code is compiled for each instruction set, and the widest one that the processor has is taken: one library
// serves them all, and other architectures get the plain one.

#pragma GCC diagnostic ignored "-Wpsabi"  // no vector crosses a function boundary: all is inlined

#include "pool.hpp"
#include "sketch/add.hpp"
#include "sketch/estimate.hpp"
#include "sketch/select.hpp"

namespace {

using namespace sketch;

struct Kernel {
    int64_t lanes;
    void (*add)(Add&, Worker&);
    void (*estimate_all)(EstimateAll&, Worker&);
    void (*sample)(TopK&, Worker&);
    void (*search)(TopK&, Worker&);
    void (*write)(TopK&, Worker&);
};

#define SKETCH_KERNEL(name, lanes, ...)                                                                         \
    namespace name {                                                                                            \
    __VA_ARGS__ void add(Add& all, Worker& worker) { all.some<lanes>(worker.draws, worker.number); }            \
    __VA_ARGS__ void estimate_all(EstimateAll& all, Worker& w) { all.by_tile(w.draws, w.estimator, w.number); } \
    __VA_ARGS__ void sample(TopK& top, Worker& worker) { top.sample(worker); }                                  \
    __VA_ARGS__ void search(TopK& top, Worker& worker) { top.search<lanes>(worker); }                           \
    __VA_ARGS__ void write(TopK& top, Worker& worker) { top.write(worker); }                                    \
    constexpr Kernel kernel = {lanes, add, estimate_all, sample, search, write};                                \
    }

SKETCH_KERNEL(baseline, 4)
#if defined(__x86_64__)
SKETCH_KERNEL(avx2, 8, __attribute__((target("avx2,fma,bmi,bmi2,popcnt"))))
SKETCH_KERNEL(avx512, 16, __attribute__((target("avx512f,fma,avx512bw,avx512dq,avx512vl,bmi,bmi2,popcnt"))))
#endif

// The widest that the processor has, of at most so many lanes.
const Kernel& choose(int64_t most) {
#if defined(__x86_64__)
    if (most >= 16 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2"))
        return avx512::kernel;
    if (most >= 8 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
        return avx2::kernel;
#endif
    return baseline::kernel;
}

const Kernel* kernel = &choose(kLanes);

// The memory of one calling thread, and of those that help it.
struct Crew {
    Buffer<Worker> workers;
    Split split;
    Buffer<int64_t> starts;
    Buffer<const Run*> found;
    Buffer<Place> edge;
    Puts puts;

    Worker* call(int threads) {
        Worker* all = workers.reserve(threads);
        for (int i = 0; i < threads; i++) all[i].number = i;
        return all;
    }
};

thread_local Crew crew;

// Below this many coordinates, waking another thread costs more than it saves.
constexpr int64_t kAlone = 1 << 17;

int useful(const Layout& layout, int64_t coordinates, int64_t threads) {
    return coordinates < kAlone ? 1 : int(std::min(threads, layout.tiles));
}

// One job, divided among threads by its tiles.
template <class Job>
struct Task {
    void (*work)(Job&, Worker&);
    Job& job;
    Worker* workers;

    static void run(void* task, int worker) {
        Task& self = *static_cast<Task*>(task);
        self.work(self.job, self.workers[worker]);
    }
};

template <class Job>
void share(void (*work)(Job&, Worker&), Job& job, Worker* workers, int threads) {
    Task<Job> task = {work, job, workers};
    Pool::run(Task<Job>::run, &task, threads);
}

void share_add(Add add, int64_t max_threads) {
    const int threads = add.short_slice() ? 1 : useful(add.layout, add.stop() - add.start(), max_threads);
    add.split.start(add.items(), threads);
    share(kernel->add, add, crew.call(threads), threads);
}

}  // namespace

extern "C" {

void sketch_add(int64_t rows, int64_t cols, uint64_t seed, float* table, const Segment* segments, int64_t count,
                float scale, int64_t max_threads) {
    if (count > 0) share_add({{rows, cols, seed}, table, segments, count, scale, nullptr, crew.split}, max_threads);
}

void sketch_advance(int64_t rows, int64_t cols, uint64_t seed, float* table, int64_t dim, float* vector,
                    const float* change, float scale, const int64_t* index, int64_t count, int64_t offset,
                    int64_t stride, const float* values, int64_t max_threads) {
    const Segment whole = {reinterpret_cast<const char*>(vector), kFloat32, 0, dim};
    const Layout layout{rows, cols, seed};
    const Kept kept = {index, count, offset, stride, values};
    crew.puts.sort(layout, kept);
    const Advance advance = {layout, dim, vector, change, scale, kept, crew.puts};
    share_add({layout, table, &whole, 1, 1, &advance, crew.split}, max_threads);
}

void sketch_estimate_all(int64_t rows, int64_t cols, uint64_t seed, const float* table, int64_t dim, float* to,
                         int64_t max_threads) {
    EstimateAll all{{rows, cols, seed}, table, dim, to, crew.split};
    const int threads = useful(all.layout, dim, max_threads);
    all.tiles.start(all.layout.tiles, threads);
    share(kernel->estimate_all, all, crew.call(threads), threads);
}

void sketch_top_k(int64_t rows, int64_t cols, uint64_t seed, const float* table, int64_t dim, int64_t k, int64_t* index,
                  float* estimate, int64_t max_threads) {
    const Layout layout{rows, cols, seed};
    const int threads = useful(layout, dim, max_threads);
    Worker* workers = crew.call(threads);
    TopK top{layout, table, dim, k, index, estimate, workers, threads, crew.split, crew.starts, crew.found, crew.edge};
    const auto pass = [&](void (*work)(TopK&, Worker&)) { share(work, top, workers, threads); };
    top.begin(0, top.samples());
    pass(kernel->sample);
    top.begin(top.guess(), layout.tiles);
    pass(kernel->search);
    if (!top.rank_found()) {
        top.begin(0, layout.tiles);
        pass(kernel->search);
        top.rank_found();
    }
    pass([](TopK& top, Worker& worker) { top.weigh(worker); });
    top.settle();
    pass(kernel->write);
}

int64_t sketch_limit_lanes(int64_t most) {
    kernel = &choose(most);
    return kernel->lanes;
}

}  // extern "C"
