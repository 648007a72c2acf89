// Nyström attention on a CPU: streaming passes over blocks of rows, whose meeting with the landmarks never leaves the
// caches, and between them a small tail per head. The formulas and their names are those of
// kx_kernels/ops/nystrom_attention/README.md.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>

#include "../common/check.h"
#include "../cpu/ahead.h"
#include "../cpu/isa.h"
#include "inverse.h"
#include "problem.h"

namespace kx::nystrom_attention {
namespace KX_ISA {
namespace {

constexpr int kRows = 64;              // of a block
constexpr int kSums = 8;               // into which the weights of a block are summed
constexpr int64_t kPartRows = 2048;    // of a task: they depend on the sequence alone, and so do the bits
constexpr int64_t kGatherRows = 4096;  // of a task with sums of its own for all landmarks, about 1/kGatherRows of a row

struct Range {
  int64_t first, last;

  int64_t size() const { return last - first; }
};

// Rows of one sequence in memory: all, and from the first to the last that is no padding.
struct Sequence {
  int64_t batch;
  Range all_queries, all_keys, queries, keys;
  Road road;
};

bool keeps(const uint8_t* mask, const int64_t* stride, int64_t batch, int64_t row) {
  return mask == nullptr || mask[batch * stride[0] + row * stride[1]] != 0;
}

Range without_padding(Range all, const uint8_t* mask, const int64_t* stride, int64_t batch) {
  while (all.first < all.last && !keeps(mask, stride, batch, all.first)) {
    ++all.first;
  }
  while (all.first < all.last && !keeps(mask, stride, batch, all.last - 1)) {
    --all.last;
  }
  return all;
}

std::vector<Sequence> sequences(const Problem& p) {
  std::vector<Sequence> out(p.num_sequences);
  for (int64_t n = 0; n < p.num_sequences; ++n) {
    Sequence& s = out[n];
    const bool packed = p.cu_seqlens != nullptr;
    s.batch = packed ? 0 : n;
    s.all_queries = packed ? Range{p.cu_seqlens[n], p.cu_seqlens[n + 1]} : Range{0, p.queries};
    s.all_keys = packed ? s.all_queries : Range{0, p.keys};
    s.queries = without_padding(s.all_queries, p.query_mask, p.query_mask_stride, s.batch);
    s.keys = without_padding(s.all_keys, p.key_mask, p.key_mask_stride, s.batch);
    s.road = static_cast<Road>(p.road[n]);
  }
  return out;
}

// A part of the rows of one head of one sequence.
struct Task {
  int64_t sequence, head, part, parts;
  Range rows;
};

// The parts that rows are cut into.
std::vector<Task> cut(const std::vector<Sequence>& all, int64_t heads, Range Sequence::* rows, int64_t size) {
  std::vector<Task> tasks;
  for (size_t n = 0; n < all.size(); ++n) {
    const Range r = all[n].*rows;
    const int64_t parts = std::max<int64_t>(1, (r.size() + size - 1) / size);
    const int64_t step = (r.size() + parts - 1) / parts;
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = std::min(r.last, r.first + part * step);
        tasks.push_back({static_cast<int64_t>(n), head, part, parts, {first, std::min(r.last, first + step)}});
      }
    }
  }
  return tasks;
}

// The same, cut between segments: part i of `parts` has landmarks [m·i/parts, m·(i + 1)/parts).
void align(std::vector<Task>& tasks, const Segments& segments, int64_t m, const std::vector<Sequence>& all,
           Range Sequence::* rows) {
  for (Task& task : tasks) {
    const Range r = all[task.sequence].*rows;
    const int64_t* const bounds = segments.bounds + task.sequence * (m + 1);
    const auto at = [&](int64_t part) {
      const int64_t bound = bounds[m * part / task.parts];
      return part == 0 ? r.first : part == task.parts ? r.last : std::clamp(bound, r.first, r.last);
    };
    task.rows = {at(task.part), at(task.part + 1)};
  }
}

template <class A>
int whole_vectors(int64_t n) {
  constexpr int kLanes = vector_t<A>::kLanes;
  return static_cast<int>((n + kLanes - 1) / kLanes * kLanes);
}

// What landmarks of queries see of parts of the keys: weights are e^(score − highest).
template <class A>
class KeySums {
 public:
  KeySums(const Problem& p, int64_t parts)
      : parts(parts),
        mw_(whole_vectors<A>(p.num_landmarks)),
        wide_(p.num_landmarks * whole_vectors<A>(p.value_dim)),
        memory_(zeros<A>(parts * (2 * mw_ + wide_) + 1)) {
    for (int64_t part = 0; part < parts; ++part) {
      std::fill_n(highest_of(part), mw_, -std::numeric_limits<A>::infinity());
    }
  }
  A* highest_of(int64_t part) const { return memory_.get() + part * (2 * mw_ + wide_); }  // [mw]
  A* weights_of(int64_t part) const { return highest_of(part) + mw_; }                    // [mw]: their sums
  A* values_of(int64_t part) const { return weights_of(part) + mw_; }  // [m, vw]: theirs times values

  const int64_t parts;

 private:
  const int64_t mw_, wide_;
  Buffer<A> memory_;
};

// What one thread works with. A is the type that arithmetic is done in; rows are padded with zeros to whole vectors:
// kw, vw and mw are the widths of rows of D, D_v and m.
template <class T, class A>
class Worker {
 public:
  using V = vector_t<A>;
  static constexpr int kLanes = V::kLanes;
  static constexpr bool kExact = std::is_same_v<T, A>;  // tensors hold what arithmetic gives

  Worker(const Problem& p, const std::vector<Sequence>& all, bool backward)
      : p(p),
        all(all),
        m(static_cast<int>(p.num_landmarks)),
        key_dim(static_cast<int>(p.key_dim)),
        value_dim(static_cast<int>(p.value_dim)),
        taps(static_cast<int>(p.taps)),
        reach(taps / 2) {
    q = take(kRows * static_cast<size_t>(kw));
    k = take(kRows * static_cast<size_t>(kw));
    v = take(kRows * static_cast<size_t>(vw));
    o = take(kRows * static_cast<size_t>(vw));
    scores = take(kRows * static_cast<size_t>(mw));
    turned = take(static_cast<size_t>(key_dim) * mw);
    values = take(static_cast<size_t>(m) * vw);
    if (backward) {
      grads = take(kRows * static_cast<size_t>(mw));
      scaled = take(static_cast<size_t>(m) * kw);
      turned_values = take(static_cast<size_t>(value_dim) * mw);
    }
    row = take(std::max(kw, vw));
    of_landmarks = take(3 * static_cast<size_t>(mw));
    if (taps > 0) {
      around = take((kRows + static_cast<size_t>(taps)) * vw);
      weights = take(static_cast<size_t>(taps) + 2 * kTileRows);
    }
  }

  // ---- Forward.

  // Landmarks of queries, of the task's segments.
  void pool_queries(const Task& task) {
    const Sequence& s = all[task.sequence];
    if (s.road != Road::kNystrom && s.road != Road::kByQueries) {
      return clear_landmarks(task, p.landmarks_q, key_dim);
    }
    clear_landmarks(task, p.landmarks_q, key_dim);
    for (int64_t first = task.rows.first; first < task.rows.last; first += kRows) {
      const int count = load_queries(s, task, first);
      ahead.rest();
      pool(task, p.of_q, p.landmarks_q, first, count, q_rows, q_step, key_dim);
    }
    divide(task, p.of_q, p.landmarks_q, key_dim);
  }

