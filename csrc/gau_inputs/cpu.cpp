// A gated attention's inputs on a CPU: each row streams through the first cache once. The formulas and their names are
// those of kx_kernels/ops/gau_inputs/README.md.
#include <omp.h>

#include <algorithm>
#include <limits>

#include "../cpu/isa.h"
#include "../cpu/rows.h"
#include "../cpu/simd.h"
#include "problem.h"

namespace kx::gau_inputs {
namespace KX_ISA {
namespace {

using namespace ::kx::KX_ISA;  // the vectors of this instruction set

constexpr int64_t kChunk = 512;  // elements of a gate or of values that are widened at a time
constexpr int64_t kRows = 64;    // rows of a block, whose gradients of gamma and beta are summed first
constexpr int64_t kLanes = 16;   // of any vector, at most: buffers are padded to so many

int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

template <class V>
V sigmoid(V x) {
  using A = std::conditional_t<std::is_same_v<V, Floats>, float, double>;
  return div(all(A{1}), add(all(A{1}), exp(mul(all(A{-1}), x))));
}

// φ of n numbers in their place, or where `grad` is given φ′ of them times it.
template <class A>
void activate(Activation f, int64_t n, A* x, const A* grad) {
  using V = vector_t<A>;
  const V one = all(A{1}), minus = all(A{-1});
  if (f == Activation::kSilu) {
    for (int64_t i = 0; i < n; i += V::kLanes) {
      const V value = load(x + i), s = sigmoid(value);
      if (grad == nullptr) {
        store(x + i, mul(value, s));
      } else {
        const V slope = mul(s, fma(value, fma(minus, s, one), one));  // σ (1 + x (1 − σ))
        store(x + i, mul(load(grad + i), slope));
      }
    }
  } else if (grad == nullptr) {
    for (int64_t i = 0; i < n && f == Activation::kRelu; i += V::kLanes) {
      store(x + i, max(all(A{0}), load(x + i)));
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      x[i] = f == Activation::kRelu && x[i] <= 0 ? A{0} : grad[i];
    }
  }
}

// A row of any float type, widened.
template <class A, class T>
void widen_row(const T* from, int64_t stride, int64_t n, A* to) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = static_cast<A>(widen(from[i * stride]));
  }
}
template <class A>
void widen_row(DType dtype, const void* from, int64_t first, int64_t stride, int64_t n, A* to) {
  with_float(dtype,
             [&](auto example) { widen_row(static_cast<const decltype(example)*>(from) + first, stride, n, to); });
}

// gamma or beta, widened once for all rows: [heads, padded(key_dim)].
template <class A>
Buffer<A> widened(const Problem& p, const View& x) {
  const int64_t width = padded(p.key_dim);
  Buffer<A> out = zeros<A>(p.heads * width);
  for (int64_t m = 0; m < p.heads && x.data != nullptr; ++m) {
    widen_row(p.affine_dtype, x.data, m * x.stride[0], x.stride[1], p.key_dim, out.get() + m * width);
  }
  return out;
}

template <class T>
T* row_of(const View& x, int64_t b, int64_t t) {
  return static_cast<T*>(x.data) + b * x.stride[0] + t * x.stride[1];
}

template <class T>
void clear_row(const View& x, int64_t b, int64_t t, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    row_of<T>(x, b, t)[i * x.stride[2]] = T{};
  }
}

// φ(x), or φ′(x) times a gradient, of one row.
template <class T>
void activate_row(Activation f, int64_t b, int64_t t, int64_t n, const View& x, const View* grad, const View& out) {
  using A = compute_t<T>;
  alignas(64) A value[kChunk] = {}, slope[kChunk] = {};
  for (int64_t first = 0; first < n; first += kChunk) {
    const int64_t count = std::min(kChunk, n - first);
    load_row(row_of<const T>(x, b, t) + first * x.stride[2], x.stride[2], count, value);
    if (grad != nullptr) {
      load_row(row_of<const T>(*grad, b, t) + first * grad->stride[2], grad->stride[2], count, slope);
    }
    activate(f, count, value, grad == nullptr ? nullptr : slope);
    store_row(value, count, row_of<T>(out, b, t) + first * out.stride[2], out.stride[2]);
  }
}

// What one thread works with. A is the type that arithmetic is done in; rows are padded to whole vectors.
template <class T, class A>
class Worker {
 public:
  Worker(const Problem& p, const A* gamma, const A* beta) : p(p), gamma(gamma), beta(beta) {
    memory = zeros<A>(5 * width);
    a = memory.get();
    head = a + width;
    grad = head + width;
    cos = grad + width;
    sin = cos + width;
  }

