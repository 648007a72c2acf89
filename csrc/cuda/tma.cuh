// Copies that one thread issues and the copy engine makes: of bytes in a row, and of tiles (boxes) of a tensor. sm_90.
//
// A load completes at an mbarrier that expects its bytes. Stores are committed and waited for in groups by the thread
// that issued them. Before a store reads what threads have written: fence_proxy_async() by each writer, then a barrier.
#pragma once

#include "barrier.cuh"
#include "device.cuh"

#ifdef KX_EMULATION
#include "../emulation/tensor_map.h"
#else
#include <cuda.h>
#include <cuda_runtime.h>
#endif

#include <stdexcept>
#include <string>

namespace kx {

// How a tile's 16-byte units lie in shared memory: unit u of a row is found at u ^ f(row), so that columns as well as
// rows touch every bank. A swizzled tile is exactly as wide as its swizzle, and aligned to eight rows of it.
enum class Swizzle : unsigned { kNone = 0, k32 = 32, k64 = 64, k128 = 128 };  // bytes

#ifdef KX_EMULATION
using TensorMap = emulation::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// What a launch passes to its kernel as `const __grid_constant__ TensorMap`: a tensor in global memory with `rank` (1
// to 4) dimensions, innermost first; stride[d] is of dimension d + 1, in bytes; the box is what one copy moves. Throws
// std::invalid_argument where the hardware's rules are broken.
inline TensorMap make_tensor_map(const void* data, int element_bytes, int rank, const uint64_t* size,
                                 const uint64_t* stride, const uint32_t* box, Swizzle swizzle) {
  const auto check = [](bool ok, const char* rule) {
    if (!ok) {
      throw std::invalid_argument(std::string("tensor map: ") + rule);
    }
  };
  check(rank >= 1 && rank <= 4, "the rank is 1 to 4");
  check(element_bytes == 2 || element_bytes == 4, "an element has 2 or 4 bytes");
  check(reinterpret_cast<uintptr_t>(data) % 16 == 0, "the address is a multiple of 16");
  check(box[0] * element_bytes % 16 == 0, "a box's rows are a multiple of 16 bytes");
  check(swizzle == Swizzle::kNone || box[0] * element_bytes == static_cast<unsigned>(swizzle),
        "a swizzled box is as wide as its swizzle");
  for (int d = 0; d < rank; ++d) {
    check(size[d] >= 1 && size[d] <= uint64_t{1} << 32, "a size is 1 to 2^32");
    check(box[d] >= 1 && box[d] <= 256, "a box is 1 to 256 elements wide");
    check(d == 0 || (stride[d - 1] % 16 == 0 && stride[d - 1] < uint64_t{1} << 40),
          "a stride is a multiple of 16 bytes below 2^40");
  }
#ifdef KX_EMULATION
  TensorMap map{};
  map.data = static_cast<char*>(const_cast<void*>(data));
  map.rank = static_cast<uint32_t>(rank);
  map.element_bytes = static_cast<uint32_t>(element_bytes);
  map.swizzle_bytes = static_cast<uint32_t>(swizzle);
  for (int d = 0; d < rank; ++d) {
    map.size[d] = size[d];
    map.stride[d] = d == 0 ? static_cast<uint64_t>(element_bytes) : stride[d - 1];
    map.box[d] = box[d];
  }
  return map;
#else
  // The driver's function, without linking the driver: the extension loads where there is none.
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found) !=
            cudaSuccess ||
        found != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("tensor map: the CUDA driver has no cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  const cuuint32_t every[4] = {1, 1, 1, 1};
  const CUtensorMapSwizzle mode = swizzle == Swizzle::k128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                  : swizzle == Swizzle::k64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                  : swizzle == Swizzle::k32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                            : CU_TENSOR_MAP_SWIZZLE_NONE;
  TensorMap map{};
  const CUresult result =
      encode(&map, element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16 : CU_TENSOR_MAP_DATA_TYPE_UINT32, rank,
             const_cast<void*>(data), reinterpret_cast<const cuuint64_t*>(size),
             reinterpret_cast<const cuuint64_t*>(stride), box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, mode,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(result == CUDA_SUCCESS, "the driver refuses it");
  return map;
#endif
}

// Loads the box whose first element is `at` (innermost coordinate first; what lies outside the tensor is zeros) to
// `to`, aligned to 128 bytes: dense, then swizzled. The barrier gets the bytes of the whole box. By one thread.
template <int kRank>
__device__ inline void load_tile(void* to, const TensorMap& map, const int (&at)[kRank], Mbarrier& barrier KX_CALLER) {
  static_assert(kRank >= 1 && kRank <= 4, "1 to 4 coordinates");
#ifdef KX_EMULATION
  emulation::tensor_load(to, map, at, kRank, &barrier, 1u << emulation::rank_in_cluster(), here);
#elif KX_SM90
  const uint32_t tile = shared_address(to), bar = shared_address(&barrier);
  if constexpr (kRank == 1) {
    asm volatile(
        "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3}], [%2];" ::"r"(
            tile),
        "l"(&map), "r"(bar), "r"(at[0])
        : "memory");
  } else if constexpr (kRank == 2) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            tile),
        "l"(&map), "r"(bar), "r"(at[0]), "r"(at[1])
        : "memory");
  } else if constexpr (kRank == 3) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
            "r"(tile),
        "l"(&map), "r"(bar), "r"(at[0]), "r"(at[1]), "r"(at[2])
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];" ::"r"(tile),
        "l"(&map), "r"(bar), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
        : "memory");
  }
