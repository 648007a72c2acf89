// Planted faults of synchronisation, each in a kernel that is right but for a line: the right one runs clean under
// every schedule, the other is reported at its source line. What only instrumented loads and stores show is tested
// where the compiler instruments them (the preset tsan); the rest everywhere.
#include <numeric>
#include <stdexcept>
#include <vector>

#include "../cuda/barrier.cuh"
#include "../cuda/cluster.cuh"
#include "../cuda/copy.cuh"
#include "../cuda/launch.cuh"
#include "../cuda/memory.cuh"
#include "../cuda/mma.cuh"
#include "../cuda/tma.cuh"
#include "../cuda/wgmma.cuh"
#include "test.h"

namespace kx::races {
namespace {

using emulation::expect_fault;
using emulation::expect_no_fault;
using emulation::kInstrumented;
using emulation::kSchedules;

enum class Fix { kNo, kYes };

std::string at(const std::string& mark) { return emulation::line_of(__FILE__, mark); }

struct Memory {
  alignas(1024) float x[1024];
  Mbarrier ready, empty;
};
constexpr size_t kBytes = sizeof(Memory);

std::vector<float> numbers(size_t n) {
  std::vector<float> out(n);
  std::iota(out.begin(), out.end(), 1.0f);
  return out;
}
const std::vector<float> global = numbers(4096);

// `good` runs clean; `bad` is a race whose report says `words`. Where loads and stores are instrumented it is found
// under every schedule, or some if `sometimes`.
template <class Good, class Bad>
void expect_race(Good good, Bad bad, const std::vector<std::string>& words, bool sometimes = false) {
  expect_no_fault(good);
  if (kInstrumented) {
    expect_fault(bad, words, sometimes ? 1 : kSchedules);
  }
}

// Threads.

template <Fix fix>
__global__ void missing_barrier(float* out) {
  Memory& memory = shared_memory<Memory>();
  memory.x[threadIdx.x] = 0;
  __syncthreads();
  memory.x[threadIdx.x] += 1;  // barrier: write
  if (fix == Fix::kYes) {
    __syncthreads();
  }
  out[threadIdx.x] = memory.x[63 - threadIdx.x];  // barrier: read
}

template <Fix fix>
__global__ void overwritten(float* out) {
  Memory& memory = shared_memory<Memory>();
  for (int i = 0; i < 3; ++i) {
    memory.x[threadIdx.x] = static_cast<float>(i);  // overwritten: write
    __syncthreads();
    out[threadIdx.x] = memory.x[63 - threadIdx.x];  // overwritten: read
    if (fix == Fix::kYes) {
      __syncthreads();
    }
  }
}

template <Fix fix>
__global__ void warp_only(float* out) {
  Memory& memory = shared_memory<Memory>();
  memory.x[threadIdx.x] = 0;
  __syncthreads();
  memory.x[threadIdx.x] = 1;  // warp: write
  __syncwarp();
  out[threadIdx.x] = memory.x[threadIdx.x ^ (fix == Fix::kYes ? 1 : 32)];  // warp: read
}

// A shuffle is no barrier for memory.
template <Fix fix>
__global__ void shuffled(float* out) {
  Memory& memory = shared_memory<Memory>();
  memory.x[threadIdx.x] = 1;  // shuffle: write
  __syncwarp();
  memory.x[threadIdx.x] = 2;
  const float x = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  if (fix == Fix::kYes) {
    __syncwarp();
  }
  out[threadIdx.x] = x + memory.x[threadIdx.x ^ 1];  // shuffle: read
}

template <Fix fix>
__global__ void named(float* out) {
  Memory& memory = shared_memory<Memory>();
  memory.x[threadIdx.x] = 0;
  __syncthreads();
  if (threadIdx.x < 32) {
    memory.x[threadIdx.x] = 1;  // named: write
    arrive_at_barrier(1, 64);
  } else {
    sync_at_barrier(fix == Fix::kYes ? 1 : 2, fix == Fix::kYes ? 64 : 32);
    out[threadIdx.x] = memory.x[threadIdx.x - 32];  // named: read
  }
}

template <Fix fix>
__global__ void two_writers(float* out) {
  out[fix == Fix::kYes ? blockIdx.x * 64 + threadIdx.x : threadIdx.x] = 1;  // global: write
}

template <Fix fix>
__global__ void half_atomic(int* out) {
  if (fix == Fix::kYes || threadIdx.x != 0) {
    atomicAdd(out, 1);  // atomic: one
  } else {
    *out += 1;  // atomic: other
  }
}

__global__ void uninitialised(float* out) {
  Memory& memory = shared_memory<Memory>();
  if (threadIdx.x < 63) {
    memory.x[threadIdx.x] = 1;
  }
  __syncthreads();
  out[threadIdx.x] = memory.x[threadIdx.x];  // nobody wrote
}

__global__ void past_the_end(float* out, int index) {
  Memory& memory = shared_memory<Memory>();
  out[threadIdx.x] = memory.x[index];  // past the end
}

void test_threads() {
  std::vector<float> out(128);
  std::vector<int> sum(1);
  expect_race(
      [&] { launch(missing_barrier<Fix::kYes>, {1, 64, kBytes}, out.data()); },
      [&] { launch(missing_barrier<Fix::kNo>, {1, 64, kBytes}, out.data()); },
      {at("barrier: write"), at("barrier: read"), "nothing orders the two (a race)", "shared memory at offset"});
  expect_race([&] { launch(overwritten<Fix::kYes>, {1, 64, kBytes}, out.data()); },
              [&] { launch(overwritten<Fix::kNo>, {1, 64, kBytes}, out.data()); },
              {at("overwritten: write"), at("overwritten: read"), "a race"});
  expect_race([&] { launch(warp_only<Fix::kYes>, {1, 64, kBytes}, out.data()); },
              [&] { launch(warp_only<Fix::kNo>, {1, 64, kBytes}, out.data()); },
              {at("warp: write"), at("warp: read"), "a race"});
  expect_race([&] { launch(shuffled<Fix::kYes>, {1, 64, kBytes}, out.data()); },
              [&] { launch(shuffled<Fix::kNo>, {1, 64, kBytes}, out.data()); }, {at("shuffle: read"), "a race"});
  expect_race([&] { launch(named<Fix::kYes>, {1, 64, kBytes}, out.data()); },
              [&] { launch(named<Fix::kNo>, {1, 64, kBytes}, out.data()); },
              {at("named: write"), at("named: read"), "a race"});
  expect_race([&] { launch(two_writers<Fix::kYes>, {2, 64}, out.data()); },
              [&] { launch(two_writers<Fix::kNo>, {2, 64}, out.data()); },
              {at("global: write"), "of block 0", "of block 1", "global memory", "a race"});
  expect_race([&] { launch(half_atomic<Fix::kYes>, {2, 64}, sum.data()); },
              [&] { launch(half_atomic<Fix::kNo>, {2, 64}, sum.data()); },
              {at("atomic: one"), at("atomic: other"), "a race"});
  if (kInstrumented) {
    expect_fault([&] { launch(uninitialised, {1, 64, kBytes}, out.data()); },
                 {at("nobody wrote"), "which nobody has written"}, kSchedules);
    expect_fault([&] { launch(past_the_end, {1, 1, sizeof(Memory)}, out.data(), static_cast<int>(kBytes / 4)); },
                 {at("past the end"), "reads 4 bytes outside shared memory, at offset 5120 of 5120"}, kSchedules);
    expect_fault([&] { launch(past_the_end, {1, 1, sizeof(Memory)}, out.data(), -1); },
                 {at("past the end"), "outside shared memory, at offset -4"}, kSchedules);
  }
}

// cp.async.

template <Fix fix>
__global__ void not_waited(const float* in, float* out) {
  Memory& memory = shared_memory<Memory>();
  copy_async<16>(memory.x + 4 * threadIdx.x, in + 4 * threadIdx.x);  // not waited: copy
  commit_copies();
  if (fix == Fix::kYes) {
    wait_copies<0>();
  }
  out[threadIdx.x] = memory.x[4 * threadIdx.x];  // not waited: read
  wait_all_copies();
}

// A thread's wait says nothing of what others have copied.
template <Fix fix>
__global__ void waited_alone(const float* in, float* out) {
  Memory& memory = shared_memory<Memory>();
  copy_async<16>(memory.x + 4 * threadIdx.x, in + 4 * threadIdx.x);  // waited alone: copy
  if (fix == Fix::kYes) {
    wait_all_copies();
    __syncthreads();
  } else {
    __syncthreads();
    wait_all_copies();
  }
  out[threadIdx.x] = memory.x[4 * (63 - threadIdx.x)];  // waited alone: read
}

template <Fix fix>
__global__ void one_group_short(const float* in, float* out) {
  Memory& memory = shared_memory<Memory>();
  for (int i = 0; i < 2; ++i) {
    copy_async<16>(memory.x + 256 * i + 4 * threadIdx.x, in + 4 * threadIdx.x);  // group: copy
    commit_copies();
  }
  wait_copies<fix == Fix::kYes ? 0 : 1>();
  out[threadIdx.x] = memory.x[256 + 4 * threadIdx.x];  // group: read
  wait_all_copies();
}

// The next tile is copied over the one that others still read.
template <Fix fix>
__global__ void copied_over(const float* in, float* out) {
  Memory& memory = shared_memory<Memory>();
  for (int i = 0; i < 3; ++i) {
    copy_async<16>(memory.x + 4 * threadIdx.x, in + 4 * threadIdx.x);  // copied over: copy
    wait_all_copies();
    __syncthreads();
    out[threadIdx.x] = memory.x[4 * (63 - threadIdx.x)];  // copied over: read
    if (fix == Fix::kYes) {
      __syncthreads();
    }
  }
}

__global__ void copies_left(const float* in) {
  copy_async<16>(shared_memory<Memory>().x + 4 * threadIdx.x, in + 4 * threadIdx.x);
  commit_copies();
}

__global__ void misplaced_copy(const float* in, int to, int from) {
  Memory& memory = shared_memory<Memory>();
  copy_async<16>(memory.x + to, in + from);  // misplaced
  wait_all_copies();
}

// The same copies with no instrumentation: what has not been waited for is NaN under some schedule.
template <Fix fix>
bool copies_arrive() {
  std::vector<float> out(64);
  bool all = true;
  for (uint64_t schedule = 0; schedule < kSchedules; ++schedule) {
    emulation::set_seed(schedule);
    launch(not_waited<fix>, {1, 64, kBytes}, global.data(), out.data());
    for (size_t i = 0; i < out.size(); ++i) {
      all = all && out[i] == global[4 * i];
    }
  }
  emulation::set_seed(0);
  return all;
}

void test_copies() {
  std::vector<float> out(64);
  const float* in = global.data();
  expect_race([&] { launch(not_waited<Fix::kYes>, {1, 64, kBytes}, in, out.data()); },
              [&] { launch(not_waited<Fix::kNo>, {1, 64, kBytes}, in, out.data()); },
              {at("not waited: read"), "the cp.async of thread", at("not waited: copy"), "a race"});
  expect_race([&] { launch(waited_alone<Fix::kYes>, {1, 64, kBytes}, in, out.data()); },
              [&] { launch(waited_alone<Fix::kNo>, {1, 64, kBytes}, in, out.data()); },
              {at("waited alone: read"), at("waited alone: copy"), "a race"});
  expect_race([&] { launch(one_group_short<Fix::kYes>, {1, 64, kBytes}, in, out.data()); },
              [&] { launch(one_group_short<Fix::kNo>, {1, 64, kBytes}, in, out.data()); },
              {at("group: read"), at("group: copy"), "a race"});
  expect_race([&] { launch(copied_over<Fix::kYes>, {1, 64, kBytes}, in, out.data()); },
              [&] { launch(copied_over<Fix::kNo>, {1, 64, kBytes}, in, out.data()); },
              {at("copied over: copy"), at("copied over: read"), "a race"});
  expect_fault([&] { launch(copies_left, {1, 64, kBytes}, in); }, {"ends with 1 cp.async that it has not waited for"},
               kSchedules);
  expect_fault([&] { launch(misplaced_copy, {1, 1, kBytes}, in, 2, 0); },
               {"misaligned destination of cp.async at " + at("misplaced")}, kSchedules);
  expect_fault([&] { launch(misplaced_copy, {1, 1, kBytes}, in, 0, 1); },
               {"misaligned source of cp.async at " + at("misplaced")}, kSchedules);
  expect_fault([&] { launch(misplaced_copy, {1, 1, kBytes}, in, 4096, 0); },
               {"cp.async at " + at("misplaced") + " touches 16 bytes outside shared memory"}, kSchedules);
#if defined(__SANITIZE_ADDRESS__)
  expect_fault([&] { launch(misplaced_copy, {1, 1, kBytes}, in, 0, 4096); },
               {at("misplaced") + " touches global memory outside what was allocated"}, kSchedules);
#endif
  if (!kInstrumented) {
    KX_EXPECT(copies_arrive<Fix::kYes>());
    KX_EXPECT(!copies_arrive<Fix::kNo>());
  }
}

// mbarriers and bulk copies.

__device__ void init(Memory& memory, unsigned ready, unsigned empty) {
  if (threadIdx.x == 0) {
    memory.ready.init(ready);
    memory.empty.init(empty);
    fence_mbarriers();
  }
  __syncthreads();
}

template <Fix fix>
__global__ void bulk_not_waited(const float* in, float* out) {
  Memory& memory = shared_memory<Memory>();
  init(memory, 1, 1);
  if (threadIdx.x == 0) {
    memory.ready.arrive_and_expect(1024);
    load_bytes(memory.x, in, 1024, memory.ready);  // bulk: load
  }
  if (fix == Fix::kYes || threadIdx.x != 7) {
    memory.ready.wait(0);
  }
  out[threadIdx.x] = memory.x[threadIdx.x];  // bulk: read
}

// A ring of one slot. The parity with which its producer waits for it to be empty is wrong: it never waits.
template <Fix fix>
__global__ void wrong_phase(const float* in, float* out) {
  Memory& memory = shared_memory<Memory>();
  init(memory, 1, 32);
  if (threadIdx.x >= 32) {
    for (unsigned i = 0; i < 4 && threadIdx.x == 32; ++i) {
      memory.empty.wait(fix == Fix::kYes ? (i + 1) % 2 : 1);
      memory.ready.arrive_and_expect(1024);  // phase: arrive
      load_bytes(memory.x, in, 1024, memory.ready);
    }
  } else {
    for (unsigned i = 0; i < 4; ++i) {
      memory.ready.wait(i % 2);
      out[threadIdx.x] = memory.x[threadIdx.x];
      memory.empty.arrive();
    }
  }
}

template <Fix fix>
__global__ void wrong_parity(const float* in, float* out) {
  Memory& memory = shared_memory<Memory>();
  init(memory, 1, 32);
  for (unsigned i = 0; i < 2; ++i) {
    if (threadIdx.x == 0) {
      memory.ready.arrive_and_expect(1024);
      load_bytes(memory.x, in, 1024, memory.ready);  // parity: load
    }
    memory.ready.wait(fix == Fix::kYes ? i % 2 : 0);  // parity: wait
    out[threadIdx.x] = memory.x[threadIdx.x];         // parity: read
    __syncthreads();
  }
  if (fix == Fix::kNo) {
    memory.ready.wait(1);
  }
}

__global__ void too_few_bytes(const float* in) {
  Memory& memory = shared_memory<Memory>();
  init(memory, 1, 1);
  if (threadIdx.x == 0) {
    memory.ready.arrive_and_expect(2048);
    load_bytes(memory.x, in, 1024, memory.ready);
  }
  memory.ready.wait(0);  // too few bytes
}

__global__ void nobody_waits(const float* in) {
  Memory& memory = shared_memory<Memory>();
  init(memory, 1, 1);
  if (threadIdx.x == 0) {
    memory.ready.arrive_and_expect(1024);
    load_bytes(memory.x, in, 1024, memory.ready);
  }
}

__global__ void too_many_arrivals() {
  Memory& memory = shared_memory<Memory>();
  init(memory, 33, 1);
  memory.ready.arrive();
  if (threadIdx.x < 2) {
    memory.ready.arrive();  // too many
  }
}

__global__ void no_barrier_after_init() {
  Memory& memory = shared_memory<Memory>();
  if (threadIdx.x == 0) {
    memory.ready.init(64);  // init
  }
  __syncwarp();
  memory.ready.arrive();  // use
}

__global__ void never_initialised() { shared_memory<Memory>().ready.wait(0); }

__global__ void read_as_memory(uint64_t* out) {
  Memory& memory = shared_memory<Memory>();
  init(memory, 1, 1);
  out[threadIdx.x] = *reinterpret_cast<const volatile uint64_t*>(&memory.ready);  // as memory
}

__global__ void initialised_twice() {
  Memory& memory = shared_memory<Memory>();
  memory.ready.init(1);
  memory.ready.init(1);  // twice
}

__global__ void misaligned_bulk(const float* in, int to, int from, unsigned bytes) {
  Memory& memory = shared_memory<Memory>();
  init(memory, 1, 1);
  memory.ready.arrive_and_expect(bytes);
  load_bytes(memory.x + to, in + from, bytes, memory.ready);  // misaligned bulk
  memory.ready.wait(0);
}

template <Fix fence, Fix read>
__global__ void stored(float* out) {
  Memory& memory = shared_memory<Memory>();
  for (int i = 0; i < 2; ++i) {
    memory.x[threadIdx.x] = static_cast<float>(i);  // stored: write
    if (fence == Fix::kYes) {
      fence_proxy_async();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      store_bytes(out + 64 * i, memory.x, 256);  // stored: store
      commit_stores();
      wait_stores_read<read == Fix::kYes ? 0 : 1>();
    }
    __syncthreads();
  }
  wait_stores_read<0>();
}

// The fence belongs to those who wrote, before the barrier; here one thread has it, after the barrier.
__global__ void fenced_too_late(float* out) {
  Memory& memory = shared_memory<Memory>();
  memory.x[threadIdx.x] = 1;  // late: write
  __syncthreads();
  if (threadIdx.x == 0) {
    fence_proxy_async();
    store_bytes(out, memory.x, 256);  // late: store
    commit_stores();
    wait_stores<0>();
  }
}

void test_bulk() {
  std::vector<float> out(128);
  std::vector<uint64_t> words(32);
  const float* in = global.data();
  expect_race([&] { launch(bulk_not_waited<Fix::kYes>, {1, 64, kBytes}, in, out.data()); },
              [&] { launch(bulk_not_waited<Fix::kNo>, {1, 64, kBytes}, in, out.data()); },
              {"bulk copy of thread 0", at("bulk: load"), "race_test.cpp"}, true);
  expect_no_fault([&] { launch(wrong_phase<Fix::kYes>, {1, 64, kBytes}, in, out.data()); });
  expect_fault([&] { launch(wrong_phase<Fix::kNo>, {1, 64, kBytes}, in, out.data()); },
               {at("phase: arrive"), "mbarrier at offset 4096", "phase 0"}, kSchedules / 2);
  expect_race([&] { launch(wrong_parity<Fix::kYes>, {1, 32, kBytes}, in, out.data()); },
              [&] { launch(wrong_parity<Fix::kNo>, {1, 32, kBytes}, in, out.data()); },
              {at("parity: load"), at("parity: read"), "a race"}, true);
  expect_fault(
      [&] { launch(too_few_bytes, {1, 32, kBytes}, in); },
      {"deadlock", "threads 0 to 31 wait for phase 0 of the mbarrier at offset 4096 (0 arrivals and 1024 bytes",
       at("too few bytes")},
      kSchedules);
  expect_fault([&] { launch(nobody_waits, {1, 32, kBytes}, in); },
               {"ends with bulk copies in flight", "mbarrier at offset 4096"}, kSchedules);
  expect_fault([&] { launch(too_many_arrivals, {1, 32, kBytes}); }, {at("too many"), "phase"});
  if (kInstrumented) {
    expect_fault([&] { launch(no_barrier_after_init, {1, 64, kBytes}); }, {at("use"), at("init"), "a race"});
    expect_fault([&] { launch(read_as_memory, {1, 32, kBytes}, words.data()); },
                 {at("as memory"), "which holds an mbarrier"}, kSchedules);
  }
  expect_fault([&] { launch(never_initialised, {1, 1, kBytes}); }, {"names no initialised mbarrier"}, kSchedules);
  expect_fault([&] { launch(initialised_twice, {1, 1, kBytes}); }, {at("twice"), "without having been invalidated"},
               kSchedules);
  expect_fault([&] { launch(misaligned_bulk, {1, 1, kBytes}, in, 1, 0, 64); },
               {"misaligned bulk copy at " + at("misaligned bulk")}, kSchedules);
  expect_fault([&] { launch(misaligned_bulk, {1, 1, kBytes}, in, 0, 2, 64); },
               {"misaligned bulk copy at " + at("misaligned bulk")}, kSchedules);
  expect_fault([&] { launch(misaligned_bulk, {1, 1, kBytes}, in, 0, 0, 24); }, {"24 bytes", "multiple of 16"},
               kSchedules);
  expect_fault([&] { launch(misaligned_bulk, {1, 1, kBytes}, in, 1272, 0, 64); },
               {at("misaligned bulk"), "touches 64 bytes outside shared memory"}, kSchedules);
  expect_race([&] { launch(stored<Fix::kYes, Fix::kYes>, {1, 64, kBytes}, out.data()); },
              [&] { launch(stored<Fix::kNo, Fix::kYes>, {1, 64, kBytes}, out.data()); },
              {"the bulk store of thread 0", at("stored: store"), at("stored: write"), "no fence.proxy.async"});
  expect_race([&] { launch(stored<Fix::kYes, Fix::kYes>, {1, 64, kBytes}, out.data()); },
              [&] { launch(stored<Fix::kYes, Fix::kNo>, {1, 64, kBytes}, out.data()); },
              {at("stored: write"), "the bulk store of thread 0", at("stored: store"), "a race"});
  if (kInstrumented) {
    expect_fault([&] { launch(fenced_too_late, {1, 64, kBytes}, out.data()); },
                 {at("late: store"), at("late: write"), "no fence.proxy.async"}, kSchedules);
  }
}

// Tiles.

__global__ void tile(const __grid_constant__ TensorMap map, int to, unsigned bytes) {
  Memory& memory = shared_memory<Memory>();
  init(memory, 1, 1);
  memory.ready.arrive_and_expect(bytes);
  const int corner[2] = {0, 0};
  load_tile(memory.x + to, map, corner, memory.ready);  // tile
  memory.ready.wait(0);
}

TensorMap map_of(const float* data, uint64_t pitch, uint32_t width, uint32_t height, Swizzle swizzle) {
  const uint64_t size[2] = {64, 32}, stride[1] = {pitch};
  const uint32_t box[2] = {width, height};
  return make_tensor_map(data, 4, 2, size, stride, box, swizzle);
}

void expect_refused(const char* rule, const std::function<void()>& make) {
  try {
    make();
  } catch (const std::invalid_argument& error) {
    KX_EXPECT(std::string(error.what()).find(rule) != std::string::npos);
    return;
  }
  KX_EXPECT(!"the map is accepted");
}

void test_tiles() {
  std::vector<float> x(64 * 32);
  const float* data = x.data();
  expect_no_fault([&] { launch(tile, {1, 1, kBytes}, map_of(data, 256, 32, 8, Swizzle::k128), 0, 1024u); });
  expect_fault([&] { launch(tile, {1, 1, kBytes}, map_of(data, 256, 32, 8, Swizzle::k128), 4, 1024u); },
               {"misaligned TMA load at " + at("tile")}, kSchedules);
  expect_fault([&] { launch(tile, {1, 1, kBytes}, map_of(data, 256, 32, 32, Swizzle::kNone), 512, 4096u); },
               {at("tile"), "outside shared memory"}, kSchedules);
  expect_fault([&] { launch(tile, {1, 1, kBytes}, map_of(data, 256, 32, 8, Swizzle::k128), 0, 512u); },
               {"mbarrier at offset 4096", "-512 bytes"});
  expect_refused("multiple of 16", [&] { map_of(data + 1, 256, 32, 8, Swizzle::k128); });
  expect_refused("stride", [&] { map_of(data, 264, 32, 8, Swizzle::k128); });
  expect_refused("as wide as its swizzle", [&] { map_of(data, 256, 16, 8, Swizzle::k128); });
  expect_refused("256 elements", [&] { map_of(data, 256, 32, 300, Swizzle::k128); });
  expect_refused("16 bytes", [&] { map_of(data, 256, 30, 8, Swizzle::kNone); });
}

// Tensor cores.

__global__ void half_a_warp(float* out) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (threadIdx.x < 16) {
    mma_m16n8k16<bfloat16>(d, a, b);  // half a warp
  }
  out[threadIdx.x] = d[0];
}

__global__ void two_instructions(float* out) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (threadIdx.x < 16) {
    mma_m16n8k16<bfloat16>(d, a, b);  // one instruction
  } else {
    mma_m16n8k16<float16>(d, a, b);  // another
  }
  out[threadIdx.x] = d[0];
}

