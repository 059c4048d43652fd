// Linear layers of packed weights on a CPU; compiled at first use by build.py for the machine it runs on, called by
// ../backends/cpu.py through ctypes.
//
// A weight is never expanded. A word of codes is shifted so that every 16-bit half holds one code in its low bits; the
// codes, or 16-bit integers looked up by them in a register, are multiplied with inputs in 16-bit fixed point and summed
// exactly in 32 bits; each group's sum is scaled once, in float32:
//
//     y[m][n] = sum_g (sum_d A[n][d][g] * dot_d[n][m][g] + B[n][g] * X[m][g]),    X[m][g] = sum of x over group g
//
// with d over the integer planes of a format: affine has one, of codes (A = scale, B = -scale * zero point); sign has
// one, of bits (A = 2, B = -1); dual-binary two, of bits; a codebook one or two for each direction, of its entries in
// fixed point. An input has 16 bits below the largest of the 64 inputs that share its scale, float32 inputs 31: their
// remainders are a second row.
//
// Layout: a chunk is one vector of codes. Its 16-bit half h holds codes h * PER_HALF .. of the row, so the inputs are
// transposed once a call, [half][code] -> [code][half]; a 32-bit lane sums 2 * PER_HALF neighbouring codes, of one group.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

enum Kind { AFFINE, CODEBOOK, DUAL_BINARY, SIGN };
enum Type { FLOAT32, FLOAT16, BFLOAT16, INT8 };

// Mirrored by Layer in ../backends/cpu.py.
struct Layer {
    int64_t rows, columns, group, groups, rank, basis_rows;
    int32_t kind, bits;
    int32_t zero_point;  // affine: 0 none, 1 integer, 2 float
    int32_t symmetric;   // dual-binary
    int32_t types[6];    // of the tensors
};

// Mirrored by the order of Kernels.linear's arguments: the tensors of a layer in the order of Format.stored.
struct Tensors {
    const void* at[6];
};

// ---------------------------------------------------------------------------------------------- numbers

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float from_half(uint16_t half) {
    const uint32_t word = uint32_t(half) << 16, twice = word + word;
    const float normal = float_of((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
    const float tiny = float_of((twice >> 17) | (126u << 23)) - 0.5f;
    return float_of((word & 0x80000000u) | (twice < (1u << 27) ? bits_of(tiny) : bits_of(normal)));
}

inline uint16_t to_half(float value) {
    const uint32_t word = bits_of(value), twice = word + word;
    float base = (std::fabs(value) * 0x1.0p+112f) * 0x1.0p-110f;
    uint32_t bias = twice & 0xFF000000u;
    bias = bias < 0x71000000u ? 0x71000000u : bias;
    base = float_of((bias >> 1) + 0x07800000u) + base;
    const uint32_t bits = bits_of(base), magnitude = ((bits >> 13) & 0x7C00u) + (bits & 0x0FFFu);
    return uint16_t((word & 0x80000000u) >> 16 | (twice > 0xFF000000u ? 0x7E00u : magnitude));
}

inline float from_bfloat(uint16_t bfloat) { return float_of(uint32_t(bfloat) << 16); }

inline uint16_t to_bfloat(float value) {
    const uint32_t word = bits_of(value);
    return uint16_t(value != value ? 0x7FC0u : (word + 0x7FFFu + ((word >> 16) & 1)) >> 16);
}

// `count` elements of any type from `first`, as float32.
void load(const void* from, int type, int64_t first, int64_t count, float* to) {
    if (type == FLOAT32) {
        std::memcpy(to, static_cast<const float*>(from) + first, count * sizeof(float));
    } else if (type == INT8) {
        const int8_t* source = static_cast<const int8_t*>(from) + first;
        for (int64_t i = 0; i < count; i++) to[i] = source[i];
    } else if (type == BFLOAT16) {
        const uint16_t* source = static_cast<const uint16_t*>(from) + first;
        for (int64_t i = 0; i < count; i++) to[i] = from_bfloat(source[i]);
    } else {
        const uint16_t* source = static_cast<const uint16_t*>(from) + first;
        int64_t i = 0;
#if defined(__F16C__)
        for (; i + 8 <= count; i += 8)
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
#endif
        for (; i < count; i++) to[i] = from_half(source[i]);
    }
}

inline float load_one(const void* from, int type, int64_t index) {
    float value;
    load(from, type, index, 1, &value);
    return value;
}

inline void store_one(void* to, int type, int64_t index, float value) {
    if (type == FLOAT32)
        static_cast<float*>(to)[index] = value;
    else
        static_cast<uint16_t*>(to)[index] = type == FLOAT16 ? to_half(value) : to_bfloat(value);
}

void store(void* to, int type, int64_t first, int64_t count, const float* from) {
    if (type == FLOAT32) {
        std::memcpy(static_cast<float*>(to) + first, from, count * sizeof(float));
        return;
    }
    uint16_t* target = static_cast<uint16_t*>(to) + first;
    if (type == BFLOAT16)
        for (int64_t i = 0; i < count; i++) target[i] = to_bfloat(from[i]);
    else
        for (int64_t i = 0; i < count; i++) target[i] = to_half(from[i]);
}

// ---------------------------------------------------------------------------------------------- vectors

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VBMI__)
#define QCLI_512 1
#if defined(__AVX512BF16__)
#define QCLI_BFLOAT16 1
#endif
constexpr int WIDTH = 64, LOOKUP_BITS = 5;
const char* const ISA = "AVX-512";
#elif defined(__AVX2__)
constexpr int WIDTH = 32, LOOKUP_BITS = 4;
const char* const ISA = "AVX2";
#elif defined(__aarch64__)
constexpr int WIDTH = 16, LOOKUP_BITS = 4;
const char* const ISA = "NEON";
#else
constexpr int WIDTH = 16, LOOKUP_BITS = 0;
const char* const ISA = "portable";
#endif

constexpr int LANES = WIDTH / 4, HALVES = WIDTH / 2, QUADS = WIDTH / 8;
constexpr int SHARED = 64;       // inputs that share a scale
constexpr int64_t AHEAD = 8192;  // bytes of codes fetched in advance: the hardware stops at the end of a page

typedef int32_t Int __attribute__((vector_size(WIDTH)));
typedef int16_t Short __attribute__((vector_size(WIDTH)));
typedef uint16_t Half __attribute__((vector_size(WIDTH)));
typedef uint64_t Quad __attribute__((vector_size(WIDTH)));
typedef float Float __attribute__((vector_size(WIDTH)));

template <class V, class T>
inline V read(const T* from) {
    V vector;
    std::memcpy(&vector, from, sizeof(V));
    return vector;
}

inline Float floats(Int values) { return __builtin_convertvector(values, Float); }

inline Float all(float value) {
#if defined(QCLI_512)
    return (Float)_mm512_set1_ps(value);
#elif defined(__AVX2__)
    return (Float)_mm256_set1_ps(value);
#else
    Float values;
    for (int lane = 0; lane < LANES; lane++) values[lane] = value;
    return values;
#endif
}

inline float total(Float values) {
#if defined(QCLI_512)
    return _mm512_reduce_add_ps((__m512)values);
#else
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += values[lane];
    return sum;
#endif
}

// a * b + c, rounded once where the machine can.
inline Float fused(Float a, Float b, Float c) {
#if defined(QCLI_512)
    return (Float)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Float)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (Float)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// sum + a[even] * b[even] + a[odd] * b[odd] in every 32-bit lane.
inline Int dot(Int sum, Short a, Half b) {
#if defined(QCLI_512) && defined(__AVX512VNNI__)
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(b), "v"(a));  // gcc 12 copies the intrinsic's operands about
    return sum;
#elif defined(QCLI_512)
    return sum + (Int)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return sum + (Int)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__aarch64__)
    const int16x8_t left = (int16x8_t)a, right = (int16x8_t)b;
    return sum + (Int)vpaddq_s32(vmull_s16(vget_low_s16(left), vget_low_s16(right)), vmull_high_s16(left, right));
