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

// As cpu, with workspaces `scores` [B, n, heads, whole tiles of a chunk's tokens], of float32, for bfloat16 of
// bfloat16; the states of chunks [chunks, kv_heads, key_dim, value_dim or more] in float32; and their sums, as large,
// of the type of `scores` and if that is float32 possibly the same memory. `longest`: tokens of the longest chunk.
void cuda(const Tensors& in, const Tensors& out, const Options& options, const Tensors& workspaces, int64_t longest,
          int device, intptr_t stream);
// As cpu_backward, with the workspaces of `cuda`; states and sums of U; and of the type of `scores` the gradients of
// scores, as large, those of sums [B, n, heads, value_dim or more, as states] and queries [B, n, heads, key_dim or
// more]; and in float32, for a bias, diagonals [chunks, tiles of a chunk twice, heads, 256].
void cuda_backward(const Tensors& in, const Tensors& out, const Options& options, const Tensors& workspaces,
                   int64_t longest, int device, intptr_t stream);
// Places for chunks that a call needs.
int64_t cuda_chunks(int64_t batch, int64_t rows, int64_t sequences, bool packed, int64_t chunk);

Problem make_problem(const Tensors& in, const Tensors& out, const Options& options, bool backward);

}  // namespace kx::mixed_chunk_attention
