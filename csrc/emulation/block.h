// A thread block on a CPU: its threads are fibers, and a scheduler runs one until it has to wait for others.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace kx::emulation {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// What a kernel did that a GPU does not allow, or leaves undefined.
class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A place in a kernel's source.
struct Location {
  const char* file = "";
  int line = 0;
};

constexpr unsigned kWarp = 32;

class Block {
 public:
  // Order in which threads run: seed 0 is by index, any other seed draws it.
  Block(Dim3 grid, Dim3 index, Dim3 size, size_t shared_bytes, uint64_t seed);
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // Runs `body` once for every thread. Throws what a thread throws, or Fault where threads wait for ever.
  void run(const std::function<void()>& body);

  static Block& current();

  const Dim3 grid, index, size;
  Dim3 thread_index() const;
  unsigned lane() const { return thread_ % kWarp; }

  // Waits until every thread of the block is here.
  void sync_threads(Location here);
  // Waits until the lanes of `mask` in this warp are here.
  void sync_warp(uint32_t mask, Location here);
  // This lane shows `value`, and gets what lane `source(lane)` of its warp shows; all lanes of `mask` take part.
  uint64_t exchange(uint32_t mask, uint64_t value, unsigned source, Location here);
  // The values that the lanes of `mask` show, zero for the others.
  const uint64_t* gather(uint32_t mask, uint64_t value, Location here);

  // The block's shared memory: as many bytes as the launch gave, aligned to 1024.
  void* shared(size_t bytes);

 private:
  enum class State { kNew, kReady, kWaiting, kDone };
  enum class Wait { kThreads, kWarp };

  struct Thread {
    State state = State::kNew;
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Wait wait = Wait::kThreads;
    uint32_t mask = 0;  // lanes waited for
    Location where;
    void* sanitizer_stack = nullptr;  // AddressSanitizer's record of this fiber
  };

  static void enter();
  void work();      // a fiber: runs new threads until one of them waits
  void schedule();  // runs threads until all are done
  void yield();     // from a thread to the scheduler
  void wait_here(Wait wait, uint32_t mask, Location here);
  bool all_wait_alike(unsigned first, unsigned last, uint32_t mask, Wait wait) const;
  std::string waiting_threads() const;
  std::string name_of_thread(unsigned thread) const;
  unsigned num_threads() const { return static_cast<unsigned>(threads_.size()); }

  const std::function<void()>* body_ = nullptr;
  std::vector<Thread> threads_;
  std::vector<unsigned> order_;  // of threads that have not started
  size_t started_ = 0;
  unsigned thread_ = 0;  // the one that runs
  ucontext_t scheduler_;
  std::vector<std::unique_ptr<char[]>> spare_stacks_;
  std::unique_ptr<char[]> stack_;  // of the fiber that is running new threads
  std::vector<uint64_t> shown_;    // by exchange and gather, one per thread
  std::unique_ptr<void, void (*)(void*)> shared_;
  const size_t shared_bytes_;
  std::mt19937_64 random_;
  const uint64_t seed_;
  std::exception_ptr error_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_size_ = 0;
};

// The seed of the launches that follow, see Block.
void set_seed(uint64_t seed);
uint64_t seed();

}  // namespace kx::emulation
