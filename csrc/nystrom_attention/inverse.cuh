// The matrix of a head, its inverse and the gradient of that: by one block, in shared memory where matrices have room;
// or in memory, by a cluster of blocks where there are processors to spare. Which does not change a bit.
#pragma once

#include "../cuda/cluster.cuh"
#include "kernel.cuh"

namespace kx::nystrom_attention {

constexpr int kInverseThreads = 256, kInverseWarps = kInverseThreads / 32;
constexpr int kDepth = 32;                                  // of products of landmarks, at a time
constexpr int kForwardMatrices = 6, kBackwardMatrices = 8;  // besides the states of backward
enum class Role { kMeasure, kInvert, kWeigh, kIterate, kFinish, kAll };

// Numbers from one row of a matrix to the next: of 16 rows the columns of floats fall on different banks.
__host__ __device__ __forceinline__ int pitch_of(int side) { return side % 32 == 0 ? side + 4 : side + 20; }
__host__ __device__ __forceinline__ int64_t size_of_matrix(int side) { return int64_t{side} * pitch_of(side); }

struct InverseShared {
  Tile<float, kTile, kDepth> x;
  Tile<float, kDepth, kTile> y;
  float reduced[kInverseWarps];
};

// side × side numbers, in shared memory or not; tile.cuh reads it as a tile.
struct Matrix {
  static constexpr int kPanel = 0, kStride = 1;
  float* data;
  int pitch;
  __device__ __forceinline__ float* at(int row, int column) const { return data + row * pitch + column; }
};

class Inverse {
 public:
  __device__ __forceinline__ Inverse(const Plan& plan, InverseShared& shared, float* on_chip)
      : unit(static_cast<int>(blockIdx.x) / plan.blocks),
        n(static_cast<int>(unit) / static_cast<int>(plan.p.heads)),
        m(static_cast<int>(plan.p.num_landmarks)),
        side(plan.side),
        rank(static_cast<int>(blockIdx.x) % plan.blocks),
        thread(rank * kInverseThreads + static_cast<int>(threadIdx.x)),
        threads(plan.blocks * kInverseThreads),
        plan(plan),
        p(plan.p),
        shared(shared),
        on_chip_(on_chip) {}

  __device__ __forceinline__ Matrix matrix(int number) const {
    const int64_t size = size_of_matrix(side);
    float* const data = number < plan.on_chip ? on_chip_ + number * size
                                              : plan.scratch + (unit * plan.off_chip + number - plan.on_chip) * size;
    return {data, pitch_of(side)};
  }

  // What threads of a head's blocks did before, they all see after.
  __device__ __forceinline__ void meet() const {
    if (plan.blocks > 1) {
      sync_cluster();
    } else {
      __syncthreads();
    }
  }

  // change(row, column) for every number of a matrix.
  template <class Change>
  __device__ __forceinline__ void for_each(Change&& change) const {
    for (int at = thread; at < side * side; at += threads) {
      change(at / side, at % side);
    }
    meet();
  }

  // out = factor·x·y + diagonal·I + also_factor·also; x and y may be turned, and out is neither, but may be `also`.
  template <bool kXTurned, bool kYTurned>
  __device__ __forceinline__ void multiply_into(Matrix out, Matrix x, Matrix y, float factor, float diagonal = 0,
                                                Matrix also = {}, float also_factor = 0) const {
    const int tiles = side / 16, lane = thread % 32;
    for (int tile = thread / 32; tile < tiles * tiles; tile += threads / 32) {
      const int first_row = tile / tiles * 16, first_column = tile % tiles * 16;
      float d[2][4] = {};
      multiply<float, kXTurned, !kYTurned>(d, x, first_row, y, first_column, side);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int i = first_row + lane / 4 + e % 4 / 2 * 8, j = first_column + e / 4 * 8 + lane % 4 * 2 + e % 2;
        float value = factor * d[e / 4][e % 4] + (i == j ? diagonal : 0);
        if (also.data != nullptr) {
          value += also_factor * *also.at(i, j);
        }
        *out.at(i, j) = value;
      }
    }
    meet();
  }

