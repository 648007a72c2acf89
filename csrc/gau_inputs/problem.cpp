#include "problem.h"

#include "../common/check.h"

namespace kx::gau_inputs {

Problem make_problem(const Tensors& in, const Tensors& out, const Options& options, bool backward) {
  constexpr size_t kInputs = 10;
  KX_CHECK(in.size() >= kInputs && in[1] && in[2] && in[3], "gau_inputs: v, z and gamma are needed");
  Problem p{};
  int activation;
  std::tie(activation, p.offset, p.interleaved) = options;
  KX_CHECK(activation >= 0 && activation <= 2, "gau_inputs: no such activation");
  p.activation = static_cast<Activation>(activation);
  const Tensor &z = *in[2], &gamma = *in[3];
  KX_CHECK(z.rank == 3 && is_float(z.dtype) && in[1]->rank == 3, "gau_inputs: v and z are [B, T, width]");
  p.dtype = z.dtype;
  p.batch = z.size[0];
  p.length = z.size[1];
  p.key_dim = z.size[2];
  p.value_dim = in[1]->size[2];
  p.gate_dim = in[0] ? in[0]->size[2] : 0;
  const auto rows = [&](const std::optional<Tensor>& x, int64_t width) {
    KX_CHECK(!x || (has_shape(*x, {p.batch, p.length, width}) && x->dtype == p.dtype),
             "gau_inputs: a tensor is not [B, T, width] of z's dtype");
    return view(x);
  };
  p.u = rows(in[0], p.gate_dim);
  p.v = rows(in[1], p.value_dim);
  p.z = rows(in[2], p.key_dim);

  const DType exact = p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  p.affine_dtype = gamma.dtype;
  KX_CHECK(gamma.rank == 2 && (gamma.dtype == p.dtype || gamma.dtype == exact), "gau_inputs: gamma is [M, s]");
  p.heads = gamma.size[0];
  const auto affine = [&](const std::optional<Tensor>& x) {
    KX_CHECK(!x || (has_shape(*x, {p.heads, p.key_dim}) && x->dtype == p.affine_dtype),
             "gau_inputs: gamma and beta are [M, s] of one dtype");
    return view(x);
  };
  p.gamma = affine(in[3]);
  p.beta = affine(in[4]);

  KX_CHECK(in[5].has_value() == in[6].has_value(), "gau_inputs: cos and sin come together");
  if (in[5]) {
    const Tensor &cos = *in[5], &sin = *in[6];
    KX_CHECK(cos.rank == 2 && has_shape(sin, {cos.size[0], cos.size[1]}), "gau_inputs: cos and sin are [P, R/2]");
    KX_CHECK(is_float(cos.dtype) && sin.dtype == cos.dtype, "gau_inputs: cos and sin are of one float dtype");
    p.table_length = cos.size[0];
    p.half = cos.size[1];
    KX_CHECK(2 * p.half <= p.key_dim, "gau_inputs: R exceeds the width of z");
    p.cos = cos.data;
    p.sin = sin.data;
    p.table_dtype = cos.dtype;
    std::copy_n(cos.stride.data(), 2, p.cos_stride);
    std::copy_n(sin.stride.data(), 2, p.sin_stride);
  }
  p.num_sequences = in[9] ? in[9]->size[0] - 1 : p.batch;
  KX_CHECK(!in[9] || p.batch == 1, "gau_inputs: packed sequences are a batch of one");
  p.offsets = dense<const int64_t>(in[7], DType::kInt64, {p.num_sequences});
  if (in[8]) {
    KX_CHECK(in[8]->dtype == DType::kBool && has_shape(*in[8], {p.batch, p.length}), "gau_inputs: the mask is [B, T]");
    p.mask = static_cast<const uint8_t*>(in[8]->data);
    std::copy_n(in[8]->stride.data(), 2, p.mask_stride);
  }
  p.cu_seqlens = dense<const int32_t>(in[9], DType::kInt32, {p.num_sequences + 1});

  const Tensors results(backward ? in.begin() + kInputs : out.begin(), backward ? in.end() : out.end());
  KX_CHECK(results.size() == 2 + static_cast<size_t>(p.heads), "gau_inputs: results are a gate, values and M heads");
  p.gate = rows(results[0], p.gate_dim);
  p.values = rows(results[1], p.value_dim);
  for (auto head = results.begin() + 2; head != results.end(); ++head) {
    p.parts.push_back(rows(*head, p.key_dim));
  }
  const auto complete = [](const View& x) { return x.data != nullptr; };
  const bool rowless = p.batch * p.length == 0;  // torch has no memory for it
  KX_CHECK(rowless || ((p.u.data == nullptr || complete(p.gate)) && complete(p.values) &&
                       std::all_of(p.parts.begin(), p.parts.end(), complete)),
           "gau_inputs: a result has nowhere to go");
  if (backward) {
    KX_CHECK(out.size() == 5, "gau_inputs: there are gradients of u, v, z, gamma and beta");
    p.grad_u = rows(out[0], p.gate_dim);
    p.grad_v = rows(out[1], p.value_dim);
    p.grad_z = rows(out[2], p.key_dim);
    p.grad_gamma = affine(out[3]);
    p.grad_beta = affine(out[4]);
    KX_CHECK(out[1] && out[2] && out[3] && out[0].has_value() == in[0].has_value() &&
                 out[4].has_value() == in[4].has_value(),
             "gau_inputs: a gradient has nowhere to go");
  }
  return p;
}

}  // namespace kx::gau_inputs
