// Blocks that run at the same time and reach each other's shared memory. sm_90 and later; a launch names the cluster's
// size (launch.cuh).
#pragma once

#include "device.cuh"

namespace kx {

// Whether the machine that this is compiled for has clusters.
__host__ __device__ constexpr bool has_clusters_here() {
#ifdef KX_EMULATION
  return true;
#else
  return KX_SM90;
#endif
}

// This block's number in its cluster, x first.
__device__ inline unsigned cluster_rank() {
#ifdef KX_EMULATION
  return emulation::rank_in_cluster();
#elif KX_SM90
  unsigned rank = 0;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

__device__ inline unsigned cluster_size() {
#ifdef KX_EMULATION
  return emulation::blocks_in_cluster();
#elif KX_SM90
  unsigned size = 0;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#else
  return 1;
#endif
}

// Every thread of the cluster arrives, and later waits until all have arrived. What happened before an arrival happened
// before what follows a wait.
__device__ inline void arrive_at_cluster(KX_ONLY_CALLER) {
#ifdef KX_EMULATION
  emulation::arrive_cluster(here);
#elif KX_SM90
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ inline void wait_for_cluster(KX_ONLY_CALLER) {
#ifdef KX_EMULATION
  emulation::wait_cluster(here);
#elif KX_SM90
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

__device__ inline void sync_cluster(KX_ONLY_CALLER) {
#ifdef KX_EMULATION
  emulation::arrive_cluster(here);
  emulation::wait_cluster(here);
#else
  arrive_at_cluster();
  wait_for_cluster();
#endif
}

// The same place in the shared memory of block `rank`: to be read and written like one's own, between a sync_cluster
// after which that block is known to run and one before which it does not end.
template <class T>
__device__ inline T* in_block(T* own, unsigned rank KX_CALLER) {
#ifdef KX_EMULATION
  return static_cast<T*>(emulation::peer_memory(own, rank, here));
#elif KX_SM90
  uint64_t there = 0;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(own), "r"(rank));
  return reinterpret_cast<T*>(there);
#else
  return own;
#endif
}

}  // namespace kx
