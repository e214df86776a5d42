/* Products of quantized linears on a CPU; `engine/kernels/cpu_linear.py` calls them and says what each argument is.

   Every number is computed by one thread and in one order: results do not depend on threads, on the other rows, or
   (int4, where there is FMA) on how wide the processor's vectors are. Vectors are GCC's and Clang's generic ones, of
   eight lanes; intrinsics say what those cannot. Compile with -ffp-contract=off: a product and a sum are rounded apart
   unless `fma8` joins them. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define LANES 8
#define TILE_VECTORS 8
#define TILE (LANES * TILE_VECTORS) /* outputs of an int4 tile */
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#define MOST_ROWS 6 /* rows that int4 multiplies at once: 6 rows * 2 vectors of sums fill 16 registers */
#define INT8_OUTPUTS 4
#define INT8_ROWS 3
#define INT8_CHUNK 32 /* outputs of int8 that a thread takes at a time */

typedef float f8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef uint32_t u8 __attribute__((vector_size(32)));

/* GOMP_parallel of the OpenMP runtime that the process has already. */
typedef void (*Parallel)(void (*work)(void *), void *data, unsigned threads, unsigned flags);

static void run(Parallel parallel, int threads, void (*work)(void *), void *data) {
    if (parallel != NULL && threads > 1)
        parallel(work, data, (unsigned)threads, 0);
    else
        work(data);
}

INLINE f8 fma8(f8 a, f8 b, f8 c) {
#if defined(__FMA__)
    return (f8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    union { f8 whole; float32x4_t half[2]; } x = {a}, y = {b}, z = {c};
    z.half[0] = vfmaq_f32(z.half[0], x.half[0], y.half[0]);
    z.half[1] = vfmaq_f32(z.half[1], x.half[1], y.half[1]);
    return z.whole;
#else
    return a * b + c;
#endif
}

INLINE f8 all(float x) { return (f8){x, x, x, x, x, x, x, x}; }

INLINE float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff, bits;
    float value;
    if (rest >= 0x7c00) bits = 0x7f800000 | (rest & 0x3ff) << 13;          /* infinity and NaN */
    else if (rest >= 0x400) bits = (rest << 13) + ((127 - 15) << 23);      /* normal */
    else { value = (float)rest * 0x1p-24f; memcpy(&bits, &value, 4); }     /* subnormal, and 0 */
    bits |= sign;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE f8 halves(const uint16_t *from) {
#if defined(__F16C__)
    return (f8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#else
    f8 values;
    for (int lane = 0; lane < LANES; lane++) values[lane] = half_to_float(from[lane]);
    return values;
#endif
}

INLINE f8 bytes(const uint8_t *from) {
#if defined(__AVX2__)
    return (f8)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from)));
#else
    f8 values;
    for (int lane = 0; lane < LANES; lane++) values[lane] = from[lane];
    return values;
#endif
}

/* ---- int4: records of one tile and one group: group/8 * TILE words, TILE float16 scales, TILE bytes of zeros ---- */

static size_t record_bytes(int group) { return (size_t)TILE * group / 2 + TILE * 3; }

typedef struct {
    const float *x, *sums; /* [rows, inputs] scaled, [rows, groups] */
    const uint8_t *weights;
    const float *bias;
    float *out;
    long rows, outputs, inputs, next;
    int group;
} Int4;

static const float SIXTEENTHS[8] = {1, 0x1p-4f, 0x1p-8f, 0x1p-12f, 0x1p-16f, 0x1p-20f, 0x1p-24f, 1};

/* (w >> 4i & 15) * 16^i, for i = 7 without the factor, because bit 31 is the sign of an int32. */
INLINE f8 nibble(const uint8_t *from, int i) {
    u8 word;
    memcpy(&word, from, sizeof word);
    u8 bits = i == 7 ? word >> 28 : word & (15u << 4 * i);
    return __builtin_convertvector((i8)bits, f8);
}

