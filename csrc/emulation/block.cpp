#include "block.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <sstream>

#include "async.h"

namespace kx::emulation {
namespace {

constexpr size_t kStackBytes = size_t{256} << 10;
constexpr size_t kGuard = kInstrumented ? 4096 : 0;  // around shared memory, for the checker to see what misses it
constexpr std::align_val_t kSharedAlignment{1024};
constexpr unsigned char kPoison = 0xff;  // NaN as a float: shared memory that nobody has written

thread_local Thread* running = nullptr;
thread_local Fiber* running_fiber = nullptr;
thread_local bool kernel_code = false;
uint64_t next_seed = 0;
bool wgmma_is_found = true, clusters_are_found = true;

}  // namespace

void fail(const std::string& what) { throw Fault(what); }

void set_seed(uint64_t seed) { next_seed = seed; }

void set_wgmma(bool found) { wgmma_is_found = found; }
bool finds_wgmma() { return wgmma_is_found; }
void set_clusters(bool found) { clusters_are_found = found; }
bool finds_clusters() { return clusters_are_found; }
uint64_t seed() { return next_seed; }

Thread& self() { return *running; }
bool in_kernel() { return kernel_code; }
Runtime::Runtime() noexcept : before_(kernel_code) { kernel_code = false; }
Runtime::~Runtime() { kernel_code = before_; }

std::string Dim3::text() const {
  std::ostringstream out;
  out << '(' << x << ", " << y << ", " << z << ')';
  return out.str();
}

std::string Barrier::describe() const {
  return number == 0 ? "the block"
                     : "named barrier " + std::to_string(number) + " (" + std::to_string(arrived) + " of " +
                           std::to_string(expected) + " threads are there)";
}

Thread::Thread() : where(nullptr), async(std::make_unique<AsyncState>()) {}
Thread::~Thread() = default;
Thread::Thread(Thread&&) noexcept = default;

std::string Thread::name() const { return "thread " + std::to_string(index) + " of block " + block->index.text(); }

Block::Block(Cluster& cluster, Dim3 index, unsigned rank, unsigned threads, size_t shared_bytes)
    : cluster(&cluster),
      index(index),
      rank(rank),
      warps((threads + kWarp - 1) / kWarp),
      warpgroups((threads + kWarpgroup - 1) / kWarpgroup),
      transfers(std::make_unique<TransferState>()) {
  for (unsigned b = 0; b < kBarriers; ++b) {
    barriers[b].number = b;
  }
  transfers->products.resize(warpgroups.size());
  add_region(shared_bytes);
}

void Block::add_region(size_t bytes) {
  std::unique_ptr<char, void (*)(char*)> memory(
      static_cast<char*>(::operator new(bytes + 2 * kGuard, kSharedAlignment)),
      [](char* p) { ::operator delete(p, kSharedAlignment); });
  char* const begin = memory.get() + kGuard;
  std::memset(begin, kPoison, bytes);
  cluster->checker.add_shared(begin, bytes);
  regions_.push_back({std::move(memory), begin, bytes});
}

Block::~Block() = default;
Block::Block(Block&&) noexcept = default;

bool Block::owns(const void* address, size_t bytes) const {
  const char* p = static_cast<const char*>(address);
  return std::any_of(regions_.begin(), regions_.end(),
                     [&](const Region& r) { return p >= r.begin && p + bytes <= r.begin + r.bytes; });
}

char* Block::same_place_in(const Block& other, const void* own) const {
  const char* p = static_cast<const char*>(own);
  for (size_t i = 0; i < regions_.size(); ++i) {
    if (p >= regions_[i].begin && p < regions_[i].begin + regions_[i].bytes) {
      return other.regions_[i].begin + (p - regions_[i].begin);
    }
  }
  return nullptr;
}

namespace {

// All threads of a cluster, from which some wait for the others.
struct ClusterBarrier : Waitable {
  unsigned arrived = 0;
  uint64_t phase = 0;
  std::vector<uint64_t> next;  // per thread, the phase in which it arrives next
  Knowledge released, published;
  std::vector<Thread*> waiting;
  std::string describe() const override { return "the cluster"; }
};

}  // namespace

struct Cluster::Barrier : ClusterBarrier {};

namespace {

bool less_urgent(const Thread* a, const Thread* b) { return a->priority < b->priority; }

}  // namespace

Cluster::Cluster(Dim3 grid, Dim3 first, Dim3 shape, Dim3 block_size, size_t shared_bytes, uint64_t seed,
                 Checker& checker)
    : grid(grid),
      shape(shape),
      block_size(block_size),
      checker(checker),
      threads(size_t{shape.count()} * block_size.count()),
      barrier_(std::make_unique<Barrier>()),
      random_(seed),
      seed_(seed),
      by_priority_(seed != 0 && seed % 2 == 0) {
  const unsigned per_block = block_size.count();
  checker.next_cluster((first.z * grid.y + first.y) * grid.x + first.x, per_block);
  blocks.reserve(shape.count());
  for (unsigned rank = 0; rank < shape.count(); ++rank) {
    const Dim3 index(first.x + rank % shape.x, first.y + rank / shape.x % shape.y, first.z + rank / shape.x / shape.y);
    blocks.emplace_back(*this, index, rank, per_block, shared_bytes);
  }
  barrier_->next.resize(threads.size());
  int64_t priority = 0;
  for (unsigned t = 0; t < threads.size(); ++t) {
    Thread& thread = threads[t];
    thread.block = &blocks[t / per_block];
    thread.number = t;
    thread.index = t % per_block;
    thread.place = {thread.index % block_size.x, thread.index / block_size.x % block_size.y,
                    thread.index / block_size.x / block_size.y};
    priority = thread.lane() == 0 ? static_cast<int64_t>(random_() >> 1) : priority;
    thread.priority = priority;
    thread.knowledge.seen.set(t, 1);
    ready_.push_back(&thread);
  }
  next_agent_ = static_cast<unsigned>(threads.size());
  if (seed_ != 0) {
    timing_ = std::array{Timing::kLate, Timing::kRandom, Timing::kEarly}[seed_ % 3];
    std::shuffle(ready_.begin(), ready_.end(), random_);
  }
  if (by_priority_) {
    std::make_heap(ready_.begin(), ready_.end(), less_urgent);
  }
}

Cluster::~Cluster() = default;

void Cluster::run(const std::function<void()>& body) {
  body_ = &body;
  Thread* const first = pick();
  if (first != nullptr) {
    running_fiber = &host_;
    resume(*first);
  }
  running = nullptr;
  kernel_code = false;
  if (error_ != nullptr) {
    std::rethrow_exception(error_);
  }
  for (const Thread& thread : threads) {
    if (thread.state != Thread::State::kDone) {
      fail("deadlock in block " + thread.block->index.text() + waiting_threads());
    }
  }
  for (Block& block : blocks) {
    check_finished(block);
  }
}

// Control goes from fiber to fiber. A thread that never waits leaves its fiber to the next.

void Cluster::enter() { cluster().work(); }

void Cluster::work() {
  Fiber* const mine = running_fiber;
  mine->arrived(*left_);
  while (true) {
    Thread& thread = *running;
    thread.fiber = mine;
    thread.state = Thread::State::kReady;
    try {
      kernel_code = true;
      (*body_)();
      kernel_code = false;
      check_finished(thread);
    } catch (...) {
      error_ = std::current_exception();
    }
    kernel_code = false;
    thread.state = Thread::State::kDone;
    Thread* next = nullptr;
    try {
      next = error_ == nullptr ? pick() : nullptr;
    } catch (...) {
      error_ = std::current_exception();
    }
    if (next == nullptr || next->state != Thread::State::kNew) {
      spare_.push_back(mine);
      Fiber& other = next == nullptr ? host_ : *next->fiber;
      running = next;
      running_fiber = &other;
      mine->leave_for(other);
    }
    running = next;
  }
}

// From the running fiber to `next`, until this fiber's thread is chosen again.
void Cluster::resume(Thread& next) {
  Fiber* const mine = running_fiber;
  running = &next;
  if (next.state != Thread::State::kNew) {
    running_fiber = next.fiber;
    return mine->switch_to(*next.fiber);
  }
  if (spare_.empty()) {
    fibers_.push_back(std::make_unique<Fiber>(kStackBytes));
    spare_.push_back(fibers_.back().get());
  }
  running_fiber = spare_.back();
  spare_.pop_back();
  left_ = mine;
  mine->start(*running_fiber, &Cluster::enter);
}

// The thread that runs next; null if all wait, or are done.
Thread* Cluster::pick() {
  if (timing_ == Timing::kRandom && !pending_.empty() && random(8) == 0) {
    complete_one();
  }
  while (ready_.empty() && !pending_.empty()) {
    complete_one();
  }
  if (ready_.empty()) {
    return nullptr;
  }
  if (by_priority_) {
    std::pop_heap(ready_.begin(), ready_.end(), less_urgent);
    Thread* const thread = ready_.back();
    ready_.pop_back();
    return thread;
  }
  if (seed_ != 0) {
    std::swap(ready_.front(), ready_[random(ready_.size())]);
  }
  Thread* const thread = ready_.front();
  ready_.pop_front();
  return thread;
}

void Cluster::add_ready(Thread& thread) {
  ready_.push_back(&thread);
  if (by_priority_) {
    std::push_heap(ready_.begin(), ready_.end(), less_urgent);
  }
}

void Cluster::later(std::function<void()> operation) {
  if (timing_ == Timing::kEarly) {
    return operation();
  }
  pending_.push_back(std::move(operation));
}

void Cluster::complete_one() {
  std::swap(pending_.back(), pending_[random(pending_.size())]);
  const std::function<void()> operation = std::move(pending_.back());
  pending_.pop_back();
  operation();
}

void Cluster::wait(const Waitable& what, Location here) {
  Thread& me = *running;
  me.waits_for = &what;
  me.where = here;
  me.state = Thread::State::kWaiting;
  Thread* next = nullptr;
  try {
    next = pick();
  } catch (...) {
    error_ = std::current_exception();
  }
  if (next == &me) {
    running = &me;
  } else if (next != nullptr) {
    resume(*next);
  } else {
    Fiber* const mine = running_fiber;
    running_fiber = &host_;
    mine->switch_to(host_);
  }
}

void Cluster::wake(Thread& thread) {
  thread.state = Thread::State::kReady;
  thread.waits_for = nullptr;
  add_ready(thread);
}

void Cluster::yield() {
  Thread& me = *running;
  me.priority = --lowest_priority_;
  if (!pending_.empty() && random(64) == 0) {
    complete_one();  // perhaps all who are ready poll for it
  }
  add_ready(me);
  Thread* const next = pick();
  if (next != &me) {
    resume(*next);
  }
  running = &me;
}

void Cluster::abandon(std::exception_ptr error) {
  error_ = std::move(error);
  kernel_code = false;
  Fiber* const mine = running_fiber;
  running_fiber = &host_;
  mine->leave_for(host_);
}

void Cluster::release(Knowledge& into) {
  if constexpr (kInstrumented) {
    Knowledge& mine = running->knowledge;
    into.join(mine);
    mine.seen.set(running->number, mine.seen[running->number] + 1);
  }
}

void Cluster::acquire(const Knowledge& from) {
  if constexpr (kInstrumented) {
    running->knowledge.join(from);
  }
}

bool Cluster::has_ended(const Block& block) const {
  const auto first = threads.begin() + block.rank * block_size.count();
  return std::all_of(first, first + block_size.count(),
                     [](const Thread& t) { return t.state == Thread::State::kDone; });
}

std::string Cluster::waiting_threads() const {
  std::string list;
  for (size_t t = 0, end = 0; t < threads.size(); t = end) {
    const Thread& first = threads[t];
    const auto same = [&](const Thread& a) {
      return a.block == first.block && a.state == first.state &&
             (a.state != Thread::State::kWaiting ||
              (a.where == first.where && a.waits_for->describe() == first.waits_for->describe()));
    };
    for (end = t + 1; end < threads.size() && same(threads[end]);) {
      ++end;
    }
    list += "\n  threads " + std::to_string(first.index) + " to " + std::to_string(threads[end - 1].index);
    list += blocks.size() > 1 ? " of block " + first.block->index.text() : "";
    if (first.state == Thread::State::kDone) {
      list += " have returned";
    } else {
      list += " wait for " + first.waits_for->describe() + " at " + first.where.text();
    }
  }
  return list;
}

// Warps and warpgroups.

namespace {

// Every lane of `mask` knows what all of them knew.
void share_knowledge(Thread* first, uint32_t mask) {
  if constexpr (kInstrumented) {
    Knowledge all;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if ((mask >> lane & 1u) != 0) {
        Knowledge& mine = first[lane].knowledge;
        all.join(mine);
      }
    }
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if ((mask >> lane & 1u) != 0) {
        Thread& thread = first[lane];
        const uint32_t time = thread.knowledge.seen[thread.number];
        thread.knowledge = all;
        thread.knowledge.seen.set(thread.number, time + 1);
      }
    }
  }
}

