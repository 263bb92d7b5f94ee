// One LSTM layer on the CPU, forward and backward in time, for XLA's foreign function
// interface. float32, gate order i f g o, time-major arrays (see flax_lstm.cell).
//
// For s = 0 .. length-1:  z = x_t W + h R + b;  i, f, o = sigmoid;  g = tanh;
//                         c = f c + i g;  h = o tanh(c)      (t = s, or length-1-s)
//
// Panels   Weights are packed once per call into panels [K][WIDTH]: in the forward pass
//          one panel holds the four gates of LANES units, so that a register tile ends
//          with all it needs for c and h.
// Tile     ROWS rows by 4 vectors, in registers (products.h). Every product, forward,
//          backward and of the weights' gradient, is this one; but where there are too
//          few rows to pay for packing, the weights are read as they lie.
// Rows     are visited by falling length and only while they are alive: the padding of
//          a batch is neither read nor computed. A reset reads a row of zeros as h, c.
// Threads  split the rows when there are many (no waiting for one another), else the
//          panels of each step, each thread staying with its own, in its own cache.
// Order    Every sum of the forward pass runs over the bias, the inputs and h in that
//          order, whatever the batch, the threads or the pieces of time: same bits.
#include <cstdint>
#include <numeric>
#include <vector>

#include "phases.h"
#include "products.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

// What a call is about: sizes, and the rows of the batch by falling length.
struct Batch {
  int64_t T, B, H;
  bool reverse;
  const std::int32_t* lengths;
  const std::uint8_t* resets;  // [T][B] or null
  std::vector<int64_t> rows;   // batch index of the i-th longest row
  std::vector<int64_t> alive;  // number of rows longer than s, for s = 0 .. T
  int64_t longest = 0;

  Batch(int64_t T, int64_t B, int64_t H, bool reverse, const std::int32_t* lengths,
        const std::uint8_t* resets)
      : T(T), B(B), H(H), reverse(reverse), lengths(lengths), resets(resets), rows(B),
        alive(T + 1, 0) {
    std::iota(rows.begin(), rows.end(), 0);
    std::stable_sort(rows.begin(), rows.end(),
                     [&](int64_t a, int64_t b) { return length(a) > length(b); });
    for (int64_t b = 0; b < B; b++)
      if (length(b)) alive[length(b) - 1]++;
    for (int64_t s = T - 1; s >= 0; s--) alive[s] += alive[s + 1];
    while (longest < T && alive[longest]) longest++;
  }
  int64_t length(int64_t b) const { return std::clamp<int64_t>(lengths[b], 0, T); }
  // Index t * B + b of step s of row b.
  int64_t at(int64_t b, int64_t s) const {
    return (reverse ? length(b) - 1 - s : s) * B + b;
  }
  bool reset(int64_t b, int64_t s) const { return resets && resets[at(b, s)]; }
  // Of every `step`-th row from `first` on.
  void clear_padding(float* out, int64_t width, int64_t first, int64_t step) const {
    for (int64_t b = first; b < B; b += step)
      for (int64_t t = length(b); t < T; t++)
        std::memset(out + (t * B + b) * width, 0, width * sizeof(float));
  }
};

// Every `step`-th row by falling length from `first` on, those alive at some step: the
// share of one thread has long rows and short ones.
struct Share {
  const Batch& batch;
  int64_t first, step;
  int64_t count(int64_t n) const { return n <= first ? 0 : (n - first - 1) / step + 1; }
  int64_t index(int64_t r) const { return first + r * step; }
  int64_t row(int64_t r) const { return batch.rows[index(r)]; }
};

// Many rows: each thread takes its share of them through all of time. Few: all rows
// together, and the threads share the panels of each step.
static bool split_rows(int64_t B, int64_t threads) {
  return B >= 4 * ROWS * threads;
}
// So few steps that to pack the weights would cost more than the products.
static bool few(const Batch& batch) { return batch.T * batch.B <= 4; }

static thread_local std::vector<const float*> pointers[2];
static const float** rows_of(int i, int64_t n) {
  if (static_cast<int64_t>(pointers[i].size()) < n) pointers[i].resize(n);
  return pointers[i].data();
}

struct Forward {
  const Batch& batch;
  int64_t I;
  const float *x, *bias, *h0;
  float *hs, *cT, *hT, *before, *gates;  // before and gates null when not kept
  Floats kernel, recurrent, zeros, biases;
  Floats projected;   // [chunk][B][panels][WIDTH] when the panels are split
  int64_t chunk = 0;  // steps whose inputs are projected at once; 0 for none
  const float *w, *r;  // the kernels as they lie

