#include "async.h"

#include <array>
#include <cstring>

#include "tensor_map.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace kx::emulation {
namespace {

constexpr unsigned char kPoison = 0xff;  // NaN as a float: what an asynchronous copy has not written yet
constexpr size_t kSlots = 256;
constexpr int64_t kMaxBytes = (1 << 20) - 1;  // that an mbarrier can count
constexpr unsigned kMaxPolls = 100'000;

std::string text(size_t n) { return std::to_string(n); }

// An operation's accesses on behalf of `agent`, on the authority of the running thread.
Actor actor_of(unsigned agent, uint32_t time, Proxy proxy, const char* what, Location here) {
  const Thread& me = self();
  return {agent, time, &me.knowledge, proxy, false, what, me.number, here};
}

}  // namespace

Actor actor_of_thread(Location here) {
  const Thread& me = self();
  return actor_of(me.number, me.knowledge.seen[me.number], Proxy::kGeneric, "thread", here);
}

void check_aligned(const void* address, size_t alignment, const char* what, Location here) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (at % alignment != 0) {
    fail("misaligned " + std::string(what) + " at " + here.text() + ": address " + text(at) + " is not a multiple of " +
         text(alignment) + " bytes");
  }
}

void check_shared(const void* address, size_t bytes, const char* what, Location here) {
  const Block& block = *self().block;
  if (!block.owns(address, bytes)) {
    fail(std::string(what) + " at " + here.text() + " touches " + text(bytes) +
         " bytes outside shared memory, at offset " +
         std::to_string(static_cast<const char*>(address) - block.shared()) + " of " + text(block.shared_bytes()));
  }
}

void check_global(const void* address, size_t bytes, const char* what, Location here) {
  for (const Block& block : cluster().blocks) {
    if (block.owns(address, 1)) {
      fail(std::string(what) + " at " + here.text() + " names shared memory where global memory belongs");
    }
  }
#if defined(__SANITIZE_ADDRESS__)
  if (bytes > 0 && __asan_region_is_poisoned(const_cast<void*>(address), bytes) != nullptr) {
    fail(std::string(what) + " at " + here.text() + " touches global memory outside what was allocated (" +
         text(bytes) + " bytes)");
  }
#endif
  static_cast<void>(bytes);
}

uint32_t Work::issue(std::function<void()> operation) {
  const Timing timing = cluster().timing();
  waiting_.push_back(std::move(operation));
  ++issued_;
  if (timing == Timing::kEarly || (timing == Timing::kRandom && cluster().random(2) == 0)) {
    perform_until(issued_);
  }
  return issued_;
}

void Work::perform_until(uint32_t time) {
  while (performed_ < time) {
    waiting_.front()();
    waiting_.pop_front();
    ++performed_;
  }
}

unsigned Work::agent() {
  if (agent_ == 0) {
    agent_ = cluster().new_agent();
  }
  return agent_;
}

void Groups::commit(uint32_t issued) { ends_.push_back(issued); }

uint32_t Groups::all_but(unsigned newest) {
  while (ends_.size() > newest) {
    waited_ = std::max(waited_, ends_.front());
    ends_.pop_front();
  }
  return waited_;
}

// cp.async

void copy_async(void* to, const void* from, unsigned bytes, unsigned source_bytes, Location here) {
  const Runtime runtime;
  if ((bytes != 4 && bytes != 8 && bytes != 16) || source_bytes > bytes) {
    fail("cp.async of " + text(source_bytes) + " bytes into " + text(bytes) + " at " + here.text() +
         ": it fills 4, 8 or 16 bytes from at most as many");
  }
  check_aligned(to, bytes, "destination of cp.async", here);
  check_aligned(from, bytes, "source of cp.async", here);
  check_shared(to, bytes, "cp.async", here);
  if (source_bytes > 0) {  // else its address is not looked at
    check_global(from, source_bytes, "cp.async", here);
  }
  Work& work = self().async->copies;
  if constexpr (kInstrumented) {
    const Actor actor = actor_of(work.agent(), work.issued() + 1, Proxy::kGeneric, "cp.async", here);
    cluster().checker.read(actor, from, source_bytes);
    cluster().checker.write(actor, to, bytes);
  }
  std::memset(to, kPoison, bytes);
  work.issue([=] {
    std::memcpy(to, from, source_bytes);
    std::memset(static_cast<char*>(to) + source_bytes, 0, bytes - source_bytes);
  });
}