void meet_warp(uint32_t mask, const char* operation, void* argument, Together together, bool share, Location here) {
  const Runtime runtime;
  Thread& me = self();
  Block& block = *me.block;
  Warp& warp = block.warps[me.warp()];
  Thread* const first = &me - me.lane();
  const unsigned lanes = std::min(kWarp, block.cluster->block_size.count() - me.warp() * kWarp);
  if (lanes < kWarp) {
    mask &= (1u << lanes) - 1;  // lanes that do not exist
  }
  if ((mask >> me.lane() & 1u) == 0) {
    fail(me.name() + " is not in the mask that it names at " + here.text());
  }
  me.mask = mask;
  me.operation = operation;
  me.argument = argument;
  warp.arrived |= 1u << me.lane();
  if ((warp.arrived & mask) != mask) {
    return block.cluster->wait(warp, here);
  }
  void* arguments[kWarp] = {};
  for (unsigned lane = 0; lane < lanes; ++lane) {
    if ((mask >> lane & 1u) == 0) {
      continue;
    }
    const Thread& other = first[lane];
    if (other.mask != mask) {
      fail("lanes of one warp meet with different masks at " + here.text() + " and " + other.where.text());
    }
    if (other.operation != operation && std::strcmp(other.operation, operation) != 0) {
      fail("lanes of one warp meet at different instructions: " + me.name() + " at " + operation + ", " + here.text() +
           ", " + other.name() + " at " + other.operation + ", " + other.where.text());
    }
    arguments[lane] = other.argument;
  }
  warp.arrived &= ~mask;
  if (together != nullptr) {
    together(arguments);
  }
  if (share) {
    share_knowledge(first, mask);
  }
  for (unsigned lane = 0; lane < lanes; ++lane) {
    if ((mask >> lane & 1u) != 0 && lane != me.lane()) {
      block.cluster->wake(first[lane]);
    }
  }
}

}  // namespace

