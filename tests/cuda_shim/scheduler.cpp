// Runs the threads of a block as fibers, from barrier to barrier: warps in random order, and so the lanes of
// each.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "checker.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

char* own_stack;
unsigned own_index;
alignas(1024) unsigned char shared_block[kRedZone + kMostShared + kRedZone];

}  // namespace shim

// nvae::cuda::nvae_shared, the dynamic shared memory of the kernels, is the middle of that block.
static_assert(shim::kRedZone == 65536, "as below");
asm(R"(
.globl _ZN4nvae4cuda11nvae_sharedE
.set _ZN4nvae4cuda11nvae_sharedE, _ZN4shim12shared_blockE + 65536
)");

// Saves the registers that a called function must keep, changes the stack, and restores those saved on it.
extern "C" void shim_switch(void** save, void* load);
asm(R"(
.text
.globl shim_switch
.type shim_switch, @function
shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size shim_switch, .-shim_switch
)");

namespace shim {
namespace {

constexpr unsigned kWarp = warpSize;
enum class State { ready, at_barrier, at_collective, done };
struct Thread {
  void* stack_pointer;
  State state;
  const char* file;  // of the barrier at which it waits
  int line;
  unsigned mask;  // of the collective
  uint64_t value;
};
Thread threads[kMostThreads];
uint64_t exchanged[kMostThreads];
char* stacks;
void* scheduler;
bool abandoned;
void (*call)(const void*);
const void* closure;

unsigned seed;
uint32_t state;
unsigned below(unsigned n) {  // xorshift32
  state ^= state << 13;
  state ^= state >> 17;
  state ^= state << 5;
  return state % n;
}

int removed_line;
std::string removed_name;

void run() {
  call(closure);
  thread_ends();
  threads[own_index].state = State::done;
  shim_switch(&threads[own_index].stack_pointer, scheduler);
  std::abort();  // a finished fiber is not resumed
}

void prepare(unsigned index) {
  if (!stacks) {
    const int kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    stacks = static_cast<char*>(mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE, kind, -1, 0));
    if (stacks == MAP_FAILED) std::abort();
    for (unsigned i = 0; i < kMostThreads; ++i) mprotect(stacks + i * kStack, 4096, PROT_NONE);
  }
  void** top = reinterpret_cast<void**>(stacks + (index + 1) * kStack - 64);
  *--top = nullptr;                        // where run() would return to
  *--top = reinterpret_cast<void*>(&run);  // where shim_switch returns to
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  threads[index] = {top, State::ready, nullptr, 0, 0, 0};
}

void resume(unsigned index) {
  own_index = index;
  threadIdx = dim3(index % blockDim.x, index / blockDim.x % blockDim.y, index / blockDim.x / blockDim.y);
  own_stack = stacks + index * kStack;
  shim_switch(&scheduler, threads[index].stack_pointer);
  own_stack = nullptr;
}

void wait(State why) {
  threads[own_index].state = why;
  shim_switch(&threads[own_index].stack_pointer, scheduler);
}

// Lets lanes go on that met in a collective. Whether there were any.
bool release(unsigned begin, unsigned end) {
  for (unsigned i = begin; i < end; ++i) {
    if (threads[i].state != State::at_collective) continue;
    const unsigned mask = threads[i].mask;
    const auto in = [&](unsigned j) { return (mask >> (j - begin) & 1) != 0; };
    bool all = in(i);
    for (unsigned j = begin; j < end; ++j)
      if (in(j)) all = all && threads[j].state == State::at_collective && threads[j].mask == mask;
    if (!all) continue;
    warp_meets(begin / kWarp);
    for (unsigned j = begin; j < end; ++j)
      if (in(j)) threads[j].state = State::ready, exchanged[j] = threads[j].value;
    return true;
  }
  return false;
}

void run_warp(unsigned begin, unsigned end) {
  do {
    const unsigned first = below(kWarp), step = 2 * below(kWarp / 2) + 1;  // odd: every lane once
    for (unsigned n = 0; n < kWarp && !abandoned; ++n) {
      const unsigned i = begin + (first + n * step) % kWarp;
      if (i < end && threads[i].state == State::ready) resume(i);
    }
  } while (!abandoned && release(begin, end));
}

std::string where(const Thread& thread) {
  const char* slash = std::strrchr(thread.file, '/');
  return (slash ? slash + 1 : thread.file) + (":" + std::to_string(thread.line));
}

// Whether all threads have met at one barrier, or all have ended (then `ended` is set).
bool meet(unsigned count, bool& ended) {
  const Thread* first = nullptr;
  unsigned done = 0;
  for (own_index = 0; own_index < count; ++own_index) {
    const Thread& thread = threads[own_index];
    const char* kind = "divergence";
    if (thread.state == State::at_collective)
      return report(kind, "waits for lanes of its warp that ended or wait elsewhere"), false;
    done += thread.state == State::done;
    if (thread.state == State::at_barrier && !first) first = &thread;
    if (!first) continue;
    if (done != 0) return report(kind, "or others ended while some wait at " + where(*first)), false;
    if (first->line != thread.line || std::strcmp(first->file, thread.file) != 0)
      return report(kind, "waits at " + where(thread) + ", others at " + where(*first)), false;
  }
  ended = done == count;
  return true;
}

bool run_block(unsigned count) {
  for (unsigned i = 0; i < count; ++i) prepare(i);
  block_begins();
  std::vector<unsigned> order((count + kWarp - 1) / kWarp);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  for (bool ended = false; !ended;) {
    for (unsigned i = static_cast<unsigned>(order.size()); i > 1; --i)
      std::swap(order[i - 1], order[below(i)]);
    for (const unsigned warp : order) {
      run_warp(warp * kWarp, std::min(count, (warp + 1) * kWarp));
      if (abandoned) return false;
    }
    if (!meet(count, ended)) return false;
    for (unsigned i = 0; i < count; ++i)
      if (threads[i].state == State::at_barrier) threads[i].state = State::ready;
    block_meets();
  }
  return true;
}

}  // namespace

