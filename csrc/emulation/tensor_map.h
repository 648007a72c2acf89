// What a TMA copy knows of a tensor in global memory, in place of the driver's opaque 128 bytes.
#pragma once

#include <cstdint>

namespace kx::emulation {

constexpr int kMaxRank = 4;

struct alignas(64) TensorMap {
  char* data;
  uint32_t rank, element_bytes, swizzle_bytes;  // 0 for none
  uint64_t size[kMaxRank], stride[kMaxRank];    // elements, bytes; innermost first
  uint32_t box[kMaxRank];                       // elements
};

// Bits 4 to 6 of a shared-memory address change places with its row: swizzle_bytes is 0, 32, 64 or 128.
constexpr uint64_t swizzle(uint64_t address, uint32_t swizzle_bytes) {
  const uint64_t rows = swizzle_bytes < 32 ? 0 : swizzle_bytes / 16 - 1;
  return address ^ ((address >> 7 & rows) << 4);
}

}  // namespace kx::emulation
