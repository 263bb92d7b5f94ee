// One LSTM layer on the CPU, forward and backward in time, for XLA's foreign function
// interface. float32, gate order i f g o, time-major arrays (see flax_lstm.cell).
//
// For s = 0 .. length-1:  z = x_t W + h R + b;  i, f, o = sigmoid;  g = tanh;
//                         c = f c + i g;  h = o tanh(c)      (t = s, or length-1-s)
//
// Weights  packed once per call into panels [K][LANES * 4]: one panel holds the four
//          gates of LANES units, so one register tile ends with all it needs for c, h.
// Tile     ROWS rows by 4 vectors in registers; K in blocks that fit the L1 cache.
// Rows     are visited by falling length and only while they are alive: the padding of
//          a batch is neither read nor computed. A reset reads a row of zeros as h, c.
// Threads  split the rows when there are many (no waiting at all), else the panels of
//          each step. Work is claimed from a counter, so a pool thread that comes late
//          or never costs nothing and the result does not depend on their number.
// Order    each row's sums run over k in order, whatever the batch: same bits.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using std::int64_t;

// Vector width in floats, and rows of a register tile: ROWS * 4 accumulators, 4 weights
// and a broadcast value fit the 32 (AVX-512, NEON) or 16 (AVX2) registers.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 6;
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 3;
#else
constexpr int LANES = 4, ROWS = 6;
#endif
constexpr int WIDTH = 4 * LANES;  // floats of one panel row
constexpr int BLOCK_K = 128;      // panel block: 128 * WIDTH floats <= 32 KiB

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef std::int32_t Int __attribute__((vector_size(LANES * 4)));

static inline Vec load(const float* p) { Vec v; std::memcpy(&v, p, sizeof v); return v; }
static inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
static inline Vec load(const float* p, int n) {  // the first n lanes, the others 0
  if (n >= LANES) return load(p);
  Vec v = {};
  std::memcpy(&v, p, n * sizeof(float));
  return v;
}
static inline void store(float* p, Vec v, int n) {
  std::memcpy(p, &v, std::min(n, LANES) * sizeof(float));
}
static inline Vec full(float x) { return Vec{} + x; }

