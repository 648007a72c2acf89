// Launches the kernels of a call.
#include <optional>

#include "../common/check.h"
#include "../cuda/launch.cuh"
#include "backward.cuh"
#include "inverse.cuh"
#include "kernel.cuh"
#include "problem.h"

namespace kx::nystrom_attention {
namespace {

int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int kMostBlocks = 8;  // of a cluster, everywhere

// Which matrices of a head are in shared memory, and how many are not; and for how many blocks a head has work.
struct Memory {
  int on_chip, off_chip, most_blocks;
  size_t bytes;  // of shared memory

  Memory(int64_t m, int wanted, int total) {
    const size_t size = sizeof(float) * static_cast<size_t>(size_of_matrix(side_of(m)));
    const bool fits = sizeof(InverseShared) + static_cast<size_t>(wanted) * size <= max_shared_bytes();
    on_chip = fits ? wanted : 0;
    off_chip = total - on_chip;
    most_blocks = on_chip > 0 || m <= kTile || !has_clusters() ? 1 : kMostBlocks;
    bytes = sizeof(InverseShared) + static_cast<size_t>(on_chip) * size;
  }

  static int side_of(int64_t m) { return static_cast<int>(up(m, 16) * 16); }
};

Memory memory_of(Role role, int64_t m, Init init, int iterations) {
  const bool inverted = init == Init::kPinv;
  switch (role) {
    case Role::kMeasure:
      return {m, 1, 1};
    case Role::kInvert:
    case Role::kWeigh:
      return inverted ? Memory{m, 0, 0} : Memory{m, kForwardMatrices, kForwardMatrices};
    default:  // matrices that one launch leaves to another are not on chip
      return {m, init == Init::kOriginal ? 0 : kBackwardMatrices, kStates + (inverted ? 1 : iterations + 1)};
  }
}

template <class Visit>
void with_type(DType dtype, Visit&& visit) {
  switch (dtype) {
    case DType::kBFloat16:
      return visit(bfloat16{});
    case DType::kFloat16:
      return visit(float16{});
    default:
      KX_CHECK(dtype == DType::kFloat32, "nystrom_attention: no CUDA kernel for float64");
      return visit(float{});
  }
}

template <class Argument>
void start(void (*kernel)(Argument), const std::remove_const_t<Argument>& argument, int64_t blocks, int threads,
           size_t bytes, Stream stream, int cluster = 1) {
  KX_CHECK(blocks < (int64_t{1} << 31), "nystrom_attention: more blocks than a launch holds");
  if (blocks > 0) {
    launch(kernel,
           Launch{dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), bytes, stream,
                  dim3(static_cast<unsigned>(cluster))},
           argument);
  }
}

float* floats(const std::optional<Tensor>& x) {
  KX_CHECK(x && x->dtype == DType::kFloat32, "nystrom_attention: a workspace is missing");
  return static_cast<float*>(x->data);
}

// One call's launches.
class Call {
 public:
  Call(const Problem& problem, intptr_t stream)
      : p(plan.p), on_((Stream)stream) {  // a pointer on a GPU, a number in the emulation
    plan.p = problem;
    constexpr int64_t kMost = int64_t{1} << 30;
    KX_CHECK(p.queries < kMost && p.keys < kMost, "nystrom_attention: a sequence has fewer than 2^30 tokens");
    KX_CHECK(p.num_landmarks < (1 << 14), "nystrom_attention: fewer than 2^14 landmarks");
    KX_CHECK(p.key_dim < (1 << 14) && p.value_dim < (1 << 14), "nystrom_attention: fewer than 2^14 dimensions");
    plan.groups = static_cast<int>(up(p.num_landmarks, kTile));
    plan.key_chunks = static_cast<int>(up(p.key_dim, kTile));
    plan.value_chunks = static_cast<int>(up(p.value_dim, kTile));
    plan.slices = plan.key_chunks > plan.value_chunks ? plan.key_chunks : plan.value_chunks;
    plan.side = Memory::side_of(p.num_landmarks);
  }

  void cut(const CudaCuts& cuts) {
    const auto [span_q, parts_q, span_k, parts_k] = cuts;
    KX_CHECK(span_q > 0 && span_q % kTile == 0 && span_k > 0 && span_k % kTile == 0,
             "nystrom_attention: parts are whole tiles");
    plan.of_q = {p.queries, static_cast<int>(span_q), static_cast<int>(parts_q)};
    plan.of_k = {p.keys, static_cast<int>(span_k), static_cast<int>(parts_k)};
    const bool packed = p.cu_seqlens != nullptr;
    for (const Cut& cut : {plan.of_q, plan.of_k}) {
      KX_CHECK(cut.parts >= (packed ? cut.length / cut.span + p.num_sequences : up(cut.length, cut.span)),
               "nystrom_attention: too few places for parts");
    }
  }