__global__ void matrix_rows(float* out, int offset) {
  Memory& memory = shared_memory<Memory>();
  memory.x[threadIdx.x] = 0;
  __syncthreads();
  uint32_t r[1];
  load_matrices<false>(r, memory.x + 4 * threadIdx.x + offset);  // matrix
  out[threadIdx.x] = static_cast<float>(r[0]);
}

enum class Wrong {
  kNothing,
  kNoFence,
  kNoProxyFence,
  kReadEarly,
  kOverwriteEarly,
  kNoWait,
  kOperandsDiffer,
  kUninitialised
};

template <Wrong wrong>
__global__ void product(float* out) {
  Memory& memory = shared_memory<Memory>();
  if (wrong != Wrong::kUninitialised) {
    for (unsigned i = threadIdx.x; i < 1024; i += 128) {
      memory.x[i] = 0;  // product: write
    }
  }
  if (wrong != Wrong::kNoProxyFence) {
    fence_proxy_async();
  }
  __syncthreads();
  const bool differ = wrong == Wrong::kOperandsDiffer && threadIdx.x == 40;
  const MatrixDescriptor a = describe_matrix(memory.x, 16, 256, Swizzle::k32);
  const MatrixDescriptor b = describe_matrix(memory.x + (differ ? 512 : 0), 16, 256, Swizzle::k32);
  float d[4] = {};
  if (wrong != Wrong::kNoFence) {
    fence_products(d);
  }
  wgmma<bfloat16, 8>(d, a, b);  // product: wgmma
  commit_products();
  float early = 0;
  if (wrong == Wrong::kReadEarly) {
    early = d[0];  // product: read
  }
  if (wrong == Wrong::kOverwriteEarly) {
    memory.x[threadIdx.x] = 1;  // product: overwrite
  }
  if (wrong != Wrong::kNoWait) {
    wait_products<0>(d);
  }
  out[threadIdx.x] = wrong == Wrong::kNoWait ? 0 : d[0] + early;
}

