// What goes on while threads go on: asynchronous copies, their groups and mbarriers, and the fences between proxies.
//
// An operation's accesses are recorded when it is issued, on behalf of an agent of its own: until somebody has waited
// for it, whoever touches its memory races with it. Its data moves then, at the wait, or at any moment between
// (Timing); until it does, the destination holds NaN.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <utility>
#include <vector>

#include "block.h"

namespace kx::emulation {

// Operations that take place in the order of their issue, by one agent.
class Work {
 public:
  // The time at which `operation` is issued, 1 for the first.
  uint32_t issue(std::function<void()> operation);
  void perform_until(uint32_t time);
  unsigned agent();
  uint32_t issued() const { return issued_; }

 private:
  unsigned agent_ = 0;
  uint32_t issued_ = 0, performed_ = 0;
  std::deque<std::function<void()>> waiting_;
};

// The groups into which one thread commits operations.
class Groups {
 public:
  void commit(uint32_t issued);
  // Up to what time all but the `newest` groups reach.
  uint32_t all_but(unsigned newest);
  // That wait has returned, or the operations have been seen to complete in another way.
  uint32_t waited_for() const { return waited_; }
  void seen(uint32_t time) { waited_ = std::max(waited_, time); }

 private:
  std::deque<uint32_t> ends_;
  uint32_t waited_ = 0;
};

// Registers that an asynchronous matrix product owns until it has been waited for.
struct Registers {
  const void* address;
  size_t bytes;
  uint32_t time;  // of the last product that uses them, of its warpgroup's Work; 0 once waited for
  Location where;
};

struct AsyncState {
  Work copies;               // cp.async
  uint32_t handed_over = 0;  // copies that an mbarrier waits for
  Groups copy_groups;
  Work stores;                 // cp.async.bulk from shared memory: the time at which a source has been read
  unsigned written_agent = 0;  // counts the same times, but of what has been written
  Groups read_groups, written_groups;
  Groups product_groups;             // wgmma
  std::vector<Registers> registers;  // of products
  bool products_fenced = false;      // wgmma.fence since these registers were last touched
  Knowledge fenced, acquired;        // __threadfence: what later atomics release, what earlier ones brought
  unsigned polls = 0;                // of mbarriers in vain
};

struct Mbarrier : Waitable {
  size_t offset = 0;
  uint32_t expected = 0, pending = 0;
  int64_t bytes = 0;  // that this phase still waits for
  uint64_t phase = 0;
  bool observed = true;       // some wait has seen the last phase complete
  bool bytes_unseen = false;  // copies have completed and no wait has seen it
  Actor made_by{};
  Knowledge released, published;
  std::vector<Thread*> waiting;
  std::string describe() const override;
};

struct Accumulator;

// A warpgroup's matrix products, and the accumulators that they fill, by the first thread's registers.
struct ProductState {
  Work work;
  std::map<const void*, std::shared_ptr<Accumulator>> accumulators;
};

struct TransferState {
  std::map<const void*, Mbarrier> mbarriers;
  std::vector<ProductState> products;                // of each warpgroup
  std::vector<std::pair<unsigned, uint32_t>> slots;  // agents of bulk copies and their times, used in turn
  size_t next_slot = 0;
  std::map<const void*, Knowledge> atomics;
};

// An access of the running thread, or of what works on its behalf.
Actor actor_of_thread(Location here);
void check_aligned(const void* address, size_t alignment, const char* what, Location here);
void check_shared(const void* address, size_t bytes, const char* what, Location here);  // in the thread's own block
void check_global(const void* address, size_t bytes, const char* what, Location here);

// cp.async
void copy_async(void* to, const void* from, unsigned bytes, unsigned source_bytes, Location here);
void commit_copies();
void wait_copies(unsigned newest, Location here);
void wait_all_copies(Location here);
void arrive_after_copies(void* mbarrier, bool counted, Location here);

// mbarrier
void mbarrier_init(void* address, uint32_t count, Location here);
void mbarrier_invalidate(void* address, Location here);
void mbarrier_arrive(void* address, uint32_t count, int64_t expected_bytes, Location here);
void mbarrier_expect(void* address, int64_t bytes, Location here);
void mbarrier_wait(void* address, unsigned parity, Location here);
bool mbarrier_test(void* address, unsigned parity, Location here);

// cp.async.bulk, of bytes in a row and of tiles
struct TensorMap;
void bulk_load(void* to, const void* from, unsigned bytes, void* mbarrier, Location here);
void bulk_copy_to_block(unsigned rank, void* at, unsigned bytes, void* mbarrier, Location here);
void bulk_store(void* to, const void* from, unsigned bytes, Location here);
void tensor_load(void* to, const TensorMap& map, const int* coordinates, int rank, void* mbarrier, unsigned blocks,
                 Location here);
void tensor_store(const TensorMap& map, const int* coordinates, int rank, const void* from, Location here);
void commit_stores();
void wait_stores(unsigned newest, bool only_read, Location here);

void fence_proxy_async(Location here);
void fence_threads(Location here);

// Atomics: `change` maps the old value to the new one.
template <class T, class Change>
T atomic(T* address, Change change, Location here);
void begin_atomic(void* address, size_t bytes, Location here);
void end_atomic(void* address);

void check_finished(Thread& thread);  // nothing that it started is still in flight
void check_finished(Block& block);

template <class T, class Change>
T atomic(T* address, Change change, Location here) {
  const Runtime runtime;  // the access below is not the kernel's own
  begin_atomic(address, sizeof(T), here);
  const T old = *address;
  *address = change(old);
  end_atomic(address);
  return old;
}

}  // namespace kx::emulation
