// What csrc/cuda's primitives have to do, on a GPU and on its emulation alike: this file compiles for both. What is
// expected comes from the tables of the PTX ISA and from plain arithmetic, written out here once more.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include "../common/expect.h"
#include "../common/half.h"
#include "barrier.cuh"
#include "cluster.cuh"
#include "convert.cuh"
#include "copy.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "memory.cuh"
#include "mma.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace kx::conformance {
namespace {

constexpr unsigned kAll = 0xffffffffu;

#ifdef KX_EMULATION
constexpr int kSchedules = 12;
void choose_schedule(int seed) { emulation::set_seed(static_cast<uint64_t>(seed)); }
void finish() {}

template <class T>
class Buffer {
 public:
  explicit Buffer(std::vector<T> values) : values_(std::move(values)) {}
  explicit Buffer(size_t n) : values_(n) {}
  T* data() { return values_.data(); }
  std::vector<T> values() const { return values_; }

 private:
  std::vector<T> values_;
};
#else
constexpr int kSchedules = 3;
void choose_schedule(int) {}
void finish() {
  check_cuda(cudaGetLastError(), "launch");
  check_cuda(cudaDeviceSynchronize(), "kernel");
}

template <class T>
class Buffer {
 public:
  explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) {
    check_cuda(cudaMemcpy(data_, values.data(), n_ * sizeof(T), cudaMemcpyHostToDevice), "copy");
  }
  explicit Buffer(size_t n) : n_(n) {
    check_cuda(cudaMalloc(&data_, n * sizeof(T)), "allocation");
    check_cuda(cudaMemset(data_, 0, n * sizeof(T)), "memset");
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() { return data_; }
  std::vector<T> values() const {
    std::vector<T> out(n_);
    check_cuda(cudaMemcpy(out.data(), data_, n_ * sizeof(T), cudaMemcpyDeviceToHost), "copy");
    return out;
  }

 private:
  T* data_ = nullptr;
  size_t n_ = 0;
};
#endif

// Calls `test` under every schedule.
void repeat(const std::function<void()>& test) {
  for (int seed = 0; seed < kSchedules; ++seed) {
    choose_schedule(seed);
    test();
  }
  choose_schedule(0);
}

template <class T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return to_bfloat16(x);
  } else if constexpr (std::is_same_v<T, float16>) {
    return to_float16(x);
  } else {
    return x;
  }
}

// Integers from -4 to 4: their products and sums are exact in every type.
template <class T>
std::vector<T> small_integers(size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<T> out(n);
  for (T& x : out) {
    x = from_float<T>(static_cast<float>(random() % 9) - 4);
  }
  return out;
}

float value(float x) { return x; }
float value(bfloat16 x) { return to_float(x); }
float value(float16 x) { return to_float(x); }

__device__ inline unsigned bits(bfloat16 x) { return x.bits; }
__device__ inline unsigned bits(float16 x) { return x.bits; }

// a [m, k] · bᵀ [n, k] + c
template <class T>
std::vector<double> product(const std::vector<T>& a, const std::vector<T>& b, const std::vector<float>& c, int m, int n,
                            int k) {
  std::vector<double> out(c.begin(), c.end());
  out.resize(static_cast<size_t>(m) * n);
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      for (int l = 0; l < k; ++l) {
        out[i * n + j] += static_cast<double>(value(a[i * k + l])) * value(b[j * k + l]);
      }
    }
  }
  return out;
}

// Indices, shuffles, votes, reductions, atomics.

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
    float sum = 0;
    for (const float each : sums.of_warp) {
      sum += each;
    }
    out[blockIdx.x] = sum;
  }
}

// The same with an object that the kernel declares.
__global__ void static_sum_kernel(const float* in, float* out) {
  Sums& sums = static_shared_memory<Sums>();
  if (threadIdx.x < 8) {
    sums.of_warp[threadIdx.x] = 0;
    for (int i = 0; i < 32; ++i) {
      sums.of_warp[threadIdx.x] += in[blockIdx.x * 256 + 32 * threadIdx.x + i];
    }
  }
  __syncthreads();
  if (threadIdx.x == 32) {
    float sum = 0;
    for (const float each : sums.of_warp) {
      sum += each;
    }
    out[blockIdx.x] = sum;
  }
}

void test_sum() {
  std::vector<float> in(3 * 256);
  std::iota(in.begin(), in.end(), 0.0f);
  Buffer<float> x(in), out(3);
  launch(sum_kernel, {3, 256, sizeof(Sums)}, x.data(), out.data());
  finish();
  for (int i = 0; i < 3; ++i) {
    KX_EXPECT(out.values()[i] == 256.0f * (256 * i) + 255 * 128);
  }
  Buffer<float> again(3);
  launch(static_sum_kernel, {3, 256}, x.data(), again.data());
  finish();
  KX_EXPECT(again.values() == out.values());
}

__global__ void lanes_kernel(int* out) {
  const int lane = threadIdx.x % 32;
  int* mine = out + 16 * threadIdx.x;
  mine[0] = __shfl_sync(kAll, lane, 5);
  mine[1] = __shfl_sync(kAll, lane, 3, 8);
  mine[2] = __shfl_up_sync(kAll, lane, 2);
  mine[3] = __shfl_down_sync(kAll, lane, 2, 8);
  mine[4] = __shfl_xor_sync(kAll, lane, 7);
  mine[5] = static_cast<int>(__ballot_sync(kAll, lane % 2 == 0));
  mine[6] = __any_sync(kAll, lane == 31) && !__all_sync(kAll, lane < 31);
  __syncwarp();
  mine[7] = lane < 16 ? __shfl_sync(0xffffu, lane, 15) : __shfl_sync(0xffff0000u, lane, 16);
  mine[8] = __reduce_add_sync(kAll, lane);
  mine[9] = __reduce_min_sync(kAll, 40 - lane);
  mine[10] = __reduce_max_sync(kAll, 40 - lane);
  mine[11] = static_cast<int>(__reduce_or_sync(kAll, 1u << lane / 2));
  const bool elected = elect_one();
  mine[12] = __reduce_add_sync(kAll, static_cast<int>(elected));
  mine[13] = elect_one() == elected;
}

void test_lanes() {
  Buffer<int> result(16 * 64);
  launch(lanes_kernel, {1, 64}, result.data());
  finish();
  const std::vector<int> out = result.values();
  for (int t = 0; t < 64; ++t) {
    const int lane = t % 32;
    const int* mine = out.data() + 16 * t;
    KX_EXPECT(mine[0] == 5);
    KX_EXPECT(mine[1] == lane / 8 * 8 + 3);
    KX_EXPECT(mine[2] == (lane < 2 ? lane : lane - 2));
    KX_EXPECT(mine[3] == (lane % 8 < 6 ? lane + 2 : lane));
    KX_EXPECT(mine[4] == (lane ^ 7));
    KX_EXPECT(mine[5] == 0x55555555);
    KX_EXPECT(mine[6] == 1);
    KX_EXPECT(mine[7] == (lane < 16 ? 15 : 16));
    KX_EXPECT(mine[8] == 31 * 16);
    KX_EXPECT(mine[9] == 9);
    KX_EXPECT(mine[10] == 40);
    KX_EXPECT(mine[11] == 0xffff);
    KX_EXPECT(mine[12] == 1);
    KX_EXPECT(mine[13] == 1);
  }
}

