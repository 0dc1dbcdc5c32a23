#include "team.h"

namespace bipft {
namespace {

constexpr int kLooks = 500;  // before sleep: some microseconds

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

void Barrier::wait() {
  if (size_ == 1) return;
  const int round = round_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      round_.store(round + 1, std::memory_order_release);
    }
    changed_.notify_all();
    return;
  }
  for (int look = 0; look < kLooks; look++) {
    if (round_.load(std::memory_order_acquire) != round) return;
    pause();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != round; });
}

Team::~Team() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  called_.notify_all();
  for (std::thread& helper : helpers_) helper.join();
}

void Team::run(int threads, const std::function<void(int)>& work) {
  barrier_.set_size(threads);
  if (threads == 1) return work(0);
  while ((int)helpers_.size() < threads - 1)
    helpers_.emplace_back(&Team::serve, this, (int)helpers_.size() + 1, call_);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    work_ = &work;
    threads_ = threads;
    busy_ = threads - 1;
    call_++;
  }
  called_.notify_all();
  work(0);
  std::unique_lock<std::mutex> lock(mutex_);
  finished_.wait(lock, [&] { return busy_ == 0; });
}

void Team::serve(int number, int seen) {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    called_.wait(lock, [&] { return stopping_ || call_ != seen; });
    if (stopping_) return;
    seen = call_;
    if (number >= threads_) continue;
    lock.unlock();
    (*work_)(number);
    lock.lock();
    if (--busy_ == 0) finished_.notify_one();
  }
}

}  // namespace bipft