  // Landmarks of keys, of the task's segments.
  void pool_keys(const Task& task) { meet_keys(task, nullptr, 0); }
  // These, and what every landmark of queries sees of the task's rows.
  void pass_keys(const Task& task, KeySums<A>& sums, int64_t part) { meet_keys(task, &sums, part); }

  // Y and the norms of rows of B.
  void combine(const Task& head, const KeySums<A>& of_parts) {
    const Sequence& s = all[head.sequence];
    A* const summary = at_head(p.summary, head, value_dim);
    A* const norms = at_head(p.norms, head, 2);
    std::fill_n(summary, static_cast<size_t>(m) * value_dim, A{0});
    std::fill_n(norms, 2 * static_cast<size_t>(m), A{0});
    if (s.road != Road::kNystrom && s.road != Road::kByQueries) {
      return;
    }
    const A* const divisors = static_cast<const A*>(p.of_q.divisors) + head.sequence * m;
    for (int i = 0; i < m; ++i) {
      A top = -std::numeric_limits<A>::infinity(), sum = 0;
      for (int64_t part = 0; part < of_parts.parts; ++part) {
        top = std::max(top, of_parts.highest_of(part)[i]);
      }
      const auto factor = [&](int64_t part) { return std::exp(of_parts.highest_of(part)[i] - top); };
      for (int64_t part = 0; part < of_parts.parts; ++part) {
        sum += factor(part) * of_parts.weights_of(part)[i];
      }
      if (divisors[i] == 0) {  // a dead landmark sees padding as well
        sum = static_cast<A>(s.all_keys.size());
      }
      norms[2 * i] = top;
      norms[2 * i + 1] = sum;
      for (int64_t part = 0; part < of_parts.parts; ++part) {
        const A share = factor(part) / sum;
        const A* const from = of_parts.values_of(part) + static_cast<int64_t>(i) * vw;
        for (int e = 0; e < value_dim; ++e) {
          summary[i * value_dim + e] += share * from[e];
        }
      }
    }
  }

  // A = softmax(a·Q̃ K̃ᵀ) + λI, [m, mw]; without λ if `ridge` is false.
  void matrix(const Task& head, bool ridge, A* to) {
    turn(at_head(p.landmarks_k, head, key_dim), key_dim, static_cast<A>(p.scale), turned);
    const A* const landmarks = at_head(p.landmarks_q, head, key_dim);
    const A* const divisors = static_cast<const A*>(p.of_q.divisors) + head.sequence * m;
    multiply(m, m, key_dim, landmarks, key_dim, 1, turned, mw, to, mw, false);
    hide_dead(head);
    for (int i = 0; i < m; ++i) {
      A* const x = to + static_cast<size_t>(i) * mw;
      if (divisors[i] == 0) {
        std::fill_n(x, m, A{1} / m);
      } else {
        softmax(x);
      }
      if (ridge) {
        x[i] += static_cast<A>(p.ridge);
      }
    }
  }

  // W = Z Y.
  void weigh_summary(const Task& head, const A* z, int64_t z_row) {
    pad_rows(at_head(p.summary, head, value_dim), value_dim, values, vw);
    A* const weighted = at_head(p.weighted, head, value_dim);
    for (int i = 0; i < m; i += kRows) {
      const int count = std::min(kRows, m - i);
      multiply(count, value_dim, m, z + i * z_row, z_row, 1, values, vw, o, vw, false);
      for (int j = 0; j < count; ++j) {
        std::copy_n(o + static_cast<size_t>(j) * vw, value_dim, weighted + static_cast<int64_t>(i + j) * value_dim);
      }
    }
  }

  // The task's rows of the output.
  void read_out(const Task& task) {
    const Sequence& s = all[task.sequence];
    if (s.road == Road::kNothing) {
      return clear(p.o, s, task, task.rows, value_dim);
    }
    const bool by_queries = s.road == Road::kByQueries;
    if (!by_queries) {
      turn(at_head(p.landmarks_k, task, key_dim), key_dim, static_cast<A>(p.scale), turned);
      pad_rows(at_head(p.weighted, task, value_dim), value_dim, values, vw);
      hide_dead(task);
    }
    if (taps > 0) {
      load_weights(task.head, false);
    }
    const A* const summary = at_head(p.summary, task, value_dim);
    const bool past_caches = streams(p.o, p.queries * p.heads, value_dim);
    for (int64_t first = task.rows.first; first < task.rows.last; first += kRows) {
      const int count = load_queries(s, task, first);
      if (!past_caches) {
        ask_for(p.o, s, task, first, value_dim);
      }
      if (by_queries) {
        for (int i = 0; i < count; ++i) {
          std::copy_n(summary + segment(task, p.of_q, first + i) * value_dim, value_dim,
                      o + static_cast<size_t>(i) * vw);
        }
      } else {
        multiply(count, m, key_dim, q_rows, q_step, 1, turned, mw, scores, mw, false);
        for (int i = 0; i < count; ++i) {
          softmax(scores + static_cast<size_t>(i) * mw);
        }
        multiply(count, value_dim, m, scores, mw, 1, values, vw, o, vw, false);
      }
      if (taps > 0) {
        ask_for(p.v, s, task, first + count + reach, value_dim);
        load_around(p.v, s, task, first, count, reach, p.key_mask, p.key_mask_stride, s.all_keys);
        convolve(count, o);
      }
      store_block(p.o, s, task, first, count, value_dim, vw, o, past_caches);
    }
    stream_fence();
  }

  // ---- Backward.

  // What the task's queries add to ∂W [m, vw] and to ∂K̃ / a [m, kw]; and ∂Q but for the landmarks' part, if that can be
  // added to it later without rounding once more.
  void pass_queries(const Task& task, A* grad_weighted, A* grad_landmarks) {
    const Sequence& s = all[task.sequence];
    std::fill_n(grad_weighted, static_cast<size_t>(m) * vw, A{0});
    std::fill_n(grad_landmarks, static_cast<size_t>(m) * kw, A{0});
    if (s.road == Road::kByQueries) {  // ∂Y of the task's segments
      for (int64_t first = task.rows.first; first < task.rows.last; ++first) {
        if (keeps(p.query_mask, p.query_mask_stride, s.batch, first)) {
          load_row(element<const T>(p.grad_o, s.batch, first, task.head), p.grad_o.stride[3], value_dim,
                   grad_weighted + segment(task, p.of_q, first) * vw);
        }
      }
      return;
    }
    if (s.road == Road::kNothing) {
      return;
    }
    prepare_queries(task);
    for (int64_t first = task.rows.first; first < task.rows.last; first += kRows) {
      const int count = score_queries(s, task, first);
      multiply(m, value_dim, count, scores, 1, mw, v_rows, v_step, grad_weighted, vw, true);
      multiply(m, key_dim, count, grads, 1, mw, q_rows, q_step, grad_landmarks, kw, true);
      if (kExact) {
        ask_for(p.grad_q, s, task, first, key_dim);
        multiply(count, key_dim, m, grads, mw, 1, scaled, kw, k, kw, false);
        store_block(p.grad_q, s, task, first, count, key_dim, kw, k);
      }
    }
  }

