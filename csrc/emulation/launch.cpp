#include "../cuda/launch.cuh"

namespace kx::emulation {

namespace {
uint64_t launch_count = 0;
}

uint64_t launches() { return launch_count; }

void run(const Launch& launch, const std::function<void()>& body) {
  const Dim3 grid = launch.grid, block = launch.block, cluster = launch.cluster;
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    fail("a grid has 1 to 2^31 - 1 blocks along x and 1 to 65535 along y and z");
  }
  if (block.x < 1 || block.y < 1 || block.z < 1 || block.count() > 1024 || block.z > 64) {
    fail("a block has 1 to 1024 threads, at most 64 along z");
  }
  if (launch.shared_bytes > kMaxSharedBytes) {
    fail("a block has at most " + std::to_string(kMaxSharedBytes) + " bytes of shared memory, not " +
         std::to_string(launch.shared_bytes));
  }
  if (cluster.count() < 1 || cluster.count() > 16 || grid.x % cluster.x != 0 || grid.y % cluster.y != 0 ||
      grid.z % cluster.z != 0) {
    fail("a cluster has 1 to 16 blocks, and divides the grid");
  }
  ++launch_count;
  Checker checker;
  for (unsigned z = 0; z < grid.z; z += cluster.z) {
    for (unsigned y = 0; y < grid.y; y += cluster.y) {
      for (unsigned x = 0; x < grid.x; x += cluster.x) {
        Cluster(grid, {x, y, z}, cluster, block, launch.shared_bytes, seed(), checker).run(body);
      }
    }
  }
}

}  // namespace kx::emulation