template <Wrong wrong>
void launch_product(std::vector<float>& out) {
  launch(product<wrong>, {1, 128, kBytes}, out.data());
}

__global__ void fence_again(float* out) {
  Memory& memory = shared_memory<Memory>();
  for (unsigned i = threadIdx.x; i < 1024; i += 128) {
    memory.x[i] = 0;
  }
  fence_proxy_async();
  __syncthreads();
  const MatrixDescriptor a = describe_matrix(memory.x, 16, 256, Swizzle::k32);
  float d[4] = {};
  fence_products(d);
  wgmma<bfloat16, 8>(d, a, a);
  commit_products();
  wait_products<0>(d);
  d[1] *= 2;                    // the registers are touched
  wgmma<bfloat16, 8>(d, a, a);  // again
  commit_products();
  wait_products<0>(d);
  out[threadIdx.x] = d[0];
}

void test_tensor_cores() {
  std::vector<float> out(128);
  expect_fault([&] { launch(half_a_warp, {1, 32}, out.data()); },
               {"deadlock", "threads 0 to 15 wait for their warp at " + at("half a warp"), "16 to 31 have returned"},
               kSchedules);
  expect_fault([&] { launch(two_instructions, {1, 32}, out.data()); },
               {"different instructions", at("one instruction"), at("another")}, kSchedules);
  expect_fault([&] { launch(matrix_rows, {1, 32, kBytes}, out.data(), 1); }, {"misaligned ldmatrix at " + at("matrix")},
               kSchedules);
  expect_fault([&] { launch(matrix_rows, {1, 32, kBytes}, out.data(), 2048); },
               {"ldmatrix at " + at("matrix") + " touches 16 bytes outside shared memory"}, kSchedules);
  expect_no_fault([&] { launch(matrix_rows, {1, 32, kBytes}, out.data(), 0); });
  expect_no_fault([&] { launch_product<Wrong::kNothing>(out); });
  expect_fault([&] { launch_product<Wrong::kNoFence>(out); }, {at("product: wgmma"), "without a wgmma.fence"},
               kSchedules);
  expect_fault([&] { launch_product<Wrong::kNoWait>(out); },
               {"ends without having waited for the wgmma at " + at("product: wgmma")}, kSchedules);
  expect_fault([&] { launch_product<Wrong::kOperandsDiffer>(out); }, {"different operands at " + at("product: wgmma")},
               kSchedules);
  if (kInstrumented) {
    expect_fault([&] { launch(matrix_rows, {1, 32, kBytes}, out.data(), 128); },
                 {at("matrix"), "which nobody has written"}, kSchedules);
    expect_fault([&] { launch_product<Wrong::kNoProxyFence>(out); },
                 {"the wgmma of thread", at("product: wgmma"), at("product: write"), "no fence.proxy.async"},
                 kSchedules);
    expect_fault([&] { launch_product<Wrong::kReadEarly>(out); },
                 {"reads at " + at("product: read"), "registers of the wgmma at " + at("product: wgmma")}, kSchedules);
    expect_fault([&] { launch_product<Wrong::kOverwriteEarly>(out); },
                 {at("product: overwrite"), "the wgmma of thread", at("product: wgmma"), "a race"}, kSchedules);
    expect_fault([&] { launch_product<Wrong::kUninitialised>(out); },
                 {at("product: wgmma"), "which nobody has written"}, kSchedules);
    expect_fault([&] { launch(fence_again, {1, 128, kBytes}, out.data()); }, {at("again"), "without a wgmma.fence"},
                 kSchedules);
  }
}

