// mxfp4.c: experts with four bits per weight, and the grouped product that reads them packed.
//
// A routed expert's matrix is e2m1 codes, two to a byte, with one e8m0 scale per 32 columns of a
// row:
//
//     W[o][c] = e2m1(nibble c of row o) * 2^(scale[o][c/32] - 127)
//
// Byte j of a row holds column 2j in its LOW nibble and column 2j+1 in its high one. A nibble is
// s|EE|M; the eight magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4, 6. So a weight takes 4.25 bits, and the
// experts, 277 of the model's 284 billion parameters, fit into 147 GB. They stay packed from the
// first byte read to the last step: widening a row is exact, and happens inside the product.
//
// The products are fp8.c's. New is that rows belong to experts: they are sorted by expert, rows
// offset[e] .. offset[e+1]-1 are expert e's, and each is multiplied with its own expert's matrix.
// An expert may have no rows, or all of them.
//
// What it refuses to do: widths that are not whole groups of 32, gradients of the packed weights,
// widened copies that outlive a tile.
//
// Contents
//   1 e2m1, code by code
//   2 widening and packing rows
//   3 the grouped products
//   4 recast to e4m3: the packed matrices as an fp8 product wants them
#ifndef MXFP4_C
#define MXFP4_C
#include "fp8.c"            // Frozen, frozen_forward, frozen_backward, tile_rows, scale_for

// -------------------------------------------------------------------------------------------------
// 1 e2m1, code by code
//
// E > 0: (1 + M/2) 2^(E-1). E = 0: M/2. There is no NaN and no infinity in four bits, so whoever
// packs numbers must look for them before. Both directions are fp8.c's with other field widths.

// The value of the low four bits of `nibble`: exact. Code 8 is -0.
static inline float float_from_e2m1(uint8_t nibble) {
    uint32_t magnitude = nibble & 7, sign = (uint32_t)(nibble & 8) << 28;
    // A float's fields are 22 bits further left, its exponent bias is larger by 126. With E = 0,
    // raise E to 1 and take the leading one off again.
    uint32_t subnormal = magnitude < 2, exponent = (126 + subnormal) << 23;
    float leading_one = float_from_bits(subnormal * (127u << 23));      // 1 or 0
    float value = float_from_bits((magnitude << 22) + exponent) - leading_one;
    return float_from_bits(bits_from_float(value) | sign);
}

// The nearest code, ties to the even one. Beyond 6, infinity included, gives 6 with x's sign; so
// does a NaN; -0 stays -0.
static inline uint8_t e2m1_from_float(float x) {
    uint32_t sign = bits_from_float(x) >> 28 & 8, bits = bits_from_float(x) & 0x7FFFFFFFu;
    uint32_t magnitude = bits < 0x40C00000u ? bits : 0x40C00000u;       // min(|x|, 6)
    uint32_t exponent = magnitude >> 23 > 127 ? magnitude >> 23 : 127;  // of 1, or of x
    // As in e4m3_from_float: adding a power of two makes the adder round at the code's spacing.
    float large = float_from_bits((exponent + 22) << 23);
    uint32_t mantissa = bits_from_float(float_from_bits(magnitude) + large)
                      - bits_from_float(large);
    return (uint8_t)(sign | (((exponent - 127) << 1) + mantissa));
}

// -------------------------------------------------------------------------------------------------
// 2 Widening and packing rows
//
// A scale covers 32 terms of the forward's sum, so there it could be applied afterwards. In the
// backward, dx = W^T dy, the sum runs over rows o, whose scales all differ: only the codes' values
// can be summed. So both widen first, and see the same numbers.

// w (O,C/2) packed codes, scale (O,C/32).
static inline void widen_fp4(real *row, const void *w, const uint8_t *scale, size_t o, int C) {
    const uint8_t *packed = (const uint8_t *)w + o * (C / 2);
    scale += o * (C / FP4_BLOCK);
    for (int g = 0; g < C / FP4_BLOCK; g++) {
        real s = float_from_e8m0(scale[g]);
        for (int j = 0; j < FP4_BLOCK / 2; j++) {
            uint8_t byte = packed[g * (FP4_BLOCK / 2) + j];
            row[g * FP4_BLOCK + 2 * j] = float_from_e2m1(byte) * s;
            row[g * FP4_BLOCK + 2 * j + 1] = float_from_e2m1(byte >> 4) * s;
        }
    }
}

