// Nyström attention on a GPU, in the names of kx_kernels/ops/nystrom_attention/README.md. Rows of a head are cut into
// parts, and what parts sum up lies one after the other, at the `place` of each; a `unit` is a head of a sequence.
//
//   forward    a block has                          to
//   pool       a landmark                           Q̃, and K̃ if keys are few
//   keys       a part of keys, kTile landmarks      sums of k by segments, maxima and sums of rows of B, B·V
//   combine    numbers of a head                    K̃, Y, the norms of B
//   inverse    a head                               W; if keys are few, Z before, while these are met
//   output     a part of queries                    o
//
//   backward   a block has                          to
//   queries    a part of queries, kTile landmarks   what it adds to ∂W and ∂K̃
//   sum        numbers of a head                    the sums of what parts have
//   inverse    a head                               ∂Y, ∂K̃, what the matrix adds to ∂Q̃
//   keys       a part of keys                       ∂k, ∂v, and of kTile landmarks what it adds to ∂Q̃
//   sum        numbers of a head                    ∂Q̃
//   queries    a part of queries                    ∂q
//   conv       a part of keys, kTile weights        what it adds to ∂w
//
// Blocks of the kernels over tokens have kTile columns of what they sum up or write, too, and meet kTile tokens at a
// time. Of scores [kTile, kTile] a warp has 16 rows, in registers: whole ones, where a softmax is by row.
#pragma once

#include "block.cuh"

namespace kx::nystrom_attention {

// ---- Landmarks, one by one.

constexpr int kPoolWarps = kThreads / 32;

// One landmark to a block, of queries and then perhaps of keys: the mean of its segment. Which rows a thread has does
// not depend on strides.
template <class T>
__global__ void __launch_bounds__(kThreads, 8) nystrom_pool_kernel(const __grid_constant__ Plan plan) {
  constexpr int kVector = 16 / sizeof(T);
  struct Sums {
    float of[kPoolWarps][32 * kVector];
  };
  Sums& shared = static_shared_memory<Sums>();
  const Problem& p = plan.p;
  const int m = static_cast<int>(p.num_landmarks), dim = static_cast<int>(p.key_dim);
  const int i = blockIdx.x % m, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int heads = static_cast<int>(p.heads), units = static_cast<int>(p.num_sequences) * heads;
  const bool of_keys = static_cast<int>(blockIdx.x) / m >= units;
  const int unit = static_cast<int>(blockIdx.x) / m - (of_keys ? units : 0);
  const View& x = of_keys ? p.k : p.q;
  const uint8_t* const mask = of_keys ? p.key_mask : p.query_mask;
  const int64_t* const mask_stride = of_keys ? p.key_mask_stride : p.query_mask_stride;
  const Segments& segments = of_keys ? p.of_k : p.of_q;
  float* const landmarks = static_cast<float*>(of_keys ? p.landmarks_k : p.landmarks_q);
  Part s{};
  s.n = unit / heads;
  s.head = unit % heads;
  s.batch = p.cu_seqlens == nullptr ? s.n : 0;
  const Sequence of = sequence_of(p, s.n, of_keys ? p.keys : p.queries);
  s.begin = of.begin;
  s.tokens = of.tokens;
  const Bounds segment = bounds_of(p, segments, s, i);
  const float delta = divisor(p, segments, s.n, i);
  int lanes = 1;  // that share a row
  while (lanes < 32 && lanes * kVector < dim) {
    lanes *= 2;
  }
  const int together = kThreads / lanes;
  for (int column = lane % lanes * kVector; column - lane % lanes * kVector < dim; column += lanes * kVector) {
    float sum[kVector] = {};
#pragma unroll 4
    for (int t = segment.lower + thread / lanes; t < segment.upper; t += together) {
      if (!keeps(mask, mask_stride, s, t) || column >= dim) {
        continue;
      }
      const T* const from = element<const T>(x, s, t) + column * x.stride[3];
      if (x.wide && column + kVector <= dim) {
        const auto numbers = load_shared_by_many<kVector>(from);
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          sum[e] += widen(numbers.x[e]);
        }
      } else {
        for (int e = 0; e < kVector && column + e < dim; ++e) {
          sum[e] += widen(from[e * x.stride[3]]);
        }
      }
    }
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      for (int step = lanes; step < 32; step *= 2) {
        sum[e] += __shfl_xor_sync(0xffffffffu, sum[e], step);
      }
      if (lane < lanes) {
        shared.of[warp][lane * kVector + e] = sum[e];
      }
    }
    __syncthreads();
    const int first = column - lane % lanes * kVector;
    for (int c = thread; c < lanes * kVector && first + c < dim; c += kThreads) {
      float total = 0;
      for (int w = 0; w < kPoolWarps; ++w) {
        total += shared.of[w][c];
      }
      landmarks[(int64_t{unit} * m + i) * dim + first + c] = delta != 0 ? total / delta : 0;
    }
    __syncthreads();
  }
}

