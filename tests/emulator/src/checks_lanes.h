// Races between the lanes of one warp: shared memory that one lane writes and another one reads, or the other way
// round, with no bar.warp.sync or wider barrier in between. The vector clocks know whole warps only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace flash_ext::emulator {

struct LaneConflict {
  bool found = false;
  uint32_t address = 0;
  uint32_t lane = 0;   // that comes now
  uint32_t other = 0;  // that came before; kSeveral: more than one
};

// One CTA's shared memory. An interval is what a warp executes between two synchronisations of its lanes.
class LaneMarks {
 public:
  static constexpr uint8_t kNobody = 0xff, kSeveral = 0xfe;

  explicit LaneMarks(uint32_t shared_bytes) : written_(shared_bytes), read_(shared_bytes) {}

  // Two stores of one instruction, or of two, to one place are let pass: often all lanes store the same.
  LaneConflict write(uint32_t mark, uint32_t lanes, const uint32_t* offsets, uint32_t bytes) {
    LaneConflict conflict;
    for (uint32_t left = lanes; left; left &= left - 1) {
      const uint32_t lane = uint32_t(__builtin_ctz(left)), begin = offsets[lane];
      find(read_, mark, begin, bytes, lane, conflict);
      for (uint32_t at = begin; at < begin + bytes; ++at) {
        uint8_t* const lanes_of = written_.fresh(mark, at);
        lanes_of[at % kBytes] = uint8_t(lane);
      }
    }
    return conflict;
  }
  LaneConflict read(uint32_t mark, uint32_t lanes, const uint32_t* offsets, uint32_t bytes) {
    LaneConflict conflict;
    for (uint32_t left = lanes; left; left &= left - 1) {
      const uint32_t lane = uint32_t(__builtin_ctz(left)), begin = offsets[lane];
      find(written_, mark, begin, bytes, lane, conflict);
      for (uint32_t at = begin; at < begin + bytes; ++at) {
        uint8_t& reader = read_.fresh(mark, at)[at % kBytes];
        reader = reader == kNobody || reader == lane ? uint8_t(lane) : kSeveral;
      }
    }
    return conflict;
  }

 private:
  static constexpr uint32_t kBytes = 16;

  // Who accessed each byte, valid where the mark of its 16 bytes is the present one.
  struct Side {
    explicit Side(uint32_t shared_bytes) : marks(shared_bytes / kBytes + 1), lanes(size_t(kBytes) * marks.size()) {}
    uint8_t* fresh(uint32_t mark, uint32_t address) {
      uint8_t* const first = lanes.data() + address / kBytes * kBytes;
      if (marks[address / kBytes] != mark) {
        marks[address / kBytes] = mark;
        std::fill_n(first, kBytes, kNobody);
      }
      return first;
    }
    std::vector<uint32_t> marks;
    std::vector<uint8_t> lanes;
  };

  static void find(const Side& side, uint32_t mark, uint32_t begin, uint32_t bytes, uint32_t lane,
                   LaneConflict& conflict) {
    for (uint32_t at = begin; at < begin + bytes; ++at) {
      if (side.marks[at / kBytes] != mark) continue;
      const uint8_t other = side.lanes[at];
      if (other != kNobody && other != lane && !conflict.found) conflict = {true, at, lane, other};
    }
  }

  Side written_, read_;
};

}  // namespace flash_ext::emulator