// packed (O,C/2), scales (O,C/32) from finite w (O,C). The scale of a group is the smallest 2^t
// with max |w| <= 6 * 2^t, t >= -126. Source: deepseek-v4-flash.md, section 4.
void quantize_fp4(uint8_t *packed, uint8_t *scales, const float *w, int O, int C) {
    require(C % FP4_BLOCK == 0);
    #pragma omp parallel for
    for (int o = 0; o < O; o++) {
        for (int g = 0; g < C / FP4_BLOCK; g++) {
            const float *x = w + (size_t)o * C + g * FP4_BLOCK;
            uint8_t *bytes = packed + ((size_t)o * C + g * FP4_BLOCK) / 2;
            float amax = 0;
            for (int i = 0; i < FP4_BLOCK; i++) { amax = finite_max(amax, x[i]); }
            uint8_t s = scale_for(amax, 6);
            scales[(size_t)o * (C / FP4_BLOCK) + g] = s;
            for (int j = 0; j < FP4_BLOCK / 2; j++) {
                uint8_t low = e2m1_from_float(x[2 * j] * inverse_scale(s));
                uint8_t high = e2m1_from_float(x[2 * j + 1] * inverse_scale(s));
                bytes[j] = (uint8_t)(low | high << 4);
            }
        }
    }
}

// -------------------------------------------------------------------------------------------------
// 3 The grouped products
//
// Work is dealt to threads in tiles that never cross from one expert to the next, because a tile
// has one matrix. Tiles differ in size, so a thread takes the next one when it is done; the result
// does not show which thread that was. The trainer's products are lora_experts_forward and its
// backward (lora.c), which add an adapter before y is rounded; these are the same without one.

typedef struct { int expert, row, n; } ExpertTile;      // rows row .. row+n-1, all of one expert

// Cuts the rows of all experts into tiles of at most `tile` rows. Returns a host_alloc'ed list.
static inline ExpertTile *expert_tiles(int *count, const int *offset, int E, int tile) {
    *count = 0;
    for (int e = 0; e < E; e++) { *count += ceil_div(offset[e + 1] - offset[e], tile); }
    ExpertTile *list = (ExpertTile *)host_alloc(sizeof(ExpertTile) * *count);
    ExpertTile *next = list;
    for (int e = 0; e < E; e++) {
        for (int row = offset[e]; row < offset[e + 1]; row += tile) {
            *next++ = (ExpertTile){ e, row, min_int(tile, offset[e + 1] - row) };
        }
    }
    return list;
}

// out (rows,O) = inp (rows,C) times the transpose of the expert's matrix: w (E,O,C/2), scale
// (E,O,C/32). Rows offset[e] .. offset[e+1]-1 are expert e's; offset (E+1) starts at 0.
void experts_fp4_forward(act *out, const act *inp, const int *offset, const uint8_t *w,
                         const uint8_t *scale, int E, int C, int O) {
    CPU_ONLY();
    require(C % FP4_BLOCK == 0);
    Frozen m = { w, scale, widen_fp4 };
    int count;
    ExpertTile *list = expert_tiles(&count, offset, E, tile_rows(offset[E], C + O));
    #pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < count; i++) {
        size_t row = list[i].row, n = list[i].n;
        real *x = tile_alloc(n * C), *y = tile_alloc(n * O);
        load_rows(x, inp + row * C, n * C);
        frozen_forward(y, x, m, (size_t)list[i].expert * O, (int)n, C, O);
        store_rows(out + row * O, y, n * O);
        free(x);
        free(y);
    }
    free(list);
}

