// Threads that wait for work.
#pragma once

#include <pthread.h>

#include <atomic>
#include <mutex>
#include <system_error>
#include <thread>

namespace sketch {

// A condition variable; std's would bind the kernel to the C++ library of the compiler that built it.
class Signal {
public:
    template <class Predicate>
    void wait(std::unique_lock<std::mutex>& lock, Predicate holds) {
        while (!holds()) pthread_cond_wait(&condition_, lock.mutex()->native_handle());
    }
    void notify_one() { pthread_cond_signal(&condition_); }
    void notify_all() { pthread_cond_broadcast(&condition_); }

private:
    pthread_cond_t condition_ = PTHREAD_COND_INITIALIZER;
};

// One job runs at a time; a caller that finds the pool busy works alone.
class Pool {
public:
    using Work = void (*)(void* job, int worker);

    // Calls work(job, 0) here and work(job, 1 … threads - 1) on whichever threads come before this one is done.
    static void run(Work work, void* job, int threads) {
        Pool* pool = instance();
        if (threads > 1 && !pool->busy_.test_and_set(std::memory_order_acquire)) {
            pool->share(work, job, threads);
            pool->busy_.clear(std::memory_order_release);
        } else {
            work(job, 0);
        }
    }

private:
    static constexpr int kSpins = 2000;  // tens of microseconds: the next call of a step often follows at once

    // Never destroyed, for its threads outlive main; made anew in a forked child, which has none of them.
    static Pool*& instance() {
        static Pool* pool = [] {
            pthread_atfork(nullptr, nullptr, [] { instance() = new Pool; });
            return new Pool;
        }();
        return pool;
    }

    void share(Work work, void* job, int threads) {
        start(threads - 1);
        {
            std::lock_guard<std::mutex> lock(state_);
            work_ = work;
            job_ = job;
            wanted_ = threads - 1;
            round_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        work(job, 0);
        std::unique_lock<std::mutex> lock(state_);
        wanted_ = 0;
        lock.unlock();
        for (int spin = 0; spin < kSpins && active_.load(std::memory_order_acquire) != 0; spin++) pause();
        lock.lock();
        done_.wait(lock, [this] { return active_ == 0; });
    }

    void start(int workers) {
        try {
            for (; started_ < workers; started_++) std::thread(&Pool::serve, this, started_ + 1).detach();
        } catch (const std::system_error&) {
            // No more threads to be had: those there are do the work.
        }
    }

    void serve(int worker) {
        uint64_t seen = 0;
        for (;;) {
            for (int spin = 0; spin < kSpins && round_.load(std::memory_order_acquire) == seen; spin++) pause();
            std::unique_lock<std::mutex> lock(state_);
            wake_.wait(lock, [&] { return round_.load(std::memory_order_relaxed) != seen; });
            seen = round_.load(std::memory_order_relaxed);
            if (worker > wanted_) continue;
            active_++;
            lock.unlock();
            work_(job_, worker);
            lock.lock();
            if (--active_ == 0) done_.notify_one();
        }
    }

    static void pause() {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#else
        std::this_thread::yield();
#endif
    }

    std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
    std::mutex state_;
    Signal wake_, done_;
    std::atomic<uint64_t> round_{0};
    Work work_ = nullptr;
    void* job_ = nullptr;
    int started_ = 0, wanted_ = 0;
    std::atomic<int> active_{0};
};

}  // namespace sketch
