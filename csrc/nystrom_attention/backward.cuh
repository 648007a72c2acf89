// The gradients of Nyström attention on a GPU: "Gradients" of kx_kernels/ops/nystrom_attention/README.md, by the
// kernels that kernel.cuh lists.
#pragma once

#include "inverse.cuh"

namespace kx::nystrom_attention {

// ---- Queries.

// What a block needs that has ∂q; and one that has what queries add to ∂W and ∂K̃.
template <class P>
struct LastQueriesShared : QueriesShared<P> {
  Tokens tokens;
};
template <class P>
struct SummedQueriesShared : QueriesShared<P> {
  Wide<P> weights, grads;  // [t, i]: F and S₁
};
template <class P, bool kWrites>
using QueriesBackwardShared = std::conditional_t<kWrites, LastQueriesShared<P>, SummedQueriesShared<P>>;

// S₁ of scores and of G Wᵀ, landmark by landmark: a row needs Σ F ⊙ ∂F of all of them before.
struct FrontGradients {
  Softmax rows;
  float product[2] = {};  // Σ ∂F ⊙ weights, as those are summed up

  // Scores become their weights by the largest so far.
  __device__ __forceinline__ void add(float (&scores)[kN][4], const float (&grads)[kN][4]) {
    float factor[2], added[2] = {};
    rows.add(scores, factor);
    for_each([&](int n, int i) { added[i / 2] += scores[n][i] * grads[n][i]; });
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      product[r] = product[r] * factor[r] + row_sum(added[r]);
    }
  }
  // Scores become the weights that add() gave them, once all are known.
  __device__ __forceinline__ void weigh(float (&scores)[kN][4]) const {
    for_each([&](int n, int i) { scores[n][i] = expf(scores[n][i] - rows.shift(i / 2)); });
  }
  // Weights become F, and the gradients S₁.
  __device__ __forceinline__ void finish(float (&weights)[kN][4], float (&grads)[kN][4]) const {
    for_each([&](int n, int i) {
      const float share = rows.share(i / 2);
      weights[n][i] *= share;
      grads[n][i] = weights[n][i] * (grads[n][i] - product[i / 2] * share);
    });
  }
};

// d += what rows have of the gradient [units, m, columns] of the landmark that each is in.
__device__ __forceinline__ void add_share(float (&d)[kN][4], const float* grads, const Problem& p,
                                          const Segments& segments, const Part& s, const int* owner, int64_t columns,
                                          int slice) {
  const Place place;
  grads += s.unit * p.num_landmarks * columns;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const int landmark = owner[place.row(i)];
    const float delta = divisor(p, segments, s.n, landmark), share = delta != 0 ? 1 / delta : 0;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = i; e < i + 2; ++e) {
        const int column = slice * kTile + place.column(n, e);
        if (column < columns) {
          d[n][e] += share * grads[landmark * columns + column];
        }
      }
    }
  }
}