  // ∂Q, of ∂Q̃ [m, kw].
  void store_queries(const Task& task, const A* grad_landmarks) {
    const Sequence& s = all[task.sequence];
    if (s.road == Road::kNothing) {
      return clear(p.grad_q, s, task, task.rows, key_dim);
    }
    const bool has_scores = s.road != Road::kByQueries, has_landmarks = s.road != Road::kByKeys;
    if (has_scores && !kExact) {
      prepare_queries(task);
    }
    for (int64_t first = task.rows.first; first < task.rows.last; first += kRows) {
      int count;
      if (!has_scores) {
        count = load_queries(s, task, first);
        std::fill_n(k, static_cast<size_t>(count) * kw, A{0});
      } else if (kExact) {
        count =
            load_block(p.grad_q, p.query_mask, p.query_mask_stride, s, task, first, key_dim, kw, q, &q_rows, &q_step);
        for (int i = 0; i < count; ++i) {
          std::copy_n(q_rows + i * q_step, key_dim, k + static_cast<size_t>(i) * kw);
        }
        ahead.rest();
      } else {
        count = score_queries(s, task, first);
        multiply(count, key_dim, m, grads, mw, 1, scaled, kw, k, kw, false);
      }
      if (has_landmarks) {
        add_shares(task, p.of_q, first, count, grad_landmarks, k);
      }
      store_block(p.grad_q, s, task, first, count, key_dim, kw, k);
    }
  }

  // Between the passes: of ∂W and ∂K̃ / a as passes over queries left them, ∂Y in place of ∂W, ∂K̃, and what the matrix
  // adds to ∂Q̃. `grad_log_norm` is the sum over the call for an original norm, of which `ties` columns have a part.
  // The result is this head's gradient of the norm's logarithm.
  A tail(const Task& head, Inverse<A>& inverse, A norm, A grad_log_norm, int ties, bool only_norm, A* grad_summary,
         A* grad_k, A* grad_q) {
    const A scale = static_cast<A>(p.scale), whole = norm * static_cast<A>(1 + p.ridge);
    matrix(head, true, inverse.a);
    const A* z = p.inverse == nullptr ? inverse.run(whole) : nullptr;
    if (z == nullptr) {
      pad_rows(at_head(const_cast<void*>(p.inverse), head, m), m, grads_of_matrix(), mw);
      z = grads_of_matrix();
    }
    const A* const summary = at_head(p.summary, head, value_dim);
    for (int i = 0; i < m; ++i) {
      for (int e = 0; e < value_dim; ++e) {
        turned_values[static_cast<size_t>(e) * mw + i] = summary[i * value_dim + e];
      }
    }
    const size_t size = static_cast<size_t>(m) * mw;
    multiply(m, m, value_dim, grad_summary, vw, 1, turned_values, mw, inverse.grad_z, mw, false);  // ∂Z
    std::fill_n(inverse.grad_a, size, A{0});
    A own = 0;
    if (p.inverse == nullptr) {
      own = inverse.backward(whole);
      if (only_norm) {
        return own;
      }
      const A share = (p.init == Init::kOriginal ? grad_log_norm : own) / norm / static_cast<A>(ties);
      inverse.add_to_largest(norm, share);
    } else {
      inverse.backward_of_pinv(z);
    }
    // ∂Y = Zᵀ ∂W
    std::copy_n(grad_summary, static_cast<size_t>(m) * vw, values);
    multiply(m, value_dim, m, z, 1, mw, values, vw, grad_summary, vw, false);
    // S₂, in place of ∂A
    matrix(head, false, inverse.a);
    for (int i = 0; i < m; ++i) {
      soften(inverse.a + static_cast<size_t>(i) * mw, inverse.grad_a + static_cast<size_t>(i) * mw);
    }
    pad_rows(at_head(p.landmarks_q, head, key_dim), key_dim, scaled, kw);
    multiply(m, key_dim, m, inverse.grad_a, 1, mw, scaled, kw, grad_k, kw, true);
    pad_rows(at_head(p.landmarks_k, head, key_dim), key_dim, scaled, kw);
    multiply(m, key_dim, m, inverse.grad_a, mw, 1, scaled, kw, grad_q, kw, false);
    for (int64_t i = 0; i < static_cast<int64_t>(m) * kw; ++i) {
      grad_k[i] *= scale;
    }
    return own;
  }

  // ∂K and ∂V of the task's rows, of ∂Y (∂W where attention is exact by keys) and ∂K̃; and what they add to ∂Q̃ / a and
  // to ∂w [taps].
  void store_keys(const Task& task, const A* grad_summary, const A* grad_landmarks, A* grad_q, A* grad_conv) {
    const Sequence& s = all[task.sequence];
    std::fill_n(grad_q, static_cast<size_t>(m) * kw, A{0});
    std::fill_n(grad_conv, taps, A{0});
    if (s.road == Road::kNothing) {
      clear(p.grad_k, s, task, task.rows, key_dim);
      return clear(p.grad_v, s, task, task.rows, value_dim);
    }
    const bool by_keys = s.road == Road::kByKeys, has_landmarks = s.road == Road::kNystrom;
    A *const highest = of_landmarks, *const shares = highest + mw, *const shifts = shares + mw;
    if (!by_keys) {
      const A* const landmarks = at_head(p.landmarks_q, task, key_dim);
      turn(landmarks, key_dim, static_cast<A>(p.scale), turned);
      pad_rows(landmarks, key_dim, scaled, kw, static_cast<A>(p.scale));
      transpose(m, value_dim, grad_summary, vw, turned_values, mw);
      const A* const summary = at_head(p.summary, task, value_dim);
      const A* const norms = at_head(p.norms, task, 2);
      std::fill_n(of_landmarks, 3 * static_cast<size_t>(mw), A{0});
      for (int i = 0; i < m; ++i) {
        highest[i] = norms[2 * i];
        shares[i] = 1 / norms[2 * i + 1];
        for (int e = 0; e < value_dim; ++e) {
          shifts[i] += grad_summary[static_cast<size_t>(i) * vw + e] * summary[i * value_dim + e];
        }
      }
    }
    if (taps > 0) {
      load_weights(task.head, true);
    }
    const bool k_past_caches = streams(p.grad_k, p.keys * p.heads, key_dim);
    const bool v_past_caches = streams(p.grad_v, p.keys * p.heads, value_dim);
    for (int64_t first = task.rows.first; first < task.rows.last; first += kRows) {
      const int count = load_keys(s, task, first);
      load_values(s, task, first, count);
      if (!k_past_caches) {
        ask_for(p.grad_k, s, task, first, key_dim);
      }
      if (!v_past_caches) {
        ask_for(p.grad_v, s, task, first, value_dim);
      }
      if (by_keys) {
        for (int t = 0; t < count; ++t) {
          const int64_t i = segment(task, p.of_k, first + t);
          std::copy_n(grad_summary + i * vw, value_dim, o + static_cast<size_t>(t) * vw);
          std::copy_n(grad_landmarks + i * kw, key_dim, q + static_cast<size_t>(t) * kw);
        }
      } else {
        multiply(count, m, key_dim, k_rows, k_step, 1, turned, mw, scores, mw, false);
        multiply(count, m, value_dim, v_rows, v_step, 1, turned_values, mw, grads, mw, false);
        for (int t = 0; t < count; ++t) {
          A *const x = scores + static_cast<size_t>(t) * mw, *const g = grads + static_cast<size_t>(t) * mw;
          for (int j = 0; j < mw; j += kLanes) {
            const V b = keep[t] ? mul(exp(minus(load(x + j), load(highest + j))), load(shares + j)) : all_of(0);
            store(x + j, b);
            store(g + j, mul(b, minus(load(g + j), load(shifts + j))));
          }
        }
        multiply(count, value_dim, m, scores, mw, 1, grad_summary, vw, o, vw, false);
        multiply(count, key_dim, m, grads, mw, 1, scaled, kw, q, kw, false);
        multiply(m, key_dim, count, grads, 1, mw, k_rows, k_step, grad_q, kw, true);
      }
      if (taps > 0) {
        load_around(p.grad_o, s, task, first, count, taps - 1 - reach, p.query_mask, p.query_mask_stride,
                    s.all_queries);
        convolve(count, o);
        add_to_convolution(count, grad_conv);
      }
      if (has_landmarks) {
        add_shares(task, p.of_k, first, count, grad_landmarks, q);
      }
      store_block(p.grad_k, s, task, first, count, key_dim, kw, q, k_past_caches);
      store_block(p.grad_v, s, task, first, count, value_dim, vw, o, v_past_caches);
    }
    stream_fence();
  }