// dinp (rows,C) += dout (rows,O) times the expert's matrix.
void experts_fp4_backward(real *dinp, const act *dout, const int *offset, const uint8_t *w,
                          const uint8_t *scale, int E, int C, int O) {
    CPU_ONLY();
    require(C % FP4_BLOCK == 0);
    Frozen m = { w, scale, widen_fp4 };
    int count;
    ExpertTile *list = expert_tiles(&count, offset, E, tile_rows(offset[E], C + O));
    #pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < count; i++) {
        // forward: out[r][o] = sum_c inp[r][c] W[o][c], so dinp[r][c] += sum_o dout[r][o] W[o][c],
        // both with the W of the rows' expert
        size_t row = list[i].row, n = list[i].n;
        real *dy = tile_alloc(n * O);
        load_rows(dy, dout + row * O, n * O);
        frozen_backward(dinp + row * C, dy, m, (size_t)list[i].expert * O, (int)n, C, O);
        free(dy);
    }
    free(list);
}

// -------------------------------------------------------------------------------------------------
// 4 Recast to e4m3: the packed matrices as an fp8 product wants them
//
// Tensor cores multiply fp8 by fp8, and sum 128 terms before a scale can be applied. A packed row
// has four scales there. But e4m3 has exponents to spare: in a block of 128 x 128 the largest scale
// 2^m is kept, as 2^(m-6), and what a group's own scale 2^e lacks goes into its codes:
//
//     e2m1 * 2^e = (e2m1 * 2^(6-d)) * 2^(m-6),    d = m - e,    6 * 2^6 = 384 <= 448.
//
// The 6 is RECAST_LIFT. That is exact while d <= 14, RECAST_SPREAD: 0.5 * 2^(6-14) is the smallest
// subnormal e4m3 number. So it is a change of form, not a quantisation; a block with a wider spread
// stays with the bf16 product.
//
// The block's one scale also makes the backward possible: the transpose of the codes, with the
// transposed grid of scales, is the transpose of the matrix, and dx = dy W is a forward product
// with it. One layer at a time is recast, into scratch. Source: fp8-flow-moe.md, 2.10 and 3.

// The largest scale byte of the 128 x 128 block at (o0, c0) of a matrix with scale (O,C/32).
static inline int recast_largest(const uint8_t *scale, int o0, int c0, int C) {
    int largest = RECAST_LIFT;          // of a block of zeros, say: the scale byte must not wrap
    for (int o = o0; o < o0 + FP8_BLOCK; o++) {
        for (int g = c0 / FP4_BLOCK; g < (c0 + FP8_BLOCK) / FP4_BLOCK; g++) {
            int s = scale[(size_t)o * (C / FP4_BLOCK) + g];
            largest = s > largest ? s : largest;
        }
    }
    return largest;
}

// blocks_h[d] (RECAST_SPREAD + 2) += the number of 128 x 128 blocks of w (E,O,C/2), scale
// (E,O,C/32), whose widest group, among those that hold a number, lies d below the largest scale;
// in the last place those that a recast would round. O, C: multiples of 128.
void recast_spread(int *blocks_h, const uint8_t *w, const uint8_t *scale, int E, int C, int O) {
    GPU(recast_spread_gpu(blocks_h, w, scale, E, C, O))
    require(C % FP8_BLOCK == 0 && O % FP8_BLOCK == 0);
    for (int o0 = 0; o0 < E * O; o0 += FP8_BLOCK) {
        for (int c0 = 0; c0 < C; c0 += FP8_BLOCK) {
            int largest = recast_largest(scale, o0, c0, C), widest = 0;
            for (size_t i = 0; i < FP8_BLOCK * FP8_BLOCK / 2; i++) {
                size_t at = ((o0 + i / 64) * C + c0) / 2 + i % 64;
                int d = largest - scale[at / (FP4_BLOCK / 2)];
                if ((w[at] & 0x77) != 0 && d > widest) { widest = d; }
            }
            blocks_h[widest <= RECAST_SPREAD ? widest : RECAST_SPREAD + 1]++;
        }
    }
}
TWIN(recast_spread)

