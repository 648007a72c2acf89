// One call of mixed-chunk attention as the kernels see it: gated attention whose tokens see those of their own chunk,
// and a linear sum over others. Packed sequences are a batch of one; a "sequence" is a batch entry or a packed
// sequence.
#pragma once

#include <cstdint>
#include <tuple>

#include "../common/view.h"
#include "../gau_attention/problem.h"

namespace kx::mixed_chunk_attention {

struct Problem : gau_attention::Problem {
  int64_t chunk;      // tokens
  View lin_q, lin_k;  // as q and k
  const void* d;      // [B, n], or null
  double lin_scale;

  View grad_lin_q, grad_lin_k;  // backward
};

// What a call passes besides its tensors: chunk_size, activation, scale, bias_scale, out_scale, lin_scale, causal.
using Options = std::tuple<int64_t, int, double, double, double, double, bool>;

// `in`: quad_q, quad_k, lin_q, lin_k, v, gate, bias, a, b, c, d, query_mask, key_mask, cu_seqlens. `out`: o, ungated.
void cpu(const Tensors& in, const Tensors& out, const Options& options, int num_threads);
// `in` as above and ungated, grad_o. `out`: the gradients of quad_q, quad_k, lin_q, lin_k, v, gate and bias.
void cpu_backward(const Tensors& in, const Tensors& out, const Options& options, int num_threads);

Problem make_problem(const Tensors& in, const Tensors& out, const Options& options, bool backward);

}  // namespace kx::mixed_chunk_attention
