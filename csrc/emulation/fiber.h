// Running code with a stack of its own, which one host thread leaves and comes back to.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <memory>

namespace kx::emulation {

class Fiber {
 public:
  Fiber() = default;  // the host thread's own stack
  explicit Fiber(size_t stack_bytes);
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // From this fiber, which runs, to `next`, which was left before. Returns when somebody switches back.
  void switch_to(Fiber& next);
  // From this fiber to the beginning of `entry` on the stack of `next`. `entry` never returns.
  void start(Fiber& next, void (*entry)());
  // As switch_to, from code that nobody will come back to.
  [[noreturn]] void leave_for(Fiber& next);
  // The first thing that an entry does. `before` is the fiber that started it.
  void arrived(Fiber& before);

  bool holds(const void* address) const { return address >= bottom_ && address < bottom_ + size_; }

 private:
  struct Unmap {
    size_t bytes;
    void operator()(char* stack) const;
  };
  void leave(Fiber& next, bool for_ever);

  jmp_buf place_;
  ucontext_t beginning_;
  std::unique_ptr<char, Unmap> stack_{nullptr, Unmap{0}};
  const char* bottom_ = nullptr;
  size_t size_ = 0;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
};

}  // namespace kx::emulation