// kWrites: ∂q of a part; or what it adds to ∂W and ∂K̃ / a, of the landmarks of a group.
template <class T, bool kWrites>
__device__ __forceinline__ void query_gradients(const Plan& plan, QueriesBackwardShared<Factor<T>, kWrites>& shared,
                                                int id) {
  using P = Factor<T>;
  const Problem& p = plan.p;
  const int slices = kWrites ? plan.key_chunks : plan.slices, slice = id % slices;
  const int own = kWrites ? 0 : id / slices % plan.groups;
  const Part s = part_at(p, plan.of_q, id / slices / (kWrites ? 1 : plan.groups));
  if (s.first >= s.last) {
    return;
  }
  Front<T> front(p, s, shared);

  // Of a tile: chunks of q and g for all groups, which give a row's norm; if these are several, for those whose
  // gradients are wanted again; and the slices of both, if chunks are several.
  const bool single = plan.groups == 1;
  const int per_group = plan.key_chunks + plan.value_chunks;
  const int rounds = plan.groups + (single ? 0 : kWrites ? plan.groups : 1), scored = rounds * per_group;
  const int again = !kWrites && per_group > 2 ? 2 : 0, steps = scored + again;
  const auto fetch = [&](Exact<P>& to, int step) {
    const int t = s.first + step / steps * kTile, at = step % steps, chunk = at % per_group;
    const bool of_q = at < scored ? chunk < plan.key_chunks : at == scored;
    load_rows<T>(to, p, of_q ? p.q : p.grad_o, true, s, of_q ? p.key_dim : p.value_dim, t,
                 at >= scored ? slice
                 : of_q       ? chunk
                              : chunk - plan.key_chunks);
  };
  TileStream<P, decltype(fetch)> tiles(shared.tiles, ceil_div(s.last - s.first, kTile) * steps, fetch);
  float sum_keys[kN][4] = {}, sum_values[kN][4] = {};  // [i, columns]
  for (int t = s.first; t < s.last; t += kTile) {
    if constexpr (kWrites) {
      for (int i = threadIdx.x; i < kTile; i += kThreads) {
        shared.tokens.owner[t / kTile % 2][i] = owner_of(p, p.of_q, s, t + i);
      }
    }
    FrontGradients rows;
    float grad_q[kN][4] = {};  // [t, columns]
    for (int round = 0; round < rounds; ++round) {
      const bool known = round >= plan.groups;
      const int group = !known ? round : kWrites ? round - plan.groups : own;
      front.enter(group);
      float scores[kN][4] = {}, grads[kN][4] = {};  // [t, i]
      for (int chunk = 0; chunk < plan.key_chunks; ++chunk) {
        front.keys.hold(group, chunk);
        add_product<P, false, false>(scores, tiles.take(), front.keys.tile, depth_of(p.key_dim, chunk));
      }
      for (int chunk = 0; chunk < plan.value_chunks; ++chunk) {
        front.values.hold(group, chunk);
        add_product<P, false, false>(grads, tiles.take(), front.values.tile, depth_of(p.value_dim, chunk));
      }
      front.mask(scores);
      if (!known) {
        rows.add(scores, grads);
        if (!single) {
          continue;
        }
      } else {
        rows.weigh(scores);
      }
      rows.finish(scores, grads);
      if (front.by_queries) {
        for_each([&](int n, int i, int row, int column) {
          scores[n][i] = front.member(t + row, column);
          grads[n][i] = 0;
        });
      }
      if constexpr (kWrites) {
        front.keys.hold(group, slice);
        add_product<P>(grad_q, grads, front.keys.tile);
      } else {
        if (again != 0) {
          tiles.take();
          tiles.take();
        }
        for_each([&](int n, int i, int row, int column) {
          put(shared.weights, row, column, scores[n][i]);
          put(shared.grads, row, column, grads[n][i]);
        });
        __syncthreads();
        add_product<P, true, true>(sum_values, shared.weights, tiles.last(), kTile);
        add_product<P, true, true>(sum_keys, shared.grads, tiles.before_last(), kTile);
      }
    }
    if constexpr (kWrites) {
      add_share(grad_q, plan.grad_landmarks_q, p, p.of_q, s, shared.tokens.owner[t / kTile % 2], p.key_dim, slice);
      clear_padding(grad_q, p, p.query_mask, p.query_mask_stride, s, t);
      write_rows<T, P>(p.grad_q, s, t, p.key_dim, slice, grad_q, tiles.before_last());
    }
  }
  if constexpr (!kWrites) {
    float* const sums = plan.sums + s.place * p.num_landmarks * (p.key_dim + p.value_dim);
    write_sums(sums, p, own, p.value_dim, p.value_dim, slice, sum_values);
    write_sums(sums + p.num_landmarks * p.value_dim, p, own, p.key_dim, p.key_dim, slice, sum_keys);
  }
}

template <class T, bool kWrites>
__global__ void __launch_bounds__(kThreads, 2) nystrom_queries_kernel(const __grid_constant__ Plan plan) {
  query_gradients<T, kWrites>(plan, shared_memory<QueriesBackwardShared<Factor<T>, kWrites>>(),
                              static_cast<int>(blockIdx.x));
}

// ---- Sums of parts.

// What parts of a cut have summed up, and perhaps other numbers, times a factor.
struct Sum {
  Problem p;
  Cut cut;
  int64_t numbers;  // of a unit
  const float *parts, *also;
  float factor;
  float* out;
};

