// The code of a sparse vector: codec.py in C++. See there for the definition.
#pragma once

#include "bits.hpp"

namespace sparse {

using sketch::Buffer;
using sketch::bit_cast;
using sketch::kSignBit;
using sketch::magnitude;

constexpr int kLevels = 8;
constexpr uint8_t kNegative = 8;
constexpr int64_t kLevelBytes = 2 * (kLevels - 1);  // the first is zero
constexpr uint32_t kInfinite = 0x7F800000;          // above it is what is not a number

// One lane for each of four levels: the widest register that every processor has.
typedef float Sums __attribute__((vector_size(16)));
typedef int32_t Flags __attribute__((vector_size(16)));

struct Code {
    int64_t universe, count;
    int low_bits;
    int64_t value_bytes, low_bytes, high_bytes;

    Code(int64_t universe, int64_t count) : universe(universe), count(count), low_bits(0) {
        while (universe / count >> low_bits > 1) low_bits++;
        value_bytes = kLevelBytes + (count + 1) / 2;
        low_bytes = (count * low_bits + 7) / 8;
        high_bytes = (count + (universe >> low_bits) + 1 + 7) / 8;
    }

    int64_t nbytes() const { return value_bytes + low_bytes + high_bytes; }

    void encode(const int64_t* rows, const float* values, uint8_t* code, float* decoded, Buffer<uint8_t>& kept) const {
        uint8_t* const nibbles = kept.reserve(count + 1);
        fill_nibbles(values, nibbles);
        float meaning[2 * kLevels];
        weigh(values, nibbles, meaning);
        uint16_t upper[kLevels];
        for (int level = 0; level < kLevels; level++) upper[level] = uint16_t(bit_cast<uint32_t>(meaning[level]) >> 16);
        std::memcpy(code, upper + 1, kLevelBytes);
        nibbles[count] = 0;
        for (int64_t i = 0; i < (count + 1) / 2; i++)
            code[kLevelBytes + i] = uint8_t(nibbles[2 * i] | nibbles[2 * i + 1] << 4);
        for (int64_t i = 0; i < count; i++) decoded[i] = meaning[nibbles[i]];
        write_rows(rows, code + value_bytes);
    }

    // Whether these bytes are a code; if not, they may have been read in part.
    bool decode(const uint8_t* code, int64_t* rows, float* values) const {
        float meaning[2 * kLevels];
        uint16_t upper[kLevels] = {};
        std::memcpy(upper + 1, code, kLevelBytes);
        for (int level = 0; level < kLevels; level++) meaning[level] = bit_cast<float>(uint32_t(upper[level]) << 16);
        negate(meaning);
        const uint8_t* const nibbles = code + kLevelBytes;
        for (int64_t i = 0; i < count / 2; i++) {
            values[2 * i] = meaning[nibbles[i] & 15];
            values[2 * i + 1] = meaning[nibbles[i] >> 4];
        }
        if (count % 2) values[count - 1] = meaning[nibbles[count / 2] & 15];
        return read_rows(code + value_bytes, rows);
    }

private:
    static void negate(float* meaning) {
        for (int level = 0; level < kLevels; level++) meaning[kNegative + level] = -meaning[level];
    }

    // The lower bounds of the levels from 2 on.
    void bounds(const float* values, float* bound) const {
        int32_t largest = 0, least = INT32_MAX;
        for (int64_t i = 0; i < count; i++) {
            const int32_t its = int32_t(std::min(magnitude(values[i]), kInfinite));
            largest = std::max(largest, its);
            least = std::min(least, (its - 1) & INT32_MAX);  // zero counts as the largest
        }
        least = std::min(least + (least < INT32_MAX), largest);
        const float seventh = bit_cast<float>(largest) / (1 << (kLevels - 1));
        float first = std::max({bit_cast<float>(least), seventh, 0x1p-126f});
        for (int i = 0; i < kLevels - 2; i++) bound[i] = first *= 2;
    }

    void fill_nibbles(const float* values, uint8_t* nibbles) const {
        float bound[kLevels - 2];
        bounds(values, bound);
        for (int64_t i = 0; i < count; i++) {
            const float its = bit_cast<float>(std::min(magnitude(values[i]), kInfinite));
            int nibble = (values[i] < 0) * kNegative + (its > 0);
            for (int j = 0; j < kLevels - 2; j++) nibble += its >= bound[j];
            nibbles[i] = uint8_t(nibble);
        }
    }

    // A number for each level, the first four apart from the others.
    struct Levels {
        Sums sum[2];
        INLINE Levels operator+(const Levels& other) const {
            return {{sum[0] + other.sum[0], sum[1] + other.sum[1]}};
        }
    };

