// Vector clocks: how much of what others did happened before now.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace kx::emulation {

// One number per agent. An agent is a thread, or what works on a thread's behalf while the thread goes on.
class Clock {
 public:
  uint32_t operator[](unsigned agent) const { return agent < times_.size() ? times_[agent] : 0; }

  void set(unsigned agent, uint32_t time) {
    if (agent >= times_.size()) {
      times_.resize(agent + 1);
    }
    times_[agent] = time;
  }

  void raise(unsigned agent, uint32_t time) { set(agent, std::max((*this)[agent], time)); }

  // Knows what either knew.
  void join(const Clock& other) {
    if (other.times_.size() > times_.size()) {
      times_.resize(other.times_.size());
    }
    for (size_t i = 0; i < other.times_.size(); ++i) {
      times_[i] = std::max(times_[i], other.times_[i]);
    }
  }

  // Knows what both knew.
  void meet(const Clock& other) {
    times_.resize(std::min(times_.size(), other.times_.size()));
    for (size_t i = 0; i < times_.size(); ++i) {
      times_[i] = std::min(times_[i], other.times_[i]);
    }
  }

  void clear() { times_.clear(); }

 private:
  std::vector<uint32_t> times_;
};

// What somebody knows: `seen` counts every access that happened before; `visible` counts, of the writes through the
// generic proxy among them, those that a fence has made visible to the async proxy.
struct Knowledge {
  Clock seen, visible;

  void join(const Knowledge& other) {
    seen.join(other.seen);
    visible.join(other.visible);
  }
  void meet(const Knowledge& other) {
    seen.meet(other.seen);
    visible.meet(other.visible);
  }
  void clear() {
    seen.clear();
    visible.clear();
  }
};

}  // namespace kx::emulation
