// What a kernel did that a GPU does not allow, or leaves undefined, and where it did it.
#pragma once

#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>

namespace kx::emulation {

class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A place in a kernel's source. As a default argument it is the place of the call.
struct Location {
  const char* file = nullptr;
  unsigned line = 0;
  const void* pc = nullptr;  // of a plain load or store, where no call says its line

  constexpr Location(std::source_location here = std::source_location::current())
      : file(here.file_name()), line(here.line()) {}
  explicit Location(const void* pc) : pc(pc) {}

  bool operator==(const Location&) const = default;
  std::string text() const;  // file:line; for a pc, of the innermost function that is a kernel's own
};

// Ends the launch with a Fault. In a kernel it leaves the thread where it is, without unwinding.
[[noreturn]] void fail(const std::string& what);

}  // namespace kx::emulation
