// Matrix products and 8×8 matrix loads, with the registers' layouts of the PTX ISA and the sums of the hardware.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/half.h"
#include "block.h"

namespace kx::emulation {

enum class Element { kFloat16, kBFloat16, kTf32 };

template <class T>
constexpr Element element = sizeof(T) == 4                ? Element::kTf32
                            : std::is_same_v<T, bfloat16> ? Element::kBFloat16
                                                          : Element::kFloat16;

constexpr int bits_of(Element e) { return e == Element::kTf32 ? 32 : 16; }

// How a generation of tensor cores adds products: papers that compared millions of sums bit by bit found that a group
// of products and the accumulator are cut, towards zero, to `bits` below the largest exponent among them, added
// exactly, and cut again to float32.
struct Summation {
  int group;  // products of 16-bit elements that are added at once; half as many of 32 bits
  int bits;
  int floor;  // the least exponent that counts as the largest
};
constexpr Summation kAmpere{8, 24, -132}, kHopper{16, 25, -133};

// c + Σ a[i]·b[i], i < n, of elements in the low bits of a and b.
float sum_of_products(Element element, const Summation& how, float c, const uint32_t* a, const uint32_t* b, int n);

// d += a·b: 16×8 += 16×k · k×8, by a warp; k is 16 for 16-bit elements and 8 for tf32.
void mma(Element element, float* d, const uint32_t* a, const uint32_t* b, Location here);

// `count` 8×8 matrices of 16-bit elements, whose rows' addresses lanes 8m … 8m + 7 give for matrix m.
void load_matrices(uint32_t* registers, int count, const void* row, bool transposed, Location here);
void store_matrices(void* row, const uint32_t* registers, int count, bool transposed, Location here);

// One operand of wgmma in shared memory: the hardware's descriptor, and which of its dimensions is contiguous.
struct Operand {
  uint64_t descriptor;
  bool k_major;
};
uint64_t descriptor(const void* start, uint32_t leading_bytes, uint32_t stride_bytes, uint32_t swizzle_bytes,
                    Location here);

// d = a·b (+ d): 64×n by a warpgroup, k of 32 bytes. `a_registers` are four, or null where `a` is a descriptor.
void wgmma(Element element, int n, float* d, const uint32_t* a_registers, Operand a, Operand b, bool accumulate,
           Location here);
void fence_products();
void commit_products();
void wait_products(unsigned newest, Location here);
// The running thread loads or stores what may be registers of a product in flight.
void touch_registers(const void* address, size_t bytes, bool write, Location where);

void set_max_registers(unsigned count, Location here);
bool elect_lane(uint32_t mask, Location here);

}  // namespace kx::emulation