__global__ void indices_kernel(unsigned* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] += block + 1;
}

void test_every_index_once() {
  Buffer<unsigned> result(2 * 3 * 4 * 5 * 6 * 7);
  launch(indices_kernel, {dim3(2, 3, 4), dim3(5, 6, 7)}, result.data());
  finish();
  const std::vector<unsigned> out = result.values();
  for (size_t i = 0; i < out.size(); ++i) {
    KX_EXPECT(out[i] == i / 210 + 1);
  }
}

__global__ void atomics_kernel(int* out) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(out, i);
  atomicMax(out + 1, i);
  atomicMin(out + 2, -i);
  atomicOr(out + 3, 1 << i % 31);
  atomicCAS(out + 4, 0, i + 1);
  atomicExch(out + 5, 7);
}

void test_atomics() {
  Buffer<int> result(6);
  launch(atomics_kernel, {4, 64}, result.data());
  finish();
  const std::vector<int> out = result.values();
  KX_EXPECT(out[0] == 255 * 128);
  KX_EXPECT(out[1] == 255 && out[2] == -255);
  KX_EXPECT(out[3] == 0x7fffffff);
  KX_EXPECT(out[4] >= 1 && out[4] <= 256 && out[5] == 7);
}

__global__ void named_barrier_kernel(int* out) {
  int& box = shared_memory<int>();
  if (threadIdx.x < 32) {  // a producer of one warp and a consumer of two
    for (int i = 0; i < 4; ++i) {
      if (i > 0) {
        sync_at_barrier(2, 96);  // the box is empty
      }
      if (threadIdx.x == 0) {
        box = 10 * i;
      }
      arrive_at_barrier(1, 96);  // it is full
    }
  } else {
    for (int i = 0; i < 4; ++i) {
      sync_at_barrier(1, 96);
      out[64 * i + threadIdx.x - 32] = box + static_cast<int>(threadIdx.x);
      if (i < 3) {
        arrive_at_barrier(2, 96);
      }
    }
  }
}

void test_named_barriers() {
  Buffer<int> result(4 * 64);
  launch(named_barrier_kernel, {1, 96, sizeof(int)}, result.data());
  finish();
  const std::vector<int> out = result.values();
  for (int i = 0; i < 4 * 64; ++i) {
    KX_EXPECT(out[i] == 10 * (i / 64) + i % 64 + 32);
  }
}

// Conversions.

template <class T>
__global__ void widen_kernel(float* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = widen(T{static_cast<uint16_t>(i)});
}

template <class T>
__global__ void narrow_kernel(const float* in, uint16_t* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = narrow<T>(in[i]).bits;
}

__global__ void pack_kernel(unsigned* out) {
  out[0] = pack<bfloat16>(1.0f, -2.0f);
  out[1] = pack<float16>(1.0f, -2.0f);
  out[2] = to_tf32(1.0f + 0x1p-11f);
  out[3] = to_tf32(-1.0f - 0x1p-11f);
  out[4] = to_tf32(1.0f + 0x1p-12f);
}

__global__ void approximation_kernel(const float* x, float* power, float* reciprocal) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  power[i] = exp2_approx(x[i]);
  reciprocal[i] = reciprocal_approx(x[i]);
}

void test_approximations() {
  std::vector<float> x(512);
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = (static_cast<float>(i) - 255.5f) * 0.6180339f;  // past all that a float holds the power of
  }
  Buffer<float> from(x), power(x.size()), reciprocal(x.size());
  launch(approximation_kernel, {2, 256}, from.data(), power.data(), reciprocal.data());
  finish();
  const std::vector<float> powers = power.values(), reciprocals = reciprocal.values();
  for (size_t i = 0; i < x.size(); ++i) {
    const double exact = std::exp2(static_cast<double>(x[i])), inverse = 1 / static_cast<double>(x[i]);
    const bool fits = x[i] >= -126 && x[i] < 128;
    KX_EXPECT(fits ? std::abs(powers[i] - exact) <= 0x1p-21 * exact : powers[i] == (x[i] < 0 ? 0 : INFINITY));
    KX_EXPECT(std::abs(reciprocals[i] - inverse) <= 0x1p-22 * std::abs(inverse));
  }
}

// What a 16-bit pattern is worth, by the definition of the formats.
double worth(unsigned pattern, int exponent_bits) {
  const int fraction_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>(pattern >> fraction_bits) & ((1 << exponent_bits) - 1);
  const double fraction = (pattern & ((1u << fraction_bits) - 1)) / std::ldexp(1.0, fraction_bits);
  const double sign = (pattern & 0x8000u) != 0 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) {
    return fraction == 0 ? sign * INFINITY : NAN;
  }
  return sign * (exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1 + fraction, exponent - bias));
}

template <class T>
void test_conversion(int exponent_bits) {
  Buffer<float> wide(65536);
  launch(widen_kernel<T>, {256, 256}, wide.data());
  finish();
  const std::vector<float> values = wide.values();
  for (unsigned u = 0; u < 65536; ++u) {
    const double expected = worth(u, exponent_bits);
    KX_EXPECT(std::isnan(expected) ? std::isnan(values[u]) : values[u] == static_cast<float>(expected));
  }
  // Every pattern comes back, and between two neighbours the nearer is taken, or the even one.
  const unsigned finite = ((1u << exponent_bits) - 1) << (15 - exponent_bits);
  std::vector<float> in;
  std::vector<uint16_t> expected;
  for (unsigned u = 0; u + 1 < finite; ++u) {
    const float low = values[u], high = values[u + 1], middle = low + (high - low) / 2;
    for (const float x : {low, std::nextafter(middle, low), middle, std::nextafter(middle, high)}) {
      in.push_back(x);
      expected.push_back(static_cast<uint16_t>(x < middle || (x == middle && u % 2 == 0) ? u : u + 1));
    }
  }
  for (size_t i = 0; i < 4; ++i) {  // past the largest
    in.push_back(i % 2 == 0 ? INFINITY
                            : std::ldexp(values[finite - 1], 0) * (1 + std::ldexp(1.0f, exponent_bits - 15)));
    expected.push_back(static_cast<uint16_t>(finite));
  }
  in.resize((in.size() + 255) / 256 * 256);
  expected.resize(in.size());
  Buffer<float> from(in);
  Buffer<uint16_t> to(in.size());
  launch(narrow_kernel<T>, {static_cast<unsigned>(in.size() / 256), 256}, from.data(), to.data());
  finish();
  KX_EXPECT(to.values() == expected);
}

