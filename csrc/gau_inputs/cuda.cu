// Divides the rows of u, v and z among blocks, and launches.
#include "../cuda/launch.cuh"
#include "kernel.cuh"
#include "problem.h"

namespace kx::gau_inputs {
namespace {

constexpr int64_t kMost = int64_t{1} << 30;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kBFloat16:
      return f(bfloat16{});
    case DType::kFloat16:
      return f(float16{});
    default:
      return f(float{});
  }
}

// Threads that share a row of n vectors: so many that few of them have none in the last round.
int threads_for(int64_t n) {
  int threads = n < 32 ? 1 : 32;
  while (threads < kThreads && (n < 32 ? threads < n : n % (2 * threads) == 0)) {
    threads *= 2;
  }
  return threads;
}

Wide wide(const Rows& p, const View& in, const View& grad, const View& out, int64_t width) {
  KX_CHECK(width < kMost, "gau_inputs: a row has fewer than 2^30 elements");
  Wide x{in, grad, out, static_cast<int>(width), 1, in.wide && out.wide && (grad.wide || grad.data == nullptr), 0};
  const int64_t elements = x.vectors ? 16 / size_of(p.dtype) : 1;
  x.threads = threads_for(width < elements ? width : width / elements);
  x.blocks = width == 0 ? 0 : p.batch * ceil_div(p.length, kThreads / x.threads * kRows);
  return x;
}

// Threads that share a row of z, whatever its strides.
int threads_of_z(DType dtype, int64_t key_dim) {
  KX_CHECK(key_dim < kMost, "gau_inputs: a head has fewer than 2^30 dimensions");
  int64_t elements = 0;
  with_type(dtype, [&](auto example) { elements = 2 * kWide<decltype(example)>; });
  const int64_t units = ceil_div(key_dim, elements);
  return static_cast<int>(units < kThreads ? units : kThreads);
}

Plan make_plan(const Problem& p, bool backward) {
  KX_CHECK(p.heads <= kCudaHeads, "gau_inputs: more heads than a launch takes");
  Plan plan{};
  plan.p = p;
  const View none{};
  plan.wide[0] = wide(p, p.u, backward ? p.gate : none, backward ? p.grad_u : p.gate, p.gate_dim);
  plan.wide[1] = wide(p, p.v, backward ? p.values : none, backward ? p.grad_v : p.values, p.value_dim);
  plan.threads = threads_of_z(p.dtype, p.key_dim);
  plan.tiles = p.batch * ceil_div(p.length, kThreads / plan.threads);
  plan.head_blocks = backward && plan.tiles > kCudaSums ? kCudaSums : plan.tiles;
  with_type(p.dtype, [&](auto example) {
    constexpr int64_t kElements = kWide<decltype(example)>;
    plan.vectors = p.key_dim % (2 * kElements) == 0 && p.half % kElements == 0 && p.z.wide;
    plan.wide_affine =
        rope::wide_angles(p.gamma.data, p.affine_dtype, p.gamma.stride, 1, kElements) &&
        (p.beta.data == nullptr || rope::wide_angles(p.beta.data, p.affine_dtype, p.beta.stride, 1, kElements));
    plan.wide_tables = rope::wide_angles(p.cos, p.table_dtype, p.cos_stride, 1, kElements) &&
                       rope::wide_angles(p.sin, p.table_dtype, p.sin_stride, 1, kElements);
  });
  for (size_t m = 0; m < p.parts.size(); ++m) {
    plan.parts[m] = p.parts[m];
    plan.vectors = plan.vectors && p.parts[m].wide;
  }
  plan.vectors = plan.vectors && (!backward || p.grad_z.wide);
  return plan;
}

template <class Kernel>
void start(Kernel* kernel, const Plan& plan, int64_t blocks, Stream stream) {
  KX_CHECK(blocks < (int64_t{1} << 31), "gau_inputs: more blocks than a launch holds");
  if (blocks > 0) {
    launch(kernel, {dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream}, plan);
  }
}

int64_t blocks_of(const Plan& plan) { return plan.head_blocks + plan.wide[0].blocks + plan.wide[1].blocks; }

}  // namespace

int64_t cuda_sums(int dtype, int64_t batch, int64_t length, int64_t key_dim) {
  const int64_t tiles = batch * ceil_div(length, kThreads / threads_of_z(static_cast<DType>(dtype), key_dim));
  return tiles < kCudaSums ? tiles : kCudaSums;
}

void cuda(const Tensors& in, const Tensors& out, const Options& options, int device, intptr_t stream) {
  const Problem p = make_problem(in, out, options, false);
  const Plan plan = make_plan(p, false);
  const DeviceGuard guard(device);
  const Stream on = (Stream)stream;  // a pointer on a GPU, a number in the emulation
  with_type(p.dtype, [&](auto example) { start(gau_inputs_kernel<decltype(example)>, plan, blocks_of(plan), on); });
}

void cuda_backward(const Tensors& in, const Tensors& out, const Options& options, const Tensor& sums, int device,
                   intptr_t stream) {
  const Problem p = make_problem(in, out, options, true);
  Plan plan = make_plan(p, true);
  KX_CHECK(has_shape(sums, {plan.head_blocks, 2, p.heads, p.key_dim}), "gau_inputs: sums are [blocks, 2, M, s]");
  plan.sums = dense<double>(sums, DType::kFloat64, {plan.head_blocks, 2, p.heads, p.key_dim});
  const DeviceGuard guard(device);
  const Stream on = (Stream)stream;
  with_type(p.dtype,
            [&](auto example) { start(gau_inputs_backward_kernel<decltype(example)>, plan, blocks_of(plan), on); });
  const int64_t columns = 2 * p.heads * p.key_dim;
  with_type(p.affine_dtype, [&](auto example) {
    start(gau_inputs_sum_kernel<decltype(example)>, plan, ceil_div(columns, kSummed), on);
  });
}

}  // namespace kx::gau_inputs
