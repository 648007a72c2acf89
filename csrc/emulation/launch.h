// Launching a kernel on a CPU: block after block, each with fresh shared memory.
#pragma once

#include "block.h"

namespace kx {

using Stream = intptr_t;  // launches finish before they return

class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
};

// Throws Fault where a GPU would fail or hang.
template <class... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream,
            std::remove_const_t<Parameters>... arguments) {
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    throw emulation::Fault("a grid has 1 to 2^31 - 1 blocks along x and 1 to 65535 along y and z");
  }
  if (block.x < 1 || block.y < 1 || block.z < 1 || block.x * block.y * block.z > 1024 || block.z > 64) {
    throw emulation::Fault("a block has 1 to 1024 threads, at most 64 along z");
  }
  const std::function<void()> body = [&] { kernel(arguments...); };
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        emulation::Block(grid, {x, y, z}, block, shared_bytes, emulation::seed()).run(body);
      }
    }
  }
}

}  // namespace kx
