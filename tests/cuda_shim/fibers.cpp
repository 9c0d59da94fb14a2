// Runs the threads of a block as fibers, from barrier to barrier, in an order that changes each time.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda_runtime.h"

int shim_shared_limit = kShimMostShared;
dim3 threadIdx, blockIdx, blockDim, gridDim;
namespace nvae {
namespace cuda {
alignas(128) uint4 nvae_shared[(kShimMostShared + 4096) / sizeof(uint4)];
}
}  // namespace nvae

namespace {

// Saves the registers that a called function must keep, changes the stack, and restores what lies there.
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

constexpr size_t kStack = 64 * 1024;
struct Fiber {
  void* stack_pointer = nullptr;
  void* memory = nullptr;
  unsigned index = 0;
  bool done = false;
};
std::vector<Fiber> fibers;
void* scheduler;
Fiber* current;
const std::function<void()>* body;
int error;
int order_seed;

void run() {
  (*body)();
  current->done = true;
  shim_switch(&current->stack_pointer, scheduler);
  std::abort();  // a finished fiber is not resumed
}

void prepare(Fiber& fiber, unsigned index) {
  if (!fiber.memory) fiber.memory = std::aligned_alloc(64, kStack);
  void** top = reinterpret_cast<void**>(static_cast<char*>(fiber.memory) + kStack - 64);
  *--top = nullptr;                        // where run() would return to
  *--top = reinterpret_cast<void*>(&run);  // where shim_switch returns to
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
  fiber.index = index;
  fiber.done = false;
}

void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = dim3(fiber.index, 0, 0);
  shim_switch(&scheduler, fiber.stack_pointer);
}

}  // namespace

void __syncthreads() {
  const unsigned mine = threadIdx.x;
  shim_switch(&current->stack_pointer, scheduler);
  threadIdx = dim3(mine, 0, 0);
}

int cudaGetLastError() {
  const int found = error;
  error = 0;
  return found;
}

void shim_launch(dim3 grid, unsigned threads, size_t shared, const std::function<void()>& kernel) {
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.y > 65535 ||
      shared > static_cast<size_t>(shim_shared_limit)) {
    error = 9;  // as a GPU would say: an invalid configuration
    return;
  }
  gridDim = grid;
  blockDim = dim3(threads, 1, 1);
  body = &kernel;
  fibers.resize(1024);
  unsigned char* memory = reinterpret_cast<unsigned char*>(nvae::cuda::nvae_shared);
  unsigned order = 12345u + static_cast<unsigned>(order_seed);
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y, 0);
      std::memset(memory, 0xff, shared + 4096);  // NaN: what is read must have been written
      for (unsigned i = 0; i < threads; ++i) prepare(fibers[i], i);
      for (unsigned left = threads; left > 0;) {
        order = order * 1664525u + 1013904223u;
        const unsigned start = (order >> 8) % threads, step = order & 0x80000000u ? 1 : threads - 1;
        unsigned ended = 0;
        for (unsigned n = 0, i = start; n < threads; ++n, i = (i + step) % threads) {
          if (fibers[i].done) continue;
          resume(fibers[i]);
          ended += fibers[i].done;
        }
        if (ended != 0 && ended != left) {
          std::fprintf(stderr, "threads of block %u ended while others wait at a barrier\n", x);
          error = 719;
          return;
        }
        left -= ended;
      }
      for (size_t i = shared; i < shared + 4096; ++i)
        if (memory[i] != 0xff) {
          std::fprintf(stderr, "block %u wrote past its shared memory\n", x);
          error = 700;
          return;
        }
    }
  }
}

static ShimRegion* regions;
ShimRegion::ShimRegion(const char* file_, int line_, int copies_)
    : file(file_), line(line_), copies(copies_), next(regions) {
  regions = this;
}
// visit(file, line, copies, count) for every region that was entered since the last call.
extern "C" void shim_regions(void (*visit)(const char*, int, int, long long)) {
  for (ShimRegion* region = regions; region; region = region->next) {
    if (region->count) visit(region->file, region->line, region->copies, region->count);
    region->count = 0;
  }
}

// Another order of threads: results must not depend on it.
extern "C" void shim_order(int seed) { order_seed = seed; }
