// Nyström attention's CPU kernels, and its CUDA kernels on the CPU, on random problems whose buffers end where their
// last element ends: no access past them (AddressSanitizer), no race (the race checker), every result written, the same
// bits on every number of threads and under every schedule. Whether they are the right ones is asked in
// tests/test_contract.py.
#include <cstdio>

#include "../cuda/launch.cuh"
#include "../emulation/random_problem.h"
#include "../emulation/test.h"
#include "problem.h"

namespace kx::nystrom_attention {
namespace {

constexpr uint64_t kSchedules = emulation::kInstrumented ? 1 : 2;  // races are found under any

struct Table {
  std::vector<int64_t> bounds, valid;
  std::vector<double> divisors;
};

// Landmarks of about as many rows that are no padding, for sequences that end at `ends`.
Table lay_out(const std::vector<int32_t>& ends, const std::optional<Tensor>& mask, bool packed, int64_t rows,
              int64_t m) {
  Table table;
  for (size_t n = 0; n + 1 < ends.size(); ++n) {
    const uint8_t* const keep =
        mask ? static_cast<const uint8_t*>(mask->data) + (packed ? 0 : static_cast<int64_t>(n) * rows) : nullptr;
    const int64_t last = packed ? ends[n + 1] : rows;
    std::vector<int64_t> kept;
    for (int64_t row = packed ? ends[n] : 0; row < last; ++row) {
      if (keep == nullptr || keep[row] != 0) {
        kept.push_back(row);
      }
    }
    const auto count = static_cast<int64_t>(kept.size());
    table.valid.push_back(count);
    for (int64_t i = 0; i <= m; ++i) {
      const int64_t rank = count * i / m;
      table.bounds.push_back(rank < count ? kept[static_cast<size_t>(rank)] : last);
      if (i < m) {
        table.divisors.push_back(static_cast<double>(count * (i + 1) / m - rank));
      }
    }
  }
  return table;
}

// The CUDA kernels of a problem [B, n, H, D], where they serve its dtype.
struct OnCuda {
  Random& random;
  Buffers& memory;
  const Tensors& in;
  const Options& options;
  int64_t sequences;

  CudaCuts cuts() {
    const auto cut = [&](const Tensor& x, int64_t span) {
      return in[6] ? x.size[1] / span + sequences : (x.size[1] + span - 1) / span;
    };
    const int64_t span_q = kCudaTile * draw(random, 1, 2), span_k = kCudaTile * draw(random, 1, 2);
    return {span_q, cut(*in[0], span_q), span_k, cut(*in[1], span_k)};
  }
  int64_t places(int64_t parts) const { return in[0]->size[0] * in[0]->size[2] * parts; }
  int64_t units() const { return sequences * in[0]->size[2]; }
  int64_t m() const { return in[8]->size[1]; }
  Tensor floats(const Sizes& sizes) { return memory.empty(DType::kFloat32, sizes); }
  Tensors matrices(bool backward) {
    return {floats({units(), m()}), floats({units(), cuda_scratch(m(), options, backward, 0)})};
  }

