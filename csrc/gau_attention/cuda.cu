// Cuts a call into panels that the workspace has room for, and launches their passes.
#include <algorithm>

#include "../common/check.h"
#include "../cuda/launch.cuh"
#include "forms.cuh"
#include "kernel.cuh"
#include "problem.h"

namespace kx::gau_attention {
namespace {

Problem checked(const Tensors& in, const Tensors& out, const Options& options, bool backward) {
  const Problem p = make_problem(in, out, options, backward);
  constexpr int64_t kMost = int64_t{1} << 30;
  KX_CHECK(p.queries < kMost && p.keys < kMost, "gau_attention: a sequence has fewer than 2^30 tokens");
  KX_CHECK(p.key_dim < kMost && p.value_dim < kMost, "gau_attention: a head has fewer than 2^30 dimensions");
  return p;
}

int64_t elements(const Tensor& x) {
  int64_t n = 1;
  for (int d = 0; d < x.rank; ++d) {
    n *= x.size[d];
  }
  return n;
}

}  // namespace

int64_t cuda_tiles(int64_t batch, int64_t rows, int64_t sequences, bool packed) {
  return packed ? rows / kTile + sequences : batch * up(rows, kTile);
}

bool cuda_fits(int dtype, int device) {
  const DeviceGuard guard(device);
  const size_t bytes = static_cast<DType>(dtype) == DType::kBFloat16 ? sizeof(Shared<Form<bfloat16, kTile, false>>)
                                                                     : sizeof(Shared<Form<float, kTile, false>>);
  return bytes <= max_shared_bytes();
}

void cuda(const Tensors& in, const Tensors& out, const Options& options, const Tensor& scores, int64_t keys, int device,
          intptr_t stream) {
  Pass pass{};
  pass.p = checked(in, out, options, false);
  const Problem& p = pass.p;
  pass.scores = scores.data;
  pass.pitch = up(std::max<int64_t>(keys, 1), kTile) * kTile;
  pass.keys = static_cast<int>(keys);
  const int64_t tasks = cuda_tiles(p.batch, p.queries, p.num_sequences, p.cu_seqlens != nullptr) * p.heads;
  const int64_t room = elements(scores) / (kTile * pass.pitch);
  KX_CHECK(room > 0, "gau_attention: the workspace holds no tile");
  const DeviceGuard guard(device);
  const Stream on = (Stream)stream;  // a pointer on a GPU, a number in the emulation
  with_forms(p.dtype, p.value_dim, [&](auto square, auto wide) {
    using Square = decltype(square);
    using Wide = decltype(wide);
    for (pass.first = 0; pass.first < tasks; pass.first += room) {
      pass.tiles = static_cast<int>(std::min(room, tasks - pass.first));
      start(gau_scores_kernel<Square, false>, pass, pass.tiles * up(keys, kTile), sizeof(Shared<Square>), on);
      start(gau_out_kernel<Wide>, pass, pass.tiles * up(p.value_dim, Wide::kColumns), sizeof(Shared<Wide>), on);
    }
  });
}

void cuda_backward(const Tensors& in, const Tensors& out, const Options& options, const Tensors& workspaces,
                   int64_t keys, int64_t panel, int device, intptr_t stream) {
  Pass pass{};
  pass.p = checked(in, out, options, true);
  const Problem& p = pass.p;
  KX_CHECK(workspaces.size() == 6 && workspaces[0] && workspaces[1] && workspaces[2] && workspaces[3],
           "gau_attention: a workspace is missing");
  KX_CHECK(panel > 0 && panel % kTile == 0, "gau_attention: a panel is whole tiles");
  const auto data = [&](size_t i) { return workspaces[i] ? workspaces[i]->data : nullptr; };
  pass.scores = data(0);
  pass.grads = data(1);
  pass.g = data(2);
  pass.g_pitch = workspaces[2]->size[3];
  pass.shift = static_cast<float*>(data(3));
  pass.grad_queries = static_cast<float*>(data(4));
  pass.diagonals = static_cast<float*>(data(5));
  pass.pitch = panel;
  pass.keys = static_cast<int>(panel);
  pass.tiles = static_cast<int>(cuda_tiles(p.batch, p.queries, p.num_sequences, p.cu_seqlens != nullptr));
  KX_CHECK(pass.grad_queries != nullptr || keys <= panel, "gau_attention: several panels need their sums");
  const DeviceGuard guard(device);
  const Stream on = (Stream)stream;
  with_forms(p.dtype, p.value_dim, [&](auto square, auto wide) {
    using Square = decltype(square);
    using Wide = decltype(wide);
    start(gau_prepare_kernel<typename Square::T>, pass, up(p.batch * p.queries * p.heads, kWarps), 0, on);
    const int64_t key_blocks = p.num_sequences * p.kv_heads * (panel / kTile), slices = up(p.key_dim, kTile);
    for (pass.first = 0; pass.first == 0 || pass.first < keys; pass.first += panel) {
      pass.last = pass.first + panel >= keys;
      start(gau_scores_kernel<Square, true>, pass, pass.tiles * p.heads * (panel / kTile), sizeof(Shared<Square>), on);
      start(gau_values_kernel<Wide>, pass, key_blocks * up(p.value_dim, Wide::kColumns), sizeof(Shared<Wide>), on);
      start(gau_rows_kernel<Square>, pass, (pass.tiles * p.heads + key_blocks) * slices, sizeof(Shared<Square>), on);
      if (p.grad_bias != nullptr) {
        start(gau_bias_kernel, pass, up(p.bias_heads * p.distances, kThreads), 0, on);
      }
    }
  });
}

}  // namespace kx::gau_attention
