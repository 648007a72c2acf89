// How the kernels of gated attention and mixed-chunk attention are launched: the forms that a dtype and a device have.
#pragma once

#include "../common/check.h"
#include "../cuda/launch.cuh"
#include "block.cuh"

namespace kx::gau_attention {

template <class Kernel, class Pass>
void start(Kernel* kernel, const Pass& pass, int64_t blocks, size_t bytes, Stream stream) {
  KX_CHECK(blocks < (int64_t{1} << 31), "products of tiles: more blocks than a launch holds");
  if (blocks > 0) {
    launch(kernel, Launch{dim3(static_cast<unsigned>(blocks)), dim3(kThreads), bytes, stream}, pass);
  }
}

// visit(the form whose tiles are square, that for the width of values)
template <class Visit>
void with_forms(DType dtype, int64_t value_dim, Visit&& visit) {
  const auto of_type = [&](auto example, auto wgmma) {
    using T = decltype(example);
    constexpr bool kWgmma = decltype(wgmma)::value;
    using Square = Form<T, kTile, kWgmma>;
    KX_CHECK(sizeof(Shared<Square>) <= max_shared_bytes(), "products of tiles: a block needs more shared memory");
    if constexpr (std::is_same_v<T, bfloat16>) {
      using Wide = Form<T, 2 * kTile, kWgmma>;
      if (value_dim > kTile && sizeof(Shared<Wide>) <= max_shared_bytes()) {
        return visit(Square{}, Wide{});
      }
    }
    visit(Square{}, Square{});
  };
  switch (dtype) {
    case DType::kBFloat16:
      if (has_wgmma()) {
        return of_type(bfloat16{}, std::true_type{});
      }
      return of_type(bfloat16{}, std::false_type{});
    case DType::kFloat16:
      return of_type(float16{}, std::false_type{});
    default:
      KX_CHECK(dtype == DType::kFloat32, "products of tiles: no CUDA kernel for float64");
      return of_type(float{}, std::false_type{});
  }
}

inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace kx::gau_attention
