// One call of linear attention as the kernels see it. Packed sequences are a batch of one; a "sequence" is a batch
// entry or a packed sequence.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/view.h"

namespace kx::linear_attention {

enum class Feature : int { kIdentity, kElu1, kRelu, kRelu2, kExp };

struct Problem {
  DType dtype;  // of q, k, v and o; states and denominators are of the type that arithmetic is done in
  int64_t batch, length, heads, kv_heads, key_dim, value_dim;
  View q, k, v, o;

  int64_t num_sequences;
  const int32_t* cu_seqlens;  // [num_sequences + 1], or null
  const uint8_t* mask;        // [B, T], zero for padding, or null
  int64_t mask_stride[2];

  const double* decay;  // [kv_heads], or null
  const void* cos;      // [P, R/2], or null
  const void* sin;
  DType table_dtype;
  int64_t half, table_length, cos_stride[2], sin_stride[2];
  const int64_t* offsets;  // [num_sequences], or null
  int64_t offset;
  bool interleaved;

  const void* kv0;       // [num_sequences, kv_heads, key_dim, value_dim], or null
  const void* z0;        // [num_sequences, kv_heads, key_dim], or null
  const int64_t* slots;  // [num_sequences]: the states that sequences have, if not in order, or null
  void* kv;              // the states that the sequences end with, or null
  void* z;
  void* denominator;  // [B, T, heads], or null

  // Backward.
  View grad_o, grad_q, grad_k, grad_v;
  const void* grad_kv;  // or null
  const void* grad_z;
  void* grad_kv0;
  void* grad_z0;
  void* grad_denominator;  // [B, T, heads]: written, then read

  Feature feature;
  double stabilizer, eps, scale;
  bool normalize, causal;
};

// What a call passes besides its tensors: feature, stabilizer, normalize, eps, scale, causal, interleaved, offset.
using Options = std::tuple<int, double, bool, double, double, bool, bool, int64_t>;

// `in`: q, k, v, decay, cos, sin, offsets, mask, cu_seqlens, kv0, z0, slots. `out`: o, denominator, kv, z, of which the
// last two may be kv0 and z0.
void cpu(const Tensors& in, const Tensors& out, const Options& options, int num_threads);
// `in` as above and denominator, grad_o, grad_kv, grad_z. `out`: grad_q, grad_k, grad_v, grad_kv0, grad_z0,
// grad_denominator.
void cpu_backward(const Tensors& in, const Tensors& out, const Options& options, int num_threads);

// One launch over all tokens. Part 0 computes `out` as cpu does, 1 to 3 what cpu_backward does: the gradients of
// queries, of keys and values, and `e` alone. `inner` and `slice` say which kernel (kernel.cuh: Form). Sequences are
// cut into `segments` of `segment` tokens; with more than one, or without causality, `sums` and `z_sums` hold what each
// adds to a state. `e` [parts, B, T, heads] is the gradients of the denominators in parts.
void cuda(const Tensors& in, const Tensors& out, const Options& options, int part, int inner, int slice, int segments,
          int64_t segment, const std::optional<Tensor>& e, const std::optional<Tensor>& sums,
          const std::optional<Tensor>& z_sums, int device, intptr_t stream);

// Whether a block has shared memory enough for that.
bool cuda_fits(int dtype, int inner, int slice, int device);

// As cpu, with kv and z in the place of kv0 and z0: a few tokens, in one launch.
void cuda_step(const Tensors& in, const Tensors& out, const Options& options, int device, intptr_t stream);

Problem make_problem(const Tensors& in, const Tensors& out, const Options& options, bool backward);

}  // namespace kx::linear_attention
