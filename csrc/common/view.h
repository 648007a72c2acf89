// How kernels read tensor arguments: by strides, or as one piece of memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "check.h"
#include "tensor.h"

namespace kx {

using Tensors = std::vector<std::optional<Tensor>>;

// A tensor [B, T, H, D], or of fewer dimensions; strides in elements.
struct View {
  void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
  bool wide = false;  // the elements of a row are neighbours, and rows begin at multiples of 16 bytes
};

inline View view(const std::optional<Tensor>& x) {
  View out;
  if (x) {
    out.data = x->data;
    std::copy_n(x->stride.data(), std::min(x->rank, 4), out.stride);
    const int last = x->rank - 1;
    out.wide = last >= 0 && x->stride[last] == 1 && reinterpret_cast<uintptr_t>(x->data) % 16 == 0;
    for (int d = 0; d < last; ++d) {
      out.wide = out.wide && x->stride[d] * size_of(x->dtype) % 16 == 0;
    }
  }
  return out;
}

inline bool is_float(DType d) {
  return d == DType::kFloat64 || d == DType::kFloat32 || d == DType::kBFloat16 || d == DType::kFloat16;
}

inline bool has_shape(const Tensor& x, const std::vector<int64_t>& shape) {
  return x.rank == static_cast<int>(shape.size()) && std::equal(shape.begin(), shape.end(), x.size.begin());
}

// The address of a tensor without gaps, or null for none.
template <class T>
T* dense(const std::optional<Tensor>& x, DType dtype, const std::vector<int64_t>& shape) {
  if (!x) {
    return nullptr;
  }
  KX_CHECK(x->dtype == dtype, "an argument without gaps has the wrong dtype");
  KX_CHECK(has_shape(*x, shape), "an argument without gaps has the wrong shape");
  int64_t step = 1;
  const bool empty = std::count(x->size.begin(), x->size.begin() + x->rank, 0) > 0;
  for (int d = x->rank - 1; d >= 0 && !empty; --d) {
    KX_CHECK(x->size[d] <= 1 || x->stride[d] == step, "an argument has gaps that may have none");
    step *= x->size[d];
  }
  return static_cast<T*>(x->data);
}

}  // namespace kx
