#include "checker.h"

namespace kx::emulation {
namespace {

constexpr size_t kGuard = 4096;  // bytes around shared memory that nobody may touch, see Block

}  // namespace

void Checker::add_shared(const void* memory, size_t bytes) {
  shared_.push_back({static_cast<const char*>(memory), std::vector<Cell>(bytes)});
}

void Checker::next_cluster(unsigned cluster, unsigned threads_per_block) {
  cluster_ = cluster;
  threads_per_block_ = threads_per_block;
  shared_.clear();
}

void Checker::clear() { *this = Checker(); }

size_t Checker::RecordHash::operator()(const Record& r) const {
  uint64_t h = uint64_t{r.cluster} << 40 ^ uint64_t { r.agent } << 20 ^ r.time;
  h ^= reinterpret_cast<uintptr_t>(r.where.pc) * 3 ^ uint64_t { r.where.line } << 50;
  h *= 0x9e3779b97f4a7c15u;
  return h >> 16;
}

uint32_t Checker::record_of(const Actor& a) {
  const Record record{cluster_, a.agent, a.thread, a.time, a.proxy, a.atomic, a.what, a.where};
  if (records_[last_record_] == record) {
    return last_record_;
  }
  const auto [at, is_new] = record_numbers_.try_emplace(record, static_cast<uint32_t>(records_.size()));
  if (is_new) {
    records_.push_back(record);
  }
  return last_record_ = at->second;
}

uint32_t Checker::add_reader(uint32_t list, uint32_t record) {
  const Readers longer{record, list};
  const auto [at, is_new] = reader_lists_.try_emplace(longer, static_cast<uint32_t>(readers_.size()));
  if (is_new) {
    readers_.push_back(longer);
  }
  return at->second;
}

bool Checker::happened_before(const Record& earlier, const Actor& actor, bool earlier_wrote) const {
  if (earlier.atomic && actor.atomic) {
    return true;
  }
  if (earlier.cluster != cluster_) {
    return false;  // nothing orders the clusters of one launch
  }
  const bool crosses = earlier_wrote && earlier.proxy == Proxy::kGeneric && actor.proxy == Proxy::kAsync;
  return (crosses ? actor.knowledge->visible : actor.knowledge->seen)[earlier.agent] >= earlier.time;
}

void Checker::access(const Actor& actor, const void* address, size_t bytes, bool write) {
  if (bytes == 0) {
    return;
  }
  const char* p = static_cast<const char*>(address);
  const uint32_t mine = record_of(actor);
  const auto visit = [&](Cell* cells, size_t n, bool shared, const char* from) {
    // Neighbours mostly have one history: it is looked at once.
    Cell before = cells[0], then = after(actor, mine, before, write, shared, from, bytes);
    cells[0] = then;
    for (size_t i = 1; i < n; ++i) {
      if (cells[i] != before) {
        before = cells[i];
        then = after(actor, mine, before, write, shared, from + i, bytes);
      }
      cells[i] = then;
    }
  };
  for (Shared& shared : shared_) {
    const size_t size = shared.cells.size();
    if (p + bytes <= shared.memory - kGuard || p >= shared.memory + size + kGuard) {
      continue;
    }
    if (p < shared.memory || p + bytes > shared.memory + size) {
      fail(describe(records_[mine]) + (write ? " writes " : " reads ") + std::to_string(bytes) +
           " bytes outside shared memory, at offset " + std::to_string(p - shared.memory) + " of " +
           std::to_string(size));
    }
    return visit(shared.cells.data() + (p - shared.memory), bytes, true, p);
  }
  while (bytes > 0) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(p), page = at / kPage;
    const size_t n = std::min(bytes, kPage - at % kPage);
    visit(cells_of_page(page) + at % kPage, n, false, p);
    p += n;
    bytes -= n;
  }
}

