// The emulation itself: what a GPU computes it computes, and what a GPU does not allow it reports.
#include "test.h"

#include <numeric>
#include <vector>

#include "../cuda/convert.cuh"
#include "../cuda/launch.cuh"
#include "../cuda/memory.cuh"

namespace kx::emulation {
namespace {

constexpr unsigned kAll = 0xffffffffu;

struct Sums {
  float of_warp[8];
};

// out[block] = the sum of the block's 256 elements: shuffles within warps, shared memory between them.
__global__ void sum_kernel(const float* in, float* out) {
  Sums& sums = shared_memory<Sums>();
  float x = in[blockIdx.x * blockDim.x + threadIdx.x];
  for (int step = 16; step > 0; step /= 2) {
    x += __shfl_xor_sync(kAll, x, step);
  }
  if (threadIdx.x % 32 == 0) {
    sums.of_warp[threadIdx.x / 32] = x;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    out[blockIdx.x] = std::accumulate(sums.of_warp, sums.of_warp + 8, 0.0f);
  }
}

void test_sum() {
  std::vector<float> in(3 * 256), out(3);
  std::iota(in.begin(), in.end(), 0.0f);
  for (uint64_t schedule = 0; schedule < 20; ++schedule) {
    set_seed(schedule);
    launch(sum_kernel, 3, 256, sizeof(Sums), 0, in.data(), out.data());
    for (int i = 0; i < 3; ++i) {
      KX_EXPECT(out[i] == 256.0f * (256 * i) + 255 * 128);
    }
  }
  set_seed(0);
}

__global__ void lanes_kernel(int* out) {
  const int lane = threadIdx.x % 32;
  int* mine = out + 8 * threadIdx.x;
  mine[0] = __shfl_sync(kAll, lane, 5);
  mine[1] = __shfl_sync(kAll, lane, 3, 8);
  mine[2] = __shfl_up_sync(kAll, lane, 2);
  mine[3] = __shfl_down_sync(kAll, lane, 2, 8);
  mine[4] = __shfl_xor_sync(kAll, lane, 7);
  mine[5] = static_cast<int>(__ballot_sync(kAll, lane % 2 == 0));
  mine[6] = __any_sync(kAll, lane == 31) && !__all_sync(kAll, lane < 31);
  __syncwarp();
  mine[7] = lane < 16 ? __shfl_sync(0xffffu, lane, 15) : __shfl_sync(0xffff0000u, lane, 16);
}

void test_lanes() {
  std::vector<int> out(8 * 64);
  launch(lanes_kernel, 1, 64, 0, 0, out.data());
  for (int t = 0; t < 64; ++t) {
    const int lane = t % 32;
    const int* mine = out.data() + 8 * t;
    KX_EXPECT(mine[0] == 5);
    KX_EXPECT(mine[1] == lane / 8 * 8 + 3);
    KX_EXPECT(mine[2] == (lane < 2 ? lane : lane - 2));
    KX_EXPECT(mine[3] == (lane % 8 < 6 ? lane + 2 : lane));
    KX_EXPECT(mine[4] == (lane ^ 7));
    KX_EXPECT(mine[5] == 0x55555555);
    KX_EXPECT(mine[6] == 1);
    KX_EXPECT(mine[7] == (lane < 16 ? 15 : 16));
  }
}

__global__ void indices_kernel(unsigned* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] += block + 1;
}

void test_every_index_once() {
  std::vector<unsigned> out(2 * 3 * 4 * 5 * 6 * 7);
  launch(indices_kernel, dim3(2, 3, 4), dim3(5, 6, 7), 0, 0, out.data());
  for (size_t i = 0; i < out.size(); ++i) {
    KX_EXPECT(out[i] == i / 210 + 1);
  }
}

// Planted faults.

__global__ void late_thread_kernel() {
  if (threadIdx.x != 7) {
    __syncthreads();
  }
}

__global__ void two_barriers_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void lost_lane_kernel() {
  if (threadIdx.x != 3) {
    __syncwarp();
  }
}

__global__ void foreign_lane_kernel(int* out) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = __shfl_sync(0xffffu, 1, 20);
  }
}

__global__ void masks_differ_kernel() { __syncwarp(threadIdx.x < 16 ? 0x0001ffffu : 0xffffffffu); }

__global__ void absent_from_mask_kernel() { __syncwarp(0xffff0000u); }

__global__ void misaligned_kernel(const float* in, float* out) { store(out, load_once<4>(in + 1)); }

__global__ void shared_kernel(float* out) { *out = shared_memory<Sums>().of_warp[0]; }

// Thread 0 writes, all read: without the barrier some schedule reads what nobody has written.
template <bool kBarrier>
__global__ void broadcast_kernel(float* out) {
  Sums& sums = shared_memory<Sums>();
  if (threadIdx.x == 0) {
    sums.of_warp[0] = 1;
  }
  if (kBarrier) {
    __syncthreads();
  }
  out[threadIdx.x] = sums.of_warp[0];
}