void test_packing() {
  Buffer<unsigned> result(5);
  launch(pack_kernel, {1, 1}, result.data());
  finish();
  const std::vector<unsigned> out = result.values();
  KX_EXPECT(out[0] == 0xc0003f80u);
  KX_EXPECT(out[1] == 0xc0003c00u);
  KX_EXPECT(out[2] == 0x3f802000u);  // half way: away from zero
  KX_EXPECT(out[3] == 0xbf802000u);
  KX_EXPECT(out[4] == 0x3f800000u);
}

// mma.sync. Fragments by the PTX ISA's formulas for groupID = lane >> 2 and threadID_in_group = lane & 3.

struct Place {
  int row, column;
};

__host__ __device__ inline Place place_in_a16(int lane, int i) {
  const int group = lane >> 2, thread = lane & 3;
  return {i < 2 || (i >= 4 && i < 6) ? group : group + 8, i < 4 ? thread * 2 + (i & 1) : thread * 2 + (i & 1) + 8};
}
__host__ __device__ inline Place place_in_b16(int lane, int i) {
  const int group = lane >> 2, thread = lane & 3;
  return {i < 2 ? thread * 2 + (i & 1) : thread * 2 + (i & 1) + 8, group};
}
__host__ __device__ inline Place place_in_a_tf32(int lane, int i) {
  const int group = lane >> 2, thread = lane & 3;
  return {i == 0 || i == 2 ? group : group + 8, i < 2 ? thread : thread + 4};
}
__host__ __device__ inline Place place_in_d(int lane, int i) {
  const int group = lane >> 2, thread = lane & 3;
  return {i < 2 ? group : group + 8, thread * 2 + (i & 1)};
}

// d = a [16, k] · bᵀ [8, k] + c, by one warp.
template <class T>
__global__ void mma_kernel(const T* a, const T* b, const float* c, float* out) {
  const int lane = static_cast<int>(threadIdx.x);
  float d[4];
  for (int i = 0; i < 4; ++i) {
    d[i] = c[place_in_d(lane, i).row * 8 + place_in_d(lane, i).column];
  }
  uint32_t x[4], y[2];
  if constexpr (sizeof(T) == 2) {
    for (int i = 0; i < 4; ++i) {
      const Place low = place_in_a16(lane, 2 * i), high = place_in_a16(lane, 2 * i + 1);
      x[i] = bits(a[low.row * 16 + low.column]) | bits(a[high.row * 16 + high.column]) << 16;
    }
    for (int i = 0; i < 2; ++i) {
      const Place low = place_in_b16(lane, 2 * i), high = place_in_b16(lane, 2 * i + 1);
      y[i] = bits(b[low.column * 16 + low.row]) | bits(b[high.column * 16 + high.row]) << 16;
    }
    mma_m16n8k16<T>(d, x, y);
  } else {
    for (int i = 0; i < 4; ++i) {
      x[i] = to_tf32(a[place_in_a_tf32(lane, i).row * 8 + place_in_a_tf32(lane, i).column]);
    }
    for (int i = 0; i < 2; ++i) {
      y[i] = to_tf32(b[(lane >> 2) * 8 + (lane & 3) + 4 * i]);
    }
    mma_m16n8k8_tf32(d, x, y);
  }
  for (int i = 0; i < 4; ++i) {
    out[place_in_d(lane, i).row * 8 + place_in_d(lane, i).column] = d[i];
  }
}

template <class T>
void test_mma() {
  const int k = 32 / sizeof(T);
  const auto run = [&](const std::vector<T>& a, const std::vector<T>& b, const std::vector<float>& c) {
    Buffer<T> x(a), y(b);
    Buffer<float> z(c), out(16 * 8);
    launch(mma_kernel<T>, {1, 32}, x.data(), y.data(), z.data(), out.data());
    finish();
    return out.values();
  };
  const std::vector<T> a = small_integers<T>(16 * k, 1), b = small_integers<T>(8 * k, 2);
  const std::vector<float> c = small_integers<float>(16 * 8, 3);
  const std::vector<double> exact = product(a, b, c, 16, 8, k);
  const std::vector<float> got = run(a, b, c);
  for (size_t i = 0; i < got.size(); ++i) {
    KX_EXPECT(got[i] == exact[i]);
  }
  // Any numbers: sums are cut at 24 bits below the largest term, or later, in groups of 8, or larger ones.
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  for (int round = 0; round < 20; ++round) {
    std::vector<T> x(16 * k), y(8 * k);
    for (std::vector<T>* v : {&x, &y}) {
      for (T& each : *v) {
        each = from_float<T>(normal(random) * std::ldexp(1.0f, static_cast<int>(random() % 9) - 4));
        if constexpr (sizeof(T) == 4) {
          each = float_of(bits_of(each) & 0xffffe000u);  // exact in tf32
        }
      }
    }
    std::vector<float> z(16 * 8);
    for (float& each : z) {
      each = normal(random);
    }
    const std::vector<double> sums = product(x, y, z, 16, 8, k);
    const std::vector<float> out = run(x, y, z);
    for (int i = 0; i < 16 * 8; ++i) {
      double largest = std::abs(z[i]);
      for (int l = 0; l < k; ++l) {
        largest = std::max(largest, std::abs(static_cast<double>(value(x[i / 8 * k + l])) * value(y[i % 8 * k + l])));
      }
      KX_EXPECT(std::abs(out[i] - sums[i]) <= (k + 4) * largest * 0x1p-23 + std::abs(sums[i]) * 0x1p-22);
    }
  }
}

// ldmatrix and stmatrix.

struct Matrices {
  alignas(16) uint16_t rows[32][8 + 8];  // a row of 16 bytes, then as many of padding
};

template <int N, bool kTransposed>
__global__ void load_matrices_kernel(uint32_t* out) {
  Matrices& shared = shared_memory<Matrices>();
  for (int i = 0; i < 8; ++i) {
    shared.rows[threadIdx.x][i] = static_cast<uint16_t>(100 * threadIdx.x + i);
  }
  __syncthreads();
  uint32_t r[N];
  load_matrices<kTransposed>(r, shared.rows[threadIdx.x]);
  for (int m = 0; m < N; ++m) {
    out[threadIdx.x * N + m] = r[m];
  }
}

template <int N, bool kTransposed>
__global__ void store_matrices_kernel(uint16_t* out) {
  Matrices& shared = shared_memory<Matrices>();
  for (int i = 0; i < 8; ++i) {
    shared.rows[threadIdx.x][i] = 0;
  }
  __syncthreads();
  uint32_t r[N];
  for (int m = 0; m < N; ++m) {
    r[m] = (1000 * m + 2 * threadIdx.x) | (1000 * m + 2 * threadIdx.x + 1) << 16;
  }
  store_matrices<kTransposed>(shared.rows[threadIdx.x], r);
  __syncthreads();
  for (int i = 0; i < 8; ++i) {
    out[threadIdx.x * 8 + i] = shared.rows[threadIdx.x][i];
  }
}

