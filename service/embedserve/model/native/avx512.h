// Products, attention and activations in bfloat16 on AVX-512 registers, for processors that have no AMX.
//
// Decides how the arithmetic of one core is laid into registers. Must never know layers, rows of a batch or threads.
//
// Why not oneDNN's micro-kernel: its calls cost more than the products of a short text's attention (12 tokens: 8 us a
// token in all, 0.3 of them arithmetic), it has nowhere to put a bias or an activation, and it does not fetch the next
// panel of weights while it computes this one.

#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#define EMBEDSERVE_AVX512 1

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

namespace embedserve::avx512 {

constexpr int64_t LANES = 16;      // Floats, or pairs of bfloat16, in one register.
constexpr int64_t TILE_ROWS = 14;  // 14 rows of two registers: 28 sums, 2 weights and 1 input fill 31 of 32 registers.
constexpr int64_t TILE_WIDTH = 2 * LANES;
constexpr int64_t LINE = 64;  // Bytes that one fetch brings.

inline __m512bh pairs_of(__m512i bits) { return (__m512bh)bits; }

// Two registers of floats as bfloat16, to the nearest; NaN stays NaN.
inline void store_rounded(void* to, __m512 low, __m512 high) {
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// sums[r][j] = a[r] b[:, j] for R rows and Z registers of columns. All operands lie in pairs of bfloat16: `a` has pair p
// of row r at r * row + p * step, `b` is [pairs, 16 Z]. Beside it two stretches, `half` bytes apart, are fetched into the
// second cache where FETCH says so, `stride` bytes of each a pair.
struct Ahead {
  const char* first = nullptr;
  int64_t half = 0, stride = 0;
};

template <int R, int Z, bool FETCH>
void tile(int64_t pairs, const uint32_t* a, int64_t row, int64_t step, const uint32_t* b, float* sums, int64_t ld_sums,
          Ahead ahead) {
  __m512 sum[R][Z];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int z = 0; z < Z; ++z) sum[r][z] = _mm512_setzero_ps();
  }
  for (int64_t p = 0; p < pairs; ++p, a += step, b += Z * LANES) {
    if constexpr (FETCH) {
      _mm_prefetch(ahead.first, _MM_HINT_T1);
      _mm_prefetch(ahead.first + ahead.half, _MM_HINT_T1);
      ahead.first += ahead.stride;
    }
    __m512bh weights[Z];
#pragma GCC unroll 2
    for (int z = 0; z < Z; ++z) weights[z] = pairs_of(_mm512_loadu_si512(b + z * LANES));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512bh input = pairs_of(_mm512_set1_epi32(static_cast<int32_t>(a[r * row])));
#pragma GCC unroll 2
      for (int z = 0; z < Z; ++z) sum[r][z] = _mm512_dpbf16_ps(sum[r][z], input, weights[z]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int z = 0; z < Z; ++z) _mm512_storeu_ps(sums + r * ld_sums + z * LANES, sum[r][z]);
  }
}

using Tile = void (*)(int64_t, const uint32_t*, int64_t, int64_t, const uint32_t*, float*, int64_t, Ahead);

template <int Z, bool FETCH, int... R>
Tile tile_at(int64_t rows, std::integer_sequence<int, R...>) {
  static constexpr Tile all[] = {tile<R + 1, Z, FETCH>...};
  return all[rows - 1];
}

// For 1 to TILE_ROWS rows.
template <int Z, bool FETCH>
Tile tile_of(int64_t rows) {
  return tile_at<Z, FETCH>(rows, std::make_integer_sequence<int, TILE_ROWS>());
}

// Calls work(first, count) for tiles of about the same size.
template <typename F>
inline void in_tiles(int64_t rows, F&& work) {
  const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  for (int64_t i = 0, first = 0; i < tiles; ++i) {
    const int64_t count = (rows - first) / (tiles - i);
    work(first, count);
    first += count;
  }
}

// ------------------------------------------------------------------------------------------------------- numbers

