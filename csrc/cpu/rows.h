// Rows of tensors in the type that arithmetic is done in, and memory for them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "memory.h"
#include "simd.h"

namespace kx::KX_ISA {
namespace {

template <class A>
struct Free {
  size_t bytes = 0;
  void operator()(A* p) const { release(p, bytes); }
};
template <class A>
using Buffer = std::unique_ptr<A[], Free<A>>;

template <class A>
Buffer<A> zeros(size_t n) {
  Buffer<A> out(static_cast<A*>(allocate(n * sizeof(A))), Free<A>{n * sizeof(A)});
  std::fill_n(out.get(), n, A{0});
  return out;
}

template <class T, class A>
void load_row(const T* from, int64_t stride, int64_t n, A* to) {
  constexpr int kLanes = vector_t<A>::kLanes;
  int64_t i = 0;
  for (; stride == 1 && i + kLanes <= n; i += kLanes) {
    store(to + i, load(from + i));
  }
  for (; i < n; ++i) {
    to[i] = widen(from[i * stride]);
  }
}

template <class T, class A>
void store_row(const A* from, int64_t n, T* to, int64_t stride) {
  constexpr int kLanes = vector_t<A>::kLanes;
  int64_t i = 0;
  for (; stride == 1 && i + kLanes <= n; i += kLanes) {
    store(to + i, load(from + i));
  }
  for (; i < n; ++i) {
    narrow(from[i], to + i * stride);
  }
}

}  // namespace
}  // namespace kx::KX_ISA