template <int N, bool kTransposed>
void test_load_matrices() {
  Buffer<uint32_t> result(32 * N);
  launch(load_matrices_kernel<N, kTransposed>, {1, 32, sizeof(Matrices)}, result.data());
  finish();
  const std::vector<uint32_t> out = result.values();
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < N; ++m) {
      for (int half = 0; half < 2; ++half) {
        const int row = lane / 4, column = 2 * (lane % 4) + half;
        const int expected = kTransposed ? 100 * (8 * m + column) + row : 100 * (8 * m + row) + column;
        KX_EXPECT((out[lane * N + m] >> (16 * half) & 0xffffu) == static_cast<unsigned>(expected));
      }
    }
  }
}

template <int N, bool kTransposed>
void test_store_matrices() {
  Buffer<uint16_t> result(32 * 8);
  launch(store_matrices_kernel<N, kTransposed>, {1, 32, sizeof(Matrices)}, result.data());
  finish();
  const std::vector<uint16_t> out = result.values();
  for (int m = 0; m < 4; ++m) {
    for (int row = 0; row < 8; ++row) {
      for (int column = 0; column < 8; ++column) {
        const int r = kTransposed ? column : row, c = kTransposed ? row : column;
        const int expected = m < N ? 1000 * m + 2 * (4 * r + c / 2) + c % 2 : 0;
        KX_EXPECT(out[(8 * m + row) * 8 + column] == expected);
      }
    }
  }
}

// cp.async.

struct Tiles {
  alignas(16) float x[3][128 * 4];
};

// out = 2·in, tile by tile, three tiles on their way.
__global__ void pipeline_kernel(const float* in, float* out, int tiles) {
  Tiles& shared = shared_memory<Tiles>();
  const unsigned t = threadIdx.x;
  const auto load = [&](int tile) {
    if (tile < tiles) {
      copy_async<16>(&shared.x[tile % 3][4 * t], in + (tile * 128 + t) * 4);
    }
    commit_copies();
  };
  load(0);
  load(1);
  for (int tile = 0; tile < tiles; ++tile) {
    wait_copies<1>();
    __syncthreads();  // all have copied tile `tile`, and none reads the tile before it any more
    load(tile + 2);
    const unsigned other = 127 - t;
    for (int i = 0; i < 4; ++i) {
      out[(tile * 128 + other) * 4 + i] = 2 * shared.x[tile % 3][4 * other + i];
    }
  }
  wait_all_copies();
}

void test_pipeline() {
  const int tiles = 7;
  std::vector<float> in(tiles * 512);
  std::iota(in.begin(), in.end(), 1.0f);
  Buffer<float> x(in), out(in.size());
  launch(pipeline_kernel, {1, 128, sizeof(Tiles)}, x.data(), out.data(), tiles);
  finish();
  const std::vector<float> got = out.values();
  for (size_t i = 0; i < in.size(); ++i) {
    KX_EXPECT(got[i] == 2 * in[i]);
  }
}

template <int kBytes>
__global__ void partial_copy_kernel(const uint8_t* in, uint8_t* out) {
  Tiles& shared = shared_memory<Tiles>();
  auto* const mine = reinterpret_cast<uint8_t*>(shared.x) + kBytes * threadIdx.x;
  copy_async<kBytes>(mine, in + kBytes * threadIdx.x, static_cast<int>(threadIdx.x % (kBytes + 1)));
  wait_all_copies();
  for (int i = 0; i < kBytes; ++i) {
    out[kBytes * threadIdx.x + i] = mine[i];
  }
}

template <int kBytes>
void test_partial_copies() {
  std::vector<uint8_t> in(64 * kBytes);
  std::iota(in.begin(), in.end(), uint8_t{1});
  Buffer<uint8_t> x(in), out(in.size());
  launch(partial_copy_kernel<kBytes>, {1, 64, sizeof(Tiles)}, x.data(), out.data());
  finish();
  const std::vector<uint8_t> got = out.values();
  for (int i = 0; i < 64 * kBytes; ++i) {
    KX_EXPECT(got[i] == (i % kBytes < i / kBytes % (kBytes + 1) ? in[i] : 0));
  }
}

// All of it together: a product of 64×64 and 64×64 by four warps, as kernels of sm_80 make it.

struct Gemm {
  alignas(128) uint16_t a[64][64], b[64][64];  // rows of k, whose 16-byte chunks are swizzled by row
};

__global__ void gemm_kernel(const bfloat16* a, const bfloat16* b, float* out) {
  Gemm& shared = shared_memory<Gemm>();
  const int t = static_cast<int>(threadIdx.x), warp = t / 32, lane = t % 32;
  for (int i = t; i < 64 * 8; i += 128) {
    const int row = i / 8, chunk = i % 8, moved = 8 * (chunk ^ (row & 7));
    copy_async<16>(&shared.a[row][moved], a + 8 * i);
    copy_async<16>(&shared.b[row][moved], b + 8 * i);
  }
  wait_all_copies();
  __syncthreads();
  float d[8][4] = {};
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    uint32_t x[4];
    const int row = 16 * warp + lane % 16, chunk = 2 * step + lane / 16;
    load_matrices<false>(x, &shared.a[row][8 * (chunk ^ (row & 7))]);
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {  // of column tiles
      uint32_t y[4];
      const int column = 16 * pair + lane % 8 + lane / 16 * 8, part = 2 * step + lane / 8 % 2;
      load_matrices<false>(y, &shared.b[column][8 * (part ^ (column & 7))]);
      mma_m16n8k16<bfloat16>(d[2 * pair], x, {y[0], y[1]});
      mma_m16n8k16<bfloat16>(d[2 * pair + 1], x, {y[2], y[3]});
    }
  }
#pragma unroll
  for (int tile = 0; tile < 8; ++tile) {
    for (int i = 0; i < 4; ++i) {
      out[(16 * warp + place_in_d(lane, i).row) * 64 + 8 * tile + place_in_d(lane, i).column] = d[tile][i];
    }
  }
}

void test_gemm() {
  const std::vector<bfloat16> a = small_integers<bfloat16>(64 * 64, 7), b = small_integers<bfloat16>(64 * 64, 8);
  const std::vector<double> expected = product(a, b, {}, 64, 64, 64);
  Buffer<bfloat16> x(a), y(b);
  Buffer<float> out(64 * 64);
  launch(gemm_kernel, {1, 128, sizeof(Gemm)}, x.data(), y.data(), out.data());
  finish();
  const std::vector<float> got = out.values();
  for (size_t i = 0; i < got.size(); ++i) {
    KX_EXPECT(got[i] == expected[i]);
  }
}

// Milliseconds that this block takes: the median of 21.
double time_of_gemm() {
  const std::vector<bfloat16> a = small_integers<bfloat16>(64 * 64, 7);
  Buffer<bfloat16> x(a);
  Buffer<float> out(64 * 64);
  std::vector<double> times(21);
  for (double& each : times) {
    const auto begin = std::chrono::steady_clock::now();
    launch(gemm_kernel, {1, 128, sizeof(Gemm)}, x.data(), x.data(), out.data());
    finish();
    each = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
  }
  std::nth_element(times.begin(), times.begin() + 10, times.end());
  return times[10];
}

// mbarriers.

struct Ring {
  Mbarrier full[2], empty[2];
  alignas(128) float x[2][256];
};

