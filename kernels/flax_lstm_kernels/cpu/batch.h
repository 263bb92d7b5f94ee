// What a call is about: the rows of the batch by falling length, and who takes which.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "products.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using Out = ffi::ResultBuffer<ffi::F32>;

// Sizes, and the rows of the batch by falling length.
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
