// One call of rope as the kernels see it: addresses, sizes and strides, with packed sequences as a batch of one.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "../common/tensor.h"

namespace kx::rope {

// q or k, and where its rotation goes; strides of b, t, h, d in elements. `in` may equal `out`, element for element.
struct Operand {
  const void* in;
  void* out;
  int64_t heads;
  int64_t in_stride[4];
  int64_t out_stride[4];
};

struct Problem {
  Operand x[2];
  int num_operands;
  DType dtype;
  int64_t batch;     // 1 for packed sequences
  int64_t length;    // T, or total
  int64_t head_dim;  // D
  int64_t half;      // R/2
  int64_t start;     // first rotated dimension

  const void* cos;
  const void* sin;
  DType table_dtype;
  int64_t table_length;   // P
  int64_t cos_stride[3];  // b (0 for tables that all sequences share), position, pair
  int64_t sin_stride[3];

  const void* positions;  // [B, T], or null
  const void* offsets;    // [B], or null
  DType position_dtype;   // of positions and offsets
  int64_t position_stride[2];
  int64_t offset_stride;
  int64_t offset;  // where positions and offsets are null

  const int32_t* cu_seqlens;  // [num_sequences + 1], or null
  int64_t cu_seqlens_stride;
  int64_t num_sequences;

  bool interleaved;
  bool inverse;
};

Problem make_problem(const std::vector<Tensor>& in, const std::vector<Tensor>& out, const Tensor& cos,
                     const Tensor& sin, const std::optional<Tensor>& positions, const std::optional<Tensor>& offsets,
                     const std::optional<Tensor>& cu_seqlens, int64_t offset, int64_t start, bool interleaved,
                     bool inverse);

// The entry points that bindings.cpp exports.
void cpu(const std::vector<Tensor>& in, const std::vector<Tensor>& out, const Tensor& cos, const Tensor& sin,
         const std::optional<Tensor>& positions, const std::optional<Tensor>& offsets,
         const std::optional<Tensor>& cu_seqlens, int64_t offset, int64_t start, bool interleaved, bool inverse,
         int num_threads);

void cuda(const std::vector<Tensor>& in, const std::vector<Tensor>& out, const Tensor& cos, const Tensor& sin,
          const std::optional<Tensor>& positions, const std::optional<Tensor>& offsets,
          const std::optional<Tensor>& cu_seqlens, int64_t offset, int64_t start, bool interleaved, bool inverse,
          int device, intptr_t stream);

}  // namespace kx::rope
