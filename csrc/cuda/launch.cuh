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

// Bytes of shared memory that a launch can ask for on the current device.
inline size_t max_shared_bytes() {
  int device = 0, bytes = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
  return static_cast<size_t>(bytes);
}

// Whether the current device runs kernels as code for sm_90a, which has wgmma.
inline bool has_wgmma() {
#ifdef KX_HAS_SM90A
  int device = 0, major = 0, minor = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability");
  return major == 9 && minor == 0;
#else
  return false;
#endif
}

struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;
  Stream stream = nullptr;
  dim3 cluster{};  // blocks that run together and reach each other's shared memory; more than one needs sm_90
};

template <class... Parameters>
void launch(void (*kernel)(Parameters...), const Launch& how, std::remove_const_t<Parameters>... arguments) {
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
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), "kernel launch");
}

}  // namespace kx

#endif
