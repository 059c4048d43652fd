// DB-LLM's product as the paper counts it: only the ones of the two planes are added, zeros are skipped.
// Built and called by decode_cpu.py; x is transposed, so that the rows of a batch are a vector.

#include <cstdint>
#include <cstring>

namespace {

constexpr uint64_t FIRST = 0x5555555555555555, SECOND = ~FIRST;  // of 32 codes, bit 0 and bit 1

// The rows of a batch, in vectors of 16.
template <int M>
struct Sums {
    static constexpr int WIDTH = M < 16 ? M : 16, COUNT = M / WIDTH;
    typedef float Vector __attribute__((vector_size(WIDTH * 4)));
    Vector at[COUNT] = {};

    inline void add(const float* row) {
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; i++) {
            Vector values;
            std::memcpy(&values, row + i * WIDTH, sizeof(values));
            at[i] += values;
        }
    }
};

template <>
struct Sums<1> {
    static constexpr int COUNT = 1;
    float at[1] = {};

    inline void add(const float* row) { at[0] += *row; }
};

inline void add(uint64_t word, const float* x, float& sum) {
    for (; word; word &= word - 1) sum += x[__builtin_ctzll(word) / 2];
}

// Adds rows of x, [columns][M], where a bit of `word` is set, to two sums in turn: an addition takes 4 cycles.
template <int M>
inline void add(uint64_t word, const float* x, Sums<M>& even, Sums<M>& odd) {
    while (word) {
        even.add(x + (__builtin_ctzll(word) / 2) * M);
        word &= word - 1;
        if (!word) return;
        odd.add(x + (__builtin_ctzll(word) / 2) * M);
        word &= word - 1;
    }
}

template <int M>
void product(const uint8_t* codes, const float* alpha1, const float* alpha2, const float* x, float* y, int64_t rows,
             int64_t columns, int64_t group) {
    for (int64_t row = 0; row < rows; row++, y += M) {
        Sums<M> total;
        for (int64_t start = 0; start < columns; start += group) {
            Sums<M> first[2], second[2];
            for (int64_t k = start; k < start + group; k += 32, codes += 8) {
                uint64_t word;
                std::memcpy(&word, codes, 8);
                if constexpr (M == 1) {  // in turn, branches are not foreseen
                    add(word & FIRST, x + k, first[0].at[0]);
                    add(word & SECOND, x + k, second[0].at[0]);
                    continue;
                }
                add<M>(word & FIRST, x + k * M, first[0], first[1]);
                add<M>(word & SECOND, x + k * M, second[0], second[1]);
            }
            const float a = *alpha1++, b = *alpha2++;
            for (int i = 0; i < Sums<M>::COUNT; i++)
                total.at[i] += a * (first[0].at[i] + first[1].at[i]) + b * (second[0].at[i] + second[1].at[i]);
        }
        std::memcpy(y, total.at, sizeof(total.at));
    }
}

}  // namespace

extern "C" void skip_zeros(const uint8_t* codes, const float* alpha1, const float* alpha2, const float* x, float* y,
                           int64_t rows, int64_t columns, int64_t group, int64_t batch) {
    if (batch == 1) product<1>(codes, alpha1, alpha2, x, y, rows, columns, group);
    if (batch == 16) product<16>(codes, alpha1, alpha2, x, y, rows, columns, group);
    if (batch == 64) product<64>(codes, alpha1, alpha2, x, y, rows, columns, group);
}