// A number to a thread.
__global__ void __launch_bounds__(kThreads) nystrom_sum_kernel(const __grid_constant__ Sum sum) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x, unit = at / sum.numbers;
  if (unit >= sum.p.num_sequences * sum.p.heads) {
    return;
  }
  const Places parts = places_of(sum.p, sum.cut, unit);
  float total = sum.also != nullptr ? sum.also[at] : 0;
#pragma unroll 4
  for (int part = 0; part < parts.count; ++part) {
    total += sum.parts[(parts.first + part) * sum.numbers + at % sum.numbers];
  }
  sum.out[at] = sum.factor * total;
}

// ---- The inverse.

constexpr int kStates = kBackwardMatrices;  // the first of Z₀, Z₁, …

// Adds to the gradient of A what comes by the steps. Of ∂Z in the first spare matrix makes ∂Z₀, in the matrix that it
// returns; Z is the last state.
__device__ __forceinline__ Matrix gradient_of_steps(const Inverse& of, Matrix a, Matrix grad) {
  const int iterations = of.p.iterations;
  const Matrix x = of.matrix(4), t2 = of.matrix(5), t3 = of.matrix(6), g3 = of.matrix(7);
  for (int step = 0; step < iterations; ++step) {
    const Matrix z = of.matrix(kStates + step);
    of.polynomials(a, z, x, t2, t3);
    of.multiply_into<false, false>(of.matrix(kStates + step + 1), z, t3, 0.25f);
  }
  for (int step = 0; step < iterations; ++step) {
    const Matrix z = of.matrix(kStates + iterations - 1 - step);
    const Matrix before = of.matrix(2 + step % 2), after = of.matrix(2 + (step + 1) % 2);
    of.polynomials(a, z, x, t2, t3);
    of.multiply_into<true, false>(g3, z, before, 0.25f);
    of.multiply_into<false, true>(after, before, t3, 0.25f);
    const Matrix g2 = t3, r = before;  // which are not asked for any more
    of.multiply_into<true, false>(g2, x, g3, -1);
    of.multiply_into<true, false>(r, x, g2, 1, 0, g2, -7);
    of.multiply_into<false, true>(r, g2, x, 1, 0, r, 1);
    of.multiply_into<false, true>(r, g3, t2, -1, 0, r, 1);
    of.multiply_into<false, true>(grad, r, z, 1, 0, grad, 1);
    of.multiply_into<true, false>(after, a, r, 1, 0, after, 1);
  }
  return of.matrix(2 + iterations % 2);
}

// ∂Y, and ∂A but for what comes by the norm, whose own gradient times c it returns.
__device__ __forceinline__ float iterate_backward(const Plan& plan, Inverse& of, Matrix a, Matrix grad) {
  const Problem& p = plan.p;
  const int m = of.m, dim = static_cast<int>(p.value_dim);
  const float* const grad_weighted = plan.of_landmarks + of.unit * m * (p.key_dim + p.value_dim);
  const float* const summary = of.landmarks(p.summary, dim);
  const Matrix grad_z = of.matrix(2);
  of.for_each([&](int i, int j) {
    *grad.at(i, j) = 0;
    *grad_z.at(i, j) = 0;
  });
  of.multiply_landmarks(
      m, m, dim, [&](int i, int e) { return grad_weighted[i * dim + e]; },
      [&](int e, int j) { return summary[j * dim + e]; }, [&](int i, int j, float x) { *grad_z.at(i, j) = x; });
  Matrix z = of.matrix(kStates);
  float of_norm = 0;
  if (p.inverse != nullptr) {
    const float* const inverse = static_cast<const float*>(p.inverse) + of.unit * m * m;
    of.for_each([&](int i, int j) { *z.at(i, j) = i < m && j < m ? inverse[i * m + j] : 0; });
    const Matrix product = of.matrix(3);
    of.multiply_into<true, false>(product, z, grad_z, 1);
    of.multiply_into<false, true>(grad, product, z, -1);
  } else {
    const float norm = of.norm() * (1 + static_cast<float>(p.ridge));
    of.begin(z, a, norm);
    const Matrix first = gradient_of_steps(of, a, grad), products = of.matrix(4);
    of.for_each([&](int i, int j) {
      *products.at(j, i) = *first.at(j, i) * *z.at(j, i);
      *grad.at(i, j) += *first.at(j, i) / norm;
    });
    float product = 0;
    for (int at = threadIdx.x; at < of.side * of.side; at += kInverseThreads) {
      product += *products.at(at / of.side, at % of.side);
    }
    of_norm = -of.sum(product);
    z = of.matrix(kStates + p.iterations);
  }
  float* const grad_summary = plan.grad_summary + of.unit * m * dim;
  of.multiply_landmarks(
      m, dim, m, [&](int i, int j) { return *z.at(j, i); }, [&](int j, int e) { return grad_weighted[j * dim + e]; },
      [&](int i, int e, float x) { grad_summary[i * dim + e] = x; });
  return of_norm;
}

