// rope's CUDA kernel on the CPU against a plain loop, bit for bit, on random problems whose buffers end where their
// last element ends: AddressSanitizer sees any access past it.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>

#include "../common/half.h"
#include "../cpu/isa.h"
#include "../emulation/test.h"
#include "problem.h"

namespace kx::rope {
namespace {

using Random = std::mt19937_64;

int64_t draw(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

// A tensor with memory of its own: dimensions in any order, gaps between them, an odd first element.
struct Buffer {
  Tensor tensor;
  std::unique_ptr<char[]> memory;
};

Buffer make_buffer(Random& random, DType dtype, std::initializer_list<int64_t> sizes, bool plain) {
  Buffer b;
  b.tensor.dtype = dtype;
  for (const int64_t n : sizes) {
    b.tensor.size[b.tensor.rank++] = n;
  }
  int order[Tensor::kMaxRank] = {4, 3, 2, 1, 0};
  int* last_first = order + Tensor::kMaxRank - b.tensor.rank;
  if (!plain && draw(random, 0, 1) == 1) {
    std::shuffle(last_first, order + Tensor::kMaxRank, random);
  }
  int64_t step = plain ? 1 : draw(random, 1, 2), elements = 1;
  const int64_t begin = plain ? 0 : draw(random, 0, 2);
  for (int i = 0; i < b.tensor.rank; ++i) {
    const int d = last_first[i];
    const int64_t n = b.tensor.size[d];
    b.tensor.stride[d] = step;
    elements += (n > 0 ? n - 1 : 0) * step;
    step *= (n > 0 ? n : 1);
    step += plain ? 0 : draw(random, 0, 3);
  }
  const auto bytes = static_cast<size_t>((begin + elements) * size_of(dtype));
  b.memory.reset(new char[bytes]);
  for (size_t i = 0; i < bytes; i += 2) {  // any bits: NaN and infinity among them
    const auto bits = static_cast<uint16_t>(random());
    std::memcpy(b.memory.get() + i, &bits, 2);
  }
  b.tensor.data = b.memory.get() + begin * size_of(dtype);
  return b;
}

template <class F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kBFloat16:
      return f(bfloat16{});
    case DType::kFloat16:
      return f(float16{});
    default:
      return f(float{});
  }
}

float widen(bfloat16 x) { return to_float(x); }
float widen(float16 x) { return to_float(x); }
float widen(float x) { return x; }
double widen(double x) { return x; }

template <class T>
T narrow(double x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return to_bfloat16(static_cast<float>(x));
  } else if constexpr (std::is_same_v<T, float16>) {
    return to_float16(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}

double read(const Tensor& t, int64_t i, int64_t j, int64_t k) {
  double value = 0;
  with_type(t.dtype, [&](auto type) {
    const int64_t batch = t.rank == 3 && t.size[0] > 1 ? i * t.stride[0] : 0;
    value =
        widen(static_cast<const decltype(type)*>(t.data)[batch + j * t.stride[t.rank - 2] + k * t.stride[t.rank - 1]]);
  });
  return value;
}

template <class T>
bool same(T a, T b) {
  return std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(widen(a)) && std::isnan(widen(b)));
}

struct Call {
  Buffer in[2], out[2], cos, sin, index, cu_seqlens;
  int operands;
  bool packed;
  int64_t batch, length, head_dim, half, start, table_length, offset;
  bool interleaved, inverse, positions, offsets;
};

int64_t read_index(const Tensor& t, int64_t i, int64_t j) {
  const int64_t at = t.rank == 2 ? i * t.stride[0] + j * t.stride[1] : j * t.stride[0];
  return t.dtype == DType::kInt32 ? static_cast<const int32_t*>(t.data)[at] : static_cast<const int64_t*>(t.data)[at];
}

template <class T>
void check(const Call& call, const Buffer& in, const Buffer& out, bool inplace, const std::vector<char>& before) {
  using A = decltype(widen(T{}));
  const Tensor& x = in.tensor;
  const Tensor& y = out.tensor;
  const int rank = x.rank;
  for (int64_t b = 0; b < (call.packed ? 1 : call.batch); ++b) {
    for (int64_t t = 0; t < call.length; ++t) {
      int64_t sequence = b, place = t;
      bool inside = true;
      if (call.packed) {
        const auto* ends = static_cast<const int32_t*>(call.cu_seqlens.tensor.data);
        const int64_t stride = call.cu_seqlens.tensor.stride[0];
        sequence = -1;
        while (sequence + 1 <= call.batch && ends[(sequence + 1) * stride] <= t) {
          ++sequence;
        }
        inside = sequence >= 0 && sequence < call.batch;
        place = inside ? t - ends[sequence * stride] : 0;
      }
      int64_t position = place + call.offset;
      if (inside && call.positions) {
        position = read_index(call.index.tensor, b, t);
      } else if (inside && call.offsets) {
        position = place + read_index(call.index.tensor, 0, sequence);
      }
      position = inside ? position : -1;
      for (int64_t h = 0; h < x.size[rank - 2]; ++h) {
        const auto at = [&](const Tensor& tensor, int64_t d) {
          return (rank == 4 ? b * tensor.stride[0] : 0) + t * tensor.stride[rank - 3] + h * tensor.stride[rank - 2] +
                 d * tensor.stride[rank - 1];
        };
        const auto* source = inplace ? reinterpret_cast<const T*>(before.data()) +
                                           (static_cast<const T*>(x.data) - reinterpret_cast<T*>(in.memory.get()))
                                     : static_cast<const T*>(x.data);
        for (int64_t d = 0; d < call.head_dim; ++d) {
          T expected = source[at(x, d)];
          const int64_t r = d - call.start;
          if (position >= 0 && r >= 0 && r < 2 * call.half) {
            const int64_t pair = call.interleaved ? r / 2 : r % call.half;
            const bool second = call.interleaved ? r % 2 == 1 : r >= call.half;
            const int64_t other = call.start + (call.interleaved ? r ^ 1 : second ? r - call.half : r + call.half);
            A c = NAN, s = NAN;
            if (position < call.table_length) {
              c = static_cast<A>(read(call.cos.tensor, sequence, position, pair));
              s = static_cast<A>(read(call.sin.tensor, sequence, position, pair));
            }
            s = call.inverse ? -s : s;
            const A mine = widen(source[at(x, d)]), its = widen(source[at(x, other)]);
            expected = narrow<T>(second ? std::fma(mine, c, its * s) : std::fma(mine, c, -(its * s)));
          }
          const T actual = static_cast<const T*>(y.data)[at(y, d)];
          if (!same(actual, expected)) {
            std::fprintf(stderr, "b %ld t %ld h %ld d %ld: %g, expected %g\n", b, t, h, d,
                         static_cast<double>(widen(actual)), static_cast<double>(widen(expected)));
            std::exit(1);
          }
        }
      }
    }
  }
}

void run(uint64_t seed, bool on_gpu) {
  Random random(seed);
  const DType floats[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  const DType dtype = floats[draw(random, 0, 3)], table_dtype = floats[draw(random, 0, 3)];
  const bool plain = draw(random, 0, 1) == 1;  // contiguous and aligned, so that wide vectors are used
  Call call;
  call.operands = static_cast<int>(draw(random, 1, 2));
  call.packed = draw(random, 0, 1) == 1;
  call.batch = draw(random, 0, 3);
  call.length = draw(random, 0, 11);
  const bool large = draw(random, 0, 9) == 0;  // heads past every block of dimensions
  call.half = (large ? 140 : 0) + (plain ? 8 * draw(random, 1, 4) : draw(random, 0, 20));
  call.start = plain ? 16 * draw(random, 0, 1) : draw(random, 0, 9);
  call.head_dim = call.start + 2 * call.half + (plain ? 8 * draw(random, 0, 2) : draw(random, 0, 9));
  call.head_dim = call.head_dim > 0 ? call.head_dim : 1;
  call.table_length = draw(random, 0, 9);
  call.offset = draw(random, -4, 4);
  call.interleaved = draw(random, 0, 1) == 1;
  call.inverse = draw(random, 0, 1) == 1;
  call.positions = draw(random, 0, 1) == 1;
  call.offsets = !call.positions && draw(random, 0, 1) == 1;
  const bool inplace = draw(random, 0, 3) == 0;

  std::vector<Tensor> in, out;
  std::vector<char> before[2];
  for (int i = 0; i < call.operands; ++i) {
    const int64_t heads = draw(random, 0, 19);
    const auto make = [&] {
      return call.packed ? make_buffer(random, dtype, {call.length, heads, call.head_dim}, plain)
                         : make_buffer(random, dtype, {call.batch, call.length, heads, call.head_dim}, plain);
    };
    call.in[i] = make();
    if (!inplace) {
      call.out[i] = make();
    }
    in.push_back(call.in[i].tensor);
    out.push_back(inplace ? call.in[i].tensor : call.out[i].tensor);
    int64_t bytes = static_cast<const char*>(call.in[i].tensor.data) - call.in[i].memory.get() + size_of(dtype);
    for (int d = 0; d < in[i].rank; ++d) {
      bytes += (in[i].size[d] > 0 ? in[i].size[d] - 1 : 0) * in[i].stride[d] * size_of(dtype);
    }
    before[i].assign(call.in[i].memory.get(), call.in[i].memory.get() + bytes);
  }
  const bool own_tables = draw(random, 0, 1) == 1;
  for (Buffer* table : {&call.cos, &call.sin}) {
    *table = own_tables ? make_buffer(random, table_dtype, {call.batch, call.table_length, call.half}, plain)
                        : make_buffer(random, table_dtype, {call.table_length, call.half}, plain);
  }
  if (call.positions || call.offsets) {
    const DType index_dtype = draw(random, 0, 1) == 1 ? DType::kInt32 : DType::kInt64;
    call.index = call.offsets  ? make_buffer(random, index_dtype, {call.batch}, plain)
                 : call.packed ? make_buffer(random, index_dtype, {call.length}, plain)
                               : make_buffer(random, index_dtype, {call.batch, call.length}, plain);
    const Tensor& t = call.index.tensor;
    for (int64_t i = 0; i < t.size[0]; ++i) {
      for (int64_t j = 0; j < (t.rank == 2 ? t.size[1] : 1); ++j) {
        const int64_t at = i * t.stride[0] + j * t.stride[1], value = draw(random, -2, call.table_length);
        if (index_dtype == DType::kInt32) {
          static_cast<int32_t*>(t.data)[at] = static_cast<int32_t>(value);
        } else {
          static_cast<int64_t*>(t.data)[at] = value;
        }
      }
    }
  }
  std::optional<Tensor> positions, offsets, cu_seqlens;
  if (call.positions) {
    positions = call.index.tensor;
  }
  if (call.offsets) {
    offsets = call.index.tensor;
  }
  if (call.packed) {
    call.cu_seqlens = make_buffer(random, DType::kInt32, {call.batch + 1}, plain);
    int32_t end = static_cast<int32_t>(draw(random, 0, 1));
    for (int64_t i = 0; i <= call.batch; ++i) {
      static_cast<int32_t*>(call.cu_seqlens.tensor.data)[i * call.cu_seqlens.tensor.stride[0]] = end;
      end += static_cast<int32_t>(draw(random, 0, 4));
    }
    cu_seqlens = call.cu_seqlens.tensor;
  }

  if (on_gpu) {
    emulation::set_seed(seed);
    cuda(in, out, call.cos.tensor, call.sin.tensor, positions, offsets, cu_seqlens, call.offset, call.start,
         call.interleaved, call.inverse, 0, 0);
  } else {
    cpu(in, out, call.cos.tensor, call.sin.tensor, positions, offsets, cu_seqlens, call.offset, call.start,
        call.interleaved, call.inverse, 2);
  }
  for (int i = 0; i < call.operands; ++i) {
    with_type(dtype, [&](auto type) {
      check<decltype(type)>(call, call.in[i], inplace ? call.in[i] : call.out[i], inplace, before[i]);
    });
    KX_EXPECT(inplace || std::memcmp(call.in[i].memory.get(), before[i].data(), before[i].size()) == 0);
  }
}

// Tables one row shorter than the call says: AddressSanitizer has to stop it.
void read_past_the_table() {
  Random random(0);
  Buffer x = make_buffer(random, DType::kFloat32, {1, 4, 1, 16}, true);
  Buffer y = make_buffer(random, DType::kFloat32, {1, 4, 1, 16}, true);
  Buffer table = make_buffer(random, DType::kFloat32, {3, 8}, true);
  table.tensor.size[0] = 4;
  cuda({x.tensor}, {y.tensor}, table.tensor, table.tensor, {}, {}, {}, 0, 0, false, false, 0, 0);
}

}  // namespace
}  // namespace kx::rope

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "overrun") == 0) {
    kx::rope::read_past_the_table();
    return 0;
  }
  const uint64_t problems = argc == 2 ? std::strtoull(argv[1], nullptr, 10) : 4000;
  for (uint64_t seed = 1; seed <= problems; ++seed) {
    kx::rope::run(seed, true);
    if (std::strcmp(kx::isa_name(), "portable") != 0) {  // which rounds twice where the loop rounds once
      kx::rope::run(seed, false);
    }
  }
  std::printf("rope: %lu problems, every bit as expected\n", problems);
}