Checker::Cell Checker::after(const Actor& actor, uint32_t mine, Cell cell, bool write, bool shared, const void* address,
                             size_t bytes) {
  const char* does = write ? " writes " : " reads ";
  if (cell.writer == 0 && shared && !write) {
    fail(describe(records_[mine]) + " reads " + place(address, bytes) + ", which nobody has written");
  }
  if (cell.writer != 0) {
    const Record& writer = records_[cell.writer];
    if (writer.agent == ~0u && !actor.atomic) {
      fail(describe(records_[mine]) + does + place(address, bytes) + ", which holds " + writer.what);
    }
    if (!happened_before(writer, actor, true)) {
      const bool ordered = writer.cluster == cluster_ && actor.knowledge->seen[writer.agent] >= writer.time;
      fail(describe(records_[mine]) + does + place(address, bytes) + ", which " + describe(writer) + " wrote: " +
           (ordered ? "the writer has no fence.proxy.async before the barrier" : "nothing orders the two (a race)"));
    }
  }
  const bool foreign = cell.readers != 0 && records_[readers_[cell.readers].record].cluster != cluster_;
  if (!write && foreign) {  // of the readers in other clusters one is enough
    return {cell.writer, add_reader(add_reader(0, readers_[cell.readers].record), mine)};
  }
  uint32_t kept = 0;       // that reader
  bool all_before = true;  // every reader in this cluster: what follows this access follows them too
  for (uint32_t list = cell.readers; list != 0; list = readers_[list].rest) {
    if (readers_[list].record == mine && !write) {
      return cell;
    }
    const Record& reader = records_[readers_[list].record];
    const bool before = happened_before(reader, actor, false);
    if (write && !before) {
      fail(describe(records_[mine]) + " writes " + place(address, bytes) + ", which " + describe(reader) +
           " reads: nothing orders the two (a race)");
    }
    if (reader.cluster != cluster_) {
      kept = add_reader(0, readers_[list].record);
    } else {
      all_before = all_before && before;
    }
  }
  if (write) {
    return {mine, 0};
  }
  return {cell.writer, add_reader(all_before ? kept : cell.readers, mine)};
}

void Checker::set_object(const void* address, size_t bytes, const char* name) {
  for (Shared& shared : shared_) {
    const char* p = static_cast<const char*>(address);
    if (p >= shared.memory && p + bytes <= shared.memory + shared.cells.size()) {
      Record record{};
      record.agent = ~0u;
      record.what = name;
      records_.push_back(record);
      const Cell cell{name != nullptr ? static_cast<uint32_t>(records_.size() - 1) : 0, 0};
      std::fill_n(shared.cells.begin() + (p - shared.memory), bytes, cell);
    }
  }
}

Checker::Cell* Checker::cells_of_page(uintptr_t page) {
  if (page != last_page_ || last_cells_ == nullptr) {
    std::unique_ptr<Cell[]>& cells = global_[page];
    if (cells == nullptr) {
      cells = std::make_unique<Cell[]>(kPage);
    }
    last_page_ = page;
    last_cells_ = cells.get();
  }
  return last_cells_;
}

std::string Checker::describe(const Record& r) const {
  const std::string thread = "thread " + std::to_string(r.thread % threads_per_block_) + " of block " +
                             std::to_string(r.cluster + r.thread / threads_per_block_);
  const std::string who = std::string(r.what) == "thread" ? thread : std::string("the ") + r.what + " of " + thread;
  return who + " at " + r.where.text();
}

std::string Checker::place(const void* address, size_t bytes) const {
  const char* p = static_cast<const char*>(address);
  for (const Shared& shared : shared_) {
    if (p >= shared.memory && p < shared.memory + shared.cells.size()) {
      return "shared memory at offset " + std::to_string(p - shared.memory) + " (of " + std::to_string(bytes) +
             " bytes)";
    }
  }
  char text[64];
  std::snprintf(text, sizeof text, "global memory at %p (of %zu bytes)", address, bytes);
  return text;
}

}  // namespace kx::emulation