  // Rows of x outside `kept`, of one head of one sequence, are 0.
  void clear_around(const View& x, const Task& head, Range whole, Range kept, int dim) {
    const Sequence& s = all[head.sequence];
    clear(x, s, head, {whole.first, std::min(kept.first, whole.last)}, dim);
    clear(x, s, head, {std::max(kept.last, whole.first), whole.last}, dim);
  }

  const Problem& p;
  const std::vector<Sequence>& all;
  const int m, key_dim, value_dim, taps, reach;
  const int kw = whole_vectors<A>(p.key_dim), vw = whole_vectors<A>(p.value_dim);
  const int mw = whole_vectors<A>(p.num_landmarks);

 private:
  static V all_of(A x) { return ::kx::KX_ISA::all(x); }
  static V minus(V x, V y) { return fms(x, all_of(1), y); }

  void meet_keys(const Task& task, KeySums<A>* sums, int64_t part) {
    const Sequence& s = all[task.sequence];
    clear_landmarks(task, p.landmarks_k, key_dim);
    if (sums != nullptr) {
      clear_landmarks(task, p.weighted, value_dim);
    }
    if (s.road == Road::kNothing) {
      return;
    }
    const bool streams = sums != nullptr && s.road != Road::kByKeys;
    if (streams) {
      turn(at_head(p.landmarks_q, task, key_dim), key_dim, static_cast<A>(p.scale), turned);
    }
    for (int64_t first = task.rows.first; first < task.rows.last; first += kRows) {
      const int count = load_keys(s, task, first);
      if (sums != nullptr) {
        load_values(s, task, first, count);
      }
      if (s.road != Road::kByQueries) {
        pool(task, p.of_k, p.landmarks_k, first, count, k_rows, k_step, key_dim);
      }
      if (s.road == Road::kByKeys && sums != nullptr) {
        pool(task, p.of_k, p.weighted, first, count, v_rows, v_step, value_dim);
      }
      if (streams && any_kept) {
        A* const values_here = sums->values_of(part);
        multiply(count, m, key_dim, k_rows, k_step, 1, turned, mw, scores, mw, false);
        weigh(count, sums->highest_of(part), sums->weights_of(part), values_here);
        multiply(m, value_dim, count, scores, 1, mw, v_rows, v_step, values_here, vw, true);
      }
    }
    if (s.road != Road::kByQueries) {
      divide(task, p.of_k, p.landmarks_k, key_dim);
    }
  }

  A* take(size_t n) {
    buffers_.push_back(zeros<A>(n + kLanes));
    return buffers_.back().get();
  }
  template <class U>
  static U* element(const View& x, int64_t batch, int64_t at, int64_t head) {
    return static_cast<U*>(x.data) + batch * x.stride[0] + at * x.stride[1] + head * x.stride[2];
  }
  // What a tensor [N, heads, m, dim] has of the task's head.
  A* at_head(void* x, const Task& task, int64_t dim) const {
    return static_cast<A*>(x) + (task.sequence * p.heads + task.head) * p.num_landmarks * dim;
  }
  void multiply(int rows, int n, int depth, const A* x, int64_t x_row, int64_t x_k, const A* y, int64_t y_row, A* to,
                int64_t to_row, bool add_to) {
    gemm(rows, n, depth, x, x_row, x_k, y, y_row, to, to_row, add_to, Part::kAll, [this] { ahead(); });
  }
  // to [dim, mw] = factor · xᵀ, x [m, dim].
  void turn(const A* x, int dim, A factor, A* to) {
    for (int i = 0; i < m; ++i) {
      for (int d = 0; d < dim; ++d) {
        to[static_cast<size_t>(d) * mw + i] = factor * x[static_cast<size_t>(i) * dim + d];
      }
    }
  }
  // to [m, width] = factor · x, x [m, dim].
  void pad_rows(const A* x, int dim, A* to, int width, A factor = 1) {
    for (int i = 0; i < m; ++i) {
      for (int d = 0; d < dim; ++d) {
        to[static_cast<size_t>(i) * width + d] = factor * x[static_cast<size_t>(i) * dim + d];
      }
    }
  }
  A* grads_of_matrix() {
    if (of_matrix == nullptr) {
      of_matrix = take(static_cast<size_t>(m) * mw);
    }
    return of_matrix;
  }

  // ---- Blocks of rows. Padding is zeros: whatever its memory holds never meets a number that counts.

  int load_block(const View& x, const uint8_t* mask, const int64_t* stride, const Sequence& s, const Task& task,
                 int64_t first, int dim, int width, A* buffer, const A** rows, int64_t* step) {
    const int count = static_cast<int>(std::min<int64_t>(kRows, task.rows.last - first));
    ahead.forget();
    any_kept = false;
    bool all_kept = true;
    for (int i = 0; i < count; ++i) {
      keep[i] = keeps(mask, stride, s.batch, first + i);
      any_kept = any_kept || keep[i];
      all_kept = all_kept && keep[i];
    }
    place(x, s, task, first, count, dim, width, all_kept, buffer, rows, step);
    return count;
  }
  // The rows of a block, or the first of it, will be needed soon.
  void ask_for(const View& x, const Sequence& s, const Task& task, int64_t first, int dim) {
    constexpr int64_t kBytes = sizeof(T);
    if (first < task.rows.last) {
      ahead.add(element<const T>(x, s.batch, first, task.head), dim * kBytes, x.stride[1] * kBytes,
                static_cast<int>(std::min<int64_t>(kRows, task.rows.last - first)));
    }
  }
  // Products read rows where they lie, if they can.
  void place(const View& x, const Sequence& s, const Task& task, int64_t first, int count, int dim, int width,
             bool all_kept, A* buffer, const A** rows, int64_t* step) {
    ask_for(x, s, task, first + count, dim);
    if constexpr (kExact) {
      if (all_kept && x.stride[3] == 1 && dim % kLanes == 0) {
        *rows = element<const T>(x, s.batch, first, task.head);
        *step = x.stride[1];
        return;
      }
    }
    for (int i = 0; i < count; ++i) {
      A* const to = buffer + static_cast<size_t>(i) * width;
      if (keep[i]) {
        load_row(element<const T>(x, s.batch, first + i, task.head), x.stride[3], dim, to);
      } else {
        std::fill_n(to, dim, A{0});
      }
    }
    *rows = buffer;
    *step = width;
  }
  int load_queries(const Sequence& s, const Task& task, int64_t first) {
    return load_block(p.q, p.query_mask, p.query_mask_stride, s, task, first, key_dim, kw, q, &q_rows, &q_step);
  }
  int load_keys(const Sequence& s, const Task& task, int64_t first) {
    return load_block(p.k, p.key_mask, p.key_mask_stride, s, task, first, key_dim, kw, k, &k_rows, &k_step);
  }
  // Values of keys, or gradients of outputs, that `keep` tells of.
  void load_values(const Sequence& s, const Task& task, int64_t first, int count) {
    place(p.v, s, task, first, count, value_dim, vw, all_kept(count), v, &v_rows, &v_step);
  }
  void load_grad_o(const Sequence& s, const Task& task, int64_t first, int count) {
    place(p.grad_o, s, task, first, count, value_dim, vw, all_kept(count), v, &v_rows, &v_step);
  }
  bool all_kept(int count) const {
    return std::all_of(keep, keep + count, [](bool x) { return x; });
  }