  int64_t units() const { return p.num_sequences * p.heads; }
  int64_t places(const Cut& cut) const { return p.batch * p.heads * cut.parts; }

  // Of a number to a thread.
  template <class Argument>
  void of_numbers(void (*kernel)(Argument), const std::remove_const_t<Argument>& argument, int64_t numbers) const {
    start(kernel, argument, up(numbers, kThreads), kThreads, 0, on_);
  }
  // A block to a head, or several, as many as there are processors for.
  template <class Shared>
  void of_tokens(void (*kernel)(Plan), int64_t blocks) const {
    KX_CHECK(sizeof(Shared) <= max_shared_bytes(), "nystrom_attention: a block needs more shared memory");
    start(kernel, plan, blocks, kThreads, sizeof(Shared), on_);
  }
  void of_matrices(void (*kernel)(Plan), Role role) { of_matrices(kernel, role, on_); }
  void of_matrices(void (*kernel)(Plan), Role role, Stream stream) {
    const Memory memory = memory_of(role, p.num_landmarks, p.init, p.iterations);
    plan.on_chip = memory.on_chip;
    plan.off_chip = memory.off_chip;
    plan.blocks = memory.most_blocks;
    while (plan.blocks > 1 && plan.blocks * units() > multiprocessors()) {
      plan.blocks /= 2;
    }
    start(kernel, plan, plan.blocks * units(), kInverseThreads, memory.bytes, stream, plan.blocks);
  }
  // Z, of landmarks that are there.
  void invert(const Tensors& workspaces, Stream stream) {
    plan.columns = floats(workspaces[1]);
    plan.scratch = floats(workspaces[2]);
    if (p.init == Init::kOriginal) {
      of_matrices(nystrom_inverse_kernel<Role::kMeasure>, Role::kMeasure, stream);
    }
    plan.p.matrices = floats(workspaces[3]);
    of_matrices(nystrom_inverse_kernel<Role::kInvert>, Role::kInvert, stream);
  }
  void sum(const Cut& cut, int64_t numbers, const float* also, float factor, float* out) const {
    of_numbers(nystrom_sum_kernel, Sum{p, cut, numbers, plan.sums, also, factor, out}, units() * numbers);
  }

  Plan plan{};
  const Problem& p;

 private:
  const Stream on_;
};

}  // namespace

int64_t cuda_scratch(int64_t num_landmarks, const Options& options, bool backward, int device) {
  const DeviceGuard guard(device);
  const auto init = static_cast<Init>(std::get<0>(options));
  const Role role = backward ? Role::kAll : init == Init::kPinv ? Role::kMeasure : Role::kWeigh;
  return memory_of(role, num_landmarks, init, std::get<1>(options)).off_chip *
         size_of_matrix(Memory::side_of(num_landmarks));
}

bool cuda_fits(int dtype, int device) {
  const DeviceGuard guard(device);
  bool fits = false;
  with_type(static_cast<DType>(dtype), [&](auto example) {
    using P = Factor<decltype(example)>;
    fits = sizeof(KeysBackwardShared<P>) <= max_shared_bytes();  // the largest
  });
  return fits;
}

void cuda_landmarks(const Tensors& in, const Tensors& out, const Options& options, const CudaCuts& cuts,
                    const Tensors& workspaces, int device, intptr_t stream) {
  Options own = options;
  if (static_cast<Init>(std::get<0>(own)) == Init::kPinv) {
    std::get<0>(own) = static_cast<int>(Init::kPerMatrix);  // nothing is inverted yet
  }
  Call call(make_problem(in, out, own, Pass::kForward), stream);
  call.cut(cuts);
  KX_CHECK(workspaces.size() == 4, "nystrom_attention: wrong number of workspaces");
  Plan& plan = call.plan;
  const Problem& p = plan.p;
  plan.sums = floats(workspaces[0]);
  plan.pooled = workspaces[3].has_value();
  const DeviceGuard guard(device);
  with_type(p.dtype, [&](auto example) {
    using T = decltype(example);
    start(nystrom_pool_kernel<T>, plan, (plan.pooled ? 2 : 1) * call.units() * p.num_landmarks, kThreads, 0,
          (Stream)stream);
    std::optional<Beside> beside;
    if (plan.pooled) {
      beside.emplace((Stream)stream);
      call.invert(workspaces, beside->stream());
      plan.slices = plan.value_chunks;
    }
    call.of_tokens<KeysShared<Factor<T>>>(nystrom_keys_kernel<T>, call.places(plan.of_k) * plan.groups * plan.slices);
    call.of_numbers(nystrom_combine_kernel, plan, call.units() * p.num_landmarks * (p.key_dim + p.value_dim));
    if (beside) {
      beside->join();
    }
  });
}

