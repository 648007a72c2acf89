// Linear attention's CPU kernels, and its CUDA kernels on the CPU, on random problems whose buffers end where their
// last element ends: no access past them (AddressSanitizer), no race (the race checker), every result written, the same
// bits under every schedule. Whether they are the right ones is asked in tests/test_contract.py.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "../cuda/launch.cuh"
#include "../emulation/random_problem.h"
#include "../emulation/test.h"
#include "problem.h"

namespace kx::linear_attention {
namespace {

void run(int64_t number) {
  Random random(static_cast<uint64_t>(number));
  Buffers memory(random);
  // Few problems have every dtype, and bfloat16 with and without wgmma.
  const DType dtypes[] = {DType::kBFloat16, DType::kFloat16, DType::kBFloat16, DType::kFloat32};
  const DType dtype = dtypes[number % 4];
  emulation::set_wgmma(number % 4 == 2);
  const bool packed = draw(random, 0, 3) == 0, causal = draw(random, 0, 3) != 0, normalize = toss(random);
  const int64_t kv_heads = draw(random, 1, 2), heads = kv_heads * draw(random, 1, 2);
  const bool large = draw(random, 0, 5) == 0;
  const int64_t key_dim = draw(random, 1, large ? 256 : 66), value_dim = draw(random, 1, large ? 256 : 66);
  const int64_t length = draw(random, 0, large ? 40 : 100), batch = packed ? 1 : draw(random, 1, 2);
  std::vector<int32_t> ends{0};
  while (packed && ends.back() < length) {
    ends.push_back(static_cast<int32_t>(draw(random, ends.back(), length)));
  }
  const int64_t sequences = packed ? static_cast<int64_t>(ends.size()) - 1 : batch;
  const Sizes q_size{batch, length, heads, key_dim}, k_size{batch, length, kv_heads, key_dim},
      v_size{batch, length, kv_heads, value_dim}, o_size{batch, length, heads, value_dim},
      kv_size{sequences, kv_heads, key_dim, value_dim}, z_size{sequences, kv_heads, key_dim};

  Tensors in(12), out(4);
  in[0] = memory.normal(dtype, q_size);
  in[1] = memory.normal(dtype, k_size);
  in[2] = memory.normal(dtype, v_size);
  if (causal && toss(random)) {
    in[3] =
        memory.filled(DType::kFloat64, {kv_heads}, [&] { return std::uniform_real_distribution<>(0.5, 1)(random); });
  }
  if (key_dim > 1 && toss(random)) {
    const int64_t half = draw(random, 1, key_dim / 2);
    in[4] = memory.normal(DType::kFloat32, {length + 3, half});
    in[5] = memory.normal(DType::kFloat32, {length + 3, half});
    if (toss(random)) {
      std::vector<int64_t> offsets(static_cast<size_t>(sequences));
      std::generate(offsets.begin(), offsets.end(), [&] { return draw(random, -5, 3); });
      in[6] = memory.integers(DType::kInt64, offsets);
    }
  }
  if (toss(random)) {
    in[7] = memory.mask(batch, length);
  }
  if (packed) {
    in[8] = memory.integers(DType::kInt32, ends);
  }
  const bool has_state = toss(random);
  if (has_state) {
    in[9] = memory.normal(DType::kFloat32, kv_size);
    if (normalize) {
      in[10] = memory.normal(DType::kFloat32, z_size);
    }
  }
  out[0] = memory.empty(dtype, o_size);
  out[2] = memory.empty(DType::kFloat32, kv_size);
  if (normalize) {
    out[1] = memory.empty(DType::kFloat32, {batch, length, heads});
    out[3] = memory.empty(DType::kFloat32, z_size);
  }
  const Options options{static_cast<int>(draw(random, 0, 4)), 0.5, normalize, 0.5, 0.3, causal, toss(random), 0};
  const int segments = static_cast<int>(draw(random, 1, 3));
  const int64_t segment = std::max<int64_t>(1, (length + 64 * segments - 1) / (64 * segments)) * 64;

  // As _native.py cuts them, and in the narrower form where there are two.
  const bool narrow = toss(random);
  const auto slice_for = [&](int64_t inner, int64_t columns) {
    return dtype == DType::kBFloat16 && inner <= 128 && columns > 64 && !narrow ? 128 : 64;
  };
  const auto pass = [&](const Tensors& from, const Tensors& to, int part, const std::optional<Tensor>& e) {
    const int64_t inner = part == 0 ? key_dim : part == 2 ? std::max(key_dim, value_dim) : value_dim;
    const int64_t columns = part == 0 ? value_dim : part == 2 ? std::min(key_dim, value_dim) : key_dim;
    const int slice = slice_for(inner, columns), cut = slice == 128 || inner > 64 ? inner > 128 ? 256 : 128 : 64;
    std::optional<Tensor> sums, z_sums;
    if (segments > 1 || !causal) {
      const int64_t key_slices = (key_dim + slice - 1) / slice, value_slices = (value_dim + slice - 1) / slice;
      const int64_t slices = part == 0 ? value_slices : part == 2 ? key_slices + value_slices : key_slices;
      sums = memory.empty(DType::kFloat32, {sequences * segments * kv_heads * slices * cut * slice});
      z_sums = memory.empty(DType::kFloat32, {sequences * segments * kv_heads * slices * std::max(cut, slice)});
    }
    cuda(from, to, options, part, cut, slice, segments, segment, e, sums, z_sums, 0, 0);
  };
  const auto gradients_for = [&] {
    Tensors gradients(6);
    gradients[0] = memory.empty(dtype, q_size);
    gradients[1] = memory.empty(dtype, k_size);
    gradients[2] = memory.empty(dtype, v_size);
    if (has_state) {
      gradients[3] = memory.empty(DType::kFloat32, kv_size);
      if (normalize) {
        gradients[4] = memory.empty(DType::kFloat32, z_size);
      }
    }
    return gradients;
  };

  emulation::set_seed(static_cast<uint64_t>(number));
  pass(in, out, 0, std::nullopt);
  expect_written(out, number);
  cpu(in, out, options, 2);

  Tensors backward = in;
  backward.push_back(out[1]);
  backward.push_back(memory.normal(dtype, o_size));
  backward.push_back(toss(random) ? std::optional(memory.normal(DType::kFloat32, kv_size)) : std::nullopt);
  backward.push_back(normalize && toss(random) ? std::optional(memory.normal(DType::kFloat32, z_size)) : std::nullopt);
  const int64_t query_slice = slice_for(value_dim, key_dim), parts = (key_dim + query_slice - 1) / query_slice;
  std::string first;
  for (uint64_t schedule = 0; schedule < kSchedules; ++schedule) {
    emulation::set_seed(static_cast<uint64_t>(number) + schedule);
    Tensors gradients = gradients_for();
    std::optional<Tensor> e;
    if (normalize) {
      e = memory.empty(DType::kFloat32, {parts, batch, length, heads});
      if (parts > 1) {
        pass(backward, gradients, 3, e);
      }
    }
    for (const int part : {1, 2}) {
      pass(backward, gradients, part, e);
    }
    expect_written(gradients, number);
    expect_same(first, bytes_of(gradients), number);
  }
  Tensors gradients = gradients_for();
  if (normalize) {
    gradients[5] = memory.empty(DType::kFloat32, {batch, length, heads});
  }
  cpu_backward(backward, gradients, options, 2);
  expect_written(gradients, number);
  if (has_state && causal && !packed) {  // the first tokens, in the place of the states
    for (std::optional<Tensor>* x : {&in[0], &in[1], &in[2], &in[7], &out[0]}) {
      if (*x) {
        (*x)->size[1] = std::min<int64_t>(length, 3);
      }
    }
    out[1] = std::nullopt;
    out[2] = in[9];
    out[3] = in[10];
    cpu(in, out, options, 2);
    cuda_step(in, out, options, 0, 0);
  }
}

}  // namespace
}  // namespace kx::linear_attention

int main(int argc, char** argv) {
  const int64_t problems = argc > 1 ? std::atoll(argv[1]) : 60;
  for (int64_t i = 0; i < problems; ++i) {
    kx::linear_attention::run(i);
  }
  std::printf("%lld random problems\n", static_cast<long long>(problems));
}