__device__ inline void init_ring(Ring& ring, unsigned producers, unsigned consumers) {
  if (threadIdx.x == 0) {
    for (int s = 0; s < 2; ++s) {
      ring.full[s].init(producers);
      ring.empty[s].init(consumers);
    }
    fence_mbarriers();
  }
  __syncthreads();
}

enum class By { kThreads, kCopies, kBulk };

// One warp fills a ring of two slots, by its own stores, by cp.async or by bulk copies; two warps empty it.
template <By by>
__global__ void ring_kernel(const float* in, float* out, int tiles) {
  Ring& ring = shared_memory<Ring>();
  init_ring(ring, by == By::kBulk ? 1 : 32, 64);
  if (threadIdx.x < 32) {
    // Who does not arrive at `full` must not wait at `empty` either: it could be two phases late.
    for (int tile = 0; tile < tiles && (by != By::kBulk || threadIdx.x == 0); ++tile) {
      const int slot = tile % 2;
      ring.empty[slot].wait((tile / 2 + 1) % 2);
      const float* const from = in + tile * 256;
      if constexpr (by == By::kThreads) {
        for (unsigned i = threadIdx.x; i < 256; i += 32) {
          ring.x[slot][i] = from[i];
        }
        ring.full[slot].arrive();
      } else if constexpr (by == By::kCopies) {
        for (unsigned i = 4 * threadIdx.x; i < 256; i += 128) {
          copy_async<16>(&ring.x[slot][i], from + i);
        }
        ring.full[slot].arrive_after_copies();
      } else {
        ring.full[slot].arrive_and_expect(1024);
        load_bytes(ring.x[slot], from, 512, ring.full[slot]);
        load_bytes(ring.x[slot] + 128, from + 128, 512, ring.full[slot]);
      }
    }
  } else {
    const unsigned t = threadIdx.x - 32;
    for (int tile = 0; tile < tiles; ++tile) {
      const int slot = tile % 2;
      while (!ring.full[slot].test(tile / 2 % 2)) {
      }
      for (unsigned i = t; i < 256; i += 64) {
        out[tile * 256 + i] = 3 * ring.x[slot][i];
      }
      ring.empty[slot].arrive();
    }
  }
}

template <By by>
void test_ring() {
  const int tiles = 9;
  std::vector<float> in(tiles * 256);
  std::iota(in.begin(), in.end(), 1.0f);
  Buffer<float> x(in), out(in.size());
  launch(ring_kernel<by>, {1, 96, sizeof(Ring)}, x.data(), out.data(), tiles);
  finish();
  const std::vector<float> got = out.values();
  for (size_t i = 0; i < in.size(); ++i) {
    KX_EXPECT(got[i] == 3 * in[i]);
  }
}

__global__ void bulk_store_kernel(float* out) {
  Ring& ring = shared_memory<Ring>();
  for (int round = 0; round < 3; ++round) {
    ring.x[0][threadIdx.x] = static_cast<float>(256 * round + threadIdx.x);
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
      store_bytes(out + 256 * round, ring.x[0], 1024);
      commit_stores();
      wait_stores_read<0>();
    }
    __syncthreads();
  }
}

void test_bulk_store() {
  Buffer<float> out(3 * 256);
  launch(bulk_store_kernel, {1, 256, sizeof(Ring)}, out.data());
  finish();
  const std::vector<float> got = out.values();
  for (size_t i = 0; i < got.size(); ++i) {
    KX_EXPECT(got[i] == static_cast<float>(i));
  }
}

// An mbarrier's memory serves for something else, and for an mbarrier again; bytes that are expected apart from
// arrivals.
__global__ void reused_mbarrier_kernel(const float* in, float* out) {
  Ring& ring = shared_memory<Ring>();
  for (int round = 0; round < 2; ++round) {
    init_ring(ring, 64, 1);
    if (threadIdx.x == 0) {
      ring.full[0].expect(1024);
      load_bytes(ring.x[0], in, 1024, ring.full[0]);
    }
    ring.full[0].arrive();
    ring.full[0].wait(0);
    out[64 * round + threadIdx.x] = ring.x[0][4 * threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int s = 0; s < 2; ++s) {
        ring.full[s].invalidate();
        ring.empty[s].invalidate();
      }
      *reinterpret_cast<uint64_t*>(&ring.full[0]) = 12345;
    }
    __syncthreads();
  }
}

void test_reused_mbarriers() {
  std::vector<float> in(256);
  std::iota(in.begin(), in.end(), 1.0f);
  Buffer<float> x(in), out(128);
  launch(reused_mbarrier_kernel, {1, 64, sizeof(Ring)}, x.data(), out.data());
  finish();
  const std::vector<float> got = out.values();
  for (int i = 0; i < 128; ++i) {
    KX_EXPECT(got[i] == in[4 * (i % 64)]);
  }
}

// One warpgroup gives registers to two others.
__global__ void __launch_bounds__(384, 1) registers_kernel(float* out) {
  float x = static_cast<float>(threadIdx.x);
  if (threadIdx.x < 128) {
    release_registers<40>();
    x += 1;
  } else {
    claim_registers<232>();
    x += 2;
  }
  out[threadIdx.x] = x;
}

void test_registers() {
  Buffer<float> out(384);
  launch(registers_kernel, {1, 384}, out.data());
  finish();
  const std::vector<float> got = out.values();
  for (int i = 0; i < 384; ++i) {
    KX_EXPECT(got[i] == static_cast<float>(i + (i < 128 ? 1 : 2)));
  }
}

// TMA tiles.

constexpr int kTileBytes = 16 << 10;

struct Tile {
  alignas(1024) unsigned char bytes[kTileBytes];
  Mbarrier ready;
};

template <int kRank>
struct Corner {
  int at[kRank];
};

// The tile at `corner`, byte for byte as it lies in shared memory; and stored again to `copy`.
template <int kRank>
__global__ void tile_kernel(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to,
                            Corner<kRank> corner, unsigned bytes, bool store, unsigned char* out) {
  Tile& tile = shared_memory<Tile>();
  if (threadIdx.x == 0) {
    tile.ready.init(1);
    fence_mbarriers();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    tile.ready.arrive_and_expect(bytes);
    load_tile(tile.bytes, from, corner.at, tile.ready);
  }
  tile.ready.wait(0);
  for (unsigned i = threadIdx.x; i < bytes; i += blockDim.x) {
    out[i] = tile.bytes[i];
  }
  if (store && threadIdx.x == 0) {
    store_tile(to, corner.at, tile.bytes);
    commit_stores();
    wait_stores<0>();
  }
}

// Chunk c of 16 bytes of row r, as the published patterns say for tiles as wide as their swizzle.
int swizzled_chunk(int c, int r, Swizzle swizzle) {
  switch (swizzle) {
    case Swizzle::k128:
      return c ^ (r & 7);
    case Swizzle::k64:
      return c ^ (r >> 1 & 3);
    case Swizzle::k32:
      return c ^ (r >> 2 & 1);
    default:
      return c;
  }
}

