// Memory of the CPU kernels, counted: torch knows nothing of it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kx {

// Aligned to 64 bytes.
void* allocate(size_t bytes);
void release(void* p, size_t bytes);

// The most that calls held at one time since the last time that this was asked.
int64_t peak_bytes();

}  // namespace kx