    // Sums the magnitudes of each level in pairs of neighbours, these in pairs, and so on; beyond the last there are zeros.
    struct InPairs {
        const float* values;
        const uint8_t* nibbles;
        int64_t count;
        Flags only[kLevels][2], number[2] = {};

        static constexpr int64_t kRun = 16;  // a power of two

        InPairs(const float* values, const uint8_t* nibbles, int64_t count)
            : values(values), nibbles(nibbles), count(count) {
            for (int level = 0; level < kLevels; level++)
                for (int half = 0; half < 2; half++) only[level][half] = Flags{0, 1, 2, 3} + 4 * half == level;
        }

        template <int64_t N>
        INLINE Levels run(const float* its_values, const uint8_t* its_nibbles) {
            if constexpr (N > 1) {
                const Levels first = run<N / 2>(its_values, its_nibbles);
                return first + run<N / 2>(its_values + N / 2, its_nibbles + N / 2);
            } else {
                const Flags* its = only[*its_nibbles & (kNegative - 1)];
                const Flags all = Flags{} + int32_t(magnitude(*its_values));
                for (int half = 0; half < 2; half++) number[half] -= its[half];
                return {{bit_cast<Sums>(all & its[0]), bit_cast<Sums>(all & its[1])}};
            }
        }

        // Of `size` values, kRun times a power of two.
        Levels operator()(int64_t first, int64_t size) {
            if (first >= count) return {};
            if (size > kRun) {
                const Levels half = (*this)(first, size / 2);
                return half + (*this)(first + size / 2, size / 2);
            }
            if (first + kRun <= count) return run<kRun>(values + first, nibbles + first);
            float last_values[kRun] = {};
            uint8_t last_nibbles[kRun] = {};  // of level 0, whose mean is zero however many there are
            std::copy(values + first, values + count, last_values);
            std::copy(nibbles + first, nibbles + count, last_nibbles);
            return run<kRun>(last_values, last_nibbles);
        }
    };

    // The nearest number that bfloat16 has, of two the even one; infinite only if it was.
    static float rounded(float mean) {
        const uint32_t bits = bit_cast<uint32_t>(mean);
        if (bits > kInfinite) return bit_cast<float>(0x7FC00000);
        const uint32_t finite = bits < kInfinite ? std::min(bits, uint32_t(0x7F7F0000)) : bits;
        return bit_cast<float>((finite + 0x7FFF + (finite >> 16 & 1)) >> 16 << 16);
    }

    // What each nibble stands for: the mean magnitude of its level, rounded.
    void weigh(const float* values, const uint8_t* nibbles, float* meaning) const {
        InPairs in_pairs(values, nibbles, count);
        int64_t size = InPairs::kRun;
        while (size < count) size *= 2;
        const Levels total = in_pairs(0, size);
        for (int level = 0; level < kLevels; level++) {
            const int32_t number = in_pairs.number[level / 4][level % 4];
            meaning[level] = rounded(total.sum[level / 4][level % 4] / std::max(1.0f, float(number)));
        }
        negate(meaning);
    }

    void write_rows(const int64_t* rows, uint8_t* low) const {
        BitWriter writer(low);
        uint8_t* const high = low + low_bytes;
        std::fill_n(high, high_bytes, uint8_t(0));
        for (int64_t i = 0; i < count; i++) {
            writer.put(uint64_t(rows[i]), low_bits);
            const int64_t bit = (rows[i] >> low_bits) + i;
            high[bit / 8] |= uint8_t(0x80 >> bit % 8);
        }
        writer.close();
    }

    bool read_rows(const uint8_t* low, int64_t* rows) const {
        const uint8_t* const high = low + low_bytes;
        BitReader reader(low, high);
        int64_t found = 0, last = -1;
        for (int64_t byte = 0; byte < high_bytes; byte += 8) {
            uint64_t word = 0;
            const int bytes = int(std::min<int64_t>(8, high_bytes - byte));
            for (int i = 0; i < bytes; i++) word |= uint64_t(high[byte + i]) << (56 - 8 * i);
            for (; word; found++) {
                if (found == count) return false;
                const int ahead = __builtin_clzll(word);
                word ^= uint64_t(1) << 63 >> ahead;
                rows[found] = (8 * byte + ahead - found) << low_bits | int64_t(reader.get(low_bits));
                if (rows[found] <= last) return false;
                last = rows[found];
            }
        }
        return found == count && last < universe;
    }
};

}  // namespace sparse