void commit_copies() {
  AsyncState& mine = *self().async;
  mine.copy_groups.commit(mine.copies.issued());
}

void wait_copies(unsigned newest, Location) {
  const Runtime runtime;
  Thread& me = self();
  Work& work = me.async->copies;
  const uint32_t time = me.async->copy_groups.all_but(newest);
  work.perform_until(time);
  if (kInstrumented && time > 0) {
    me.knowledge.seen.raise(work.agent(), time);
  }
}

void wait_all_copies(Location here) {
  commit_copies();
  wait_copies(0, here);
}

// mbarrier

namespace {

Mbarrier& find_mbarrier(const void* address, const char* what, Location here) {
  for (Block& block : cluster().blocks) {
    const auto found = block.transfers->mbarriers.find(address);
    if (found != block.transfers->mbarriers.end()) {
      Mbarrier& barrier = found->second;
      const Actor& maker = barrier.made_by;
      if (kInstrumented && self().knowledge.seen[maker.agent] < maker.time) {
        fail(self().name() + " uses at " + here.text() + " the mbarrier that was initialised at " + maker.where.text() +
             ": nothing orders the two (a race)");
      }
      return barrier;
    }
  }
  fail(std::string(what) + " at " + here.text() + " of " + self().name() + " names no initialised mbarrier");
}

void finish_phases(Mbarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) {
    return;
  }
  ++barrier.phase;
  barrier.pending = barrier.expected;
  barrier.published = std::move(barrier.released);
  barrier.released.clear();
  barrier.observed = false;
  for (Thread* thread : barrier.waiting) {
    cluster().wake(*thread);
  }
  barrier.waiting.clear();
}

void expect(Mbarrier& barrier, int64_t bytes, Location here) {
  barrier.bytes += bytes;
  if (bytes < 0 || barrier.bytes > kMaxBytes) {
    fail("an mbarrier at " + here.text() + " expects " + std::to_string(barrier.bytes) + " bytes; it can count " +
         std::to_string(kMaxBytes));
  }
}

void complete_bytes(Mbarrier& barrier, int64_t bytes, Location here) {
  barrier.bytes -= bytes;
  barrier.bytes_unseen = true;
  if (barrier.bytes < -kMaxBytes) {
    fail("the mbarrier of the copy at " + here.text() + " has got " + std::to_string(-barrier.bytes) +
         " bytes more than it expects");
  }
  finish_phases(barrier);
}

void arrive(Mbarrier& barrier, uint32_t count, Location here) {
  if (!barrier.observed) {
    fail("an arrival at " + here.text() + " begins phase " + text(barrier.phase) + " of the mbarrier at offset " +
         text(barrier.offset) + ", but nobody has waited for phase " + text(barrier.phase - 1));
  }
  if (count < 1 || count > barrier.pending) {
    fail(text(count) + " arrivals at " + here.text() + " at the mbarrier at offset " + text(barrier.offset) +
         ", whose phase " + text(barrier.phase) + " has " + text(barrier.pending) + " to come");
  }
  barrier.pending -= count;
  finish_phases(barrier);
}

Mbarrier& own_mbarrier(const void* address, const char* what, Location here) {
  Mbarrier& barrier = find_mbarrier(address, what, here);
  if (!self().block->owns(address, 8)) {
    fail(std::string(what) + " at " + here.text() + " names another block's mbarrier; a thread waits at its own");
  }
  return barrier;
}

}  // namespace

std::string Mbarrier::describe() const {
  return "phase " + text(phase) + " of the mbarrier at offset " + text(offset) + " (" + text(pending) +
         " arrivals and " + std::to_string(bytes) + " bytes are missing)";
}

