// Watches every access of a kernel to memory. The kernels are compiled with -fsanitize=thread,alignment,
// which calls a function at each access; these are those functions, instead of a sanitizer's runtime.
#include <cxxabi.h>
#include <dlfcn.h>
#include <link.h>

#include <cstdio>
#include <cstdlib>
#include <set>
#include <sstream>
#include <vector>

#include "checker.h"

namespace shim {

bool dry;

namespace {

// Two bytes of shared memory or of a result. Times are ticks of a clock that advances whenever threads meet.
// What a thread did is visible to another if the block, or the warp of both, has met since, or the launch is
// another one: "ordered". Two accesses that are not ordered race unless both read.
struct Cell {
  uint32_t written, read;  // when last; 0: never
  uint32_t write_block, read_block;
  uint16_t writer, reader;  // threads; a reader may be kSeveral, or kWarpOf + w: several of warp w
  bool in_flight;           // the target of a cp.async whose thread has not waited for it
};
constexpr unsigned kGranule = 2, kWarpOf = 1024, kSeveral = 2048;

struct Buffer {
  std::string name;
  uintptr_t begin;
  size_t bytes;
  bool result;
  std::vector<Cell> cells;  // of a result
};

std::vector<Buffer> buffers;
Buffer* recent;
std::vector<Cell> own_cells;  // of this library's variables, shared memory among them
uintptr_t own_begin, own_end, code_begin, code_end;
uintptr_t host_stack;  // where the arguments of kernels are

constexpr uint32_t kByHost = 1;
uint32_t now = 2, launch_start, block_start, since_block;
uint32_t since_warp[kMostThreads / 32];
unsigned block;  // linear index of blockIdx

struct Copy {
  void* shared;
  const void* global;
  int bytes, used;
  unsigned group;
};
std::vector<Copy> copies[kMostThreads];
unsigned groups[kMostThreads];  // committed by each thread
bool waits_ignored;
int mutation;

std::string kernel_name;
bool in_block;
size_t dynamic_bytes;
std::ostringstream launches, reports;
std::set<std::pair<std::string, const void*>> reported;
constexpr size_t kMostReports = 30;

std::string text(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname) return "a kernel";
  int status = 0;
  char* found = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = status == 0 ? found : info.dli_sname;
  std::free(found);
  name = name.substr(0, name.rfind('('));  // the arguments
  for (const char* of : {"void ", "nvae::cuda::", "nvae::"})
    for (size_t at; (at = name.find(of)) != std::string::npos;) name.erase(at, std::strlen(of));
  return name;
}

// Whether nothing like it has been reported yet; only then is a report put into words.
bool is_news(const char* kind, const void* code) {
  return reported.size() < kMostReports && reported.insert({kind, code}).second;
}

std::string thread_text(unsigned thread) {
  if (thread == kSeveral) return "several threads";
  if (thread >= kWarpOf) return "several threads of warp " + std::to_string(thread - kWarpOf);
  return "thread " + std::to_string(thread);
}

// This library's segments: what can be written holds the kernels' static shared memory.
int note_segments(dl_phdr_info* info, size_t, void*) {
  const auto here = reinterpret_cast<uintptr_t>(&dry);
  for (int pass = 0; pass < 2; ++pass) {
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& segment = info->dlpi_phdr[i];
      if (segment.p_type != PT_LOAD) continue;
      const uintptr_t begin = info->dlpi_addr + segment.p_vaddr, end = begin + segment.p_memsz;
      if (pass == 0 && begin <= here && here < end) own_begin = begin & ~uintptr_t{1}, own_end = end;
      if (pass == 1 && own_end && !(segment.p_flags & PF_W)) {
        code_begin = code_begin ? std::min(code_begin, begin) : begin;
        code_end = std::max(code_end, end);
      }
    }
  }
  return own_end != 0;
}

void prepare() {
  if (own_end) return;
  dl_iterate_phdr(note_segments, nullptr);
  own_cells.resize((own_end - own_begin) / kGranule + 1);
}

// What is wrong with an access is worked out and put into words only once something is.
enum class Do { read, write, start_copy, land_copy };
struct Access {
  uintptr_t at;
  size_t bytes;
  Do what;
  const void* code;

