// Chooses the kernel that a call's heads fit into, and launches its passes.
#include <algorithm>

#include "../common/check.h"
#include "../cuda/launch.cuh"
#include "kernel.cuh"
#include "problem.h"

namespace kx::linear_attention {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
float* floats(void* p) { return static_cast<float*>(p); }
const float* floats(const void* p) { return static_cast<const float*>(p); }

// What a call launches, in one kernel: one role, or keys and values.
enum class Part : int { kOut, kQueries, kKeysAndValues, kE };

Role role_of(Part part) {
  return part == Part::kOut ? Role::kOut : part == Part::kKeysAndValues ? Role::kKeys : Role::kQueries;
}

// How a call is cut into blocks.
struct Cut {
  int inner, slice, segments;
  int segment;
};

Pass make_pass(const Problem& p, Role role, const Cut& cut) {
  Pass pass{};
  pass.p = p;
  pass.slices = static_cast<int>(ceil_div(has_inner_keys(role) ? p.value_dim : p.key_dim, cut.slice));
  pass.segments = cut.segments;
  pass.segment = cut.segment;
  switch (role) {
    case Role::kOut:
      pass.out = p.o;
      pass.state_in = floats(p.kv0);
      pass.z_in = floats(p.z0);
      pass.state_out = floats(p.kv);
      pass.z_out = floats(p.z);
      break;
    case Role::kQueries:
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
  return pass;
}

// Makes it a pass over segments' sums, or the pass after that.
void set_sum(Pass& pass, Role role, bool sum) {
  pass.sum = sum;
  const int64_t heads = is_reverse(role) || sum ? pass.p.kv_heads : pass.p.heads;
  pass.blocks = pass.p.num_sequences * pass.segments * pass.slices * heads;
}

template <class F>
void launch_form(Part part, Pass pass, Pass values, Stream stream) {
  const size_t most = max_shared_bytes();
  KX_CHECK(sizeof(Shared<F>) <= most, "linear_attention: a block needs more shared memory than this GPU has");
  pass.fetch = values.fetch = sizeof(FetchingShared<F>) <= most;
  const size_t bytes = pass.fetch ? sizeof(FetchingShared<F>) : sizeof(Shared<F>);
  const auto launch_blocks = [&](bool sum) {
    const bool two = part == Part::kKeysAndValues;
    set_sum(pass, role_of(part), sum);
    set_sum(values, Role::kValues, sum);
    const int64_t blocks = pass.blocks + (two ? values.blocks : 0);
    if (blocks == 0) {
      return;
    }
    KX_CHECK(blocks < (int64_t{1} << 31), "linear_attention: more blocks than a launch holds");
    const Launch how{dim3(static_cast<unsigned>(blocks)), dim3(kThreads), bytes, stream};
    switch (part) {
      case Part::kOut:
        return launch(linear_attention_kernel<F, Role::kOut>, how, pass);
      case Part::kQueries:
      case Part::kE:
        return launch(linear_attention_kernel<F, Role::kQueries>, how, pass);
      case Part::kKeysAndValues:
        return launch(linear_attention_keys_kernel<F>, how, pass, values);
    }
  };
  if (pass.sums != nullptr) {
    launch_blocks(true);
  }
  launch_blocks(false);
}

// visit(an example of the form that is cut like this, without wgmma)
template <class Visit>
void with_form(DType dtype, int inner, int slice, Visit&& visit) {
  const auto of_type = [&](auto example) {
    using T = decltype(example);
    if (slice == 64 && inner == 64) {
      return visit(Form<T, 64, 64, false>{});
    }
    if (slice == 64 && inner == 128) {
      return visit(Form<T, 128, 64, false>{});
    }
    if (slice == 64 && inner == 256) {
      return visit(Form<T, 256, 64, false>{});
    }
    if constexpr (std::is_same_v<T, bfloat16>) {
      if (slice == 128 && inner == 128) {
        return visit(Form<T, 128, 128, false>{});
      }
    }
    KX_CHECK(false, "linear_attention: no kernel is cut like this");
  };
  switch (dtype) {
    case DType::kBFloat16:
      return of_type(bfloat16{});
    case DType::kFloat16:
      return of_type(float16{});
    default:
      KX_CHECK(dtype == DType::kFloat32, "linear_attention: no CUDA kernel for float64");
      return of_type(float{});
  }
}

}  // namespace

void cuda(const Tensors& in, const Tensors& out, const Options& options, int part, int inner, int slice, int segments,
          int64_t segment, const std::optional<Tensor>& e, const std::optional<Tensor>& sums,
          const std::optional<Tensor>& z_sums, int device, intptr_t stream) {
  const Part what = static_cast<Part>(part);
  const bool two = what == Part::kKeysAndValues;
  const Problem p = make_problem(in, out, options, what != Part::kOut);
  KX_CHECK(p.length < (int64_t{1} << 30), "linear_attention: a sequence has fewer than 2^30 tokens");
  const Cut cut{inner, slice, segments, static_cast<int>(segment)};
  Pass pass = make_pass(p, role_of(what), cut), values = make_pass(p, Role::kValues, cut);
  const int64_t widest = two ? std::max(p.key_dim, p.value_dim) : what == Part::kOut ? p.key_dim : p.value_dim;
  KX_CHECK(widest <= inner, "linear_attention: a head is wider than the kernel");
  pass.only_e = what == Part::kE;
  pass.e = e ? floats(e->data) : nullptr;
  pass.e_parts = e ? static_cast<int>(e->size[0]) : 0;
  if (sums) {
    pass.sums = floats(sums->data);
    values.sums = pass.sums + p.num_sequences * segments * p.kv_heads * pass.slices * inner * slice;
    pass.z_sums = z_sums ? floats(z_sums->data) : nullptr;
  }
  const DeviceGuard guard(device);
  const Stream on = (Stream)stream;  // a pointer on a GPU, a number in the emulation
  with_form(p.dtype, inner, slice, [&](auto form) {
    using F = decltype(form);
    if constexpr (std::is_same_v<typename F::T, bfloat16>) {
      if (has_wgmma()) {
        return launch_form<Form<bfloat16, F::kInner, F::kSlice, true>>(what, pass, values, on);
      }
    }
    launch_form<F>(what, pass, values, on);
  });
}

bool cuda_fits(int dtype, int inner, int slice, int device) {
  const DeviceGuard guard(device);
  bool fits = false;
  with_form(static_cast<DType>(dtype), inner, slice,
            [&](auto form) { fits = sizeof(Shared<decltype(form)>) <= max_shared_bytes(); });
  return fits;
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