// exp(x) for |x| <= 87: x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 split in two parts
// (Cody & Waite 1980), e^r by its Taylor series to r^7 (relative error 4e-9).
static inline Vec exp(Vec x) {
  x = x > 87.0f ? full(87.0f) : x;
  x = x < -87.0f ? full(-87.0f) : x;
  const Vec magic = full(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Vec n = (x * 1.44269504f + magic) - magic;
  Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = full(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // NaN survives through p; its n is garbage, so it must not index anything.
  Int e = __builtin_convertvector(x == x ? n : Vec{}, Int);
  Int bits = (e + 127) << 23;
  return p * reinterpret_cast<Vec&>(bits);
}
static inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }
// Near 0 the quotient cancels; there the odd series by the coefficients of Cephes'
// tanhf (Moshier 1984-1995), good to 1 ulp below 0.625.
static inline Vec tanh(Vec x) {
  Vec e = exp(2.0f * x);
  Vec far = 1.0f - 2.0f / (e + 1.0f);
  Vec q = x * x;
  Vec p = full(-5.70498872745e-3f);
  p = p * q + 2.06390887954e-2f;
  p = p * q + -5.37397155531e-2f;
  p = p * q + 1.33314422036e-1f;
  p = p * q + -3.33332819422e-1f;
  Vec near = x + x * q * p;
  return (q < 0.390625f) ? near : far;
}

// z[r][0:WIDTH] += sum over k of a[r][k] * panel[k][0:WIDTH], for R rows at once.
template <int R>
static inline void tile(int n, const float* const* a, int64_t at, const float* panel,
                        float* z) {
  Vec sum[R][4];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) sum[r][j] = load(z + r * WIDTH + j * LANES);
  for (int k = 0; k < n; k++, panel += WIDTH) {
    Vec w[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) w[j] = load(panel + j * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      Vec x = full(a[r][at + k]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) sum[r][j] += x * w[j];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) store(z + r * WIDTH + j * LANES, sum[r][j]);
}

// z[m][WIDTH] += a[m][K] panel[K][WIDTH], rows of a by pointer.
static void product(int64_t m, int64_t K, const float* const* a, const float* panel,
                    float* z) {
  for (int64_t k = 0; k < K; k += BLOCK_K) {
    int n = std::min<int64_t>(BLOCK_K, K - k);
    const float* p = panel + k * WIDTH;
    int64_t r = 0;
    for (; r + ROWS <= m; r += ROWS) tile<ROWS>(n, a + r, k, p, z + r * WIDTH);
    switch (m - r) {
      case 5: tile<5>(n, a + r, k, p, z + r * WIDTH); break;
      case 4: tile<4>(n, a + r, k, p, z + r * WIDTH); break;
      case 3: tile<3>(n, a + r, k, p, z + r * WIDTH); break;
      case 2: tile<2>(n, a + r, k, p, z + r * WIDTH); break;
      case 1: tile<1>(n, a + r, k, p, z + r * WIDTH); break;
    }
  }
}

// Panel p of [K][4H] weights: row k holds gate j of units p*LANES.. at j*LANES.
static void pack_gates(const float* w, int64_t K, int64_t H, int64_t p, float* out) {
  int n = std::min<int64_t>(LANES, H - p * LANES);
  for (int64_t k = 0; k < K; k++)
    for (int j = 0; j < 4; j++)
      store(out + k * WIDTH + j * LANES, load(w + (k * 4 + j) * H + p * LANES, n));
}

// Panel p of the transpose of w [M][K]: row k holds w[p*WIDTH + 0 .. WIDTH-1][k].
static void pack_transposed(const float* w, int64_t M, int64_t K, int64_t p,
                            float* out) {
  int64_t n = std::min<int64_t>(WIDTH, M - p * WIDTH);
  const int64_t step = 16;  // blocks, so that both sides stay in the cache
  for (int64_t k0 = 0; k0 < K; k0 += step)
    for (int64_t u = 0; u < WIDTH; u++)
      for (int64_t k = k0; k < std::min(k0 + step, K); k++)
        out[k * WIDTH + u] = u < n ? w[(p * WIDTH + u) * K + k] : 0.0f;
}

// Numbered tasks in phases: a task starts when all tasks of earlier phases are done.
// Claims are in order, so whatever a thread waits for is already running elsewhere.
class Phases {
 public:
  using Task = std::function<void(int64_t phase, int64_t task)>;
  Phases(std::vector<int64_t> counts, Task task) : task_(std::move(task)) {
    first_.push_back(0);
    for (int64_t n : counts) first_.push_back(first_.back() + n);
  }
  void work() {
    size_t phase = 0;
    for (;;) {
      int64_t id = next_.fetch_add(1, std::memory_order_relaxed);
      if (id >= first_.back()) return;
      while (id >= first_[phase + 1]) phase++;
      wait(first_[phase]);
      task_(phase, id - first_[phase]);
      done_.fetch_add(1, std::memory_order_release);
    }
  }
  void wait(int64_t n) const {
    for (int spins = 0; done_.load(std::memory_order_acquire) < n; spins++)
      if (spins > 2000) std::this_thread::yield();
  }
  void finish() { work(); wait(first_.back()); }

 private:
  std::vector<int64_t> first_;
  Task task_;
  std::atomic<int64_t> next_{0}, done_{0};
};

static void run(ffi::ThreadPool& pool, int64_t threads, std::vector<int64_t> counts,
                Phases::Task task) {
  auto phases = std::make_shared<Phases>(std::move(counts), std::move(task));
  for (int64_t i = 1; i < threads; i++) pool.Schedule([phases] { phases->work(); });
  phases->finish();
}

// What a call is about: sizes, and the rows of the batch by falling length.
struct Batch {
  int64_t T, B, H;
  bool reverse;
  const std::int32_t* lengths;
  const std::uint8_t* resets;  // [T][B] or null
  std::vector<int64_t> rows;   // batch index of the i-th longest row
  int64_t longest;

  Batch(int64_t T, int64_t B, int64_t H, bool reverse, const std::int32_t* lengths,
        const std::uint8_t* resets)
      : T(T), B(B), H(H), reverse(reverse), lengths(lengths), resets(resets), rows(B) {
    std::iota(rows.begin(), rows.end(), 0);
    std::stable_sort(rows.begin(), rows.end(),
                     [&](int64_t a, int64_t b) { return length(a) > length(b); });
    longest = B ? length(rows[0]) : 0;
  }
  int64_t length(int64_t b) const {
    return std::clamp<int64_t>(lengths[b], 0, T);
  }
  // Index t * B + b of step s of row b.
  int64_t at(int64_t b, int64_t s) const {
    return (reverse ? length(b) - 1 - s : s) * B + b;
  }
  bool reset(int64_t b, int64_t s) const { return resets && resets[at(b, s)]; }
  // Number of the given rows (a slice by falling length) alive at step s.
  int64_t alive(const std::vector<int64_t>& slice, int64_t s) const {
    return std::partition_point(slice.begin(), slice.end(),
                                [&](int64_t b) { return length(b) > s; }) -
           slice.begin();
  }
  void clear_padding(float* out, int64_t width) const {
    for (int64_t b = 0; b < B; b++)
      for (int64_t t = length(b); t < T; t++)
        std::memset(out + (t * B + b) * width, 0, width * sizeof(float));
  }
  // Rows dealt out like cards: every slice has its share of long and short ones.
  std::vector<std::vector<int64_t>> deal(int64_t n) const {
    std::vector<std::vector<int64_t>> slices(n);
    for (int64_t i = 0; i < B; i++) slices[i % n].push_back(rows[i]);
    return slices;
  }
};

// Many rows: each thread takes its share of them through all of time. Few: all rows
// together, and the threads share the panels of each step.
static bool split_rows(int64_t B, int64_t H, int64_t threads) {
  return threads == 1 || B >= (H <= 256 ? 8 : 16) * threads;
}

// Scratch of one thread.
struct Scratch {
  std::vector<const float*> a;
  std::vector<float> z;
};
static Scratch& scratch(int64_t rows) {
  static thread_local Scratch s;
  if (static_cast<int64_t>(s.a.size()) < rows) {
    s.a.resize(rows);
    s.z.resize(rows * WIDTH);
  }
  return s;
}

struct Forward {
  const Batch& batch;
  int64_t I;
  const float *x, *bias, *h0;
  float *hs, *cT, *hT, *before, *gates;  // before and gates null when not kept
  std::vector<float> kernel, recurrent, zeros;
  bool hoist;
  std::vector<float> projected;  // [chunk][B][panels][WIDTH] when hoisted
  int64_t chunk = 0;

  int64_t panels() const { return (batch.H + LANES - 1) / LANES; }

  // Projects the inputs of `count` steps from s0 on, panel p.
  void project(int64_t s0, int64_t count, int64_t p) {
    const int64_t group = 96;
    auto& s = scratch(group);
    std::vector<int64_t> where;
    auto flush = [&] {
      int64_t m = where.size();
      bias_into(s.z.data(), m, p);
      product(m, I, s.a.data(), kernel.data() + p * I * WIDTH, s.z.data());
      for (int64_t r = 0; r < m; r++)
        std::memcpy(&projected[(where[r] * panels() + p) * WIDTH], &s.z[r * WIDTH],
                    WIDTH * sizeof(float));
      where.clear();
    };
    for (int64_t step = s0; step < s0 + count; step++) {
      int64_t n = batch.alive(batch.rows, step);
      for (int64_t i = 0; i < n; i++) {
        s.a[where.size()] = x + batch.at(batch.rows[i], step) * I;
        where.push_back((step - s0) * batch.B + i);
        if (static_cast<int64_t>(where.size()) == group) flush();
      }
    }
    flush();
  }
  void bias_into(float* z, int64_t m, int64_t p) const {
    const int64_t H = batch.H;
    int n = std::min<int64_t>(LANES, H - p * LANES);
    Vec b[4];
    for (int j = 0; j < 4; j++) b[j] = load(bias + j * H + p * LANES, n);
    for (int64_t r = 0; r < m; r++)
      for (int j = 0; j < 4; j++) store(z + r * WIDTH + j * LANES, b[j]);
  }
  const float* h_before(int64_t b, int64_t s) const {
    if (batch.reset(b, s)) return zeros.data();
    return s ? hs + batch.at(b, s - 1) * batch.H : h0 + b * batch.H;
  }
  // Step s of the first n rows of `slice`, panel p.
  void step(const std::vector<int64_t>& slice, int64_t n, int64_t s, int64_t p,
            int64_t s0) {
    const int64_t H = batch.H;
    auto& tmp = scratch(n);
    float* z = tmp.z.data();
    if (hoist) {
      for (int64_t r = 0; r < n; r++)
        std::memcpy(z + r * WIDTH,
                    &projected[(((s - s0) * batch.B + r) * panels() + p) * WIDTH],
                    WIDTH * sizeof(float));
    } else {
      bias_into(z, n, p);
      for (int64_t r = 0; r < n; r++) tmp.a[r] = x + batch.at(slice[r], s) * I;
      product(n, I, tmp.a.data(), kernel.data() + p * I * WIDTH, z);
    }
    for (int64_t r = 0; r < n; r++) tmp.a[r] = h_before(slice[r], s);
    product(n, H, tmp.a.data(), recurrent.data() + p * H * WIDTH, z);
    const int64_t u = p * LANES;
    const int lanes = std::min<int64_t>(LANES, H - u);
    for (int64_t r = 0; r < n; r++) {
      const int64_t b = slice[r], at = batch.at(b, s);
      const float* zr = z + r * WIDTH;
      Vec i = sigmoid(load(zr)), f = sigmoid(load(zr + LANES)),
          g = tanh(load(zr + 2 * LANES)), o = sigmoid(load(zr + 3 * LANES));
      float* c = cT + b * H + u;
      Vec old = batch.reset(b, s) ? Vec{} : load(c, lanes);
      Vec cell = f * old + i * g;
      store(c, cell, lanes);
      store(hs + at * H + u, o * tanh(cell), lanes);
      if (gates) {
        store(before + at * H + u, old, lanes);
        float* a = gates + at * 4 * H + u;
        store(a, i, lanes);
        store(a + H, f, lanes);
        store(a + 2 * H, g, lanes);
        store(a + 3 * H, o, lanes);
      }
    }
  }
};

using F32 = ffi::Buffer<ffi::F32>;

static ffi::Error forward(ffi::ThreadPool pool, F32 x, F32 kernel, F32 recurrent,
                          F32 bias, F32 c0, F32 h0, ffi::Buffer<ffi::S32> lengths,
                          ffi::Buffer<ffi::U8> resets, ffi::ResultBuffer<ffi::F32> hs,
                          ffi::ResultBuffer<ffi::F32> cT,
                          ffi::ResultBuffer<ffi::F32> hT,
                          ffi::ResultBuffer<ffi::F32> before,
                          ffi::ResultBuffer<ffi::F32> gates, bool reverse) {
  auto dims = x.dimensions();
  const int64_t T = dims[0], B = dims[1], I = dims[2], H = h0.dimensions()[1];
  const bool keep = gates->element_count() > 0;
  Batch batch(T, B, H, reverse, lengths.typed_data(),
              resets.element_count() ? resets.typed_data() : nullptr);
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const bool by_rows = split_rows(B, H, threads);
  Forward call{batch, I, x.typed_data(), bias.typed_data(), h0.typed_data(),
               hs->typed_data(), cT->typed_data(), hT->typed_data(),
               keep ? before->typed_data() : nullptr,
               keep ? gates->typed_data() : nullptr};
  call.hoist = !by_rows;
  const int64_t P = call.panels();
  call.kernel.resize(P * I * WIDTH);
  call.recurrent.resize(P * H * WIDTH);
  call.zeros.resize(H + LANES);
  std::memcpy(call.cT, c0.typed_data(), B * H * sizeof(float));  // carried in place
  batch.clear_padding(call.hs, H);
  if (keep) {
    batch.clear_padding(call.before, H);
    batch.clear_padding(call.gates, 4 * H);
  }
  auto pack = [&](int64_t p) {
    pack_gates(kernel.typed_data(), I, H, p, &call.kernel[p * I * WIDTH]);
    pack_gates(recurrent.typed_data(), H, H, p, &call.recurrent[p * H * WIDTH]);
  };
  const int64_t S = batch.longest;
  if (by_rows) {
    auto slices = batch.deal(threads);
    run(pool, threads, {P, threads}, [&](int64_t phase, int64_t task) {
      if (phase == 0) return pack(task);
      const auto& slice = slices[task];
      for (int64_t s = 0; s < S; s++) {
        int64_t n = batch.alive(slice, s);
        if (!n) break;
        for (int64_t p = 0; p < P; p++) call.step(slice, n, s, p, 0);
      }
    });
  } else {
    // The input projection of a chunk of steps at a time: weights are read once for it.
    call.chunk = std::max<int64_t>(1, std::min<int64_t>(S, 512 / std::max<int64_t>(B, 1)));
    call.projected.resize(call.chunk * B * P * WIDTH);
    const int64_t group = std::max<int64_t>(1, P / (4 * threads));  // panels of a task
    const int64_t tasks = (P + group - 1) / group;
    std::vector<int64_t> counts{P}, start{-1};
    for (int64_t s0 = 0; s0 < S; s0 += call.chunk)
      for (int64_t s = s0 - 1; s < std::min(S, s0 + call.chunk); s++) {
        counts.push_back(tasks);
        start.push_back(s < s0 ? -s0 - 2 : s);  // -s0-2 stands for "project from s0"
      }
    run(pool, threads, counts, [&](int64_t phase, int64_t task) {
      if (phase == 0) return pack(task);
      int64_t s = start[phase];
      for (int64_t p = task * group; p < std::min(P, (task + 1) * group); p++) {
        if (s < 0) {
          int64_t s0 = -s - 2;
          call.project(s0, std::min(call.chunk, S - s0), p);
        } else {
          call.step(batch.rows, batch.alive(batch.rows, s), s, p, s - s % call.chunk);
        }
      }
    });
  }
  for (int64_t b = 0; b < B; b++) {
    const int64_t n = batch.length(b);
    const float* h = n ? call.hs + batch.at(b, n - 1) * H : call.h0 + b * H;
    std::memcpy(call.hT + b * H, h, H * sizeof(float));
  }
  return ffi::Error::Success();
}

struct Backward {
  const Batch& batch;
  const float *dhs, *dhT, *gates, *before;
  float *dz, *dc, *dh0;  // dc [B][H] is carried in place and ends as that of c0
  std::vector<float> recurrent;

  int64_t panels() const { return (batch.H + WIDTH - 1) / WIDTH; }

  // Gradient of the pre-activations at step s (-1: of the initial state) for the units
  // of panel p, of the first n rows of `slice`, of which the first m have a later step.
  void step(const std::vector<int64_t>& slice, int64_t n, int64_t m, int64_t s,
            int64_t p) {
    const int64_t H = batch.H, u0 = p * WIDTH;
    auto& tmp = scratch(n);
    float* z = tmp.z.data();
    std::memset(z, 0, n * WIDTH * sizeof(float));
    for (int64_t r = 0; r < m; r++) tmp.a[r] = dz + batch.at(slice[r], s + 1) * 4 * H;
    product(m, 4 * H, tmp.a.data(), recurrent.data() + p * 4 * H * WIDTH, z);
    for (int64_t r = 0; r < n; r++) {
      const int64_t b = slice[r];
      const bool cut = r < m && batch.reset(b, s + 1);
      for (int64_t u = u0, j = 0; u < std::min(H, u0 + WIDTH); u += LANES, j += LANES) {
        const int lanes = std::min<int64_t>(LANES, H - u);
        float* dcp = dc + b * H + u;
        Vec dh = r >= m ? load(dhT + b * H + u, lanes)
                 : cut  ? Vec{}
                        : load(z + r * WIDTH + j);
        Vec dcell = cut ? Vec{} : load(dcp, lanes);
        if (s < 0) {
          store(dh0 + b * H + u, dh, lanes);
          store(dcp, dcell, lanes);
          continue;
        }
        const int64_t at = batch.at(b, s);
        const float* a = gates + at * 4 * H + u;
        Vec i = load(a, lanes), f = load(a + H, lanes), g = load(a + 2 * H, lanes),
            o = load(a + 3 * H, lanes);
        Vec old = load(before + at * H + u, lanes);
        Vec th = tanh(f * old + i * g);
        dh += load(dhs + at * H + u, lanes);
        dcell += dh * o * (1.0f - th * th);
        float* d = dz + at * 4 * H + u;
        store(d, dcell * g * i * (1.0f - i), lanes);
        store(d + H, dcell * old * f * (1.0f - f), lanes);
        store(d + 2 * H, dcell * i * (1.0f - g * g), lanes);
        store(d + 3 * H, dh * th * o * (1.0f - o), lanes);
        store(dcp, dcell * f, lanes);
      }
    }
  }
};

static ffi::Error backward(ffi::ThreadPool pool, F32 dhs, F32 dcT, F32 dhT,
                           F32 gates, F32 before, F32 recurrent,
                           ffi::Buffer<ffi::S32> lengths, ffi::Buffer<ffi::U8> resets,
                           ffi::ResultBuffer<ffi::F32> dz,
                           ffi::ResultBuffer<ffi::F32> dc0,
                           ffi::ResultBuffer<ffi::F32> dh0, bool reverse) {
  auto dims = dhs.dimensions();
  const int64_t T = dims[0], B = dims[1], H = dims[2];
  Batch batch(T, B, H, reverse, lengths.typed_data(),
              resets.element_count() ? resets.typed_data() : nullptr);
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  Backward call{batch, dhs.typed_data(), dhT.typed_data(), gates.typed_data(),
                before.typed_data(), dz->typed_data(), dc0->typed_data(),
                dh0->typed_data()};
  const int64_t P = call.panels(), S = batch.longest;
  call.recurrent.resize(P * 4 * H * WIDTH);
  std::memcpy(call.dc, dcT.typed_data(), B * H * sizeof(float));
  batch.clear_padding(call.dz, 4 * H);
  auto pack = [&](int64_t p) {
    pack_transposed(recurrent.typed_data(), H, 4 * H, p,
                    &call.recurrent[p * 4 * H * WIDTH]);
  };
  // At step -1 every row of the batch gets its dh0, also those of length 0.
  auto alive = [&](const std::vector<int64_t>& slice, int64_t s) {
    return s < 0 ? static_cast<int64_t>(slice.size()) : batch.alive(slice, s);
  };
  if (split_rows(B, H, threads)) {
    auto slices = batch.deal(threads);
    run(pool, threads, {P, threads}, [&](int64_t phase, int64_t task) {
      if (phase == 0) return pack(task);
      const auto& slice = slices[task];
      for (int64_t s = S - 1; s >= -1; s--)
        for (int64_t p = 0; p < P; p++)
          call.step(slice, alive(slice, s), alive(slice, s + 1), s, p);
    });
  } else {
    std::vector<int64_t> counts(S + 2, P);
    run(pool, threads, counts, [&](int64_t phase, int64_t task) {
      if (phase == 0) return pack(task);
      int64_t s = S - phase;
      call.step(batch.rows, alive(batch.rows, s), alive(batch.rows, s + 1), s, task);
    });
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    FlaxLstmForward, forward,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>()
        .Arg<ffi::Buffer<ffi::S32>>()
        .Arg<ffi::Buffer<ffi::U8>>()
        .Ret<F32>().Ret<F32>().Ret<F32>().Ret<F32>().Ret<F32>()
        .Attr<bool>("reverse"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    FlaxLstmBackward, backward,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>()
        .Arg<ffi::Buffer<ffi::S32>>()
        .Arg<ffi::Buffer<ffi::U8>>()
        .Ret<F32>().Ret<F32>().Ret<F32>()
        .Attr<bool>("reverse"));
