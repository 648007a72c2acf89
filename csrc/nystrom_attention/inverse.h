// The iterated inverse of a matrix and its gradient, of one head on a CPU: "The inverse" and "Gradients" of
// kx_kernels/ops/nystrom_attention/README.md.
#pragma once

#include <algorithm>
#include <utility>

#include "../cpu/gemm.h"
#include "../cpu/rows.h"

namespace kx::nystrom_attention::KX_ISA {
namespace {

using namespace ::kx::KX_ISA;

// Matrices are [m, width], rows padded to whole vectors.
template <class A>
class Inverse {
 public:
  Inverse(int m, int iterations, bool backward)
      : m(m), width((m + kLanes - 1) / kLanes * kLanes), iterations(iterations) {
    const int states = backward ? iterations + 1 : 2;
    memory_ = zeros<A>(static_cast<size_t>(states + (backward ? 12 : 5)) * size() + kLanes);
    A* next = memory_.get();
    for (A** matrix : {&a, &x, &t1, &t2, &t3}) {
      *matrix = std::exchange(next, next + size());
    }
    if (backward) {
      for (A** matrix : {&grad_z, &grad_a, &grad_t, &grad_t2, &grad_x, &turned, &spare}) {
        *matrix = std::exchange(next, next + size());
      }
    }
    states_ = next;
    keeps_all_ = backward;
  }

  // The largest sum of a column of `a`, and how many columns have it.
  A largest_column(int* ties) {
    const A* const sums = column_sums();
    const A largest = *std::max_element(sums, sums + m);
    *ties = static_cast<int>(std::count(sums, sums + m, largest));
    return largest;
  }
  // Adds `share` to the gradients of the columns whose sum is `norm`.
  void add_to_largest(A norm, A share) {
    const A* const sums = column_sums();
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < m; ++j) {
        grad_a[i * width + j] += sums[j] == norm ? share : A{0};
      }
    }
  }

  // Z of `a` from aᵀ / norm.
  const A* run(A norm) {
    A* z = state(0);
    transpose(m, m, a, width, z, width);
    for_each([&](size_t i) { z[i] /= norm; });
    for (int n = 0; n < iterations; ++n) {
      polynomials(state(n));
      z = state(n + 1);
      multiply(state(n), false, t3, z);
      for_each([&](size_t i) { z[i] *= A{0.25}; });
    }
    return z;
  }

  // After `run`, from `grad_z`, which is changed: adds to `grad_a`, but for what comes by the norm, and gives
  // −⟨∂Z₀, Z₀⟩, the gradient of the norm's logarithm.
  A backward(A norm) {
    for (int n = iterations - 1; n >= 0; --n) {
      const A* const z = state(n);
      polynomials(z);
      multiply(z, true, grad_z, grad_t);
      for_each([&](size_t i) { grad_t[i] *= A{0.25}; });
      multiply(x, true, grad_t, grad_t2);
      for_each([&](size_t i) { grad_t2[i] = -grad_t2[i]; });
      multiply(x, true, grad_t2, grad_x);  // ∂T₁ is −grad_x
      multiply_by_turned(grad_t, t2, grad_x, -1);
      multiply_by_turned(grad_t2, t1, grad_x, -1);
      multiply_by_turned(grad_x, z, grad_a, 1);
      transpose(m, m, t3, width, turned, width);
      multiply(grad_z, false, turned, spare);
      multiply(a, true, grad_x, grad_z);
      for_each([&](size_t i) { grad_z[i] += A{0.25} * spare[i]; });
    }
    const A* const z = state(0);
    using V = vector_t<A>;
    A product = 0;
    for (int i = 0; i < m; ++i) {
      V of_row = all(A{0});
      for (int j = 0; j < width; j += kLanes) {
        of_row = fma(load(grad_z + i * width + j), load(z + i * width + j), of_row);
      }
      product += sum(of_row).v[0];
      for (int j = 0; j < m; ++j) {
        grad_a[j * width + i] += grad_z[i * width + j] / norm;
      }
    }
    return -product;
  }

  // Of z, the Moore-Penrose inverse of `a`: adds to `grad_a` what comes from `grad_z`. (What comes by the null spaces
  // of `a` vanishes: README.md.)
  void backward_of_pinv(const A* z) {
    multiply(z, true, grad_z, spare);
    multiply_by_turned(spare, z, grad_a, -1);
  }

  const int m, width, iterations;
  A* a;
  A *grad_z = nullptr, *grad_a = nullptr;

 private:
  static constexpr int kLanes = vector_t<A>::kLanes;
  static constexpr int kShort = 16;  // of a long sum: sums of so many, and their sum, round less
  size_t size() const { return static_cast<size_t>(m) * width; }
  // In t1, which the next product overwrites.
  const A* column_sums() {
    std::fill_n(t1, width, A{0});
    for (int first = 0; first < m; first += kShort) {
      std::fill_n(t2, width, A{0});
      for (int i = first; i < std::min(m, first + kShort); ++i) {
        for (int j = 0; j < m; ++j) {
          t2[j] += a[i * width + j];
        }
      }
      for (int j = 0; j < m; ++j) {
        t1[j] += t2[j];
      }
    }
    return t1;
  }
  A* state(int n) { return states_ + (keeps_all_ ? n : n % 2) * size(); }

  template <class Each>
  void for_each(Each&& each) {
    for (size_t i = 0; i < size(); ++i) {
      each(i);
    }
  }
  // to = l · r, or lᵀ · r.
  void multiply(const A* l, bool turn, const A* r, A* to, bool add_to = false) {
    gemm(m, m, m, l, turn ? 1 : width, turn ? width : 1, r, width, to, width, add_to, Part::kAll, [] {});
  }
  // to += sign · l · rᵀ.
  void multiply_by_turned(const A* l, const A* r, A* to, int sign) {
    transpose(m, m, r, width, turned, width);
    if (sign < 0) {
      for_each([&](size_t i) { turned[i] = -turned[i]; });
    }
    multiply(l, false, turned, to, true);
  }
  // number · I − x.
  void subtract_from(A number, A* t) {
    for_each([&](size_t i) { t[i] = -t[i]; });
    for (int i = 0; i < m; ++i) {
      t[i * width + i] += number;
    }
  }
  // X, T₁, T₂ and T₃ of a step from z.
  void polynomials(const A* z) {
    multiply(a, false, z, x);
    std::copy_n(x, size(), t1);
    subtract_from(7, t1);
    multiply(x, false, t1, t2);
    subtract_from(15, t2);
    multiply(x, false, t2, t3);
    subtract_from(13, t3);
  }

  A *x, *t1, *t2, *t3;
  A *grad_t = nullptr, *grad_t2 = nullptr, *grad_x = nullptr, *turned = nullptr, *spare = nullptr;
  A* states_;
  bool keeps_all_;
  Buffer<A> memory_;
};

}  // namespace
}  // namespace kx::nystrom_attention::KX_ISA