  // Whether rows of x, so many of every batch entry, are stored past the caches.
  bool streams(const View& x, int64_t rows, int dim) const {
    return dim % kLanes == 0 &&
           can_stream(static_cast<const T*>(x.data), x.stride, p.batch * rows * dim * static_cast<int64_t>(sizeof(T)));
  }
  // Rows [count, width] of a block to x, 0 where they are padding.
  void store_block(const View& x, const Sequence& s, const Task& task, int64_t first, int count, int dim, int width,
                   A* rows, bool past_caches = false) {
    for (int i = 0; i < count; ++i) {
      A* const from = rows + static_cast<size_t>(i) * width;
      if (!keep[i]) {
        std::fill_n(from, dim, A{0});
      }
      T* const to = element<T>(x, s.batch, first + i, task.head);
      if (past_caches) {
        stream_row(from, dim, to);
      } else {
        store_row(from, dim, to, x.stride[3]);
      }
    }
  }
  void clear(const View& x, const Sequence& s, const Task& head, Range rows, int dim) {
    std::fill_n(row, dim, A{0});
    for (int64_t t = rows.first; t < rows.last; ++t) {
      store_row(row, dim, element<T>(x, s.batch, t, head.head), x.stride[3]);
    }
  }

  // ---- Landmarks.

  // The segment that a row is in; −1 or m for none.
  int64_t segment(const Task& task, const Segments& segments, int64_t at) const {
    const int64_t* const bounds = segments.bounds + task.sequence * (m + 1);
    return std::upper_bound(bounds, bounds + m + 1, at) - bounds - 1;
  }
  // The task's part of landmarks [m, dim].
  Range own_landmarks(const Task& task) const { return {m * task.part / task.parts, m * (task.part + 1) / task.parts}; }
  void clear_landmarks(const Task& task, void* x, int dim) {
    const Range own = own_landmarks(task);
    std::fill_n(at_head(x, task, dim) + own.first * dim, own.size() * dim, A{0});
  }
  // Adds rows to the sums of their segments, those of one segment to each other first: short sums round less.
  void pool(const Task& task, const Segments& segments, void* x, int64_t first, int count, const A* rows, int64_t step,
            int dim) {
    A* const sums = at_head(x, task, dim);
    const int64_t* const bounds = segments.bounds + task.sequence * (m + 1);
    for (int t = 0; t < count;) {
      const int64_t i = segment(task, segments, first + t);
      const int64_t end = i < 0 ? bounds[0] : i == m ? first + count : bounds[i + 1];
      const int stop = static_cast<int>(std::min<int64_t>(count, end - first));
      if (i >= 0 && i < m) {
        for (int d = 0; d < dim; d += kLanes) {
          V total = all_of(0);
          for (int u = t; u < stop; ++u) {
            total = add(total, load(rows + u * step + d));
          }
          store(row + d, total);
        }
        for (int d = 0; d < dim; ++d) {
          sums[i * dim + d] += row[d];
        }
      }
      t = stop;
    }
  }
  void divide(const Task& task, const Segments& segments, void* x, int dim) {
    const Range own = own_landmarks(task);
    const A* const divisors = static_cast<const A*>(segments.divisors) + task.sequence * m;
    A* const landmarks = at_head(x, task, dim);
    for (int64_t i = own.first; i < own.last; ++i) {
      for (int d = 0; d < dim && divisors[i] != 0; ++d) {
        landmarks[i * dim + d] /= divisors[i];
      }
    }
  }
  // Adds to the gradients of a block of rows [count, kw] their parts of those of the landmarks that they are in.
  void add_shares(const Task& task, const Segments& segments, int64_t first, int count, const A* grad_landmarks,
                  A* to) {
    const int64_t* const bounds = segments.bounds + task.sequence * (m + 1);
    for (int64_t i = std::max<int64_t>(0, segment(task, segments, first)); i < m && bounds[i] < first + count; ++i) {
      const A divisor = static_cast<const A*>(segments.divisors)[task.sequence * m + i];
      for (int d = 0; d < key_dim; ++d) {
        row[d] = grad_landmarks[i * kw + d] / divisor;
      }
      for (int64_t t = std::max(first, bounds[i]) - first; t < std::min(first + count, bounds[i + 1]) - first; ++t) {
        for (int d = 0; d < key_dim; ++d) {
          to[t * kw + d] += row[d];
        }
      }
    }
  }

  // ---- Weights.