/* `rows` rows of x times `vectors` * 8 outputs of a tile, from output `first` of it on. */
INLINE void int4_block(const Int4 *job, long row, int rows, long tile, int first, int vectors) {
    const long groups = job->inputs / job->group;
    const uint8_t *record = job->weights + tile * groups * record_bytes(job->group);
    f8 total[MOST_ROWS][TILE_VECTORS];
    for (int m = 0; m < rows; m++)
        for (int v = 0; v < vectors; v++) total[m][v] = all(0);
    for (long g = 0; g < groups; g++, record += record_bytes(job->group)) {
        const uint8_t *scales = record + (size_t)TILE * job->group / 2, *zeros = scales + 2 * TILE;
        const float *x = job->x + row * job->inputs + g * job->group * rows;
        f8 sum[MOST_ROWS][TILE_VECTORS];
        UNROLL for (int m = 0; m < rows; m++)
            UNROLL for (int v = 0; v < vectors; v++) sum[m][v] = all(0);
        for (int block = 0; block < job->group / 8; block++) {
            const uint8_t *words = record + ((size_t)block * TILE + first) * 4;
            for (int line = 0; rows == 1 && line < TILE * 4; line += 64)
                __builtin_prefetch(words + 4096 + line);
            UNROLL for (int i = 0; i < 8; i++) {
                /* What is fewer, rows or vectors, is held in registers meanwhile. */
                f8 weight[TILE_VECTORS], factor[MOST_ROWS];
                if (rows <= vectors) {
                    UNROLL for (int m = 0; m < rows; m++) factor[m] = all(x[m]);
                    UNROLL for (int v = 0; v < vectors; v++) {
                        weight[v] = nibble(words + v * sizeof(u8), i);
                        UNROLL for (int m = 0; m < rows; m++) sum[m][v] = fma8(weight[v], factor[m], sum[m][v]);
                    }
                } else {
                    UNROLL for (int v = 0; v < vectors; v++) weight[v] = nibble(words + v * sizeof(u8), i);
                    UNROLL for (int m = 0; m < rows; m++) {
                        factor[m] = all(x[m]);
                        UNROLL for (int v = 0; v < vectors; v++) sum[m][v] = fma8(weight[v], factor[m], sum[m][v]);
                    }
                }
                x += rows;
                __asm__ volatile("" ::: "memory"); /* loads that move up spill the sums */
            }
        }
        for (int v = 0; v < vectors; v++) {
            f8 scale = halves((const uint16_t *)scales + first + v * LANES), zero = bytes(zeros + first + v * LANES);
            for (int m = 0; m < rows; m++) {
                f8 steps = sum[m][v] - zero * all(job->sums[(row + m) * groups + g]);
                total[m][v] = fma8(steps, scale, total[m][v]);
            }
        }
    }
    for (int m = 0; m < rows; m++)
        for (int v = 0; v < vectors; v++)
            for (int lane = 0; lane < LANES; lane++) {
                long output = tile * TILE + first + v * LANES + lane;
                if (output < job->outputs)
                    job->out[(row + m) * job->outputs + output] =
                        total[m][v][lane] + (job->bias ? job->bias[output] : 0);
            }
}

/* Rows of the block that begins at `row`: as many as fit, and blocks of like size. */
static int block_rows(long row, long rows) {
    long blocks = (rows - row + MOST_ROWS - 1) / MOST_ROWS;
    return (int)((rows - row + blocks - 1) / blocks);
}

/* All of a tile, `VECTORS` at a time: so many sums that none waits for itself, and all have a register. */
#define INT4_CASE(ROWS, VECTORS) \
    case ROWS: { \
        int first = 0; \
        for (; first + VECTORS * LANES <= TILE; first += VECTORS * LANES) \
            int4_block(job, row, ROWS, tile, first, VECTORS); \
        if (TILE_VECTORS % VECTORS) int4_block(job, row, ROWS, tile, first, TILE_VECTORS % VECTORS); \
        break; \
    }
#if defined(__AVX512VL__) /* 32 registers, not 16 */
#define FOUR 4
#define MANY 4
#else
#define FOUR 2
#define MANY 2
#endif

static void int4_tile(const Int4 *job, long tile) {
    for (long row = 0; row < job->rows; row += block_rows(row, job->rows))
        switch (block_rows(row, job->rows)) {
            INT4_CASE(1, 8)
            INT4_CASE(2, 4)
            INT4_CASE(3, 4)
            INT4_CASE(4, FOUR)
            INT4_CASE(5, MANY)
            INT4_CASE(6, 2)
        }
}

