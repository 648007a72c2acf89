// Chooses the kernel that a call's heads fit into, and launches its passes.
#include "../common/check.h"
#include "../cuda/launch.cuh"
#include "kernel.cuh"
#include "problem.h"

namespace kx::linear_attention {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T, int kInner>
void launch_kernel(const Pass& pass, Stream stream) {
  const int64_t blocks = pass.p.num_sequences * pass.segments * pass.slices * pass.heads();
  if (blocks == 0) {
    return;
  }
  KX_CHECK(blocks < (int64_t{1} << 31), "linear_attention: more blocks than a launch holds");
  const Launch how{dim3(static_cast<unsigned>(blocks)), dim3(kThreads), sizeof(Shared<T, kInner>), stream};
  launch(linear_attention_kernel<T, kInner>, how, pass);
}

template <class T>
void launch_widest(const Pass& pass, Stream stream) {
  const int64_t inner = pass.inner_keys() ? pass.p.key_dim : pass.p.value_dim;
  if (inner <= 64) {
    return launch_kernel<T, 64>(pass, stream);
  }
  if (inner <= 128) {
    return launch_kernel<T, 128>(pass, stream);
  }
  KX_CHECK(inner <= 256, "linear_attention: a head has at most 256 dimensions");
  launch_kernel<T, 256>(pass, stream);
}

void launch_role(const Pass& pass, Stream stream) {
  switch (pass.p.dtype) {
    case DType::kBFloat16:
      return launch_widest<bfloat16>(pass, stream);
    case DType::kFloat16:
      return launch_widest<float16>(pass, stream);
    default:
      KX_CHECK(pass.p.dtype == DType::kFloat32, "linear_attention: no CUDA kernel for float64");
      return launch_widest<float>(pass, stream);
  }
}

float* floats(void* p) { return static_cast<float*>(p); }
const float* floats(const void* p) { return static_cast<const float*>(p); }

}  // namespace

void cuda(const Tensors& in, const Tensors& out, const Options& options, int role, int segments, int64_t segment,
          const std::optional<Tensor>& e, const std::optional<Tensor>& sums, const std::optional<Tensor>& z_sums,
          int device, intptr_t stream) {
  const bool backward = role != static_cast<int>(Role::kOut);
  Pass pass{};
  pass.p = make_problem(in, out, options, backward);
  const Problem& p = pass.p;
  pass.role = static_cast<Role>(role);
  pass.slices = static_cast<int>(ceil_div(pass.inner_keys() ? p.value_dim : p.key_dim, kSlice));
  pass.segments = segments;
  pass.segment = segment;
  pass.e = e ? floats(e->data) : nullptr;
  pass.e_parts = e ? static_cast<int>(e->size[0]) : 0;
  pass.sums = sums ? floats(sums->data) : nullptr;
  pass.z_sums = z_sums ? floats(z_sums->data) : nullptr;
  switch (pass.role) {
    case Role::kOut:
      pass.out = p.o;
      pass.state_in = floats(p.kv0);
      pass.z_in = floats(p.z0);
      pass.state_out = floats(p.kv);
      pass.z_out = floats(p.z);
      break;
    case Role::kQueries:
    case Role::kE:
      pass.out = p.grad_q;
      pass.state_in = floats(p.kv0);
      pass.z_in = floats(p.z0);
      break;
    case Role::kKeys:
      pass.out = p.grad_k;
      pass.state_in = floats(p.grad_kv);
      pass.z_in = floats(p.grad_z);
      pass.z_out = floats(p.grad_z0);
      break;
    case Role::kValues:
      pass.out = p.grad_v;
      pass.state_in = floats(p.grad_kv);
      pass.state_out = floats(p.grad_kv0);
      break;
  }
  const DeviceGuard guard(device);
  const Stream on = (Stream)stream;  // a pointer on a GPU, a number in the emulation
  if (pass.sums != nullptr) {
    pass.sum = true;
    launch_role(pass, on);
    pass.sum = false;
  }
  launch_role(pass, on);
}

void cuda_step(const Tensors& in, const Tensors& out, const Options& options, int device, intptr_t stream) {
  const Problem p = make_problem(in, out, options, false);
  KX_CHECK(p.key_dim <= kThreads && p.value_dim <= kThreads, "linear_attention: a head has at most 256 dimensions");
  const int64_t blocks = p.num_sequences * p.kv_heads;
  if (blocks * p.length == 0) {
    return;
  }
  const DeviceGuard guard(device);
  const Launch how{dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, (Stream)stream};
  switch (p.dtype) {
    case DType::kBFloat16:
      return launch(step_kernel<bfloat16>, how, p);
    case DType::kFloat16:
      return launch(step_kernel<float16>, how, p);
    default:
      KX_CHECK(p.dtype == DType::kFloat32, "linear_attention: no CUDA kernel for float64");
      return launch(step_kernel<float>, how, p);
  }
}

}  // namespace kx::linear_attention