// S₂ of ∂A, ∂K̃, and ∂Q̃ / a but for what keys add to it.
__device__ __forceinline__ void finish_backward(const Plan& plan, Inverse& of, Matrix a, Matrix grad, float of_norm) {
  const Problem& p = plan.p;
  const int m = of.m, dim = static_cast<int>(p.key_dim), lane = of.thread % 32;
  const float ridge = static_cast<float>(p.ridge), scale = static_cast<float>(p.scale);
  const float* const columns = of.columns();
  float norm = 1, share = 0;  // of those columns whose sum is the norm
  if (p.inverse == nullptr) {
    const bool of_call = p.init == Init::kOriginal;
    const float* const all = of_call ? plan.columns : columns;
    const int64_t units = p.num_sequences * p.heads, count = of_call ? units * m : m;
    norm = of.norm();
    float ties = 0, total = of_call ? 0 : of_norm;
    for (int64_t at = threadIdx.x; at < count; at += kInverseThreads) {
      ties += all[at] == norm ? 1 : 0;
    }
    ties = of.sum(ties);
    if (of_call) {
      for (int64_t at = threadIdx.x; at < units; at += kInverseThreads) {
        total += plan.norms[at];
      }
      total = of.sum(total);
    }
    share = total / norm / ties;
  }
  for (int i = of.thread / 32; i < m; i += of.threads / 32) {
    const auto weight = [&](int j) { return *a.at(i, j) - (i == j ? ridge : 0); };
    const auto gradient = [&](int j) { return *grad.at(i, j) + (columns[j] == norm ? share : 0); };
    float product = 0;
    for (int j = lane; j < m; j += 32) {
      product += weight(j) * gradient(j);
    }
    for (int step = 16; step > 0; step /= 2) {
      product += __shfl_xor_sync(0xffffffffu, product, step);
    }
    for (int j = lane; j < m; j += 32) {
      *grad.at(i, j) = weight(j) * (gradient(j) - product);
    }
  }
  of.meet();
  const float *const q = of.landmarks(p.landmarks_q, dim), *const k = of.landmarks(p.landmarks_k, dim);
  const float* const by_queries = plan.of_landmarks + of.unit * m * (p.key_dim + p.value_dim) + m * p.value_dim;
  float* const grad_q = plan.grad_landmarks_q + of.unit * m * dim;
  float* const grad_k = plan.grad_landmarks_k + of.unit * m * dim;
  of.multiply_landmarks(
      m, dim, m, [&](int j, int i) { return *grad.at(i, j); }, [&](int i, int d) { return q[i * dim + d]; },
      [&](int j, int d, float x) { grad_k[j * dim + d] = scale * (x + by_queries[j * dim + d]); });
  of.multiply_landmarks(
      m, dim, m, [&](int i, int j) { return *grad.at(i, j); }, [&](int j, int d) { return k[j * dim + d]; },
      [&](int i, int d, float x) { grad_q[i * dim + d] = x; });
}

