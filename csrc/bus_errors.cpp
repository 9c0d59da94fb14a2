#include "bus_errors.h"

#if defined(__linux__)

#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#include <cerrno>

namespace nvae {
namespace {

struct sigaction previous;
bool installed = false;

// Everything below runs in a signal handler, where only async-signal-safe functions may be called: no
// allocation, no stdio.
void print(const char* text, size_t length) {
  while (length > 0) {
    const ssize_t written = write(STDERR_FILENO, text, length);
    if (written <= 0) return;
    text += written;
    length -= static_cast<size_t>(written);
  }
}

bool hex(const char*& at, uintptr_t& value) {
  const char* begin = at;
  for (value = 0;; ++at) {
    const char c = *at;
    const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
    if (digit < 0) return at != begin;
    value = value << 4 | static_cast<uintptr_t>(digit);
  }
}

// The path in a line of /proc/self/maps ("begin-end rwxp offset device inode path") when it is a file's and
// holds the address, else nullptr.
const char* mapped_file(const char* line, uintptr_t address) {
  uintptr_t begin, end;
  if (!hex(line, begin) || *line++ != '-' || !hex(line, end)) return nullptr;
  return address >= begin && address < end ? strchr(line, '/') : nullptr;
}

// Prints the line of the mapping that holds the address.
void name_file(uintptr_t address) {
  static char buffer[4096], line[4096 + 256];  // a path has at most 4096 bytes
  const int maps = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
  if (maps < 0) return;
  size_t length = 0;
  for (ssize_t n; (n = read(maps, buffer, sizeof buffer)) > 0;) {
    for (ssize_t i = 0; i < n; ++i) {
      if (buffer[i] != '\n') {
        if (length < sizeof line - 1) line[length++] = buffer[i];
        continue;
      }
      line[length] = 0;
      length = 0;
      if (const char* path = mapped_file(line, address)) {
        static const char before[] = "nvae_fast: bus error while reading ";
        static const char after[] =
            ": the file was truncated, or its disk or network file system failed; the process ends\n";
        print(before, sizeof before - 1);
        print(path, strlen(path));
        print(after, sizeof after - 1);
        close(maps);
        return;
      }
    }
  }
  close(maps);
}

void on_bus_error(int, siginfo_t* info, void*) {
  const int error = errno;
  sigaction(SIGBUS, &previous, nullptr);
  if (info->si_code > 0) {
    name_file(reinterpret_cast<uintptr_t>(info->si_addr));
  } else {
    raise(SIGBUS);  // sent by kill: unlike a fault it does not come again by itself
  }
  errno = error;
}

}  // namespace

int report_bus_errors() {
  if (installed) return 0;
  struct sigaction action = {};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  if (sigaction(SIGBUS, &action, &previous) != 0) return errno;
  installed = true;
  return 0;
}

}  // namespace nvae

#else

namespace nvae {
int report_bus_errors() { return 0; }
}  // namespace nvae

#endif
