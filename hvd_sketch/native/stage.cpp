// Copying a gradient to its place in the vector, and measuring it in the same pass. See hvd_sketch/exchange/staging.py.

#include <numeric>

#include "share.hpp"
#include "stream.hpp"

namespace {

constexpr int64_t kBlock = 1 << 15;  // elements with a sum of their own, so that no sum depends on the threads
constexpr int kLanes = sketch::kStreamedAtOnce, kSums = 4;  // registers of every instruction set that has doubles

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef double Doubles __attribute__((vector_size(8 * kLanes)));

thread_local sketch::Buffer<double> sums;

INLINE double squared(float value) { return double(value) * double(value); }

template <bool kStreams>
INLINE double stage(const float* from, float* to, int64_t count, float factor) {
    Doubles squares[kSums] = {};
    double sum = 0;
    int64_t i = 0;
    for (const int64_t stop = kStreams ? sketch::unstreamed(to, count) : 0; i < stop; i++)
        sum += squared(to[i] = from[i] * factor);
    for (; i + kLanes * kSums <= count; i += kLanes * kSums) {
        for (int part = 0; part < kSums; part++) {
            Floats values;
            std::memcpy(&values, from + i + part * kLanes, sizeof values);
            values *= factor;
            if (kStreams)
                sketch::stream(to + i + part * kLanes, reinterpret_cast<const float*>(&values));
            else
                std::memcpy(to + i + part * kLanes, &values, sizeof values);
            const Doubles wide = __builtin_convertvector(values, Doubles);
            squares[part] += wide * wide;
        }
    }
    for (; i < count; i++) sum += squared(to[i] = from[i] * factor);
    if (kStreams) sketch::end_stream();
    const Doubles all = (squares[0] + squares[1]) + (squares[2] + squares[3]);
    return sum + ((all[0] + all[1]) + (all[2] + all[3]));
}

using Stage = double(const float*, float*, int64_t, float, bool);

INLINE double stage(const float* from, float* to, int64_t count, float factor, bool streams) {
    return streams ? stage<true>(from, to, count, factor) : stage<false>(from, to, count, factor);
}

double plain(const float* from, float* to, int64_t count, float factor, bool streams) {
    return stage(from, to, count, factor, streams);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) double avx2(const float* from, float* to, int64_t count, float factor, bool streams) {
    return stage(from, to, count, factor, streams);
}
Stage* const fastest = __builtin_cpu_supports("avx2") ? avx2 : plain;
#else
Stage* const fastest = plain;
#endif

}  // namespace

// Writes factor * from to `to`, a part of a vector of so many elements; the sum of its squares.
extern "C" double stage_gradient(const float* from, float* to, int64_t count, float factor, int64_t vector,
                                 int64_t threads) {
    const int64_t blocks = (count + kBlock - 1) / kBlock;
    const bool streams = sketch::streams(count, vector);
    double* const sum = sums.reserve(blocks);
    sketch::share(blocks, threads, [=](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; block++) {
            const int64_t first = block * kBlock;
            sum[block] = fastest(from + first, to + first, std::min(kBlock, count - first), factor, streams);
        }
    });
    return std::accumulate(sum, sum + blocks, 0.0);
}
