// How threads divide work.
#pragma once

#include <atomic>

#include "basics.hpp"

namespace sketch {

// Items 0 … items - 1 for some threads. Each has a share of its own, the same in each call, so that what it touches
// is still in its cache; then it helps the others. So a thread that comes late, or never, costs nothing.
class Split {
public:
    void start(int64_t items, int threads) {
        threads_ = threads;
        Share* shares = shares_.reserve(threads);
        for (int i = 0; i < threads; i++) {
            shares[i].next = items * i / threads;
            shares[i].end = items * (i + 1) / threads;
        }
    }

    // The next item for this thread, or -1.
    int64_t take(int thread) {
        for (int i = 0; i < threads_; i++) {
            Share& share = shares_.data()[(thread + i) % threads_];
            const int64_t item = share.next++;
            if (item < share.end) return item;
        }
        return -1;
    }

private:
    struct alignas(kLine) Share {
        std::atomic<int64_t> next;
        int64_t end;
    };
    int threads_ = 0;
    Buffer<Share> shares_;
};

}  // namespace sketch