  std::string text() const {
    constexpr const char* kVerbs[] = {"reads", "writes", "starts to copy", "lands a copy of"};
    std::ostringstream s;
    s << kVerbs[static_cast<int>(what)] << ' ' << bytes << " bytes at " << place();
    return s.str();
  }
  std::string place() const {
    std::ostringstream s;
    const auto shared = reinterpret_cast<uintptr_t>(shared_block) + kRedZone;
    if (at + kRedZone >= shared && at < shared + kMostShared + kRedZone) {
      s << "byte " << static_cast<long>(at - shared) << " of " << dynamic_bytes
        << " of dynamic shared memory";
      return s.str();
    }
    if (at >= own_begin && at < own_end) {
      Dl_info info;
      const bool known = dladdr(reinterpret_cast<const void*>(at), &info) && info.dli_saddr;
      s << "byte " << at - (known ? reinterpret_cast<uintptr_t>(info.dli_saddr) : own_begin)
        << " of static shared memory";
      return s.str();
    }
    const Buffer* nearest = nullptr;
    const auto distance = [&](const Buffer& b) {
      return at < b.begin ? b.begin - at : at < b.begin + b.bytes ? 0 : at - (b.begin + b.bytes);
    };
    for (const Buffer& b : buffers)
      if (!nearest || distance(b) < distance(*nearest)) nearest = &b;
    if (nearest && distance(*nearest) < (size_t{1} << 20))
      s << "byte " << static_cast<long>(at - nearest->begin) << " of " << nearest->bytes << " of "
        << nearest->name;
    else
      s << "address " << reinterpret_cast<const void*>(at) << ", of no buffer";
    return s.str();
  }
};

[[noreturn]] void refuse(const Access& a, const char* why = "") {
  if (is_news("out of bounds", a.code)) report("out of bounds", a.text() + why, a.code);
  abandon_launch(cudaErrorIllegalAddress);
}
[[noreturn]] void misaligned(const Access& a, size_t alignment) {
  if (is_news("misaligned", a.code))
    report("misaligned", a.text() + ", which is no multiple of " + std::to_string(alignment), a.code);
  abandon_launch(cudaErrorMisalignedAddress);
}

// `forgotten`: all that happened before is visible.
bool ordered(uint32_t when, unsigned of_block, unsigned thread, uint32_t forgotten) {
  if (when < forgotten) return true;
  if (of_block != block) return false;
  if (thread == own_index || when < since_block) return true;
  if (thread == kSeveral) return false;
  const unsigned warp = thread < kWarpOf ? thread / 32 : thread - kWarpOf;
  return warp == own_index / 32 && when < since_warp[warp];
}

// `cells`: of the memory from `begin` on. `initialised`: when the oldest write happened whose data may be
// read.
void check(std::vector<Cell>& cells, uintptr_t begin, const Access& a, uint32_t forgotten,
           uint32_t initialised) {
  const auto complain = [&](const char* kind, const auto& why) {
    if (is_news(kind, a.code)) report(kind, a.text() + why(), a.code);
  };
  const auto race = [&](const char* kind, const char* did, unsigned thread) {
    complain(kind,
             [&] { return ", " + (did + (" by " + thread_text(thread))) + " with no barrier between"; });
  };
  const size_t last = (a.at + a.bytes - 1) / kGranule;
  for (size_t i = a.at / kGranule; i <= last; ++i) {
    Cell& c = cells[i - begin / kGranule];
    if (c.in_flight && c.written >= forgotten && a.what != Do::land_copy)
      complain("cp.async before its wait",
               [&] { return ", where a copy of " + thread_text(c.writer) + " has not arrived"; });
    const bool after_write = c.written != 0 && !ordered(c.written, c.write_block, c.writer, forgotten);
    const bool after_read = c.read != 0 && !ordered(c.read, c.read_block, c.reader, forgotten);
    if (a.what == Do::read) {
      if (c.written < initialised) complain("uninitialised", [] { return ", never written"; });
      if (after_write) race("RAW race", "written", c.writer);
      if (!after_read) {
        c.reader = static_cast<uint16_t>(own_index);
      } else if (c.reader != own_index) {
        const unsigned warp = c.reader < kWarpOf ? c.reader / 32 : c.reader - kWarpOf;
        const bool same = c.reader != kSeveral && warp == own_index / 32 && c.read_block == block;
        c.reader = static_cast<uint16_t>(same ? kWarpOf + warp : kSeveral);
      }
      c.read = now;
      c.read_block = block;
    } else {
      if (after_write) race("WAW race", "written", c.writer);
      if (after_read) race("WAR race", "read", c.reader);
      c.written = now;
      c.write_block = block;
      c.writer = static_cast<uint16_t>(own_index);
      c.in_flight = a.what == Do::start_copy;
    }
  }
}