void mbarrier_init(void* address, uint32_t count, Location here) {
  const Runtime runtime;
  check_aligned(address, 8, "mbarrier", here);
  check_shared(address, 8, "an mbarrier", here);
  Thread& me = self();
  std::map<const void*, Mbarrier>& all = me.block->transfers->mbarriers;
  if (all.count(address) != 0) {
    fail("an mbarrier is initialised again at " + here.text() + " without having been invalidated");
  }
  if (count < 1 || count > 0xfffff) {
    fail("an mbarrier for " + text(count) + " arrivals at " + here.text() + "; 1 to 1048575 are allowed");
  }
  Mbarrier& barrier = all[address];
  barrier.offset = static_cast<size_t>(static_cast<char*>(address) - me.block->shared());
  barrier.expected = barrier.pending = count;
  barrier.made_by = actor_of_thread(here);
  if constexpr (kInstrumented) {
    cluster().checker.write(barrier.made_by, address, 8);
    cluster().checker.set_object(address, 8, "an mbarrier");
  }
}

void mbarrier_invalidate(void* address, Location here) {
  const Runtime runtime;
  const Mbarrier& barrier = own_mbarrier(address, "mbarrier.inval", here);
  if (!barrier.waiting.empty() || barrier.bytes != 0) {
    fail("an mbarrier is invalidated at " + here.text() + " while somebody needs it: " + barrier.describe());
  }
  self().block->transfers->mbarriers.erase(address);
  cluster().checker.set_object(address, 8, nullptr);
}

void mbarrier_arrive(void* address, uint32_t count, int64_t expected_bytes, Location here) {
  const Runtime runtime;
  Mbarrier& barrier = find_mbarrier(address, "mbarrier.arrive", here);
  cluster().release(barrier.released);
  if (expected_bytes > 0) {
    expect(barrier, expected_bytes, here);
  }
  arrive(barrier, count, here);
}

void mbarrier_expect(void* address, int64_t bytes, Location here) {
  const Runtime runtime;
  expect(find_mbarrier(address, "mbarrier.expect_tx", here), bytes, here);
}

void mbarrier_wait(void* address, unsigned parity, Location here) {
  const Runtime runtime;
  Mbarrier& barrier = own_mbarrier(address, "mbarrier.try_wait", here);
  while ((barrier.phase & 1) == (parity & 1)) {
    barrier.waiting.push_back(&self());
    cluster().wait(barrier, here);
  }
  barrier.observed = true;
  barrier.bytes_unseen = false;
  cluster().acquire(barrier.published);
}

bool mbarrier_test(void* address, unsigned parity, Location here) {
  const Runtime runtime;
  const Mbarrier& barrier = own_mbarrier(address, "mbarrier.test_wait", here);
  if ((barrier.phase & 1) != (parity & 1)) {
    self().async->polls = 0;
    mbarrier_wait(address, parity, here);
    return true;
  }
  if (++self().async->polls > kMaxPolls) {
    fail(self().name() + " polls at " + here.text() + " for ever for " + barrier.describe());
  }
  cluster().yield();
  return false;
}

void arrive_after_copies(void* address, bool counted, Location here) {
  const Runtime runtime;
  Mbarrier& barrier = own_mbarrier(address, "cp.async.mbarrier.arrive", here);
  if (!counted) {
    ++barrier.pending;
  }
  Thread* const me = &self();
  const uint32_t time = me->async->copies.issued();
  const unsigned agent = me->async->copies.agent();
  me->async->handed_over = time;
  cluster().later([=, &barrier] {
    me->async->copies.perform_until(time);
    barrier.released.seen.raise(agent, time);
    arrive(barrier, 1, here);
  });
}

// cp.async.bulk