  int64_t panels() const { return (batch.H + LANES - 1) / LANES; }
  float* projection(int64_t slot, int64_t i, int64_t p) const {
    return projected + ((slot * batch.B + i) * panels() + p) * WIDTH;
  }
  // Projects the inputs of `count` steps from s0 on, panel p.
  void project(int64_t s0, int64_t count, int64_t p) {
    const int64_t group = 96;
    static thread_local Floats panel;
    pack_gates(w, I, batch.H, p, panel.resize(I * WIDTH));
    const float** a = rows_of(0, group);
    float* out[group];
    int64_t m = 0;
    auto flush = [&] {
      const Factor factor{I, a, panel + 0};
      product(
          m, &factor, 1,
          [&](int64_t, float* z) { std::memcpy(z, biases + p * WIDTH, WIDTH * 4); },
          [&](int64_t r, float* z) { std::memcpy(out[r], z, WIDTH * 4); });
      m = 0;
    };
    for (int64_t s = s0; s < s0 + count; s++)
      for (int64_t i = 0; i < batch.alive[s]; i++) {
        a[m] = x + batch.at(batch.rows[i], s) * I;
        out[m++] = projection(s - s0, i, p);
        if (m == group) flush();
      }
    flush();
  }
  const float* h_before(int64_t b, int64_t s) const {
    if (batch.reset(b, s)) return zeros + 0;
    return s ? hs + batch.at(b, s - 1) * batch.H : h0 + b * batch.H;
  }
  // Step s of the rows of `share`, panels p0 to p1.
  void step(const Share& share, int64_t s, int64_t p0, int64_t p1) {
    const int64_t H = batch.H, n = share.count(batch.alive[s]);
    const float **xs = rows_of(0, n), **h = rows_of(1, n);
    for (int64_t r = 0; r < n; r++) {
      xs[r] = x + batch.at(share.row(r), s) * I;
      h[r] = h_before(share.row(r), s);
    }
    for (int64_t p = p0; p < p1; p++) {
      const Factor both[2] = {{I, xs, kernel + p * I * WIDTH},
                              {H, h, recurrent + p * H * WIDTH}};
      product(
          n, chunk ? both + 1 : both, chunk ? 1 : 2,
          [&](int64_t r, float* z) {
            const float* from = chunk ? projection(s % chunk, share.index(r), p)
                                      : biases + p * WIDTH;
            std::memcpy(z, from, WIDTH * sizeof(float));
          },
          [&](int64_t r, float* z) { activate(share.row(r), s, p, z); });
    }
  }
  // The same with the weights as they lie: first columns n0 to n1 of the gates before
  // activation, then the units of panels p0 to p1.
  void direct_sums(int64_t s, int64_t n0, int64_t n1) {
    const int64_t H = batch.H, G = 4 * H;
    for (int64_t i = 0; i < batch.alive[s]; i++) {
      const int64_t b = batch.rows[i];
      float* z = projected + i * (G + LANES);
      std::memcpy(z + n0, bias + n0, (n1 - n0) * sizeof(float));
      direct_columns(w, I, G, x + batch.at(b, s) * I, n0, n1, z);
      direct_columns(r, H, G, h_before(b, s), n0, n1, z);
    }
  }
  void direct_step(int64_t s, int64_t p0, int64_t p1) {
    const int64_t H = batch.H;
    for (int64_t i = 0; i < batch.alive[s]; i++)
      for (int64_t p = p0; p < p1; p++) {
        alignas(64) float z[WIDTH];
        const float* from = projected + i * (4 * H + LANES) + p * LANES;
        for (int j = 0; j < 4; j++) store(z + j * LANES, load(from + j * H));
        activate(batch.rows[i], s, p, z);
      }
  }
  void activate(int64_t b, int64_t s, int64_t p, const float* z) {
    const int64_t H = batch.H, u = p * LANES, at = batch.at(b, s);
    const int lanes = std::min<int64_t>(LANES, H - u);
    Vec i = sigmoid(load(z)), f = sigmoid(load(z + LANES)),
        g = tanh(load(z + 2 * LANES)), o = sigmoid(load(z + 3 * LANES));
    float* c = cT + b * H + u;
    Vec old = batch.reset(b, s) ? Vec{} : load(c, lanes);
    Vec cell = f * old + i * g;
    store(c, cell, lanes);
    store(hs + at * H + u, o * tanh(cell), lanes);
    if (!gates) return;
    store(before + at * H + u, old, lanes);
    float* a = gates + at * 4 * H + u;
    store(a, i, lanes);
    store(a + H, f, lanes);
    store(a + 2 * H, g, lanes);
    store(a + 3 * H, o, lanes);
  }
};

