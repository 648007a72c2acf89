#include "problem.h"

#include "../common/check.h"

namespace kx::nystrom_attention {
namespace {

const uint8_t* mask(const std::optional<Tensor>& x, int64_t batch, int64_t rows, int64_t* stride) {
  if (!x) {
    return nullptr;
  }
  KX_CHECK(x->dtype == DType::kBool && has_shape(*x, {batch, rows}), "nystrom_attention: a mask is [B, n]");
  stride[0] = x->stride[0];
  stride[1] = x->stride[1];
  return static_cast<const uint8_t*>(x->data);
}

}  // namespace

Problem make_problem(const Tensors& in, const Tensors& out, const Options& options, Pass pass) {
  const bool backward = pass == Pass::kBackward;
  KX_CHECK(in.size() == (backward ? 19u : 13u), "nystrom_attention: wrong number of tensors");
  KX_CHECK(out.size() == (pass == Pass::kForward ? 6u
                          : backward             ? 4u
                                                 : 3u),
           "nystrom_attention: wrong number of results");
  KX_CHECK(in[0] && in[1] && in[2], "nystrom_attention: q, k and v are needed");
  const Tensor &q = *in[0], &k = *in[1], &v = *in[2];
  KX_CHECK(q.rank == 4 && k.rank == 4 && v.rank == 4, "nystrom_attention: q, k and v have 4 dimensions");
  KX_CHECK(is_float(q.dtype) && k.dtype == q.dtype && v.dtype == q.dtype,
           "nystrom_attention: q, k and v are of one dtype");
  Problem p{};
  int init;
  std::tie(init, p.iterations, p.scale, p.ridge) = options;
  KX_CHECK(init >= 0 && init <= 2 && p.iterations >= 0, "nystrom_attention: no such inverse");
  p.init = static_cast<Init>(init);
  p.dtype = q.dtype;
  p.batch = q.size[0];
  p.queries = q.size[1];
  p.heads = q.size[2];
  p.key_dim = q.size[3];
  p.keys = k.size[1];
  p.value_dim = v.size[3];
  KX_CHECK(has_shape(k, {p.batch, p.keys, p.heads, p.key_dim}) && has_shape(v, {p.batch, p.keys, p.heads, p.value_dim}),
           "nystrom_attention: q, k and v do not fit together");
  p.q = view(in[0]);
  p.k = view(in[1]);
  p.v = view(in[2]);

  const DType exact = p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  if (in[3]) {
    KX_CHECK(in[3]->rank == 2 && in[3]->size[1] > 0 && p.queries == p.keys,
             "nystrom_attention: a convolution is [H, k] and as long as the queries");
    p.taps = in[3]->size[1];
    p.conv_weight = dense<const void>(in[3], exact, {p.heads, p.taps});
  }
  p.query_mask = mask(in[4], p.batch, p.queries, p.query_mask_stride);
  p.key_mask = mask(in[5], p.batch, p.keys, p.key_mask_stride);
  p.num_sequences = in[6] ? in[6]->size[0] - 1 : p.batch;
  KX_CHECK(!in[6] || (p.batch == 1 && p.queries == p.keys), "nystrom_attention: packed sequences are a batch of one");
  p.cu_seqlens = dense<const int32_t>(in[6], DType::kInt32, {p.num_sequences + 1});
  KX_CHECK(in[7] && in[8] && in[9] && in[10] && in[11] && in[8]->rank == 2, "nystrom_attention: tables are needed");
  p.num_landmarks = in[8]->size[1];
  KX_CHECK(p.num_landmarks > 0, "nystrom_attention: landmarks are needed");
  const std::vector<int64_t> bounds{p.num_sequences, p.num_landmarks + 1}, landmarks{p.num_sequences, p.num_landmarks};
  p.of_q = {dense<const int64_t>(in[7], DType::kInt64, bounds), dense<const void>(in[8], exact, landmarks)};
  p.of_k = {dense<const int64_t>(in[9], DType::kInt64, bounds), dense<const void>(in[10], exact, landmarks)};
  p.road = dense<const int32_t>(in[11], DType::kInt32, {p.num_sequences});
  const auto of_head = [&](std::vector<int64_t> sizes) {
    sizes.insert(sizes.begin(), {p.num_sequences, p.heads, p.num_landmarks});
    return sizes;
  };
  p.inverse = dense<const void>(in[12], exact, of_head({p.num_landmarks}));

  const auto take = [&](const Tensors& from, size_t at, const std::vector<int64_t>& sizes) {
    KX_CHECK(from[at].has_value(), "nystrom_attention: a tensor is missing");
    return dense<void>(from[at], exact, of_head(sizes));
  };
  if (pass == Pass::kMatrices) {
    p.landmarks_q = take(out, 0, {p.key_dim});
    p.landmarks_k = take(out, 1, {p.key_dim});
    p.matrices = take(out, 2, {p.num_landmarks});
    return p;
  }
  KX_CHECK((p.init == Init::kPinv) == in[12].has_value(), "nystrom_attention: pinv needs its inverse");
  const Tensors& kept = backward ? in : out;
  const size_t first = backward ? 13 : 1;
  p.landmarks_q = take(kept, first, {p.key_dim});
  p.landmarks_k = take(kept, first + 1, {p.key_dim});
  p.summary = take(kept, first + 2, {p.value_dim});
  p.weighted = take(kept, first + 3, {p.value_dim});
  p.norms = take(kept, first + 4, {2});
  const auto like_o = [&](const std::optional<Tensor>& x) {
    KX_CHECK(x && has_shape(*x, {p.batch, p.queries, p.heads, p.value_dim}) && x->dtype == p.dtype,
             "nystrom_attention: a tensor is not like o");
    return view(x);
  };
  if (backward) {
    p.grad_o = like_o(in[18]);
    KX_CHECK(out[0] && out[1] && out[2], "nystrom_attention: the gradients have nowhere to go");
    p.grad_q = view(out[0]);
    p.grad_k = view(out[1]);
    p.grad_v = view(out[2]);
    p.grad_conv = dense<void>(out[3], exact, {p.heads, p.taps});
    KX_CHECK(out[3].has_value() == in[3].has_value(), "nystrom_attention: the convolution's gradient has no place");
  } else {
    p.o = like_o(out[0]);
  }
  return p;
}

}  // namespace kx::nystrom_attention