template <bool kBarrier>
bool broadcasts() {
  std::vector<float> out(64);
  for (uint64_t schedule = 0; schedule < 20; ++schedule) {
    set_seed(schedule);
    launch(broadcast_kernel<kBarrier>, 1, 64, sizeof(Sums), 0, out.data());
    for (const float x : out) {
      if (x != 1) {
        return false;
      }
    }
  }
  set_seed(0);
  return true;
}

void test_faults() {
  std::vector<int> ints(32);
  std::vector<float> floats(16);
  expect_fault([] { launch(late_thread_kernel, 1, 64, 0, 0); },
               {"deadlock in block (0, 0, 0)", "threads 0 to 6 wait for the block at",
                "emulation_test.cpp:", "threads 7 to 7 have returned"});
  expect_fault([] { launch(two_barriers_kernel, 1, 64, 0, 0); },
               {"different __syncthreads", "thread 0 of block", "thread 63 of block"});
  expect_fault([] { launch(lost_lane_kernel, 1, 32, 0, 0); }, {"wait for their warp at", "have returned"});
  expect_fault([&] { launch(foreign_lane_kernel, 1, 32, 0, 0, ints.data()); }, {"reads lane 20, which is not in the"});
  expect_fault([] { launch(masks_differ_kernel, 1, 32, 0, 0); }, {"lanes of one warp meet with different masks at"});
  expect_fault([] { launch(absent_from_mask_kernel, 1, 32, 0, 0); }, {"is not in the mask that it names"});
  expect_fault([&] { launch(misaligned_kernel, 1, 1, 0, 0, static_cast<const float*>(floats.data()), floats.data()); },
               {"misaligned load of 16 bytes"});
  expect_fault([&] { launch(shared_kernel, 1, 1, 4, 0, floats.data()); }, {"wants 32 bytes", "the launch gave 4"});
  expect_fault([&] { launch(shared_kernel, 1, 2048, 32, 0, floats.data()); }, {"1 to 1024 threads"});
  expect_fault([&] { launch(shared_kernel, dim3(1, 65536), 1, 32, 0, floats.data()); }, {"65535 along y and z"});
  KX_EXPECT(broadcasts<true>());
  KX_EXPECT(!broadcasts<false>());
}

void test_shared_memory_starts_as_nan() {
  float x = 0;
  launch(shared_kernel, 1, 1, sizeof(Sums), 0, &x);
  KX_EXPECT(std::isnan(x));
}

// Conversions: every 16-bit pattern comes back, and halves round to even.
void test_conversions() {
  for (unsigned u = 0; u < 65536; ++u) {
    const auto pattern = static_cast<uint16_t>(u);
    const float b = widen(bfloat16{pattern}), h = widen(float16{pattern});
    KX_EXPECT(std::isnan(b) ? std::isnan(widen(narrow<bfloat16>(b))) : narrow<bfloat16>(b).bits == pattern);
    KX_EXPECT(std::isnan(h) ? std::isnan(widen(narrow<float16>(h))) : narrow<float16>(h).bits == pattern);
  }
  KX_EXPECT(narrow<bfloat16>(1.0f + 0x1p-8f).bits == narrow<bfloat16>(1.0f).bits);
  KX_EXPECT(narrow<bfloat16>(1.0f + 3 * 0x1p-8f).bits == narrow<bfloat16>(1.0f + 0x1p-6f).bits);
  KX_EXPECT(narrow<float16>(1.0f + 0x1p-11f).bits == narrow<float16>(1.0f).bits);
  KX_EXPECT(narrow<float16>(65520.0f).bits == 0x7c00);
  KX_EXPECT(narrow<float16>(0x1p-25f).bits == 0);
  KX_EXPECT(narrow<float16>(0x1.8p-24f).bits == 2);
}

// Accesses that AddressSanitizer has to stop.
__global__ void past_shared_memory_kernel(float* out) { *out = (&shared_memory<float>())[1]; }
__global__ void past_global_memory_kernel(const float* in, float* out) { *out = load_once<1>(in + 16).x[0]; }

void overrun(const std::string& what) {
  std::vector<float> floats(16);
  if (what == "shared") {
    launch(past_shared_memory_kernel, 1, 1, sizeof(float), 0, floats.data());
  } else if (what == "global") {
    launch(past_global_memory_kernel, 1, 1, 0, 0, static_cast<const float*>(floats.data()), floats.data());
  }
}

}  // namespace
}  // namespace kx::emulation

int main(int argc, char** argv) {
  using namespace kx::emulation;
  if (argc == 2) {
    overrun(argv[1]);
    return 0;
  }
  test_sum();
  test_lanes();
  test_every_index_once();
  test_faults();
  test_shared_memory_starts_as_nan();
  test_conversions();
  std::puts("the emulation does what a GPU does");
}