static void int4_tiles(void *data) {
    Int4 *job = data;
    long tiles = (job->outputs + TILE - 1) / TILE, tile;
    while ((tile = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < tiles) int4_tile(job, tile);
}

/* scratch: rows * (inputs + inputs / group) floats. */
void int4_linear(const float *x, const uint8_t *weights, const float *bias, float *out, float *scratch, long rows,
                 long outputs, long inputs, int group, int threads, Parallel parallel) {
    float *sums = scratch + rows * inputs;
    /* Rows of a block lie side by side: [inputs, rows of the block]. */
    for (long row = 0; row < rows; row += block_rows(row, rows))
        for (long m = 0, stride = block_rows(row, rows); m < stride; m++)
            for (long g = 0; g < inputs / group; g++) {
                const float *from = x + (row + m) * inputs + g * group;
                float *to = scratch + row * inputs + g * group * stride + m;
                float sum[8] = {0};
                for (int k = 0; k < group; k++) {
                    sum[k % 8] += from[k];
                    to[k * stride] = from[k] * SIXTEENTHS[k % 8];
                }
                sums[(row + m) * (inputs / group) + g] =
                    ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
            }
    Int4 job = {scratch, sums, weights, bias, out, rows, outputs, inputs, 0, group};
    run(parallel, threads, int4_tiles, &job);
}

typedef struct {
    const uint32_t *words, *zeros; /* AWQ: [inputs, outputs/8], [groups, outputs/8] */
    const uint16_t *scales;        /* [groups, outputs] */
    uint8_t *packed;
    long outputs, inputs, next;
    int group;
} Layout;

/* Nibble `NIBBLE_OF[n]` of an AWQ word is column n of its eight. */
static const int NIBBLE_OF[8] = {0, 4, 1, 5, 2, 6, 3, 7};

static void pack_tiles(void *data) {
    Layout *job = data;
    const long tiles = (job->outputs + TILE - 1) / TILE, groups = job->inputs / job->group, stride = job->outputs / 8;
    long tile;
    while ((tile = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < tiles)
        for (long g = 0; g < groups; g++) {
            uint8_t *record = job->packed + (tile * groups + g) * record_bytes(job->group);
            uint8_t *scales = record + (size_t)TILE * job->group / 2, *zeros = scales + 2 * TILE;
            memset(record, 0, record_bytes(job->group));
            for (long eight = 0; eight < TILE / 8 && tile * TILE / 8 + eight < stride; eight++) {
                const long column = tile * TILE / 8 + eight;
                for (int block = 0; block < job->group / 8; block++) {
                    const uint32_t *from = job->words + (g * job->group + 8 * block) * stride + column;
                    u8 all_of = {0};
                    for (int k = 0; k < 8; k++) {
                        uint32_t word = from[k * stride];
                        u8 here = {word, word, word, word, word, word, word, word};
                        here = here >> (u8){0, 16, 4, 20, 8, 24, 12, 28} & 15;
                        all_of |= here << 4 * k;
                    }
                    memcpy(record + ((size_t)block * TILE + eight * 8) * 4, &all_of, sizeof all_of);
                }
                for (int n = 0; n < 8; n++)
                    zeros[eight * 8 + n] = job->zeros[g * stride + column] >> 4 * NIBBLE_OF[n] & 15;
                memcpy(scales + eight * 16, job->scales + g * job->outputs + column * 8, 16);
            }
        }
}

/* packed: tiles * groups records. */
void int4_pack(const uint32_t *words, const uint32_t *zeros, const uint16_t *scales, uint8_t *packed, long outputs,
               long inputs, int group, int threads, Parallel parallel) {
    Layout job = {words, zeros, scales, packed, outputs, inputs, 0, group};
    run(parallel, threads, pack_tiles, &job);
}

/* ---- int8: x [rows, inputs], weight [outputs, inputs], as they are; sums are exact in int32 ---- */

typedef struct {
    const void *x; /* [rows, width]: bytes moved up by 128 under VNNI, else int16; zeros beyond the inputs */
    const int8_t *weight;
    const float *x_scales, *scales, *bias;
    float *out;
    long rows, outputs, inputs, width, next;
} Int8;

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define VNNI 1
#define STEP 32
typedef uint8_t Moved;
#else
#define VNNI 0
#define STEP 16
typedef int16_t Moved;
#endif
#define MOVED (VNNI ? 128 : 0)

/* sum + the products of STEP weights with STEP inputs, in some lane each. */
#if VNNI
typedef __m256i Weights;
INLINE Weights load_weights(const int8_t *from) { return _mm256_loadu_si256((const __m256i *)from); }
INLINE i8 dot(i8 sum, const Moved *x, Weights w) {
    return (i8)_mm256_dpbusd_epi32((__m256i)sum, _mm256_loadu_si256((const __m256i *)x), w);
}
#elif defined(__AVX2__)
typedef __m256i Weights;
INLINE Weights load_weights(const int8_t *from) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from));
}
/* Pairs of products of int16 are summed in int32: nothing saturates, unlike with bytes. */
INLINE i8 dot(i8 sum, const Moved *x, Weights w) {
    return sum + (i8)_mm256_madd_epi16(_mm256_loadu_si256((const __m256i *)x), w);
}
#else
typedef struct { int16_t of[STEP]; } Weights;
INLINE Weights load_weights(const int8_t *from) {
    Weights w;
    for (int k = 0; k < STEP; k++) w.of[k] = from[k];
    return w;
}
INLINE i8 dot(i8 sum, const Moved *x, Weights w) {
    for (int k = 0; k < STEP; k++) sum[k % LANES] += (int32_t)x[k] * w.of[k];
    return sum;
}
#endif