#elif defined(__SSE2__)
    return sum + (Int)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    const Int left = (Int)a, right = (Int)b;
    return sum + ((left << 16) >> 16) * ((right << 16) >> 16) + (left >> 16) * (right >> 16);
#endif
}

// A table of 16-bit integers that a vector of codes looks up.
struct Lookup {
#if defined(QCLI_512)
    Short entries;
    void set(const int16_t* values, int bits) {  // repeated, so that bits above a code's do not matter
        for (int i = 0; i < HALVES; i++) entries[i] = values[i & ((1 << bits) - 1)];
    }
    template <int BITS>
    Half operator()(Half codes) const {
        return (Half)_mm512_permutexvar_epi16((__m512i)codes, (__m512i)entries);
    }
#else
    uint8_t low[WIDTH], high[WIDTH];  // bytes of the entries, for each 128 bits
    void set(const int16_t* values, int bits) {
        for (int i = 0; i < WIDTH; i++) {
            const uint16_t value = uint16_t(values[i & 15 & ((1 << bits) - 1)]);
            low[i] = uint8_t(value), high[i] = uint8_t(value >> 8);
        }
    }
    template <int BITS>
    Half operator()(Half codes) const {
        const Half places = (codes & uint16_t((1 << BITS) - 1)) | uint16_t(0x8000);
#if defined(__AVX2__)
        const Half lows = (Half)_mm256_shuffle_epi8(read<__m256i>(low), (__m256i)places);
        const Half highs = (Half)_mm256_shuffle_epi8(read<__m256i>(high), (__m256i)places);
        return lows | (highs << 8);
#elif defined(__aarch64__)
        const Half lows = (Half)vqtbl1q_u8(vld1q_u8(low), (uint8x16_t)places);
        const Half highs = (Half)vqtbl1q_u8(vld1q_u8(high), (uint8x16_t)places);
        return lows | (highs << 8);
#else
        return places;  // never called: LOOKUP_BITS is 0
#endif
    }
#endif
};

// How a vector holds codes of a width.
template <int BITS>
struct Packing {
    static constexpr int PER_HALF = BITS == 1 ? 16 : BITS == 2 ? 8 : BITS <= 4 ? 4 : 2;
    static constexpr int CODES = HALVES * PER_HALF;
    static constexpr int QUAD_BYTES = PER_HALF * BITS / 2;
    static constexpr int BYTES = QUADS * QUAD_BYTES;
    static constexpr int CHUNKS = SHARED / (2 * PER_HALF);  // whose inputs share scales

    // The chunk at `from`, of whose bytes `left` are the row's; every 16-bit half holds PER_HALF codes in its low bits.
    static inline Half chunk(const uint8_t* from, int64_t left) {
#if defined(QCLI_512)
        const uint64_t mask = ~uint64_t(0) >> (64 - (left < BYTES ? left : BYTES));
        __m512i raw = _mm512_maskz_loadu_epi8(mask, from);
        if constexpr (QUAD_BYTES < 8) {
            alignas(64) static constexpr auto places = spread();
            alignas(64) static constexpr auto offsets = starts();
            raw = _mm512_permutexvar_epi8(_mm512_load_si512(places.at), raw);
            raw = _mm512_multishift_epi64_epi8(_mm512_load_si512(offsets.at), raw);
        }
        return (Half)raw;
#else
        uint8_t copy[BYTES + 8] = {};
        if (left < BYTES + 8) {  // what follows may not be ours to read
            std::memcpy(copy, from, left < BYTES ? left : BYTES);
            from = copy;
        }
        Quad quads;
        if constexpr (QUAD_BYTES == 8) {
            quads = read<Quad>(from);
        } else {
            for (int quad = 0; quad < QUADS; quad++) {
                uint64_t word;
                std::memcpy(&word, from + quad * QUAD_BYTES, 8);
                quads[quad] = word;
            }
            constexpr int used = PER_HALF * BITS, free = 16 - used;
            constexpr uint64_t mask = (uint64_t(1) << used) - 1;
            quads = (quads & mask) | ((quads << free) & (mask << 16)) | ((quads << (2 * free)) & (mask << 32)) |
                    ((quads << (3 * free)) & (mask << 48));
        }
        return (Half)quads;
#endif
    }

    struct Bytes {
        uint8_t at[64];
    };
    static constexpr Bytes spread() {
        Bytes bytes{};
        for (int i = 0; i < 64; i++) bytes.at[i] = uint8_t((i / 8) * QUAD_BYTES + (i % 8 < QUAD_BYTES ? i % 8 : 0));
        return bytes;
    }
    static constexpr Bytes starts() {
        Bytes bytes{};
        for (int i = 0; i < 64; i++) bytes.at[i] = uint8_t(((i % 8) / 2) * PER_HALF * BITS + (i % 2) * 8);
        return bytes;
    }
};

// ---------------------------------------------------------------------------------------------- the product

enum Decoder { CODES, BITS_OF_CODES, ONE_LOOKUP, TWO_LOOKUPS };

constexpr int planes_of(int decoder) { return decoder == BITS_OF_CODES || decoder == TWO_LOOKUPS ? 2 : 1; }

// Inputs of one call, prepared once.
struct Inputs {
    int64_t rows = 0;                 // of x; with float32 followed by as many of remainders
    int64_t chunks = 0, blocks = 0;   // blocks of chunks whose inputs share scales
    int64_t stride = 0;               // of codes
    std::vector<int16_t> codes;       // [rows][chunk][code of a half][half]
    std::vector<float> scales;        // [rows][block][lane]
    int64_t groups = 0;               // of a layer, padded to whole vectors
    std::vector<float> sums;          // [rows][groups]
    std::vector<float> values;        // [rows][columns], for layers without a fast kernel
    std::vector<int32_t> group_of;    // [chunks][lane]: first[chunk] + this is a lane's group; if groups split chunks
    std::vector<int32_t> first;       // [chunks]
};

// What the kernel of a few rows reads.
struct Rows {
    const uint8_t* codes[2];
    int64_t bytes;            // of a row
    const float* tables;      // A, [plane][row][groups]
    int64_t plane, groups;    // strides of them
    const Lookup* lookups;    // of the planes
    int64_t ahead;            // bytes from these codes to those that are fetched meanwhile
    int64_t run;              // chunks in a group, if a group is whole chunks
};

