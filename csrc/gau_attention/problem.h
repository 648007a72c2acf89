// One call of gated attention as the kernels see it. Packed sequences are a batch of one; a "sequence" is a batch entry
// or a packed sequence.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/view.h"

namespace kx::gau_attention {

enum class Activation : int { kRelu2, kRelu, kSilu, kSigmoid, kLaplace, kIdentity };

struct Problem {
  DType dtype;  // of q, k, v, gate and o; what is by row, bias and sums are of the type that arithmetic is done in
  int64_t batch, queries, keys, heads, kv_heads, key_dim, value_dim;
  View q, k, v, gate, o;  // gate may have no data

  int64_t num_sequences;
  const int32_t *cu_seqlens, *cu_seqlens_k;  // [num_sequences + 1], or null
  const uint8_t *query_mask, *key_mask;      // [B, n_q] and [B, n_k], zero for padding, or null
  int64_t query_mask_stride[2], key_mask_stride[2];

  const void* bias;  // [bias_heads, distances], or null
  int64_t bias_heads, distances;
  const void *a, *b, *c;  // [B, n_q], or null

  View ungated;  // as o, before the gate, and exact if `by_sum`; may have no data
  void* sums;    // [B, n_q, heads] of a row's scores, or null

  // Backward.
  View grad_o, grad_q, grad_k, grad_v, grad_gate;
  void* grad_bias;  // as bias

  Activation activation;
  double scale, bias_scale, out_scale;
  bool by_sum, causal;
};

// What a call passes besides its tensors: activation, scale, bias_scale, out_scale, by_sum, causal.
using Options = std::tuple<int, double, double, double, bool, bool>;

// `in`: q, k, v, gate, bias, a, b, c, query_mask, key_mask, cu_seqlens, cu_seqlens_k. `out`: o, ungated, sums.
void cpu(const Tensors& in, const Tensors& out, const Options& options, int num_threads);
// `in` as above and ungated, sums, grad_o. `out`: grad_q, grad_k, grad_v, grad_gate, grad_bias.
void cpu_backward(const Tensors& in, const Tensors& out, const Options& options, int num_threads);

// Rows, and keys, that a block has at once: sizes of the workspace are multiples of it.
constexpr int kCudaTile = 128;

// As cpu, in passes over as many rows as `scores` has room for. `keys`: those of the longest sequence, at most.
// Workspaces are of float32, for bfloat16 of bfloat16.
void cuda(const Tensors& in, const Tensors& out, const Options& options, const Tensor& scores, int64_t keys, int device,
          intptr_t stream);
// As cpu, on chip. `parts` of float32, [segments, B, n_q, heads, value_dim or more], and [segments, B, n_q, heads] are
// for sums over `segment` keys at a time, whole tiles; null if all keys are one.
void cuda_fused(const Tensors& in, const Tensors& out, const Options& options, const std::optional<Tensor>& parts,
                const std::optional<Tensor>& part_sums, int64_t segment, int device, intptr_t stream);
// Columns of the values that a block has there, or 0 where it has no room.
int64_t cuda_fused_columns(int dtype, int64_t key_dim, int64_t value_dim, int device);
// As cpu, on chip, by clusters of so many `blocks` that share the scores of their rows.
void cuda_resident(const Tensors& in, const Tensors& out, const Options& options, int64_t blocks, int device,
                   intptr_t stream);
// How: the most keys, keys of a tile, columns of a slice, and for 1, 2, … blocks the clusters that the device runs at
// once. Nothing where it has no room.
std::vector<int64_t> cuda_resident_form(int dtype, int64_t key_dim, int device);
// As cpu_backward, in passes over `panel` keys of each sequence at a time, of which the longest has `keys` at most.
// Workspaces: `scores` and `grads` [B, n_q, heads, panel], or null for all on chip, where one panel has all keys and
// there is no bias; g [B, n_q, heads, value_dim or more], and of float32 `shift` [B, n_q, heads], `grad_queries`
// [B, n_q, heads, key_dim], for more than one panel, and `diagonals` [tiles of rows, heads, tiles of the panel, 256],
// for a bias.
void cuda_backward(const Tensors& in, const Tensors& out, const Options& options, const Tensors& workspaces,
                   int64_t keys, int64_t panel, int device, intptr_t stream);
// Tiles of rows that a call has, at most.
int64_t cuda_tiles(int64_t batch, int64_t rows, int64_t sequences, bool packed);
// Whether a block has shared memory enough for elements of a dtype.
bool cuda_fits(int dtype, int device);

Problem make_problem(const Tensors& in, const Tensors& out, const Options& options, bool backward);

}  // namespace kx::gau_attention