template <int kRank>
void test_tiles(Swizzle swizzle, const std::vector<int>& sizes, const std::vector<int>& boxes,
                const std::vector<int>& corner) {
  uint64_t size[kRank], stride[kRank];
  uint32_t box[kRank];
  size_t pitch = 2, elements = 1, bytes = 2;
  for (int d = 0; d < kRank; ++d) {
    size[d] = static_cast<uint64_t>(sizes[d]);
    box[d] = static_cast<uint32_t>(boxes[d]);
    bytes *= box[d];
    pitch = d == 0 ? (2 * size[0] + 15) / 16 * 16 + 16 : pitch * size[d];
    stride[d] = pitch;
  }
  elements = pitch / 2;
  const int row_bytes = 2 * boxes[0];
  std::vector<uint16_t> in(elements);
  std::iota(in.begin(), in.end(), uint16_t{1});
  Buffer<uint16_t> x(in), y(elements);
  Buffer<unsigned char> out(bytes);
  Corner<kRank> at{};
  bool inside = true;
  for (int d = 0; d < kRank; ++d) {
    at.at[d] = corner[d];
    inside = inside && corner[d] >= 0;
  }
  const TensorMap from = make_tensor_map(x.data(), 2, kRank, size, stride, box, swizzle);
  const TensorMap to = make_tensor_map(y.data(), 2, kRank, size, stride, box, swizzle);
  launch(tile_kernel<kRank>, {1, 64, sizeof(Tile)}, from, to, at, static_cast<unsigned>(bytes), inside, out.data());
  finish();
  const std::vector<unsigned char> tile = out.values();
  const std::vector<uint16_t> stored = y.values();
  std::vector<uint16_t> expected_stored(elements);
  for (size_t i = 0; i < bytes / 2; ++i) {
    size_t rest = i, element = 0;
    bool valid = true;
    for (int d = 0; d < kRank; ++d) {
      const int64_t c = corner[d] + static_cast<int64_t>(rest % box[d]);
      rest /= box[d];
      valid = valid && c >= 0 && c < sizes[d];
      element += valid ? static_cast<size_t>(c) * (d == 0 ? 1 : stride[d - 1] / 2) : 0;
    }
    const int row = static_cast<int>(2 * i) / row_bytes, byte = static_cast<int>(2 * i) % row_bytes;
    const int place = row * row_bytes + 16 * swizzled_chunk(byte / 16, row, swizzle) + byte % 16;
    const unsigned got = tile[place] | tile[place + 1] << 8;
    KX_EXPECT(got == (valid ? in[element] : 0));
    if (valid) {
      expected_stored[element] = in[element];
    }
  }
  if (inside) {
    KX_EXPECT(stored == expected_stored);
  }
}

void test_all_tiles() {
  for (const auto& [swizzle, width] : {std::pair{Swizzle::k128, 64}, {Swizzle::k64, 32}, {Swizzle::k32, 16}}) {
    test_tiles<2>(swizzle, {200, 90}, {width, 64}, {0, 0});
    test_tiles<2>(swizzle, {200, 90}, {width, 64}, {200 - width / 2, 50});  // past both ends
    test_tiles<2>(swizzle, {200, 90}, {width, 40}, {-8, -3});
    test_tiles<3>(swizzle, {width, 20, 7}, {width, 8, 3}, {0, 16, 5});
    test_tiles<4>(swizzle, {width, 5, 4, 3}, {width, 3, 2, 2}, {8, 3, 1, 2});
  }
  test_tiles<1>(Swizzle::kNone, {300}, {64}, {40});
  test_tiles<1>(Swizzle::kNone, {300}, {256}, {100});
  test_tiles<2>(Swizzle::kNone, {100, 30}, {24, 20}, {90, 20});
  test_tiles<3>(Swizzle::kNone, {16, 9, 5}, {8, 4, 2}, {8, 7, 4});
  test_tiles<4>(Swizzle::kNone, {16, 3, 4, 5}, {16, 2, 2, 2}, {0, 1, -1, 4});
}

// Clusters.

struct Shares {
  Mbarrier ready;
  float sum;
  alignas(128) unsigned char tile[4096];
};

// Every block's number, added up over the cluster through its blocks' shared memory.
__global__ void cluster_sum_kernel(float* out) {
  Shares& mine = shared_memory<Shares>();
  if (threadIdx.x == 0) {
    mine.sum = static_cast<float>(blockIdx.x);
  }
  sync_cluster();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (unsigned rank = 0; rank < cluster_size(); ++rank) {
      sum += *in_block(&mine.sum, rank);
    }
    out[blockIdx.x] = sum + 1000.0f * static_cast<float>(cluster_rank());
  }
  sync_cluster();  // nobody leaves while others read
}

void test_cluster_sum() {
  Buffer<float> out(8);
  launch(cluster_sum_kernel, {8, 64, sizeof(Shares), 0, 4}, out.data());
  finish();
  const std::vector<float> got = out.values();
  for (int b = 0; b < 8; ++b) {
    KX_EXPECT(got[b] == static_cast<float>(b < 4 ? 6 : 22) + 1000.0f * static_cast<float>(b % 4));
  }
}

// Block r of two loads half r of a tile for both; each says to the other when it has read it.
__global__ void multicast_kernel(const __grid_constant__ TensorMap map, unsigned char* out) {
  Shares& mine = shared_memory<Shares>();
  const unsigned rank = cluster_rank();
  if (threadIdx.x == 0) {
    mine.ready.init(1);
    fence_mbarriers();
    mine.ready.arrive_and_expect(4096);
  }
  sync_cluster();  // both expect before either loads
  if (threadIdx.x == 0) {
    const int at[2] = {0, static_cast<int>(16 * rank)};
    load_tile_to(3, mine.tile + 2048 * rank, map, at, mine.ready);
  }
  mine.ready.wait(0);
  for (unsigned i = threadIdx.x; i < 4096; i += blockDim.x) {
    out[4096 * blockIdx.x + i] = mine.tile[i];
  }
  sync_cluster();
}

void test_multicast() {
  std::vector<uint16_t> in(32 * 64);
  std::iota(in.begin(), in.end(), uint16_t{1});
  Buffer<uint16_t> x(in);
  Buffer<unsigned char> out(2 * 4096);
  const uint64_t size[2] = {64, 32}, stride[1] = {128};
  const uint32_t box[2] = {64, 16};
  const TensorMap map = make_tensor_map(x.data(), 2, 2, size, stride, box, Swizzle::kNone);
  launch(multicast_kernel, {2, 64, sizeof(Shares), 0, 2}, map, out.data());
  finish();
  const std::vector<unsigned char> got = out.values();
  for (size_t i = 0; i < in.size(); ++i) {
    for (size_t block = 0; block < 2; ++block) {
      KX_EXPECT((got[4096 * block + 2 * i] | got[4096 * block + 2 * i + 1] << 8) == in[i]);
    }
  }
}