template <bool SPLIT>
inline Float group_scales(const float* table, const Inputs& inputs, int64_t chunk) {
    const float* from = table + inputs.first[chunk];
    if constexpr (!SPLIT) {
        return all(*from);
    } else {
        const int32_t* places = &inputs.group_of[chunk * LANES];
#if defined(QCLI_512)
        return (Float)_mm512_permutexvar_ps(_mm512_loadu_si512(places), _mm512_loadu_ps(from));
#elif defined(__AVX2__)
        return (Float)_mm256_permutevar8x32_ps(_mm256_loadu_ps(from), read<__m256i>(places));
#else
        Float scales;
        for (int lane = 0; lane < LANES; lane++) scales[lane] = from[places[lane]];
        return scales;
#endif
    }
}

// Adds the products of N rows of the weight with M rows of inputs, from `row`, to out[M][N]: the sum of a vector's lanes.
template <int BITS, int DECODER, int N, int M, bool SPLIT>
void product(const Rows& rows, const Inputs& inputs, int64_t row, Float* out) {
    using P = Packing<BITS>;
    constexpr int D = planes_of(DECODER);
    // Sums of a block stay below 2^31; one lookup's integers are as large as those of a chunk permit.
    constexpr bool SUMS_RUNS = !SPLIT && DECODER != ONE_LOOKUP;
    const int16_t* x = inputs.codes.data() + row * inputs.stride;
    const float* scales = inputs.scales.data() + row * inputs.blocks * LANES;
    Lookup lookups[D];
    if constexpr (DECODER == ONE_LOOKUP || DECODER == TWO_LOOKUPS)
        for (int d = 0; d < D; d++) lookups[d] = rows.lookups[d];
    Float sums[N][M] = {};
    int64_t group_end = 0;  // in chunks
    for (int64_t block = 0; block < inputs.blocks; block++) {
        const int64_t stop = std::min<int64_t>((block + 1) * P::CHUNKS, inputs.chunks);
        Float part[N][M] = {};
        for (int64_t chunk = block * P::CHUNKS; chunk < stop;) {
            Int dots[D][N][M] = {};
            if (chunk == group_end) group_end += rows.run;
            const int64_t first = chunk, next = SUMS_RUNS ? std::min(stop, group_end) : chunk + 1;
            do {
                Half words[N];
#pragma GCC unroll 2
                for (int n = 0; n < N; n++) {
                    const uint8_t* codes = rows.codes[n] + chunk * P::BYTES;
                    __builtin_prefetch(codes + rows.ahead);
                    words[n] = P::chunk(codes, rows.bytes - chunk * P::BYTES);
                }
                const int16_t* inputs_of_chunk = x + chunk * P::CODES;
#pragma GCC unroll 16
                for (int code = 0; code < P::PER_HALF; code++) {
                    Half planes[D][N];
#pragma GCC unroll 2
                    for (int n = 0; n < N; n++) {
                        const Half shifted = words[n] >> (BITS * code);
                        if constexpr (DECODER == CODES) {
                            planes[0][n] = shifted & uint16_t((1 << BITS) - 1);
                        } else if constexpr (DECODER == BITS_OF_CODES) {
                            planes[0][n] = shifted & uint16_t(1);
                            planes[1][n] = shifted & uint16_t(2);
                        } else {
#pragma GCC unroll 2
                            for (int d = 0; d < D; d++) planes[d][n] = lookups[d].template operator()<BITS>(shifted);
                        }
                    }
#pragma GCC unroll 4
                    for (int m = 0; m < M; m++) {
                        const Short values = read<Short>(inputs_of_chunk + m * inputs.stride + code * HALVES);
#pragma GCC unroll 2
                        for (int n = 0; n < N; n++)
#pragma GCC unroll 2
                            for (int d = 0; d < D; d++) dots[d][n][m] = dot(dots[d][n][m], values, planes[d][n]);
                    }
                }
            } while (++chunk < next);
#pragma GCC unroll 2
            for (int n = 0; n < N; n++)
#pragma GCC unroll 2
                for (int d = 0; d < D; d++) {
                    const float* table = rows.tables + d * rows.plane + n * rows.groups;
                    const Float scale = group_scales<SPLIT>(table, inputs, first);
#pragma GCC unroll 4
                    for (int m = 0; m < M; m++) part[n][m] = fused(floats(dots[d][n][m]), scale, part[n][m]);
                }
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            const Float scale = read<Float>(scales + (m * inputs.blocks + block) * LANES);
#pragma GCC unroll 2
            for (int n = 0; n < N; n++) sums[n][m] = fused(part[n][m], scale, sums[n][m]);
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) out[m * N + n] += sums[n][m];
}

constexpr int PAIR = 2;  // rows of the weight computed together

template <int BITS, int DECODER, bool SPLIT>
void products(const Rows& rows, const Inputs& inputs, int64_t count, Float* out) {
    int64_t row = 0;
    for (; row + 4 <= count; row += 4) product<BITS, DECODER, PAIR, 4, SPLIT>(rows, inputs, row, out + row * PAIR);
    if (row + 2 <= count) {
        product<BITS, DECODER, PAIR, 2, SPLIT>(rows, inputs, row, out + row * PAIR);
        row += 2;
    }
    if (row < count) product<BITS, DECODER, PAIR, 1, SPLIT>(rows, inputs, row, out + row * PAIR);
}

typedef void (*Products)(const Rows&, const Inputs&, int64_t, Float*);

template <int BITS, int DECODER>
Products products_of(bool split) {
    return split ? &products<BITS, DECODER, true> : &products<BITS, DECODER, false>;
}

template <int DECODER>
Products lookups_of(int bits, bool split) {
    if (bits == 1) return products_of<1, DECODER>(split);
    if (bits == 2) return products_of<2, DECODER>(split);
    if (bits == 3) return products_of<3, DECODER>(split);
    if (bits == 4) return products_of<4, DECODER>(split);
    return products_of<5, DECODER>(split);
}

Products kernel_of(int bits, int decoder, bool split) {
    if (decoder == BITS_OF_CODES) return products_of<2, BITS_OF_CODES>(split);
    if (decoder == ONE_LOOKUP) return lookups_of<ONE_LOOKUP>(bits, split);
    if (decoder == TWO_LOOKUPS) return lookups_of<TWO_LOOKUPS>(bits, split);
    if (bits == 6) return products_of<6, CODES>(split);
    if (bits == 7) return products_of<7, CODES>(split);
    if (bits == 8) return products_of<8, CODES>(split);
    return lookups_of<CODES>(bits, split);
}

int per_half(int bits) { return bits == 1 ? 16 : bits == 2 ? 8 : bits <= 4 ? 4 : 2; }

bool is_fast(const Layer& layer) {
    if (layer.kind == CODEBOOK && layer.bits > LOOKUP_BITS) return false;
    return layer.groups == 1 || layer.group % (2 * per_half(layer.bits)) == 0;
}

bool splits_chunks(const Layer& layer) {
    return layer.groups > 1 && layer.group % (HALVES * per_half(layer.bits)) != 0;
}

// ---------------------------------------------------------------------------------------------- inputs

// The largest magnitude; infinity if a value is not finite.
float largest(const float* values, int64_t count) {
    float most = 0, bad = 0;
    for (int64_t i = 0; i < count; i++) {
        const float size = std::fabs(values[i]);
        most = size > most ? size : most;
        bad += values[i] - values[i];  // NaN unless finite
    }
    return bad == 0 ? most : INFINITY;
}

// Quantizes one row of floats, padded to whole chunks; where `rest` the remainders replace it.
template <int PER_HALF>
void fixed_point(float* values, int64_t chunks, int16_t* codes, float* scales, bool rest) {
    constexpr int CODES = HALVES * PER_HALF, LANE = 2 * PER_HALF, CHUNKS = SHARED / LANE;
    int16_t natural[CODES];
    for (int64_t begin = 0; begin < chunks; begin += CHUNKS, scales += LANES) {
        const int64_t end = std::min<int64_t>(begin + CHUNKS, chunks);
        for (int lane = 0; lane < LANES; lane++) {
            float most = 0;
            for (int64_t chunk = begin; chunk < end; chunk++) {
                const float* from = values + chunk * CODES + lane * LANE;
                for (int i = 0; i < LANE; i++) most = std::fabs(from[i]) > most ? std::fabs(from[i]) : most;
            }
            scales[lane] = std::fmax(most / 32767, 1e-37f);
        }
        for (int64_t chunk = begin; chunk < end; chunk++) {
            float* from = values + chunk * CODES;
            for (int lane = 0; lane < LANES; lane++) {
                const float scale = scales[lane], inverse = 1 / scale;
                for (int i = lane * LANE; i < (lane + 1) * LANE; i++) {
                    const float shifted = from[i] * inverse + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
                    natural[i] = int16_t(bits_of(shifted));
                    if (rest) from[i] -= (shifted - 12582912.0f) * scale;
                }
            }
            int16_t* to = codes + chunk * CODES;
            for (int code = 0; code < PER_HALF; code++)
                for (int half = 0; half < HALVES; half++) to[code * HALVES + half] = natural[half * PER_HALF + code];
        }
    }
}

void fixed_point(int bits, float* values, int64_t chunks, int16_t* codes, float* scales, bool rest) {
    const int width = per_half(bits);
    if (width == 16) return fixed_point<16>(values, chunks, codes, scales, rest);
    if (width == 8) return fixed_point<8>(values, chunks, codes, scales, rest);
    if (width == 4) return fixed_point<4>(values, chunks, codes, scales, rest);
    return fixed_point<2>(values, chunks, codes, scales, rest);
}

float sum_of(const float* values, int64_t count) {
    Float sums = {};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) sums += read<Float>(values + i);
    float rest = 0;
    for (; i < count; i++) rest += values[i];
    return total(sums) + rest;
}