template <Role kRole>
__global__ void __launch_bounds__(kInverseThreads, 1)
    nystrom_inverse_backward_kernel(const __grid_constant__ Plan plan) {
  InverseShared& shared = shared_memory<InverseShared>();
  const Problem& p = plan.p;
  Inverse of(plan, shared, reinterpret_cast<float*>(&shared + 1));
  const int m = of.m;
  if (road_of(p, of.n) != Road::kNystrom) {
    const float* const sums = plan.of_landmarks + of.unit * m * (p.key_dim + p.value_dim);
    const int of_values = m * static_cast<int>(p.value_dim), of_keys = m * static_cast<int>(p.key_dim);
    for (int at = of.thread; at < of_values; at += of.threads) {
      plan.grad_summary[of.unit * of_values + at] = sums[at];
    }
    for (int at = of.thread; at < of_keys; at += of.threads) {
      plan.grad_landmarks_k[of.unit * of_keys + at] = static_cast<float>(p.scale) * sums[of_values + at];
      plan.grad_landmarks_q[of.unit * of_keys + at] = 0;
    }
    if (kRole == Role::kIterate && of.thread == 0) {
      plan.norms[of.unit] = 0;
    }
    return;
  }
  const Matrix a = of.matrix(0), grad = of.matrix(1);
  float of_norm = 0;
  if constexpr (kRole != Role::kFinish) {
    of.make_matrix(a, p.init == Init::kOriginal);
    of_norm = iterate_backward(plan, of, a, grad);
  }
  if constexpr (kRole == Role::kIterate) {
    if (of.thread == 0) {
      plan.norms[of.unit] = of_norm;
    }
  } else {
    finish_backward(plan, of, a, grad, of_norm);
  }
}

// ---- Keys.

template <class P>
struct KeysBackwardShared {
  Exact<P> tiles[kStages];
  Wide<P> queries, values, weights, grads;  // a·Q̃; ∂Y; B and S₃ [i, t]
  Tokens tokens;
};

// What a thread's two rows of B are, of the landmarks of a group.
struct Back {
  float top[2] = {}, share[2] = {}, product[2] = {};  // product: Σ B ⊙ ∂B

  __device__ __forceinline__ void enter(const Plan& plan, const Part& s, int group) {
    const Problem& p = plan.p;
    const int dim = static_cast<int>(p.value_dim);
    const Place place;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = group * kTile + place.row(2 * r);
      const bool there = i < p.num_landmarks;
      const int64_t row = s.unit * p.num_landmarks + i;
      top[r] = there ? static_cast<const float*>(p.norms)[2 * row] : 0;
      share[r] = there ? 1 / static_cast<const float*>(p.norms)[2 * row + 1] : 0;
      float sum = 0;
      for (int e = threadIdx.x % 4; there && e < dim; e += 4) {
        sum += plan.grad_summary[row * dim + e] * static_cast<const float*>(p.summary)[row * dim + e];
      }
      product[r] = row_sum(sum);
    }
  }
};

// ∂k of a tile, once all groups of landmarks have been.
template <class T, class P = Factor<T>>
__device__ __forceinline__ void write_key_gradients(const Plan& plan, KeysBackwardShared<P>& shared, const Part& s,
                                                    int t, int slice, float (&grad_k)[kN][4], Exact<P>& scratch) {
  const Problem& p = plan.p;
  add_share(grad_k, plan.grad_landmarks_k, p, p.of_k, s, shared.tokens.owner[t / kTile % 2], p.key_dim, slice);
  clear_padding(grad_k, p, p.key_mask, p.key_mask_stride, s, t);
  write_rows<T, P>(p.grad_k, s, t, p.key_dim, slice, grad_k, scratch);
}

