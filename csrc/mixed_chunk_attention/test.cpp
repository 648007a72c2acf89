// Mixed-chunk attention's CPU kernels, and its CUDA kernels on the CPU, on random problems whose buffers end where
// their last element ends: no access past them (AddressSanitizer), no race (the race checker), every result written,
// the same bits under every schedule. Whether they are the right ones is asked in tests/test_contract.py.
#include <algorithm>
#include <cstdio>

#include "../cuda/launch.cuh"
#include "../emulation/random_problem.h"
#include "../emulation/test.h"
#include "problem.h"

namespace kx::mixed_chunk_attention {
namespace {

using gau_attention::kCudaTile;

int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

void run(int64_t number) {
  Random random(static_cast<uint64_t>(number));
  Buffers memory(random);
  // Eight problems have every dtype, bfloat16 with and without wgmma, each in the form for wide values and in the
  // other, and chunks of one tile and of two.
  const DType dtypes[] = {DType::kBFloat16, DType::kFloat16, DType::kBFloat16, DType::kFloat32};
  const DType dtype = dtypes[number % 4], operand = dtype == DType::kBFloat16 ? dtype : DType::kFloat32;
  emulation::set_wgmma(number % 4 == 2);
  const bool packed = draw(random, 0, 2) == 0, causal = toss(random);
  const int64_t kv_heads = draw(random, 1, 2), heads = kv_heads * draw(random, 1, 3 - kv_heads);
  const bool wide = number % 8 == 0 || number % 8 == 2;
  const int64_t key_dim = draw(random, 1, 70), value_dim = draw(random, wide ? 129 : 1, wide ? 270 : 100);
  const bool tall = number % 3 == 0;
  const int64_t chunk = tall ? draw(random, 130, 200) : draw(random, 30, 60);
  const int64_t length = tall ? draw(random, 129, 150) : draw(random, 0, 3 * chunk);
  const int64_t batch = packed || heads > 1 ? 1 : draw(random, 1, 2);
  std::vector<int32_t> ends{0};
  int64_t longest = packed ? 0 : length;
  while (packed && ends.size() < 4) {
    ends.push_back(static_cast<int32_t>(draw(random, ends.back(), length)));
    longest = std::max<int64_t>(longest, ends.back() - ends[ends.size() - 2]);
  }
  longest = std::min(longest, chunk);
  const int64_t sequences = packed ? static_cast<int64_t>(ends.size()) - 1 : batch;
  const Sizes q_size{batch, length, heads, key_dim}, k_size{batch, length, kv_heads, key_dim},
      v_size{batch, length, kv_heads, value_dim}, o_size{batch, length, heads, value_dim};

  Tensors in(14), out(2);
  in[0] = memory.normal(dtype, q_size);
  in[1] = memory.normal(dtype, k_size);
  in[2] = memory.normal(dtype, q_size);
  in[3] = memory.normal(dtype, k_size);
  in[4] = memory.normal(dtype, v_size);
  const bool gated = toss(random), biased = toss(random);
  if (gated) {
    in[5] = memory.normal(dtype, o_size);
  }
  const Sizes bias_size{toss(random) ? 1 : heads, 2 * std::max<int64_t>(longest, 1) - 1};
  if (biased) {
    in[6] = memory.normal(DType::kFloat32, bias_size);
  }
  for (const int row_factor : {7, 8, 9, 10}) {
    if (toss(random)) {
      in[row_factor] = memory.normal(DType::kFloat32, {batch, length});
    }
  }
  for (const int mask : {11, 12}) {
    if (toss(random)) {
      in[mask] = memory.mask(batch, length);
    }
  }
  if (packed) {
    in[13] = memory.integers(DType::kInt32, ends);
  }
  const Options options{chunk, static_cast<int>(draw(random, 0, 5)), 0.3, 0.5, 0.7, 0.2, causal};
  const auto zeros = [&](DType type, const Sizes& size) { return memory.filled(type, size, [] { return 0; }); };
  const auto results_for = [&](Tensors& to) {
    to[0] = zeros(dtype, o_size);  // rows of no sequence are the caller's
    if (gated) {
      to[1] = zeros(dtype, o_size);
    }
  };

  const int64_t chunks = cuda_chunks(batch, length, sequences, packed, chunk);
  const int64_t tiles = up(std::max<int64_t>(longest, 1), kCudaTile) / kCudaTile;
  const Sizes scores{batch, length, heads, tiles * kCudaTile}, states{chunks, kv_heads, key_dim, up(value_dim, 8)};
  const auto add_states = [&](Tensors& workspaces) {
    workspaces.push_back(memory.empty(DType::kFloat32, states));
    workspaces.push_back(operand == DType::kFloat32 ? *workspaces.back() : memory.empty(operand, states));
  };
  std::string first;
  for (uint64_t schedule = 0; schedule < kSchedules; ++schedule) {
    emulation::set_seed(static_cast<uint64_t>(number) + schedule);
    results_for(out);
    Tensors workspaces{memory.empty(operand, scores)};
    add_states(workspaces);
    cuda(in, out, options, workspaces, longest, 0, 0);
    expect_written(out, number);
    expect_same(first, bytes_of(out), number);
  }
  results_for(out);
  cpu(in, out, options, 2);
  expect_written(out, number);

  Tensors backward = in;
  backward.push_back(out[1]);
  backward.push_back(memory.normal(dtype, o_size));
  const auto gradients_for = [&] {
    Tensors gradients(7);
    gradients[0] = zeros(dtype, q_size);
    gradients[1] = zeros(dtype, k_size);
    gradients[2] = zeros(dtype, q_size);
    gradients[3] = zeros(dtype, k_size);
    gradients[4] = zeros(dtype, v_size);
    if (gated) {
      gradients[5] = memory.empty(dtype, o_size);
    }
    if (biased) {
      gradients[6] = memory.empty(DType::kFloat32, bias_size);
    }
    return gradients;
  };
  first.clear();
  for (uint64_t schedule = 0; schedule < kSchedules; ++schedule) {
    emulation::set_seed(static_cast<uint64_t>(number) + schedule);
    Tensors gradients = gradients_for();
    Tensors workspaces{memory.empty(operand, scores)};
    add_states(workspaces);
    add_states(workspaces);
    workspaces.push_back(memory.empty(operand, scores));
    workspaces.push_back(memory.empty(operand, {batch, length, heads, up(value_dim, 8)}));
    workspaces.push_back(memory.empty(operand, {batch, length, heads, up(key_dim, 8)}));
    workspaces.push_back(
        biased ? std::optional(memory.empty(DType::kFloat32, {chunks, tiles, tiles, heads, 2 * kCudaTile}))
               : std::nullopt);
    cuda_backward(backward, gradients, options, workspaces, longest, 0, 0);
    expect_written(gradients, number);
    expect_same(first, bytes_of(gradients), number);
  }
  Tensors gradients = gradients_for();
  cpu_backward(backward, gradients, options, 2);
  expect_written(gradients, number);
}

}  // namespace
}  // namespace kx::mixed_chunk_attention

int main(int argc, char** argv) {
  const int64_t problems = argc > 1 ? std::atoll(argv[1]) : 60;
  for (int64_t i = 0; i < problems; ++i) {
    kx::mixed_chunk_attention::run(i);
  }
  std::printf("%lld random problems\n", static_cast<long long>(problems));
}
