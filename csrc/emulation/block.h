// Thread blocks on a CPU: their threads are fibers, and a thread runs until it has to wait for others.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "checker.h"
#include "clock.h"
#include "fault.h"
#include "fiber.h"

namespace kx::emulation {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr unsigned count() const { return x * y * z; }
  std::string text() const;
};

constexpr unsigned kWarp = 32, kWarpgroup = 128, kBarriers = 16;

class Block;
class Cluster;
struct AsyncState;     // of a thread: its asynchronous copies, see async.h
struct TransferState;  // of a block: its mbarriers

// What a thread can wait for.
struct Waitable {
  virtual std::string describe() const = 0;

 protected:
  ~Waitable() = default;
};

struct Thread {
  Block* block = nullptr;
  unsigned number = 0;  // in its cluster; also the agent of its clock
  unsigned index = 0;   // in its block
  Dim3 place;           // threadIdx

  enum class State : uint8_t { kNew, kReady, kWaiting, kDone } state = State::kNew;
  Fiber* fiber = nullptr;  // once it runs
  int64_t priority = 0;    // of its warp, where the schedule goes by it
  const Waitable* waits_for = nullptr;
  Location where;  // it waits

  // What it brought to the place where its warp or warpgroup meets.
  uint32_t mask = 0;
  const char* operation = nullptr;
  void* argument = nullptr;

  Knowledge knowledge;
  std::unique_ptr<AsyncState> async;

  Thread();
  ~Thread();
  Thread(Thread&&) noexcept;
  unsigned lane() const { return index % kWarp; }
  unsigned warp() const { return index / kWarp; }
  std::string name() const;
};

// The lanes of a warp that have arrived where some or all of them meet.
struct Warp : Waitable {
  uint32_t arrived = 0;
  std::string describe() const override { return "their warp"; }
};

struct Warpgroup : Waitable {
  unsigned arrived = 0;
  std::string describe() const override { return "their warpgroup"; }
};

// One of a block's 16 barriers. Number 0 is __syncthreads'.
struct Barrier : Waitable {
  unsigned number = 0, expected = 0, arrived = 0;
  std::vector<Thread*> waiting;
  Knowledge released;
  std::string describe() const override;
};

class Block {
 public:
  Block(Cluster& cluster, Dim3 index, unsigned rank, unsigned first_thread, size_t shared_bytes);
  ~Block();
  Block(Block&&) noexcept;

  Cluster* cluster;
  Dim3 index;     // blockIdx
  unsigned rank;  // in its cluster
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  Barrier barriers[kBarriers];
  std::unique_ptr<TransferState> transfers;

  // What the launch gave; and after it in `regions`, objects that the kernel declares itself.
  char* shared() const { return regions_.front().begin; }
  size_t shared_bytes() const { return regions_.front().bytes; }
  bool owns(const void* address, size_t bytes) const;  // all of it is this block's shared memory
  // Where `own`, in this block's shared memory, would be in `other`'s; null if it is not in this block's.
  char* same_place_in(const Block& other, const void* own) const;
  void add_region(size_t bytes);
  char* region(size_t number) const { return regions_.at(number).begin; }

 private:
  struct Region {
    std::unique_ptr<char, void (*)(char*)> memory;
    char* begin;
    size_t bytes;
  };
  std::vector<Region> regions_;
};

// When asynchronous operations take place: at once, as late as the rules allow, or at any moment between.
enum class Timing { kEarly, kLate, kRandom };

// Blocks that run at the same time: one, unless a launch asks for more.
class Cluster {
 public:
  // `seed` chooses the order in which threads run and when asynchronous operations take place: 0 is by index and at
  // once, others draw it.
  Cluster(Dim3 grid, Dim3 first, Dim3 shape, Dim3 block_size, size_t shared_bytes, uint64_t seed, Checker& checker);
  ~Cluster();
  Cluster(const Cluster&) = delete;
  Cluster& operator=(const Cluster&) = delete;

  // Runs `body` once for every thread. Throws what a thread throws, or Fault where threads wait for ever.
  void run(const std::function<void()>& body);

  const Dim3 grid, shape, block_size;
  Checker& checker;
  std::vector<Block> blocks;
  std::vector<Thread> threads;

  // The running thread waits until it is woken.
  void wait(const Waitable& what, Location here);
  void wake(Thread& thread);
  void yield();  // the others go first

  // What the running thread knows goes to others, or what they released becomes known to it.
  void release(Knowledge& into);
  void acquire(const Knowledge& from);
  unsigned new_agent() { return next_agent_++; }

  Timing timing() const { return timing_; }
  uint64_t random(uint64_t choices) { return random_() % choices; }
  // An asynchronous operation that takes place in its own time.
  void later(std::function<void()> operation);

  void abandon(std::exception_ptr error);  // ends the launch from a place that cannot throw

  struct Barrier;
  Barrier& barrier() { return *barrier_; }
  bool has_ended(const Block& block) const;
  // The number of the blocks' region for a declared object.
  size_t region_of(const void* key, size_t bytes);

 private:
  static void enter();
  void work();
  void resume(Thread& next);
  Thread* pick();
  void add_ready(Thread& thread);
  void complete_one();
  std::string waiting_threads() const;

  std::unique_ptr<Barrier> barrier_;
  const std::function<void()>* body_ = nullptr;
  std::deque<Thread*> ready_;  // a heap, if by_priority_
  std::vector<std::function<void()>> pending_;
  Fiber host_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> spare_;
  Fiber* left_ = nullptr;  // the fiber that started the one that begins
  std::map<const void*, size_t> declared_;
  unsigned next_agent_ = 0;
  int64_t lowest_priority_ = 0;
  std::mt19937_64 random_;
  const uint64_t seed_;
  const bool by_priority_;
  Timing timing_ = Timing::kEarly;
  std::exception_ptr error_;
};

// The running thread.
Thread& self();
inline Cluster& cluster() { return *self().block->cluster; }

// While a runtime function works, loads and stores are not the kernel's.
class Runtime {
 public:
  Runtime() noexcept;
  ~Runtime();

 private:
  [[maybe_unused]] bool before_;
};
bool in_kernel();  // the code that runs now is the kernel's

// Threads of a warp that execute one instruction together. The last to arrive runs `together` with what each lane
// brought; lanes outside `mask` have null.
using Together = void (*)(void* const* arguments);
void meet_warp(uint32_t mask, const char* operation, void* argument, Together together, Location here);
void meet_warpgroup(const char* operation, void* argument, Together together, Location here);

void sync_warp(uint32_t mask, Location here);
// Barrier `number` opens when `threads` threads have arrived; a thread waits there, or only arrives. 0 threads: all.
void sync_block(unsigned number, unsigned threads, bool wait, Location here);
void arrive_cluster(Location here);
void wait_cluster(Location here);

void* block_shared_memory(size_t bytes);
// An object in shared memory that the kernel declares, known by `key`.
void* static_shared_memory(const void* key, size_t bytes);
// The same place in the shared memory of another block of the cluster.
void* peer_memory(const void* own, unsigned rank, Location here);

// The seed of the launches that follow, see Cluster.
void set_seed(uint64_t seed);
// Whether launches find wgmma, and clusters: if not, they choose what they would on machines without.
void set_wgmma(bool found);
bool finds_wgmma();
void set_clusters(bool found);
bool finds_clusters();
// How many launches there have been.
uint64_t launches();
uint64_t seed();

}  // namespace kx::emulation