// Block r of two makes half r of a tile, and copies it to the other.
__global__ void exchange_kernel(unsigned char* out) {
  Shares& mine = shared_memory<Shares>();
  const unsigned rank = cluster_rank();
  unsigned char* const half = mine.tile + 2048 * rank;
  for (unsigned i = threadIdx.x; i < 2048; i += blockDim.x) {
    half[i] = static_cast<unsigned char>(37 * i + 5 * blockIdx.x);
  }
  if (threadIdx.x == 0) {
    mine.ready.init(1);
    fence_mbarriers();
    mine.ready.arrive_and_expect(2048);
  }
  fence_proxy_async();
  sync_cluster();  // both expect before either copies
  if (threadIdx.x == 0) {
    copy_bytes_to(1 - rank, half, 2048, mine.ready);
  }
  mine.ready.wait(0);
  for (unsigned i = threadIdx.x; i < 4096; i += blockDim.x) {
    out[4096 * blockIdx.x + i] = mine.tile[i];
  }
  sync_cluster();  // nobody leaves while the other copies from there
}

void test_exchange() {
  Buffer<unsigned char> out(4 * 4096);
  launch(exchange_kernel, {4, 64, sizeof(Shares), 0, 2}, out.data());
  finish();
  const std::vector<unsigned char> got = out.values();
  for (size_t i = 0; i < got.size(); ++i) {
    const size_t block = i / 4096 / 2 * 2 + i % 4096 / 2048;
    KX_EXPECT(got[i] == static_cast<unsigned char>(37 * (i % 2048) + 5 * block));
  }
}

// Every block writes into its neighbour's shared memory, and arrives at its neighbour's mbarrier.
__global__ void neighbour_kernel(float* out) {
  Shares& mine = shared_memory<Shares>();
  const unsigned neighbour = (cluster_rank() + 1) % cluster_size();
  if (threadIdx.x == 0) {
    mine.ready.init(64);
    fence_mbarriers();
  }
  sync_cluster();
  if (threadIdx.x == 0) {
    *in_block(&mine.sum, neighbour) = static_cast<float>(10 * blockIdx.x);
  }
  mine.ready.arrive_at(neighbour);
  mine.ready.wait(0);
  const float sum = mine.sum;
  arrive_at_cluster();
  out[64 * blockIdx.x + threadIdx.x] = sum;
  wait_for_cluster();
}

void test_neighbours() {
  Buffer<float> out(6 * 64);
  launch(neighbour_kernel, {6, 64, sizeof(Shares), 0, 3}, out.data());
  finish();
  const std::vector<float> got = out.values();
  for (int i = 0; i < 6 * 64; ++i) {
    const int block = i / 64;
    KX_EXPECT(got[i] == 10.0f * static_cast<float>(block % 3 == 0 ? block + 2 : block - 1));
  }
}

// wgmma.

constexpr int kWgmmaK = 64;

struct Operands {
  alignas(1024) unsigned char a[64 * kWgmmaK * 4];
  alignas(1024) unsigned char b[256 * kWgmmaK * 4];
};

// Where element (row, k) of an operand with `rows` rows (or columns) and kWgmmaK elements of k is put: in rows W bytes
// wide, swizzled within groups of eight, or in 8×16-byte cores.
template <class T, Major kMajor>
__host__ __device__ inline int place(int row, int k, int rows, Swizzle swizzle) {
  const int size = sizeof(T), width = swizzle == Swizzle::kNone ? 16 : static_cast<int>(swizzle), e = width / size;
  const int line = kMajor == Major::kK ? row : k, along = kMajor == Major::kK ? k : row;
  const int lines = kMajor == Major::kK ? rows : kWgmmaK;
  const int chunk = along % e / (16 / size);
  int moved = chunk;
  if (swizzle == Swizzle::k128) {
    moved = chunk ^ (line & 7);
  } else if (swizzle == Swizzle::k64) {
    moved = chunk ^ (line >> 1 & 3);
  } else if (swizzle == Swizzle::k32) {
    moved = chunk ^ (line >> 2 & 1);
  }
  return along / e * lines * width + line * width + moved * 16 + along % (16 / size) * size;
}

// The descriptor of k-step `step` of that operand.
template <class T, Major kMajor>
__device__ inline MatrixDescriptor operand(const unsigned char* start, int rows, int step, Swizzle swizzle) {
  const unsigned width = swizzle == Swizzle::kNone ? 16 : static_cast<unsigned>(swizzle);
  if (kMajor == Major::kK) {
    const unsigned chunk = static_cast<unsigned>(rows) * width;  // what is W bytes of k wide
    if (swizzle == Swizzle::kNone) {
      return advance(describe_matrix(start, chunk, 128, swizzle), static_cast<unsigned>(step) * 2 * chunk);
    }
    const unsigned byte = static_cast<unsigned>(step) * 32;
    return advance(describe_matrix(start, 16, 8 * width, swizzle), byte / width * chunk + byte % width);
  }
  const unsigned chunk = kWgmmaK * width;  // W bytes of m or n wide
  const unsigned groups = 8 * width;       // of k
  const bool none = swizzle == Swizzle::kNone;
  return advance(describe_matrix(start, none ? groups : chunk, none ? chunk : groups, swizzle),
                 static_cast<unsigned>(step) * 16 * width);
}

// out [64, N] = a [64, K] · bᵀ [N, K], in two groups of k-steps.
template <class T, int N, Major kA, Major kB, bool kRegisters>
__global__ void wgmma_kernel(const T* a, const T* b, Swizzle swizzle, float* out) {
  Operands& shared = shared_memory<Operands>();
  const int t = static_cast<int>(threadIdx.x);
  for (int i = t; i < 64 * kWgmmaK; i += 128) {
    *reinterpret_cast<T*>(shared.a + place<T, kA>(i / kWgmmaK, i % kWgmmaK, 64, swizzle)) = a[i];
  }
  for (int i = t; i < N * kWgmmaK; i += 128) {
    *reinterpret_cast<T*>(shared.b + place<T, kB>(i / kWgmmaK, i % kWgmmaK, N, swizzle)) = b[i];
  }
  fence_proxy_async();
  __syncthreads();
  constexpr int kSlice = 32 / sizeof(T), kSteps = kWgmmaK / kSlice;
  float d[N / 2] = {};
  uint32_t fragments[kSteps][4];
  if constexpr (kRegisters) {
    const int warp = t / 32, lane = t % 32;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 2) {
          const Place low = place_in_a16(lane, 2 * i), high = place_in_a16(lane, 2 * i + 1);
          fragments[step][i] = bits(a[(16 * warp + low.row) * kWgmmaK + step * kSlice + low.column]) |
                               bits(a[(16 * warp + high.row) * kWgmmaK + step * kSlice + high.column]) << 16;
        } else {
          const Place at = place_in_a_tf32(lane, i);
          fragments[step][i] = to_tf32(a[(16 * warp + at.row) * kWgmmaK + step * kSlice + at.column]);
        }
      }
    }
  }
  MatrixDescriptor x[kSteps], y[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    x[step] = operand<T, kA>(shared.a, 64, step, swizzle);
    y[step] = operand<T, kB>(shared.b, N, step, swizzle);
  }
  fence_products(d);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if constexpr (kRegisters) {
      wgmma<T, N, kB>(d, fragments[step], y[step], step > 0);
    } else {
      wgmma<T, N, kA, kB>(d, x[step], y[step], step > 0);
    }
    if (step == kSteps / 2) {
      commit_products();
    }
  }
  commit_products();
  wait_products<0>(d);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {  // "Register Fragments" of wgmma: D
    const int row = 16 * (t / 32) + (t % 32) / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (t % 4) + i % 2;
    out[row * N + column] = d[i];
  }
}

