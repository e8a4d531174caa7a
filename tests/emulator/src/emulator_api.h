/* What host code may tell the emulator. The functions are weak: linked against the real CUDA runtime
   they are null. */
#pragma once

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { FLASH_EXT_ROLE_IN = 0, FLASH_EXT_ROLE_OUT = 1, FLASH_EXT_ROLE_INOUT = 2, FLASH_EXT_ROLE_WORKSPACE = 3 };

/* Makes [ptr, ptr + bytes) global memory of the launches that follow on this thread, until cleared.
   Overlapping registrations become one range: views of one storage may be registered one by one. */
void flash_ext_emulator_register(const void* ptr, size_t bytes, int role, const char* name) __attribute__((weak));
void flash_ext_emulator_clear(void) __attribute__((weak));

/* Why the last runtime or driver call of this thread failed, in words; "" if it did not. Lives until
   the thread's next call. */
const char* flash_ext_emulator_message(void) __attribute__((weak));

#ifdef __cplusplus
}
#endif
