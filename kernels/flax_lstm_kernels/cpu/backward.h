// The backward pass: gradients through time, from the last step to the first.
#pragma once
#include "batch.h"
#include "phases.h"
#include "products.h"

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

  const bool by_rows = split_rows(B, threads);
  const int64_t parts = std::max<int64_t>(1, threads / PZ);  // of the weights' rows
  // Panels of the weights that a task takes together, as they read the same rows; and
  // parts of the rows of dx, no more than the threads need: each packs its panel anew.
  const int64_t together = std::clamp<int64_t>(PZ / (4 * threads), 1, 4);
  const int64_t sets = (PZ + together - 1) / together;
  const int64_t dx_parts = PI ? (2 * threads + PI - 1) / PI : 0;
  enum Kind { CLEAR, PACK, LOOP, STEP, LIST, TURN, PRODUCTS, DIRECT };
  struct Phase { Kind kind; int64_t s0, s1; };
  std::vector<Phase> phases{{CLEAR, 0, 0}, {PACK, 0, 0}};
  std::vector<int64_t> counts{call.dx ? threads : 0, direct ? 0 : P};
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
