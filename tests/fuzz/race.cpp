// Callers at the same time, with helpers of the pool, each of which must get what it would get alone. Built with
// ThreadSanitizer: `race ROUNDS`, exit status 0 if all is well.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

struct Segment {
    const void* data;
    int64_t dtype, start, count;
};

extern "C" {
void sketch_add(int64_t, int64_t, uint64_t, float*, const Segment*, int64_t, float, int64_t);
void sketch_top_k(int64_t, int64_t, uint64_t, const float*, int64_t, int64_t, int64_t*, float*, int64_t);
double stage_gradient(const float*, float*, int64_t, float, int64_t, int64_t);
void hadamard_transform(float*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
void sparse_heaviest(const float*, int64_t, int64_t, int64_t, int64_t, int64_t*, float*, int64_t);
}

namespace {

constexpr int64_t kDim = 204'800, kRows = 3, kCols = 9001, kCount = 300, kShards = 4;

struct Results {
    std::vector<float> table = std::vector<float>(kRows * kCols), values = std::vector<float>(2 * kCount);
    std::vector<int64_t> places = std::vector<int64_t>(2 * kCount);
    double square = 0;

    bool operator==(const Results& other) const {
        return table == other.table && values == other.values && places == other.places && square == other.square;
    }
};

Results work(uint64_t seed, int64_t threads) {
    std::vector<float> given(kDim), vector(kDim);
    for (int64_t i = 0; i < kDim; i++) given[i] = float(int64_t(i * 2654435761u + seed) % 2001 - 1000);
    Results results;
    results.square = stage_gradient(given.data(), vector.data(), kDim, 0.5f, kDim, threads);
    hadamard_transform(vector.data(), kDim, 64, 32, kDim / 64, 0, threads);
    const Segment whole = {vector.data(), 0, 0, kDim};
    sketch_add(kRows, kCols, seed, results.table.data(), &whole, 1, 1.0f, threads);
    sketch_top_k(kRows, kCols, seed, results.table.data(), kDim, kCount, results.places.data(), results.values.data(),
                 threads);
    sparse_heaviest(vector.data(), kDim, 1, kShards, kCount / kShards, results.places.data() + kCount,
                    results.values.data() + kCount, threads);
    return results;
}

}  // namespace

int main(int, char** arguments) {
    const int rounds = std::atoi(arguments[1]);
    std::vector<Results> alone;
    for (uint64_t seed = 0; seed < 3; seed++) alone.push_back(work(seed, 1));
    std::vector<int> wrong(alone.size());
    std::vector<std::thread> callers;
    for (size_t caller = 0; caller < alone.size(); caller++)
        callers.emplace_back([&, caller] {
            for (int round = 0; round < rounds; round++)
                wrong[caller] += !(work(caller, 2 + round % 3) == alone[caller]);
        });
    for (std::thread& caller : callers) caller.join();
    for (int count : wrong)
        if (count) return std::printf("%d results differ\n", count), 1;
    return 0;
}