void cuda_matrices(const Tensors& in, const Tensors& out, const Options& options, const Tensors& workspaces, int device,
                   intptr_t stream) {
  Call call(make_problem(in, out, options, Pass::kMatrices), stream);
  KX_CHECK(workspaces.size() == 2, "nystrom_attention: wrong number of workspaces");
  call.plan.columns = floats(workspaces[0]);
  call.plan.scratch = floats(workspaces[1]);
  const DeviceGuard guard(device);
  call.of_matrices(nystrom_inverse_kernel<Role::kMeasure>, Role::kMeasure);
}

void cuda(const Tensors& in, const Tensors& out, const Options& options, const CudaCuts& cuts,
          const Tensors& workspaces, int device, intptr_t stream) {
  Call call(make_problem(in, out, options, Pass::kForward), stream);
  call.cut(cuts);
  KX_CHECK(workspaces.size() == 2, "nystrom_attention: wrong number of workspaces");
  Plan& plan = call.plan;
  plan.columns = floats(workspaces[0]);
  plan.scratch = floats(workspaces[1]);
  const DeviceGuard guard(device);
  if (plan.p.init == Init::kOriginal) {
    call.of_matrices(nystrom_inverse_kernel<Role::kMeasure>, Role::kMeasure);
  }
  call.of_matrices(nystrom_inverse_kernel<Role::kWeigh>, Role::kWeigh);
  with_type(plan.p.dtype, [&](auto example) {
    using T = decltype(example);
    call.of_tokens<QueriesShared<Factor<T>>>(nystrom_output_kernel<T>, call.places(plan.of_q) * plan.value_chunks);
  });
}

void cuda_backward(const Tensors& in, const Tensors& out, const Options& options, const CudaCuts& cuts,
                   const Tensors& workspaces, int device, intptr_t stream) {
  Call call(make_problem(in, out, options, Pass::kBackward), stream);
  call.cut(cuts);
  KX_CHECK(workspaces.size() == 9, "nystrom_attention: wrong number of workspaces");
  Plan& plan = call.plan;
  const Problem& p = plan.p;
  plan.sums = floats(workspaces[0]);
  plan.of_landmarks = floats(workspaces[1]);
  plan.grad_summary = floats(workspaces[2]);
  plan.grad_landmarks_q = floats(workspaces[3]);
  plan.grad_landmarks_k = floats(workspaces[4]);
  plan.columns = floats(workspaces[5]);
  plan.norms = floats(workspaces[6]);
  plan.scratch = floats(workspaces[7]);
  KX_CHECK(workspaces[8].has_value() == (p.taps > 0), "nystrom_attention: the convolution's gradient has no sums");
  plan.conv_sums = workspaces[8] ? static_cast<double*>(workspaces[8]->data) : nullptr;
  const DeviceGuard guard(device);
  with_type(p.dtype, [&](auto example) {
    using T = decltype(example);
    using P = Factor<T>;
    const int64_t places_q = call.places(plan.of_q), places_k = call.places(plan.of_k);
    const int64_t both = p.num_landmarks * (p.key_dim + p.value_dim), of_keys = p.num_landmarks * p.key_dim;
    call.of_tokens<QueriesBackwardShared<P, false>>(nystrom_queries_kernel<T, false>,
                                                    places_q * plan.groups * plan.slices);
    call.sum(plan.of_q, both, nullptr, 1, plan.of_landmarks);
    if (p.init == Init::kOriginal) {
      call.of_matrices(nystrom_inverse_kernel<Role::kMeasure>, Role::kMeasure);
      call.of_matrices(nystrom_inverse_backward_kernel<Role::kIterate>, Role::kIterate);
      call.of_matrices(nystrom_inverse_backward_kernel<Role::kFinish>, Role::kFinish);
    } else {
      call.of_matrices(nystrom_inverse_backward_kernel<Role::kAll>, Role::kAll);
    }
    const int64_t of_group = places_k * plan.slices;
    if (plan.groups == 1) {
      call.of_tokens<KeysBackwardShared<P>>(nystrom_keys_backward_kernel<T, true, true>, of_group);
    } else {
      call.of_tokens<KeysBackwardShared<P>>(nystrom_keys_backward_kernel<T, false, true>, of_group);
      call.of_tokens<KeysBackwardShared<P>>(nystrom_keys_backward_kernel<T, true, false>, of_group * plan.groups);
    }
    call.sum(plan.of_k, of_keys, plan.grad_landmarks_q, static_cast<float>(p.scale), plan.grad_landmarks_q);
    call.of_tokens<QueriesBackwardShared<P, true>>(nystrom_queries_kernel<T, true>, places_q * plan.key_chunks);
    if (p.taps > 0) {
      call.of_tokens<ConvShared<P>>(nystrom_conv_kernel<T>, places_k * up(p.taps, kTile));
    }
  });
}

}  // namespace kx::nystrom_attention
