#include "problem.h"

#include "../common/check.h"

namespace kx::linear_attention {
Problem make_problem(const Tensors& in, const Tensors& out, const Options& options, bool backward) {
  KX_CHECK(in.size() == (backward ? 16u : 12u) && out.size() == (backward ? 6u : 4u),
           "linear_attention: wrong number of tensors");
  KX_CHECK(in[0] && in[1] && in[2], "linear_attention: q, k and v are needed");
  const Tensor &q = *in[0], &k = *in[1], &v = *in[2];
  KX_CHECK(q.rank == 4 && k.rank == 4 && v.rank == 4, "linear_attention: q, k and v have 4 dimensions");
  KX_CHECK(is_float(q.dtype) && k.dtype == q.dtype && v.dtype == q.dtype,
           "linear_attention: q, k and v are of one dtype");
  Problem p{};
  int feature;
  std::tie(feature, p.stabilizer, p.normalize, p.eps, p.scale, p.causal, p.interleaved, p.offset) = options;
  KX_CHECK(feature >= 0 && feature <= 4, "linear_attention: no such feature map");
  p.feature = static_cast<Feature>(feature);
  p.dtype = q.dtype;
  p.batch = q.size[0];
  p.length = q.size[1];
  p.heads = q.size[2];
  p.kv_heads = k.size[2];
  p.key_dim = q.size[3];
  p.value_dim = v.size[3];
  KX_CHECK(has_shape(k, {p.batch, p.length, p.kv_heads, p.key_dim}) &&
               has_shape(v, {p.batch, p.length, p.kv_heads, p.value_dim}),
           "linear_attention: q, k and v do not fit together");
  KX_CHECK(p.kv_heads > 0 && p.heads % p.kv_heads == 0, "linear_attention: q's heads are a multiple of k's");
  p.q = view(in[0]);
  p.k = view(in[1]);
  p.v = view(in[2]);

  const DType exact = p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  p.num_sequences = in[8] ? in[8]->size[0] - 1 : p.batch;
  KX_CHECK(!in[8] || p.batch == 1, "linear_attention: packed sequences are a batch of one");
  p.cu_seqlens = dense<const int32_t>(in[8], DType::kInt32, {p.num_sequences + 1});
  p.decay = dense<const double>(in[3], DType::kFloat64, {p.kv_heads});
  p.offsets = dense<const int64_t>(in[6], DType::kInt64, {p.num_sequences});
  if (in[7]) {
    KX_CHECK(in[7]->dtype == DType::kBool && has_shape(*in[7], {p.batch, p.length}),
             "linear_attention: mask is [B, T]");
    p.mask = static_cast<const uint8_t*>(in[7]->data);
    p.mask_stride[0] = in[7]->stride[0];
    p.mask_stride[1] = in[7]->stride[1];
  }
  if (in[4]) {
    const Tensor &cos = *in[4], &sin = *in[5];
    KX_CHECK(cos.rank == 2 && is_float(cos.dtype) && sin.dtype == cos.dtype &&
                 has_shape(sin, {cos.size[0], cos.size[1]}) && 2 * cos.size[1] <= p.key_dim,
             "linear_attention: cos and sin are [P, R/2]");
    p.cos = cos.data;
    p.sin = sin.data;
    p.table_dtype = cos.dtype;
    p.table_length = cos.size[0];
    p.half = cos.size[1];
    std::copy_n(cos.stride.data(), 2, p.cos_stride);
    std::copy_n(sin.stride.data(), 2, p.sin_stride);
  }
  p.slots = dense<const int64_t>(in[11], DType::kInt64, {p.num_sequences});
  const int64_t states = in[11] && in[9] ? in[9]->size[0] : p.num_sequences;
  const std::vector<int64_t> kv{states, p.kv_heads, p.key_dim, p.value_dim};
  const std::vector<int64_t> z{states, p.kv_heads, p.key_dim};
  const std::vector<int64_t> rows{p.batch, p.length, p.heads};
  p.kv0 = dense<const void>(in[9], exact, kv);
  p.z0 = dense<const void>(in[10], exact, z);
  if (backward) {
    p.denominator = dense<void>(in[12], exact, rows);
    KX_CHECK(in[13] && has_shape(*in[13], {p.batch, p.length, p.heads, p.value_dim}) && in[13]->dtype == p.dtype,
             "linear_attention: grad_o has the wrong shape");
    p.grad_o = view(in[13]);
    p.grad_kv = dense<const void>(in[14], exact, kv);
    p.grad_z = dense<const void>(in[15], exact, z);
    KX_CHECK(out[0] && out[1] && out[2], "linear_attention: the gradients have nowhere to go");
    p.grad_q = view(out[0]);
    p.grad_k = view(out[1]);
    p.grad_v = view(out[2]);
    p.grad_kv0 = dense<void>(out[3], exact, kv);
    p.grad_z0 = dense<void>(out[4], exact, z);
    p.grad_denominator = dense<void>(out[5], exact, rows);
    KX_CHECK(!p.normalize || in[12], "linear_attention: a normalised backward pass needs the denominators");
  } else {
    KX_CHECK(out[0] && has_shape(*out[0], {p.batch, p.length, p.heads, p.value_dim}) && out[0]->dtype == p.dtype,
             "linear_attention: o has the wrong shape");
    p.o = view(out[0]);
    p.denominator = dense<void>(out[1], exact, rows);
    p.kv = dense<void>(out[2], exact, kv);
    p.z = dense<void>(out[3], exact, z);
  }
  return p;
}

}  // namespace kx::linear_attention