bool is_index(uintptr_t at) {
  const auto in = [&](const dim3& v) { return at - reinterpret_cast<uintptr_t>(&v) < sizeof v; };
  return in(threadIdx) || in(blockIdx) || in(blockDim) || in(gridDim);
}

Buffer* buffer_of(uintptr_t at) {
  if (recent && at - recent->begin < recent->bytes) return recent;
  for (Buffer& b : buffers)
    if (at - b.begin < b.bytes) return recent = &b;
  return nullptr;
}

void access(const Access& a) {
  if (!own_stack || a.at - reinterpret_cast<uintptr_t>(own_stack) < kStack) return;
  if (a.at >= own_begin && a.at < own_end) {
    const size_t offset =
        a.at - reinterpret_cast<uintptr_t>(shared_block) - kRedZone;  // wraps around below 0
    const bool dynamic = offset + kRedZone < kMostShared + 2 * kRedZone;
    if (!dynamic && is_index(a.at)) return;
    if (dynamic && (offset >= dynamic_bytes || a.bytes > dynamic_bytes - offset)) refuse(a);
    check(own_cells, own_begin, a, block_start, 0);  // unwritten, it holds NaN: that may be read, not used
  } else if (Buffer* b = buffer_of(a.at)) {
    if (a.bytes > b->begin + b->bytes - a.at) refuse(a);
    if (b->result)
      check(b->cells, b->begin, a, launch_start, kByHost);
    else if (a.what != Do::read)
      refuse(a, ", an input");
  } else if (a.what != Do::read ||
             (a.at - host_stack >= kStack && a.at - code_begin >= code_end - code_begin)) {
    refuse(a);
  }
}

void access(const void* at, size_t bytes, Do what, const void* code) {
  access({reinterpret_cast<uintptr_t>(at), bytes, what, code});
}

}  // namespace

void report(const char* kind, const std::string& detail, const void* code) {
  reports << kind << ": " << kernel_name;
  if (in_block)
    reports << ", block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z << ") thread "
            << own_index;
  reports << ' ' << detail;
  Dl_info info;
  if (code && dladdr(code, &info))  // of the call, for addr2line
    reports << " @" << reinterpret_cast<uintptr_t>(code) - 1 - reinterpret_cast<uintptr_t>(info.dli_fbase);
  reports << '\n';
}

void names_kernel(const void* kernel) {
  kernel_name = text(kernel);
  in_block = false;
}
void launch_begins(const void* kernel, dim3 grid, dim3 threads, size_t shared) {
  prepare();
  names_kernel(kernel);
  dynamic_bytes = shared;
  for (auto& of_thread : copies) of_thread.clear();
  host_stack = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
  launch_start = ++now;
  launches << kernel_name << '\t' << static_cast<uint64_t>(grid.x) * grid.y * grid.z << '\t'
           << threads.x * threads.y * threads.z << '\t' << shared << '\n';
}
void block_begins() {
  in_block = true;
  block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  block_start = since_block = ++now;
  std::memset(shared_block + kRedZone, 0xff, dynamic_bytes);  // NaN
}
void block_meets() { since_block = ++now; }
void warp_meets(unsigned warp) { since_warp[warp] = ++now; }
void thread_ends() { copies[own_index].clear(); }

void host_writes(void* to, size_t bytes) {
  const auto at = reinterpret_cast<uintptr_t>(to);
  Buffer* b = buffer_of(at);
  if (bytes == 0 || dry) return;
  kernel_name = "cudaMemsetAsync";
  if (!b || !b->result || bytes > b->begin + b->bytes - at)
    report("out of bounds", Access{at, bytes, Do::write, nullptr}.text());
  else
    for (size_t i = at - b->begin; i < at - b->begin + bytes; i += kGranule)
      b->cells[(b->begin + i) / kGranule - b->begin / kGranule].written = kByHost;
}

}  // namespace shim

using namespace shim;