namespace {

// One agent for one copy, that completes in its own time.
std::pair<unsigned, uint32_t> next_slot() {
  TransferState& transfers = *self().block->transfers;
  if (transfers.slots.size() < kSlots) {
    transfers.slots.emplace_back(cluster().new_agent(), 0);
    transfers.next_slot = transfers.slots.size() - 1;
  } else {
    transfers.next_slot = (transfers.next_slot + 1) % kSlots;
  }
  std::pair<unsigned, uint32_t>& slot = transfers.slots[transfers.next_slot];
  ++slot.second;
  return slot;
}

// A run of bytes that a copy moves; no global address means zeros, or no store. Between blocks of a cluster `global` is
// the source, in the shared memory of the block that copies.
struct Piece {
  char* shared;
  char* global;
  size_t bytes;
};

// `pieces` go into the shared memory of every block in `blocks`, and complete there at the same place's mbarrier.
void load_pieces(const std::vector<Piece>& pieces, void* mbarrier, unsigned blocks, const char* what, Location here,
                 bool between_blocks = false) {
  Cluster& all = cluster();
  const Block& own = *self().block;
  own_mbarrier(mbarrier, what, here);
  const auto [agent, time] = next_slot();
  int64_t bytes = 0;
  for (const Piece& piece : pieces) {
    bytes += static_cast<int64_t>(piece.bytes);
    check_shared(piece.shared, piece.bytes, what, here);
    if (piece.global != nullptr && !between_blocks) {
      check_global(piece.global, piece.bytes, what, here);
    }
  }
  for (Block& block : all.blocks) {
    if ((blocks >> block.rank & 1u) == 0) {
      continue;
    }
    if (all.has_ended(block)) {
      fail(std::string(what) + " at " + here.text() + " copies into a block of the cluster that has ended");
    }
    Mbarrier& barrier = find_mbarrier(own.same_place_in(block, mbarrier), what, here);
    std::vector<Piece> there = pieces;
    for (Piece& piece : there) {
      piece.shared = own.same_place_in(block, piece.shared);
    }
    if constexpr (kInstrumented) {
      const Actor actor = actor_of(agent, time, Proxy::kAsync, what, here);
      for (const Piece& piece : there) {
        if (piece.global != nullptr) {
          all.checker.read(actor, piece.global, piece.bytes);
        }
        all.checker.write(actor, piece.shared, piece.bytes);
      }
    }
    for (const Piece& piece : there) {
      std::memset(piece.shared, kPoison, piece.bytes);
    }
    all.later([=, there = std::move(there), &all, &own, &barrier, agent = agent, time = time] {
      if (between_blocks && all.has_ended(own)) {
        fail(std::string(what) + " at " + here.text() + " copies from a block of the cluster that has ended");
      }
      for (const Piece& piece : there) {
        if (piece.global != nullptr) {
          std::memcpy(piece.shared, piece.global, piece.bytes);
        } else {
          std::memset(piece.shared, 0, piece.bytes);
        }
      }
      barrier.released.seen.raise(agent, time);
      complete_bytes(barrier, bytes, here);
    });
  }
}

void store_pieces(std::vector<Piece> pieces, const char* what, Location here) {
  AsyncState& mine = *self().async;
  if (mine.written_agent == 0) {
    mine.written_agent = cluster().new_agent();
  }
  const uint32_t time = mine.stores.issued() + 1;
  for (const Piece& piece : pieces) {
    check_shared(piece.shared, piece.bytes, what, here);
    if (piece.global != nullptr) {
      check_global(piece.global, piece.bytes, what, here);
      if constexpr (kInstrumented) {
        Checker& checker = cluster().checker;
        checker.read(actor_of(mine.stores.agent(), time, Proxy::kAsync, what, here), piece.shared, piece.bytes);
        checker.write(actor_of(mine.written_agent, time, Proxy::kAsync, what, here), piece.global, piece.bytes);
      }
    }
  }
  mine.stores.issue([pieces = std::move(pieces)] {
    for (const Piece& piece : pieces) {
      if (piece.global != nullptr) {
        std::memcpy(piece.global, piece.shared, piece.bytes);
      }
    }
  });
}

void check_bulk(const void* shared, const void* global, unsigned bytes, const char* what, Location here) {
  check_aligned(shared, 16, what, here);
  check_aligned(global, 16, what, here);
  if (bytes % 16 != 0) {
    fail(std::string(what) + " of " + text(bytes) + " bytes at " + here.text() + ": it moves a multiple of 16");
  }
}

// Where the elements of a map's box at `coordinates` lie, row by row of its innermost dimension, in units of 16 bytes
// (which a swizzle keeps together).
std::vector<Piece> box_of(const TensorMap& map, const int* coordinates, int rank, void* tile, bool store,
                          const char* what, Location here) {
  check_aligned(&map, 64, "tensor map", here);
  check_aligned(tile, 128, what, here);
  if (rank != static_cast<int>(map.rank)) {
    fail(std::string(what) + " at " + here.text() + " gives " + text(static_cast<size_t>(rank)) +
         " coordinates to a map of rank " + text(map.rank));
  }
  char* const base = self().block->shared();
  const auto offset = static_cast<uint64_t>(static_cast<char*>(tile) - base);
  uint64_t boxes = 1;
  for (int d = 1; d < rank; ++d) {
    boxes *= map.box[d];
  }
  for (int d = 0; d < rank; ++d) {
    if (store && coordinates[d] < 0) {
      fail(std::string(what) + " at " + here.text() + " begins at a negative coordinate, where a store cannot");
    }
  }
  const uint64_t row_bytes = uint64_t{map.box[0]} * map.element_bytes;
  const uint64_t unit = map.element_bytes;
  std::vector<Piece> pieces;
  for (uint64_t row = 0; row < boxes; ++row) {
    bool inside = true;
    char* global = map.data;
    uint64_t rest = row;
    for (int d = 1; d < rank; ++d) {
      const int64_t at = coordinates[d] + static_cast<int64_t>(rest % map.box[d]);
      rest /= map.box[d];
      inside = inside && at >= 0 && at < static_cast<int64_t>(map.size[d]);
      global += at * static_cast<int64_t>(map.stride[d]);
    }
    for (uint64_t byte = 0; byte < row_bytes; byte += unit) {
      const int64_t at = coordinates[0] + static_cast<int64_t>(byte / unit);
      const bool valid = inside && at >= 0 && at < static_cast<int64_t>(map.size[0]);
      char* const from = valid ? global + at * static_cast<int64_t>(unit) : nullptr;
      char* const to = base + swizzle(offset + row * row_bytes + byte, map.swizzle_bytes);
      const bool extends =
          !pieces.empty() && pieces.back().shared + pieces.back().bytes == to &&
          (valid ? pieces.back().global != nullptr && pieces.back().global + pieces.back().bytes == from
                 : pieces.back().global == nullptr);
      if (extends) {
        pieces.back().bytes += unit;
      } else {
        pieces.push_back({to, from, unit});
      }
    }
  }
  return pieces;
}

}  // namespace

