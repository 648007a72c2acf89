// Chooses the widest vector that a call's addresses allow, and launches.
#include "../cuda/launch.cuh"
#include "kernel.cuh"
#include "problem.h"

namespace kx::rope {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t aligned(const void* p) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) & 15); }

// True if vectors of `width` elements lie within the rotated halves, side by side and aligned, in every row.
bool fits(const Problem& p, int64_t width) {
  const int64_t size = size_of(p.dtype);
  bool ok = p.start % width == 0 && (p.interleaved ? 2 * p.half : p.half) % width == 0;
  for (int i = 0; i < p.num_operands; ++i) {
    const Operand& x = p.x[i];
    ok = ok && x.in_stride[3] == 1 && x.out_stride[3] == 1;
    ok = ok && aligned(x.in) % (width * size) == 0 && aligned(x.out) % (width * size) == 0;
    for (int d = 0; d < 3; ++d) {
      ok = ok && x.in_stride[d] % width == 0 && x.out_stride[d] % width == 0;
    }
  }
  return ok;
}

template <class T, int W, bool kPairs>
void launch_kernel(const Problem& p, Stream stream) {
  Plan plan{p, static_cast<unsigned>(ceil_div(p.x[0].heads, kHeads)), 0, false};
  const int64_t groups = plan.q_groups + (p.num_operands == 2 ? ceil_div(p.x[1].heads, kHeads) : 0);
  plan.units = static_cast<int>(kPairs ? ceil_div(p.half, W) : p.half / W);
  const int64_t angles = kPairs ? W / 2 : W;
  plan.wide_tables = wide_angles(p.cos, p.table_dtype, p.cos_stride, 2, angles) &&
                     wide_angles(p.sin, p.table_dtype, p.sin_stride, 2, angles);
  // A block's threads along x share a row: at least a few, as they also copy what is not rotated.
  const int64_t copied = (p.head_dim - 2 * p.half) / W;
  const int64_t wanted = plan.units > copied ? plan.units : copied;
  const unsigned x = static_cast<unsigned>(wanted < 1 ? 1 : wanted < kThreads ? wanted : kThreads);
  const unsigned fitting = kThreads / x;
  const unsigned y = static_cast<unsigned>(p.length < fitting ? p.length : fitting);
  const auto grid_limit = [](int64_t n) { return static_cast<unsigned>(n < 65535 ? n : 65535); };
  const dim3 grid(static_cast<unsigned>(groups), grid_limit(ceil_div(p.length, y)), grid_limit(p.batch));
  launch(rope_kernel<T, W, kPairs>, {grid, dim3(x, y), 0, stream}, plan);
}

// Vectors of 16 bytes, else of 4, else elements one by one.
template <class T>
void launch_widest(const Problem& p, Stream stream) {
  constexpr int kWide = 16 / sizeof(T), kNarrow = 4 / sizeof(T);
  if (fits(p, kWide)) {
    return p.interleaved ? launch_kernel<T, kWide, true>(p, stream) : launch_kernel<T, kWide, false>(p, stream);
  }
  if constexpr (kNarrow > 1) {
    if (fits(p, kNarrow)) {
      return p.interleaved ? launch_kernel<T, kNarrow, true>(p, stream) : launch_kernel<T, kNarrow, false>(p, stream);
    }
  }
  launch_kernel<T, 1, false>(p, stream);
}

}  // namespace

void cuda(const std::vector<Tensor>& in, const std::vector<Tensor>& out, const Tensor& cos, const Tensor& sin,
          const std::optional<Tensor>& positions, const std::optional<Tensor>& offsets,
          const std::optional<Tensor>& cu_seqlens, int64_t offset, int64_t start, bool interleaved, bool inverse,
          int device, intptr_t stream) {
  const Problem p =
      make_problem(in, out, cos, sin, positions, offsets, cu_seqlens, offset, start, interleaved, inverse);
  const int64_t heads = p.x[0].heads + (p.num_operands == 2 ? p.x[1].heads : 0);
  if (p.batch * p.length * heads * p.head_dim == 0) {
    return;
  }
  const DeviceGuard guard(device);
  const Stream on = (Stream)stream;  // a pointer on a GPU, a number in the emulation
  switch (p.dtype) {
    case DType::kFloat64:
      return launch_widest<double>(p, on);
    case DType::kBFloat16:
      return launch_widest<bfloat16>(p, on);
    case DType::kFloat16:
      return launch_widest<float16>(p, on);
    default:
      return launch_widest<float>(p, on);
  }
}

}  // namespace kx::rope
