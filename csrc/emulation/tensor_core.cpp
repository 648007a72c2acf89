#include "tensor_core.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "async.h"
#include "tensor_map.h"

namespace kx::emulation {
namespace {

// value = mantissa · 2^(exponent - fraction bits); a zero has mantissa 0.
struct Format {
  int exponent_bits, fraction_bits, unused_bits;
};
constexpr Format kFloat32{8, 23, 0};
template <Element kElement>
constexpr Format kFormat = kElement == Element::kFloat16    ? Format{5, 10, 0}
                           : kElement == Element::kBFloat16 ? Format{8, 7, 0}
                                                            : Format{8, 10, 13};  // float32's low bits are ignored

struct Number {
  int32_t mantissa, exponent;
  bool finite;
};

inline Number decode(const Format& format, uint32_t bits) {
  const auto [exponent_bits, fraction_bits, unused] = format;
  const int32_t most = (1 << exponent_bits) - 1, x = static_cast<int32_t>(bits >> unused);
  const int32_t field = x >> fraction_bits & most, fraction = x & ((1 << fraction_bits) - 1);
  const int32_t magnitude = fraction | (field != 0 ? 1 << fraction_bits : 0);
  const bool negative = (x >> (exponent_bits + fraction_bits) & 1) != 0;
  return {negative ? -magnitude : magnitude, (field == 0 ? 1 : field) - (most >> 1), field != most};
}

// Calls visit with the format of an element.
template <class Visit>
void visit_format(Element element, Visit visit) {
  switch (element) {
    case Element::kFloat16:
      return visit(kFormat<Element::kFloat16>);
    case Element::kBFloat16:
      return visit(kFormat<Element::kBFloat16>);
    default:
      return visit(kFormat<Element::kTf32>);
  }
}

float to_float(const Format& format, uint32_t bits) {
  const Number x = decode(format, bits);
  if (!x.finite) {
    const float value = x.mantissa == 1 << format.fraction_bits || x.mantissa == -(1 << format.fraction_bits)
                            ? std::numeric_limits<float>::infinity()
                            : std::numeric_limits<float>::quiet_NaN();
    return x.mantissa < 0 ? -value : value;
  }
  return std::ldexp(static_cast<float>(x.mantissa), x.exponent - format.fraction_bits);
}

// `units` times 2^exponent, cut towards zero.
float truncate(int64_t units, int exponent) {
  if (units == 0) {
    return 0;
  }
  auto magnitude = static_cast<uint64_t>(units < 0 ? -units : units);
  int shift = std::max(0, 64 - std::countl_zero(magnitude) - 24);
  shift = std::max(shift, -149 - exponent);
  magnitude = shift < 64 ? magnitude >> shift : 0;
  const int power = exponent + shift;
  const auto exact = static_cast<float>(static_cast<int32_t>(magnitude));
  const bool is_normal = power >= -126 && power <= 127;  // 2^power, and so ldexp is a product
  const float value =
      is_normal ? exact * std::bit_cast<float>(static_cast<uint32_t>(power + 127) << 23) : std::ldexp(exact, power);
  return units < 0 ? -value : value;
}

constexpr int kMaxGroup = 16;

// The products of one group and c: cut to multiples of 2^(largest - how.bits), added, and cut to float32.
float add_group(const Summation& how, int fraction_bits, float c, const int32_t* a, const int32_t* a_exponent,
                const int32_t* b, const int32_t* b_exponent, int n) {
  const Number start = decode(kFloat32, std::bit_cast<uint32_t>(c));
  int32_t products[kMaxGroup], exponents[kMaxGroup];
  int32_t largest = start.mantissa != 0 ? std::max(how.floor, start.exponent) : how.floor;
  for (int i = 0; i < n; ++i) {
    products[i] = a[i] * b[i];
    exponents[i] = a_exponent[i] + b_exponent[i];
    largest = products[i] != 0 ? std::max(largest, exponents[i]) : largest;
  }
  const auto cut = [&](int32_t mantissa, int32_t exponent, int fraction) {
    const int32_t magnitude = (mantissa < 0 ? -mantissa : mantissa) << (how.bits - fraction);  // below 2^(bits + 2)
    const int32_t units = magnitude >> std::clamp(largest - exponent, 0, 31);
    return mantissa < 0 ? -units : units;
  };
  int64_t sum = cut(start.mantissa, start.exponent, kFloat32.fraction_bits);
  for (int i = 0; i < n; ++i) {
    sum += cut(products[i], exponents[i], 2 * fraction_bits);
  }
  return truncate(sum, largest - how.bits);
}

constexpr int group_of(Element element, const Summation& how) {
  return element == Element::kTf32 ? how.group / 2 : how.group;
}

// Rows of decoded numbers, k to a row; groups of so many are multiplied at once.
struct Numbers {
  std::vector<int32_t> mantissas, exponents;
  std::vector<bool> zeros;    // of a group: all are
  std::vector<float> values;  // filled where one is infinite or NaN
  bool finite = true;

