// Starting a kernel from C++, on a GPU or on its emulation.
#pragma once

#include "device.cuh"

#ifdef KX_EMULATION

#include "../emulation/launch.h"

#else

#include <stdexcept>
#include <string>
#include <type_traits>

namespace kx {

using Stream = cudaStream_t;

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

// Makes `device` current until the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    switched_ = device != before_;
    if (switched_) {
      check_cuda(cudaSetDevice(device), "cudaSetDevice");
    }
  }
  ~DeviceGuard() {
    if (switched_) {
      cudaSetDevice(before_);
    }
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool switched_ = false;
};

// Of the current device.
inline int attribute(cudaDeviceAttr which, const char* what) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&value, which, device), what);
  return value;
}
// Bytes of shared memory that a launch can ask for.
inline size_t max_shared_bytes() {
  return static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, "shared memory"));
}
inline int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount, "multiprocessors"); }
inline bool is_of_capability(int major) {
  return attribute(cudaDevAttrComputeCapabilityMajor, "compute capability") == major &&
         attribute(cudaDevAttrComputeCapabilityMinor, "compute capability") == 0;
}

// Whether the current device runs kernels as code for sm_90a, which has wgmma.
inline bool has_wgmma() {
#ifdef KX_HAS_SM90A
  return is_of_capability(9);
#else
  return false;
#endif
}

// Whether it runs them as code that has clusters.
inline bool has_clusters() {
#ifdef KX_HAS_SM100A
  if (is_of_capability(10)) {
    return true;
  }
#endif
  return has_wgmma();
}

struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;
  Stream stream = nullptr;
  dim3 cluster{};  // blocks that run together and reach each other's shared memory; more than one needs sm_90
};

namespace detail {
// visit(the configuration), once the kernel may have its shared memory.
template <class... Parameters, class Visit>
void configure(void (*kernel)(Parameters...), const Launch& how, Visit&& visit) {
  if (how.shared_bytes > 48 * 1024) {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(how.shared_bytes)),
        "a kernel's shared memory");
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {how.cluster.x, how.cluster.y, how.cluster.z};
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = how.stream;
  config.attrs = &cluster;
  config.numAttrs = how.cluster.x * how.cluster.y * how.cluster.z > 1 ? 1 : 0;
  visit(config);
}
}  // namespace detail

template <class... Parameters>
void launch(void (*kernel)(Parameters...), const Launch& how, std::remove_const_t<Parameters>... arguments) {
  detail::configure(kernel, how, [&](const cudaLaunchConfig_t& config) {
    check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), "kernel launch");
  });
}

// Clusters of such a launch that the current device runs at once.
template <class... Parameters>
int clusters_at_once(void (*kernel)(Parameters...), const Launch& how) {
  int clusters = 0;
  detail::configure(kernel, how, [&](cudaLaunchConfig_t config) {
    config.numAttrs = 1;  // a cluster's size has to be named, even if it is 1
    check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "clusters of a launch");
  });
  return clusters;
}

// A second stream of this thread, for what may run while `stream` goes on. It begins when all that `stream` has so far
// is done; what `stream` is given after join() begins when all that the second one has is done.
class Beside {
 public:
  explicit Beside(Stream stream) : from_(stream) {
    check_cuda(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "an event");
    order(from_, this->stream());
  }
  ~Beside() { cudaEventDestroy(event_); }
  Beside(const Beside&) = delete;
  Beside& operator=(const Beside&) = delete;

  Stream stream() const {
    constexpr int kDevices = 64;
    thread_local Stream streams[kDevices] = {};  // as long as the thread and its context
    int device = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    Stream& own = streams[device % kDevices];
    if (own == nullptr) {
      check_cuda(cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking), "a stream");
    }
    return own;
  }
  void join() { order(stream(), from_); }

 private:
  void order(Stream first, Stream second) {
    check_cuda(cudaEventRecord(event_, first), "an event");
    check_cuda(cudaStreamWaitEvent(second, event_, 0), "an event");
  }

  const Stream from_;
  cudaEvent_t event_{};
};

}  // namespace kx

#endif