void prepare(const Layer& layer, const Tensors& tensors, const void* x, int type, int64_t rows, Inputs& inputs) {
    const bool fast = is_fast(layer), twice = fast && type == FLOAT32;
    const int64_t columns = layer.columns;
    const int64_t codes = HALVES * per_half(layer.bits), lane = 2 * per_half(layer.bits);
    inputs.rows = rows * (twice ? 2 : 1);
    inputs.chunks = (columns + codes - 1) / codes;
    const int64_t together = SHARED / lane;
    inputs.blocks = (inputs.chunks + together - 1) / together;
    inputs.stride = inputs.chunks * codes;
    inputs.groups = (layer.groups + LANES - 1) / LANES * LANES;
    inputs.sums.assign(rows * inputs.groups, 0);
    if (fast) {
        inputs.codes.resize(inputs.rows * inputs.stride);
        inputs.scales.resize(inputs.rows * inputs.blocks * LANES);
        inputs.first.resize(inputs.chunks);
        for (int64_t chunk = 0; chunk < inputs.chunks; chunk++) inputs.first[chunk] = int32_t(chunk * codes / layer.group);
        if (splits_chunks(layer)) {
            inputs.group_of.resize(inputs.chunks * LANES);
            for (int64_t i = 0; i < inputs.chunks * LANES; i++)
                inputs.group_of[i] = int32_t(std::min(i * lane, columns - 1) / layer.group) - inputs.first[i / LANES];
        }
    }
    static thread_local std::vector<float> scale, row;
    if (layer.kind == SIGN) {
        scale.resize(columns);
        load(tensors.at[1], layer.types[1], 0, columns, scale.data());
    }
    const int64_t width = fast ? inputs.stride : columns;
    row.assign(width, 0);
    if (!fast) inputs.values.resize(rows * columns);
    for (int64_t m = 0; m < rows; m++) {
        float* values = fast ? row.data() : inputs.values.data() + m * columns;
        load(x, type, m * columns, columns, values);
        if (layer.kind == SIGN)
            for (int64_t i = 0; i < columns; i++) values[i] *= scale[i];
        if (!fast) continue;
        for (int64_t i = columns; i < width; i++) values[i] = 0;
        for (int64_t g = 0; g < layer.groups; g++) {
            const int64_t start = g * layer.group;
            inputs.sums[m * inputs.groups + g] = sum_of(values + start, std::min(layer.group, columns - start));
        }
        float* scales = inputs.scales.data() + m * inputs.blocks * LANES;
        const bool finite = largest(values, columns) < INFINITY;
        if (!finite)
            for (int64_t i = 0; i < width; i++) values[i] = 0;
        fixed_point(layer.bits, values, inputs.chunks, inputs.codes.data() + m * inputs.stride, scales, twice);
        if (twice)
            fixed_point(layer.bits, values, inputs.chunks, inputs.codes.data() + (m + rows) * inputs.stride,
                        scales + rows * inputs.blocks * LANES, false);
        if (!finite) scales[0] = NAN;
    }
}

// ---------------------------------------------------------------------------------------------- tables

// Entries of `count` rows in a codebook's table, `step` apart from `offset` on; 8-bit ones with their scales.
void load_entries(const Layer& layer, const Tensors& tensors, int table, int scale, int64_t row, int64_t count,
                  int64_t step, int64_t offset, float* to) {
    const int64_t first = row * layer.groups, entries = count * layer.groups;
    const int type = layer.types[table];
    if (step == 1)
        load(tensors.at[table], type, first, entries, to);
    else
        for (int64_t i = 0; i < entries; i++) to[i] = load_one(tensors.at[table], type, (first + i) * step + offset);
    if (type != INT8) return;
    for (int64_t i = 0; i < entries;) {  // neighbouring entries share a scale
        const int64_t block = (first + i) / 256, stop = std::min<int64_t>(entries, (block + 1) * 256 - first);
        const float factor = load_one(tensors.at[scale], layer.types[scale], block * step + offset);
        for (; i < stop; i++) to[i] *= factor;
    }
}

// Zero points of `count` rows: [count][groups].
void zero_points(const Layer& layer, const Tensors& tensors, int64_t row, int64_t count, float* to) {
    const int64_t groups = layer.groups;
    if (layer.zero_point == 0) {
        for (int64_t i = 0; i < count * groups; i++) to[i] = float(1 << (layer.bits - 1));
        return;
    }
    if (layer.zero_point == 2) return load(tensors.at[2], layer.types[2], row * groups, count * groups, to);
    const uint32_t mask = (1u << layer.bits) - 1;
    for (int64_t i = 0; i < count; i++, to += groups) {
        const int64_t bit = (row + i) * layer.bits;
        const int shift = int(bit % 32);
        const uint32_t* words = static_cast<const uint32_t*>(tensors.at[2]) + bit / 32 * groups;
        if (shift + layer.bits <= 32)
            for (int64_t g = 0; g < groups; g++) to[g] = float(int32_t((words[g] >> shift) & mask));
        else
            for (int64_t g = 0; g < groups; g++)
                to[g] = float(int32_t(((words[g] >> shift) | (words[g + groups] << (32 - shift))) & mask));
    }
}

