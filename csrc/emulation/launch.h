// Launching a kernel on a CPU: block after block, or cluster after cluster, each with fresh shared memory.
#pragma once

#include "block.h"

namespace kx {

using Stream = intptr_t;  // launches finish before they return

class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
};

namespace emulation {
constexpr size_t kMaxSharedBytes = 232448;  // sm_90
constexpr int kMultiprocessors = 8;         // few, so that small problems have as many blocks
}  // namespace emulation

inline size_t max_shared_bytes() { return emulation::kMaxSharedBytes; }
inline int multiprocessors() { return emulation::kMultiprocessors; }
inline bool has_wgmma() { return emulation::finds_wgmma(); }
inline bool has_clusters() { return emulation::finds_clusters(); }

// The second of two streams: what it is given has run when the call returns, as on the first one.
class Beside {
 public:
  explicit Beside(Stream stream) : stream_(stream) {}
  Stream stream() const { return stream_; }
  void join() {}

 private:
  const Stream stream_;
};

struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;
  Stream stream = 0;
  dim3 cluster{};
};

namespace emulation {
// Runs `body` for every thread. Throws Fault where a GPU would fail or hang.
void run(const Launch& launch, const std::function<void()>& body);
}  // namespace emulation

template <class... Parameters>
void launch(void (*kernel)(Parameters...), const Launch& how, std::remove_const_t<Parameters>... arguments) {
  emulation::run(how, [&] { kernel(arguments...); });
}

// As if a block needed a multiprocessor for itself.
template <class... Parameters>
int clusters_at_once(void (*)(Parameters...), const Launch& how) {
  return multiprocessors() / static_cast<int>(how.cluster.count());
}

}  // namespace kx
