#include "block.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <numeric>
#include <sstream>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define KX_ASAN 1
#else
#define KX_ASAN 0
#endif

namespace kx::emulation {
namespace {

constexpr size_t kStackBytes = size_t{256} << 10;
constexpr std::align_val_t kSharedAlignment{1024};
constexpr unsigned char kPoison = 0xff;  // NaN as a float: shared memory that nobody has written

thread_local Block* current_block = nullptr;
uint64_t next_seed = 0;

void free_shared(void* p) { ::operator delete(p, kSharedAlignment); }

std::string text(Location here) { return std::string(here.file) + ":" + std::to_string(here.line); }

std::string text(Dim3 d) {
  std::ostringstream out;
  out << '(' << d.x << ", " << d.y << ", " << d.z << ')';
  return out.str();
}

}  // namespace

void set_seed(uint64_t seed) { next_seed = seed; }
uint64_t seed() { return next_seed; }

Block::Block(Dim3 grid, Dim3 index, Dim3 size, size_t shared_bytes, uint64_t seed)
    : grid(grid),
      index(index),
      size(size),
      threads_(size_t{size.x} * size.y * size.z),
      order_(threads_.size()),
      shown_((threads_.size() + kWarp - 1) / kWarp * kWarp),
      shared_(::operator new(shared_bytes, kSharedAlignment), &free_shared),
      shared_bytes_(shared_bytes),
      random_(seed),
      seed_(seed) {
  std::iota(order_.begin(), order_.end(), 0u);
  if (seed_ != 0) {
    std::shuffle(order_.begin(), order_.end(), random_);
  }
  std::memset(shared_.get(), kPoison, shared_bytes);
}

Block::~Block() = default;

Block& Block::current() { return *current_block; }

Dim3 Block::thread_index() const { return {thread_ % size.x, thread_ / size.x % size.y, thread_ / size.x / size.y}; }

void Block::run(const std::function<void()>& body) {
  body_ = &body;
  current_block = this;
  try {
    schedule();
  } catch (...) {
    current_block = nullptr;
    throw;
  }
  current_block = nullptr;
}

// Control goes back and forth between the scheduler and one fiber. Threads that never wait share a fiber.

void Block::enter() { current_block->work(); }

void Block::work() {
#if KX_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_, &scheduler_stack_size_);
#endif
  while (error_ == nullptr && started_ < order_.size()) {
    const unsigned mine = thread_ = order_[started_++];
    threads_[mine].state = State::kReady;
    try {
      (*body_)();
    } catch (...) {
      error_ = std::current_exception();
    }
    threads_[mine].state = State::kDone;
    if (threads_[mine].stack != nullptr) {  // it has waited: this fiber is its own, and ends with it
      break;
    }
  }
#if KX_ASAN
  __sanitizer_start_switch_fiber(nullptr, scheduler_stack_, scheduler_stack_size_);
#endif
  setcontext(&scheduler_);
}

void Block::yield() {
  Thread& me = threads_[thread_];
  if (me.stack == nullptr) {
    me.stack = std::move(stack_);  // the fiber that ran new threads becomes this thread's
  }
#if KX_ASAN
  __sanitizer_start_switch_fiber(&me.sanitizer_stack, scheduler_stack_, scheduler_stack_size_);
#endif
  swapcontext(&me.context, &scheduler_);
#if KX_ASAN
  __sanitizer_finish_switch_fiber(me.sanitizer_stack, &scheduler_stack_, &scheduler_stack_size_);
#endif
}

void Block::schedule() {
  std::vector<unsigned> ready;
  while (true) {
    ready.clear();
    bool waiting = false;
    for (unsigned t = 0; t < num_threads(); ++t) {
      if (threads_[t].state == State::kReady) {
        ready.push_back(t);
      }
      waiting = waiting || threads_[t].state == State::kWaiting;
    }
    const bool fresh = started_ < order_.size();
    if (ready.empty() && !fresh) {
      if (waiting) {
        throw Fault("deadlock in block " + text(index) + waiting_threads());
      }
      return;
    }
    const size_t choices = ready.size() + (fresh ? 1 : 0);
    const size_t choice = seed_ == 0 ? (fresh ? ready.size() : 0) : random_() % choices;
    ucontext_t start;
    ucontext_t* next = nullptr;
    const char* bottom = nullptr;
    if (choice == ready.size()) {
      if (spare_stacks_.empty()) {
        stack_.reset(new char[kStackBytes]);
      } else {
        stack_ = std::move(spare_stacks_.back());
        spare_stacks_.pop_back();
      }
      getcontext(&start);
      start.uc_stack.ss_sp = stack_.get();
      start.uc_stack.ss_size = kStackBytes;
      start.uc_link = nullptr;
      makecontext(&start, &Block::enter, 0);
      next = &start;
      bottom = stack_.get();
    } else {
      thread_ = ready[choice];
      next = &threads_[thread_].context;
      bottom = threads_[thread_].stack.get();
    }
#if KX_ASAN
    if (next == &start) {
      __asan_unpoison_memory_region(bottom, kStackBytes);  // frames that its last fiber never returned from
    }
    void* saved = nullptr;
    __sanitizer_start_switch_fiber(&saved, bottom, kStackBytes);
#endif
    swapcontext(&scheduler_, next);
#if KX_ASAN
    __sanitizer_finish_switch_fiber(saved, nullptr, nullptr);
#endif
    static_cast<void>(bottom);
    if (error_ != nullptr) {
      std::rethrow_exception(error_);
    }
    Thread& ran = threads_[thread_];
    if (ran.state == State::kDone && ran.stack != nullptr) {
      spare_stacks_.push_back(std::move(ran.stack));
    } else if (stack_ != nullptr) {
      spare_stacks_.push_back(std::move(stack_));
    }
  }
}

// Waiting. The last thread to arrive makes the others ready and goes on.

bool Block::all_wait_alike(unsigned first, unsigned last, uint32_t mask, Wait wait) const {
  for (unsigned t = first; t < last; ++t) {
    const Thread& thread = threads_[t];
    if (wait == Wait::kWarp && (mask >> (t - first) & 1u) == 0) {
      continue;
    }
    if (t != thread_ && (thread.state != State::kWaiting || thread.wait != wait)) {
      return false;
    }
  }
  return true;
}

void Block::wait_here(Wait wait, uint32_t mask, Location here) {
  Thread& me = threads_[thread_];
  me.wait = wait;
  me.mask = mask;
  me.where = here;
  me.state = State::kWaiting;
  yield();
}

void Block::sync_threads(Location here) {
  if (!all_wait_alike(0, num_threads(), 0, Wait::kThreads)) {
    return wait_here(Wait::kThreads, 0, here);
  }
  for (unsigned t = 0; t < num_threads(); ++t) {
    Thread& thread = threads_[t];
    if (t != thread_ && (thread.where.line != here.line || std::strcmp(thread.where.file, here.file) != 0)) {
      throw Fault("threads of one block meet at different __syncthreads: " + name_of_thread(thread_) + " at " +
                  text(here) + ", " + name_of_thread(t) + " at " + text(thread.where));
    }
    thread.state = State::kReady;
  }
}

void Block::sync_warp(uint32_t mask, Location here) {
  const unsigned first = thread_ / kWarp * kWarp, last = std::min(first + kWarp, num_threads());
  if (last - first < kWarp) {
    mask &= (1u << (last - first)) - 1;  // lanes that do not exist
  }
  if ((mask >> lane() & 1u) == 0) {
    throw Fault(name_of_thread(thread_) + " is not in the mask that it names at " + text(here));
  }
  if (!all_wait_alike(first, last, mask, Wait::kWarp)) {
    return wait_here(Wait::kWarp, mask, here);
  }
  for (unsigned t = first; t < last; ++t) {
    if ((mask >> (t - first) & 1u) == 0) {
      continue;
    }
    if (t != thread_ && threads_[t].mask != mask) {
      throw Fault("lanes of one warp meet with different masks at " + text(here) + " and " + text(threads_[t].where));
    }
    threads_[t].state = State::kReady;
  }
}

const uint64_t* Block::gather(uint32_t mask, uint64_t value, Location here) {
  const unsigned first = thread_ / kWarp * kWarp;
  shown_[thread_] = value;
  sync_warp(mask, here);
  return shown_.data() + first;
}

uint64_t Block::exchange(uint32_t mask, uint64_t value, unsigned source, Location here) {
  if ((mask >> source & 1u) == 0) {
    throw Fault(name_of_thread(thread_) + " reads lane " + std::to_string(source) + ", which is not in the mask, at " +
                text(here));
  }
  const uint64_t result = gather(mask, value, here)[source];
  sync_warp(mask, here);  // nobody shows its next value before all have read this one
  return result;
}

void* Block::shared(size_t bytes) {
  if (bytes > shared_bytes_) {
    throw Fault("the kernel wants " + std::to_string(bytes) + " bytes of shared memory, the launch gave " +
                std::to_string(shared_bytes_));
  }
  return shared_.get();
}

std::string Block::name_of_thread(unsigned thread) const {
  return "thread " + std::to_string(thread) + " of block " + text(index);
}

std::string Block::waiting_threads() const {
  std::string list;
  for (unsigned t = 0; t < num_threads(); ++t) {
    unsigned end = t + 1;
    const auto same = [&](const Thread& a, const Thread& b) {
      return a.state == b.state && (a.state != State::kWaiting || (a.wait == b.wait && a.where.line == b.where.line));
    };
    while (end < num_threads() && same(threads_[t], threads_[end])) {
      ++end;
    }
    list += "\n  threads " + std::to_string(t) + " to " + std::to_string(end - 1);
    if (threads_[t].state == State::kDone) {
      list += " have returned";
    } else {
      list += threads_[t].wait == Wait::kThreads ? " wait for the block at " : " wait for their warp at ";
      list += text(threads_[t].where);
    }
    t = end - 1;
  }
  return list;
}

}  // namespace kx::emulation
