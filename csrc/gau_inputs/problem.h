// One call for a gated attention's inputs as the kernels see it: sizes and strides, packed sequences a batch of one.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/view.h"

namespace kx::gau_inputs {

enum class Activation : int { kSilu, kRelu, kIdentity };

// All but the heads, of which there may be any number.
struct Rows {
  DType dtype;         // of u, v, z and the results
  DType affine_dtype;  // of gamma and beta: the same, or the type that arithmetic is done in
  int64_t batch, length, gate_dim, value_dim, key_dim, heads;
  View u, v, z;  // [B, T, width]; u may have no data

  View gamma, beta;  // [heads, key_dim]; beta may have no data

  const void *cos, *sin;  // [table_length, half], or null
  DType table_dtype;
  int64_t half, table_length, cos_stride[2], sin_stride[2];
  const int64_t* offsets;  // [num_sequences], or null
  int64_t offset;          // where offsets is null
  bool interleaved;

  const uint8_t* mask;  // [B, T], zero for padding, or null
  int64_t mask_stride[2];
  const int32_t* cu_seqlens;  // [num_sequences + 1], or null
  int64_t num_sequences;

  Activation activation;

  View gate, values;  // results, or backward their gradients; gate may have no data

  // Backward.
  View grad_u, grad_v, grad_z, grad_gamma, grad_beta;
};

struct Problem : Rows {
  std::vector<View> parts;  // the heads, or their gradients
};

// What a call passes besides its tensors: activation, offset, interleaved.
using Options = std::tuple<int, int64_t, bool>;

// `in`: u, v, z, gamma, beta, cos, sin, offsets, mask, cu_seqlens. `out`: gate, v and the heads.
void cpu(const Tensors& in, const Tensors& out, const Options& options, int num_threads);
// `in` as above and the gradients of those. `out`: the gradients of u, v, z, gamma and beta.
void cpu_backward(const Tensors& in, const Tensors& out, const Options& options, int num_threads);

constexpr int64_t kCudaHeads = 16;  // that a launch takes
constexpr int64_t kCudaSums = 256;  // of rows for the gradients of gamma and beta, at most

void cuda(const Tensors& in, const Tensors& out, const Options& options, int device, intptr_t stream);
// As cpu_backward, with a workspace [cuda_sums(…), 2, M, s] of float64.
void cuda_backward(const Tensors& in, const Tensors& out, const Options& options, const Tensor& sums, int device,
                   intptr_t stream);
int64_t cuda_sums(int dtype, int64_t batch, int64_t length, int64_t key_dim);

Problem make_problem(const Tensors& in, const Tensors& out, const Options& options, bool backward);

}  // namespace kx::gau_inputs
