// Gated attention on a CPU: a block of queries meets a block of keys, whose scores never leave the caches. The formulas
// and their names are those of kx_kernels/ops/gau_attention/README.md.
#include <omp.h>

#include <algorithm>
#include <atomic>

#include "../cpu/isa.h"
#include "problem.h"
#include "worker.h"

namespace kx::gau_attention {
namespace KX_ISA {
namespace {

template <class T, bool kPairs>
void forward(const Problem& p, int threads) {
  using A = compute_t<T>;
  struct Item {
    int64_t sequence, head, first;
  };
  // Large blocks read keys and values less often, small ones come out even on threads; no bit depends on it.
  const bool few = p.batch * p.queries * p.heads < 4 * kQueries * static_cast<int64_t>(threads);
  const int rows = few ? kQueries / 2 : kQueries;
  std::vector<Item> blocks;
  for (int64_t n = 0; n < p.num_sequences; ++n) {
    const Sequence s = sequence(p, n);
    for (int64_t first = (s.queries - 1) / rows * rows; first >= 0 && s.queries > 0; first -= rows) {
      for (int64_t head = 0; head < p.heads; ++head) {
        blocks.push_back({n, head, first});  // the longest first
      }
    }
  }
  // Where there are fewer blocks than threads, as in decoding, they share out columns of values: scores are made again
  // for each share, and no bit depends on how many there are.
  const int64_t num_blocks = static_cast<int64_t>(blocks.size());
  constexpr int kColumns = Worker<T, A, kPairs>::kColumns;
  const int64_t most = (p.value_dim + kColumns - 1) / kColumns;
  const int64_t shares = num_blocks == 0 ? 1 : std::clamp<int64_t>(threads / num_blocks, 1, std::max<int64_t>(1, most));
  const int64_t columns = (most + shares - 1) / shares * kColumns, count = num_blocks * shares;
#pragma omp parallel num_threads(static_cast<int>(std::clamp<int64_t>(count, 1, threads))) if (threads > 1)
  {
    Worker<T, A, kPairs> worker(p, false, rows);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) {
      const Item& block = blocks[i / shares];
      const Sequence s = sequence(p, block.sequence);
      const int from = static_cast<int>(std::min(p.value_dim, i % shares * columns));
      const int to = static_cast<int>(std::min(p.value_dim, from + columns));
      worker.attend(s, block.head, block.first, from, to);
      worker.store_outputs(s, block.head, block.first, from, to);
    }
  }
  clear_surplus<T>(p, p.o, p.cu_seqlens, p.queries, p.heads, p.value_dim);
  if (p.by_sum) {
    clear_surplus<A>(p, p.ungated, p.cu_seqlens, p.queries, p.heads, p.value_dim);
  } else {
    clear_surplus<T>(p, p.ungated, p.cu_seqlens, p.queries, p.heads, p.value_dim);
  }
  for (int64_t t = 0; t < p.queries * p.heads && p.by_sum && p.cu_seqlens != nullptr; ++t) {
    const int64_t at = t / p.heads;
    if (at < p.cu_seqlens[0] || at >= p.cu_seqlens[p.num_sequences]) {
      static_cast<A*>(p.sums)[t] = 0;
    }
  }
}

// Threads take blocks of keys of one head after another. What they add to gradients of queries and bias is added in the
// order of the keys, however many threads there are: a block of queries waits for the keys before (Turn).
template <class T, bool kPairs>
void backward(const Problem& p, int threads) {
  using A = compute_t<T>;
  constexpr int kKeys = Worker<T, A, kPairs>::kKeys;
  struct Item {
    int64_t sequence, kv_head, key;
  };
  std::vector<Item> blocks;
  for (int64_t n = 0; n < p.num_sequences; ++n) {
    for (int64_t kv_head = 0; kv_head < p.kv_heads; ++kv_head) {
      for (int64_t key = 0; key < sequence(p, n).keys; key += kKeys) {
        blocks.push_back({n, kv_head, key});
      }
    }
  }
  const int64_t count = static_cast<int64_t>(blocks.size());
  const int64_t width = Worker<T, A, kPairs>(p, true).row_width(), rows = p.batch * p.queries * p.heads;
  Buffer<A> grad_q = zeros<A>(static_cast<size_t>((rows + 1) * width));
  const int64_t distances = p.heads * p.distances;
  Buffer<double> grad_bias = zeros<double>(static_cast<size_t>(p.bias != nullptr ? p.num_sequences * distances : 1));
  std::vector<std::atomic<int64_t>> done(blocks.size());  // tiles of each block of keys
  std::atomic<int64_t> next{0};                           // in order, so that what a block waits for has begun
#pragma omp parallel num_threads(static_cast<int>(std::clamp<int64_t>(count, 1, threads))) if (threads > 1)
  {
    Worker<T, A, kPairs> worker(p, true);
    for (int64_t i; (i = next.fetch_add(1)) < count;) {
      const auto [n, kv_head, key] = blocks[i];
      const Sequence s = sequence(p, n);
      A* const queries = grad_q.get() + (s.batch * p.queries + s.query_row) * p.heads * width;
      double* const bias = p.bias != nullptr ? grad_bias.get() + n * distances : nullptr;
      worker.begin_gradients(s, kv_head, key);
      worker.add_gradients(s, kv_head, key, Turn{key > 0 ? &done[i - 1] : nullptr, &done[i]}, queries, bias);
      worker.store_gradients(s, kv_head, key);
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t head = i % p.heads, at = i / p.heads % p.queries, batch = i / p.heads / p.queries;
      const View& x = p.grad_q;
      store_row(grad_q.get() + i * width, p.key_dim,
                static_cast<T*>(x.data) + batch * x.stride[0] + at * x.stride[1] + head * x.stride[2], x.stride[3]);
      if (p.grad_gate.data != nullptr) {
        worker.backward_gate(batch, at, head);
      }
    }
  }
  store_bias<A>(p, grad_bias.get(), p.num_sequences);
  clear_surplus<T>(p, p.grad_gate, p.cu_seqlens, p.queries, p.heads, p.value_dim);
  clear_surplus<T>(p, p.grad_k, p.cu_seqlens_k, p.keys, p.kv_heads, p.key_dim);
  clear_surplus<T>(p, p.grad_v, p.cu_seqlens_k, p.keys, p.kv_heads, p.value_dim);
}

}  // namespace

void run(const Problem& p, bool is_backward, int num_threads) {
  const int threads = std::max(1, num_threads);
  const auto run_as = [&](auto example, auto pairs) {
    using T = decltype(example);
    is_backward ? backward<T, pairs>(p, threads) : forward<T, pairs>(p, threads);
  };
  with_float(p.dtype, [&](auto example) {
#ifdef KX_ISA_avx512
    if constexpr (std::is_same_v<decltype(example), bfloat16>) {
      // A bias is float32, and so is its gradient's accuracy; sums of rows divide numbers however small, which
      // instructions for pairs take for 0 from 2⁻¹²⁶ down.
      if (multiplies_pairs() && p.bias == nullptr && !p.by_sum) {
        return run_as(example, std::true_type{});
      }
    }
#endif
    run_as(example, std::false_type{});
  });
}

}  // namespace KX_ISA

#ifdef KX_ISA_portable

KX_DECLARE_FOR_ISAS(void run(const Problem& p, bool is_backward, int num_threads);)

void cpu(const Tensors& in, const Tensors& out, const Options& options, int num_threads) {
  const Problem p = make_problem(in, out, options, false);
  KX_DISPATCH(run, p, false, num_threads);
}

void cpu_backward(const Tensors& in, const Tensors& out, const Options& options, int num_threads) {
  const Problem p = make_problem(in, out, options, true);
  KX_DISPATCH(run, p, true, num_threads);
}

#endif

}  // namespace kx::gau_attention
