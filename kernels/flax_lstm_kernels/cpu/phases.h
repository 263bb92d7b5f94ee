// Work shared by the threads of XLA's pool.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

// Numbered tasks in phases: a task starts when all tasks of earlier phases are done.
// A thread takes the tasks that are its own first, so that what they use stays in its
// cache, then whatever others have not begun: a thread of the pool that comes late, or
// never, is not waited for.
class Phases {
 public:
  using Task = std::function<void(int64_t phase, int64_t task)>;
  Phases(std::vector<int64_t> counts, Task task, int64_t threads)
      : task_(std::move(task)), threads_(threads),
        taken_(*std::max_element(counts.begin(), counts.end())) {
    first_.push_back(0);
    for (int64_t n : counts) first_.push_back(first_.back() + n);
  }
  void work(int64_t self) {
    const int64_t all = first_.size() - 1;
    for (int64_t phase = 0; phase < all; phase++) {
      if (done_.load(std::memory_order_acquire) >= first_[phase + 1]) continue;
      wait(first_[phase]);
      const int64_t n = first_[phase + 1] - first_[phase];
      for (int64_t turn = 0; turn < threads_; turn++)
        for (int64_t i = (self + turn) % threads_; i < n; i += threads_)
          if (take(phase, i)) {
            task_(phase, i);
            done_.fetch_add(1, std::memory_order_release);
          }
    }
  }
  void finish() { work(0); wait(first_.back()); }

 private:
  void wait(int64_t n) const {
    for (int spins = 0; done_.load(std::memory_order_acquire) < n; spins++)
      if (spins > 2000) std::this_thread::yield();
  }
  bool take(int64_t phase, int64_t i) {
    int64_t next = taken_[i].load(std::memory_order_relaxed);
    while (next <= phase)
      if (taken_[i].compare_exchange_weak(next, phase + 1)) return true;
    return false;
  }
  std::vector<int64_t> first_;  // number of tasks before each phase
  Task task_;
  int64_t threads_;
  std::vector<std::atomic<int64_t>> taken_;  // the next phase in which i is free
  std::atomic<int64_t> done_{0};
};

static void run(xla::ffi::ThreadPool& pool, int64_t threads, std::vector<int64_t> counts,
                Phases::Task task) {
  auto phases = std::make_shared<Phases>(std::move(counts), std::move(task), threads);
  for (int64_t i = 1; i < threads; i++) pool.Schedule([phases, i] { phases->work(i); });
  phases->finish();
}
