// Vectors of floats as wide as the processor's, memory for them, and their functions.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

using std::int64_t;

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

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
  if (n >= LANES) return store(p, v);
  std::memcpy(p, &v, n * sizeof(float));
}
static inline Vec full(float x) { return x - Vec{}; }  // 0 + x would lose a -0
static inline float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
}

// Asks for large pages where memory is yet to be written: the system takes longer to
// hand out an ordinary page than we take to fill it.
static inline float* large_pages(float* data, int64_t count) {
#if defined(__linux__)
  constexpr std::uintptr_t page = 4096, least = 4 << 20;
  const auto start = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t begin = (start + page - 1) / page * page;
  const std::uintptr_t end = (start + count * sizeof(float)) / page * page;
  if (end >= begin + least)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return data;
}

// Floats that start on a cache line: a vector across two of them costs twice.
struct Floats {
  std::unique_ptr<float, decltype(&std::free)> data{nullptr, &std::free};
  int64_t size = 0;
  float* resize(int64_t n) {  // contents are lost
    if (n > size) {
      const std::size_t large = 2 << 20, bytes = n * sizeof(float);
      const std::size_t align = bytes >= 2 * large ? large : 64;
      const std::size_t whole = (bytes + align - 1) / align * align;
      data.reset(static_cast<float*>(std::aligned_alloc(align, whole)));
      size = n;
      large_pages(data.get(), n);
    }
    return data.get();
  }
  float* operator+(int64_t at) const { return data.get() + at; }
};

// x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 split in two parts (Cody & Waite 1980), for
// |x| <= 87, beyond which x counts as 87: then exp(x) = power (1 + rest), power = 2^n
// and rest = e^r - 1 by its Taylor series to r^7 (relative error 4e-9).
struct Exponential { Vec power, rest; };
static inline Exponential exponential(Vec x) {
  x = 87.0f < x ? full(87.0f) : x;  // NaN stays
  x = -87.0f > x ? full(-87.0f) : x;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const Vec magic = full(12582912.0f), shifted = x * 1.44269504f + magic;
  const Vec n = shifted - magic;
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = full(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  return {(Vec)(((Int)shifted << 23) + (127 << 23)), p * r};  // the casts keep the bits
}
static inline Vec sigmoid(Vec x) {
  const Exponential e = exponential(-x);
  return 1.0f / ((e.power + 1.0f) + e.power * e.rest);
}
// tanh(x) = (e - 1) / (e + 1), e = exp(2x), where e - 1 = (power - 1) + power rest
// loses nothing near 0.
static inline Vec tanh(Vec x) {
  const Exponential e = exponential(2.0f * x);
  const Vec less = (e.power - 1.0f) + e.power * e.rest;
  return less / (less + 2.0f);
}
