#include "device.h"

namespace kx::emulation {

Dim3 thread_index() { return self().place; }
Dim3 block_index() { return self().block->index; }
Dim3 block_size() { return cluster().block_size; }
Dim3 grid_size() { return cluster().grid; }
unsigned lane_index() { return self().lane(); }
unsigned rank_in_cluster() { return self().block->rank; }
unsigned blocks_in_cluster() { return static_cast<unsigned>(cluster().blocks.size()); }

namespace {

struct Shown {
  uint64_t value;
  unsigned source;
  uint64_t result;
};

}  // namespace

uint64_t exchange(uint32_t mask, uint64_t value, unsigned source, Location here) {
  if ((mask >> source & 1u) == 0) {
    fail(self().name() + " reads lane " + std::to_string(source) + ", which is not in the mask, at " + here.text());
  }
  Shown mine{value, source, 0};
  const auto together = [](void* const* lanes) {
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (auto* const to = static_cast<Shown*>(lanes[lane]); to != nullptr) {
        const auto* const from = static_cast<const Shown*>(lanes[to->source]);
        to->result = from != nullptr ? from->value : 0;
      }
    }
  };
  meet_warp(mask, "a shuffle", &mine, together, here);
  return mine.result;
}

uint32_t ballot(uint32_t mask, bool predicate, Location here) {
  Shown mine{predicate, 0, 0};
  const auto together = [](void* const* lanes) {
    uint64_t votes = 0;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      const auto* const from = static_cast<const Shown*>(lanes[lane]);
      votes |= uint64_t{from != nullptr && from->value != 0} << lane;
    }
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (auto* const to = static_cast<Shown*>(lanes[lane]); to != nullptr) {
        to->result = votes;
      }
    }
  };
  meet_warp(mask, "a vote", &mine, together, here);
  return static_cast<uint32_t>(mine.result);
}

}  // namespace kx::emulation