using F32 = ffi::Buffer<ffi::F32>;
using Out = ffi::ResultBuffer<ffi::F32>;

static ffi::Error forward(ffi::ThreadPool pool, F32 x, F32 kernel, F32 recurrent,
                          F32 bias, F32 c0, F32 h0, ffi::Buffer<ffi::S32> lengths,
                          ffi::Buffer<ffi::U8> resets, Out hs, Out cT, Out hT,
                          Out before, Out gates, bool reverse) {
  auto dims = x.dimensions();
  const int64_t T = dims[0], B = dims[1], I = dims[2], H = h0.dimensions()[1];
  const bool keep = gates->element_count() > 0;
  Batch batch(T, B, H, reverse, lengths.typed_data(),
              resets.element_count() ? resets.typed_data() : nullptr);
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  Forward call{batch, I, x.typed_data(), bias.typed_data(), h0.typed_data(),
               large_pages(hs->typed_data(), T * B * H), cT->typed_data(),
               hT->typed_data(),
               keep ? large_pages(before->typed_data(), T * B * H) : nullptr,
               keep ? large_pages(gates->typed_data(), T * B * 4 * H) : nullptr};
  const int64_t P = call.panels(), S = batch.longest;
  call.w = kernel.typed_data(), call.r = recurrent.typed_data();
  std::memset(call.zeros.resize(H + LANES), 0, (H + LANES) * sizeof(float));
  call.biases.resize(P * WIDTH);
  for (int64_t p = 0; p < P; p++)
    pack_gates(bias.typed_data(), 1, H, p, call.biases + p * WIDTH);
  std::memcpy(call.cT, c0.typed_data(), B * H * sizeof(float));  // carried in place
  const std::vector<Range> fresh{{call.hs, T * B * H},
                                 {call.before, keep ? T * B * H : 0},
                                 {call.gates, keep ? T * B * 4 * H : 0}};
  auto finish = [&] {
    for (int64_t b = 0; b < B; b++) {
      const int64_t n = batch.length(b);
      const float* h = n ? call.hs + batch.at(b, n - 1) * H : call.h0 + b * H;
      std::memcpy(call.hT + b * H, h, H * sizeof(float));
    }
    return ffi::Error::Success();
  };
  const int64_t tasks = std::min(P, threads);  // that share the panels
  if (few(batch)) {
    call.projected.resize(B * (4 * H + LANES));
    batch.clear_padding(call.hs, H, 0, 1);
    if (S)
      run(threads, std::vector<int64_t>(2 * S, tasks),
          [&](int64_t phase, int64_t task) {
            const int64_t s = phase / 2, p0 = P * task / tasks,
                          p1 = P * (task + 1) / tasks, end = std::min(p1 * LANES, H);
            if (phase % 2) return call.direct_step(s, p0, p1);
            call.direct_sums(s, 4 * p0 * LANES, p1 == P ? 4 * H : 4 * end);
          });
    return finish();
  }
  call.recurrent.resize(P * H * WIDTH);
  auto pack = [&](int64_t p) {
    pack_gates(call.r, H, H, p, call.recurrent + p * H * WIDTH);
    if (!call.chunk) pack_gates(call.w, I, H, p, call.kernel + p * I * WIDTH);
  };
  if (split_rows(B, threads)) {
    call.kernel.resize(P * I * WIDTH);
    run(threads, {threads, threads, P, threads}, [&](int64_t phase, int64_t task) {
      if (phase == 0) return touch(fresh, task, threads);
      if (phase == 1) return batch.clear_padding(call.hs, H, task, threads);
      if (phase == 2) return pack(task);
      const Share share{batch, task, threads};
      for (int64_t s = 0; s < S; s++) call.step(share, s, 0, P);
    });
    return finish();
  }
  // The inputs of a chunk of steps are projected at once: one read of the kernel.
  call.chunk = std::clamp<int64_t>(512 / B, 1, std::max<int64_t>(S, 1));
  call.projected.resize(call.chunk * B * P * WIDTH);
  std::vector<int64_t> counts{threads, threads, P}, start{0, 0, 0};
  for (int64_t s = 0; s < S; s++) {
    if (s % call.chunk == 0) {
      counts.push_back(P);
      start.push_back(-1 - s);  // stands for "project from s"
    }
    counts.push_back(tasks);
    start.push_back(s);
  }
  run(threads, counts, [&](int64_t phase, int64_t task) {
    const int64_t s = start[phase];
    if (phase == 0) return touch(fresh, task, threads);
    if (phase == 1) return batch.clear_padding(call.hs, H, task, threads);
    if (phase == 2) return pack(task);
    if (s < 0) return call.project(-1 - s, std::min(call.chunk, S - (-1 - s)), task);
    call.step({batch, 0, 1}, s, P * task / tasks, P * (task + 1) / tasks);
  });
  return finish();
}