// Bits of a codebook's integers when one of them times 15-bit inputs is summed over a lane's codes of a chunk.
int precision_of(int bits) { return bits == 1 ? 11 : bits == 2 ? 12 : bits <= 4 ? 13 : 14; }

// One direction of a codebook as integers: entries = middle + sum over the planes of factor * integer.
struct Direction {
    // Of two planes, each is summed over a lane's 64 inputs of a block: 64 * 32767 * 1024 < 2^31. Together they have 21
    // bits and a sign, so that rounding the entries costs float32 inputs no digits.
    static constexpr int HALF_RADIX = 1024, RADIX = 2 * HALF_RADIX;

    Lookup lookups[2];
    float middle, factors[2];

    void set(const float* entries, int bits, int planes) {
        float low = entries[0], high = entries[0];
        for (int i = 1; i < 1 << bits; i++) low = std::fmin(low, entries[i]), high = std::fmax(high, entries[i]);
        middle = (low + high) / 2;
        const int most = planes == 2 ? (HALF_RADIX - 1) * RADIX : (1 << precision_of(bits)) - 1;
        const float step = std::fmax((high - low) / 2 / float(most), 1e-37f);
        int16_t whole[32], upper[32], lower[32];
        for (int i = 0; i < 1 << bits; i++) {
            const int value = int(std::lrint((double(entries[i]) - middle) / step));
            const int rest = ((value + HALF_RADIX) & (RADIX - 1)) - HALF_RADIX;
            whole[i] = int16_t(value), lower[i] = int16_t(rest), upper[i] = int16_t((value - rest) / RADIX);
        }
        if (planes == 2) {
            lookups[0].set(upper, bits), lookups[1].set(lower, bits);
            factors[0] = RADIX * step, factors[1] = step;
        } else {
            lookups[0].set(whole, bits);
            factors[0] = step;
        }
    }
};

// ---------------------------------------------------------------------------------------------- decoding

template <int BITS>
void unpack(const uint8_t* from, int64_t columns, int64_t bytes, uint8_t* to) {
    int64_t column = 0;
    constexpr uint8_t mask = (1 << BITS) - 1;
#if defined(QCLI_512)
    struct Tables {
        uint8_t places[64], offsets[64];
    };
    static constexpr auto make = [] {
        Tables tables{};
        for (int i = 0; i < 64; i++) {
            tables.places[i] = uint8_t((i / 8) * BITS + (i % 8 < BITS ? i % 8 : 0));
            tables.offsets[i] = uint8_t((i % 8) * BITS);
        }
        return tables;
    };
    alignas(64) static constexpr Tables tables = make();
    const __m512i places = _mm512_loadu_si512(tables.places), offsets = _mm512_loadu_si512(tables.offsets);
    for (; column < columns; column += 64) {
        const int64_t start = column / 8 * BITS, left = std::min<int64_t>(bytes - start, 8 * BITS);
        const __m512i raw = _mm512_maskz_loadu_epi8(~uint64_t(0) >> (64 - left), from + start);
        const __m512i shifted = _mm512_multishift_epi64_epi8(offsets, _mm512_permutexvar_epi8(places, raw));
        const int64_t wanted = std::min<int64_t>(columns - column, 64);
        _mm512_mask_storeu_epi8(to + column, ~uint64_t(0) >> (64 - wanted),
                                _mm512_and_si512(shifted, _mm512_set1_epi8(mask)));
    }
#else
    for (; column < columns; column += 8) {
        uint64_t word = 0;
        const int64_t start = column / 8 * BITS;
        if (start + 8 <= bytes)
            std::memcpy(&word, from + start, 8);
        else
            std::memcpy(&word, from + start, std::min<int64_t>(bytes - start, BITS));
        const int64_t wanted = std::min<int64_t>(columns - column, 8);
        for (int64_t i = 0; i < wanted; i++) to[column + i] = uint8_t(word >> (i * BITS)) & mask;
    }
#endif
}

void unpack(int bits, const uint8_t* from, int64_t columns, int64_t bytes, uint8_t* to) {
    typedef void (*Unpack)(const uint8_t*, int64_t, int64_t, uint8_t*);
    static const Unpack by_bits[] = {unpack<1>, unpack<2>, unpack<3>, unpack<4>,
                                     unpack<5>, unpack<6>, unpack<7>, unpack<8>};
    by_bits[bits - 1](from, columns, bytes, to);
}

int64_t row_bytes(const Layer& layer) { return (layer.columns * layer.bits + 31) / 32 * 4; }

// Looks `count` codes up in a table of 2^bits floats; it has room for 32.
void look_up(const uint8_t* codes, int64_t count, const float* table, int bits, float* to) {
    int64_t i = 0;
#if defined(QCLI_512)
    if (bits <= 5) {
        const __m512 low = _mm512_loadu_ps(table), high = _mm512_loadu_ps(table + 16);
        for (; i + 16 <= count; i += 16) {
            const __m512i places = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
            _mm512_storeu_ps(to + i, _mm512_permutex2var_ps(low, places, high));
        }
    }
#else
    (void)bits;
#endif
    for (; i < count; i++) to[i] = table[codes[i]];
}

// Decodes rows one by one; as the formats' `decode` does, operation by operation.
struct RowDecoder {
    const Layer& layer;
    const Tensors& tensors;
    bool inputs_scaled;  // sign: whether the inputs carry its in_scale
    std::vector<uint8_t> codes;
    std::vector<float> scale, offset, basis, in_scale;
    int64_t block = -1;

    RowDecoder(const Layer& layer, const Tensors& tensors, bool inputs_scaled)
        : layer(layer), tensors(tensors), inputs_scaled(inputs_scaled), codes(layer.columns + 64),
          scale(layer.groups * std::max<int64_t>(layer.rank, 1)), offset(layer.groups) {
        if (layer.kind == CODEBOOK) basis.resize((layer.rank << layer.bits) + 32);
        if (layer.kind == SIGN && !inputs_scaled) {
            in_scale.resize(layer.columns);
            load(tensors.at[1], layer.types[1], 0, layer.columns, in_scale.data());
        }
    }

