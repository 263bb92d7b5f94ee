// Vectors of floats as wide as the processor's, memory for them, and their functions.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
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
