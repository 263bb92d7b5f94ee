// Matrix products of rows of floats with packed panels, and the packing.
#pragma once
#include <algorithm>
#include <utility>

#include "vectors.h"

// Rows of a register tile: ROWS * 4 sums, 4 weights and a broadcast value fit the 32
// (AVX-512, NEON) or 16 (AVX2) registers.
#if defined(__AVX__) && !defined(__AVX512F__)
constexpr int ROWS = 3;
#else
constexpr int ROWS = 6;
#endif
constexpr int WIDTH = 4 * LANES;     // floats of one panel row
constexpr int BLOCK = 1024;          // panel rows worked through by all tiles together:
                                     // 256 KiB stay in the second-level cache
constexpr int GROUP = 16 * ROWS;     // rows whose sums wait for the next block
constexpr int AHEAD = 24 * WIDTH;    // floats between what is read and what is fetched

// One product: rows of K floats by pointer, and a panel [K][WIDTH].
struct Factor {
  int64_t K;
  const float* const* a;
  const float* panel;
};

// z[r][0:WIDTH] += sum over k of a[r][k] panel[k][0:WIDTH], for R rows at once.
// FETCH: the panel comes from memory, and the processor looks no further than a page.
template <int R, bool FETCH>
static void tile(int64_t K, const float* const* a, int64_t at, const float* panel,
                 float* z) {
  Vec sum[R][4];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) sum[r][j] = load(z + r * WIDTH + j * LANES);
  for (int64_t k = at; k < at + K; k++, panel += WIDTH) {
    Vec w[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      w[j] = load(panel + j * LANES);
      if (FETCH) __builtin_prefetch(panel + AHEAD + j * LANES);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      Vec x = full(a[r][k]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) sum[r][j] += x * w[j];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) store(z + r * WIDTH + j * LANES, sum[r][j]);
}

template <bool FETCH>
static inline void tile(int rows, int64_t K, const float* const* a, int64_t at,
                        const float* panel, float* z) {
  switch (rows) {
    case 1: return tile<1, FETCH>(K, a, at, panel, z);
    case 2: return tile<2, FETCH>(K, a, at, panel, z);
    case 3: return tile<3, FETCH>(K, a, at, panel, z);
#if !defined(__AVX__) || defined(__AVX512F__)
    case 4: return tile<4, FETCH>(K, a, at, panel, z);
    case 5: return tile<5, FETCH>(K, a, at, panel, z);
    case 6: return tile<6, FETCH>(K, a, at, panel, z);
#endif
  }
}

// Products of m rows, summed over the factors: begin(r, z) writes what to add to,
// end(r, z) takes the sum. Tiles differ by a row at most: a tile of one is slow.
template <class Begin, class End>
static inline void product(int64_t m, const Factor* factors, int count, Begin begin,
                           End end) {
  alignas(64) float z[GROUP * WIDTH];
  int64_t K = 0;
  for (int i = 0; i < count; i++) K += factors[i].K;
  const int64_t group = K > BLOCK ? GROUP : ROWS;
  const int64_t groups = (m + group - 1) / group;
  for (int64_t g = 0, row = 0; g < groups; g++) {
    const int64_t n = (m - row + groups - g - 1) / (groups - g);
    for (int64_t r = 0; r < n; r++) begin(row + r, z + r * WIDTH);
    for (int i = 0; i < count; i++)
      for (int64_t k = 0; k < factors[i].K; k += BLOCK) {
        const int64_t depth = std::min<int64_t>(BLOCK, factors[i].K - k);
        const float* panel = factors[i].panel + k * WIDTH;
        for (int64_t r = 0, left = (n + ROWS - 1) / ROWS; left > 0; left--) {
          const int rows = (n - r + left - 1) / left;
          const float* const* a = factors[i].a + row + r;
          if (g == 0 && r == 0)
            tile<true>(rows, depth, a, k, panel, z + r * WIDTH);
          else
            tile<false>(rows, depth, a, k, panel, z + r * WIDTH);
          r += rows;
        }
      }
    for (int64_t r = 0; r < n; r++) end(row + r, z + r * WIDTH);
    row += n;
  }
}

static inline void clear_row(float* z) { std::memset(z, 0, WIDTH * sizeof(float)); }

// Panel p of [K][4H] weights: row k holds gate j of units p*LANES.. at j*LANES.
static void pack_gates(const float* w, int64_t K, int64_t H, int64_t p, float* out) {
  const int n = std::min<int64_t>(LANES, H - p * LANES);
  for (int64_t k = 0; k < K; k++)
    for (int j = 0; j < 4; j++)
      store(out + k * WIDTH + j * LANES, load(w + (k * 4 + j) * H + p * LANES, n));
}

