// Gated attention's CPU kernels, and its CUDA kernels on the CPU, on random problems whose buffers end where their last
// element ends: no access past them (AddressSanitizer), no race (the race checker), every result written, the same bits
// under every schedule. Whether they are the right ones is asked in tests/test_contract.py.
#include <algorithm>
#include <cstdio>

#include "../cuda/launch.cuh"
#include "../emulation/random_problem.h"
#include "../emulation/test.h"
#include "problem.h"

namespace kx::gau_attention {
namespace {

void run(int64_t number) {
  Random random(static_cast<uint64_t>(number));
  Buffers memory(random);
  // Twelve problems have every dtype, bfloat16 with and without wgmma, each forward on chip, in panels and with scores
  // that stay, and of bfloat16 a packed sequence of several tiles, which is on chip backward too.
  const DType dtypes[] = {DType::kBFloat16, DType::kFloat16, DType::kBFloat16, DType::kFloat32};
  const DType dtype = dtypes[number % 4], operand = dtype == DType::kBFloat16 ? dtype : DType::kFloat32;
  const bool wide = number % 2 == 0;  // the form for wide values is bfloat16's
  const int64_t form = number / 4 % 3;
  const bool fused = form == 0, resident = form == 2, tall = fused && wide;
  emulation::set_wgmma(number % 4 == 2);
  const bool packed = !resident && (tall || draw(random, 0, 2) == 0), causal = toss(random), by_sum = toss(random);
  const int64_t kv_heads = tall ? 1 : draw(random, 1, 2), heads = kv_heads * draw(random, 1, tall ? 1 : 2);
  // The copy engine reads rows of a multiple of 16 bytes.
  const int64_t step = number % 4 == 2 && draw(random, 0, 3) != 0 ? 8 : 1;
  const auto whole = [&](int64_t dim) { return (dim + step - 1) / step * step; };
  const int64_t key_dim = whole(draw(random, tall ? 65 : 1, tall ? 90 : 70));
  const int64_t value_dim = whole(resident ? draw(random, 129, 600) : draw(random, wide ? 129 : 1, wide ? 270 : 100));
  const int64_t queries = tall ? draw(random, 140, 150) : draw(random, 0, 140);
  const int64_t keys = packed ? queries : draw(random, 0, resident ? 190 : 140);
  const int64_t batch = packed ? 1 : draw(random, 1, 2);
  std::vector<int32_t> ends{0};
  if (tall) {
    ends = {0, 3, 3, static_cast<int32_t>(queries - 2)};
  }
  while (packed && ends.back() < queries) {
    ends.push_back(static_cast<int32_t>(draw(random, ends.back(), queries)));
  }
  int64_t longest = packed ? 0 : keys;
  for (size_t i = 1; i < ends.size(); ++i) {
    longest = std::max<int64_t>(longest, ends[i] - ends[i - 1]);
  }
  const int64_t sequences = packed ? static_cast<int64_t>(ends.size()) - 1 : batch;
  const Sizes q_size{batch, queries, heads, key_dim}, k_size{batch, keys, kv_heads, key_dim},
      v_size{batch, keys, kv_heads, value_dim}, o_size{batch, queries, heads, value_dim}, rows{batch, queries, heads};

  Tensors in(12), out(3);
  in[0] = memory.normal(dtype, q_size);
  in[1] = memory.normal(dtype, k_size);
  in[2] = memory.normal(dtype, v_size);
  const bool gated = toss(random), biased = !tall && toss(random);
  if (gated) {
    in[3] = memory.normal(dtype, o_size);
  }
  const Sizes bias_size{toss(random) ? 1 : heads, 2 * std::max<int64_t>({queries, keys, 1}) - 1};
  if (biased) {
    in[4] = memory.normal(DType::kFloat32, bias_size);
  }
  for (const int row_factor : {5, 6, 7}) {
    if (toss(random)) {
      in[row_factor] = memory.normal(DType::kFloat32, {batch, queries});
    }
  }
  if (toss(random)) {
    in[8] = memory.mask(batch, queries);
  }
  if (toss(random)) {
    in[9] = memory.mask(batch, keys);
  }
  if (packed) {
    in[10] = memory.integers(DType::kInt32, ends);
    in[11] = in[10];
  }
  const Options options{static_cast<int>(draw(random, 0, 5)), 0.3, 0.5, 0.7, by_sum, causal};
  const auto results_for = [&](Tensors& to) {
    to[0] = memory.filled(dtype, o_size, [] { return 0; });  // rows of no sequence are the caller's
    if (gated || by_sum) {
      to[1] = memory.filled(by_sum ? DType::kFloat32 : dtype, o_size, [] { return 0; });
    }
    if (by_sum) {
      to[2] = memory.filled(DType::kFloat32, rows, [] { return 0; });
    }
  };

  const int64_t tiles = cuda_tiles(batch, queries, sequences, packed);
  const int64_t pitch = std::max<int64_t>(1, (longest + kCudaTile - 1) / kCudaTile) * kCudaTile;
  const int64_t room = std::max<int64_t>(1, toss(random) ? 1 : tiles * heads);
  const bool cut = fused && toss(random);  // keys, into segments
  const int64_t segments = (keys + kCudaTile - 1) / kCudaTile;
  std::string first;
  for (uint64_t schedule = 0; schedule < kSchedules; ++schedule) {
    emulation::set_seed(static_cast<uint64_t>(number) + schedule);
    results_for(out);
    if (resident) {
      const int64_t columns = cuda_resident_form(static_cast<int>(dtype), key_dim, 0)[2];
      cuda_resident(in, out, options, draw(random, 1, (value_dim + columns - 1) / columns), 0, 0);
    } else if (fused) {
      const auto parts = [&](const Sizes& size) {
        return cut ? std::optional(memory.empty(DType::kFloat32, size)) : std::nullopt;
      };
      cuda_fused(in, out, options, parts({segments, batch, queries, heads, (value_dim + 3) / 4 * 4}),
                 parts({segments, batch, queries, heads}), kCudaTile * (cut ? 1 : std::max<int64_t>(segments, 1)), 0,
                 0);
    } else {
      cuda(in, out, options, memory.empty(operand, {room * kCudaTile * pitch}), longest, 0, 0);
    }
    expect_written(out, number);
    expect_same(first, bytes_of(out), number);
  }
  results_for(out);
  cpu(in, out, options, 2);
  expect_written(out, number);

  Tensors backward = in;
  backward.push_back(out[1]);
  backward.push_back(out[2]);
  backward.push_back(memory.normal(dtype, o_size));
  const auto gradients_for = [&] {
    Tensors gradients(5);
    const auto zeros = [&](DType type, const Sizes& size) { return memory.filled(type, size, [] { return 0; }); };
    gradients[0] = zeros(dtype, q_size);
    gradients[1] = zeros(dtype, k_size);
    gradients[2] = zeros(dtype, v_size);
    if (gated) {
      gradients[3] = memory.empty(dtype, o_size);
    }
    if (biased) {
      gradients[4] = zeros(DType::kFloat32, bias_size);
    }
    return gradients;
  };
  const bool on_chip = packed && !biased && fused;
  const int64_t panel = !on_chip && toss(random) ? kCudaTile : pitch, g_pitch = (value_dim + 7) / 8 * 8;
  first.clear();
  for (uint64_t schedule = 0; schedule < kSchedules; ++schedule) {
    emulation::set_seed(static_cast<uint64_t>(number) + schedule);
    Tensors gradients = gradients_for();
    const auto panels = [&] {
      return on_chip ? std::nullopt : std::optional(memory.empty(operand, {batch, queries, heads, panel}));
    };
    const Tensors workspaces{
        panels(),
        panels(),
        memory.empty(operand, {batch, queries, heads, g_pitch}),
        memory.empty(DType::kFloat32, rows),
        memory.empty(DType::kFloat32, q_size),
        biased ? std::optional(memory.empty(DType::kFloat32, {tiles, heads, panel / kCudaTile, 2 * kCudaTile}))
               : std::nullopt};
    cuda_backward(backward, gradients, options, workspaces, longest, panel, 0, 0);
    expect_written(gradients, number);
    expect_same(first, bytes_of(gradients), number);
  }
  Tensors gradients = gradients_for();
  cpu_backward(backward, gradients, options, 2);
  expect_written(gradients, number);
}

}  // namespace
}  // namespace kx::gau_attention

int main(int argc, char** argv) {
  const int64_t problems = argc > 1 ? std::atoll(argv[1]) : 60;
  for (int64_t i = 0; i < problems; ++i) {
    kx::gau_attention::run(i);
  }
  std::printf("%lld random problems\n", static_cast<long long>(problems));
}
