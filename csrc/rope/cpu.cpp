#include <cmath>
#include <limits>

#include "../common/half.h"
#include "../cpu/isa.h"
#include "problem.h"

#ifdef KX_ISA_portable
namespace kx::rope {
#ifdef KX_X86
namespace avx2 { void run(const Problem& p, int num_threads); }
namespace avx512 { void run(const Problem& p, int num_threads); }
#endif
namespace portable { void run(const Problem& p, int num_threads); }
void cpu(const std::vector<Tensor>& in, const std::vector<Tensor>& out, const Tensor& cos, const Tensor& sin,
         const std::optional<Tensor>& positions, const std::optional<Tensor>& offsets,
         const std::optional<Tensor>& cu_seqlens, int64_t offset, int64_t start, bool interleaved, bool inverse,
         int num_threads) {
  const Problem p =
      make_problem(in, out, cos, sin, positions, offsets, cu_seqlens, offset, start, interleaved, inverse);
  KX_DISPATCH(run, p, num_threads);
}
}  // namespace kx::rope
#endif

namespace kx::rope::KX_ISA {

void run(const Problem&, int) {}

}  // namespace kx::rope::KX_ISA