  void forward(int64_t b, int64_t t) {
    if (!keeps(b, t)) {
      clear(b, t);
      return;
    }
    if (p.u.data != nullptr) {
      activate_row<T>(p.activation, b, t, p.gate_dim, p.u, nullptr, p.gate);
    }
    activate_row<T>(p.activation, b, t, p.value_dim, p.v, nullptr, p.values);
    load_row(row_of<const T>(p.z, b, t), p.z.stride[2], p.key_dim, a);
    activate(p.activation, p.key_dim, a, static_cast<const A*>(nullptr));
    const bool turns = load_angles(b, t);
    for (int64_t m = 0; m < p.heads; ++m) {
      for (int64_t d = 0; d < width; d += V::kLanes) {
        store(head + d, fma(load(a + d), load(gamma + m * width + d), load(beta + m * width + d)));
      }
      if (turns) {
        turn(head, A{1});
      }
      store_row(head, p.key_dim, row_of<T>(p.parts[m], b, t), p.parts[m].stride[2]);
    }
  }

  // The gradients of one row; what it adds to those of gamma and beta, each [heads, key_dim].
  void backward(int64_t b, int64_t t, double* grad_gamma, double* grad_beta) {
    if (!keeps(b, t)) {
      clear_gradients(b, t);
      return;
    }
    if (p.u.data != nullptr) {
      activate_row<T>(p.activation, b, t, p.gate_dim, p.u, &p.gate, p.grad_u);
    }
    activate_row<T>(p.activation, b, t, p.value_dim, p.v, &p.values, p.grad_v);
    load_row(row_of<const T>(p.z, b, t), p.z.stride[2], p.key_dim, a);
    activate(p.activation, p.key_dim, a, static_cast<const A*>(nullptr));
    const bool turns = load_angles(b, t);
    std::fill_n(grad, width, A{0});
    for (int64_t m = 0; m < p.heads; ++m) {
      load_row(row_of<const T>(p.parts[m], b, t), p.parts[m].stride[2], p.key_dim, head);
      if (turns) {
        turn(head, A{-1});
      }
      for (int64_t d = 0; d < width; d += V::kLanes) {
        store(grad + d, fma(load(head + d), load(gamma + m * width + d), load(grad + d)));
      }
      for (int64_t d = 0; d < p.key_dim; ++d) {
        const double g = head[d];
        grad_gamma[m * p.key_dim + d] += g * a[d];
        grad_beta[m * p.key_dim + d] += g;
      }
    }
    load_row(row_of<const T>(p.z, b, t), p.z.stride[2], p.key_dim, a);
    activate(p.activation, p.key_dim, a, grad);
    store_row(a, p.key_dim, row_of<T>(p.grad_z, b, t), p.grad_z.stride[2]);
  }

 private:
  using V = vector_t<A>;

  bool keeps(int64_t b, int64_t t) const {
    if (p.mask != nullptr && p.mask[b * p.mask_stride[0] + t * p.mask_stride[1]] == 0) {
      return false;
    }
    return p.cu_seqlens == nullptr || (t >= p.cu_seqlens[0] && t < p.cu_seqlens[p.num_sequences]);
  }

  // cos and sin of a row's position; false where it does not turn.
  bool load_angles(int64_t b, int64_t t) {
    int64_t sequence = b, position = t;
    if (p.cu_seqlens != nullptr) {
      sequence = std::upper_bound(p.cu_seqlens, p.cu_seqlens + p.num_sequences, t) - p.cu_seqlens - 1;
      position -= p.cu_seqlens[sequence];
    }
    position += p.offsets != nullptr ? p.offsets[sequence] : p.offset;
    if (p.half == 0 || position < 0) {
      return false;
    }
    if (position >= p.table_length) {
      std::fill_n(cos, p.half, std::numeric_limits<A>::quiet_NaN());
      std::fill_n(sin, p.half, std::numeric_limits<A>::quiet_NaN());
    } else {
      widen_row(p.table_dtype, p.cos, position * p.cos_stride[0], p.cos_stride[1], p.half, cos);
      widen_row(p.table_dtype, p.sin, position * p.sin_stride[0], p.sin_stride[1], p.half, sin);
    }
    return true;
  }

