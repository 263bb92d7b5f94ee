// Work shared by as many threads as XLA has.
//
// The threads are our own. Those of XLA's pool sleep between calls, and where the system
// wakes one on the very processor that waits for it, it starts milliseconds late, which
// is more than a short call takes. Ours are told to wake elsewhere.
#pragma once
#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

using std::int64_t;

// Numbered tasks in phases: a task starts when all tasks of earlier phases are done.
// A thread takes the tasks that are its own first, so that what they use stays in its
// cache, then whatever others have not begun: a thread that comes late, or never (after
// a fork there are none), is not waited for.
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

// Threads that sleep until there are phases to work on. Never destroyed: at the end of
// the process they are asleep.
class Workers {
 public:
  static Workers& all() {
    static Workers* workers = new Workers;
    return *workers;
  }
  // Wakes up to n threads for the phases, to work as threads 1 to n.
  void join(const std::shared_ptr<Phases>& phases, int64_t n) {
    std::lock_guard<std::mutex> lock(mutex_);
    while (static_cast<int64_t>(threads_.size()) < n)
      threads_.emplace_back([this] { live(); });
    keep_away();
    for (int64_t i = 1; i <= n; i++) waiting_.emplace_back(phases, i);
    wake_.notify_all();
  }

 private:
  void live() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return !waiting_.empty(); });
      const auto [phases, self] = std::move(waiting_.front());
      waiting_.pop_front();
      move_freely();
      lock.unlock();
      phases->work(self);
      lock.lock();
    }
  }
  // Lets the threads wake on any processor of this process but the one we are on. They
  // may move there later.
  void keep_away() {
#if defined(__linux__)
    cpu_set_t others;
    const int here = sched_getcpu();
    if (here < 0 || sched_getaffinity(0, sizeof allowed_, &allowed_)) return;
    others = allowed_;
    CPU_CLR(here, &others);
    if (!CPU_COUNT(&others)) return;
    for (std::thread& thread : threads_)
      pthread_setaffinity_np(thread.native_handle(), sizeof others, &others);
#endif
  }
  void move_freely() {
#if defined(__linux__)
    if (CPU_COUNT(&allowed_))
      pthread_setaffinity_np(pthread_self(), sizeof allowed_, &allowed_);
#endif
  }
#if defined(__linux__)
  cpu_set_t allowed_ = {};
#endif
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::pair<std::shared_ptr<Phases>, int64_t>> waiting_;
  std::vector<std::thread> threads_;
};

static void run(int64_t threads, std::vector<int64_t> counts, Phases::Task task) {
  auto phases = std::make_shared<Phases>(std::move(counts), std::move(task), threads);
  if (threads > 1) Workers::all().join(phases, threads - 1);
  phases->finish();
}
