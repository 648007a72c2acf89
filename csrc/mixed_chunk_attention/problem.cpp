#include "problem.h"

#include "../common/check.h"

namespace kx::mixed_chunk_attention {

Problem make_problem(const Tensors& in, const Tensors& out, const Options& options, bool backward) {
  KX_CHECK(in.size() == (backward ? 16u : 14u) && out.size() == (backward ? 7u : 2u),
           "mixed_chunk_attention: wrong number of tensors");
  const auto [chunk, activation, scale, bias_scale, out_scale, lin_scale, causal] = options;
  KX_CHECK(chunk > 0, "mixed_chunk_attention: a chunk has tokens");
  const std::optional<Tensor> none;
  Tensors local{in[0], in[1], in[4], in[5], in[6], in[7], in[8], in[9], in[11], in[12], in[13], in[13]};
  if (backward) {
    local.insert(local.end(), {in[14], none, in[15]});
  }
  const Tensors local_out = backward ? Tensors{out[0], out[1], out[4], out[5], out[6]} : Tensors{out[0], out[1], none};
  Problem p{};
  static_cast<gau_attention::Problem&>(p) = gau_attention::make_problem(
      local, local_out, {activation, scale, bias_scale, out_scale, false, causal}, backward);
  KX_CHECK(p.keys == p.queries, "mixed_chunk_attention: queries and keys are of the same tokens");
  p.chunk = chunk;
  p.lin_scale = lin_scale;
  const auto like = [&](const std::optional<Tensor>& x, int64_t heads) {
    KX_CHECK(x && has_shape(*x, {p.batch, p.queries, heads, p.key_dim}) && x->dtype == p.dtype,
             "mixed_chunk_attention: lin_q and lin_k are like quad_q and quad_k");
    return view(x);
  };
  p.lin_q = like(in[2], p.heads);
  p.lin_k = like(in[3], p.kv_heads);
  p.d = dense<const void>(in[10], p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32, {p.batch, p.queries});
  if (backward) {
    p.grad_lin_q = like(out[2], p.heads);
    p.grad_lin_k = like(out[3], p.kv_heads);
  }
  return p;
}

}  // namespace kx::mixed_chunk_attention