void bulk_load(void* to, const void* from, unsigned bytes, void* mbarrier, Location here) {
  const Runtime runtime;
  check_bulk(to, from, bytes, "bulk copy", here);
  const Piece piece{static_cast<char*>(to), static_cast<char*>(const_cast<void*>(from)), bytes};
  load_pieces({piece}, mbarrier, 1u << self().block->rank, "bulk copy", here);
}

void bulk_copy_to_block(unsigned rank, void* at, unsigned bytes, void* mbarrier, Location here) {
  const Runtime runtime;
  check_bulk(at, at, bytes, "bulk copy", here);
  if (rank >= cluster().blocks.size() || rank == self().block->rank) {
    fail("a bulk copy at " + here.text() + " names block " + text(rank) + ": not another one of its cluster of " +
         text(cluster().blocks.size()));
  }
  char* const place = static_cast<char*>(at);
  load_pieces({{place, place, bytes}}, mbarrier, 1u << rank, "bulk copy", here, true);
}

void bulk_store(void* to, const void* from, unsigned bytes, Location here) {
  const Runtime runtime;
  check_bulk(from, to, bytes, "bulk store", here);
  store_pieces({{static_cast<char*>(const_cast<void*>(from)), static_cast<char*>(to), bytes}}, "bulk store", here);
}

