// Finds races: of every byte it knows who wrote it last and who has read it since, and of every agent what happened
// before. Two accesses to one byte, one of them a write, that nothing orders are a Fault, under whatever schedule.
//
// Plain loads and stores reach it only where the compiler instruments them (-fsanitize=thread, see
// instrumentation.cpp); elsewhere `kInstrumented` is false and nothing is recorded.
#pragma once

#include <memory>
#include <unordered_map>
#include <vector>

#include "clock.h"
#include "fault.h"

namespace kx::emulation {

#if defined(KX_INSTRUMENTED)
constexpr bool kInstrumented = true;
#else
constexpr bool kInstrumented = false;
#endif

enum class Proxy : uint8_t { kGeneric, kAsync };

// Who accesses memory, on what authority.
struct Actor {
  unsigned agent;
  uint32_t time;               // of the agent
  const Knowledge* knowledge;  // of who issued it
  Proxy proxy = Proxy::kGeneric;
  bool atomic = false;
  const char* what;  // "thread", "cp.async", …
  unsigned thread;   // of the launch's cluster, that issued it
  Location where;
};

class Checker {
 public:
  // Memory that a block shares. `number` is the block's, for messages.
  void add_shared(const void* memory, size_t bytes);
  // Forgets shared memory and who knows what. Records of global memory stay: another cluster follows in the same
  // launch.
  void next_cluster(unsigned cluster, unsigned threads_per_block);
  void clear();  // for the next launch

  void read(const Actor& actor, const void* address, size_t bytes) { access(actor, address, bytes, false); }
  void write(const Actor& actor, const void* address, size_t bytes) { access(actor, address, bytes, true); }
  // Bytes of shared memory that hold an object which only its own operations may touch, or no longer.
  void set_object(const void* address, size_t bytes, const char* name);

 private:
  struct Record {
    unsigned cluster, agent, thread;
    uint32_t time;
    Proxy proxy;
    bool atomic;
    const char* what;
    Location where{nullptr};

    bool operator==(const Record&) const = default;
  };
  struct RecordHash {
    size_t operator()(const Record& r) const;
  };
  // Who has read a byte since it was written: a list of records, shared by all bytes with the same history.
  struct Readers {
    uint32_t record, rest;

    bool operator==(const Readers&) const = default;
  };
  struct ReadersHash {
    size_t operator()(const Readers& r) const {
      return (uint64_t{r.rest} << 32 | r.record) * 0x9e3779b97f4a7c15u >> 16;
    }
  };
  struct Cell {
    uint32_t writer = 0;   // a record; 0 is nobody
    uint32_t readers = 0;  // a list of records; 0 is empty

    bool operator==(const Cell&) const = default;
  };
  struct Shared {
    const char* memory;
    std::vector<Cell> cells;
  };
  static constexpr size_t kPage = 4096;

  void access(const Actor& actor, const void* address, size_t bytes, bool write);
  Cell after(const Actor& actor, uint32_t mine, Cell cell, bool write, bool shared, const void* address, size_t bytes);
  bool happened_before(const Record& earlier, const Actor& actor, bool earlier_wrote) const;
  uint32_t record_of(const Actor& actor);
  uint32_t add_reader(uint32_t list, uint32_t record);
  Cell* cells_of_page(uintptr_t page);
  std::string describe(const Record& record) const;
  std::string place(const void* address, size_t bytes) const;

  unsigned cluster_ = 0, threads_per_block_ = 1;
  std::vector<Shared> shared_;
  std::unordered_map<uintptr_t, std::unique_ptr<Cell[]>> global_;
  uintptr_t last_page_ = 0;
  Cell* last_cells_ = nullptr;
  std::vector<Record> records_{Record{}};
  std::unordered_map<Record, uint32_t, RecordHash> record_numbers_;
  uint32_t last_record_ = 0;
  std::vector<Readers> readers_{Readers{0, 0}};
  std::unordered_map<Readers, uint32_t, ReadersHash> reader_lists_;
};

}  // namespace kx::emulation
