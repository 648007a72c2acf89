#include "memory.h"

#include <atomic>
#include <new>

namespace kx {
namespace {

std::atomic<int64_t> held{0}, most{0};

}  // namespace

void* allocate(size_t bytes) {
  void* const p = ::operator new(bytes, std::align_val_t{64});
  const int64_t now = held += static_cast<int64_t>(bytes);
  int64_t before = most;
  while (now > before && !most.compare_exchange_weak(before, now)) {
  }
  return p;
}

void release(void* p, size_t bytes) {
  held -= static_cast<int64_t>(bytes);
  ::operator delete(p, std::align_val_t{64});
}

int64_t peak_bytes() { return most.exchange(held); }

}  // namespace kx
