#pragma once
#include <cstddef>

// Writes one line about the current GPU: which code of this binary it runs, or why it runs none.
extern "C" void nvae_device_check(char* text, size_t size);