  // The pairs of a head by their angles, or by the opposite ones.
  void turn(A* x, A sign) const {
    const int64_t step = p.interleaved ? 2 : 1, other = p.interleaved ? 1 : p.half;
    for (int64_t i = 0; i < p.half; ++i) {
      A &x0 = x[step * i], &x1 = x[step * i + other];
      const A c = cos[i], s = sign * sin[i], y0 = x0 * c - x1 * s;
      x1 = x1 * c + x0 * s;
      x0 = y0;
    }
  }

  void clear(int64_t b, int64_t t) const {
    if (p.u.data != nullptr) {
      clear_row<T>(p.gate, b, t, p.gate_dim);
    }
    clear_row<T>(p.values, b, t, p.value_dim);
    for (const View& x : p.parts) {
      clear_row<T>(x, b, t, p.key_dim);
    }
  }

  void clear_gradients(int64_t b, int64_t t) const {
    if (p.u.data != nullptr) {
      clear_row<T>(p.grad_u, b, t, p.gate_dim);
    }
    clear_row<T>(p.grad_v, b, t, p.value_dim);
    clear_row<T>(p.grad_z, b, t, p.key_dim);
  }

  const Problem& p;
  const A *gamma, *beta;
  const int64_t width = padded(p.key_dim);
  Buffer<A> memory;
  A *a, *head, *grad, *cos, *sin;
};

template <class T>
void forward(const Problem& p, int threads) {
  using A = compute_t<T>;
  const Buffer<A> gamma = widened<A>(p, p.gamma), beta = widened<A>(p, p.beta);
  const int64_t rows = p.batch * p.length, blocks = (rows + kRows - 1) / kRows;
#pragma omp parallel num_threads(static_cast<int>(std::clamp<int64_t>(blocks, 1, threads))) if (threads > 1)
  {
    Worker<T, A> worker(p, gamma.get(), beta.get());
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; ++i) {
      worker.forward(i / p.length, i % p.length);
    }
  }
}

// Blocks of rows have sums of their own for gamma and beta, however many threads there are; in float64, as they are
// long.
template <class T>
void backward(const Problem& p, int threads) {
  using A = compute_t<T>;
  const Buffer<A> gamma = widened<A>(p, p.gamma), beta = widened<A>(p, p.beta);
  const int64_t all_heads = p.heads * p.key_dim;
  const int64_t rows = p.batch * p.length, blocks = (rows + kRows - 1) / kRows;
  const Buffer<double> sums = zeros<double>(2 * all_heads * (blocks + 1));  // the last are those of all
#pragma omp parallel num_threads(static_cast<int>(std::clamp<int64_t>(blocks, 1, threads))) if (threads > 1)
  {
    Worker<T, A> worker(p, gamma.get(), beta.get());
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      double* const own = sums.get() + 2 * all_heads * block;
      for (int64_t i = block * kRows; i < std::min(rows, (block + 1) * kRows); ++i) {
        worker.backward(i / p.length, i % p.length, own, own + all_heads);
      }
    }
  }
  double* const total = sums.get() + 2 * all_heads * blocks;
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t d = 0; d < 2 * all_heads; ++d) {
      total[d] += sums[2 * all_heads * block + d];
    }
  }
  const auto put = [&](const View& x, const double* from) {
    for (int64_t i = 0; i < all_heads && x.data != nullptr; ++i) {
      const int64_t at = i / p.key_dim * x.stride[0] + i % p.key_dim * x.stride[1];
      if (p.affine_dtype == p.dtype) {
        narrow(static_cast<A>(from[i]), static_cast<T*>(x.data) + at);
      } else {
        narrow(static_cast<A>(from[i]), static_cast<A*>(x.data) + at);
      }
    }
  };
  put(p.grad_gamma, total);
  put(p.grad_beta, total + all_heads);
}

}  // namespace

void run(const Problem& p, bool is_backward, int num_threads) {
  with_float(p.dtype, [&](auto example) {
    using T = decltype(example);
    is_backward ? backward<T>(p, std::max(1, num_threads)) : forward<T>(p, std::max(1, num_threads));
  });
}

}  // namespace KX_ISA

#ifdef KX_ISA_portable

KX_DECLARE_FOR_ISAS(void run(const Problem& p, bool is_backward, int num_threads);)

void cpu(const Tensors& in, const Tensors& out, const Options& options, int num_threads) {
  const Problem p = make_problem(in, out, options, false);
  KX_DISPATCH(run, p, false, num_threads);
}

void cpu_backward(const Tensors& in, const Tensors& out, const Options& options, int num_threads) {
  const Problem p = make_problem(in, out, options, true);
  KX_DISPATCH(run, p, true, num_threads);
}

#endif

}  // namespace kx::gau_inputs