// Clusters.

template <Fix fix>
__global__ void peer(float* out) {
  Memory& memory = shared_memory<Memory>();
  memory.x[threadIdx.x] = 1;  // peer: write
  if (fix == Fix::kYes) {
    sync_cluster();
  } else {
    __syncthreads();
  }
  out[64 * blockIdx.x + threadIdx.x] = *in_block(memory.x + threadIdx.x, 1 - cluster_rank());  // peer: read
  sync_cluster();
}

// Each block of two copies to the other what its threads have written.
template <Fix fence, Fix wait, Fix stay>
__global__ void copied_to_block(float* out) {
  Memory& memory = shared_memory<Memory>();
  const unsigned rank = cluster_rank();
  memory.x[64 * (1 - rank) + threadIdx.x] = 0;
  memory.x[64 * rank + threadIdx.x] = 1;  // copied: write
  if (threadIdx.x == 0) {
    memory.ready.init(1);
    fence_mbarriers();
    memory.ready.arrive_and_expect(256);
  }
  if (fence == Fix::kYes) {
    fence_proxy_async();
  }
  sync_cluster();
  if (threadIdx.x == 0) {
    copy_bytes_to(1 - rank, memory.x + 64 * rank, 256, memory.ready);  // copied: copy
  }
  if (wait == Fix::kYes || threadIdx.x == 0) {
    memory.ready.wait(0);
  }
  out[64 * blockIdx.x + threadIdx.x] = memory.x[64 * (1 - rank) + threadIdx.x];  // copied: read
  if (stay == Fix::kYes) {
    sync_cluster();
  }
}