INLINE int32_t lanes_of(i8 sum) {
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

INLINE void int8_block(const Int8 *job, long row, int rows, long output, int outputs) {
    const int8_t *weight = job->weight + output * job->inputs;
    const Moved *x = (const Moved *)job->x + row * job->width;
    i8 sum[INT8_ROWS][INT8_OUTPUTS], moved[INT8_OUTPUTS];
    UNROLL for (int n = 0; n < outputs; n++) {
        moved[n] = (i8){0};
        UNROLL for (int m = 0; m < rows; m++) sum[m][n] = (i8){0};
    }
    long k = 0;
#define STEPS(LOAD)                                                                                  \
    UNROLL for (int n = 0; n < outputs; n++) {                                                       \
        Weights w = LOAD;                                                                            \
        if (VNNI) moved[n] = dot(moved[n], (const Moved *)MOVED_BY, w);                              \
        UNROLL for (int m = 0; m < rows; m++) sum[m][n] = dot(sum[m][n], x + m * job->width + k, w); \
    }
    static const Moved MOVED_BY[STEP] = {
        MOVED, MOVED, MOVED, MOVED, MOVED, MOVED, MOVED, MOVED, MOVED, MOVED, MOVED, MOVED, MOVED, MOVED, MOVED, MOVED,
#if STEP == 32
        MOVED, MOVED, MOVED, MOVED, MOVED, MOVED, MOVED, MOVED, MOVED, MOVED, MOVED, MOVED, MOVED, MOVED, MOVED, MOVED,
#endif
    };
    for (; k + STEP <= job->inputs; k += STEP) {
        if (row == 0)
            UNROLL for (int n = 0; n < outputs; n++) __builtin_prefetch(weight + (n + outputs) * job->inputs + k, 0, 2);
        STEPS(load_weights(weight + n * job->inputs + k))
    }
    if (k < job->inputs) {
        int8_t rest[INT8_OUTPUTS][STEP] = {{0}};
        for (int n = 0; n < outputs; n++) memcpy(rest[n], weight + n * job->inputs + k, (size_t)(job->inputs - k));
        STEPS(load_weights(rest[n]))
    }
#undef STEPS
    for (int n = 0; n < outputs; n++)
        for (int m = 0; m < rows; m++) {
            int32_t total = lanes_of(sum[m][n]) - (VNNI ? lanes_of(moved[n]) : 0);
            float *out = job->out + (row + m) * job->outputs + output + n;
            if (!job->x_scales) {
                memcpy(out, &total, sizeof total);
                continue;
            }
            float value = (float)total * job->x_scales[row + m] * job->scales[output + n];
            *out = job->bias ? value + job->bias[output + n] : value;
        }
}

static void int8_chunks(void *data) {
    Int8 *job = data;
    long begin;
    while ((begin = __atomic_fetch_add(&job->next, INT8_CHUNK, __ATOMIC_RELAXED)) < job->outputs) {
        long end = begin + INT8_CHUNK < job->outputs ? begin + INT8_CHUNK : job->outputs;
        for (long row = 0; row < job->rows;) {
            long left = job->rows - row;
            int rows = left >= 3 && left != 4 ? 3 : left >= 2 ? 2 : 1;
            for (long output = begin; output < end; output += INT8_OUTPUTS) {
                if (end - output < INT8_OUTPUTS) {
                    for (; output < end; output++)
                        for (int m = 0; m < rows; m++) int8_block(job, row + m, 1, output, 1);
                    break;
                }
                switch (rows) {
                case 1: int8_block(job, row, 1, output, INT8_OUTPUTS); break;
                case 2: int8_block(job, row, 2, output, INT8_OUTPUTS); break;
                default: int8_block(job, row, 3, output, INT8_OUTPUTS);
                }
            }
            row += rows;
        }
    }
}

/* Inputs of a row of the scratch: whole steps. */
long int8_width(long inputs) { return (inputs + STEP - 1) / STEP * STEP; }

/* scratch: rows * int8_width(inputs) * 2 bytes. Without x_scales `out` holds the sums themselves, int32. */
void int8_linear(const int8_t *x, const float *x_scales, const int8_t *weight, const float *scales, const float *bias,
                 float *out, void *scratch, long rows, long outputs, long inputs, int threads, Parallel parallel) {
    const long width = int8_width(inputs);
    Moved *moved = scratch;
    for (long m = 0; m < rows; m++)
        for (long k = 0; k < width; k++) moved[m * width + k] = (Moved)((k < inputs ? x[m * inputs + k] : 0) + MOVED);
    Int8 job = {scratch, weight, x_scales, scales, bias, out, rows, outputs, inputs, width, 0};
    run(parallel, threads, int8_chunks, &job);
}