// e^x for x <= 0, relative error below 4e-6: the weights of attention are rounded to 2^-9 after it.
inline __m512 exponential(__m512 x) {
  const __m512 scaled = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f));
  const __m512 whole = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 part = _mm512_sub_ps(scaled, whole);
  __m512 y = _mm512_set1_ps(9.61812910762848e-3f);
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(5.55041086648216e-2f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(2.40226506959101e-1f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(6.93147180559945e-1f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, whole);
}

// x Phi(x), absolute error below 2e-5. Phi(x) - 1/2 = x P(x^2) up to 4.5, where P(x^2) = 1 / (2 x), and beyond as there;
// P is a minimax polynomial for the error of the result, in 2 (x / 4.5)^2 - 1, which keeps its terms small.
inline __m512 gelu(__m512 x) {
  const __m512 edge = _mm512_set1_ps(4.5f);
  const __m512 within = _mm512_min_ps(edge, _mm512_max_ps(_mm512_set1_ps(-4.5f), x));  // a NaN is the second: it stays
  const __m512 u = _mm512_fmsub_ps(_mm512_mul_ps(within, _mm512_set1_ps(2.0f / 20.25f)), within, _mm512_set1_ps(1.0f));
  // Odd and even powers by themselves: half as long a chain.
  const __m512 square = _mm512_mul_ps(u, u);
  const auto next = [square](__m512 y, float coefficient) {
    return _mm512_fmadd_ps(y, square, _mm512_set1_ps(coefficient));
  };
  __m512 odd = _mm512_set1_ps(-9.411403444e-04f);
  odd = next(odd, -7.797127590e-03f);
  odd = next(odd, -1.751486771e-02f);
  odd = next(odd, -4.042911902e-02f);
  odd = next(odd, -7.717622817e-02f);
  __m512 even = _mm512_set1_ps(4.222919699e-03f);
  even = next(even, 1.083106082e-02f);
  even = next(even, 2.829001285e-02f);
  even = next(even, 5.472138152e-02f);
  even = next(even, 1.569042206e-01f);
  const __m512 y = _mm512_fmadd_ps(odd, u, even);
  return _mm512_mul_ps(x, _mm512_fmadd_ps(within, y, _mm512_set1_ps(0.5f)));
}

// What follows a product, over [rows, n] floats of it that lie `n` apart; n is a multiple of 32. `work` gets the sums of
// product and bias of 32 columns of a row, in two registers.
template <typename F>
inline void with_bias(const float* sums, int64_t rows, int64_t n, const float* bias, F&& work) {
  for (int64_t j = 0; j < n; j += TILE_WIDTH) {
    const __m512 low = _mm512_loadu_ps(bias + j), high = _mm512_loadu_ps(bias + j + LANES);
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = sums + r * n + j;
      work(r, j, _mm512_add_ps(_mm512_loadu_ps(from), low), _mm512_add_ps(_mm512_loadu_ps(from + LANES), high));
    }
  }
}

// As bfloat16 to rows that lie `ld` apart.
inline void add_bias(const float* sums, int64_t rows, int64_t n, const float* bias, uint16_t* to, int64_t ld) {
  with_bias(sums, rows, n, bias, [=](int64_t r, int64_t j, __m512 low, __m512 high) {
    store_rounded(to + r * ld + j, low, high);
  });
}

// The same through GELU.
inline void add_bias_gelu(const float* sums, int64_t rows, int64_t n, const float* bias, uint16_t* to, int64_t ld) {
  with_bias(sums, rows, n, bias, [=](int64_t r, int64_t j, __m512 low, __m512 high) {
    store_rounded(to + r * ld + j, gelu(low), gelu(high));
  });
}

// Added to what rows of floats hold.
inline void add_to(const float* sums, int64_t rows, int64_t n, const float* bias, float* to, int64_t ld) {
  with_bias(sums, rows, n, bias, [=](int64_t r, int64_t j, __m512 low, __m512 high) {
    float* place = to + r * ld + j;
    _mm512_storeu_ps(place, _mm512_add_ps(_mm512_loadu_ps(place), low));
    _mm512_storeu_ps(place + LANES, _mm512_add_ps(_mm512_loadu_ps(place + LANES), high));
  });
}

// Normalises a row in place and writes it as bfloat16, too; n is a multiple of 32.
inline void normalize(float* row, const float* weight, const float* bias, float eps, void* also, int64_t n) {
  __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
  for (int64_t j = 0; j < n; j += TILE_WIDTH) {
    low = _mm512_add_ps(low, _mm512_loadu_ps(row + j));
    high = _mm512_add_ps(high, _mm512_loadu_ps(row + j + LANES));
  }
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(_mm512_add_ps(low, high)) / static_cast<float>(n));
  low = high = _mm512_setzero_ps();
  for (int64_t j = 0; j < n; j += TILE_WIDTH) {
    const __m512 some = _mm512_sub_ps(_mm512_loadu_ps(row + j), mean);
    const __m512 others = _mm512_sub_ps(_mm512_loadu_ps(row + j + LANES), mean);
    low = _mm512_fmadd_ps(some, some, low);
    high = _mm512_fmadd_ps(others, others, high);
  }
  const float variance = _mm512_reduce_add_ps(_mm512_add_ps(low, high)) / static_cast<float>(n);
  const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(variance + eps));
  const auto normal = [&](int64_t j) {
    const __m512 value = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(row + j), mean), scale);
    return _mm512_fmadd_ps(value, _mm512_loadu_ps(weight + j), _mm512_loadu_ps(bias + j));
  };
  for (int64_t j = 0; j < n; j += TILE_WIDTH) {
    const __m512 some = normal(j), others = normal(j + LANES);
    _mm512_storeu_ps(row + j, some);
    _mm512_storeu_ps(row + j + LANES, others);
    store_rounded(static_cast<uint16_t*>(also) + j, some, others);
  }
}