void abandon_launch(cudaError_t error) {
  abandoned = true;
  last_error = error;
  shim_switch(&threads[own_index].stack_pointer, scheduler);
  std::abort();
}

}  // namespace shim

using namespace shim;

void shim_barrier(const char* file, int line) {
  if (line == removed_line && std::strstr(file, removed_name.c_str())) return;
  threads[own_index].file = file;
  threads[own_index].line = line;
  wait(State::at_barrier);
}

uint64_t shim_exchange(unsigned mask, uint64_t value, int lane) {
  threads[own_index].mask = mask;
  threads[own_index].value = value;
  const unsigned warp = own_index / kWarp;
  wait(State::at_collective);
  return exchanged[warp * kWarp + lane];
}

void shim_launch(const void* kernel, dim3 grid, dim3 block, size_t shared, void (*call_)(const void*),
                 const void* closure_) {
  const cudaError_t error = allows_launch(kernel, grid, block, shared);
  launch_begins(kernel, grid, block, shared);
  if (error != cudaSuccess) last_error = error;
  if (error != cudaSuccess || dry) return;
  gridDim = grid;
  blockDim = block;
  call = call_;
  closure = closure_;
  abandoned = false;
  state = 2463534242u + 7919u * seed;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        if (run_block(block.x * block.y * block.z)) continue;
        if (!abandoned) last_error = cudaErrorLaunchFailure;
        return;
      }
}

static ShimRegion* regions;
void shim_enter(ShimRegion& region) {
  ++region.count;
  if (region.known) return;
  region.known = true;
  region.next = regions;
  regions = &region;
}

extern "C" {
// visit(file, line, copies, count) for every region that was entered since the last call.
void shim_regions(void (*visit)(const char*, int, int, long long)) {
  for (ShimRegion* region = regions; region; region = region->next) {
    if (region->count) visit(region->file, region->line, region->copies, region->count);
    region->count = 0;
  }
}
// Another order of warps and lanes: results must not depend on it.
void shim_seed(unsigned value) { seed = value; }
// Leaves out the barrier on this line of the file whose path contains `name`; line 0: none.
void shim_remove_barrier(const char* name, int line) {
  removed_name = name;
  removed_line = line;
}
}