// kSums: what a part adds to ∂Q̃ / a, of the landmarks of a group. kWrites: ∂k and ∂v, which have something of every
// group. Both, where there is one group.
template <class T, bool kSums, bool kWrites>
__device__ __forceinline__ void key_gradients(const Plan& plan, KeysBackwardShared<Factor<T>>& shared, int id) {
  using P = Factor<T>;
  const Problem& p = plan.p;
  const int slice = id % plan.slices;
  const int own = kWrites ? 0 : id / plan.slices % plan.groups;
  const Part s = part_at(p, plan.of_k, id / plan.slices / (kWrites ? 1 : plan.groups));
  if (s.first >= s.last) {
    return;
  }
  const bool by_keys = road_of(p, s.n) == Road::kByKeys;
  Landmarks<P> queries(shared.queries, p, p.landmarks_q, s.unit, p.key_dim, static_cast<float>(p.scale));
  Landmarks<P> values(shared.values, p, plan.grad_summary, s.unit, p.value_dim, 1);

  // Of a tile: chunks of k and v for each group, the slice of k again if they are several, rows of g around it.
  const int per_group = plan.key_chunks + plan.value_chunks, groups = kSums ? 1 : plan.groups;
  const int scored = groups * per_group, again = kSums && per_group > 2 ? 1 : 0;
  const int steps = scored + again + (kWrites ? conv_tiles(p) : 0);
  const auto fetch = [&](Exact<P>& to, int step) {
    const int t = s.first + step / steps * kTile, at = step % steps, chunk = at % per_group;
    if (at < scored + again) {
      const bool of_k = at >= scored || chunk < plan.key_chunks;
      load_rows<T>(to, p, of_k ? p.k : p.v, false, s, of_k ? p.key_dim : p.value_dim, t,
                   at >= scored ? slice
                   : of_k       ? chunk
                                : chunk - plan.key_chunks);
    } else {
      const int row = t - before_weights<true>(p) + (at - scored - again) * kTile;
      load_rows<T>(to, p, p.grad_o, true, s, p.value_dim, row, slice);
    }
  };
  TileStream<P, decltype(fetch)> tiles(shared.tiles, ceil_div(s.last - s.first, kTile) * steps, fetch);
  Back rows;
  if (kSums) {
    rows.enter(plan, s, own);
  }
  float sums[kN][4] = {};  // [i, columns]
  for (int t = s.first; t < s.last; t += kTile) {
    const int parity = t / kTile % 2;
    const bool* const keep = shared.tokens.keep[parity];
    for (int i = threadIdx.x; i < kTile; i += kThreads) {
      shared.tokens.keep[parity][i] = keeps(p.key_mask, p.key_mask_stride, s, t + i);
      shared.tokens.owner[parity][i] = owner_of(p, p.of_k, s, t + i);
    }
    float grad_k[kN][4] = {}, grad_v[kN][4] = {};  // [t, columns]
    for (int round = 0; round < groups; ++round) {
      const int group = kSums ? own : round;
      if (!kSums) {
        rows.enter(plan, s, group);
      }
      float weights[kN][4] = {}, grads[kN][4] = {};  // [i, t]
      for (int chunk = 0; chunk < plan.key_chunks; ++chunk) {
        // The same bits as forward: what divides them has their error.
        queries.hold(group, chunk);
        add_product<P, false, false>(weights, queries.tile, tiles.take(), depth_of(p.key_dim, chunk));
      }
      for (int chunk = 0; chunk < plan.value_chunks; ++chunk) {
        values.hold(group, chunk);
        add_product<P, false, false>(grads, values.tile, tiles.take(), depth_of(p.value_dim, chunk));
      }
      for_each([&](int n, int i, int, int column) {
        const int r = i / 2;
        const float weight = keep[column] ? expf(weights[n][i] - rows.top[r]) * rows.share[r] : 0;
        grads[n][i] = weight * (grads[n][i] - rows.product[r]);
        weights[n][i] = weight;
      });
      if (by_keys) {
        const Place place;
        const Bounds bounds[2] = {bounds_of(p, p.of_k, s, group * kTile + place.row(0)),
                                  bounds_of(p, p.of_k, s, group * kTile + place.row(2))};
        for_each([&](int n, int i, int, int column) {
          weights[n][i] = bounds[i / 2].has(t + column) ? 1 : 0;
          grads[n][i] = 0;
        });
      }
      for_each([&](int n, int i, int row, int column) {
        put(shared.grads, row, column, grads[n][i]);
        if (kWrites) {
          put(shared.weights, row, column, weights[n][i]);
        }
      });
      __syncthreads();
      if constexpr (kSums) {
        add_product<P, false, true>(sums, shared.grads, again != 0 ? tiles.take() : tiles.before_last(), kTile);
      }
      if constexpr (kWrites) {
        queries.hold(group, slice);
        add_product<P, true, true>(grad_k, shared.grads, queries.tile, kTile);
        if constexpr (kSums) {
          // By way of the tile of values, which no warp reads any more.
          write_key_gradients<T>(plan, shared, s, t, slice, grad_k, again != 0 ? tiles.before_last() : tiles.last());
        }
        values.hold(group, slice);
        add_product<P, true, true>(grad_v, shared.weights, values.tile, kTile);
      }
    }
    if constexpr (kWrites) {
      if constexpr (!kSums) {
        write_key_gradients<T>(plan, shared, s, t, slice, grad_k, tiles.before_last());
      }
      convolve<P, true>(grad_v, p, s.head, [&]() -> Exact<P>& { return tiles.take(); });
      clear_padding(grad_v, p, p.key_mask, p.key_mask_stride, s, t);
      const bool values_are_last = again == 0 && p.taps == 0;
      write_rows<T, P>(p.grad_v, s, t, p.value_dim, slice, grad_v,
                       values_are_last ? tiles.last() : tiles.before_last());
    }
  }
  if constexpr (kSums) {
    write_sums(plan.sums + s.place * p.num_landmarks * p.key_dim, p, own, p.key_dim, p.key_dim, slice, sums);
  }
}