// ----------------------------------------------------------------------------------------------------- attention

// What attention of one head needs; sizes in 4 bytes, for the longest row of `n` tokens.
struct Room {
  uint32_t* queries;  // [head / 2, 32]
  float* scores;      // [n, 32]
  uint32_t* values;   // [head / 32, n / 2 rounded up, 32]

  static int64_t queries_size(int64_t head) { return head / 2 * TILE_WIDTH; }
  static int64_t scores_size(int64_t n) { return n * TILE_WIDTH; }
  static int64_t values_size(int64_t n, int64_t head) { return (n + 1) / 2 * head; }
};

// 16 rows of 16 pairs, `stride` pairs apart, as columns `ld` pairs apart.
inline void transpose(const uint32_t* from, int64_t stride, uint32_t* to, int64_t ld) {
  __m512i fours[4][4];
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) {
    const uint32_t* rows = from + 4 * g * stride;
    const __m512i a = _mm512_loadu_si512(rows), b = _mm512_loadu_si512(rows + stride);
    const __m512i c = _mm512_loadu_si512(rows + 2 * stride), d = _mm512_loadu_si512(rows + 3 * stride);
    const __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
    const __m512i cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
    fours[g][0] = _mm512_unpacklo_epi64(ab_low, cd_low);
    fours[g][1] = _mm512_unpackhi_epi64(ab_low, cd_low);
    fours[g][2] = _mm512_unpacklo_epi64(ab_high, cd_high);
    fours[g][3] = _mm512_unpackhi_epi64(ab_high, cd_high);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_shuffle_i32x4(fours[0][c], fours[1][c], 0x44);
    const __m512i b = _mm512_shuffle_i32x4(fours[2][c], fours[3][c], 0x44);
    const __m512i d = _mm512_shuffle_i32x4(fours[0][c], fours[1][c], 0xee);
    const __m512i e = _mm512_shuffle_i32x4(fours[2][c], fours[3][c], 0xee);
    _mm512_storeu_si512(to + c * ld, _mm512_shuffle_i32x4(a, b, 0x88));
    _mm512_storeu_si512(to + (4 + c) * ld, _mm512_shuffle_i32x4(a, b, 0xdd));
    _mm512_storeu_si512(to + (8 + c) * ld, _mm512_shuffle_i32x4(d, e, 0x88));
    _mm512_storeu_si512(to + (12 + c) * ld, _mm512_shuffle_i32x4(d, e, 0xdd));
  }
}

// bfloat16 i of `even` and of `odd` side by side: those of the first 16, or of the last.
inline __m512i interleaved(__m512i even, __m512i odd, bool last) {
  alignas(64) static constexpr uint16_t FIRST[] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                   8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i shift = _mm512_set1_epi16(last ? 16 : 0);
  return _mm512_permutex2var_epi16(even, _mm512_add_epi16(_mm512_load_si512(FIRST), shift), odd);
}

// Rows of `head` values, `stride` pairs apart, as panels of 32 columns for a product; a zero row makes the last pair.
inline void lay_values(const uint32_t* from, int64_t stride, int64_t count, int64_t head, uint32_t* to) {
  const int64_t pairs = (count + 1) / 2;
  for (int64_t p = 0; p < pairs; ++p) {
    const uint32_t* even = from + 2 * p * stride;
    for (int64_t d = 0; d < head / TILE_WIDTH; ++d) {
      const __m512i some = _mm512_loadu_si512(even + d * LANES);
      const __m512i others = 2 * p + 1 < count ? _mm512_loadu_si512(even + stride + d * LANES) : _mm512_setzero_si512();
      uint32_t* place = to + (d * pairs + p) * TILE_WIDTH;
      _mm512_storeu_si512(place, interleaved(some, others, false));
      _mm512_storeu_si512(place + LANES, interleaved(some, others, true));
    }
  }
}

