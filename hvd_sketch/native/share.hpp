// Parts of a job for several threads.
#pragma once

#include "pool.hpp"
#include "split.hpp"

namespace sketch {

// Calls work(begin, end) for parts of the items, on as many threads as there are parts.
template <class Work>
void share(int64_t items, int64_t threads, Work work) {
    struct Job {
        Work& work;
        Split split;
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
    Pool::run(run, &job, int(parts));
}

}  // namespace sketch
