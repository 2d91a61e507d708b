// The orthonormal Hadamard transform of the blocks of matrices, in place. See hvd_sketch/mixing.py.

#include <cmath>

#include "share.hpp"

// Registers with numbers would otherwise lie in memory.
#define UNROLL _Pragma("GCC unroll 8")

namespace {

constexpr int64_t kTile = 1 << 12;  // entries that stay in the first cache between one side and the other
constexpr int64_t kWorthAThread = 1 << 16;  // entries: some tens of microseconds
constexpr int64_t kNext = 64;  // entries further on, memory is asked for: a processor does not guess so many rows
constexpr int kLanes = 8, kAtOnce = 8;  // in a register, and registers

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef Floats Anywhere __attribute__((aligned(4), may_alias));  // in memory
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

// So many rows of so many columns, from one row to the next `stride` entries.
struct Rows {
    float* data;
    int64_t stride;
};

// Matrices of any number of blocks of (down, along), and of `behind` columns; along is a divisor of behind.
struct Blocks {
    float* values;
    int64_t along, down, behind;
    bool inverse;

    int64_t wide() const { return kTile / down; }
    int64_t across() const { return (behind + wide() - 1) / wide(); }
};

INLINE float factor(int64_t size) { return float(1.0 / std::sqrt(double(size))); }

// Of the entries of a register, i with i + kWidth.
template <int kWidth>
INLINE void butterfly(Floats& values) {
    constexpr int k = kWidth, minus = int(sketch::kSignBit);
    constexpr Ints other = {0 ^ k, 1 ^ k, 2 ^ k, 3 ^ k, 4 ^ k, 5 ^ k, 6 ^ k, 7 ^ k};
    constexpr auto sign = [](int i) { return i & k ? minus : 0; };
    constexpr Ints signs = {sign(0), sign(1), sign(2), sign(3), sign(4), sign(5), sign(6), sign(7)};
    values = __builtin_shuffle(values, other) + Floats(Ints(values) ^ signs);
}

// Of registers, i with i + width, for width 1, 2 … kMany / 2.
template <int kMany>
INLINE void butterflies(Floats* values) {
    UNROLL
    for (int width = 1; width < kMany; width *= 2) {
        UNROLL
        for (int i = 0; i < kMany; i++) {
            if (i & width) continue;
            const Floats one = values[i], other = values[i + width];
            values[i] = one + other;
            values[i + width] = one - other;
        }
    }
}

template <int kMany>
INLINE void load(Floats* values, const float* from, int64_t step) {
    UNROLL
    for (int i = 0; i < kMany; i++) {
        values[i] = *reinterpret_cast<const Anywhere*>(from + i * step);
        __builtin_prefetch(from + i * step + kNext);
    }
}

template <int kMany>
INLINE void store(const Floats* values, float* to, int64_t step, float factor) {
    UNROLL
    for (int i = 0; i < kMany; i++) *reinterpret_cast<Anywhere*>(to + i * step) = values[i] * factor;
}

template <int kAlong>
INLINE void along(Rows from, Rows to, int64_t rows, int64_t cols) {
    constexpr int many = std::max(1, kAlong / kLanes);
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t col = 0; col < cols; col += many * kLanes) {
            Floats values[many];
            load<many>(values, from.data + row * from.stride + col, kLanes);
            UNROLL
            for (int i = 0; i < many; i++) {
                butterfly<1>(values[i]);
                if (kAlong > 2) butterfly<2>(values[i]);
                if (kAlong > 4) butterfly<4>(values[i]);
            }
            butterflies<many>(values);
            store<many>(values, to.data + row * to.stride + col, kLanes, factor(kAlong));
        }
    }
}

INLINE void along(Rows from, Rows to, int64_t rows, int64_t cols, int64_t size) {
    switch (size) {
        case 2: return along<2>(from, to, rows, cols);
        case 4: return along<4>(from, to, rows, cols);
        case 8: return along<8>(from, to, rows, cols);
        case 16: return along<16>(from, to, rows, cols);
        case 32: return along<32>(from, to, rows, cols);
        case 64: return along<64>(from, to, rows, cols);
    }
}

