// The fundamental types of PTX.
#include "ptx.h"

namespace flash_ext::emulator {

namespace {

struct TypeRow {
  std::string_view name;
  PtxType type;
  uint32_t bytes;
};

constexpr TypeRow kTypes[] = {
    {"pred", PtxType::kPred, 0},     {"b8", PtxType::kB8, 1},         {"b16", PtxType::kB16, 2},
    {"b32", PtxType::kB32, 4},       {"b64", PtxType::kB64, 8},       {"b128", PtxType::kB128, 16},
    {"u8", PtxType::kU8, 1},         {"u16", PtxType::kU16, 2},       {"u32", PtxType::kU32, 4},
    {"u64", PtxType::kU64, 8},       {"s8", PtxType::kS8, 1},         {"s16", PtxType::kS16, 2},
    {"s32", PtxType::kS32, 4},       {"s64", PtxType::kS64, 8},       {"f16", PtxType::kF16, 2},
    {"f16x2", PtxType::kF16x2, 4},   {"bf16", PtxType::kBF16, 2},     {"bf16x2", PtxType::kBF16x2, 4},
    {"f32", PtxType::kF32, 4},       {"f64", PtxType::kF64, 8},       {"tf32", PtxType::kTF32, 4},
    {"e4m3x2", PtxType::kE4M3x2, 2}, {"e5m2x2", PtxType::kE5M2x2, 2},
};

}  // namespace

PtxType parse_type(std::string_view name) {
  for (const TypeRow& row : kTypes) {
    if (row.name == name) return row.type;
  }
  return PtxType::kNone;
}

uint32_t type_bytes(PtxType type) {
  for (const TypeRow& row : kTypes) {
    if (row.type == type) return row.bytes;
  }
  return 0;
}

bool is_signed(PtxType type) {
  return type == PtxType::kS8 || type == PtxType::kS16 || type == PtxType::kS32 || type == PtxType::kS64;
}

bool is_float(PtxType type) { return type >= PtxType::kF16 && type <= PtxType::kF64; }

}  // namespace flash_ext::emulator
