// One call of Nyström attention as the kernels see it. Packed sequences are a batch of one; a "sequence" is a batch
// entry or a packed sequence. Symbols are those of kx_kernels/ops/nystrom_attention/README.md.
#pragma once

#include <cstdint>
#include <tuple>

#include "../common/view.h"

namespace kx::nystrom_attention {

enum class Road : int32_t { kNystrom, kByKeys, kByQueries, kNothing };  // numbered as in presets.py
enum class Init : int { kPerMatrix, kOriginal, kPinv };

// The landmarks of each sequence. A number that is no row is of the type that arithmetic is done in.
struct Segments {
  const int64_t* bounds;  // [N, m + 1]
  const void* divisors;   // [N, m]
};

struct Problem {
  DType dtype;  // of q, k, v and o
  int64_t batch, queries, keys, heads, key_dim, value_dim;
  int64_t num_landmarks, num_sequences, taps;  // m, N, κ (0: no convolution)
  View q, k, v, o;

  const void* conv_weight;               // [heads, taps]
  const uint8_t *query_mask, *key_mask;  // [B, n_q] and [B, n_k], zero for padding, or null
  int64_t query_mask_stride[2], key_mask_stride[2];
  const int32_t* cu_seqlens;  // [N + 1], or null
  Segments of_q, of_k;
  const int32_t* road;  // [N]
  const void* inverse;  // [N, heads, m, m], or null: it is iterated

  void *landmarks_q, *landmarks_k;  // [N, heads, m, D]
  void *summary, *weighted;         // [N, heads, m, D_v]: Y and W
  void* norms;                      // [N, heads, m, 2]: of rows of B, their largest score and what they are divided by
  void* matrices;                   // [N, heads, m, m]: A, where it is all that is asked for

  // Backward.
  View grad_o, grad_q, grad_k, grad_v;
  void* grad_conv;  // as conv_weight

  Init init;
  int iterations;
  double scale, ridge;
};

// What a call passes besides its tensors: init, iterations, scale, ridge.
using Options = std::tuple<int, int, double, double>;

// `in`: q, k, v, conv_weight, query_mask, key_mask, cu_seqlens, bounds_q, divisors_q, bounds_k, divisors_k, road,
// inverse. `out`: o, landmarks_q, landmarks_k, summary, weighted, norms.
void cpu(const Tensors& in, const Tensors& out, const Options& options, int num_threads);
// `in` as above. `out`: landmarks_q, landmarks_k, and the matrices whose inverse a call needs.
void cpu_matrices(const Tensors& in, const Tensors& out, const Options& options, int num_threads);
// `in` as above and landmarks_q, landmarks_k, summary, weighted, norms, grad_o. `out`: grad_q, grad_k, grad_v,
// grad_conv.
void cpu_backward(const Tensors& in, const Tensors& out, const Options& options, int num_threads);

// Tokens, landmarks and columns that a block on a GPU has at once: its parts of rows are whole tiles.
constexpr int kCudaTile = 64;

// How rows of queries, and of keys, are cut: rows of a part, and parts of a head.
using CudaCuts = std::tuple<int64_t, int64_t, int64_t, int64_t>;

// As cpu, but for o and for what an inverse makes: landmarks_q, landmarks_k, summary, weighted and norms. Workspaces of
// float32: sums [parts of keys, m, D + D_v + 2]; and, or null, columns and scratch as below, and the inverse
// [N, heads, m, m], which is made beside the pass over keys then.
void cuda_landmarks(const Tensors& in, const Tensors& out, const Options& options, const CudaCuts& cuts,
                    const Tensors& workspaces, int device, intptr_t stream);
// As cpu_matrices, from landmarks that are there. Workspaces of float32: columns [N·heads, m], and scratch.
void cuda_matrices(const Tensors& in, const Tensors& out, const Options& options, const Tensors& workspaces, int device,
                   intptr_t stream);
// The rest of cpu: weighted and o. Workspaces as above.
void cuda(const Tensors& in, const Tensors& out, const Options& options, const CudaCuts& cuts,
          const Tensors& workspaces, int device, intptr_t stream);
// As cpu_backward. Workspaces of float32: `sums`, as many as parts of queries need, [places, m, D + D_v], and those of
// keys, [places, m, D]; of_landmarks [N·heads, m, D + D_v]; grad_summary [N·heads, m, D_v]; grad_landmarks_q and
// grad_landmarks_k [N·heads, m, D]; columns, norms [N·heads], scratch. And of float64, zeros, conv_sums [places of
// keys, κ], or null.
void cuda_backward(const Tensors& in, const Tensors& out, const Options& options, const CudaCuts& cuts,
                   const Tensors& workspaces, int device, intptr_t stream);
// Numbers of scratch that a head needs.
int64_t cuda_scratch(int64_t num_landmarks, const Options& options, bool backward, int device);
// Whether a block has shared memory enough for elements of a dtype.
bool cuda_fits(int dtype, int device);

enum class Pass { kForward, kMatrices, kBackward };

Problem make_problem(const Tensors& in, const Tensors& out, const Options& options, Pass pass);

}  // namespace kx::nystrom_attention
