// Barriers other than __syncthreads: for some of a block's threads, and mbarriers, which count arrivals and bytes.
#pragma once

#include "device.cuh"

namespace kx {

// Waits until `threads` threads, whole warps, have come to barrier `number` (1 to 15; 0 is __syncthreads'), by either
// of these two; arrive_at_barrier does not wait.
__device__ inline void sync_at_barrier(unsigned number, unsigned threads KX_CALLER) {
#ifdef KX_EMULATION
  emulation::sync_block(number, threads, true, here);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
#endif
}

__device__ inline void arrive_at_barrier(unsigned number, unsigned threads KX_CALLER) {
#ifdef KX_EMULATION
  emulation::sync_block(number, threads, false, here);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
#endif
}

// Makes this thread's writes to shared and global memory visible to TMA and wgmma, once a barrier has ordered them.
// sm_90.
__device__ inline void fence_proxy_async(KX_ONLY_CALLER) {
#ifdef KX_EMULATION
  emulation::fence_proxy_async(here);
#elif KX_SM90
  asm volatile("fence.proxy.async;" ::: "memory");
#endif
}

// An mbarrier, in shared memory. A phase is over when `arrivals` threads have arrived and every byte that was expected
// has been copied; the next one then begins. Phases are known by their parity, 0 for the first.
class alignas(8) Mbarrier {
 public:
  // By one thread. Others may use it after fence_mbarriers() by this thread and a barrier of the block (or cluster).
  __device__ void init(unsigned arrivals KX_CALLER) {
#ifdef KX_EMULATION
    emulation::mbarrier_init(this, arrivals, here);
#else
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals) : "memory");
#endif
  }

  // Before its memory serves for something else.
  __device__ void invalidate(KX_ONLY_CALLER) {
#ifdef KX_EMULATION
    emulation::mbarrier_invalidate(this, here);
#else
    asm volatile("mbarrier.inval.shared.b64 [%0];" ::"r"(shared_address(this)) : "memory");
#endif
  }

  // One arrival. What this thread has done so far happened before the end of the phase.
  __device__ void arrive(KX_ONLY_CALLER) {
#ifdef KX_EMULATION
    emulation::mbarrier_arrive(this, 1, 0, here);
#else
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(shared_address(this))
                 : "memory");
#endif
  }

  // One arrival at the same mbarrier of block `rank` of the cluster. sm_90.
  __device__ void arrive_at(unsigned rank KX_CALLER) {
#ifdef KX_EMULATION
    emulation::mbarrier_arrive(emulation::peer_memory(this, rank, here), 1, 0, here);
#elif KX_SM90
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n"
        "}" ::"r"(shared_address(this)),
        "r"(rank)
        : "memory");
#else
    __trap();
#endif
  }

  // One arrival, and `bytes` more that this phase waits for. sm_90.
  __device__ void arrive_and_expect(unsigned bytes KX_CALLER) {
#ifdef KX_EMULATION
    emulation::mbarrier_arrive(this, 1, bytes, here);
#elif KX_SM90
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                 : "memory");
#else
    __trap();
#endif
  }

  // `bytes` more that this phase waits for. sm_90.
  __device__ void expect(unsigned bytes KX_CALLER) {
#ifdef KX_EMULATION
    emulation::mbarrier_expect(this, bytes, here);
#elif KX_SM90
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                 : "memory");
#else
    __trap();
#endif
  }

  // One arrival of `init`'s count, as soon as every cp.async that this thread has issued so far is done.
  __device__ void arrive_after_copies(KX_ONLY_CALLER) {
#ifdef KX_EMULATION
    emulation::arrive_after_copies(this, true, here);
#else
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(this)) : "memory");
#endif
  }

  // Waits for the end of the phase with this parity: the current one, or the one before.
  __device__ void wait(unsigned parity KX_CALLER) {
#ifdef KX_EMULATION
    emulation::mbarrier_wait(this, parity, here);
#else
    while (!try_wait(parity)) {
    }
#endif
  }

  // Whether that phase is over.
  __device__ bool test(unsigned parity KX_CALLER) {
#ifdef KX_EMULATION
    return emulation::mbarrier_test(this, parity, here);
#else
    uint32_t over = 0;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n"
        "}"
        : "=r"(over)
        : "r"(shared_address(this)), "r"(parity)
        : "memory");
    return over != 0;
#endif
  }

 private:
#ifndef KX_EMULATION
  // May sleep for a while before it says no.
  __device__ bool try_wait(unsigned parity) {
#if KX_SM90
    uint32_t over = 0;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n"
        "}"
        : "=r"(over)
        : "r"(shared_address(this)), "r"(parity)
        : "memory");
    return over != 0;
#else
    return test(parity);
#endif
  }
#endif

  uint64_t state_;
};

// By the thread that initialised mbarriers, before the barrier after which others use them.
__device__ inline void fence_mbarriers() {
#if !defined(KX_EMULATION) && KX_SM90
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

}  // namespace kx