  Numbers(Element element, const uint32_t* bits, size_t n, size_t group)
      : mantissas(n), exponents(n), zeros((n + group - 1) / group) {
    visit_format(element, [&](auto format) {
      for (size_t i = 0; i < n; ++i) {
        const Number x = decode(format, bits[i]);
        mantissas[i] = x.mantissa;
        exponents[i] = x.exponent;
        finite &= x.finite;
      }
      for (size_t i = 0; i < n && !finite; ++i) {
        values.push_back(to_float(format, bits[i]));
      }
    });
    for (size_t i = 0; i < n; i += group) {
      const auto first = mantissas.begin() + static_cast<ptrdiff_t>(i);
      zeros[i / group] = std::all_of(first, first + static_cast<ptrdiff_t>(std::min(group, n - i)),
                                     [](int32_t mantissa) { return mantissa == 0; });
    }
  }
};

float sum_of_products(Element element, const Summation& how, float c, const Numbers& a, size_t row, const Numbers& b,
                      size_t column, int k) {
  const int group = group_of(element, how), fraction_bits = element == Element::kBFloat16 ? 7 : 10;
  for (int i = 0; i < k; i += group) {
    const size_t x = row * k + i, y = column * k + i;
    const int n = std::min(group, k - i);
    const auto is_finite = [&](const Numbers& of, size_t at) {
      return of.finite || std::all_of(&of.values[at], &of.values[at] + n, [](float v) { return std::isfinite(v); });
    };
    if (std::isfinite(c) && is_finite(a, x) && is_finite(b, y)) {
      const bool no_products = a.zeros[x / group] || b.zeros[y / group];  // most of a tile that is not full
      c = add_group(how, fraction_bits, c, &a.mantissas[x], &a.exponents[x], &b.mantissas[y], &b.exponents[y],
                    no_products ? 0 : n);
      continue;
    }
    const auto value = [&](const Numbers& of, size_t at) {
      return of.finite ? std::ldexp(static_cast<float>(of.mantissas[at]), of.exponents[at] - fraction_bits)
                       : of.values[at];
    };
    for (int j = 0; j < n; ++j) {
      c += value(a, x + j) * value(b, y + j);
    }
    if (std::isnan(c)) {
      c = std::bit_cast<float>(0x7fffffffu);
    }
  }
  return c;
}

// Element `i` of a fragment whose registers hold one element of 32 bits or two of 16.
uint32_t element_of(Element element, const uint32_t* registers, int i) {
  return element == Element::kTf32 ? registers[i] : registers[i / 2] >> (16 * (i % 2)) & 0xffffu;
}

struct MmaLane {
  Element element;
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

// The fragments' layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16" and "… mma.m16n8k8".
void mma_together(void* const* arguments) {
  const auto lane = [&](int l) -> const MmaLane& { return *static_cast<const MmaLane*>(arguments[l]); };
  const Element element = lane(0).element;
  const int per_register = 32 / bits_of(element), k = 8 * per_register;
  std::array<uint32_t, 16 * 16> a{};
  std::array<uint32_t, 8 * 16> b{};  // [column, k]
  for (int l = 0; l < 32; ++l) {
    const int group = l >> 2, quad = l & 3;
    for (int i = 0; i < 4 * per_register; ++i) {
      const int r = i / per_register, h = i % per_register;
      const int row = group + 8 * (r & 1), at = per_register * quad + h + 4 * per_register * (r >> 1);
      a[row * k + at] = element_of(element, lane(l).a, i);
    }
    for (int i = 0; i < 2 * per_register; ++i) {
      const int r = i / per_register, h = i % per_register;
      b[group * k + per_register * quad + h + 4 * per_register * r] = element_of(element, lane(l).b, i);
    }
  }
  const size_t summed = group_of(element, kAmpere);
  const Numbers x(element, a.data(), 16 * k, summed), y(element, b.data(), 8 * k, summed);
  for (int l = 0; l < 32; ++l) {
    for (int i = 0; i < 4; ++i) {
      const size_t row = (l >> 2) + 8 * (i >> 1), column = 2 * (l & 3) + (i & 1);
      lane(l).d[i] = sum_of_products(element, kAmpere, lane(l).d[i], x, row, y, column, k);
    }
  }
}

}  // namespace

float sum_of_products(Element element, const Summation& how, float c, const uint32_t* a, const uint32_t* b, int n) {
  const size_t summed = group_of(element, how);
  return sum_of_products(element, how, c, Numbers(element, a, n, summed), 0, Numbers(element, b, n, summed), 0, n);
}

void mma(Element element, float* d, const uint32_t* a, const uint32_t* b, Location here) {
  MmaLane mine{element, d, a, b};
  const char* const names[] = {"mma.m16n8k16 f16", "mma.m16n8k16 bf16", "mma.m16n8k8 tf32"};
  meet_warp(0xffffffffu, names[static_cast<int>(element)], &mine, &mma_together, here);
}

// ldmatrix and stmatrix.

namespace {

struct MatrixLane {
  uint32_t* registers;
  char* row;
  int count;
  bool transposed;
};

// Calls move(register, half, address) for every element of a lane's registers.
template <class Move>
void visit_matrices(void* const* arguments, Move move) {
  const auto lane = [&](int l) -> const MatrixLane& { return *static_cast<const MatrixLane*>(arguments[l]); };
  for (int m = 0; m < lane(0).count; ++m) {
    for (int l = 0; l < 32; ++l) {
      const int group = l >> 2, quad = l & 3;
      for (int half = 0; half < 2; ++half) {
        const int row = lane(0).transposed ? 2 * quad + half : group;
        const int column = lane(0).transposed ? group : 2 * quad + half;
        move(lane(l).registers[m], half, lane(8 * m + row).row + 2 * column);
      }
    }
  }
}

void check_row(const void* row, int count, bool write, const char* what, Location here) {
  const Runtime runtime;
  if (self().lane() >= 8 * static_cast<unsigned>(count)) {
    return;  // this lane's address is not used
  }
  check_aligned(row, 16, what, here);
  check_shared(row, 16, what, here);
  if constexpr (kInstrumented) {
    Checker& checker = cluster().checker;
    write ? checker.write(actor_of_thread(here), row, 16) : checker.read(actor_of_thread(here), row, 16);
  }
}

}  // namespace

void load_matrices(uint32_t* registers, int count, const void* row, bool transposed, Location here) {
  check_row(row, count, false, "ldmatrix", here);
  MatrixLane mine{registers, const_cast<char*>(static_cast<const char*>(row)), count, transposed};
  const auto together = [](void* const* arguments) {
    visit_matrices(arguments, [](uint32_t& r, int half, const char* address) {
      uint16_t element = 0;
      std::memcpy(&element, address, sizeof element);
      r = half == 0 ? element : r | uint32_t{element} << 16;
    });
  };
  meet_warp(0xffffffffu, transposed ? "ldmatrix.trans" : "ldmatrix", &mine, together, here);
}

void store_matrices(void* row, const uint32_t* registers, int count, bool transposed, Location here) {
  check_row(row, count, true, "stmatrix", here);
  MatrixLane mine{const_cast<uint32_t*>(registers), static_cast<char*>(row), count, transposed};
  const auto together = [](void* const* arguments) {
    visit_matrices(arguments, [](const uint32_t& r, int half, char* address) {
      const auto element = static_cast<uint16_t>(r >> (16 * half));
      std::memcpy(address, &element, sizeof element);
    });
  };
  meet_warp(0xffffffffu, transposed ? "stmatrix.trans" : "stmatrix", &mine, together, here);
}

// wgmma.

// The accumulator of a warpgroup while products are in flight: [thread, register].
struct Accumulator {
  std::vector<float> values;
  std::vector<float*> registers;  // of each thread
};

namespace {

constexpr int kRows = 64, kSliceBytes = 32;  // of an operand along k

struct WgmmaThread {
  Element element;
  int n;
  float* d;
  const uint32_t* a_registers;
  Operand a, b;
  bool accumulate;
  Location here;
};

uint64_t field(uint64_t descriptor, int low) { return (descriptor >> low & 0x3fff) << 4; }

// Offset in shared memory of an operand's 16-byte unit `unit` of row `r` (k-major: two units to a row of k; else units
// of eight rows, r is k). Formulas: PTX ISA, "Strides" and "Swizzling Modes" of wgmma's shared-memory matrices.
uint64_t unit_offset(const Operand& operand, int r, int unit) {
  const uint64_t start = field(operand.descriptor, 0), leading = field(operand.descriptor, 16),
                 stride = field(operand.descriptor, 32);
  const auto mode = static_cast<int>(operand.descriptor >> 62);
  const uint32_t width = mode == 0 ? 16 : 256u >> mode;  // 128, 64 or 32 bytes
  uint64_t offset = start + uint64_t(r % 8) * width;
  if (operand.k_major) {
    offset += (r / 8) * stride + unit * (mode == 0 ? leading : 16);
  } else if (mode == 0) {
    offset += (r / 8) * leading + unit * stride;
  } else {
    const uint64_t units = width / 16;
    offset += (r / 8) * stride + (unit / units) * leading + (unit % units) * 16;
  }
  return swizzle(offset, mode == 0 ? 0 : width);
}

// Calls visit(row, unit, offset) for every 16-byte unit of an operand with `rows` rows or columns.
template <class Visit>
void visit_units(const Operand& operand, int rows, Visit visit) {
  const int outer = operand.k_major ? rows : 16, units = operand.k_major ? 2 : rows / 8;
  for (int r = 0; r < outer; ++r) {
    for (int u = 0; u < units; ++u) {
      visit(r, u, unit_offset(operand, r, u));
    }
  }
}

// The operand's elements, [rows, k].
std::vector<uint32_t> load_operand(Element element, const Operand& operand, int rows, const char* shared) {
  const int size = bits_of(element) / 8, k = kSliceBytes / size, per_unit = 16 / size;
  std::vector<uint32_t> out(static_cast<size_t>(rows) * k);
  visit_units(operand, rows, [&](int r, int unit, uint64_t offset) {
    for (int i = 0; i < per_unit; ++i) {
      uint32_t bits = 0;
      std::memcpy(&bits, shared + offset + static_cast<size_t>(i) * size, size);
      const int row = operand.k_major ? r : unit * per_unit + i, at = operand.k_major ? unit * per_unit + i : r;
      out[static_cast<size_t>(row) * k + at] = bits;
    }
  });
  return out;
}

std::vector<uint32_t> registers_of_a(Element element, void* const* arguments) {
  const int per_register = 32 / bits_of(element), k = 8 * per_register;
  std::vector<uint32_t> a(static_cast<size_t>(kRows) * k);
  for (int t = 0; t < static_cast<int>(kWarpgroup); ++t) {
    const uint32_t* mine = static_cast<const WgmmaThread*>(arguments[t])->a_registers;
    const int group = t % 32 >> 2, quad = t & 3;
    for (int i = 0; i < 4 * per_register; ++i) {
      const int r = i / per_register, h = i % per_register;
      const int row = 16 * (t / 32) + group + 8 * (r & 1), at = per_register * quad + h + 4 * per_register * (r >> 1);
      a[static_cast<size_t>(row) * k + at] = element_of(element, mine, i);
    }
  }
  return a;
}

Registers* find_registers(AsyncState& state, const void* address) {
  for (Registers& registers : state.registers) {
    if (registers.address == address) {
      return &registers;
    }
  }
  return nullptr;
}

void own_registers(AsyncState& state, const void* address, size_t bytes, uint32_t time, Location here) {
  Registers* registers = find_registers(state, address);
  if (registers == nullptr) {
    state.registers.push_back({address, bytes, time, here});
  } else {
    *registers = {address, bytes, time, here};
  }
}

void check_operand(const Operand& operand, int rows, const Actor& actor, const char* name) {
  const Block& block = *self().block;
  visit_units(operand, rows, [&](int, int, uint64_t offset) {
    check_shared(block.shared() + offset, 16, name, actor.where);
    if constexpr (kInstrumented) {
      cluster().checker.read(actor, block.shared() + offset, 16);
    }
  });
}

void wgmma_together(void* const* arguments) {
  const auto thread = [&](unsigned t) -> const WgmmaThread& { return *static_cast<const WgmmaThread*>(arguments[t]); };
  const WgmmaThread& first = thread(0);
  Thread& me = self();
  Thread* const threads = &me - me.index % kWarpgroup;
  const unsigned group = me.index / kWarpgroup;
  ProductState& products = me.block->transfers->products[group];
  Knowledge common;
  for (unsigned t = 0; t < kWarpgroup; ++t) {
    const WgmmaThread& other = thread(t);
    if (other.a.descriptor != first.a.descriptor || other.b.descriptor != first.b.descriptor ||
        other.accumulate != first.accumulate || other.here != first.here) {
      fail("threads of one warpgroup give wgmma different operands at " + other.here.text() + ": " + threads[0].name() +
           " and " + threads[t].name());
    }
    if (!threads[t].async->products_fenced) {
      fail(threads[t].name() + " begins a wgmma at " + other.here.text() +
           " without a wgmma.fence since its registers were last touched");
    }
    if constexpr (kInstrumented) {
      if (t == 0) {
        common = threads[t].knowledge;
      } else {
        common.meet(threads[t].knowledge);
      }
    }
  }
  const uint32_t time = products.work.issued() + 1;
  const Actor actor{products.work.agent(), time, &common, Proxy::kAsync, false, "wgmma", me.number, first.here};
  const bool from_registers = first.a_registers != nullptr;
  if (!from_registers) {
    check_operand(first.a, kRows, actor, "wgmma's a");
  }
  check_operand(first.b, first.n, actor, "wgmma's b");

  const size_t per_thread = static_cast<size_t>(first.n) / 2;
  std::shared_ptr<Accumulator>& accumulator = products.accumulators[first.d];
  const Registers* in_flight = find_registers(*threads[0].async, first.d);
  if (accumulator == nullptr || in_flight == nullptr || in_flight->time == 0) {
    accumulator = std::make_shared<Accumulator>();
    for (unsigned t = 0; t < kWarpgroup; ++t) {
      float* const d = thread(t).d;
      accumulator->registers.push_back(d);
      accumulator->values.insert(accumulator->values.end(), d, d + per_thread);
      std::memset(d, 0xff, per_thread * sizeof(float));
    }
  }
  for (unsigned t = 0; t < kWarpgroup; ++t) {
    own_registers(*threads[t].async, thread(t).d, per_thread * sizeof(float), time, first.here);
    if (from_registers) {
      own_registers(*threads[t].async, thread(t).a_registers, 4 * sizeof(uint32_t), time, first.here);
    }
  }
  products.work.issue([d = accumulator,
                       a_registers =
                           from_registers ? registers_of_a(first.element, arguments) : std::vector<uint32_t>(),
                       element = first.element, n = first.n, a = first.a, b = first.b, accumulate = first.accumulate,
                       shared = me.block->shared(), per_thread] {
    const int k = kSliceBytes * 8 / bits_of(element);
    const std::vector<uint32_t> a_bits = a_registers.empty() ? load_operand(element, a, kRows, shared) : a_registers;
    const std::vector<uint32_t> b_bits = load_operand(element, b, n, shared);
    const size_t summed = group_of(element, kHopper);
    const Numbers x(element, a_bits.data(), a_bits.size(), summed), y(element, b_bits.data(), b_bits.size(), summed);
    for (unsigned t = 0; t < kWarpgroup; ++t) {
      float* const values = d->values.data() + t * per_thread;
      for (size_t i = 0; i < per_thread; ++i) {
        const size_t row = 16 * (t / 32) + (t % 32 >> 2) + 8 * (i >> 1 & 1);
        const size_t column = 8 * (i >> 2) + 2 * (t & 3) + (i & 1);
        values[i] = sum_of_products(element, kHopper, accumulate ? values[i] : 0, x, row, y, column, k);
      }
      std::memcpy(d->registers[t], values, per_thread * sizeof(float));
    }
  });
}

}  // namespace

uint64_t descriptor(const void* start, uint32_t leading_bytes, uint32_t stride_bytes, uint32_t swizzle_bytes,
                    Location here) {
  check_shared(start, 16, "a matrix descriptor", here);
  const auto offset = static_cast<uint64_t>(static_cast<const char*>(start) - self().block->shared());
  if (offset % 16 != 0 || leading_bytes % 16 != 0 || stride_bytes % 16 != 0 || leading_bytes >> 18 != 0 ||
      stride_bytes >> 18 != 0) {
    fail("a matrix descriptor at " + here.text() + " needs a start and strides that are multiples of 16 below 2^18");
  }
  const uint64_t mode = swizzle_bytes == 128 ? 1 : swizzle_bytes == 64 ? 2 : swizzle_bytes == 32 ? 3 : 0;
  return offset >> 4 | uint64_t{leading_bytes} >> 4 << 16 | uint64_t{stride_bytes} >> 4 << 32 | mode << 62;
}

void wgmma(Element element, int n, float* d, const uint32_t* a_registers, Operand a, Operand b, bool accumulate,
           Location here) {
  if (a_registers != nullptr) {
    a.descriptor = 0;
  }
  WgmmaThread mine{element, n, d, a_registers, a, b, accumulate, here};
  meet_warpgroup("wgmma.mma_async", &mine, &wgmma_together, here);
}

void fence_products() { self().async->products_fenced = true; }

void commit_products() {
  Thread& me = self();
  me.async->product_groups.commit(me.block->transfers->products.at(me.index / kWarpgroup).work.issued());
}

void wait_products(unsigned newest, Location) {
  const Runtime runtime;
  Thread& me = self();
  Work& work = me.block->transfers->products.at(me.index / kWarpgroup).work;
  const uint32_t time = me.async->product_groups.all_but(newest);
  work.perform_until(time);
  if (kInstrumented && time > 0) {
    me.knowledge.seen.raise(work.agent(), time);
  }
  for (Registers& registers : me.async->registers) {
    registers.time = registers.time <= time ? 0 : registers.time;
  }
}

void touch_registers(const void* address, size_t bytes, bool write, Location where) {
  AsyncState& mine = *self().async;
  const char* const p = static_cast<const char*>(address);
  for (size_t i = 0; i < mine.registers.size(); ++i) {
    const Registers& registers = mine.registers[i];
    const char* const q = static_cast<const char*>(registers.address);
    if (p + bytes <= q || p >= q + registers.bytes) {
      continue;
    }
    if (registers.time != 0) {
      fail(self().name() + (write ? " writes" : " reads") + " at " + where.text() + " registers of the wgmma at " +
           registers.where.text() + " without having waited for it");
    }
    mine.products_fenced = false;
    mine.registers.erase(mine.registers.begin() + static_cast<ptrdiff_t>(i));
    return;
  }
}

void set_max_registers(unsigned count, Location here) {
  if (count < 24 || count > 256 || count % 8 != 0) {
    fail("setmaxnreg " + std::to_string(count) + " at " + here.text() + ": a multiple of 8 from 24 to 256 is allowed");
  }
  meet_warpgroup("setmaxnreg", nullptr, nullptr, here);
}

bool elect_lane(uint32_t mask, Location here) {
  meet_warp(mask, "elect.sync", nullptr, nullptr, here);
  unsigned skip = static_cast<unsigned>(seed() % static_cast<unsigned>(std::popcount(mask)));
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1u) != 0 && skip-- == 0) {
      return lane == self().lane();
    }
  }
  return false;
}

}  // namespace kx::emulation