// ---- Keys, forward.

template <class P>
struct KeysShared {
  Exact<P> tiles[kStages];
  Wide<P> landmarks;
  Tokens tokens;
};

template <class T>
__device__ __forceinline__ void meet_keys(const Plan& plan, KeysShared<Factor<T>>& shared, int id) {
  using P = Factor<T>;
  const Problem& p = plan.p;
  const int slice = id % plan.slices, group = id / plan.slices % plan.groups;
  const Part s = part_at(p, plan.of_k, id / plan.slices / plan.groups);
  if (s.first >= s.last) {
    return;
  }
  const bool by_keys = road_of(p, s.n) == Road::kByKeys;
  const Place place;
  const Bounds bounds[2] = {bounds_of(p, p.of_k, s, group * kTile + place.row(0)),
                            bounds_of(p, p.of_k, s, group * kTile + place.row(2))};
  Landmarks<P> queries(shared.landmarks, p, p.landmarks_q, s.unit, p.key_dim, static_cast<float>(p.scale));

  // Of a tile: chunks of keys, the slice again if they are several and summed up, the slice of values.
  const int again = plan.key_chunks > 1 && !plan.pooled ? 1 : 0, steps = plan.key_chunks + again + 1;
  const auto fetch = [&](Exact<P>& to, int step) {
    const int t = s.first + step / steps * kTile, at = step % steps;
    const bool of_keys = at < steps - 1;
    load_rows<T>(to, p, of_keys ? p.k : p.v, false, s, of_keys ? p.key_dim : p.value_dim, t,
                 at < plan.key_chunks ? at : slice);
  };
  TileStream<P, decltype(fetch)> tiles(shared.tiles, ceil_div(s.last - s.first, kTile) * steps, fetch);
  Softmax rows;
  float sum_keys[kN][4] = {}, sum_values[kN][4] = {};  // [i, columns]
  for (int t = s.first; t < s.last; t += kTile) {
    bool* const keep = shared.tokens.keep[t / kTile % 2];
    for (int i = threadIdx.x; i < kTile; i += kThreads) {
      keep[i] = keeps(p.key_mask, p.key_mask_stride, s, t + i);
    }
    float scores[kN][4] = {};  // [i, t]
    for (int chunk = 0; chunk < plan.key_chunks; ++chunk) {
      queries.hold(group, chunk);
      add_product<P, false, false>(scores, queries.tile, tiles.take(), depth_of(p.key_dim, chunk));
    }
    if (again != 0) {
      tiles.take();
    }
    if (!plan.pooled) {
      float weights[kN][4];
      for_each([&](int n, int i, int, int column) { weights[n][i] = bounds[i / 2].has(t + column) ? 1 : 0; });
      add_product<P, true>(sum_keys, weights, tiles.last());
    }

    Exact<P>& values = tiles.take();
    for_each([&](int n, int i, int, int column) { scores[n][i] = keep[column] ? scores[n][i] : -INFINITY; });
    float factor[2];
    rows.add(scores, factor);
    for_each([&](int n, int i, int, int column) {
      const bool member = keep[column] && bounds[i / 2].has(t + column);
      scores[n][i] = !by_keys ? scores[n][i] : member ? 1 : 0;
      sum_values[n][i] *= by_keys ? 1 : factor[i / 2];
    });
    add_product<P>(sum_values, scores, values);
  }

  const int64_t numbers = numbers_of_keys(p);
  float* const sums = plan.sums + s.place * p.num_landmarks * numbers;
  if (!plan.pooled) {
    write_sums(sums, p, group, numbers, p.key_dim, slice, sum_keys);
  }
  write_sums(sums + p.key_dim, p, group, numbers, p.value_dim, slice, sum_values);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = group * kTile + place.row(2 * r);
    if (slice == 0 && threadIdx.x % 4 == 0 && i < p.num_landmarks) {
      sums[i * numbers + numbers - 2] = rows.top[r];
      sums[i * numbers + numbers - 1] = rows.sum[r];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) nystrom_keys_kernel(const __grid_constant__ Plan plan) {
  meet_keys<T>(plan, shared_memory<KeysShared<Factor<T>>>(), static_cast<int>(blockIdx.x));
}

// A number of K̃ or Y to a thread, of what parts of keys have summed up; and the norms of rows of B.
__global__ void __launch_bounds__(kThreads) nystrom_combine_kernel(const __grid_constant__ Plan plan) {
  const Problem& p = plan.p;
  const int64_t columns = p.key_dim + p.value_dim, of_unit = p.num_landmarks * columns;
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x, unit = at / of_unit;
  if (unit >= p.num_sequences * p.heads) {
    return;
  }
  const int64_t row = at / columns, column = at % columns, numbers = numbers_of_keys(p);
  const int n = static_cast<int>(unit / p.heads), i = static_cast<int>(row % p.num_landmarks);
  const Places parts = places_of(p, plan.of_k, unit);
  const auto of_part = [&](int part) { return plan.sums + ((parts.first + part) * p.num_landmarks + i) * numbers; };
  float top = -INFINITY, total = 0, sum = 0;
  for (int part = 0; part < parts.count; ++part) {
    top = fmaxf(top, of_part(part)[numbers - 2]);
  }
  top = top == -INFINITY ? 0 : top;
  const bool by_keys = road_of(p, n) == Road::kByKeys;
  for (int part = 0; part < parts.count; ++part) {
    const float* const x = of_part(part);
    const float factor = expf(x[numbers - 2] - top);
    total += factor * x[numbers - 1];
    sum += (column < p.key_dim || by_keys ? 1 : factor) * x[column];
  }
  if (column < p.key_dim) {
    const float delta = divisor(p, p.of_k, n, i);
    if (!plan.pooled) {
      static_cast<float*>(p.landmarks_k)[row * p.key_dim + column] = delta != 0 ? sum / delta : 0;
    }
    return;
  }
  if (divisor(p, p.of_q, n, i) == 0) {
    total = static_cast<float>(parts.tokens);  // a dead landmark sees padding as well
  }
  total = by_keys || total == 0 ? 1 : total;
  const int64_t to = row * p.value_dim + column - p.key_dim;
  static_cast<float*>(p.summary)[to] = sum / total;
  static_cast<float*>(p.weighted)[to] = sum / total;  // of which Z makes another one, if there is one
  if (column == p.key_dim) {
    static_cast<float*>(p.norms)[2 * row] = top;
    static_cast<float*>(p.norms)[2 * row + 1] = total;
  }
}

// ---- Queries.

template <class P>
struct QueriesShared {
  Exact<P> tiles[kStages];
  Wide<P> keys, values;
  Bounds bounds[kTile];
  bool alive[kTile];
};

// F of kTile queries and the landmarks of a group.
template <class T>
class Front {
 public:
  using P = Factor<T>;

  __device__ __forceinline__ Front(const Problem& p, const Part& s, QueriesShared<P>& shared)
      : keys(shared.keys, p, p.landmarks_k, s.unit, p.key_dim, static_cast<float>(p.scale)),
        values(shared.values, p, p.weighted, s.unit, p.value_dim, 1),
        by_queries(road_of(p, s.n) == Road::kByQueries),
        p_(p),
        s_(s),
        shared_(shared) {}

  // Which of a group's landmarks there are. All threads together.
  __device__ __forceinline__ void enter(int group) {
    if (group == group_) {
      return;
    }
    group_ = group;
    __syncthreads();
    for (int j = threadIdx.x; j < kTile; j += kThreads) {
      const int i = group * kTile + j;
      shared_.alive[j] = i < p_.num_landmarks && divisor(p_, p_.of_k, s_.n, i) != 0;
      shared_.bounds[j] = bounds_of(p_, p_.of_q, s_, i);
    }
    __syncthreads();
  }
  // -∞ for scores of those that there are not.
  __device__ __forceinline__ void mask(float (&scores)[kN][4]) const {
    for_each([&](int n, int i, int, int column) { scores[n][i] = shared_.alive[column] ? scores[n][i] : -INFINITY; });
  }
  // Where attention is exact: whether query t is of a landmark.
  __device__ __forceinline__ float member(int t, int column) const { return shared_.bounds[column].has(t) ? 1 : 0; }

  Landmarks<P> keys, values;  // a·K̃ and W
  const bool by_queries;

 private:
  const Problem& p_;
  const Part& s_;
  QueriesShared<P>& shared_;
  int group_ = -1;
};

// Rows that are padding, or of a sequence that has nothing else, are 0.
__device__ __forceinline__ void clear_padding(float (&d)[kN][4], const Problem& p, const uint8_t* mask,
                                              const int64_t* stride, const Part& s, int t) {
  const bool something = road_of(p, s.n) != Road::kNothing;
  const Place place;
  const bool keep[2] = {something && keeps(mask, stride, s, t + place.row(0)),
                        something && keeps(mask, stride, s, t + place.row(2))};
  for_each([&](int n, int i) { d[n][i] = keep[i / 2] ? d[n][i] : 0; });
}

template <class T>
__device__ __forceinline__ void make_outputs(const Plan& plan, QueriesShared<Factor<T>>& shared, int id) {
  using P = Factor<T>;
  const Problem& p = plan.p;
  const int slice = id % plan.value_chunks;
  const Part s = part_at(p, plan.of_q, id / plan.value_chunks);
  if (s.first >= s.last) {
    return;
  }
  Front<T> front(p, s, shared);

  // Of a tile: chunks of queries for each group of landmarks, rows of values around it.
  const int scored = plan.groups * plan.key_chunks, steps = scored + conv_tiles(p);
  const auto fetch = [&](Exact<P>& to, int step) {
    const int t = s.first + step / steps * kTile, at = step % steps;
    if (at < scored) {
      load_rows<T>(to, p, p.q, true, s, p.key_dim, t, at % plan.key_chunks);
    } else {
      load_rows<T>(to, p, p.v, false, s, p.value_dim, t - before_weights<false>(p) + (at - scored) * kTile, slice);
    }
  };
  TileStream<P, decltype(fetch)> tiles(shared.tiles, ceil_div(s.last - s.first, kTile) * steps, fetch);
  for (int t = s.first; t < s.last; t += kTile) {
    Softmax rows;
    float o[kN][4] = {};  // [t, columns]
    for (int group = 0; group < plan.groups; ++group) {
      front.enter(group);
      float scores[kN][4] = {}, factor[2];  // [t, i]
      for (int chunk = 0; chunk < plan.key_chunks; ++chunk) {
        front.keys.hold(group, chunk);
        add_product<P, false, false>(scores, tiles.take(), front.keys.tile, depth_of(p.key_dim, chunk));
      }
      front.mask(scores);
      rows.add(scores, factor);
      for_each([&](int n, int i, int row, int column) {
        o[n][i] *= front.by_queries ? 1 : factor[i / 2];
        scores[n][i] = front.by_queries ? front.member(t + row, column) : scores[n][i];
      });
      front.values.hold(group, slice);
      add_product<P>(o, scores, front.values.tile);
    }
    for_each([&](int n, int i) { o[n][i] *= front.by_queries ? 1 : rows.share(i / 2); });
    convolve<P, false>(o, p, s.head, [&]() -> Exact<P>& { return tiles.take(); });
    clear_padding(o, p, p.query_mask, p.query_mask_stride, s, t);
    write_rows<T, P>(p.o, s, t, p.value_dim, slice, o, tiles.before_last());
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) nystrom_output_kernel(const __grid_constant__ Plan plan) {
  make_outputs<T>(plan, shared_memory<QueriesShared<Factor<T>>>(), static_cast<int>(blockIdx.x));
}

}  // namespace kx::nystrom_attention
