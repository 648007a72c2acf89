// Where a row's angles are: the same few lines on a CPU and on a GPU. Static, see ../cpu/isa.h.
#pragma once

#include <cstdint>

#include "problem.h"

#ifdef __CUDACC__
#define KX_HOST_DEVICE __host__ __device__
#else
#define KX_HOST_DEVICE
#endif

namespace kx::rope {

struct Row {
  int64_t position;  // negative: padding; the table's length or more: no angle
  int64_t sequence;
};

static inline KX_HOST_DEVICE int64_t read_index(const void* data, DType dtype, int64_t i) {
  return dtype == DType::kInt32 ? static_cast<const int32_t*>(data)[i] : static_cast<const int64_t*>(data)[i];
}

// The last n with cu_seqlens[n] <= t, or -1: the sequence of packed row t, where sequences may be empty.
static inline KX_HOST_DEVICE int64_t find_sequence(const Problem& p, int64_t t) {
  int64_t low = -1, high = p.num_sequences + 1;  // cu_seqlens[low] <= t < cu_seqlens[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (p.cu_seqlens[middle * p.cu_seqlens_stride] <= t) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

static inline KX_HOST_DEVICE Row locate(const Problem& p, int64_t b, int64_t t) {
  int64_t sequence = b, place = t;
  if (p.cu_seqlens != nullptr) {
    sequence = find_sequence(p, t);
    if (sequence < 0 || sequence == p.num_sequences) {
      return {-1, 0};
    }
    place = t - p.cu_seqlens[sequence * p.cu_seqlens_stride];
  }
  if (p.positions != nullptr) {
    const int64_t i = b * p.position_stride[0] + t * p.position_stride[1];
    return {read_index(p.positions, p.position_dtype, i), sequence};
  }
  if (p.offsets != nullptr) {
    return {place + read_index(p.offsets, p.position_dtype, sequence * p.offset_stride), sequence};
  }
  return {place + p.offset, sequence};
}

}  // namespace kx::rope