  // out(i, j, Σ x(i, d) y(d, j)) for i < rows and j < columns, d < depth.
  template <class X, class Y, class Out>
  __device__ __forceinline__ void multiply_landmarks(int rows, int columns, int depth, X&& x, Y&& y, Out&& out) {
    const int own = threadIdx.x, lane = own % 32;
    const int own_row = own / 32 % 4 * 16, own_column = own / 128 * 32;  // of 16 × 32 numbers of a tile
    const int beside = ceil_div(columns, kTile), tiles = ceil_div(rows, kTile) * beside;
    for (int tile = rank; tile < tiles; tile += plan.blocks) {
      const int first_row = tile / beside * kTile, first_column = tile % beside * kTile;
      float d[4][4] = {};
      for (int first = 0; first < depth; first += kDepth) {
        for (int at = own; at < kTile * kDepth; at += kInverseThreads) {
          const int i = at / kDepth, e = at % kDepth;
          *shared.x.at(i, e) = first_row + i < rows && first + e < depth ? x(first_row + i, first + e) : 0;
        }
        for (int at = own; at < kDepth * kTile; at += kInverseThreads) {
          const int e = at / kTile, j = at % kTile;
          *shared.y.at(e, j) = first + e < depth && first_column + j < columns ? y(first + e, first_column + j) : 0;
        }
        __syncthreads();
        multiply<float, false, true>(d, shared.x, own_row, shared.y, own_column, kDepth);
        __syncthreads();
      }
#pragma unroll
      for (int e = 0; e < 16; ++e) {
        const int i = first_row + own_row + lane / 4 + e % 4 / 2 * 8;
        const int j = first_column + own_column + e / 4 * 8 + lane % 4 * 2 + e % 2;
        if (i < rows && j < columns) {
          out(i, j, d[e / 4][e % 4]);
        }
      }
    }
    meet();
  }

  // Over a block's threads' numbers, the same for all of them.
  template <class Combine>
  __device__ __forceinline__ float reduce(float x, Combine&& combine) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      x = combine(x, __shfl_xor_sync(0xffffffffu, x, step));
    }
    if (threadIdx.x % 32 == 0) {
      shared.reduced[threadIdx.x / 32] = x;
    }
    __syncthreads();
    x = shared.reduced[0];
    for (int warp = 1; warp < kInverseWarps; ++warp) {
      x = combine(x, shared.reduced[warp]);
    }
    __syncthreads();
    return x;
  }
  __device__ __forceinline__ float sum(float x) {
    return reduce(x, [](float a, float b) { return a + b; });
  }

  // Of `count` numbers above 0 the largest.
  __device__ __forceinline__ float largest(const float* x, int64_t count) {
    float top = 0;
    for (int64_t at = threadIdx.x; at < count; at += kInverseThreads) {
      top = fmaxf(top, x[at]);
    }
    return reduce(top, [](float a, float b) { return fmaxf(a, b); });
  }

  __device__ __forceinline__ float* columns() const { return plan.columns + unit * m; }

  // c.
  __device__ __forceinline__ float norm() {
    return p.init == Init::kOriginal ? largest(plan.columns, p.num_sequences * p.heads * m) : largest(columns(), m);
  }

  // A, zeros past its rows and columns; and the sums of its columns, where no launch before has made them for all
  // units.
  __device__ __forceinline__ void make_matrix(Matrix a, bool measured) {
    const float scale = static_cast<float>(p.scale), ridge = static_cast<float>(p.ridge);
    const float *const q = landmarks(p.landmarks_q, p.key_dim), *const k = landmarks(p.landmarks_k, p.key_dim);
    const int dim = static_cast<int>(p.key_dim);
    multiply_landmarks(
        m, m, dim, [&](int i, int d) { return q[i * dim + d]; }, [&](int d, int j) { return k[j * dim + d]; },
        [&](int i, int j, float x) { *a.at(i, j) = scale * x; });
    const int lane = thread % 32;
    for (int i = thread / 32; i < side; i += threads / 32) {
      const bool alive = i < m && divisor(p, p.of_q, n, i) != 0;
      const auto seen = [&](int j) { return alive && j < m && divisor(p, p.of_k, n, j) != 0; };
      float top = -INFINITY, total = 0;
      for (int j = lane; j < m; j += 32) {
        top = fmaxf(top, seen(j) ? *a.at(i, j) : -INFINITY);
      }
      for (int step = 16; step > 0; step /= 2) {
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
      }
      for (int j = lane; j < m; j += 32) {
        total += seen(j) ? expf(*a.at(i, j) - top) : 0;
      }
      for (int step = 16; step > 0; step /= 2) {
        total += __shfl_xor_sync(0xffffffffu, total, step);
      }
      for (int j = lane; j < side; j += 32) {
        // A dead landmark sees everything alike.
        const float x = seen(j) ? expf(*a.at(i, j) - top) / total : alive || j >= m ? 0 : 1 / static_cast<float>(m);
        *a.at(i, j) = i < m ? x + (i == j ? ridge : 0) : 0;
      }
    }
    meet();
    for (int j = thread; !measured && j < m; j += threads) {
      float total = 0;
      for (int first = 0; first < m; first += 16) {  // short sums round less
        float some = 0;
        for (int i = first; i < m && i < first + 16; ++i) {
          some += *a.at(i, j);
        }
        total += some;
      }
      columns()[j] = total;
    }
    meet();
  }

  // X, T₂ = 15 I − 7 X + X X and T₃ of a step from Z.
  __device__ __forceinline__ void polynomials(Matrix a, Matrix z, Matrix x, Matrix t2, Matrix t3) const {
    multiply_into<false, false>(x, a, z, 1);
    multiply_into<false, false>(t2, x, x, 1, 15, x, -7);
    multiply_into<false, false>(t3, x, t2, -1, 13);
  }

  // Z₀ = Aᵀ / norm.
  __device__ __forceinline__ void begin(Matrix z, Matrix a, float norm) const {
    for_each([&](int i, int j) { *z.at(j, i) = *a.at(i, j) / norm; });
  }

  __device__ __forceinline__ float* landmarks(void* data, int64_t width) const {
    return static_cast<float*>(data) + unit * m * width;
  }

  const int64_t unit;
  const int n, m, side;
  const int rank;             // of the block, among those that have the head
  const int thread, threads;  // of all of these
  const Plan& plan;
  const Problem& p;
  InverseShared& shared;

 private:
  float* const on_chip_;
};

