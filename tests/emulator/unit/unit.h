// A minimal test main: EXPECT counts, reports the first failures and decides the exit status.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>

namespace unit {

inline long passed = 0;
inline long failed = 0;

inline void expect(bool ok, const char* file, int line, const char* format, ...) {
  if (ok) {
    ++passed;
    return;
  }
  if (++failed > 20) return;
  std::printf("%s:%d: ", file, line);
  va_list args;
  va_start(args, format);
  std::vprintf(format, args);
  va_end(args);
  std::printf("\n");
}

inline int finish(const char* name) {
  std::printf("%s: %ld passed, %ld failed\n", name, passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}

// splitmix64
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int below(int n) { return static_cast<int>(bits() % static_cast<uint64_t>(n)); }
  int between(int low, int high) { return low + below(high - low + 1); }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }

 private:
  uint64_t state_;
};

}  // namespace unit

#define EXPECT(condition, ...) unit::expect((condition), __FILE__, __LINE__, __VA_ARGS__)
