// What the parts of the stand-in know of each other.
#pragma once
#include <string>

#include "cuda_runtime.h"

namespace shim {

constexpr size_t kMostThreads = 1024, kStack = 64 * 1024;
constexpr size_t kMostShared = 227 * 1024, kRedZone = 64 * 1024;

// scheduler.cpp
extern char* own_stack;               // of the thread that runs; null while the host does
extern unsigned own_index;            // of that thread in its block
extern unsigned char shared_block[];  // red zone, dynamic shared memory of the block, red zone
[[noreturn]] void abandon_launch(cudaError_t error);  // after an access that would fault on a device

// devices.cpp
cudaError_t allows_launch(const void* kernel, dim3 grid, dim3 block, size_t shared);
extern cudaError_t last_error;

// checker.cpp. Times: what happened before `since` is visible to all, see Cell.
void names_kernel(const void* kernel);  // in reports
void launch_begins(const void* kernel, dim3 grid, dim3 block, size_t shared);
void block_begins();
void block_meets();              // at a barrier
void warp_meets(unsigned warp);  // at a collective of the warp
void thread_ends();
void host_writes(void* to, size_t bytes);
// `code` is where in the kernel.
void report(const char* kind, const std::string& detail, const void* code = nullptr);
extern bool dry;  // launches are noted and checked against the limits of the device, but not run

}  // namespace shim