void shim_copy_async(void* shared, const void* global, int bytes, int used) {
  const void* code = __builtin_return_address(0);
  if (used < 0) used = bytes;
  for (const void* p : {static_cast<const void*>(shared), global})
    if (reinterpret_cast<uintptr_t>(p) % bytes)
      misaligned({reinterpret_cast<uintptr_t>(p), static_cast<size_t>(bytes),
                  p == shared ? Do::start_copy : Do::read, code},
                 bytes);
  access(shared, bytes, Do::start_copy, code);
  if (used) access(global, used, Do::read, code);
  copies[own_index].push_back({shared, global, bytes, used, groups[own_index]});
}
bool shim_mutated(int n) { return n == mutation; }
void shim_commit_copies() { ++groups[own_index]; }
void shim_wait_copies(int left) {
  if (waits_ignored) return;
  std::vector<Copy>& mine = copies[own_index];
  size_t kept = 0;
  for (const Copy& c : mine) {
    if (left >= 0 && c.group + left >= groups[own_index]) {
      mine[kept++] = c;
      continue;
    }
    access(c.shared, c.bytes, Do::land_copy, __builtin_return_address(0));
    std::memcpy(c.shared, c.global, c.used);
    std::memset(static_cast<char*>(c.shared) + c.used, 0, c.bytes - c.used);
  }
  mine.resize(kept);
}

extern "C" {

// Until shim_forget_buffers() kernels may read [begin, begin + bytes), and write it if it is a result.
void shim_buffer(const char* name, const void* begin, size_t bytes, int result) {
  recent = nullptr;
  const auto at = reinterpret_cast<uintptr_t>(begin);
  buffers.push_back({name, at, bytes, result != 0, {}});
  if (result) buffers.back().cells.resize((at + bytes) / kGranule - at / kGranule + 1);
}
void shim_forget_buffers() {
  recent = nullptr;
  buffers.clear();
}
void shim_dry(int on) { dry = on != 0; }
void shim_mutate(int n) { mutation = n; }
void shim_ignore_waits(int on) { waits_ignored = on != 0; }

// What was found since the last call, a line each; CUDA's last error is forgotten with it.
const char* shim_reports() {
  static std::string found;
  found = reports.str();
  reports.str("");
  last_error = cudaSuccess;
  reported.clear();
  return found.c_str();
}
// The launches since the last call: kernel, blocks, threads of a block, bytes of dynamic shared memory.
const char* shim_launches() {
  static std::string found;
  found = launches.str();
  launches.str("");
  return found.c_str();
}

const char* shim_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

#define SHIM_CODE __builtin_return_address(0)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define SHIM_ACCESS(N)                                                            \
  void __tsan_read##N(void* at) { access(at, N, Do::read, SHIM_CODE); }           \
  void __tsan_write##N(void* at) { access(at, N, Do::write, SHIM_CODE); }         \
  void __tsan_unaligned_read##N(void* at) { access(at, N, Do::read, SHIM_CODE); } \
  void __tsan_unaligned_write##N(void* at) { access(at, N, Do::write, SHIM_CODE); }
SHIM_ACCESS(1)
SHIM_ACCESS(2)
SHIM_ACCESS(4)
SHIM_ACCESS(8)
SHIM_ACCESS(16)
void __tsan_read_range(void* at, size_t bytes) { access(at, bytes, Do::read, SHIM_CODE); }
void __tsan_write_range(void* at, size_t bytes) { access(at, bytes, Do::write, SHIM_CODE); }
// Atomics of host code; kernels have none.
#define SHIM_ATOMIC(BITS)                                                                    \
  uint##BITS##_t __tsan_atomic##BITS##_load(const volatile uint##BITS##_t* from, int) {      \
    return __atomic_load_n(from, __ATOMIC_SEQ_CST);                                          \
  }                                                                                          \
  void __tsan_atomic##BITS##_store(volatile uint##BITS##_t* to, uint##BITS##_t value, int) { \
    __atomic_store_n(to, value, __ATOMIC_SEQ_CST);                                           \
  }
SHIM_ATOMIC(8)
SHIM_ATOMIC(32)
SHIM_ATOMIC(64)

// From -fsanitize=alignment: a pointer is used that is no multiple of its type's alignment.
struct SanitizerType {
  uint16_t kind, info;
  char name[1];
};
struct SanitizerMismatch {
  const char* file;
  uint32_t line, column;
  const SanitizerType* type;
  unsigned char log_alignment, kind;
};
void __ubsan_handle_type_mismatch_v1(const SanitizerMismatch* data, void* at) {
  if (!own_stack) return;
  const size_t alignment = size_t{1} << data->log_alignment;
  const Do what = data->kind == 1 ? Do::write : Do::read;
  misaligned({reinterpret_cast<uintptr_t>(at), alignment, what, SHIM_CODE}, alignment);
}
}