// Swaps the blocks off the diagonal, S lanes wide, of two rows of a square.
template <int S, std::size_t... L>
static inline void swap_blocks(Vec& a, Vec& b, std::index_sequence<L...>) {
  Vec first = __builtin_shufflevector(a, b, (L & S ? int(L) - S + LANES : int(L))...);
  b = __builtin_shufflevector(a, b, (L & S ? int(L) + LANES : int(L) + S)...);
  a = first;
}
template <int S>
static inline void transpose_blocks(Vec* v) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++)
    if (!(i & S)) swap_blocks<S>(v[i], v[i + S], std::make_index_sequence<LANES>());
  if constexpr (S > 1) transpose_blocks<S / 2>(v);
}

// Transposes the rows a[0..n) of K floats: out[k * stride + u] = a[u][k].
static void transpose(const float* const* a, int64_t n, int64_t K, float* out,
                      int64_t stride) {
  for (int64_t u = 0; u < n; u += LANES) {
    const int across = std::min<int64_t>(LANES, n - u);
    for (int64_t k = 0; k < K; k += LANES) {
      const int down = std::min<int64_t>(LANES, K - k);
      Vec v[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++)
        v[i] = i < across ? load(a[u + i] + k, down) : Vec{};
      transpose_blocks<LANES / 2>(v);
      float* to = out + k * stride + u;
      if (down == LANES && across == LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) store(to + i * stride, v[i]);
      } else {
        for (int i = 0; i < down; i++) store(to + i * stride, v[i], across);
      }
    }
  }
}

// Panel p of the transpose of w [M][K]: row k holds w[p*WIDTH + 0 .. WIDTH-1][k].
static void pack_transposed(const float* w, int64_t M, int64_t K, int64_t p,
                            float* out) {
  const int64_t n = std::min<int64_t>(WIDTH, M - p * WIDTH);
  const float* rows[WIDTH];
  for (int64_t u = 0; u < n; u++) rows[u] = w + (p * WIDTH + u) * K;
  if (n < WIDTH) std::memset(out, 0, K * WIDTH * sizeof(float));
  transpose(rows, n, K, out, WIDTH);
}

// The same products with weights as they lie, for so few rows that packing them would
// take longer.

// z[p][j][0:LANES] += sum over k of x[k] w[k][j][units of panel p], panels p0 to p1.
static void direct_gates(const float* w, int64_t K, int64_t H, const float* x,
                         int64_t p0, int64_t p1, float* z) {
  constexpr int DEPTH = 4;  // rows of w for one read and write of z
  for (int64_t k = 0; k < K; k += DEPTH) {
    const int depth = std::min<int64_t>(DEPTH, K - k);
    Vec xs[DEPTH];
    for (int i = 0; i < DEPTH; i++) xs[i] = full(i < depth ? x[k + i] : 0.0f);
    for (int j = 0; j < 4; j++)
      for (int64_t p = p0; p < p1; p++) {
        const int64_t u = p * LANES;
        const float* from = w + (k * 4 + j) * H + u;
        float* to = z + (p - p0) * WIDTH + j * LANES;
        Vec sum = load(to);
        if (depth == DEPTH && u + LANES <= H) {
#pragma GCC unroll 4
          for (int i = 0; i < DEPTH; i++) {
            sum += xs[i] * load(from + i * 4 * H);
            __builtin_prefetch(from + (i + DEPTH) * 4 * H);
          }
        } else {
          const int n = std::min<int64_t>(LANES, H - u);
          for (int i = 0; i < depth; i++) sum += xs[i] * load(from + i * 4 * H, n);
        }
        store(to, sum);
      }
  }
}

// out[i] = sum over k of w[i][k] x[k].
static void direct_rows(const float* w, int64_t n, int64_t K, const float* x,
                        float* out) {
  constexpr int SUMS = 4;  // as many as hide the latency of an addition
  for (int64_t i = 0; i < n; i++, w += K) {
    Vec sums[SUMS] = {};
    for (int64_t k = 0; k < K; k += SUMS * LANES) {
      if (k + SUMS * LANES <= K) {
#pragma GCC unroll 4
        for (int j = 0; j < SUMS; j++) {
          sums[j] += load(w + k + j * LANES) * load(x + k + j * LANES);
          __builtin_prefetch(w + k + AHEAD + j * LANES);
        }
      } else {
        for (int64_t at = k; at < K; at += LANES) {
          const int lanes = std::min<int64_t>(LANES, K - at);
          sums[0] += load(w + at, lanes) * load(x + at, lanes);
        }
      }
    }
    out[i] = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
}