  // What is added to scores with landmarks of keys: −∞ for dead ones, and for the rest of a vector.
  void hide_dead(const Task& head) {
    const A* const divisors = static_cast<const A*>(p.of_k.divisors) + head.sequence * m;
    std::fill_n(of_landmarks, mw, -std::numeric_limits<A>::infinity());
    for (int i = 0; i < m; ++i) {
      if (divisors[i] != 0) {
        of_landmarks[i] = 0;
      }
    }
  }
  // A row [mw] of scores with landmarks as weights that sum to 1.
  void softmax(A* x) {
    V top = all_of(-std::numeric_limits<A>::infinity());
    for (int j = 0; j < mw; j += kLanes) {
      const V score = add(load(x + j), load(of_landmarks + j));
      store(x + j, score);
      top = max(top, score);
    }
    const V highest = largest(top);
    V total = all_of(0);
    for (int j = 0; j < mw; j += kLanes) {
      const V weight = exp(minus(load(x + j), highest));
      store(x + j, weight);
      total = add(total, weight);
    }
    const V share = div(all_of(1), sum(total));
    for (int j = 0; j < mw; j += kLanes) {
      store(x + j, mul(load(x + j), share));
    }
  }
  // The gradient g [mw] of weights as that of the scores that x, their softmax, came of.
  void soften(const A* x, A* g) {
    V total = all_of(0);
    for (int j = 0; j < mw; j += kLanes) {
      total = fma(load(x + j), load(g + j), total);
    }
    const V shift = sum(total);
    for (int j = 0; j < mw; j += kLanes) {
      store(g + j, mul(load(x + j), minus(load(g + j), shift)));
    }
  }
  // Scores [count, mw] of keys as weights of landmarks of queries, under a maximum that may rise.
  void weigh(int count, A* highest, A* sums, A* sum_values) {
    A* const factors = of_landmarks;
    const int whole = (count + kSums - 1) / kSums * kSums;
    for (int t = 0; t < whole; ++t) {
      if (t >= count || !keep[t]) {
        std::fill_n(scores + static_cast<size_t>(t) * mw, mw, -std::numeric_limits<A>::infinity());
      }
    }
    for (int j = 0; j < mw; j += kLanes) {
      V top = load(highest + j);
      for (int t = 0; t < count; ++t) {
        top = max(top, load(scores + static_cast<size_t>(t) * mw + j));
      }
      store(factors + j, exp(minus(load(highest + j), top)));
      store(highest + j, top);
    }
    for (int j = 0; j < mw; j += kLanes) {
      const V top = load(highest + j);
      V totals[kSums];  // of the block alone, and several: short sums round less
      std::fill_n(totals, kSums, all_of(0));
      for (int t = 0; t < whole; t += kSums) {
        for (int i = 0; i < kSums; ++i) {
          A* const x = scores + static_cast<size_t>(t + i) * mw + j;
          const V weight = exp(minus(load(x), top));
          store(x, weight);
          totals[i] = add(totals[i], weight);
        }
      }
      for (int n = kSums / 2; n > 0; n /= 2) {
        for (int i = 0; i < n; ++i) {
          totals[i] = add(totals[i], totals[i + n]);
        }
      }
      store(sums + j, fma(load(sums + j), load(factors + j), totals[0]));
    }
    bool rises = false;
    for (int i = 0; i < m; ++i) {
      rises = rises || factors[i] != 1;
    }
    for (int i = 0; i < m && rises; ++i) {
      for (int e = 0; e < vw; ++e) {
        sum_values[static_cast<size_t>(i) * vw + e] *= factors[i];
      }
    }
  }

  // K̃ᵀ and Wᵀ, for scores of queries and their gradients, and K̃ for those of queries.
  void prepare_queries(const Task& task) {
    pad_rows(at_head(p.landmarks_k, task, key_dim), key_dim, scaled, kw, static_cast<A>(p.scale));
    turn(at_head(p.landmarks_k, task, key_dim), key_dim, static_cast<A>(p.scale), turned);
    turn(at_head(p.weighted, task, value_dim), value_dim, 1, turned_values);
    hide_dead(task);
  }
  // A block of F in `scores` and of S₁ in `grads`, with its queries and gradients of outputs at hand.
  int score_queries(const Sequence& s, const Task& task, int64_t first) {
    const int count = load_queries(s, task, first);
    load_grad_o(s, task, first, count);
    multiply(count, m, key_dim, q_rows, q_step, 1, turned, mw, scores, mw, false);
    multiply(count, m, value_dim, v_rows, v_step, 1, turned_values, mw, grads, mw, false);
    for (int i = 0; i < count; ++i) {
      softmax(scores + static_cast<size_t>(i) * mw);
      soften(scores + static_cast<size_t>(i) * mw, grads + static_cast<size_t>(i) * mw);
    }
    return count;
  }

  // ---- Convolution.

  // A head's weights, perhaps in reverse, between zeros.
  void load_weights(int64_t head, bool reverse) {
    const A* const from = static_cast<const A*>(p.conv_weight) + head * taps;
    for (int j = 0; j < taps; ++j) {
      weights[kTileRows - 1 + j] = from[reverse ? taps - 1 - j : j];
    }
  }
  // Rows [first − before, first − before + count + taps − 1) of x, 0 where they are padding or of no sequence.
  void load_around(const View& x, const Sequence& s, const Task& task, int64_t first, int count, int before,
                   const uint8_t* mask, const int64_t* stride, Range of_sequence) {
    for (int t = 0; t < count + taps - 1; ++t) {
      const int64_t at = first - before + t;
      A* const to = around + static_cast<size_t>(t) * vw;
      if (at >= of_sequence.first && at < of_sequence.last && keeps(mask, stride, s.batch, at)) {
        load_row(element<const T>(x, s.batch, at, task.head), x.stride[3], value_dim, to);
      } else {
        std::fill_n(to, value_dim, A{0});
      }
    }
  }
  // to [count, vw] += the weights' products with `around`: those of a few rows at a time are a matrix, whose rows are
  // the weights, each a step further right.
  void convolve(int count, A* to) {
    for (int t = 0; t < count; t += kTileRows) {
      const int rows = std::min(kTileRows, count - t);
      multiply(rows, value_dim, taps + rows - 1, weights + kTileRows - 1, -1, 1, around + static_cast<size_t>(t) * vw,
               vw, to + static_cast<size_t>(t) * vw, vw, true);
    }
  }
  // ∂w_j += Σ_t v_t · ∂o_{t − j + reach}.
  void add_to_convolution(int count, A* grad_conv) {
    for (int j = 0; j < taps; ++j) {
      V total = all_of(0);
      for (int t = 0; t < count; ++t) {
        const A* const grad = around + static_cast<size_t>(t + taps - 1 - j) * vw;
        int e = 0;
        for (; e + kLanes <= value_dim; e += kLanes) {
          total = fma(load(v_rows + t * v_step + e), load(grad + e), total);
        }
        if (e < value_dim) {
          total = fma(load(v_rows + t * v_step + e, value_dim - e), load(grad + e, value_dim - e), total);
        }
      }
      grad_conv[j] += sum(total).v[0];
    }
  }

  A *q, *k, *v, *o;                         // [kRows, kw] or [kRows, vw]
  const A *q_rows, *k_rows, *v_rows;        // rows of a block, there or in the tensors
  int64_t q_step, k_step, v_step;           // from row to row
  A *scores, *turned, *values;              // [kRows, mw], [D, mw], [m, vw]
  A *grads = nullptr, *scaled = nullptr;    // [kRows, mw], [m, kw]
  A* turned_values = nullptr;               // [D_v, mw]
  A* row;                                   // [kw or vw]
  A* of_landmarks;                          // [3, mw]
  A *around = nullptr, *weights = nullptr;  // [kRows + taps, vw], [taps + 2·kTileRows]
  A* of_matrix = nullptr;                   // [m, mw]
  bool keep[kRows], any_kept;
  Ahead ahead;
  std::vector<Buffer<A>> buffers_;
};

// Runs each(worker, i) for i < count.
template <class W, class Each>
void run_all(const Problem& p, const std::vector<Sequence>& all, int64_t count, int threads, Each&& each) {
#pragma omp parallel num_threads(static_cast<int>(std::clamp<int64_t>(count, 1, threads))) if (threads > 1)
  {
    W worker(p, all, p.grad_o.data != nullptr);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) {
      each(worker, i);
    }
  }
}

// Tasks of all heads, of one head after the other: those of head h are [first[h], first[h + 1]).
struct Tasks {
  std::vector<Task> tasks;
  std::vector<int64_t> first, head;

  explicit Tasks(std::vector<Task> parts) : tasks(std::move(parts)) {
    for (size_t i = 0; i < tasks.size(); ++i) {
      if (tasks[i].part == 0) {
        first.push_back(static_cast<int64_t>(i));
      }
      head.push_back(static_cast<int64_t>(first.size()) - 1);
    }
    first.push_back(static_cast<int64_t>(tasks.size()));
  }
  int64_t size() const { return static_cast<int64_t>(tasks.size()); }
  const Task& operator[](int64_t i) const { return tasks[i]; }
  int64_t parts(int64_t h) const { return first[h + 1] - first[h]; }