void meet_warp(uint32_t mask, const char* operation, void* argument, Together together, Location here) {
  meet_warp(mask, operation, argument, together, false, here);
}

void sync_warp(uint32_t mask, Location here) { meet_warp(mask, "__syncwarp", nullptr, nullptr, true, here); }

void meet_warpgroup(const char* operation, void* argument, Together together, Location here) {
  const Runtime runtime;
  Thread& me = self();
  Cluster& cluster = *me.block->cluster;
  const unsigned first_index = me.index / kWarpgroup * kWarpgroup;
  if (first_index + kWarpgroup > cluster.block_size.count()) {
    fail(me.name() + " is in no warpgroup of four whole warps, at " + here.text());
  }
  Warpgroup& group = me.block->warpgroups[me.index / kWarpgroup];
  Thread* const first = &me - (me.index - first_index);
  me.operation = operation;
  me.argument = argument;
  if (++group.arrived < kWarpgroup) {
    return cluster.wait(group, here);
  }
  group.arrived = 0;
  void* arguments[kWarpgroup];
  for (unsigned t = 0; t < kWarpgroup; ++t) {
    if (first[t].operation != operation && std::strcmp(first[t].operation, operation) != 0) {
      fail("threads of one warpgroup meet at different instructions: " + me.name() + " at " + operation + ", " +
           here.text() + ", " + first[t].name() + " at " + first[t].operation + ", " + first[t].where.text());
    }
    arguments[t] = first[t].argument;
  }
  if (together != nullptr) {
    together(arguments);
  }
  for (unsigned t = 0; t < kWarpgroup; ++t) {
    if (first + t != &me) {
      cluster.wake(first[t]);
    }
  }
}

