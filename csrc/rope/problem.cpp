#include "problem.h"

#include <algorithm>

#include "../common/check.h"

namespace kx::rope {
namespace {

bool is_float(DType dtype) { return dtype != DType::kInt32 && dtype != DType::kInt64; }

void set_table(const Tensor& table, int64_t stride[3]) {
  const int b = table.rank - 3;  // index of the batch dimension, or -1
  stride[0] = b >= 0 && table.size[b] > 1 ? table.stride[b] : 0;
  stride[1] = table.stride[b + 1];
  stride[2] = table.stride[b + 2];
}

}  // namespace

Problem make_problem(const std::vector<Tensor>& in, const std::vector<Tensor>& out, const Tensor& cos,
                     const Tensor& sin, const std::optional<Tensor>& positions, const std::optional<Tensor>& offsets,
                     const std::optional<Tensor>& cu_seqlens, int64_t offset, int64_t start, bool interleaved,
                     bool inverse) {
  KX_CHECK(in.size() == out.size() && (in.size() == 1 || in.size() == 2), "rope: expected one or two tensors");
  const int rank = cu_seqlens ? 3 : 4;
  Problem p{};
  p.num_operands = static_cast<int>(in.size());
  p.dtype = in[0].dtype;
  KX_CHECK(is_float(p.dtype), "rope: x has to be a float tensor");
  for (int i = 0; i < p.num_operands; ++i) {
    KX_CHECK(in[i].rank == rank && out[i].rank == rank, "rope: x has the wrong number of dimensions");
    KX_CHECK(in[i].dtype == p.dtype && out[i].dtype == p.dtype, "rope: dtypes differ");
    const auto* size = in[i].size.data();
    KX_CHECK(std::equal(size, size + rank, out[i].size.data()), "rope: the output has another shape than its input");
    KX_CHECK(std::equal(size, size + rank - 2, in[0].size.data()) && size[rank - 1] == in[0].size[rank - 1],
             "rope: q and k differ in more than their heads");
    Operand& x = p.x[i];
    x = {in[i].data, out[i].data, size[rank - 2], {}, {}};
    for (int d = 0; d < rank; ++d) {
      x.in_stride[4 - rank + d] = in[i].stride[d];
      x.out_stride[4 - rank + d] = out[i].stride[d];
    }
  }
  p.batch = cu_seqlens ? 1 : in[0].size[0];
  p.length = in[0].size[rank - 3];
  p.head_dim = in[0].size[rank - 1];

  KX_CHECK((cos.rank == 2 || cos.rank == 3) && cos.rank == sin.rank, "rope: cos and sin have 2 or 3 dimensions");
  KX_CHECK(std::equal(cos.size.data(), cos.size.data() + cos.rank, sin.size.data()),
           "rope: cos and sin differ in shape");
  KX_CHECK(cos.dtype == sin.dtype && is_float(cos.dtype), "rope: cos and sin are of one float dtype");
  p.cos = cos.data;
  p.sin = sin.data;
  p.table_dtype = cos.dtype;
  p.table_length = cos.size[cos.rank - 2];
  p.half = cos.size[cos.rank - 1];
  p.start = start;
  set_table(cos, p.cos_stride);
  set_table(sin, p.sin_stride);
  KX_CHECK(start >= 0 && start + 2 * p.half <= p.head_dim, "rope: start + R exceeds the head");

  p.num_sequences = cu_seqlens ? cu_seqlens->size[0] - 1 : p.batch;
  if (cu_seqlens) {
    KX_CHECK(cu_seqlens->rank == 1 && cu_seqlens->dtype == DType::kInt32, "rope: cu_seqlens is a vector of int32");
    p.cu_seqlens = static_cast<const int32_t*>(cu_seqlens->data);
    p.cu_seqlens_stride = cu_seqlens->stride[0];
  }
  KX_CHECK(cos.rank == 2 || cos.size[0] == 1 || cos.size[0] == p.num_sequences, "rope: the tables' batch does not fit");

  p.offset = offset;
  if (positions) {
    KX_CHECK(positions->rank == rank - 2 && !is_float(positions->dtype), "rope: positions are integers, one per token");
    KX_CHECK(positions->size[rank - 3] == p.length && (rank == 3 || positions->size[0] == p.batch),
             "rope: positions are one per token");
    p.positions = positions->data;
    p.position_dtype = positions->dtype;
    p.position_stride[0] = rank == 4 ? positions->stride[0] : 0;
    p.position_stride[1] = positions->stride[rank - 3];
  } else if (offsets) {
    KX_CHECK(offsets->rank == 1 && offsets->size[0] == p.num_sequences && !is_float(offsets->dtype),
             "rope: offsets are integers, one per sequence");
    p.offsets = offsets->data;
    p.position_dtype = offsets->dtype;
    p.offset_stride = offsets->stride[0];
  }
  p.interleaved = interleaved;
  p.inverse = inverse;
  return p;
}

}  // namespace kx::rope
