// cp.async: copies from global to shared memory that go on while their thread goes on. sm_80 and later.
//
// A thread commits what it has issued as a group, and waits for its groups, oldest first; other threads may read what
// it has copied after a barrier that follows the wait. The copies count as ordinary writes: before wgmma or TMA read
// them, fence_proxy_async() follows the wait.
#pragma once

#include "device.cuh"

namespace kx {

// Copies `source_bytes` of kBytes (4, 8 or 16) and fills the rest with zeros. Both addresses are multiples of kBytes.
template <int kBytes>
__device__ inline void copy_async(void* to, const void* from, int source_bytes = kBytes KX_CALLER) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "4, 8 or 16 bytes");
#ifdef KX_EMULATION
  emulation::copy_async(to, from, kBytes, static_cast<unsigned>(source_bytes), here);
#else
  if constexpr (kBytes == 16) {  // past the first cache, which nobody else would read it from
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(kBytes),
                 "r"(source_bytes)
                 : "memory");
  }
#endif
}

__device__ inline void commit_copies() {
#ifdef KX_EMULATION
  emulation::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the kNewest newest of this thread's groups are still under way.
template <int kNewest>
__device__ inline void wait_copies(KX_ONLY_CALLER) {
#ifdef KX_EMULATION
  emulation::wait_copies(kNewest, here);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
#endif
}

// Waits for every copy of this thread, committed or not.
__device__ inline void wait_all_copies(KX_ONLY_CALLER) {
#ifdef KX_EMULATION
  emulation::wait_all_copies(here);
#else
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace kx
