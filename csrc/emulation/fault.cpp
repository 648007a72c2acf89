#include "fault.h"

#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <array>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <vector>

namespace kx::emulation {
namespace {

// The lines that one instruction stems from, innermost first, as binutils' addr2line says.
std::vector<std::string> lines_of(const void* pc) {
  Dl_info info{};
  void* extra = nullptr;
  if (dladdr1(pc, &info, &extra, RTLD_DL_LINKMAP) == 0 || info.dli_fname == nullptr) {
    return {};
  }
  const auto* map = static_cast<const link_map*>(extra);
  // One before the return address is within the call.
  const uintptr_t offset = reinterpret_cast<uintptr_t>(pc) - map->l_addr - 1;
  std::array<char, 32> hex{};
  std::snprintf(hex.data(), hex.size(), "0x%zx", static_cast<size_t>(offset));
  const std::string file =
      map->l_name[0] != '\0' ? std::string(map->l_name) : std::filesystem::read_symlink("/proc/self/exe").string();
  const std::string command = "addr2line -i -e '" + file + "' " + hex.data() + " 2>/dev/null";
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command.c_str(), "r"), &pclose);
  std::vector<std::string> lines;
  std::array<char, 4096> line{};
  while (pipe != nullptr && std::fgets(line.data(), line.size(), pipe.get()) != nullptr) {
    std::string text(line.data());
    text.erase(text.find_last_not_of("\n") + 1);
    lines.push_back(text.substr(0, text.find(" (discriminator")));
  }
  return lines;
}

bool is_ours(const std::string& line) {
  for (const char* folder : {"/csrc/cuda/", "/csrc/emulation/device.h", "/include/c++/"}) {
    if (line.find(folder) != std::string::npos) {
      return true;
    }
  }
  return false;
}

}  // namespace

std::string Location::text() const {
  if (pc == nullptr) {
    return std::string(file) + ":" + std::to_string(line);
  }
  const std::vector<std::string> lines = lines_of(pc);
  for (const std::string& each : lines) {
    if (!is_ours(each)) {
      return each;
    }
  }
  return lines.empty() ? "an unknown line (is addr2line installed?)" : lines.front();
}

}  // namespace kx::emulation
