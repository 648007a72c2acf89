// The CPU kernels of a gated attention's inputs, and its CUDA kernels on the CPU, on random problems whose buffers end
// where their last element ends: no access past them (AddressSanitizer), no race (the race checker), every result
// written, the same bits under every schedule. Whether they are the right ones is asked in tests/test_contract.py.
#include <algorithm>
#include <cstdio>

#include "../cuda/launch.cuh"
#include "../emulation/random_problem.h"
#include "../emulation/test.h"
#include "problem.h"

namespace kx::gau_inputs {
namespace {

void run(int64_t number) {
  Random random(static_cast<uint64_t>(number));
  Buffers memory(random);
  const DType dtypes[] = {DType::kBFloat16, DType::kFloat16, DType::kFloat32, DType::kFloat64};
  const DType dtype = dtypes[number % 4], exact = dtype == DType::kFloat64 ? dtype : DType::kFloat32;
  const DType affine_dtype = toss(random) ? exact : dtype;
  const bool even = toss(random);  // rows of whole vectors
  const auto width = [&](int64_t most) { return even ? 16 * draw(random, 1, most / 16) : draw(random, 1, most); };
  const int64_t heads = draw(random, 1, 4), key_dim = number % 8 == 7 ? 1030 : width(96);  // more than threads
  const int64_t gate_dim = toss(random) ? width(700) : 0, value_dim = width(700);
  const bool packed = toss(random), turned = toss(random);
  const int64_t length = draw(random, 0, 70), batch = packed ? 1 : draw(random, 0, 2);
  std::vector<int32_t> ends{static_cast<int32_t>(draw(random, 0, length))};
  while (packed && toss(random)) {
    ends.push_back(static_cast<int32_t>(draw(random, ends.back(), length)));
  }
  const int64_t sequences = packed ? static_cast<int64_t>(ends.size()) - 1 : batch;
  const auto rows = [&](int64_t n) { return Sizes{batch, length, n}; };

  Tensors in(10);
  if (gate_dim > 0) {
    in[0] = memory.normal(dtype, rows(gate_dim));
  }
  in[1] = memory.normal(dtype, rows(value_dim));
  in[2] = memory.normal(dtype, rows(key_dim));
  in[3] = memory.normal(affine_dtype, {heads, key_dim});
  if (toss(random)) {
    in[4] = memory.normal(affine_dtype, {heads, key_dim});
  }
  if (turned) {
    const int64_t half = even ? 8 * draw(random, 0, key_dim / 16) : draw(random, 0, key_dim / 2);
    const DType table_dtype = dtypes[draw(random, 0, 3)];
    in[5] = memory.normal(table_dtype, {length, half});  // too short for some offsets
    in[6] = memory.normal(table_dtype, {length, half});
    if (toss(random)) {
      std::vector<int64_t> offsets(static_cast<size_t>(sequences));
      std::generate(offsets.begin(), offsets.end(), [&] { return draw(random, -5, 5); });
      in[7] = memory.integers(DType::kInt64, offsets);
    }
  }
  if (toss(random)) {
    in[8] = memory.mask(batch, length);
  }
  if (packed) {
    in[9] = memory.integers(DType::kInt32, ends);
  }
  const Options options{static_cast<int>(draw(random, 0, 2)), 0, toss(random)};
  const auto results_for = [&](auto&& make) {
    Tensors out(2);
    if (gate_dim > 0) {
      out[0] = make(rows(gate_dim));
    }
    out[1] = make(rows(value_dim));
    for (int64_t m = 0; m < heads; ++m) {
      out.push_back(make(rows(key_dim)));
    }
    return out;
  };
  const auto empty = [&](const Sizes& size) { return memory.empty(dtype, size); };

  std::string first;
  for (uint64_t schedule = 0; schedule < kSchedules; ++schedule) {
    emulation::set_seed(static_cast<uint64_t>(number) + schedule);
    const Tensors out = results_for(empty);
    cuda(in, out, options, 0, 0);
    expect_written(out, number);
    expect_same(first, bytes_of(out), number);
  }
  const Tensors out = results_for(empty);
  cpu(in, out, options, 2);
  expect_written(out, number);

  Tensors backward = in;
  for (const auto& grad : results_for([&](const Sizes& size) { return memory.normal(dtype, size); })) {
    backward.push_back(grad);
  }
  const auto gradients_for = [&] {
    Tensors gradients(5);
    for (size_t i = 0; i < 3; ++i) {
      if (in[i]) {
        gradients[i] = memory.empty(dtype, rows(in[i]->size[2]));
      }
    }
    for (size_t i = 3; i < 5; ++i) {
      if (in[i]) {
        gradients[i] = memory.empty(affine_dtype, {heads, key_dim});
      }
    }
    return gradients;
  };
  const Sizes sums{cuda_sums(static_cast<int>(dtype), batch, length, key_dim), 2, heads, key_dim};
  first.clear();
  for (uint64_t schedule = 0; schedule < kSchedules; ++schedule) {
    emulation::set_seed(static_cast<uint64_t>(number) + schedule);
    const Tensors gradients = gradients_for();
    cuda_backward(backward, gradients, options, memory.empty(DType::kFloat64, sums), 0, 0);
    expect_written(gradients, number);
    expect_same(first, bytes_of(gradients), number);
  }
  const Tensors gradients = gradients_for();
  cpu_backward(backward, gradients, options, 2);
  expect_written(gradients, number);
}

}  // namespace
}  // namespace kx::gau_inputs

int main(int argc, char** argv) {
  const int64_t problems = argc > 1 ? std::atoll(argv[1]) : 100;
  for (int64_t i = 0; i < problems; ++i) {
    kx::gau_inputs::run(i);
  }
  std::printf("%lld random problems\n", static_cast<long long>(problems));
}