// Barriers of blocks and clusters.

void sync_block(unsigned number, unsigned threads, bool wait, Location here) {
  const Runtime runtime;
  Thread& me = self();
  Cluster& cluster = *me.block->cluster;
  const bool all = threads == 0;
  const unsigned expected = all ? cluster.block_size.count() : threads;
  if (number >= kBarriers || (!all && threads % kWarp != 0)) {
    fail("barrier " + std::to_string(number) + " for " + std::to_string(threads) + " threads at " + here.text() +
         ": a block has barriers 0 to 15, for a multiple of 32 threads");
  }
  emulation::Barrier& barrier = me.block->barriers[number];
  if (barrier.arrived > 0 && barrier.expected != expected) {
    fail(me.name() + " expects " + std::to_string(expected) + " threads at barrier " + std::to_string(number) + ", " +
         here.text() + ", where others expect " + std::to_string(barrier.expected));
  }
  if (all) {
    for (const Thread* other : barrier.waiting) {
      if (other->where != here) {
        fail("threads of one block meet at different __syncthreads: " + me.name() + " at " + here.text() + ", " +
             other->name() + " at " + other->where.text());
      }
    }
  }
  barrier.expected = expected;
  cluster.release(barrier.released);
  if (++barrier.arrived < expected) {
    if (wait) {
      barrier.waiting.push_back(&me);
      cluster.wait(barrier, here);
    }
    return;
  }
  for (Thread* other : barrier.waiting) {
    if constexpr (kInstrumented) {
      other->knowledge.join(barrier.released);
    }
    cluster.wake(*other);
  }
  if (wait) {
    cluster.acquire(barrier.released);
  }
  barrier.waiting.clear();
  barrier.released.clear();
  barrier.arrived = 0;
}

