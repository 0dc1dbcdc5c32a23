// Threads that work together on one call, and wait for each other without keeping a core busy.
#pragma once

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace bipft {

// A point that all of `size` threads reach before any goes on. A thread that waits looks for some
// microseconds and then sleeps.
class Barrier {
 public:
  void set_size(int size) { size_ = size; }
  void wait();

 private:
  int size_ = 1;
  std::atomic<int> arrived_{0}, round_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

class Team {
 public:
  ~Team();
  // Calls work(0) here and work(1) ... work(threads - 1) on other threads; returns when all have.
  // work must not throw.
  void run(int threads, const std::function<void(int)>& work);
  // Called by all of them, within work.
  void wait_for_all() { barrier_.wait(); }
  // Threads stay behind at a fork: the child must neither use nor destroy the team.
  bool of_this_process() const { return process_ == getpid(); }

 private:
  void serve(int number, int seen);

  const pid_t process_ = getpid();
  Barrier barrier_;
  std::vector<std::thread> helpers_;
  std::mutex mutex_;
  std::condition_variable called_, finished_;
  const std::function<void(int)>* work_ = nullptr;
  int call_ = 0, threads_ = 1, busy_ = 0;
  bool stopping_ = false;
};

}  // namespace bipft