  // beside: the inverse is made before keys are met.
  void forward(const Tensors& out, const CudaCuts& how, bool beside) {
    Tensors first = in;
    first[12].reset();
    const int64_t numbers = in[0]->size[3] + in[2]->size[3] + 2;
    Tensors workspaces = matrices(false);
    workspaces.insert(workspaces.begin(), floats({places(std::get<3>(how)), m(), numbers}));
    const Tensor matrix = floats({sequences, in[0]->size[2], m(), m()});
    const Tensors alone{workspaces[0], std::nullopt, std::nullopt, std::nullopt};
    workspaces.push_back(matrix);
    cuda_landmarks(first, out, options, how, beside ? workspaces : alone, 0, 0);
    Tensors second = in;
    Options last = options;
    if (beside) {
      second[12] = matrix;
      std::get<0>(last) = static_cast<int>(Init::kPinv);
    } else if (in[12]) {
      cuda_matrices(first, {out[1], out[2], matrix}, options, matrices(false), 0, 0);
      expect_written({matrix}, 0);
    }
    cuda(second, out, last, how, matrices(false), 0, 0);
  }
  void backward(const Tensors& all, const Tensors& gradients, const CudaCuts& how) {
    const int64_t dim = in[0]->size[3], value_dim = in[2]->size[3];
    const int64_t of_q = places(std::get<1>(how)), of_k = places(std::get<3>(how));
    const Tensors memory_of_matrices = matrices(true);
    std::optional<Tensor> conv_sums;
    if (in[3]) {
      conv_sums = memory.filled(DType::kFloat64, {of_k, in[3]->size[1]}, [] { return 0; });
    }
    const Tensors workspaces{floats({std::max(of_q * (dim + value_dim), of_k * dim) * m()}),
                             floats({units(), m(), dim + value_dim}),
                             floats({units(), m(), value_dim}),
                             floats({units(), m(), dim}),
                             floats({units(), m(), dim}),
                             memory_of_matrices[0],
                             floats({units()}),
                             memory_of_matrices[1],
                             conv_sums};
    cuda_backward(all, gradients, options, how, workspaces, 0, 0);
    conv_sums_bytes = bytes_of({conv_sums});
  }

