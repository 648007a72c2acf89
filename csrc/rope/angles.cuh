// Reading rows of tables, whatever their type: angles here, and other small tensors that every row needs.
#pragma once

#include "../common/dtype.h"
#include "../common/half.h"
#include "../cuda/convert.cuh"
#include "../cuda/memory.cuh"

namespace kx::rope {

// N neighbouring angles from pair `first` on.
template <int N, class Table, class A>
__device__ inline void load_angles(const Table* row, int64_t stride, bool wide, int64_t first, A* out) {
  constexpr int kWidth = N * sizeof(Table) <= 16 ? N : 16 / sizeof(Table);
  if (wide) {
#pragma unroll
    for (int i = 0; i < N; i += kWidth) {
      const Vector<Table, kWidth> v = load_shared_by_many<kWidth>(row + first + i);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        out[i + j] = static_cast<A>(widen(v.x[j]));
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      out[i] = static_cast<A>(widen(load_shared_by_many<1>(row + (first + i) * stride).x[0]));
    }
  }
}

// visit(the table, as an array of what it has)
template <class Visit>
__device__ inline void with_table(const void* table, DType dtype, Visit&& visit) {
  switch (dtype) {
    case DType::kFloat64:
      return visit(static_cast<const double*>(table));
    case DType::kBFloat16:
      return visit(static_cast<const bfloat16*>(table));
    case DType::kFloat16:
      return visit(static_cast<const float16*>(table));
    default:
      return visit(static_cast<const float*>(table));
  }
}

// True if `angles` neighbours can be read in vectors of up to 16 bytes: `dims` strides lead to rows, the next within.
inline bool wide_angles(const void* table, DType dtype, const int64_t* stride, int dims, int64_t angles) {
  const int64_t size = size_of(dtype), bytes = angles * size < 16 ? angles * size : 16;
  bool ok = stride[dims] == 1 && static_cast<int64_t>(reinterpret_cast<uintptr_t>(table) & 15) % bytes == 0;
  for (int d = 0; d < dims; ++d) {
    ok = ok && stride[d] * size % bytes == 0;
  }
  return ok;
}

}  // namespace kx::rope
