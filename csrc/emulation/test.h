// What the C++ tests share: a check that says where it failed, and a search for an expected fault.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>

#include "block.h"

#define KX_EXPECT(condition)                                                     \
  do {                                                                           \
    if (!(condition)) {                                                          \
      std::fprintf(stderr, "%s:%d: %s fails\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                              \
    }                                                                            \
  } while (false)

namespace kx::emulation {

// Runs `kernel` under several schedules; at least one has to end in a Fault that says each of `words`.
inline void expect_fault(const std::function<void()>& kernel, std::initializer_list<const char*> words) {
  for (uint64_t schedule = 0; schedule < 20; ++schedule) {
    set_seed(schedule);
    try {
      kernel();
    } catch (const Fault& fault) {
      set_seed(0);
      for (const char* word : words) {
        if (std::string(fault.what()).find(word) == std::string::npos) {
          std::fprintf(stderr, "expected \"%s\" in: %s\n", word, fault.what());
          std::exit(1);
        }
      }
      return;
    }
  }
  std::fprintf(stderr, "no schedule showed the fault that should say \"%s\"\n", *words.begin());
  std::exit(1);
}

}  // namespace kx::emulation
