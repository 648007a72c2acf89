// swapcontext asks the kernel for the signal mask at every switch. So it only starts a fiber; _setjmp and _longjmp
// switch.
#undef _FORTIFY_SOURCE  // its longjmp takes another stack for a mistake

#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define KX_ASAN 1
#else
#define KX_ASAN 0
#endif

namespace kx::emulation {

void Fiber::Unmap::operator()(char* stack) const { munmap(stack, bytes); }

Fiber::Fiber(size_t stack_bytes) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t bytes = stack_bytes + page;  // below the stack a page that faults: an overflow is seen
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
    throw std::bad_alloc();
  }
  stack_ = {static_cast<char*>(memory), Unmap{bytes}};
  bottom_ = stack_.get() + page;
  size_ = stack_bytes;
}

void Fiber::leave([[maybe_unused]] Fiber& next, [[maybe_unused]] bool for_ever) {
#if KX_ASAN
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &fake_stack_, next.bottom_, next.size_);
#endif
}

void Fiber::switch_to(Fiber& next) {
  leave(next, false);
  if (_setjmp(place_) == 0) {
    _longjmp(next.place_, 1);
  }
#if KX_ASAN
  __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::start(Fiber& next, void (*entry)()) {
  getcontext(&next.beginning_);
  next.beginning_.uc_stack.ss_sp = const_cast<char*>(next.bottom_);
  next.beginning_.uc_stack.ss_size = next.size_;
  next.beginning_.uc_link = nullptr;
  makecontext(&next.beginning_, entry, 0);
#if KX_ASAN
  __asan_unpoison_memory_region(next.bottom_, next.size_);  // frames that its last entry never returned from
#endif
  leave(next, false);
  if (_setjmp(place_) == 0) {
    setcontext(&next.beginning_);
  }
#if KX_ASAN
  __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::leave_for(Fiber& next) {
  leave(next, true);
  _longjmp(next.place_, 1);
}

void Fiber::arrived([[maybe_unused]] Fiber& before) {
#if KX_ASAN
  const void* bottom = nullptr;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &before.size_);
  before.bottom_ = static_cast<const char*>(bottom);
#endif
}

}  // namespace kx::emulation
