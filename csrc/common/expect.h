// A check for the C++ tests that says where it failed.
#pragma once

#include <cstdio>
#include <cstdlib>

#define KX_EXPECT(condition)                                                     \
  do {                                                                           \
    if (!(condition)) {                                                          \
      std::fprintf(stderr, "%s:%d: %s fails\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                              \
    }                                                                            \
  } while (false)
