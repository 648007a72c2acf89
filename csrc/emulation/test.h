// Looks for expected faults.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "../common/expect.h"
#include "block.h"

namespace kx::emulation {

constexpr uint64_t kSchedules = 20;

// file:line of the line of `file` that ends in the comment "// <mark>".
inline std::string line_of(const char* file, const std::string& mark) {
  std::ifstream source(file);
  std::string line;
  for (int number = 1; std::getline(source, line); ++number) {
    const std::string comment = "// " + mark;
    if (line.size() > comment.size() && line.compare(line.size() - comment.size(), comment.size(), comment) == 0) {
      return std::string(file) + ":" + std::to_string(number);
    }
  }
  std::fprintf(stderr, "%s has no line marked \"%s\"\n", file, mark.c_str());
  std::exit(1);
}

// Runs `kernel` under several schedules, of which `how_many` at least have to end in a Fault that says all of `words`.
inline void expect_fault(const std::function<void()>& kernel, const std::vector<std::string>& words,
                         uint64_t how_many = 1) {
  uint64_t found = 0;
  std::string last = "no fault at all";
  for (uint64_t schedule = 0; schedule < kSchedules; ++schedule) {
    set_seed(schedule);
    try {
      kernel();
    } catch (const Fault& fault) {
      last = fault.what();
      bool all = true;
      for (const std::string& word : words) {
        all = all && last.find(word) != std::string::npos;
      }
      found += all ? 1 : 0;
    }
  }
  set_seed(0);
  if (found < how_many) {
    std::fprintf(stderr, "%d of %d schedules showed the fault that says", static_cast<int>(found),
                 static_cast<int>(kSchedules));
    for (const std::string& word : words) {
      std::fprintf(stderr, " \"%s\"", word.c_str());
    }
    std::fprintf(stderr, "; the last fault was:\n%s\n", last.c_str());
    std::exit(1);
  }
}

inline void expect_no_fault(const std::function<void()>& kernel) {
  for (uint64_t schedule = 0; schedule < kSchedules; ++schedule) {
    set_seed(schedule);
    kernel();
  }
  set_seed(0);
}

}  // namespace kx::emulation