  std::string conv_sums_bytes;
};

void run(int64_t number) {
  Random random(static_cast<uint64_t>(number));
  Buffers memory(random);
  const DType dtypes[] = {DType::kBFloat16, DType::kFloat16, DType::kFloat32, DType::kFloat64};
  const DType dtype = dtypes[number % 4], exact = dtype == DType::kFloat64 ? dtype : DType::kFloat32;
  const bool packed = draw(random, 0, 2) == 0;
  const int64_t batch = packed ? 1 : draw(random, 0, 2), heads = draw(random, 1, 2);
  // Of some problems the landmarks or the dimensions are more than a block has at once.
  const auto size = [&](bool many, int64_t few) { return draw(random, many ? kCudaTile + 1 : 1, many ? 90 : few); };
  const int64_t m = size(number % 5 == 0, 20);
  const int64_t key_dim = size(number % 6 == 1, 40), value_dim = size(number % 6 == 2, 40);
  const int64_t queries = draw(random, 0, 150), keys = packed || toss(random) ? queries : draw(random, 0, 150);
  std::vector<int32_t> ends{0};
  while (static_cast<int64_t>(ends.size()) <= (packed ? draw(random, 0, 3) : batch)) {
    ends.push_back(static_cast<int32_t>(draw(random, ends.back(), queries)));
  }
  const int64_t sequences = static_cast<int64_t>(ends.size()) - 1;
  const Sizes q_size{batch, queries, heads, key_dim}, k_size{batch, keys, heads, key_dim},
      v_size{batch, keys, heads, value_dim}, o_size{batch, queries, heads, value_dim};
  const auto of_head = [&](int64_t width) { return Sizes{sequences, heads, m, width}; };

  Tensors in(13);
  in[0] = memory.normal(dtype, q_size);
  in[1] = memory.normal(dtype, k_size);
  in[2] = memory.normal(dtype, v_size);
  const int64_t taps = queries == keys && toss(random) ? 2 * draw(random, 0, 20) + 1 : 0;
  if (taps > 0) {
    in[3] = memory.normal(exact, {heads, taps});
  }
  if (toss(random)) {
    in[4] = memory.mask(batch, queries);
  }
  if (toss(random)) {
    in[5] = memory.mask(batch, keys);
  }
  if (packed) {
    in[6] = memory.integers(DType::kInt32, ends);
  }
  const Table of_q = lay_out(ends, in[4], packed, queries, m), of_k = lay_out(ends, in[5], packed, keys, m);
  const auto numbers = [&](const std::vector<double>& values) {
    size_t i = 0;
    return memory.filled(exact, {sequences, m}, [&] { return values[i++]; });
  };
  const auto bounds = [&](const Table& table) {
    Tensor x = memory.integers(DType::kInt64, table.bounds);
    x.rank = 2;
    x.size[0] = sequences;
    x.size[1] = m + 1;
    x.stride[0] = m + 1;
    x.stride[1] = 1;
    return x;
  };
  in[7] = bounds(of_q);
  in[8] = numbers(of_q.divisors);
  in[9] = bounds(of_k);
  in[10] = numbers(of_k.divisors);
  std::vector<int32_t> road;
  for (size_t n = 0; n < of_q.valid.size(); ++n) {
    const Road taken = of_q.valid[n] == 0 || of_k.valid[n] == 0 ? Road::kNothing
                       : of_k.valid[n] <= m                     ? Road::kByKeys
                       : of_q.valid[n] <= m                     ? Road::kByQueries
                                                                : Road::kNystrom;
    road.push_back(static_cast<int32_t>(taken));
  }
  in[11] = memory.integers(DType::kInt32, road);
  const Options options{static_cast<int>(draw(random, 0, 2)), 2, 0.3, toss(random) ? 0.1 : 0.0};
  const bool pinv = std::get<0>(options) == static_cast<int>(Init::kPinv);
  if (pinv) {
    const Tensors matrices{memory.empty(exact, of_head(key_dim)), memory.empty(exact, of_head(key_dim)),
                           memory.empty(exact, of_head(m))};
    cpu_matrices(in, matrices, options, 2);
    in[12] = memory.normal(exact, of_head(m));  // as if it were theirs
  }

  Tensors out;
  const auto results = [&](const Tensor& o) {
    return Tensors{o,
                   memory.empty(exact, of_head(key_dim)),
                   memory.empty(exact, of_head(key_dim)),
                   memory.empty(exact, of_head(value_dim)),
                   memory.empty(exact, of_head(value_dim)),
                   memory.empty(exact, of_head(2))};
  };
  // Rows of no sequence are the caller's.
  const auto zeros = [&](const Sizes& size) { return memory.filled(dtype, size, [] { return 0; }); };
  std::string first;
  OnCuda gpu{random, memory, in, options, sequences, {}};
  const bool on_cuda = dtype != DType::kFloat64 && sequences > 0;
  const CudaCuts cuts = gpu.cuts();
  const bool beside = !pinv && toss(random);
  for (uint64_t schedule = 0; on_cuda && schedule < kSchedules; ++schedule) {
    emulation::set_seed(static_cast<uint64_t>(number) + schedule);
    out = results(zeros(o_size));
    gpu.forward(out, cuts, beside);
    expect_written(out, number);
    expect_same(first, bytes_of(out), number);
  }
  first.clear();
  for (const int threads : {1, 3}) {
    out = results(memory.empty(dtype, o_size));
    cpu(in, out, options, threads);
    expect_written({out[0]}, number);
    expect_same(first, bytes_of({out[0]}), number);
  }
  Tensors backward = in;
  backward.insert(backward.end(), out.begin() + 1, out.end());
  backward.push_back(memory.normal(dtype, o_size));
  first.clear();
  for (uint64_t schedule = 0; on_cuda && schedule < kSchedules; ++schedule) {
    emulation::set_seed(static_cast<uint64_t>(number) + schedule);
    const Tensors gradients{zeros(q_size), zeros(k_size), zeros(v_size),
                            taps > 0 ? std::optional(memory.empty(exact, {heads, taps})) : std::nullopt};
    gpu.backward(backward, gradients, cuts);
    expect_written({gradients[0], gradients[1], gradients[2]}, number);
    expect_same(first, bytes_of({gradients[0], gradients[1], gradients[2]}) + gpu.conv_sums_bytes, number);
  }
  first.clear();
  for (const int threads : {1, 3}) {
    const Tensors gradients{memory.empty(dtype, q_size), memory.empty(dtype, k_size), memory.empty(dtype, v_size),
                            taps > 0 ? std::optional(memory.empty(exact, {heads, taps})) : std::nullopt};
    cpu_backward(backward, gradients, options, threads);
    expect_written(gradients, number);
    expect_same(first, bytes_of(gradients), number);
  }
}

}  // namespace
}  // namespace kx::nystrom_attention

int main(int argc, char** argv) {
  const int64_t problems = argc > 1 ? std::atoll(argv[1]) : 60;
  for (int64_t i = 0; i < problems; ++i) {
    kx::nystrom_attention::run(i);
  }
  std::printf("%lld random problems\n", static_cast<long long>(problems));
}