// Scores [keys, 16 Z] of 16 Z queries become weights, in pairs of keys and in the same place; 1 / their sums.
template <int Z>
void soften(float* scores, int64_t keys, float scale, float* shares) {
  constexpr int64_t WIDTH = Z * LANES;
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512 factor = _mm512_set1_ps(scale);
#pragma GCC unroll 2
  for (int z = 0; z < Z; ++z) {
    float* column = scores + z * LANES;
    __m512 highest = _mm512_loadu_ps(column), other = highest;
    for (int64_t k = 1; k + 1 < keys; k += 2) {
      highest = _mm512_max_ps(highest, _mm512_loadu_ps(column + k * WIDTH));
      other = _mm512_max_ps(other, _mm512_loadu_ps(column + (k + 1) * WIDTH));
    }
    highest = _mm512_max_ps(_mm512_max_ps(highest, other), _mm512_loadu_ps(column + (keys - 1) * WIDTH));
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < keys; k += 2) {
      const auto weight = [&](int64_t key) {
        return exponential(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(column + key * WIDTH), highest), factor));
      };
      const __m512 even = weight(k);
      const __m512 odd = k + 1 < keys ? weight(k + 1) : _mm512_setzero_ps();
      sum = _mm512_add_ps(sum, _mm512_add_ps(even, odd));
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
      // Pair k / 2 lies before score k, which has been read.
      _mm512_storeu_si512(column + k / 2 * WIDTH, _mm512_permutexvar_epi16(order, both));
    }
    _mm512_storeu_ps(shares + z * LANES, _mm512_div_ps(_mm512_set1_ps(1.0f), sum));
  }
}

// Up to 16 Z queries of one head over all keys of their row. Strides in pairs.
template <int Z>
void attend_queries(const uint32_t* queries, const uint32_t* keys, int64_t stride, int64_t asked, int64_t count,
                    int64_t head, float scale, uint32_t* to, int64_t ld_to, const Room& room) {
  constexpr int64_t WIDTH = Z * LANES;
  for (int64_t z = 0; z < Z; ++z) {
    for (int64_t d = 0; d < head / TILE_WIDTH; ++d)
      transpose(queries + z * LANES * stride + d * LANES, stride, room.queries + d * LANES * WIDTH + z * LANES, WIDTH);
  }
  in_tiles(count, [&](int64_t first, int64_t rows) {
    tile_of<Z, false>(rows)(head / 2, keys + first * stride, stride, 1, room.queries, room.scores + first * WIDTH, WIDTH,
                            {});
  });
  float shares[WIDTH];
  soften<Z>(room.scores, count, scale, shares);
  const uint32_t* weights = reinterpret_cast<const uint32_t*>(room.scores);
  const int64_t pairs = (count + 1) / 2;
  in_tiles(asked, [&](int64_t first, int64_t rows) {
    for (int64_t d = 0; d < head / TILE_WIDTH; ++d) {
      alignas(64) float sums[TILE_ROWS * TILE_WIDTH];
      tile_of<2, false>(rows)(pairs, weights + first, 1, WIDTH, room.values + d * pairs * TILE_WIDTH, sums, TILE_WIDTH,
                              {});
      for (int64_t r = 0; r < rows; ++r) {
        const __m512 share = _mm512_set1_ps(shares[first + r]);
        store_rounded(to + (first + r) * ld_to + d * LANES, _mm512_mul_ps(share, _mm512_load_ps(sums + r * TILE_WIDTH)),
                      _mm512_mul_ps(share, _mm512_load_ps(sums + r * TILE_WIDTH + LANES)));
      }
    }
  });
}

// Attention of one head over one row of `count` tokens; `head` is a multiple of 32. Up to 31 rows behind the last may
// be read; what they hold is nobody's. Strides in pairs.
inline void attend(const uint32_t* queries, const uint32_t* keys, const uint32_t* values, int64_t stride, int64_t count,
                   int64_t head, float scale, uint32_t* to, int64_t ld_to, const Room& room) {
  lay_values(values, stride, count, head, room.values);
  for (int64_t first = 0; first < count; first += TILE_WIDTH) {
    const int64_t asked = std::min(TILE_WIDTH, count - first);
    const auto work = asked > LANES ? attend_queries<2> : attend_queries<1>;
    work(queries + first * stride, keys, stride, asked, count, head, scale, to + first * ld_to, ld_to, room);
  }
}

}  // namespace embedserve::avx512

#endif