    void decode(int64_t row, float* to) {
        const int64_t bytes = row_bytes(layer);
        unpack(layer.bits, static_cast<const uint8_t*>(tensors.at[0]) + row * bytes, layer.columns, bytes,
               codes.data());
        if (layer.kind == SIGN) {
            const float size = load_one(tensors.at[2], layer.types[2], row);
            for (int64_t i = 0; i < layer.columns; i++) to[i] = (codes[i] ? size : -size);
            if (!inputs_scaled)
                for (int64_t i = 0; i < layer.columns; i++) to[i] *= in_scale[i];
            return;
        }
        load_tables(row);
        for (int64_t g = 0; g < layer.groups; g++) {
            const int64_t start = g * layer.group, count = std::min(layer.group, layer.columns - start);
            if (layer.kind == AFFINE) {
                const float factor = scale[g], zero = offset[g];
                for (int64_t i = start; i < start + count; i++) to[i] = (float(codes[i]) - zero) * factor;
                continue;
            }
            alignas(64) float table[256];
            if (layer.kind == DUAL_BINARY) {
                const float first = scale[g], second = offset[g], off = layer.symmetric ? -1 : 0;
                for (int code = 0; code < 4; code++)
                    table[code] = (code & 1 ? 1 : off) * first + (code & 2 ? 1 : off) * second;
            } else {
                for (int code = 0; code < 1 << layer.bits; code++) table[code] = -offset[g];
                for (int64_t r = 0; r < layer.rank; r++)
                    for (int code = 0; code < 1 << layer.bits; code++)
                        table[code] += scale[r * layer.groups + g] * basis[(r << layer.bits) + code];
            }
            look_up(codes.data() + start, count, table, layer.bits, to + start);
        }
    }

#if defined(QCLI_BFLOAT16)
    // As bfloat16; a sign layer's out_scale is left out.
    void decode_bfloat(int64_t row, uint16_t* to) {
        if (layer.kind == CODEBOOK && layer.bits > 5) {
            floats.resize(layer.columns);
            decode(row, floats.data());
            store(to, BFLOAT16, 0, layer.columns, floats.data());
            return;
        }
        const int64_t bytes = row_bytes(layer);
        const uint8_t* packed = static_cast<const uint8_t*>(tensors.at[0]) + row * bytes;
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(packed + AHEAD + i);
        if (layer.kind == SIGN) {
            const __m512i minus = _mm512_set1_epi16(int16_t(0x8000));
            if (bfloats.empty()) {
                bfloats.resize(layer.columns + 32);
                store(bfloats.data(), BFLOAT16, 0, layer.columns, in_scale.data());
            }
            for (int64_t i = 0; i < layer.columns; i += 32) {
                uint32_t positive;
                std::memcpy(&positive, packed + i / 8, 4);
                const __m512i values = _mm512_loadu_si512(&bfloats[i]);
                const __m512i signs = _mm512_maskz_mov_epi16(~positive, minus);
                _mm512_mask_storeu_epi16(to + i, below(layer.columns - i), _mm512_xor_si512(values, signs));
            }
            return;
        }
        unpack(layer.bits, packed, layer.columns, bytes, codes.data());
        load_tables(row);
        const __m512 count_up = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (int64_t g = 0; g < layer.groups; g++) {
            const int64_t start = g * layer.group, stop = std::min(start + layer.group, layer.columns);
            const __m512 first = _mm512_set1_ps(scale[g]), second = _mm512_set1_ps(offset[g]);
            if (layer.bits > 5) {
                const __m512 shift = _mm512_mul_ps(second, first);
                const auto decoded = [&](int64_t i) {
                    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(&codes[i]));
                    return _mm512_fmsub_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), first, shift);
                };
                for (int64_t i = start; i < stop; i += 32)
                    _mm512_mask_storeu_epi16(to + i, below(stop - i),
                                             (__m512i)_mm512_cvtne2ps_pbh(decoded(i + 16), decoded(i)));
                continue;
            }
            __m512 low, high = _mm512_setzero_ps();  // values of codes 0..15 and 16..31
            if (layer.kind == AFFINE) {
                low = _mm512_mul_ps(_mm512_sub_ps(count_up, second), first);
                high = _mm512_add_ps(count_up, _mm512_set1_ps(16));
                high = _mm512_mul_ps(_mm512_sub_ps(high, second), first);
            } else if (layer.kind == DUAL_BINARY) {
                const __m512 off = _mm512_set1_ps(layer.symmetric ? -1 : 0), on = _mm512_set1_ps(1);
                low = _mm512_add_ps(_mm512_mul_ps(_mm512_mask_mov_ps(off, 0xAAAA, on), first),
                                    _mm512_mul_ps(_mm512_mask_mov_ps(off, 0xCCCC, on), second));
            } else {
                low = high = _mm512_sub_ps(_mm512_setzero_ps(), second);
                for (int64_t r = 0; r < layer.rank; r++) {
                    const __m512 factor = _mm512_set1_ps(scale[r * layer.groups + g]);
                    const float* entries = &basis[r << layer.bits];
                    low = _mm512_fmadd_ps(factor, _mm512_loadu_ps(entries), low);
                    if (layer.bits == 5) high = _mm512_fmadd_ps(factor, _mm512_loadu_ps(entries + 16), high);
                }
            }
            const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(high, low);
            for (int64_t i = start; i < stop; i += 32) {
                const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(&codes[i]));
                const __m512i values = _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(bytes), table);
                _mm512_mask_storeu_epi16(to + i, below(stop - i), values);
            }
        }
    }
#endif

  private:
#if defined(QCLI_BFLOAT16)
    std::vector<float> floats;
    std::vector<uint16_t> bfloats;

    // A mask of the first `count` of 32 lanes.
    static __mmask32 below(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }
#endif

    void load_tables(int64_t row) {
        if (layer.kind == CODEBOOK) {
            for (int64_t r = 0; r < layer.rank; r++)
                load_entries(layer, tensors, 2, 4, row, 1, layer.rank, r, &scale[r * layer.groups]);
            load_entries(layer, tensors, 3, 5, row, 1, 1, 0, offset.data());
            const int64_t now = layer.basis_rows ? row / layer.basis_rows : 0;
            const int64_t size = layer.rank << layer.bits;
            if (now != block) load(tensors.at[1], layer.types[1], now * size, size, basis.data());
            block = now;
            return;
        }
        load(tensors.at[1], layer.types[1], row * layer.groups, layer.groups, scale.data());
        if (layer.kind == AFFINE)
            zero_points(layer, tensors, row, 1, offset.data());
        else
            load(tensors.at[2], layer.types[2], row * layer.groups, layer.groups, offset.data());
    }
};

// ---------------------------------------------------------------------------------------------- threads

typedef void (*ParallelRegion)(void (*)(void*), void*, unsigned, unsigned);
ParallelRegion parallel_region = nullptr;  // GOMP_parallel of the OpenMP runtime that torch uses

// Calls work(first, last) for blocks of `count` rows on `threads` threads, this one included.
template <class Work>
bool share(int64_t count, int64_t block, int threads, const Work& work) {
    struct Shared {
        const Work& work;
        int64_t count, block;
        std::atomic<int64_t> next{0};
        std::atomic<bool> failed{false};
        void run() {
            try {
                work([this](int64_t& first, int64_t& last) {
                    first = next.fetch_add(block);
                    last = std::min(first + block, count);
                    return first < count;
                });
            } catch (const std::bad_alloc&) {
                failed = true;
            }
        }
    } shared{work, count, block};
    threads = int(std::min<int64_t>(threads, (count + block - 1) / block));
    if (threads <= 1) {
        shared.run();
    } else if (parallel_region) {
        parallel_region([](void* data) { static_cast<Shared*>(data)->run(); }, &shared, unsigned(threads), 0);
    } else {
        std::vector<std::thread> others;
        for (int i = 1; i < threads; i++) others.emplace_back([&shared] { shared.run(); });
        shared.run();
        for (auto& other : others) other.join();
    }
    return !shared.failed;
}

struct Call {
    const Layer& layer;
    const Tensors& tensors;
    const Inputs& inputs;
    const void* bias;
    int bias_type;
    void* y;
    int type;
    int64_t rows;  // of x and y

    void put(int64_t m, int64_t n, float value) const {
        if (bias) value += load_one(bias, bias_type, n);
        store_one(y, type, m * layer.rows + n, value);
    }
};