template <class T, int N, Major kA, Major kB, bool kRegisters>
void test_wgmma(Swizzle swizzle) {
  const std::vector<T> a = small_integers<T>(64 * kWgmmaK, 5), b = small_integers<T>(N * kWgmmaK, 6);
  const std::vector<double> expected = product(a, b, {}, 64, N, kWgmmaK);
  Buffer<T> x(a), y(b);
  Buffer<float> out(64 * N);
  launch(wgmma_kernel<T, N, kA, kB, kRegisters>, {1, 128, sizeof(Operands)}, x.data(), y.data(), swizzle, out.data());
  finish();
  const std::vector<float> got = out.values();
  for (size_t i = 0; i < got.size(); ++i) {
    KX_EXPECT(got[i] == expected[i]);
  }
}

template <int... kWidths>
void test_every_width(std::integer_sequence<int, kWidths...>) {
  (test_wgmma<bfloat16, 8 * (kWidths + 1), Major::kK, Major::kK, false>(Swizzle::k128), ...);
}

void test_all_wgmma() {
  for (const Swizzle swizzle : {Swizzle::k128, Swizzle::k64, Swizzle::k32, Swizzle::kNone}) {
    test_wgmma<bfloat16, 64, Major::kK, Major::kK, false>(swizzle);
    test_wgmma<bfloat16, 128, Major::kK, Major::kMN, false>(swizzle);
    test_wgmma<float16, 64, Major::kMN, Major::kK, false>(swizzle);
    test_wgmma<float16, 192, Major::kMN, Major::kMN, false>(swizzle);
    test_wgmma<bfloat16, 64, Major::kK, Major::kMN, true>(swizzle);
    test_wgmma<float16, 96, Major::kK, Major::kK, true>(swizzle);
    test_wgmma<float, 64, Major::kK, Major::kK, false>(swizzle);
    test_wgmma<float, 32, Major::kK, Major::kK, true>(swizzle);
  }
}

// One operand is all ones; the other, zero but for a two at byte `at`.
__global__ void worked_example_kernel(bool in_a, int at, int step, float* out) {
  Operands& shared = shared_memory<Operands>();
  const int t = static_cast<int>(threadIdx.x);
  const uint16_t one = 0x3f80, two = 0x4000;
  for (int i = 2 * t; i < 64 * 64 * 2; i += 256) {
    *reinterpret_cast<uint16_t*>(shared.a + i) = !in_a ? one : i == at ? two : uint16_t{0};
  }
  for (int i = 2 * t; i < 128 * 64 * 2; i += 256) {
    *reinterpret_cast<uint16_t*>(shared.b + i) = in_a ? one : i == at ? two : uint16_t{0};
  }
  fence_proxy_async();
  __syncthreads();
  float d[64] = {};
  fence_products(d);
  wgmma<bfloat16, 128, Major::kK, Major::kMN>(
      d, advance(describe_matrix(shared.a, 16, 1024, Swizzle::k128), 32 * step),
      advance(describe_matrix(shared.b, 8192, 1024, Swizzle::k128), 2048 * step), false);
  commit_products();
  wait_products<0>(d);
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const int row = 16 * (t / 32) + (t % 32) / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (t % 4) + i % 2;
    out[row * 128 + column] = d[i];
  }
}

// Addresses that CUTLASS's layouts give to elements of tiles with a swizzle of 128 bytes: of a, 64×64 and contiguous
// along k; of b, 64×128 and contiguous along n, in two tiles of 64.
void test_worked_examples() {
  struct Example {
    bool in_a;
    int at, index, k;  // row or column
  };
  for (const Example e :
       {Example{true, 0x69a, 13, 37}, Example{true, 0x90, 1, 0}, Example{true, 0x1f8e, 63, 63},
        Example{false, 0x29bc, 70, 19}, Example{false, 0x1ba, 5, 3}, Example{false, 0x3f8e, 127, 63}}) {
    for (int step = 0; step < 4; ++step) {
      Buffer<float> out(64 * 128);
      launch(worked_example_kernel, {1, 128, sizeof(Operands)}, e.in_a, e.at, step, out.data());
      finish();
      const std::vector<float> got = out.values();
      for (int i = 0; i < 64 * 128; ++i) {
        const bool hit = step == e.k / 16 && (e.in_a ? i / 128 : i % 128) == e.index;
        KX_EXPECT(got[i] == (hit ? 2.0f : 0.0f));
      }
    }
  }
}

void test_everything(int capability) {
  repeat(test_sum);
  repeat(test_lanes);
  test_every_index_once();
  repeat(test_atomics);
  repeat(test_named_barriers);
  test_conversion<bfloat16>(8);
  test_conversion<float16>(5);
  test_packing();
  test_approximations();
  test_mma<bfloat16>();
  test_mma<float16>();
  test_mma<float>();
  test_load_matrices<1, false>();
  test_load_matrices<2, false>();
  test_load_matrices<4, false>();
  test_load_matrices<1, true>();
  test_load_matrices<2, true>();
  test_load_matrices<4, true>();
  repeat(test_gemm);
  repeat(test_pipeline);
  repeat(test_partial_copies<4>);
  repeat(test_partial_copies<8>);
  repeat(test_partial_copies<16>);
  repeat(test_ring<By::kThreads>);
  repeat(test_ring<By::kCopies>);
  if (capability < 90) {
    return;
  }
  test_store_matrices<1, false>();
  test_store_matrices<2, false>();
  test_store_matrices<4, false>();
  test_store_matrices<1, true>();
  test_store_matrices<2, true>();
  test_store_matrices<4, true>();
  repeat(test_ring<By::kBulk>);
  repeat(test_bulk_store);
  repeat(test_reused_mbarriers);
  test_registers();
  repeat(test_all_tiles);
  repeat(test_cluster_sum);
  repeat(test_exchange);
  repeat(test_multicast);
  repeat(test_neighbours);
  if (capability == 90) {
    test_every_width(std::make_integer_sequence<int, 32>());
    repeat(test_all_wgmma);
    test_worked_examples();
  }
}

int capability_of_device() {
#ifdef KX_EMULATION
  return 90;
#else
  int major = 0, minor = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "device");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "device");
  return 10 * major + minor;
#endif
}

}  // namespace
}  // namespace kx::conformance

int main() {
  kx::conformance::test_everything(kx::conformance::capability_of_device());
  std::printf("every primitive does what the PTX ISA says; a 64x64x64 tile of tensor cores takes %.3f ms\n",
              kx::conformance::time_of_gemm());
}