// Of rows, i with i + width, for width step, 2 step … kMany / 2 step.
template <int kMany>
INLINE void down(Rows from, Rows to, int64_t rows, int64_t cols, int64_t step, float factor) {
    for (int64_t row = 0; row < rows; row++) {
        if (row & step * (kMany - 1)) continue;
        for (int64_t col = 0; col < cols; col += kLanes) {
            Floats values[kMany];
            load<kMany>(values, from.data + row * from.stride + col, step * from.stride);
            butterflies<kMany>(values);
            store<kMany>(values, to.data + row * to.stride + col, step * to.stride, factor);
        }
    }
}

// By way of rows between.
INLINE void down(Rows from, Rows between, Rows to, int64_t rows, int64_t cols) {
    for (int64_t step = 1; step < rows; step *= kAtOnce) {
        const int64_t many = std::min<int64_t>(kAtOnce, rows / step);
        const bool last = step * many == rows;
        const Rows next = last ? to : between;
        const float scale = last ? factor(rows) : 1.0f;
        if (many == 8) down<8>(from, next, rows, cols, step, scale);
        if (many == 4) down<4>(from, next, rows, cols, step, scale);
        if (many == 2) down<2>(from, next, rows, cols, step, scale);
        from = between;
    }
}

INLINE void copy(Rows from, Rows to, int64_t rows, int64_t cols) {
    for (int64_t row = 0; row < rows; row++)
        std::memcpy(to.data + row * to.stride, from.data + row * from.stride, cols * sizeof(float));
}

// Blocks beside each other, which are `down` rows.
INLINE void transform(const Blocks& blocks, Rows place, int64_t cols) {
    alignas(sketch::kLine) float memory[kTile];
    const Rows kept = {memory, blocks.wide()};
    const int64_t filled = (cols + kLanes - 1) / kLanes * kLanes;
    const bool is_odd = filled != cols;
    const Rows whole = is_odd ? kept : place;
    if (is_odd) {
        std::fill_n(memory, kTile, 0.0f);
        copy(place, kept, blocks.down, cols);
    }
    if (blocks.down == 1) {
        along(whole, whole, 1, filled, blocks.along);
    } else if (blocks.along == 1) {
        down(whole, kept, whole, blocks.down, filled);
    } else if (blocks.inverse) {
        down(whole, kept, kept, blocks.down, filled);
        along(kept, whole, blocks.down, filled, blocks.along);
    } else {
        along(whole, kept, blocks.down, filled, blocks.along);
        down(kept, kept, whole, blocks.down, filled);
    }
    if (is_odd) copy(kept, place, blocks.down, cols);
}

INLINE void transform(const Blocks& blocks, int64_t begin, int64_t end) {
    const int64_t across = blocks.across(), wide = blocks.wide();
    for (int64_t tile = begin; tile < end; tile++) {
        const int64_t col = tile % across * wide;
        float* const data = blocks.values + tile / across * blocks.down * blocks.behind + col;
        transform(blocks, {data, blocks.behind}, std::min(wide, blocks.behind - col));
    }
}

using Transform = void(const Blocks&, int64_t, int64_t);

void plain(const Blocks& blocks, int64_t begin, int64_t end) { transform(blocks, begin, end); }

#if defined(__x86_64__)
__attribute__((target("avx2"))) void avx2(const Blocks& blocks, int64_t begin, int64_t end) {
    transform(blocks, begin, end);
}
Transform* const fastest = __builtin_cpu_supports("avx2") ? avx2 : plain;
#else
Transform* const fastest = plain;
#endif

}  // namespace

// Matrices of `behind` columns, one below the other, so many entries in all, each block of (down, along) of them by
// itself: first along the rows, then down the columns, the inverse in the other order. Sides of blocks are powers of
// two up to 64. With down = 1 the entries are one row.
extern "C" void hadamard_transform(float* values, int64_t count, int64_t along, int64_t down, int64_t behind,
                                   int64_t inverse, int64_t threads) {
    const Blocks blocks = {values, along, down, down == 1 ? count : behind, inverse != 0};
    if (count == 0) return;
    const int64_t tiles = count / (down * blocks.behind) * blocks.across();
    sketch::share(tiles, std::clamp<int64_t>(count / kWorthAThread, 1, threads),
                  [&](int64_t begin, int64_t end) { fastest(blocks, begin, end); });
}
