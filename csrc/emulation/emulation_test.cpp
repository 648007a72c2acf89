// The emulation itself: what a GPU does not allow it reports, and its sums are those of the hardware.
#include "test.h"

#include <cmath>
#include <vector>

#include "../cuda/convert.cuh"
#include "../cuda/launch.cuh"
#include "../cuda/memory.cuh"

namespace kx::emulation {
namespace {

struct Sums {
  float of_warp[8];
};

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
    launch(broadcast_kernel<kBarrier>, {1, 64, sizeof(Sums)}, out.data());
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
  expect_fault([] { launch(late_thread_kernel, {1, 64}); },
               {"deadlock in block (0, 0, 0)", "threads 0 to 6 wait for the block at",
                "emulation_test.cpp:", "threads 7 to 7 have returned"});
  expect_fault([] { launch(two_barriers_kernel, {1, 64}); },
               {"different __syncthreads", "thread 0 of block", "thread 32 of block"});
  expect_fault([] { launch(lost_lane_kernel, {1, 32}); }, {"wait for their warp at", "have returned"});
  expect_fault([&] { launch(foreign_lane_kernel, {1, 32}, ints.data()); }, {"reads lane 20, which is not in the"});
  expect_fault([] { launch(masks_differ_kernel, {1, 32}); }, {"lanes of one warp meet with different masks at"});
  expect_fault([] { launch(absent_from_mask_kernel, {1, 32}); }, {"is not in the mask that it names"});
  expect_fault([&] { launch(misaligned_kernel, {1, 1}, static_cast<const float*>(floats.data()), floats.data()); },
               {"misaligned load at", "multiple of 16 bytes"});
  expect_fault([&] { launch(shared_kernel, {1, 1, 4}, floats.data()); }, {"wants 32 bytes", "the launch gave 4"});
  expect_fault([&] { launch(shared_kernel, {1, 2048, 32}, floats.data()); }, {"1 to 1024 threads"});
  expect_fault([&] { launch(shared_kernel, {dim3(1, 65536), 1, 32}, floats.data()); }, {"65535 along y and z"});
  KX_EXPECT(broadcasts<true>());
  KX_EXPECT(kInstrumented || !broadcasts<false>());  // instrumented, it is a Fault: see race_test.cpp
}

void test_shared_memory_starts_as_nan() {
  float x = 0;
  launch(shared_kernel, {1, 1, sizeof(Sums)}, &x);
  KX_EXPECT(std::isnan(x));
}

// The sums of tensor cores, as papers found them by experiment: terms are cut towards zero before they are added.
void test_sums_of_products() {
  const auto sum = [](const Summation& how, float c, std::vector<float> a, std::vector<float> b) {
    std::vector<uint32_t> x, y;
    for (size_t i = 0; i < a.size(); ++i) {
      x.push_back(to_bfloat16(a[i]).bits);
      y.push_back(to_bfloat16(b[i]).bits);
    }
    return sum_of_products(Element::kBFloat16, how, c, x.data(), y.data(), static_cast<int>(a.size()));
  };
  KX_EXPECT(sum(kAmpere, 1, {0x1p-24f}, {1}) == 1);                                         // cut to float32 at the end
  KX_EXPECT(sum(kAmpere, 1, {0x1p-24f, 0x1p-24f}, {1, 1}) == 1 + 0x1p-23f);                 // kept until then
  KX_EXPECT(sum(kAmpere, 1, {0x1p-25f, 0x1p-25f, 0x1p-25f, 0x1p-25f}, {1, 1, 1, 1}) == 1);  // each cut to nothing
  KX_EXPECT(sum(kHopper, 1, {0x1p-25f, 0x1p-25f, 0x1p-25f, 0x1p-25f}, {1, 1, 1, 1}) == 1 + 0x1p-23f);
  KX_EXPECT(sum(kAmpere, 1, {-0x1p-24f}, {1}) == 1 - 0x1p-24f);
  KX_EXPECT(sum(kAmpere, -1, {0x1p-25f}, {1}) == -1);
  KX_EXPECT(sum(kAmpere, 0, {3, -2}, {0.5f, 1.5f}) == -1.5f);
  // Groups of 8: the ninth product is added to what the first eight gave.
  const std::vector<float> ones(9, 1);
  std::vector<float> last(9, 0);
  last[0] = 1;
  last[8] = 0x1p-24f;
  KX_EXPECT(sum(kAmpere, 0, last, ones) == 1);
  KX_EXPECT(sum(kAmpere, 0, {0x1p-133f}, {0x1p-7f}) == 0x1p-140f);  // subnormals count
  KX_EXPECT(std::isinf(sum(kAmpere, 1, {INFINITY}, {1})));
  KX_EXPECT(kx::bits_of(sum(kAmpere, 1, {INFINITY}, {0})) == 0x7fffffffu);
  KX_EXPECT(std::isinf(sum(kAmpere, 0, {0x1p127f, 0x1p127f}, {1, 1})));
}

// Accesses that AddressSanitizer has to stop.
__global__ void past_shared_memory_kernel(float* out) { *out = (&shared_memory<float>())[1]; }
__global__ void past_global_memory_kernel(const float* in, float* out) { *out = load_once<1>(in + 16).x[0]; }

void overrun(const std::string& what) {
  std::vector<float> floats(16);
  if (what == "shared") {
    launch(past_shared_memory_kernel, {1, 1, sizeof(float)}, floats.data());
  } else if (what == "global") {
    launch(past_global_memory_kernel, {1, 1}, static_cast<const float*>(floats.data()), floats.data());
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
  test_faults();
  if (!kInstrumented) {  // where it is, that read is a Fault
    test_shared_memory_starts_as_nan();
  }
  test_sums_of_products();
  std::puts("the emulation does what a GPU does");
}