void tensor_load(void* to, const TensorMap& map, const int* coordinates, int rank, void* mbarrier, unsigned blocks,
                 Location here) {
  const Runtime runtime;
  if (blocks >> cluster().blocks.size() != 0 || blocks == 0) {
    fail("a multicast at " + here.text() + " names blocks (mask " + text(blocks) + ") that its cluster of " +
         text(cluster().blocks.size()) + " does not have");
  }
  load_pieces(box_of(map, coordinates, rank, to, false, "TMA load", here), mbarrier, blocks, "TMA load", here);
}

void tensor_store(const TensorMap& map, const int* coordinates, int rank, const void* from, Location here) {
  const Runtime runtime;
  store_pieces(box_of(map, coordinates, rank, const_cast<void*>(from), true, "TMA store", here), "TMA store", here);
}

void commit_stores() {
  AsyncState& mine = *self().async;
  mine.read_groups.commit(mine.stores.issued());
  mine.written_groups.commit(mine.stores.issued());
}

void wait_stores(unsigned newest, bool only_read, Location) {
  const Runtime runtime;
  Thread& me = self();
  AsyncState& mine = *me.async;
  uint32_t time = mine.read_groups.all_but(newest);
  if (!only_read) {
    time = mine.written_groups.all_but(newest);
    mine.read_groups.seen(time);
  }
  mine.stores.perform_until(time);
  if (kInstrumented && time > 0) {
    me.knowledge.seen.raise(mine.stores.agent(), time);
    if (!only_read) {
      me.knowledge.seen.raise(mine.written_agent, time);
    }
  }
}

// Fences and atomics.

void fence_proxy_async(Location) {
  if constexpr (kInstrumented) {
    const Runtime runtime;
    Thread& me = self();
    Knowledge& mine = me.knowledge;
    const uint32_t now = mine.seen[me.number];
    mine.visible.raise(me.number, now);
    mine.seen.set(me.number, now + 1);
    if (me.async->copies.issued() > 0) {
      const unsigned agent = me.async->copies.agent();
      mine.visible.raise(agent, mine.seen[agent]);
    }
  }
}

void fence_threads(Location) {
  const Runtime runtime;
  AsyncState& mine = *self().async;
  cluster().acquire(mine.acquired);
  cluster().release(mine.fenced);
}

void begin_atomic(void* address, size_t bytes, Location here) {
  const Runtime runtime;
  check_aligned(address, bytes, "atomic", here);
  if constexpr (kInstrumented) {
    Actor actor = actor_of_thread(here);
    actor.atomic = true;
    cluster().checker.write(actor, address, bytes);
  }
}

void end_atomic(void* address) {
  if constexpr (kInstrumented) {
    const Runtime runtime;
    Knowledge& carried = self().block->cluster->blocks.front().transfers->atomics[address];
    self().async->acquired.join(carried);
    carried.join(self().async->fenced);
  }
}

void check_finished(Thread& thread) {
  AsyncState& mine = *thread.async;
  const auto check = [&](uint32_t issued, uint32_t waited, const char* what) {
    if (waited < issued) {
      fail(thread.name() + " ends with " + text(issued - waited) + " " + what + " that it has not waited for");
    }
  };
  check(mine.copies.issued(), std::max(mine.handed_over, mine.copy_groups.waited_for()), "cp.async");
  check(mine.stores.issued(), mine.read_groups.waited_for(), "bulk stores");
  for (const Registers& registers : mine.registers) {
    if (registers.time != 0) {
      fail(thread.name() + " ends without having waited for the wgmma at " + registers.where.text());
    }
  }
}

void check_finished(Block& block) {
  for (const auto& [address, barrier] : block.transfers->mbarriers) {
    if (barrier.bytes != 0 || barrier.bytes_unseen) {
      fail("block " + block.index.text() + " ends with bulk copies in flight: nobody has waited for " +
           barrier.describe());
    }
  }
}

}  // namespace kx::emulation
