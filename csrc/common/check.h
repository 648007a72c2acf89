// Argument checks of the entry points. The Python functions check first and say more; these keep a wrong call from
// reading memory that is not there.
#pragma once

#include <stdexcept>
#include <string>

#define KX_CHECK(condition, message)                                                 \
  do {                                                                               \
    if (!(condition)) {                                                              \
      throw std::invalid_argument(std::string(message) + " (" #condition " fails)"); \
    }                                                                                \
  } while (false)
