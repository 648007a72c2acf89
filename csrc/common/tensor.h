// A tensor argument: an address with sizes and strides. Nothing is owned.
#pragma once

#include <array>
#include <cstdint>

#include "dtype.h"

namespace kx {

struct Tensor {
  static constexpr int kMaxRank = 5;

  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int rank = 0;
  std::array<int64_t, kMaxRank> size{};
  std::array<int64_t, kMaxRank> stride{};  // in elements
};

}  // namespace kx