void arrive_cluster(Location here) {
  const Runtime runtime;
  Thread& me = self();
  Cluster& cluster = *me.block->cluster;
  Cluster::Barrier& barrier = cluster.barrier();
  if (barrier.next[me.number] != barrier.phase) {
    fail(me.name() + " arrives twice at the cluster's barrier, at " + here.text());
  }
  ++barrier.next[me.number];
  cluster.release(barrier.released);
  if (++barrier.arrived == cluster.threads.size()) {
    barrier.arrived = 0;
    ++barrier.phase;
    barrier.published = std::move(barrier.released);
    barrier.released.clear();
    for (Thread* other : barrier.waiting) {
      cluster.wake(*other);
    }
    barrier.waiting.clear();
  }
}

void wait_cluster(Location here) {
  const Runtime runtime;
  Thread& me = self();
  Cluster& cluster = *me.block->cluster;
  Cluster::Barrier& barrier = cluster.barrier();
  const uint64_t awaited = barrier.next[me.number];
  if (awaited == 0) {
    fail(me.name() + " waits for the cluster without having arrived, at " + here.text());
  }
  while (barrier.phase < awaited) {
    barrier.waiting.push_back(&me);
    cluster.wait(barrier, here);
  }
  cluster.acquire(barrier.published);
}

// Shared memory.

void* block_shared_memory(size_t bytes) {
  const Runtime runtime;
  const Block& block = *self().block;
  if (bytes > block.shared_bytes()) {
    fail("the kernel wants " + std::to_string(bytes) + " bytes of shared memory, the launch gave " +
         std::to_string(block.shared_bytes()));
  }
  return block.shared();
}

size_t Cluster::region_of(const void* key, size_t bytes) {
  const auto [at, is_new] = declared_.try_emplace(key, declared_.size() + 1);
  if (is_new) {
    for (Block& block : blocks) {
      block.add_region(bytes);
    }
  }
  return at->second;
}

void* static_shared_memory(const void* key, size_t bytes) {
  const Runtime runtime;
  return self().block->region(cluster().region_of(key, bytes));
}

void* peer_memory(const void* own, unsigned rank, Location here) {
  const Runtime runtime;
  const Thread& me = self();
  const std::vector<Block>& blocks = cluster().blocks;
  char* const there = rank < blocks.size() ? me.block->same_place_in(blocks[rank], own) : nullptr;
  if (there == nullptr) {
    fail(me.name() + " maps shared memory to block " + std::to_string(rank) + " of a cluster of " +
         std::to_string(blocks.size()) + " at " + here.text() + ": give an address of its own shared memory");
  }
  return there;
}

}  // namespace kx::emulation