template <class T, bool kSums, bool kWrites>
__global__ void __launch_bounds__(kThreads, 2) nystrom_keys_backward_kernel(const __grid_constant__ Plan plan) {
  key_gradients<T, kSums, kWrites>(plan, shared_memory<KeysBackwardShared<Factor<T>>>(), static_cast<int>(blockIdx.x));
}

// ---- The convolution's weights.

template <class P>
struct ConvShared {
  Exact<P> tiles[kStages];
  float products[kTile][kTile + 1];
};

// What a part adds to the gradients of kTile weights: sums along diagonals of V·Gᵀ.
template <class T>
__device__ __forceinline__ void conv_gradients(const Plan& plan, ConvShared<Factor<T>>& shared, int id) {
  using P = Factor<T>;
  const Problem& p = plan.p;
  const int taps = static_cast<int>(p.taps), blocks = ceil_div(taps, kTile), block = id % blocks;
  const Part s = part_at(p, plan.of_k, id / blocks);
  if (s.first >= s.last) {
    return;
  }

  // Of a tile: chunks of v and of g, for two tiles of g.
  const int steps = 4 * plan.value_chunks;
  const auto fetch = [&](Exact<P>& to, int step) {
    const int t = s.first + step / steps * kTile, at = step % steps, half = at / (steps / 2);
    const bool of_v = at % 2 == 0;
    const int row = of_v ? t : t - before_weights<true>(p) + (block + half) * kTile;
    load_rows<T>(to, p, of_v ? p.v : p.grad_o, !of_v, s, p.value_dim, row, at / 2 % plan.value_chunks);
  };
  TileStream<P, decltype(fetch)> tiles(shared.tiles, ceil_div(s.last - s.first, kTile) * steps, fetch);
  const int lane = static_cast<int>(threadIdx.x) % kTile;
  double total = 0;  // of a diagonal: one number of all rows
  for (int t = s.first; t < s.last; t += kTile) {
    for (int half = 0; half < 2; ++half) {
      float products[kN][4] = {};
      for (int chunk = 0; chunk < plan.value_chunks; ++chunk) {
        Exact<P>& values = tiles.take();
        add_product<P, false, false>(products, values, tiles.take(), depth_of(p.value_dim, chunk));
      }
      for_each([&](int n, int i, int row, int column) { shared.products[row][column] = products[n][i]; });
      __syncthreads();
      for (int row = 0; threadIdx.x < kTile && row < kTile; ++row) {
        const int column = row + lane - half * kTile;
        total += column >= 0 && column < kTile ? shared.products[row][column] : 0;
      }
    }
  }
  const int tap = taps - 1 - (block * kTile + lane);
  if (threadIdx.x < kTile && tap >= 0) {
    plan.conv_sums[s.place * taps + tap] = total;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) nystrom_conv_kernel(const __grid_constant__ Plan plan) {
  conv_gradients<T>(plan, shared_memory<ConvShared<Factor<T>>>(), static_cast<int>(blockIdx.x));
}

}  // namespace kx::nystrom_attention