__global__ void copied_to_itself() {
  Memory& memory = shared_memory<Memory>();
  memory.ready.init(1);
  copy_bytes_to(cluster_rank(), memory.x, 64, memory.ready);  // itself
}

__global__ void lonely(float* out) { *in_block(out, 1) = 1; }

__global__ void one_block_arrives() {
  if (cluster_rank() == 0) {
    sync_cluster();  // one block
  }
}

void test_clusters() {
  std::vector<float> out(128);
  expect_no_fault([&] { launch(peer<Fix::kYes>, {2, 64, kBytes, 0, 2}, out.data()); });
  if (kInstrumented) {
    expect_fault([&] { launch(peer<Fix::kNo>, {2, 64, kBytes, 0, 2}, out.data()); }, {at("peer: read")}, kSchedules);
  }
  const auto copied = [&](auto kernel) {
    return [&out, kernel] { launch(kernel, {2, 64, kBytes, 0, 2}, out.data()); };
  };
  const auto right = copied(copied_to_block<Fix::kYes, Fix::kYes, Fix::kYes>);
  expect_race(right, copied(copied_to_block<Fix::kNo, Fix::kYes, Fix::kYes>),
              {at("copied: write"), at("copied: copy"), "no fence.proxy.async"});
  expect_race(right, copied(copied_to_block<Fix::kYes, Fix::kNo, Fix::kYes>), {at("copied: read"), at("copied: copy")},
              true);
  expect_fault(copied(copied_to_block<Fix::kYes, Fix::kYes, Fix::kNo>),
               {at("copied: copy"), "from a block of the cluster that has ended"});
  expect_fault([&] { launch(copied_to_itself, {1, 1, kBytes}); }, {at("itself"), "not another one of its cluster of 1"},
               kSchedules);
  expect_fault([&] { launch(lonely, {1, 1, kBytes}, out.data()); }, {"give an address of its own shared memory"},
               kSchedules);
  expect_fault([&] { launch(one_block_arrives, {2, 32, kBytes, 0, 2}); },
               {"deadlock", "wait for the cluster at " + at("one block")}, kSchedules);
  expect_fault([&] { launch(one_block_arrives, {3, 32, kBytes, 0, 2}); }, {"divides the grid"}, kSchedules);
}

}  // namespace
}  // namespace kx::races

int main() {
  using namespace kx::races;
  test_threads();
  test_copies();
  test_bulk();
  test_tiles();
  test_tensor_cores();
  test_clusters();
  std::printf("every planted fault is found%s\n", kInstrumented ? "" : " that needs no instrumentation");
}
