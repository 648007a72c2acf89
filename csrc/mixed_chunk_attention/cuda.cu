// Launches the passes of a call, through workspaces that are linear in its length.
#include "../common/check.h"
#include "../gau_attention/forms.cuh"
#include "kernel.cuh"
#include "problem.h"

namespace kx::mixed_chunk_attention {
namespace {

// A pass with the workspaces that both directions have. workspaces: scores, S of chunks, sums of S.
Pass make_pass(const Tensors& in, const Tensors& out, const Options& options, const Tensors& workspaces,
               int64_t longest, bool backward) {
  Pass pass{};
  pass.p = make_problem(in, out, options, backward);
  const Problem& p = pass.p;
  constexpr int64_t kMost = int64_t{1} << 30;
  KX_CHECK(p.queries < kMost, "mixed_chunk_attention: a sequence has fewer than 2^30 tokens");
  KX_CHECK(p.key_dim < kMost && p.value_dim < kMost, "mixed_chunk_attention: a head has fewer than 2^30 dimensions");
  KX_CHECK(workspaces.size() == (backward ? 9u : 3u), "mixed_chunk_attention: wrong number of workspaces");
  for (size_t i = 0; i < workspaces.size() - (backward ? 1 : 0); ++i) {
    KX_CHECK(workspaces[i].has_value(), "mixed_chunk_attention: a workspace is missing");
  }
  pass.scores = workspaces[0]->data;
  pass.pitch = workspaces[0]->size[3];
  pass.s = {static_cast<float*>(workspaces[1]->data), workspaces[2]->data};
  pass.value_pitch = workspaces[1]->size[3];
  pass.chunks = static_cast<int>(workspaces[1]->size[0]);
  pass.longest = static_cast<int>(longest);
  KX_CHECK(pass.pitch % kTile == 0 && longest <= pass.pitch, "mixed_chunk_attention: a row of scores is whole tiles");
  KX_CHECK(pass.chunks >= cuda_chunks(p.batch, p.queries, p.num_sequences, p.cu_seqlens != nullptr, p.chunk),
           "mixed_chunk_attention: too few places for chunks");
  return pass;
}

// Blocks with four neighbours of one kind of states to a thread.
int64_t chain_blocks(const Pass& pass, int kinds) {
  const Problem& p = pass.p;
  return up(kinds * p.num_sequences * p.kv_heads * p.key_dim * pass.value_pitch / 4, kThreads);
}

}  // namespace

int64_t cuda_chunks(int64_t batch, int64_t rows, int64_t sequences, bool packed, int64_t chunk) {
  return packed ? rows / chunk + sequences : batch * up(rows, chunk);
}

void cuda(const Tensors& in, const Tensors& out, const Options& options, const Tensors& workspaces, int64_t longest,
          int device, intptr_t stream) {
  const Pass pass = make_pass(in, out, options, workspaces, longest, false);
  const Problem& p = pass.p;
  const DeviceGuard guard(device);
  const Stream on = (Stream)stream;  // a pointer on a GPU, a number in the emulation
  with_forms(p.dtype, p.value_dim, [&](auto square, auto wide) {
    using Square = decltype(square);
    using Wide = decltype(wide);
    const int64_t tiles = int64_t{pass.chunks} * pass.tiles() * p.heads, slices = up(p.value_dim, Wide::kColumns);
    start(mixed_scores_kernel<Square, false>, pass, tiles * pass.tiles(), sizeof(Shared<Square>), on);
    start(mixed_states_kernel<Wide, false>, pass, pass.chunks * p.kv_heads * up(p.key_dim, kTile) * slices,
          sizeof(Shared<Wide>), on);
    start(mixed_chain_kernel<typename Square::T>, pass, chain_blocks(pass, 1), 0, on);
    start(mixed_out_kernel<Wide>, pass, tiles * slices, sizeof(Shared<Wide>), on);
  });
}

void cuda_backward(const Tensors& in, const Tensors& out, const Options& options, const Tensors& workspaces,
                   int64_t longest, int device, intptr_t stream) {
  Pass pass = make_pass(in, out, options, workspaces, longest, true);
  const Problem& p = pass.p;
  pass.u = {static_cast<float*>(workspaces[3]->data), workspaces[4]->data};
  pass.grads = workspaces[5]->data;
  pass.g = workspaces[6]->data;
  pass.lin_q = workspaces[7]->data;
  pass.key_pitch = workspaces[7]->size[3];
  pass.diagonals = workspaces[8] ? static_cast<float*>(workspaces[8]->data) : nullptr;
  KX_CHECK(p.grad_bias == nullptr || pass.diagonals != nullptr, "mixed_chunk_attention: a bias needs its diagonals");
  const DeviceGuard guard(device);
  const Stream on = (Stream)stream;
  with_forms(p.dtype, p.value_dim, [&](auto square, auto wide) {
    using Square = decltype(square);
    using Wide = decltype(wide);
    const int64_t tiles = int64_t{pass.chunks} * pass.tiles(), slices = up(p.value_dim, Wide::kColumns);
    start(mixed_prepare_kernel<typename Square::T>, pass, up(p.batch * p.queries * p.heads, kWarps), 0, on);
    start(mixed_scores_kernel<Square, true>, pass, tiles * p.heads * pass.tiles(), sizeof(Shared<Square>), on);
    start(mixed_states_kernel<Wide, true>, pass, 2 * pass.chunks * p.kv_heads * up(p.key_dim, kTile) * slices,
          sizeof(Shared<Wide>), on);
    start(mixed_chain_kernel<typename Square::T>, pass, chain_blocks(pass, 2), 0, on);
    start(mixed_values_kernel<Wide>, pass, tiles * p.kv_heads * slices, sizeof(Shared<Wide>), on);
    start(mixed_rows_kernel<Square>, pass, 2 * tiles * (p.heads + p.kv_heads) * up(p.key_dim, kTile),
          sizeof(Shared<Square>), on);
    if (p.grad_bias != nullptr) {
      start(mixed_bias_kernel, pass, up(p.bias_heads * p.distances, kWarps), 0, on);
    }
  });
}

}  // namespace kx::mixed_chunk_attention
