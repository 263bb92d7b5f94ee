// The forward pass: one layer over time.
#pragma once
#include "batch.h"
#include "phases.h"
#include "products.h"

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
    run(threads, {threads, P, threads}, [&](int64_t phase, int64_t task) {
      if (phase == 0) return batch.clear_padding(call.hs, H, task, threads);
      if (phase == 1) return pack(task);
      const Share share{batch, task, threads};
      for (int64_t s = 0; s < S; s++) call.step(share, s, 0, P);
    });
    return finish();
  }
  // The inputs of a chunk of steps are projected at once: one read of the kernel.
  call.chunk = std::clamp<int64_t>(512 / B, 1, std::max<int64_t>(S, 1));
  call.projected.resize(call.chunk * B * P * WIDTH);
  std::vector<int64_t> counts{threads, P}, start{0, 0};
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
    if (phase == 0) return batch.clear_padding(call.hs, H, task, threads);
    if (phase == 1) return pack(task);
    if (s < 0) return call.project(-1 - s, std::min(call.chunk, S - (-1 - s)), task);
    call.step({batch, 0, 1}, s, P * task / tasks, P * (task + 1) / tasks);
  });
  return finish();
}