// codes (E,rows,C), scales (E,rows/128,C/128) from w (E,O,C/2), scale (E,O,C/32): the O rows become
// rows at .. at+O-1 of each expert's, so that two matrices may stand one above the other. turned:
// codes (E,C,rows), scales (E,C/128,rows/128) instead. All sizes are multiples of 128. If offset
// (E+1) is given, experts before the first and after the last with rows are left out.
void recast_fp4(uint8_t *codes, uint8_t *scales, const uint8_t *w, const uint8_t *scale, int turned,
                int at, int rows, const int *offset, int E, int C, int O) {
    GPU(recast_fp4_gpu(codes, scales, w, scale, turned, at, rows, offset, E, C, O))
    require(C % FP8_BLOCK == 0 && O % FP8_BLOCK == 0 && at % FP8_BLOCK == 0
            && rows % FP8_BLOCK == 0);
    int across = C / FP8_BLOCK, down = rows / FP8_BLOCK;
    #pragma omp parallel for
    for (int b = 0; b < E * (O / FP8_BLOCK) * across; b++) {
        int o0 = b / across * FP8_BLOCK, c0 = b % across * FP8_BLOCK;   // o0: of all experts' rows
        size_t e = o0 / O, row0 = o0 % O + at;
        if (offset && (offset[e + 1] == 0 || offset[e] == offset[E])) { continue; }
        int largest = recast_largest(scale, o0, c0, C);
        size_t grid = e * down * across + (turned ? c0 / FP8_BLOCK * down + row0 / FP8_BLOCK
                                                  : row0 / FP8_BLOCK * across + c0 / FP8_BLOCK);
        scales[grid] = (uint8_t)(largest - RECAST_LIFT);
        for (int i = 0; i < FP8_BLOCK; i++) {
            for (int c = c0; c < c0 + FP8_BLOCK; c++) {
                size_t from = (size_t)(o0 + i) * C + c, row = row0 + i;
                int shift = RECAST_LIFT - largest + scale[from / FP4_BLOCK];
                float value = float_from_e2m1(w[from / 2] >> (c % 2 * 4));
                size_t to = e * rows * C + (turned ? c * (size_t)rows + row : row * C + c);
                codes[to] = e4m3_from_float(ldexpf(value, shift));
            }
        }
    }
}
TWIN(recast_fp4)

// out (T,O) = the rows that inp (T,C), inp_scale (T,C/128) stand for, times the transpose of their
// expert's matrix: w (E,O,C) e4m3 codes, scale (E,O/128,C/128), as recast_fp4 leaves them. Sums of
// 128 terms are scaled and added in fp32. With a turned matrix this is the backward.
//
// An adapter is R more terms of each sum, a border of the matrix: out also gets s u v^T, u (T,R),
// before it is rounded. In the forward v is B (E,O,R); in the backward it is A (E,R,O), which
// v_by_k = 1 says. No adapter: u is NULL or R 0.
void experts_fp8_product(act *out, const uint8_t *inp, const uint8_t *inp_scale, const int *offset,
                         const uint8_t *w, const uint8_t *scale, const real *u, const real *v,
                         int v_by_k, float s, int E, int C, int O, int R) {
    GPU(experts_fp8_product_gpu(out, inp, inp_scale, offset, w, scale, u, v, v_by_k, s, E, C, O,
                                R))
    require(C % FP8_BLOCK == 0 && O % FP8_BLOCK == 0);
    Frozen m = { w, scale, widen_fp8 };     // E * O rows: the grids of scales follow each other too
    int count;
    ExpertTile *list = expert_tiles(&count, offset, E, tile_rows(offset[E], C + O));
    #pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < count; i++) {
        size_t e = list[i].expert, row = list[i].row, n = list[i].n;
        real *x = tile_alloc(n * C), *y = tile_alloc(n * O);
        for (size_t r = 0; r < n; r++) {
            for (int c = 0; c < C; c++) {
                size_t at = (row + r) * C + c;
                real of_group = float_from_e8m0(inp_scale[at / FP8_BLOCK]);
                x[r * C + c] = float_from_e4m3(inp[at]) * of_group;
            }
        }
        frozen_forward(y, x, m, e * O, (int)n, C, O);
        for (size_t k = 0; u != NULL && R > 0 && k < n * O; k++) {
            size_t r = row + k / O, o = k % O;
            real sum = 0;
            for (size_t j = 0; j < (size_t)R; j++) {
                sum += u[r * R + j] * (v_by_k ? v[(e * R + j) * O + o] : v[(e * O + o) * R + j]);
            }
            y[k] += s * sum;
        }
        store_rows(out + row * O, y, n * O);
        free(x);
        free(y);
    }
    free(list);
}
TWIN(experts_fp8_product)
#endif // MXFP4_C
