// What the compiler calls at every load and store of code that it compiles with -fsanitize=thread. ThreadSanitizer's
// own library would look for races between host threads; here the accesses go to the checker, which knows a GPU's
// rules.
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "async.h"
#include "tensor_core.h"

namespace kx::emulation {
namespace {

void access(const void* address, size_t bytes, bool write, const void* pc) {
  if (!in_kernel()) {
    return;
  }
  std::exception_ptr error;
  {
    const Runtime runtime;
    try {
      Thread& me = self();
      if (me.fiber->holds(address)) {
        touch_registers(address, bytes, write, Location(pc));
      } else if (write) {
        cluster().checker.write(actor_of_thread(Location(pc)), address, bytes);
      } else {
        cluster().checker.read(actor_of_thread(Location(pc)), address, bytes);
      }
    } catch (...) {
      error = std::current_exception();
    }
  }
  if (error != nullptr) {
    cluster().abandon(std::move(error));
  }
}

}  // namespace
}  // namespace kx::emulation

#define KX_ACCESS(name, bytes, write)                                                                         \
  void __tsan_##name(void* address) {                                                                         \
    kx::emulation::access(address, bytes, write, __builtin_extract_return_addr(__builtin_return_address(0))); \
  }

// An atomic of the host's, as in the standard library's reference counts.
#define KX_ATOMICS(bits)                                                                                             \
  using Word##bits = uint##bits##_t;                                                                                 \
  Word##bits __tsan_atomic##bits##_load(const volatile Word##bits* p, int) {                                         \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                                     \
  }                                                                                                                  \
  void __tsan_atomic##bits##_store(volatile Word##bits* p, Word##bits v, int) {                                      \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                                        \
  }                                                                                                                  \
  Word##bits __tsan_atomic##bits##_exchange(volatile Word##bits* p, Word##bits v, int) {                             \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                              \
  }                                                                                                                  \
  Word##bits __tsan_atomic##bits##_fetch_add(volatile Word##bits* p, Word##bits v, int) {                            \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                                               \
  }                                                                                                                  \
  Word##bits __tsan_atomic##bits##_fetch_sub(volatile Word##bits* p, Word##bits v, int) {                            \
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                                               \
  }                                                                                                                  \
  Word##bits __tsan_atomic##bits##_fetch_and(volatile Word##bits* p, Word##bits v, int) {                            \
    return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST);                                                               \
  }                                                                                                                  \
  Word##bits __tsan_atomic##bits##_fetch_or(volatile Word##bits* p, Word##bits v, int) {                             \
    return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST);                                                                \
  }                                                                                                                  \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile Word##bits* p, Word##bits* expected, Word##bits v, int, \
                                                    int) {                                                           \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                   \
  }                                                                                                                  \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile Word##bits* p, Word##bits* expected, Word##bits v, int,   \
                                                  int) {                                                             \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                   \
  }

extern "C" {

KX_ACCESS(read1, 1, false)
KX_ACCESS(read2, 2, false)
KX_ACCESS(read4, 4, false)
KX_ACCESS(read8, 8, false)
KX_ACCESS(read16, 16, false)
KX_ACCESS(write1, 1, true)
KX_ACCESS(write2, 2, true)
KX_ACCESS(write4, 4, true)
KX_ACCESS(write8, 8, true)
KX_ACCESS(write16, 16, true)
KX_ACCESS(unaligned_read2, 2, false)
KX_ACCESS(unaligned_read4, 4, false)
KX_ACCESS(unaligned_read8, 8, false)
KX_ACCESS(unaligned_read16, 16, false)
KX_ACCESS(unaligned_write2, 2, true)
KX_ACCESS(unaligned_write4, 4, true)
KX_ACCESS(unaligned_write8, 8, true)
KX_ACCESS(unaligned_write16, 16, true)
KX_ACCESS(vptr_read, 8, false)

void __tsan_vptr_update(void** address, void*) {
  kx::emulation::access(address, sizeof *address, true, __builtin_return_address(0));
}
void __tsan_read_range(void* address, unsigned long bytes) {
  kx::emulation::access(address, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, unsigned long bytes) {
  kx::emulation::access(address, bytes, true, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

KX_ATOMICS(8)
KX_ATOMICS(16)
KX_ATOMICS(32)
KX_ATOMICS(64)
void __tsan_atomic_thread_fence(int) { std::atomic_thread_fence(std::memory_order_seq_cst); }
void __tsan_atomic_signal_fence(int) {}

}  // extern "C"