  // One task to each head, the first of its parts.
  Tasks heads() const {
    std::vector<Task> out;
    for (size_t h = 0; h + 1 < first.size(); ++h) {
      out.push_back(tasks[first[h]]);
      out.back().parts = 1;
    }
    return Tasks(out);
  }
};

// A step of a pass: each(worker, i) for all tasks, those of a head after the steps before of the same head.
template <class W>
struct Step {
  const Tasks& tasks;
  std::function<void(W&, int64_t)> each;
};

// Where there are heads enough, a thread takes all steps of one after the other: what one step has read, the next one
// finds in the third cache.
template <class W>
void run_steps(const Problem& p, const std::vector<Sequence>& all, int threads, const std::vector<Step<W>>& steps) {
  const int64_t heads = static_cast<int64_t>(steps.front().tasks.first.size()) - 1;
  if (heads < 2 * threads) {
    for (const Step<W>& step : steps) {
      run_all<W>(p, all, step.tasks.size(), threads, step.each);
    }
    return;
  }
  run_all<W>(p, all, heads, threads, [&](W& worker, int64_t h) {
    for (const Step<W>& step : steps) {
      for (int64_t i = step.tasks.first[h]; i < step.tasks.first[h + 1]; ++i) {
        step.each(worker, i);
      }
    }
  });
}

// Rows of x before the first packed sequence and past the last are 0.
template <class T>
void clear_surplus(const Problem& p, const View& x, int64_t rows, int64_t dim) {
  for (int64_t t = 0; t < rows && p.cu_seqlens != nullptr; ++t) {
    if (t >= p.cu_seqlens[0] && t < p.cu_seqlens[p.num_sequences]) {
      continue;
    }
    for (int64_t h = 0; h < p.heads; ++h) {
      for (int64_t d = 0; d < dim; ++d) {
        narrow(compute_t<T>{0}, static_cast<T*>(x.data) + t * x.stride[1] + h * x.stride[2] + d * x.stride[3]);
      }
    }
  }
}

// The norms of the matrices that are iterated, by head, and how many columns have them.
template <class T, class A>
struct Norms {
  std::vector<A> norm;
  std::vector<int> ties;

  explicit Norms(int64_t heads) : norm(heads), ties(heads) {}

  void measure(Worker<T, A>& worker, const Task& head, int64_t h) {
    if (worker.all[head.sequence].road == Road::kNystrom && worker.p.inverse == nullptr) {
      Inverse<A> inverse(worker.m, 0, false);
      worker.matrix(head, true, inverse.a);
      norm[h] = inverse.largest_column(&ties[h]);
    }
  }
  // The largest is that of all heads.
  void share() {
    const A largest = *std::max_element(norm.begin(), norm.end());
    int all_ties = 0;
    for (size_t h = 0; h < norm.size(); ++h) {
      all_ties += norm[h] == largest ? ties[h] : 0;
    }
    norm.assign(norm.size(), largest);
    ties.assign(ties.size(), all_ties);
  }
};

// Tasks of queries or keys, cut between segments.
Tasks gathered(const Problem& p, const std::vector<Sequence>& all, Range Sequence::* rows, const Segments& segments) {
  std::vector<Task> tasks = cut(all, p.heads, rows, kGatherRows);
  align(tasks, segments, p.num_landmarks, all, rows);
  return Tasks(tasks);
}

template <class T>
void matrices(const Problem& p, int threads) {
  using A = compute_t<T>;
  using W = Worker<T, A>;
  const std::vector<Sequence> all = sequences(p);
  const Tasks queries = gathered(p, all, &Sequence::queries, p.of_q), keys = gathered(p, all, &Sequence::keys, p.of_k);
  const Tasks heads = keys.heads();
  const auto store = [&](W& worker, int64_t h) {
    const int m = worker.m, mw = worker.mw;
    Buffer<A> a = zeros<A>(static_cast<size_t>(m) * mw);
    A* const to = static_cast<A*>(p.matrices) + h * m * m;
    if (all[heads[h].sequence].road == Road::kNystrom) {
      worker.matrix(heads[h], true, a.get());
    } else {
      for (int j = 0; j < m; ++j) {
        a[static_cast<size_t>(j) * mw + j] = 1;
      }
    }
    for (int j = 0; j < m; ++j) {
      std::copy_n(a.get() + static_cast<size_t>(j) * mw, m, to + static_cast<int64_t>(j) * m);
    }
  };
  run_steps<W>(p, all, threads,
               {{queries, [&](W& worker, int64_t i) { worker.pool_queries(queries[i]); }},
                {keys, [&](W& worker, int64_t i) { worker.pool_keys(keys[i]); }},
                {heads, store}});
}

template <class T>
void forward(const Problem& p, int threads) {
  using A = compute_t<T>;
  using W = Worker<T, A>;
  const std::vector<Sequence> all = sequences(p);
  const Tasks queries = gathered(p, all, &Sequence::queries, p.of_q), keys = gathered(p, all, &Sequence::keys, p.of_k);
  const Tasks heads = keys.heads(), outs(cut(all, p.heads, &Sequence::queries, kPartRows));
  std::vector<std::unique_ptr<KeySums<A>>> sums(heads.size());
  const bool is_shared = p.init == Init::kOriginal && heads.size() > 0;
  Norms<T, A> norms(heads.size());

  const Step<W> pool{queries, [&](W& worker, int64_t i) { worker.pool_queries(queries[i]); }};
  const Step<W> begin{heads, [&](W&, int64_t h) { sums[h] = std::make_unique<KeySums<A>>(p, keys.parts(h)); }};
  const Step<W> meet{keys, [&](W& worker, int64_t i) {
                       const int64_t h = keys.head[i];
                       worker.pass_keys(keys[i], *sums[h], i - keys.first[h]);
                     }};
  const Step<W> combine{heads, [&](W& worker, int64_t h) {
                          worker.combine(heads[h], *sums[h]);
                          sums[h].reset();
                        }};
  const Step<W> measure{heads, [&](W& worker, int64_t h) { norms.measure(worker, heads[h], h); }};
  const Step<W> invert{heads, [&](W& worker, int64_t h) {
                         if (all[heads[h].sequence].road != Road::kNystrom) {
                           return;
                         }
                         if (p.inverse != nullptr) {
                           const A* const z = static_cast<const A*>(p.inverse) + h * p.num_landmarks * p.num_landmarks;
                           return worker.weigh_summary(heads[h], z, p.num_landmarks);
                         }
                         Inverse<A> inverse(worker.m, p.iterations, false);
                         worker.matrix(heads[h], true, inverse.a);
                         int ties;
                         const A norm = is_shared ? norms.norm[h] : inverse.largest_column(&ties);
                         worker.weigh_summary(heads[h], inverse.run(norm * static_cast<A>(1 + p.ridge)), worker.mw);
                       }};
  const Step<W> read{outs, [&](W& worker, int64_t i) {
                       const Sequence& s = all[outs[i].sequence];
                       if (outs[i].part == 0) {
                         worker.clear_around(p.o, outs[i], s.all_queries, s.queries, worker.value_dim);
                       }
                       worker.read_out(outs[i]);
                     }};
  if (is_shared) {
    run_steps<W>(p, all, threads, {pool, begin, meet, combine, measure});
    norms.share();
    run_steps<W>(p, all, threads, {invert, read});
  } else {
    run_steps<W>(p, all, threads, {pool, begin, meet, combine, invert, read});
  }
  clear_surplus<T>(p, p.o, p.queries, p.value_dim);
}