// Gradients go through time in chunks of steps. In one, first dz of its steps, the
// gradient of the gates before activation; then, while dz is in the cache, what it
// gives to the weights, the bias and the inputs.
struct Backward {
  const Batch& batch;
  int64_t I;
  const float *dhs, *dhT, *x, *h0, *hs, *gates, *before;
  float *dx, *dkernel, *drecurrent, *dbias;  // dx null when not wanted
  float *dc, *dh0;  // dc [B][H] is carried in place and ends as that of c0
  Floats recurrent, zeros;
  Floats dz;       // [rows of the longest chunk][4H]
  Floats factors;  // [I + H][rows of the chunk]: inputs and h before, transposed
  std::vector<int64_t> where;  // row of dz at which a step begins
  const float *w, *r;          // the kernels as they lie
  // The rows of the chunk in hand: dz, inputs, h before, where dx goes.
  std::vector<const float*> dzs, xs, hs_before;
  std::vector<float*> dxs;

  int64_t panels() const { return (batch.H + WIDTH - 1) / WIDTH; }
  int64_t input_panels() const { return dx ? (I + WIDTH - 1) / WIDTH : 0; }
  float* dz_of(int64_t s, int64_t i) const {
    return dz + (where[s] + i) * 4 * batch.H;
  }
  const float* h_before(int64_t b, int64_t s) const {
    if (batch.reset(b, s)) return zeros + 0;
    return s ? hs + batch.at(b, s - 1) * batch.H : h0 + b * batch.H;
  }
  // dz at step s (-1: gradient of the initial state) of the rows of `share`, for the
  // units of panels p0 to p1.
  void step(const Share& share, int64_t s, int64_t p0, int64_t p1) {
    const int64_t H = batch.H, n = share.count(s < 0 ? batch.B : batch.alive[s]);
    const int64_t later = share.count(batch.alive[s + 1]);
    const float** a = rows_of(0, n);
    for (int64_t r = 0; r < later; r++) a[r] = dz_of(s + 1, share.index(r));
    for (int64_t p = p0; p < p1; p++) {
      const Factor factor{4 * H, a, recurrent + p * 4 * H * WIDTH};
      auto end = [&](int64_t r, const float* z) {
        unit(share.row(r), share.index(r), s, p, r < later, z);
      };
      product(later, &factor, 1, [](int64_t, float* z) { clear_row(z); }, end);
      for (int64_t r = later; r < n; r++) end(r, nullptr);
    }
  }
  // The same with the weights as they lie.
  void direct_step(int64_t s, int64_t p0, int64_t p1) {
    const int64_t H = batch.H;
    for (int64_t i = 0; i < (s < 0 ? batch.B : batch.alive[s]); i++) {
      const bool later = i < batch.alive[s + 1];
      for (int64_t p = p0; p < p1; p++) {
        float z[WIDTH];
        const int64_t u = p * WIDTH, n = std::min<int64_t>(WIDTH, H - u);
        if (later) direct_rows(r + u * 4 * H, n, 4 * H, dz_of(s + 1, i), z);
        unit(batch.rows[i], i, s, p, later, z);
      }
    }
  }
  void unit(int64_t b, int64_t i_row, int64_t s, int64_t p, bool later, const float* z) {
    const int64_t H = batch.H, end = std::min(H, (p + 1) * WIDTH);
    const bool cut = later && batch.reset(b, s + 1);
    for (int64_t u = p * WIDTH, j = 0; u < end; u += LANES, j += LANES) {
      const int lanes = std::min<int64_t>(LANES, H - u);
      float* dcp = dc + b * H + u;
      Vec dh = cut ? Vec{} : later ? load(z + j) : load(dhT + b * H + u, lanes);
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
      float* d = dz_of(s, i_row) + u;
      store(d, dcell * g * i * (1.0f - i), lanes);
      store(d + H, dcell * old * f * (1.0f - f), lanes);
      store(d + 2 * H, dcell * i * (1.0f - g * g), lanes);
      store(d + 3 * H, dh * th * o * (1.0f - o), lanes);
      store(dcp, dcell * f, lanes);
    }
  }
  // Lists the rows of steps s0 to s1.
  void list(int64_t s0, int64_t s1) {
    dzs.clear(), xs.clear(), hs_before.clear(), dxs.clear();
    for (int64_t s = s0; s < s1; s++)
      for (int64_t i = 0; i < batch.alive[s]; i++) {
        const int64_t b = batch.rows[i], at = batch.at(b, s);
        dzs.push_back(dz_of(s, i));
        xs.push_back(x + at * I);
        hs_before.push_back(h_before(b, s));
        if (dx) dxs.push_back(dx + at * I);
      }
  }
  int64_t listed() const { return dzs.size(); }
  // Transposes the group-th WIDTH of the listed rows into `factors`.
  void turn(int64_t group) {
    const int64_t r = group * WIDTH, n = std::min<int64_t>(WIDTH, listed() - r);
    transpose(&xs[r], n, I, factors + r, listed());
    transpose(&hs_before[r], n, batch.H, factors + I * listed() + r, listed());
  }
  // Adds the listed rows to the gradient of the weights and the bias, columns of panels
  // p0 to p1; rows m0 to m1 of [I + H].
  void weights(int64_t p0, int64_t p1, int64_t m0, int64_t m1, bool first) {
    const int64_t n = listed(), group = 8 * ROWS;
    static thread_local Floats copy;
    copy.resize((p1 - p0) * n * WIDTH);
    for (int64_t p = p0; p < p1; p++) {
      const int64_t at = p * WIDTH, width = std::min<int64_t>(WIDTH, 4 * batch.H - at);
      float* panel = copy + (p - p0) * n * WIDTH;
      for (int64_t r = 0; r < n; r++) {
        if (width < WIDTH) clear_row(panel + r * WIDTH);
        std::memcpy(panel + r * WIDTH, dzs[r] + at, width * sizeof(float));
      }
      if (m0 == 0 && m1 > 0)
        for (int64_t r = 0; r < n; r++)
          for (int64_t j = 0; j < width; j++) dbias[at + j] += panel[r * WIDTH + j];
    }
    // A few rows of `factors` at a time, which stay in the cache for all panels.
    for (int64_t m = m0; m < m1; m += group)
      for (int64_t p = p0; p < p1; p++)
        weights_tile(p, m, std::min(m + group, m1), copy + (p - p0) * n * WIDTH, first);
  }
  void weights_tile(int64_t p, int64_t m0, int64_t m1, const float* panel, bool first) {
    const int64_t H = batch.H, n = listed(), at = p * WIDTH;
    const int64_t width = std::min<int64_t>(WIDTH, 4 * H - at);
    const float** a = rows_of(0, m1 - m0);
    for (int64_t m = m0; m < m1; m++) a[m - m0] = factors + m * n;
    auto out = [&](int64_t r) {
      const int64_t m = m0 + r;
      return (m < I ? dkernel + m * 4 * H : drecurrent + (m - I) * 4 * H) + at;
    };
    const Factor factor{n, a, panel};
    product(
        m1 - m0, &factor, 1,
        [&](int64_t r, float* z) {
          if (first || width < WIDTH) clear_row(z);
          if (!first) std::memcpy(z, out(r), width * sizeof(float));
        },
        [&](int64_t r, float* z) { std::memcpy(out(r), z, width * sizeof(float)); });
  }
  // Gradient of the listed rows r0 to r1's inputs, columns of panel p, which is packed
  // anew for each chunk: all panels at once would be as large as the kernel.
  void inputs(int64_t p, int64_t r0, int64_t r1) {
    const int64_t at = p * WIDTH, width = std::min<int64_t>(WIDTH, I - at);
    static thread_local Floats panel;
    pack_transposed(w, I, 4 * batch.H, p, panel.resize(4 * batch.H * WIDTH));
    const Factor factor{4 * batch.H, dzs.data() + r0, panel + 0};
    product(
        r1 - r0, &factor, 1, [](int64_t, float* z) { clear_row(z); },
        [&](int64_t r, float* z) {
          std::memcpy(dxs[r0 + r] + at, z, width * sizeof(float));
        });
  }
  // All that the listed rows give, with the weights as they lie: rows m0 to m1 of the
  // weights' gradient [I + H], and columns m0 to m1 of the inputs'.
  void direct_products(int64_t m0, int64_t m1) {
    const int64_t G = 4 * batch.H;
    for (int64_t m = m0; m < m1; m++) {
      float* out = m < I ? dkernel + m * G : drecurrent + (m - I) * G;
      for (int64_t n = 0; n < G; n += LANES) {
        const int lanes = std::min<int64_t>(LANES, G - n);
        Vec sum = {};
        for (int64_t i = 0; i < listed(); i++)
          sum += (m < I ? xs[i][m] : hs_before[i][m - I]) * load(dzs[i] + n, lanes);
        store(out + n, sum, lanes);
      }
    }
    if (m0 == 0 && m1 > 0)
      for (const float* row : dzs)
        for (int64_t n = 0; n < G; n++) dbias[n] += row[n];
    const int64_t end = std::min(m1, I);
    if (dx && m0 < end)
      for (int64_t i = 0; i < listed(); i++)
        direct_rows(w + m0 * G, end - m0, G, dzs[i], dxs[i] + m0);
  }
};

