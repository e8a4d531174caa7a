// Under the emulator every tensor that an op receives or allocates is registered with its role; any other address is out
// of bounds there, and a write to an input is an error. On a GPU the weak symbol is absent and nothing happens.
#pragma once

#include <cstddef>

enum FlashExtMemoryRole { kFlashExtIn = 0, kFlashExtOut = 1, kFlashExtInOut = 2, kFlashExtWorkspace = 3 };

extern "C" __attribute__((weak)) void flash_ext_emulator_register(const void* data, size_t bytes, int role,
                                                                  const char* name);
