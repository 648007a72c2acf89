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

constexpr int64_t kStreamBytes = int64_t{8} << 20;  // outputs of this size leave the caches before they are read again

// True if stores that bypass the caches pay for a tensor of so many bytes and every vector of its rows is aligned for
// them, as far as rows are whole vectors.
template <class T>
bool can_stream(const T* data, const int64_t* stride, int64_t bytes) {
  constexpr int64_t kVector = decltype(load(data))::kLanes;
  return bytes >= kStreamBytes && reinterpret_cast<uintptr_t>(data) % (kVector * sizeof(T)) == 0 && stride[3] == 1 &&
         std::all_of(stride, stride + 3, [](int64_t step) { return step % kVector == 0; });
}

// A row of whole vectors past the caches. stream_fence() follows the last of a thread.
template <class T, class A>
void stream_row(const A* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; i += vector_t<A>::kLanes) {
    stream(to + i, load(from + i));
  }
}

}  // namespace
}  // namespace kx::KX_ISA