// The tables of some rows of the weight, as the integer kernels use them.
struct Tables {
    std::vector<float> scales, offsets;  // A [direction][plane][row][groups], B [row][groups]
    std::vector<Direction> directions;   // of a codebook
    std::vector<float> basis, entries;
    int64_t block = -1;  // whose basis this is

    void set(const Layer& layer, const Tensors& tensors, int planes, int64_t row, int64_t count) {
        const int64_t entries_of_rows = count * layer.groups, slack = LANES;  // vectors are read beyond the last
        const int64_t number = layer.kind == CODEBOOK ? layer.rank : 1;
        scales.resize(number * planes * entries_of_rows + slack);
        offsets.assign(entries_of_rows + slack, 0);
        float *scale = scales.data(), *offset = offsets.data();
        if (layer.kind == SIGN) {
            for (int64_t i = 0; i < count; i++) scale[i] = 2, offset[i] = -1;
        } else if (layer.kind == AFFINE) {
            load(tensors.at[1], layer.types[1], row * layer.groups, entries_of_rows, scale);
            zero_points(layer, tensors, row, count, offset);
            for (int64_t i = 0; i < entries_of_rows; i++) offset[i] *= -scale[i];
        } else if (layer.kind == DUAL_BINARY) {
            float* second = scale + entries_of_rows;
            load(tensors.at[1], layer.types[1], row * layer.groups, entries_of_rows, scale);
            load(tensors.at[2], layer.types[2], row * layer.groups, entries_of_rows, second);
            for (int64_t i = 0; i < entries_of_rows; i++) {  // the second plane's bits weigh 2
                offset[i] = layer.symmetric ? -(scale[i] + second[i]) : 0;
                scale[i] *= layer.symmetric ? 2 : 1;
                second[i] *= layer.symmetric ? 1 : 0.5f;
            }
        } else {
            set_directions(layer, tensors, planes, row);
            entries.resize(entries_of_rows);
            load_entries(layer, tensors, 3, 5, row, count, 1, 0, offset);
            for (int64_t i = 0; i < entries_of_rows; i++) offset[i] = -offset[i];
            for (int64_t r = 0; r < layer.rank; r++) {
                const Direction& direction = directions[r];
                load_entries(layer, tensors, 2, 4, row, count, layer.rank, r, entries.data());
                for (int64_t i = 0; i < entries_of_rows; i++) offset[i] += entries[i] * direction.middle;
                for (int plane = 0; plane < planes; plane++, scale += entries_of_rows)
                    for (int64_t i = 0; i < entries_of_rows; i++) scale[i] = entries[i] * direction.factors[plane];
            }
        }
    }

  private:
    void set_directions(const Layer& layer, const Tensors& tensors, int planes, int64_t row) {
        const int64_t now = layer.basis_rows ? row / layer.basis_rows : 0, size = layer.rank << layer.bits;
        if (now == block) return;
        basis.resize(size);
        directions.resize(layer.rank);
        load(tensors.at[1], layer.types[1], now * size, size, basis.data());
        for (int64_t r = 0; r < layer.rank; r++) directions[r].set(&basis[r << layer.bits], layer.bits, planes);
        block = now;
    }
};

// Rows of the weight by the integer kernels.
template <class Next>
void fast_rows(const Call& call, const Next& next) {
    const Layer& layer = call.layer;
    const Inputs& inputs = call.inputs;
    const bool codebook = layer.kind == CODEBOOK;
    const int decoder = layer.kind == DUAL_BINARY ? BITS_OF_CODES
                        : !codebook               ? CODES
                        : call.type == BFLOAT16   ? ONE_LOOKUP
                                                  : TWO_LOOKUPS;
    const int planes = planes_of(decoder);
    const Products kernel = kernel_of(layer.bits, decoder, splits_chunks(layer));
    const int64_t bytes = row_bytes(layer), pair = PAIR * bytes, ahead = (AHEAD + pair - 1) / pair * pair;
    const int64_t run = layer.groups == 1 ? inputs.chunks : layer.group / (HALVES * per_half(layer.bits));
    const int64_t most = std::max<int64_t>(PAIR, 128 / inputs.rows / PAIR * PAIR);  // rows whose sums are kept
    static thread_local Tables tables;
    static thread_local std::vector<Float> out;  // [pair][row of inputs][row of the pair]
    static thread_local std::vector<float> values, bias, factors;
    tables.block = -1;
    int64_t first, last;
    while (next(first, last)) {
        for (int64_t row = first, count; row < last; row += count) {
            count = std::min(most, last - row);
            if (codebook && layer.basis_rows) count = std::min(count, layer.basis_rows - row % layer.basis_rows);
            tables.set(layer, call.tensors, planes, row, count);
            out.assign((count + 1) / PAIR * PAIR * inputs.rows, Float{});
            const int64_t plane = count * layer.groups;
            for (int64_t i = 0; i < count; i += PAIR) {
                const uint8_t* codes = static_cast<const uint8_t*>(call.tensors.at[0]) + (row + i) * bytes;
                Rows rows{{codes, i + 1 < count ? codes + bytes : codes}, bytes, nullptr, plane, layer.groups,
                          nullptr, ahead, run};
                if (i + 1 == count) rows.groups = 0;  // the last row, twice
                for (int64_t r = 0; r < (codebook ? layer.rank : 1); r++) {
                    rows.tables = &tables.scales[r * planes * plane + i * layer.groups];
                    rows.lookups = codebook ? tables.directions[r].lookups : nullptr;
                    kernel(rows, inputs, inputs.rows, &out[i * inputs.rows]);
                }
            }
            values.resize(count);
            if (layer.kind == SIGN) {
                factors.resize(count);
                load(call.tensors.at[2], layer.types[2], row, count, factors.data());
            }
            if (call.bias) {
                bias.resize(count);
                load(call.bias, call.bias_type, row, count, bias.data());
            }
            for (int64_t m = 0; m < call.rows; m++) {
                const float* sums = &inputs.sums[m * inputs.groups];
                for (int64_t i = 0; i < count; i++) {
                    const Float* at = &out[i / PAIR * PAIR * inputs.rows + i % PAIR];
                    Float lanes = at[m * PAIR];
                    if (inputs.rows > call.rows) lanes += at[(m + call.rows) * PAIR];
                    const float* offset = &tables.offsets[i * layer.groups];
                    for (int64_t g = 0; g < inputs.groups; g += LANES)  // beyond the groups sums are 0
                        lanes = fused(read<Float>(offset + g), read<Float>(sums + g), lanes);
                    values[i] = total(lanes);
                }
                if (layer.kind == SIGN)
                    for (int64_t i = 0; i < count; i++) values[i] *= factors[i];
                if (call.bias)
                    for (int64_t i = 0; i < count; i++) values[i] += bias[i];
                store(call.y, call.type, m * layer.rows + row, count, values.data());
            }
        }
    }
}