static ffi::Error backward(ffi::ThreadPool pool, F32 dhs, F32 dcT, F32 dhT, F32 x,
                           F32 kernel, F32 recurrent, F32 h0, F32 hs, F32 gates,
                           F32 before, ffi::Buffer<ffi::S32> lengths,
                           ffi::Buffer<ffi::U8> resets, Out dx, Out dkernel,
                           Out drecurrent, Out dbias, Out dc0, Out dh0, bool reverse) {
  auto dims = dhs.dimensions();
  const int64_t T = dims[0], B = dims[1], H = dims[2], I = x.dimensions()[2];
  Batch batch(T, B, H, reverse, lengths.typed_data(),
              resets.element_count() ? resets.typed_data() : nullptr);
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  Backward call{batch, I, dhs.typed_data(), dhT.typed_data(), x.typed_data(),
                h0.typed_data(), hs.typed_data(), gates.typed_data(),
                before.typed_data(),
                dx->element_count() ? large_pages(dx->typed_data(), T * B * I) : nullptr,
                large_pages(dkernel->typed_data(), I * 4 * H),
                large_pages(drecurrent->typed_data(), H * 4 * H), dbias->typed_data(),
                dc0->typed_data(), dh0->typed_data()};
  const int64_t P = call.panels(), PI = call.input_panels(), S = batch.longest;
  const int64_t PZ = (4 * H + WIDTH - 1) / WIDTH;
  // Rows of a chunk: enough that the weights' gradient, read and written once for it,
  // is seldom moved; not so many that dz leaves the cache.
  const int64_t target = 512;
  struct Chunk { int64_t s0, s1, rows; };
  std::vector<Chunk> chunks;
  int64_t longest = 0;
  for (int64_t s1 = S; s1 > 0; s1 = chunks.back().s0) {
    int64_t s0 = s1, rows = 0;
    while (s0 > 0 && (rows < target || s1 - s0 == 1 || s0 == 1))
      rows += batch.alive[--s0];
    chunks.push_back({s0, s1, rows});
    longest = std::max(longest, rows);
  }
  // All chunks lie in the same rows. The first step of one is read by the last of the
  // next, which lies behind it: no chunk that has another has only one step.
  call.where.assign(S + 1, 0);
  for (const Chunk& chunk : chunks) {
    int64_t row = 0;
    for (int64_t s = chunk.s0; s < chunk.s1; s++) {
      call.where[s] = row;
      row += batch.alive[s];
    }
  }
  const bool direct = few(batch);
  call.w = kernel.typed_data(), call.r = recurrent.typed_data();
  if (!direct) call.recurrent.resize(P * 4 * H * WIDTH);
  std::memset(call.zeros.resize(H + LANES), 0, (H + LANES) * sizeof(float));
  call.dz.resize(longest * 4 * H);
  if (!direct) call.factors.resize((I + H) * longest);
  std::memcpy(call.dc, dcT.typed_data(), B * H * sizeof(float));
  if (S == 0) {
    std::memset(call.dkernel, 0, I * 4 * H * sizeof(float));
    std::memset(call.drecurrent, 0, H * 4 * H * sizeof(float));
  }
  std::memset(call.dbias, 0, 4 * H * sizeof(float));
  const std::vector<Range> fresh{{call.dx, call.dx ? T * B * I : 0},
                                 {call.dkernel, S ? I * 4 * H : 0},
                                 {call.drecurrent, S ? H * 4 * H : 0},
                                 {call.dz + 0, longest * 4 * H}};

  const bool by_rows = split_rows(B, threads);
  const int64_t parts = std::max<int64_t>(1, threads / PZ);  // of the weights' rows
  // Panels of the weights that a task takes together, as they read the same rows; and
  // parts of the rows of dx, no more than the threads need: each packs its panel anew.
  const int64_t together = std::clamp<int64_t>(PZ / (4 * threads), 1, 4);
  const int64_t sets = (PZ + together - 1) / together;
  const int64_t dx_parts = PI ? (2 * threads + PI - 1) / PI : 0;
  enum Kind { TOUCH, CLEAR, PACK, LOOP, STEP, LIST, TURN, PRODUCTS, DIRECT };
  struct Phase { Kind kind; int64_t s0, s1; };
  std::vector<Phase> phases{{TOUCH, 0, 0}, {CLEAR, 0, 0}, {PACK, 0, 0}};
  std::vector<int64_t> counts{threads, call.dx ? threads : 0, direct ? 0 : P};
  auto add = [&](Kind kind, int64_t s0, int64_t s1, int64_t tasks) {
    phases.push_back({kind, s0, s1});
    counts.push_back(tasks);
  };
  auto through = [&](int64_t s0, int64_t s1) {
    if (by_rows) return add(LOOP, s0, s1, threads);
    for (int64_t s = s1 - 1; s >= s0; s--) add(STEP, s, s, std::min(P, threads));
  };
  for (const auto& [s0, s1, rows] : chunks) {
    through(s0, s1);
    add(LIST, s0, s1, 1);
    if (direct) {
      add(DIRECT, s0, s1, threads);
      continue;
    }
    add(TURN, s0, s1, (rows + WIDTH - 1) / WIDTH);
    add(PRODUCTS, s0, s1, sets * parts + PI * dx_parts);
  }
  through(-1, 0);

  run(threads, counts, [&](int64_t phase, int64_t task) {
    const auto [kind, s0, s1] = phases[phase];
    switch (kind) {
      case TOUCH: return touch(fresh, task, threads);
      case CLEAR: return batch.clear_padding(call.dx, I, task, threads);
      case PACK:
        return pack_transposed(recurrent.typed_data(), H, 4 * H, task,
                               call.recurrent + task * 4 * H * WIDTH);
      case LOOP:
        for (int64_t s = s1 - 1; s >= s0; s--)
          call.step({batch, task, threads}, s, 0, P);
        return;
      case STEP: {
        const int64_t n = std::min(P, threads), p0 = P * task / n, p1 = P * (task + 1) / n;
        return direct ? call.direct_step(s0, p0, p1)
                      : call.step({batch, 0, 1}, s0, p0, p1);
      }
      case DIRECT: {
        const int64_t M = I + H;
        return call.direct_products(M * task / threads, M * (task + 1) / threads);
      }
      case LIST: return call.list(s0, s1);
      case TURN: return call.turn(task);
      case PRODUCTS: {
        if (task < sets * parts) {
          const int64_t part = task % parts, M = I + H;
          const int64_t p = task / parts * together;
          return call.weights(p, std::min(p + together, PZ), M * part / parts,
                              M * (part + 1) / parts, s1 == S);
        }
        const int64_t at = task - sets * parts, n = call.listed(), part = at / PI;
        return call.inputs(at % PI, n * part / dx_parts, n * (part + 1) / dx_parts);
      }
    }
  });
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
        .Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>()
        .Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>()
        .Arg<ffi::Buffer<ffi::S32>>()
        .Arg<ffi::Buffer<ffi::U8>>()
        .Ret<F32>().Ret<F32>().Ret<F32>().Ret<F32>().Ret<F32>().Ret<F32>()
        .Attr<bool>("reverse"));
