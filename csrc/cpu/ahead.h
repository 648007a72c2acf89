// Memory asked for before it is read.
#pragma once

#include <cstdint>
#include <vector>

namespace kx::KX_ISA {
namespace {

// Rows that will be needed soon, asked for a few lines at a time: rows of one head lie too far apart for the machine to
// foresee them.
class Ahead {
 public:
  void forget() { queue_.clear(); }
  void add(const void* row, int64_t bytes, int64_t stride_bytes, int count) {
    queue_.push_back({static_cast<const char*>(row), bytes, stride_bytes, count});
  }
  void operator()() {
    for (int lines = 0; lines < kLines && !queue_.empty();) {
      Block& block = queue_.back();
      for (int64_t at = 0; at < block.bytes; at += 64, ++lines) {
        __builtin_prefetch(block.row + at);
      }
      block.row += block.stride;
      if (--block.count <= 0) {
        queue_.pop_back();
      }
    }
  }
  void rest() {
    while (!queue_.empty()) {
      (*this)();
    }
  }

 private:
  static constexpr int kLines = 32;  // as many as a core may wait for
  struct Block {
    const char* row;
    int64_t bytes, stride;
    int count;
  };
  std::vector<Block> queue_;
};

}  // namespace
}  // namespace kx::KX_ISA