// Rows of the weight by decoding one at a time to float32.
template <class Next>
void decoded_rows(const Call& call, const Next& next) {
    const int64_t columns = call.layer.columns;
    RowDecoder decoder(call.layer, call.tensors, true);
    std::vector<float> weight(columns);
    int64_t first, last;
    while (next(first, last))
        for (int64_t row = first; row < last; row++) {
            decoder.decode(row, weight.data());
            for (int64_t m = 0; m < call.rows; m++) {
                const float* x = call.inputs.values.data() + m * columns;
                Float sums[2] = {};
                int64_t i = 0;
                for (; i + 2 * LANES <= columns; i += 2 * LANES)
                    for (int part = 0; part < 2; part++) {
                        const int64_t at = i + part * LANES;
                        sums[part] = fused(read<Float>(x + at), read<Float>(&weight[at]), sums[part]);
                    }
                float rest = 0;
                for (; i < columns; i++) rest += x[i] * weight[i];
                call.put(m, row, total(sums[0] + sums[1]) + rest);
            }
        }
}

#if defined(QCLI_BFLOAT16)
constexpr int64_t MANY = 6;  // rows of x from which this is faster
constexpr int QUAD = 4, PAIRS = 32;  // rows of the weight, or of x, computed together; bfloat16 in a vector

// The sums of four vectors' lanes.
inline __m128 totals(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 abcd = _mm512_add_ps((__m512)_mm512_unpacklo_pd((__m512d)ab, (__m512d)cd),
                                      (__m512)_mm512_unpackhi_pd((__m512d)ab, (__m512d)cd));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// out[M][QUAD] = products of M rows of x with QUAD rows of the weight, both bfloat16 and `stride` apart.
template <int M>
__attribute__((noinline)) void bfloat_product(  // inlined, gcc 12 keeps the sums in memory
   const uint16_t* x, const uint16_t* weight, int64_t stride, float* out) {
    __m512 sums[M][QUAD];
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int n = 0; n < QUAD; n++) sums[m][n] = _mm512_setzero_ps();
    for (int64_t k = 0; k < stride; k += PAIRS) {
        __m512i weights[QUAD];
#pragma GCC unroll 4
        for (int n = 0; n < QUAD; n++) weights[n] = _mm512_loadu_si512(weight + n * stride + k);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            const __m512i values = _mm512_loadu_si512(x + m * stride + k);
#pragma GCC unroll 4
            for (int n = 0; n < QUAD; n++)
                __asm__("vdpbf16ps %2, %1, %0" : "+v"(sums[m][n]) : "v"(weights[n]), "v"(values));
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
        _mm_storeu_ps(out + m * QUAD, totals(sums[m][0], sums[m][1], sums[m][2], sums[m][3]));
}

// Rows of the weight by decoding a few at a time to bfloat16; x is [rows][stride], padded with zeros.
template <class Next>
void bfloat_rows(const Call& call, const uint16_t* x, int64_t stride, const Next& next) {
    RowDecoder decoder(call.layer, call.tensors, false);
    std::vector<uint16_t> weight(QUAD * stride, 0);
    int64_t first, last;
    while (next(first, last))
        for (int64_t n = first; n < last; n += QUAD) {
            const int count = int(std::min<int64_t>(QUAD, last - n));
            float factors[QUAD] = {1, 1, 1, 1}, bias[QUAD] = {}, out[4 * QUAD];
            for (int i = 0; i < count; i++) decoder.decode_bfloat(n + i, &weight[i * stride]);
            if (call.layer.kind == SIGN) load(call.tensors.at[2], call.layer.types[2], n, count, factors);
            if (call.bias) load(call.bias, call.bias_type, n, count, bias);
            for (int64_t m = 0; m < call.rows;) {
                const int rows = int(std::min<int64_t>(4, call.rows - m));
                const uint16_t* from = x + m * stride;
                if (rows == 4) bfloat_product<4>(from, weight.data(), stride, out);
                if (rows == 3) bfloat_product<3>(from, weight.data(), stride, out);
                if (rows == 2) bfloat_product<2>(from, weight.data(), stride, out);
                if (rows == 1) bfloat_product<1>(from, weight.data(), stride, out);
                for (int j = 0; j < rows; j++, m++) {
                    for (int i = 0; i < QUAD; i++) out[j * QUAD + i] = out[j * QUAD + i] * factors[i] + bias[i];
                    store(call.y, BFLOAT16, m * call.layer.rows + n, count, out + j * QUAD);
                }
            }
        }
}
#endif

}  // namespace

// ---------------------------------------------------------------------------------------------- the interface

extern "C" {

const char* qcli_isa() { return ISA; }

void qcli_use_threads_of(void* gomp_parallel) { parallel_region = reinterpret_cast<ParallelRegion>(gomp_parallel); }

// y [rows][layer.rows] = x [rows][layer.columns] W^T + bias. Returns 0; 1 if memory does not suffice.
int qcli_linear(const Layer* layer, const void* t0, const void* t1, const void* t2, const void* t3, const void* t4,
                const void* t5, const void* x, int type, int64_t rows, const void* bias, int bias_type, void* y,
                int threads) {
    const Tensors tensors{{t0, t1, t2, t3, t4, t5}};
    try {
        static thread_local Inputs inputs;
#if defined(QCLI_BFLOAT16)
        if (type == BFLOAT16 && rows >= MANY) {
            const int64_t stride = (layer->columns + PAIRS - 1) / PAIRS * PAIRS;
            static thread_local std::vector<uint16_t> padded;
            const uint16_t* values = static_cast<const uint16_t*>(x);
            if (stride != layer->columns) {
                padded.assign(rows * stride, 0);
                for (int64_t m = 0; m < rows; m++)
                    std::memcpy(&padded[m * stride], values + m * layer->columns, layer->columns * 2);
                values = padded.data();
            }
            const Call call{*layer, tensors, inputs, bias, bias_type, y, type, rows};
            const auto work = [&](const auto& next) { bfloat_rows(call, values, stride, next); };
            return share(layer->rows, 16, threads, work) ? 0 : 1;
        }
#endif
        prepare(*layer, tensors, x, type, rows, inputs);
        const Call call{*layer, tensors, inputs, bias, bias_type, y, type, rows};
        const bool fast = is_fast(*layer);
        const int64_t few = (int64_t(1) << 16) / (layer->columns * rows) + 1;  // too little work to share
        const int64_t block = std::max<int64_t>(2, std::min<int64_t>((few + 1) / 2 * 2, 64));
        const auto work = [&](const auto& next) {
            if (fast)
                fast_rows(call, next);
            else
                decoded_rows(call, next);
        };
        return share(layer->rows, block, threads, work) ? 0 : 1;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// Rows first .. first + count of the weight, as `type`: [count][layer.columns]. Returns 0; 1 if memory does not suffice.
int qcli_decode(const Layer* layer, const void* t0, const void* t1, const void* t2, const void* t3, const void* t4,
                const void* t5, int64_t first, int64_t count, int type, void* out, int threads) {
    const Tensors tensors{{t0, t1, t2, t3, t4, t5}};
    const auto work = [&](const auto& next) {
        RowDecoder decoder(*layer, tensors, false);
        std::vector<float> row(layer->columns);
        int64_t from, to;
        while (next(from, to))
            for (int64_t i = from; i < to; i++) {
#if defined(QCLI_BFLOAT16)
                if (type == BFLOAT16 && layer->kind != SIGN) {
                    decoder.decode_bfloat(first + i, static_cast<uint16_t*>(out) + i * layer->columns);
                    continue;
                }
#endif
                decoder.decode(first + i, row.data());
                store(out, type, i * layer->columns, layer->columns, row.data());
            }
    };
    return share(count, 8, threads, work) ? 0 : 1;
}
}
