// Random problems for the C++ tests of operators: tensors whose memory ends where their last element ends, and what is
// asked of results.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../common/half.h"
#include "../common/view.h"

namespace kx {

using Random = std::mt19937_64;
using Sizes = std::vector<int64_t>;

// Of a problem. Sanitizers make each ten times as long; and whatever the schedule, they see the same accesses.
#if defined(KX_INSTRUMENTED) || defined(__SANITIZE_ADDRESS__)
constexpr uint64_t kSchedules = 1;
#else
constexpr uint64_t kSchedules = 2;
#endif

inline int64_t draw(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}
inline bool toss(Random& random) { return draw(random, 0, 1) == 1; }

inline void write(DType dtype, char* to, double x) {
  switch (dtype) {
    case DType::kFloat64:
      std::memcpy(to, &x, sizeof x);
      break;
    case DType::kBFloat16:
      *reinterpret_cast<bfloat16*>(to) = to_bfloat16(static_cast<float>(x));
      break;
    case DType::kFloat16:
      *reinterpret_cast<float16*>(to) = to_float16(static_cast<float>(x));
      break;
    default:
      *reinterpret_cast<float*>(to) = static_cast<float>(x);
  }
}

// Tensors with memory of their own.
class Buffers {
 public:
  explicit Buffers(Random& random) : random_(random) {}

  Tensor empty(DType dtype, const Sizes& sizes) {  // NaN in every element
    Tensor x = allocate(dtype, sizes);
    std::memset(x.data, 0xff, static_cast<size_t>(count(sizes) * size_of(dtype)));
    return x;
  }
  template <class Number>
  Tensor filled(DType dtype, const Sizes& sizes, Number&& number) {
    Tensor x = allocate(dtype, sizes);
    for (int64_t i = 0; i < count(sizes); ++i) {
      write(dtype, static_cast<char*>(x.data) + i * size_of(dtype), number());
    }
    return x;
  }
  Tensor normal(DType dtype, const Sizes& sizes) {
    return filled(dtype, sizes, [&] { return std::normal_distribution<double>()(random_); });
  }
  template <class Integer>
  Tensor integers(DType dtype, const std::vector<Integer>& values) {
    Tensor x = allocate(dtype, {static_cast<int64_t>(values.size())});
    std::copy(values.begin(), values.end(), static_cast<Integer*>(x.data));
    return x;
  }
  Tensor mask(int64_t batch, int64_t rows) {  // three of four are kept
    std::vector<uint8_t> keep(static_cast<size_t>(batch * rows));
    std::generate(keep.begin(), keep.end(), [&] { return static_cast<uint8_t>(draw(random_, 0, 3) != 0); });
    Tensor x = integers(DType::kBool, keep);
    x.rank = 2;
    x.size[0] = batch;
    x.size[1] = rows;
    x.stride[0] = rows;
    x.stride[1] = 1;
    return x;
  }

 private:
  static int64_t count(const Sizes& sizes) {
    int64_t n = 1;
    for (const int64_t size : sizes) {
      n *= size;
    }
    return n;
  }
  Tensor allocate(DType dtype, const Sizes& sizes) {
    Tensor x;
    x.dtype = dtype;
    x.rank = static_cast<int>(sizes.size());
    int64_t step = 1;
    for (int d = x.rank - 1; d >= 0; --d) {
      x.size[d] = sizes[d];
      x.stride[d] = step;
      step *= sizes[d];
    }
    memory_.emplace_back(new char[static_cast<size_t>(count(sizes) * size_of(dtype))]);
    x.data = memory_.back().get();
    return x;
  }

  Random& random_;
  std::vector<std::unique_ptr<char[]>> memory_;
};

inline std::string bytes_of(const Tensors& tensors) {
  std::string all;
  for (const auto& x : tensors) {
    if (x) {
      int64_t n = size_of(x->dtype);
      for (int d = 0; d < x->rank; ++d) {
        n *= x->size[d];
      }
      all.append(static_cast<const char*>(x->data), static_cast<size_t>(n));
    }
  }
  return all;
}

inline void expect_written(const Tensors& tensors, int64_t problem) {
  for (const auto& x : tensors) {
    if (!x) {
      continue;
    }
    int64_t n = 1;
    for (int d = 0; d < x->rank; ++d) {
      n *= x->size[d];
    }
    for (int64_t i = 0; i < n * size_of(x->dtype); i += size_of(x->dtype)) {
      bool blank = true;
      for (int64_t byte = 0; byte < size_of(x->dtype); ++byte) {
        blank = blank && static_cast<const unsigned char*>(x->data)[i + byte] == 0xff;
      }
      if (blank) {
        std::printf("problem %lld: a result was not written\n", static_cast<long long>(problem));
        std::exit(1);
      }
    }
  }
}

// The same bits as those before, if there were any.
inline void expect_same(std::string& before, const std::string& bytes, int64_t problem) {
  if (!before.empty() && bytes != before) {
    std::printf("problem %lld: other bits under another schedule\n", static_cast<long long>(problem));
    std::exit(1);
  }
  before = bytes;
}

}  // namespace kx