template <class A>
void add_parts(A* to, int64_t parts, int64_t size) {
  for (int64_t part = 1; part < parts; ++part) {
    for (int64_t i = 0; i < size; ++i) {
      to[i] += to[part * size + i];
    }
  }
}

template <class T>
void backward(const Problem& p, int threads) {
  using A = compute_t<T>;
  using W = Worker<T, A>;
  const std::vector<Sequence> all = sequences(p);
  const Tasks queries(cut(all, p.heads, &Sequence::queries, kGatherRows));
  const Tasks keys(cut(all, p.heads, &Sequence::keys, kGatherRows)), heads = queries.heads();
  const int64_t narrow = p.num_landmarks * whole_vectors<A>(p.key_dim);
  const int64_t wide = p.num_landmarks * whole_vectors<A>(p.value_dim);
  Buffer<A> grad_summary = zeros<A>(queries.size() * wide + 1);  // ∂W, then ∂Y
  Buffer<A> grad_k = zeros<A>(queries.size() * narrow + 1);      // ∂K̃
  Buffer<A> grad_q = zeros<A>(heads.size() * narrow + 1);        // ∂Q̃ / a of the matrices, then ∂Q̃
  Buffer<A> of_keys = zeros<A>(keys.size() * narrow + 1);        // and of the keys
  Buffer<A> grad_conv = zeros<A>(keys.size() * p.taps + 1);
  const bool is_shared = p.init == Init::kOriginal && heads.size() > 0;
  Norms<T, A> norms(heads.size());
  std::vector<A> grad_norm(heads.size(), A{0});
  A grad_log_norm = 0;  // of an original norm, which all heads share
  const auto summary_of = [&](int64_t h) { return grad_summary.get() + queries.first[h] * wide; };
  const auto k_of = [&](int64_t h) { return grad_k.get() + queries.first[h] * narrow; };

  const Step<W> meet_queries{queries, [&](W& worker, int64_t i) {
                               worker.pass_queries(queries[i], grad_summary.get() + i * wide,
                                                   grad_k.get() + i * narrow);
                             }};
  const Step<W> add_queries{heads, [&](W& worker, int64_t h) {
                              add_parts(summary_of(h), queries.parts(h), wide);
                              add_parts(k_of(h), queries.parts(h), narrow);
                              norms.measure(worker, heads[h], h);
                            }};
  const auto tail = [&](bool only_norm) {
    return Step<W>{heads, [&, only_norm](W& worker, int64_t h) {
                     if (all[heads[h].sequence].road == Road::kNystrom) {
                       Inverse<A> inverse(worker.m, p.iterations, true);
                       grad_norm[h] = worker.tail(heads[h], inverse, norms.norm[h], grad_log_norm, norms.ties[h],
                                                  only_norm, summary_of(h), k_of(h), grad_q.get() + h * narrow);
                     } else if (!only_norm) {
                       A* const k = k_of(h);
                       std::transform(k, k + narrow, k, [&](A x) { return x * static_cast<A>(p.scale); });
                     }
                   }};
  };
  const Step<W> meet_keys{keys, [&](W& worker, int64_t i) {
                            const Sequence& s = all[keys[i].sequence];
                            if (keys[i].part == 0) {
                              worker.clear_around(p.grad_k, keys[i], s.all_keys, s.keys, worker.key_dim);
                              worker.clear_around(p.grad_v, keys[i], s.all_keys, s.keys, worker.value_dim);
                            }
                            const int64_t h = keys.head[i];
                            worker.store_keys(keys[i], summary_of(h), k_of(h), of_keys.get() + i * narrow,
                                              grad_conv.get() + i * p.taps);
                          }};
  const Step<W> add_keys{heads, [&](W&, int64_t h) {
                           A *const to = grad_q.get() + h * narrow, *const from =
                                                                        of_keys.get() + keys.first[h] * narrow;
                           add_parts(from, keys.parts(h), narrow);
                           for (int64_t j = 0; j < narrow; ++j) {
                             to[j] = static_cast<A>(p.scale) * (to[j] + from[j]);
                           }
                         }};
  const Step<W> store{queries, [&](W& worker, int64_t i) {
                        const Sequence& s = all[queries[i].sequence];
                        if (queries[i].part == 0) {
                          worker.clear_around(p.grad_q, queries[i], s.all_queries, s.queries, worker.key_dim);
                        }
                        worker.store_queries(queries[i], grad_q.get() + queries.head[i] * narrow);
                      }};
  if (is_shared) {
    run_steps<W>(p, all, threads, {meet_queries, add_queries});
    norms.share();
    run_steps<W>(p, all, threads, {tail(true)});
    grad_log_norm = std::accumulate(grad_norm.begin(), grad_norm.end(), A{0});
    run_steps<W>(p, all, threads, {tail(false), meet_keys, add_keys, store});
  } else {
    run_steps<W>(p, all, threads, {meet_queries, add_queries, tail(false), meet_keys, add_keys, store});
  }
  if (p.taps > 0) {
    A* const to = static_cast<A*>(p.grad_conv);
    std::fill_n(to, p.heads * p.taps, A{0});
    for (int64_t i = 0; i < keys.size(); ++i) {
      for (int64_t j = 0; j < p.taps; ++j) {
        to[keys[i].head * p.taps + j] += grad_conv[i * p.taps + j];
      }
    }
  }
  clear_surplus<T>(p, p.grad_q, p.queries, p.key_dim);
  clear_surplus<T>(p, p.grad_k, p.keys, p.key_dim);
  clear_surplus<T>(p, p.grad_v, p.keys, p.value_dim);
}

}  // namespace

void run(const Problem& p, Pass pass, int num_threads) {
  with_float(p.dtype, [&](auto example) {
    using T = decltype(example);
    const int threads = std::max(1, num_threads);
    switch (pass) {
      case Pass::kForward:
        return forward<T>(p, threads);
      case Pass::kMatrices:
        return matrices<T>(p, threads);
      case Pass::kBackward:
        return backward<T>(p, threads);
    }
  });
}

}  // namespace KX_ISA

#ifdef KX_ISA_portable

KX_DECLARE_FOR_ISAS(void run(const Problem& p, Pass pass, int num_threads);)

void cpu(const Tensors& in, const Tensors& out, const Options& options, int num_threads) {
  const Problem p = make_problem(in, out, options, Pass::kForward);
  KX_DISPATCH(run, p, Pass::kForward, num_threads);
}

void cpu_matrices(const Tensors& in, const Tensors& out, const Options& options, int num_threads) {
  const Problem p = make_problem(in, out, options, Pass::kMatrices);
  KX_DISPATCH(run, p, Pass::kMatrices, num_threads);
}

void cpu_backward(const Tensors& in, const Tensors& out, const Options& options, int num_threads) {
  const Problem p = make_problem(in, out, options, Pass::kBackward);
  KX_DISPATCH(run, p, Pass::kBackward, num_threads);
}

#endif

}  // namespace kx::nystrom_attention
