#include "problem.h"

#include "../common/check.h"

namespace kx::gau_attention {
namespace {

const uint8_t* mask(const std::optional<Tensor>& x, int64_t batch, int64_t rows, int64_t* stride) {
  if (!x) {
    return nullptr;
  }
  KX_CHECK(x->dtype == DType::kBool && has_shape(*x, {batch, rows}), "gau_attention: a mask is [B, n]");
  stride[0] = x->stride[0];
  stride[1] = x->stride[1];
  return static_cast<const uint8_t*>(x->data);
}

}  // namespace

Problem make_problem(const Tensors& in, const Tensors& out, const Options& options, bool backward) {
  KX_CHECK(in.size() == (backward ? 15u : 12u) && out.size() == (backward ? 5u : 3u),
           "gau_attention: wrong number of tensors");
  KX_CHECK(in[0] && in[1] && in[2], "gau_attention: q, k and v are needed");
  const Tensor &q = *in[0], &k = *in[1], &v = *in[2];
  KX_CHECK(q.rank == 4 && k.rank == 4 && v.rank == 4, "gau_attention: q, k and v have 4 dimensions");
  KX_CHECK(is_float(q.dtype) && k.dtype == q.dtype && v.dtype == q.dtype, "gau_attention: q, k and v are of one dtype");
  Problem p{};
  int activation;
  std::tie(activation, p.scale, p.bias_scale, p.out_scale, p.by_sum, p.causal) = options;
  KX_CHECK(activation >= 0 && activation <= 5, "gau_attention: no such activation");
  p.activation = static_cast<Activation>(activation);
  p.dtype = q.dtype;
  p.batch = q.size[0];
  p.queries = q.size[1];
  p.heads = q.size[2];
  p.key_dim = q.size[3];
  p.keys = k.size[1];
  p.kv_heads = k.size[2];
  p.value_dim = v.size[3];
  KX_CHECK(has_shape(k, {p.batch, p.keys, p.kv_heads, p.key_dim}) &&
               has_shape(v, {p.batch, p.keys, p.kv_heads, p.value_dim}),
           "gau_attention: q, k and v do not fit together");
  KX_CHECK(p.kv_heads > 0 && p.heads % p.kv_heads == 0, "gau_attention: q's heads are a multiple of k's");
  p.q = view(in[0]);
  p.k = view(in[1]);
  p.v = view(in[2]);
  const std::vector<int64_t> wide{p.batch, p.queries, p.heads, p.value_dim}, rows{p.batch, p.queries};
  const auto as_wide = [&](const std::optional<Tensor>& x, DType dtype) {
    KX_CHECK(!x || (has_shape(*x, wide) && x->dtype == dtype), "gau_attention: a tensor is not like o");
    return view(x);
  };
  const auto like_o = [&](const std::optional<Tensor>& x) { return as_wide(x, p.dtype); };
  p.gate = like_o(in[3]);

  const DType exact = p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  if (in[4]) {
    KX_CHECK(in[4]->rank == 2 && (in[4]->size[0] == 1 || in[4]->size[0] == p.heads),
             "gau_attention: bias is [H, 2M - 1]");
    p.bias_heads = in[4]->size[0];
    p.distances = in[4]->size[1];
    p.bias = dense<const void>(in[4], exact, {p.bias_heads, p.distances});
  }
  p.a = dense<const void>(in[5], exact, rows);
  p.b = dense<const void>(in[6], exact, rows);
  p.c = dense<const void>(in[7], exact, rows);
  p.query_mask = mask(in[8], p.batch, p.queries, p.query_mask_stride);
  p.key_mask = mask(in[9], p.batch, p.keys, p.key_mask_stride);
  p.num_sequences = in[10] ? in[10]->size[0] - 1 : p.batch;
  KX_CHECK(!in[10] || (p.batch == 1 && in[11]), "gau_attention: packed sequences are a batch of one");
  p.cu_seqlens = dense<const int32_t>(in[10], DType::kInt32, {p.num_sequences + 1});
  p.cu_seqlens_k = dense<const int32_t>(in[11], DType::kInt32, {p.num_sequences + 1});
  if (backward) {
    p.ungated = as_wide(in[12], p.by_sum ? exact : p.dtype);
    p.sums = dense<void>(in[13], exact, {p.batch, p.queries, p.heads});
    KX_CHECK(in[14].has_value(), "gau_attention: grad_o is needed");
    p.grad_o = like_o(in[14]);
    KX_CHECK(out[0] && out[1] && out[2], "gau_attention: the gradients have nowhere to go");
    p.grad_q = view(out[0]);
    p.grad_k = view(out[1]);
    p.grad_v = view(out[2]);
    p.grad_gate = like_o(out[3]);
    p.grad_bias = dense<void>(out[4], exact, {p.bias_heads, p.distances});
  } else {
    KX_CHECK(out[0].has_value(), "gau_attention: o has nowhere to go");
    p.o = like_o(out[0]);
    p.ungated = as_wide(out[1], p.by_sum ? exact : p.dtype);
    p.sums = dense<void>(out[2], exact, {p.batch, p.queries, p.heads});
  }
  KX_CHECK(!p.by_sum || (backward ? in[13] : out[2]).has_value(), "gau_attention: the sums of rows have nowhere to go");
  return p;
}

}  // namespace kx::gau_attention