#else
  __trap();
#endif
}

// The same box for every block of the cluster whose bit is set in `blocks`, at the same place of its shared memory and
// completing at the same place's barrier. By one thread of one block.
template <int kRank>
__device__ inline void load_tile_to(unsigned blocks, void* to, const TensorMap& map, const int (&at)[kRank],
                                    Mbarrier& barrier KX_CALLER) {
  static_assert(kRank >= 1 && kRank <= 4, "1 to 4 coordinates");
#ifdef KX_EMULATION
  emulation::tensor_load(to, map, at, kRank, &barrier, blocks, here);
#elif KX_SM90
  const uint32_t tile = shared_address(to), bar = shared_address(&barrier);
  const auto mask = static_cast<uint16_t>(blocks);
  if constexpr (kRank == 1) {
    asm volatile(
        "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
        "{%4}], [%2], %3;" ::"r"(tile),
        "l"(&map), "r"(bar), "h"(mask), "r"(at[0])
        : "memory");
  } else if constexpr (kRank == 2) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
        "{%4, %5}], [%2], %3;" ::"r"(tile),
        "l"(&map), "r"(bar), "h"(mask), "r"(at[0]), "r"(at[1])
        : "memory");
  } else if constexpr (kRank == 3) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
        "{%4, %5, %6}], [%2], %3;" ::"r"(tile),
        "l"(&map), "r"(bar), "h"(mask), "r"(at[0]), "r"(at[1]), "r"(at[2])
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
        "{%4, %5, %6, %7}], [%2], %3;" ::"r"(tile),
        "l"(&map), "r"(bar), "h"(mask), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
        : "memory");
  }
#else
  __trap();
#endif
}

// Stores the box at `from` to where its first element is `at`, none of whose coordinates is negative; what lies outside
// the tensor is left out.
template <int kRank>
__device__ inline void store_tile(const TensorMap& map, const int (&at)[kRank], const void* from KX_CALLER) {
  static_assert(kRank >= 1 && kRank <= 4, "1 to 4 coordinates");
#ifdef KX_EMULATION
  emulation::tensor_store(map, at, kRank, from, here);
#elif KX_SM90
  const uint32_t tile = shared_address(from);
  if constexpr (kRank == 1) {
    asm volatile("cp.async.bulk.tensor.1d.global.shared::cta.bulk_group [%0, {%2}], [%1];" ::"l"(&map), "r"(tile),
                 "r"(at[0])
                 : "memory");
  } else if constexpr (kRank == 2) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map), "r"(tile),
                 "r"(at[0]), "r"(at[1])
                 : "memory");
  } else if constexpr (kRank == 3) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
                 "r"(tile), "r"(at[0]), "r"(at[1]), "r"(at[2])
                 : "memory");
  } else {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
                 "r"(tile), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
                 : "memory");
  }
#else
  __trap();
#endif
}

// `bytes` in a row, a multiple of 16, between addresses that are multiples of 16.
__device__ inline void load_bytes(void* to, const void* from, unsigned bytes, Mbarrier& barrier KX_CALLER) {
#ifdef KX_EMULATION
  emulation::bulk_load(to, from, bytes, &barrier, here);
#elif KX_SM90
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(&barrier))
               : "memory");
#else
  __trap();
#endif
}

// `bytes` of this block's shared memory, a multiple of 16 from a multiple of 16 on, to the same place of block `rank`,
// another one of the cluster, completing at the same place's barrier there. By one thread, of a block that does not end
// before.
__device__ inline void copy_bytes_to(unsigned rank, void* at, unsigned bytes, Mbarrier& barrier KX_CALLER) {
#ifdef KX_EMULATION
  emulation::bulk_copy_to_block(rank, at, bytes, &barrier, here);
#elif KX_SM90
  asm volatile(
      "{\n"
      ".reg .b32 there, bar;\n"
      "mapa.shared::cluster.u32 there, %0, %3;\n"
      "mapa.shared::cluster.u32 bar, %2, %3;\n"
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [there], [%0], %1, [bar];\n"
      "}" ::"r"(shared_address(at)),
      "r"(bytes), "r"(shared_address(&barrier)), "r"(rank)
      : "memory");
#else
  __trap();
#endif
}

__device__ inline void store_bytes(void* to, const void* from, unsigned bytes KX_CALLER) {
#ifdef KX_EMULATION
  emulation::bulk_store(to, from, bytes, here);
#elif KX_SM90
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)),
               "r"(bytes)
               : "memory");
#else
  __trap();
#endif
}

__device__ inline void commit_stores() {
#ifdef KX_EMULATION
  emulation::commit_stores();
#elif KX_SM90
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Waits until all but the kNewest newest groups of this thread's stores have read shared memory, which may then be
// written again. Before a thread ends it waits for all of them.
template <int kNewest>
__device__ inline void wait_stores_read(KX_ONLY_CALLER) {
#ifdef KX_EMULATION
  emulation::wait_stores(kNewest, true, here);
#elif KX_SM90
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kNewest) : "memory");
#endif
}

// Waits until they have written global memory.
template <int kNewest>
__device__ inline void wait_stores(KX_ONLY_CALLER) {
#ifdef KX_EMULATION
  emulation::wait_stores(kNewest, false, here);
#elif KX_SM90
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kNewest) : "memory");
#endif
}

}  // namespace kx
