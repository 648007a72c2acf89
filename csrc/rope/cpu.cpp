// rope on a CPU: the angles of a few tokens are widened once, then every head of q and k streams past them.
#include <omp.h>

#include <algorithm>
#include <limits>

#include "../cpu/isa.h"
#include "../cpu/rows.h"
#include "../cpu/simd.h"
#include "position.h"
#include "problem.h"

namespace kx::rope {
namespace KX_ISA {
namespace {

using namespace ::kx::KX_ISA;  // the vectors of this instruction set

constexpr int kTokens = 64;        // tokens whose angles are held at a time, at most
constexpr int64_t kChunk = 256;    // dimensions whose angles are held at a time, at most
constexpr int64_t kAngles = 8192;  // angles held at a time: they share the first cache with the rows
constexpr int64_t kGrain = 16384;  // elements worth a thread of their own

// The angles of up to kChunk dimensions of one token, in the layout that the pairing multiplies them in.
// half-split:  c[i] = cos_i, s[i] = sin_i;   interleaved: c = cos_0 cos_0 cos_1 …, s = −sin_0 sin_0 −sin_1 …
template <class A>
struct Angles {
  A* c;
  A* s;
};

template <class A, class Table>
void load_angles(const Problem& p, Row row, int64_t first, int64_t pairs, Angles<A> angles) {
  const auto* cos = static_cast<const Table*>(p.cos) + row.sequence * p.cos_stride[0] + row.position * p.cos_stride[1] +
                    first * p.cos_stride[2];
  const auto* sin = static_cast<const Table*>(p.sin) + row.sequence * p.sin_stride[0] + row.position * p.sin_stride[1] +
                    first * p.sin_stride[2];
  const A sign = p.inverse ? A{-1} : A{1};
  for (int64_t i = 0; i < pairs; ++i) {
    const A c = static_cast<A>(widen(cos[i * p.cos_stride[2]]));
    const A s = sign * static_cast<A>(widen(sin[i * p.sin_stride[2]]));
    if (p.interleaved) {
      angles.c[2 * i] = angles.c[2 * i + 1] = c;
      angles.s[2 * i] = -s;
      angles.s[2 * i + 1] = s;
    } else {
      angles.c[i] = c;
      angles.s[i] = s;
    }
  }
}

template <class A>
void load_angles(const Problem& p, Row row, int64_t first, int64_t pairs, Angles<A> angles) {
  if (row.position < 0) {
    return;  // padding has none
  }
  if (row.position >= p.table_length) {
    for (int64_t i = 0; i < (p.interleaved ? 2 * pairs : pairs); ++i) {
      angles.c[i] = angles.s[i] = std::numeric_limits<A>::quiet_NaN();
    }
    return;
  }
  with_float(p.table_dtype, [&](auto example) { load_angles<A, decltype(example)>(p, row, first, pairs, angles); });
}

template <bool kStream, class T, class V>
void put(T* p, V x) {
  if constexpr (kStream) {
    stream(p, x);
  } else {
    store(p, x);
  }
}

// One head, n pairs (i, i + half) from in0 and in1 on.
template <bool kStream, class T, class A>
void rotate_half(const T* in0, const T* in1, T* out0, T* out1, Angles<A> angles, int64_t n) {
  constexpr int kLanes = decltype(load(in0))::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const auto x0 = load(in0 + i), x1 = load(in1 + i), c = load(angles.c + i), s = load(angles.s + i);
    put<kStream>(out0 + i, fms(x0, c, mul(x1, s)));
    put<kStream>(out1 + i, fma(x1, c, mul(x0, s)));
  }
  if (i < n) {
    const int tail = static_cast<int>(n - i);
    const auto x0 = load(in0 + i, tail), x1 = load(in1 + i, tail);
    const auto c = load(angles.c + i, tail), s = load(angles.s + i, tail);
    store(out0 + i, fms(x0, c, mul(x1, s)), tail);
    store(out1 + i, fma(x1, c, mul(x0, s)), tail);
  }
}

// One head, n dimensions of pairs (2i, 2i + 1).
template <bool kStream, class T, class A>
void rotate_interleaved(const T* in, T* out, Angles<A> angles, int64_t n) {
  constexpr int kLanes = decltype(load(in))::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const auto x = load(in + i);
    put<kStream>(out + i, fma(x, load(angles.c + i), mul(swap_lanes<1>(x), load(angles.s + i))));
  }
  if (i < n) {
    const int tail = static_cast<int>(n - i);
    const auto x = load(in + i, tail);
    store(out + i, fma(x, load(angles.c + i, tail), mul(swap_lanes<1>(x), load(angles.s + i, tail))), tail);
  }
}

// One head whose dimensions are not neighbours in memory: through buffers, so that the bits are the same.
template <class T, class A>
void rotate_strided(const Problem& p, const T* in, int64_t in_stride, T* out, int64_t out_stride, int64_t first,
                    int64_t pairs, Angles<A> angles) {
  T x[kChunk] = {}, y[kChunk];
  const int64_t low = p.interleaved ? 2 * first : first, high = p.interleaved ? low + pairs : first + p.half;
  for (int64_t i = 0; i < pairs; ++i) {
    x[i] = in[(low + i) * in_stride];
    x[pairs + i] = in[(high + i) * in_stride];
  }
  if (p.interleaved) {
    rotate_interleaved<false>(x, y, angles, 2 * pairs);
  } else {
    rotate_half<false>(x, x + pairs, y, y + pairs, angles, pairs);
  }
  for (int64_t i = 0; i < pairs; ++i) {
    out[(low + i) * out_stride] = y[i];
    out[(high + i) * out_stride] = y[pairs + i];
  }
}

template <class T>
void copy(const T* in, int64_t in_stride, T* out, int64_t out_stride, int64_t begin, int64_t end) {
  if (in_stride == 1 && out_stride == 1) {
    std::memcpy(out + begin, in + begin, (end - begin) * sizeof(T));
    return;
  }
  for (int64_t i = begin; i < end; ++i) {
    out[i * out_stride] = in[i * in_stride];
  }
}

// Pairs [first, first + pairs) of one head; with the first of them, all that passes through.
template <bool kStream, class T>
void rotate_head(const Problem& p, const Operand& x, const T* in, T* out, bool padding, int64_t first, int64_t pairs,
                 Angles<compute_t<T>> angles) {
  const int64_t in_stride = x.in_stride[3], out_stride = x.out_stride[3];
  if (first == 0 && x.in != x.out) {
    copy(in, in_stride, out, out_stride, 0, padding ? p.head_dim : p.start);
    copy(in, in_stride, out, out_stride, padding ? p.head_dim : p.start + 2 * p.half, p.head_dim);
  }
  if (padding) {
    return;
  }
  in += p.start * in_stride;
  out += p.start * out_stride;
  if (in_stride != 1 || out_stride != 1) {
    rotate_strided(p, in, in_stride, out, out_stride, first, pairs, angles);
  } else if (p.interleaved) {
    rotate_interleaved<kStream>(in + 2 * first, out + 2 * first, angles, 2 * pairs);
  } else {
    const int64_t second = p.half + first;
    rotate_half<kStream>(in + first, in + second, out + first, out + second, angles, pairs);
  }
}

// Pairs that are rotated at a time: kChunk dimensions.
inline int64_t pairs_at_a_time(const Problem& p) { return p.half < kChunk / 2 ? p.half : kChunk / 2; }

// Room for the cosines of so many pairs, or the sines, in whole vectors.
inline int64_t angles_per_token(const Problem& p) {
  const int64_t pairs = pairs_at_a_time(p);
  return ((p.interleaved ? 2 * pairs : pairs) + 15) / 16 * 16;
}

// Every head of q and k at tokens [t, t + n) of sequence b, n at most kTokens.
template <bool kStream, class T>
void rotate_tokens(const Problem& p, int64_t b, int64_t t, int64_t n, compute_t<T>* storage) {
  const int64_t width = angles_per_token(p), most = pairs_at_a_time(p);
  Row rows[kTokens];
  Angles<compute_t<T>> angles[kTokens];
  for (int64_t r = 0; r < n; ++r) {
    rows[r] = locate(p, b, t + r);
    angles[r] = {storage + 2 * r * width, storage + (2 * r + 1) * width};
  }
  int64_t first = 0;
  do {
    const int64_t pairs = p.half - first < most ? p.half - first : most;
    for (int64_t r = 0; r < n; ++r) {
      load_angles(p, rows[r], first, pairs, angles[r]);
    }
    for (int i = 0; i < p.num_operands; ++i) {
      const Operand& x = p.x[i];
      const T* in = static_cast<const T*>(x.in) + b * x.in_stride[0] + t * x.in_stride[1];
      T* out = static_cast<T*>(x.out) + b * x.out_stride[0] + t * x.out_stride[1];
      const auto head = [&](int64_t r, int64_t h) {
        rotate_head<kStream>(p, x, in + r * x.in_stride[1] + h * x.in_stride[2],
                             out + r * x.out_stride[1] + h * x.out_stride[2], rows[r].position < 0, first, pairs,
                             angles[r]);
      };
      if (x.out_stride[1] < x.out_stride[2]) {  // [B, H, T, D] in memory: a head's tokens are neighbours
        for (int64_t h = 0; h < x.heads; ++h) {
          for (int64_t r = 0; r < n; ++r) {
            head(r, h);
          }
        }
      } else {
        for (int64_t r = 0; r < n; ++r) {
          for (int64_t h = 0; h < x.heads; ++h) {
            head(r, h);
          }
        }
      }
    }
    first += pairs;
  } while (first < p.half);
}

// True if stores that bypass the caches pay and every vector of every row is aligned for them.
template <class T>
bool streams_out(const Problem& p) {
  constexpr int64_t kVector = decltype(load(static_cast<const T*>(nullptr)))::kLanes;
  int64_t bytes = 0;
  for (int i = 0; i < p.num_operands; ++i) {
    bytes += p.batch * p.length * p.x[i].heads * 2 * p.half * static_cast<int64_t>(sizeof(T));
  }
  const bool aligned = std::all_of(p.x, p.x + p.num_operands, [&](const Operand& x) {
    return x.in != x.out && can_stream(static_cast<const T*>(x.out) + p.start, x.out_stride, bytes);
  });
  return aligned && (p.interleaved || p.half % kVector == 0);
}

template <bool kStream, class T>
void rotate_rows(const Problem& p, int64_t begin, int64_t end) {
  alignas(64) compute_t<T> angles[kAngles];
  const int64_t fit = kAngles / (2 * (angles_per_token(p) + 1));
  const int64_t block = fit < 1 ? 1 : fit < kTokens ? fit : kTokens;
  for (int64_t row = begin, n; row < end; row += n) {
    const int64_t b = row / p.length, t = row % p.length;
    const int64_t left = p.length - t < end - row ? p.length - t : end - row;
    n = left < block ? left : block;
    rotate_tokens<kStream, T>(p, b, t, n, angles);
  }
  if (kStream) {
    stream_fence();
  }
}

template <class T>
void rotate(const Problem& p, int num_threads) {
  const int64_t rows = p.batch * p.length;
  const int64_t elements = rows * (p.x[0].heads + p.x[1].heads) * p.head_dim;
  if (elements == 0) {
    return;
  }
  const int64_t wanted = (elements + kGrain - 1) / kGrain;
  const int threads = static_cast<int>(wanted < num_threads ? wanted : num_threads);
  const bool streams = streams_out<T>(p);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t begin = rows * me / team, end = rows * (me + 1) / team;
    if (streams) {
      rotate_rows<true, T>(p, begin, end);
    } else {
      rotate_rows<false, T>(p, begin, end);
    }
  }
}

}  // namespace

void run(const Problem& p, int num_threads) {
  with_float(p.dtype, [&](auto example) { rotate<decltype(example)>(p, num_threads); });
}

}  // namespace KX_ISA

#ifdef KX_ISA_portable

KX_DECLARE_FOR_ISAS(void run(const Problem& p, int num_threads);)

void cpu(const std::vector<Tensor>& in, const std::vector<Tensor>& out, const Tensor& cos, const Tensor& sin,
         const std::optional<Tensor>& positions, const std::optional<Tensor>& offsets,
         const std::optional<Tensor>& cu_seqlens, int64_t offset, int64_t start, bool interleaved, bool inverse,
         int num_threads) {
  const Problem p =
      make_problem(in, out, cos, sin, positions, offsets, cu_seqlens, offset, start, interleaved, inverse);
  KX_DISPATCH(run, p, num_threads);
}

#endif

}  // namespace kx::rope
