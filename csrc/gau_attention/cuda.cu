// Cuts a call into panels that the workspace has room for, and launches their passes.
#include <algorithm>
#include <initializer_list>

#include "../common/check.h"
#include "../cuda/launch.cuh"
#include "forms.cuh"
#include "fused.cuh"
#include "kernel.cuh"
#include "problem.h"
#include "resident.cuh"

namespace kx::gau_attention {
namespace {

Problem checked(const Tensors& in, const Tensors& out, const Options& options, bool backward) {
  const Problem p = make_problem(in, out, options, backward);
  constexpr int64_t kMost = int64_t{1} << 30;
  KX_CHECK(p.queries < kMost && p.keys < kMost, "gau_attention: a sequence has fewer than 2^30 tokens");
  KX_CHECK(p.key_dim < kMost && p.value_dim < kMost, "gau_attention: a head has fewer than 2^30 dimensions");
  return p;
}

int64_t elements(const Tensor& x) {
  int64_t n = 1;
  for (int d = 0; d < x.rank; ++d) {
    n *= x.size[d];
  }
  return n;
}

// visit(the form of the kernel on chip): whether it has room.
template <class Visit>
bool with_on_chip_form(DType dtype, int64_t key_dim, int64_t value_dim, Visit&& visit) {
  const auto fits = [&](auto form) {
    const bool room = key_dim <= kMaxKeyDim && sizeof(Shared<decltype(form)>) <= max_shared_bytes();
    if (room) {
      visit(form);
    }
    return room;
  };
  const auto of_bfloat16 = [&](auto wgmma) {
    constexpr bool kWgmma = decltype(wgmma)::value;
    return (value_dim > kTile && fits(OnChipForm<bfloat16, 2 * kTile, kWgmma>{})) ||
           fits(OnChipForm<bfloat16, kTile, kWgmma>{});
  };
  switch (dtype) {
    case DType::kBFloat16:
      return has_wgmma() ? of_bfloat16(std::true_type{}) : of_bfloat16(std::false_type{});
    case DType::kFloat16:
      return fits(OnChipForm<float16, kTile, false>{});
    default:
      return dtype == DType::kFloat32 && fits(OnChipForm<float, kTile, false>{});
  }
}

// visit(the form of the kernel whose scores stay): whether it has room.
template <class Visit>
bool with_resident_form(DType dtype, int64_t key_dim, Visit&& visit) {
  const auto fits = [&](auto form) {
    const bool room = has_clusters() && key_dim <= kMaxKeyDim && sizeof(Shared<decltype(form)>) <= max_shared_bytes();
    if (room) {
      visit(form);
    }
    return room;
  };
  switch (dtype) {
    case DType::kBFloat16:
      return has_wgmma() ? fits(ResidentForm<bfloat16, true>{}) : fits(ResidentForm<bfloat16, false>{});
    case DType::kFloat16:
      return fits(ResidentForm<float16, false>{});
    default:
      return dtype == DType::kFloat32 && fits(ResidentForm<float, false>{});
  }
}

// visit(the form): that whose operands the copy engine brings, if there is one and it takes all of the tensors.
template <class F, class Visit>
void with_tma(std::initializer_list<BoxedTensor> tensors, Visit&& visit) {
  if constexpr (F::kWgmma) {
    if (std::all_of(tensors.begin(), tensors.end(), [](const BoxedTensor& x) { return x.readable(); })) {
      return visit(Form<typename F::T, F::kColumns, true, true>{});
    }
  }
  visit(F{});
}

BoxedTensor boxed_queries(const Problem& p, const View& x, int64_t columns) {
  return {x, p.batch, p.queries, p.heads, columns};
}
BoxedTensor boxed_keys(const Problem& p, const View& x, int64_t columns) {
  return {x, p.batch, p.keys, p.kv_heads, columns};
}
// Of a workspace [B, rows, heads, pitch].
BoxedTensor boxed_workspace(void* data, int64_t batch, int64_t rows, int64_t heads, int64_t columns, int64_t pitch) {
  return {{data, {rows * heads * pitch, heads * pitch, pitch, 1}, true}, batch, rows, heads, columns};
}

template <class F>
Launch resident_launch(int64_t clusters, int64_t blocks, Stream stream) {
  KX_CHECK(clusters * blocks < (int64_t{1} << 31), "gau_attention: more blocks than a launch holds");
  return {dim3(static_cast<unsigned>(clusters * blocks)), dim3(kThreads), sizeof(Shared<F>), stream,
          dim3(static_cast<unsigned>(blocks))};
}

}  // namespace

int64_t cuda_tiles(int64_t batch, int64_t rows, int64_t sequences, bool packed) {
  return packed ? rows / kTile + sequences : batch * up(rows, kTile);
}

bool cuda_fits(int dtype, int device) {
  const DeviceGuard guard(device);
  const size_t bytes = static_cast<DType>(dtype) == DType::kBFloat16 ? sizeof(Shared<Form<bfloat16, kTile, false>>)
                                                                     : sizeof(Shared<Form<float, kTile, false>>);
  return bytes <= max_shared_bytes();
}

void cuda(const Tensors& in, const Tensors& out, const Options& options, const Tensor& scores, int64_t keys, int device,
          intptr_t stream) {
  Pass pass{};
  pass.p = checked(in, out, options, false);
  const Problem& p = pass.p;
  pass.scores = scores.data;
  pass.pitch = up(std::max<int64_t>(keys, 1), kTile) * kTile;
  pass.keys = static_cast<int>(keys);
  const int64_t tasks = cuda_tiles(p.batch, p.queries, p.num_sequences, p.cu_seqlens != nullptr) * p.heads;
  const int64_t room = elements(scores) / (kTile * pass.pitch);
  KX_CHECK(room > 0, "gau_attention: the workspace holds no tile");
  const DeviceGuard guard(device);
  const Stream on = (Stream)stream;  // a pointer on a GPU, a number in the emulation
  with_forms(p.dtype, p.value_dim, [&](auto square, auto wide) {
    using Square = decltype(square);
    using Wide = decltype(wide);
    const BoxedTensor q = boxed_queries(p, p.q, p.key_dim), k = boxed_keys(p, p.k, p.key_dim);
    const BoxedTensor v = boxed_keys(p, p.v, p.value_dim);
    const BoxedTensor rows = boxed_workspace(scores.data, 1, std::min(room, tasks) * kTile, 1, pass.pitch, pass.pitch);
    // Values of padding, and of the sequence after, may be NaN: it is threads that leave them out.
    const bool dense = p.key_mask == nullptr && p.cu_seqlens == nullptr;
    for (pass.first = 0; pass.first < tasks; pass.first += room) {
      pass.tiles = static_cast<int>(std::min(room, tasks - pass.first));
      with_tma<Square>({q, k}, [&](auto form) {
        using F = decltype(form);
        if constexpr (F::kTma) {
          pass.maps = {map_of<typename F::A>(q), map_of<typename F::B>(k)};
        }
        start(gau_scores_kernel<F, false>, pass, pass.tiles * up(keys, kTile), sizeof(Shared<F>), on);
      });
      with_tma<Wide>({rows, dense ? v : BoxedTensor{}}, [&](auto form) {
        using F = decltype(form);
        if constexpr (F::kTma) {
          pass.maps = {map_of<typename F::A>(rows), map_of<typename F::TurnedB>(v)};
        }
        start(gau_out_kernel<F>, pass, pass.tiles * up(p.value_dim, F::kColumns), sizeof(Shared<F>), on);
      });
    }
  });
}

int64_t cuda_fused_columns(int dtype, int64_t key_dim, int64_t value_dim, int device) {
  const DeviceGuard guard(device);
  int64_t columns = 0;
  with_on_chip_form(static_cast<DType>(dtype), key_dim, value_dim,
                    [&](auto form) { columns = decltype(form)::kColumns; });
  return columns;
}

void cuda_fused(const Tensors& in, const Tensors& out, const Options& options, const std::optional<Tensor>& parts,
                const std::optional<Tensor>& part_sums, int64_t segment, int device, intptr_t stream) {
  FusedPass pass{};
  pass.p = checked(in, out, options, false);
  const Problem& p = pass.p;
  KX_CHECK(segment > 0 && segment % kTile == 0, "gau_attention: a segment is whole tiles");
  KX_CHECK(parts ? parts->dtype == DType::kFloat32 && part_sums.has_value() : p.keys <= segment,
           "gau_attention: several segments need their sums");
  pass.segment = static_cast<int>(segment);
  pass.segments = static_cast<int>(parts ? up(p.keys, segment) : 1);
  if (parts) {
    pass.parts = static_cast<float*>(parts->data);
    pass.part_sums = static_cast<float*>(part_sums->data);
    pass.pitch = parts->size[4];
  }
  const int64_t tasks = cuda_tiles(p.batch, p.queries, p.num_sequences, p.cu_seqlens != nullptr) * p.heads;
  const DeviceGuard guard(device);
  const Stream on = (Stream)stream;
  const bool fits = with_on_chip_form(p.dtype, p.key_dim, p.value_dim, [&](auto form) {
    using F = decltype(form);
    using Combine = Form<typename F::T, kTile, false>;
    start(gau_fused_kernel<F>, pass, tasks * pass.segments * up(p.value_dim, F::kColumns), sizeof(Shared<F>), on);
    if (parts) {
      start(gau_combine_kernel<Combine>, pass, tasks * up(p.value_dim, kTile), sizeof(Shared<Combine>), on);
    }
  });
  KX_CHECK(fits, "gau_attention: no room for so many dimensions on chip");
}

void cuda_resident(const Tensors& in, const Tensors& out, const Options& options, int64_t blocks, int device,
                   intptr_t stream) {
  const Problem p = checked(in, out, options, false);
  KX_CHECK(p.cu_seqlens == nullptr, "gau_attention: scores of packed sequences do not stay");
  const int64_t clusters = cuda_tiles(p.batch, p.queries, p.num_sequences, false) * p.heads;
  const DeviceGuard guard(device);
  const bool fits = with_resident_form(p.dtype, p.key_dim, [&](auto form) {
    using F = decltype(form);
    KX_CHECK(p.keys <= F::kTiles * F::kKeys, "gau_attention: no room for the scores of so many keys");
    KX_CHECK(blocks >= 1 && blocks <= kMostResidentBlocks && blocks <= up(p.value_dim, F::kColumns),
             "gau_attention: a cluster has 1 to 8 blocks, each with a slice");
    if (clusters > 0) {
      launch(gau_resident_kernel<F>, resident_launch<F>(clusters, blocks, (Stream)stream), p);
    }
  });
  KX_CHECK(fits, "gau_attention: scores do not stay on this device");
}

std::vector<int64_t> cuda_resident_form(int dtype, int64_t key_dim, int device) {
  const DeviceGuard guard(device);
  std::vector<int64_t> form;
  with_resident_form(static_cast<DType>(dtype), key_dim, [&](auto example) {
    using F = decltype(example);
    form = {F::kTiles * F::kKeys, F::kKeys, F::kColumns};
    for (int64_t blocks = 1; blocks <= kMostResidentBlocks; ++blocks) {
      form.push_back(clusters_at_once(gau_resident_kernel<F>, resident_launch<F>(1, blocks, Stream{})));
    }
  });
  return form;
}

void cuda_backward(const Tensors& in, const Tensors& out, const Options& options, const Tensors& workspaces,
                   int64_t keys, int64_t panel, int device, intptr_t stream) {
  Pass pass{};
  pass.p = checked(in, out, options, true);
  const Problem& p = pass.p;
  KX_CHECK(workspaces.size() == 6 && workspaces[0].has_value() == workspaces[1].has_value() && workspaces[2] &&
               workspaces[3],
           "gau_attention: a workspace is missing");
  KX_CHECK(panel > 0 && panel % kTile == 0, "gau_attention: a panel is whole tiles");
  const auto data = [&](size_t i) { return workspaces[i] ? workspaces[i]->data : nullptr; };
  pass.scores = data(0);
  pass.grads = data(1);
  pass.g = data(2);
  pass.g_pitch = workspaces[2]->size[3];
  pass.shift = static_cast<float*>(data(3));
  pass.grad_queries = static_cast<float*>(data(4));
  pass.diagonals = static_cast<float*>(data(5));
  pass.pitch = panel;
  pass.keys = static_cast<int>(panel);
  const bool packed = p.cu_seqlens != nullptr, on_chip = pass.scores == nullptr;
  pass.tiles = static_cast<int>(cuda_tiles(p.batch, p.queries, p.num_sequences, packed));
  pass.key_tiles =
      static_cast<int>(packed ? cuda_tiles(1, p.keys, p.num_sequences, true) : p.num_sequences * (panel / kTile));
  KX_CHECK(pass.grad_queries != nullptr || keys <= panel, "gau_attention: several panels need their sums");
  KX_CHECK(!on_chip || (keys <= panel && p.grad_bias == nullptr), "gau_attention: a bias, or panels, need workspaces");
  const DeviceGuard guard(device);
  const Stream on = (Stream)stream;
  with_forms(p.dtype, p.value_dim, [&](auto square, auto wide) {
    using Square = decltype(square);
    using Wide = decltype(wide);
    const int64_t key_blocks = pass.key_tiles * p.kv_heads, query_blocks = pass.tiles * p.heads;
    const int64_t slices = up(p.key_dim, kTile);
    start(gau_prepare_kernel<typename Square::T>, pass, up(p.batch * p.queries * p.heads, kWarps), 0, on);
    if (on_chip) {
      const size_t bytes = sizeof(Shared<Square>);
      start(gau_fused_values_kernel<Square>, pass, key_blocks * up(p.value_dim, kValueSlices<Square> * kTile), bytes,
            on);
      start(gau_fused_keys_kernel<Square>, pass, key_blocks * slices, bytes, on);
      start(gau_fused_queries_kernel<Square>, pass, query_blocks * slices, bytes, on);
      return;
    }
    const BoxedTensor q = boxed_queries(p, p.q, p.key_dim), k = boxed_keys(p, p.k, p.key_dim);
    const BoxedTensor v = boxed_keys(p, p.v, p.value_dim);
    const BoxedTensor g = boxed_workspace(pass.g, p.batch, p.queries, p.heads, p.value_dim, pass.g_pitch);
    const BoxedTensor scores = boxed_workspace(pass.scores, p.batch, p.queries, p.heads, panel, panel);
    for (pass.first = 0; pass.first == 0 || pass.first < keys; pass.first += panel) {
      pass.last = pass.first + panel >= keys;
      with_tma<Square>({q, k, g, v}, [&](auto form) {
        using F = decltype(form);
        if constexpr (F::kTma) {
          pass.maps = {map_of<typename F::A>(q), map_of<typename F::B>(k), map_of<typename F::A>(g),
                       map_of<typename F::B>(v)};
        }
        start(gau_scores_kernel<F, true>, pass, query_blocks * (panel / kTile), sizeof(Shared<F>), on);
      });
      // Rows of the sequence after would be added: it is threads that leave them out.
      with_tma<Wide>({g, packed ? BoxedTensor{} : scores}, [&](auto form) {
        using F = decltype(form);
        if constexpr (F::kTma) {
          pass.maps = {map_of<typename F::TurnedA>(scores), map_of<typename F::TurnedB>(g)};
        }
        start(gau_values_kernel<F>, pass, key_blocks * up(p.value_dim, F::kColumns), sizeof(Shared<F>), on);
      });
      start(gau_rows_kernel<Square>, pass, (query_blocks + key_blocks) * slices, sizeof(Shared<Square>), on);
      if (p.grad_bias != nullptr) {
        start(gau_bias_kernel, pass, up(p.bias_heads * p.distances, kThreads), 0, on);
      }
    }
  });
}

}  // namespace kx::gau_attention
