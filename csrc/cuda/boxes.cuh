// Rows of a tensor [B, T, H, D], and their way into swizzled tiles by the copy engine: a box for each panel of columns.
// sm_90.
#pragma once

#include <algorithm>

#include "../common/view.h"
#include "tile.cuh"
#include "tma.cuh"

namespace kx {

// Rows of one head; what lies outside of the tensor counts as zeros.
struct Boxes {
  const TensorMap* map;
  int batch, row, head;  // where they begin
};

// A tile from (row, column) on, by one thread; the barrier gets the bytes of the whole tile.
template <class E, int kRows, int kColumns, int kSwizzle>
__device__ __forceinline__ void load_boxes(Tile<E, kRows, kColumns, kSwizzle>& to, const Boxes& from, int row,
                                           int column, Mbarrier& there) {
#pragma unroll
  for (int c = 0; c < kColumns; c += to.kPanel) {
    const int at[4] = {column + c, from.head, from.row + row, from.batch};
    load_tile(to.panel(c), *from.map, at, there);
  }
}

// A tensor as a map is made of it.
struct BoxedTensor {
  View x;
  int64_t batch, rows, heads, columns;

  // Whether the copy engine reads it where it lies.
  bool readable() const {
    const auto steps = [](int64_t size, int64_t stride) {
      return size == 1 || (stride > 0 && stride < int64_t{1} << 36);
    };
    return x.wide && std::min({batch, rows, heads, columns}) > 0 && steps(batch, x.stride[0]) &&
           steps(rows, x.stride[1]) && steps(heads, x.stride[2]);
  }
};

// The map from which load_boxes fills such tiles.
template <class Tile>
TensorMap map_of(const BoxedTensor& tensor) {
  constexpr int kBytes = sizeof(typename Tile::Element);
  static_assert(Tile::kPanel * kBytes == 128, "a panel is as wide as the swizzle");
  const auto step = [&](int64_t size, int d) {  // in bytes; where there is one, any will do
    return static_cast<uint64_t>(size == 1 ? 16 : tensor.x.stride[d] * kBytes);
  };
  const uint64_t size[4] = {static_cast<uint64_t>(tensor.columns), static_cast<uint64_t>(tensor.heads),
                            static_cast<uint64_t>(tensor.rows), static_cast<uint64_t>(tensor.batch)};
  const uint64_t stride[3] = {step(tensor.heads, 2), step(tensor.rows, 1), step(tensor.batch, 0)};
  const uint32_t box[4] = {Tile::kPanel, 1, Tile::kHeight, 1};
  return make_tensor_map(tensor.x.data, kBytes, 4, size, stride, box, Swizzle::k128);
}

}  // namespace kx
