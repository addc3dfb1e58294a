// A team of threads that runs one function together and meets at barriers within it.
//
// A step has hundreds of barriers a few microseconds apart, so members spin there: a sleep and a
// wake-up would cost more than the work between two of them. A member whose core somebody else
// uses yields after a while. Between two steps the team spins for a moment and then sleeps.
#pragma once
#include <immintrin.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace shoal {

class Team {
 public:
  explicit Team(int size) : size_(size) {
    for (int member = 1; member < size; ++member) threads_.emplace_back([this, member] { serve(member); });
  }

  ~Team() {
    stop_ = true;
    start(nullptr);
    for (auto& thread : threads_) thread.join();
  }

  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // Runs `work(member)` on all members, the caller being member 0; returns when all have ended.
  void run(const std::function<void(int)>& work) {
    start(&work);
    work(0);
    barrier();
  }

  // All members wait here for each other.
  void barrier() {
    if (size_ == 1) return;
    const unsigned turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
      if (spins < 2000) _mm_pause(); else sched_yield();
    }
  }

 private:
  void start(const std::function<void(int)>* work) {
    if (size_ == 1) return;
    work_ = work;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      calls_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
  }

  void serve(int member) {
    for (unsigned seen = 0;; ++seen) {
      for (int spins = 0; calls_.load(std::memory_order_acquire) == seen; ++spins) {
        if (spins < 20000) {
          _mm_pause();
          continue;
        }
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return calls_.load(std::memory_order_relaxed) != seen; });
      }
      if (stop_) return;
      (*work_)(member);
      barrier();
    }
  }

  const int size_;
  std::atomic<bool> stop_{false};
  const std::function<void(int)>* work_ = nullptr;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
  alignas(64) std::atomic<unsigned> calls_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> turn_{0};
};

}  // namespace shoal