// W of a head; or only Z; or only A, where no iteration inverts it, and the sums of its columns.
__device__ __forceinline__ void weigh(const Plan& plan, Inverse& of, Role role) {
  const Problem& p = plan.p;
  const int m = of.m, dim = static_cast<int>(p.value_dim);
  if (road_of(p, of.n) != Road::kNystrom) {
    for (int at = of.thread; role == Role::kMeasure && at < m * m; at += of.threads) {
      if (at < m) {
        of.columns()[at] = 0;
      }
      if (p.matrices != nullptr) {
        of.landmarks(p.matrices, m)[at] = at / m == at % m ? 1 : 0;
      }
    }
    return;
  }
  const Matrix a = of.matrix(0), x = of.matrix(1), t2 = of.matrix(2), t3 = of.matrix(3);
  Matrix z = of.matrix(4), after = of.matrix(5);
  const auto put_matrix = [&](Matrix from) {
    for (int at = of.thread; p.matrices != nullptr && at < m * m; at += of.threads) {
      of.landmarks(p.matrices, m)[at] = *from.at(at / m, at % m);
    }
  };
  if (p.inverse != nullptr) {
    z = {static_cast<float*>(const_cast<void*>(p.inverse)) + of.unit * m * m, m};
  } else {
    of.make_matrix(a, role != Role::kMeasure && p.init == Init::kOriginal);
    if (role == Role::kMeasure) {
      return put_matrix(a);
    }
    of.begin(z, a, of.norm() * (1 + static_cast<float>(p.ridge)));
    for (int step = 0; step < p.iterations; ++step) {
      of.polynomials(a, z, x, t2, t3);
      of.multiply_into<false, false>(after, z, t3, 0.25f);
      const Matrix before = z;
      z = after;
      after = before;
    }
    if (role == Role::kInvert) {
      return put_matrix(z);
    }
  }
  const float* const summary = of.landmarks(p.summary, dim);
  float* const weighted = of.landmarks(p.weighted, dim);
  of.multiply_landmarks(
      m, dim, m, [&](int i, int j) { return *z.at(i, j); }, [&](int j, int e) { return summary[j * dim + e]; },
      [&](int i, int e, float value) { weighted[i * dim + e] = value; });
}

template <Role kRole>
__global__ void __launch_bounds__(kInverseThreads, 1) nystrom_inverse_kernel(const __grid_constant__ Plan plan) {
  InverseShared& shared = shared_memory<InverseShared>();
  Inverse of(plan, shared, reinterpret_cast<float*>(&shared + 1));
  weigh(plan, of, kRole);
}

}  // namespace kx::nystrom_attention
