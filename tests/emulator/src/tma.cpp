#include "tma.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <type_traits>

#include "formats.h"

namespace flash_ext::emulator {

namespace {

constexpr uint32_t kMagic = 0x70616d54;  // "Tmap"
constexpr int kMaxBox = 256;
constexpr int kMaxElementStride = 8;
constexpr uint64_t kMaxStride = uint64_t{1} << 40;
constexpr uint64_t kMaxDim = uint64_t{1} << 32;
constexpr uint32_t kTmaSharedAlignment = 128;

struct TypeInfo {
  const char* name;
  int bytes;
  bool floating;
};

constexpr TypeInfo kTypes[] = {
    {"u8", 1, false},     {"u16", 2, false}, {"u32", 4, false},     {"s32", 4, false}, {"u64", 8, false},
    {"s64", 8, false},    {"f16", 2, true},  {"f32", 4, true},      {"f64", 8, true},  {"bf16", 2, true},
    {"f32.ftz", 4, true}, {"tf32", 4, true}, {"tf32.ftz", 4, true},
};
constexpr int kTypeCount = sizeof kTypes / sizeof kTypes[0];

const TypeInfo& info(TmaType type) { return kTypes[static_cast<int>(type)]; }

template <class... Args>
std::string text(const char* format, Args... args) {
  char buffer[256];
  std::snprintf(buffer, sizeof buffer, format, args...);
  return buffer;
}

uint32_t checksum(const TensorMap& map) {
  uint32_t hash = 2166136261u;
  const auto* bytes = reinterpret_cast<const uint8_t*>(&map);
  for (size_t i = 0; i < offsetof(TensorMap, check); ++i) hash = (hash ^ bytes[i]) * 16777619u;
  return hash;
}

using ull = unsigned long long;

std::string check_arguments(const TiledMapArguments& a) {
  if (a.type < 0 || a.type >= kTypeCount) return text("data type %d is not supported", a.type);
  const TypeInfo& type = kTypes[a.type];
  if (a.rank < 1 || a.rank > kMaxTmaRank) return text("rank must be 1 to 5, got %u", a.rank);
  if (a.interleave != 0) return text("interleave %d is not supported", a.interleave);
  if (a.swizzle < 0 || a.swizzle > 3) return text("swizzle %d is not supported", a.swizzle);
  if (a.l2_promotion < 0 || a.l2_promotion > 3) return text("L2 promotion %d", a.l2_promotion);
  if (a.oob_fill < 0 || a.oob_fill > 1) return text("out-of-bounds fill %d", a.oob_fill);
  if (a.oob_fill == 1 && !type.floating) {
    return text("NaN fill needs a floating-point type, got %s", type.name);
  }
  if (!a.global_dim || !a.box_dim || !a.element_strides || (a.rank > 1 && !a.global_strides)) {
    return "an array argument is null";
  }
  if (a.address == 0) return "globalAddress is null";
  if (a.address % 16 != 0) {
    return text("globalAddress 0x%llx is not 16-byte aligned", ull{a.address});
  }
  for (uint32_t i = 0; i < a.rank; ++i) {
    if (a.global_dim[i] == 0 || a.global_dim[i] > kMaxDim) {
      return text("globalDim[%u] must be 1 to 2^32, got %llu", i, ull{a.global_dim[i]});
    }
    if (a.box_dim[i] == 0 || a.box_dim[i] > kMaxBox) {
      return text("boxDim[%u] must be 1 to 256, got %u", i, a.box_dim[i]);
    }
    if (a.element_strides[i] == 0 || a.element_strides[i] > kMaxElementStride) {
      return text("elementStrides[%u] must be 1 to 8, got %u", i, a.element_strides[i]);
    }
  }
  for (uint32_t i = 0; i + 1 < a.rank; ++i) {
    if (a.global_strides[i] % 16 != 0 || a.global_strides[i] >= kMaxStride) {
      return text("globalStrides[%u] must be a multiple of 16 below 2^40, got %llu", i, ull{a.global_strides[i]});
    }
  }
  const uint32_t inner = a.box_dim[0] * static_cast<uint32_t>(type.bytes);
  if (inner % 16 != 0) return text("boxDim[0] is %u bytes, not a multiple of 16", inner);
  const uint32_t span = swizzle_span(static_cast<Swizzle>(a.swizzle));
  if (a.swizzle != 0 && inner > span) {
    return text("boxDim[0] is %u bytes, more than the swizzle's %u", inner, span);
  }
  return {};
}

// Calls row(BoxRow) for every run of in-bounds elements along dimension 0.
template <class Row>
void for_each_box_row(const TensorMap& map, const int32_t* coords, Row&& row) {
  const uint32_t element = static_cast<uint32_t>(map.stride[0]);
  const int64_t begin = std::max<int64_t>(coords[0], 0);
  const int64_t end = std::min<int64_t>(int64_t{coords[0]} + map.box[0], int64_t{map.last[0]} + 1);
  if (begin >= end) return;
  uint32_t counts[kMaxTmaRank] = {1, 1, 1, 1, 1};
  for (int dim = 1; dim < map.rank; ++dim) counts[dim] = box_elements(map, dim);

  const uint32_t row_bytes = map.box[0] * element;
  const uint32_t first_byte = static_cast<uint32_t>(begin - coords[0]) * element;
  const uint32_t bytes = static_cast<uint32_t>(end - begin) * element;
  uint32_t index[kMaxTmaRank] = {};
  for (uint32_t box_row = 0;; ++box_row) {
    uint64_t address = map.address + static_cast<uint64_t>(begin) * element;
    bool inside = true;
    for (int dim = 1; dim < map.rank; ++dim) {
      const int64_t at = int64_t{coords[dim]} + int64_t{index[dim]} * map.element_stride[dim];
      inside = inside && at >= 0 && at <= int64_t{map.last[dim]};
      address += static_cast<uint64_t>(at) * map.stride[dim];
    }
    if (inside) row(BoxRow{box_row * row_bytes + first_byte, address, bytes});
    int dim = 1;
    while (dim < map.rank && ++index[dim] == counts[dim]) index[dim++] = 0;
    if (dim >= map.rank) return;
  }
}

// Calls piece(shared address, box offset, bytes) for runs that stay together under the swizzle.
template <class Piece>
void for_each_shared_piece(const TensorMap& map, uint32_t shared_address, uint32_t box_offset, uint32_t bytes,
                           Piece&& piece) {
  if (map.swizzle == Swizzle::kNone) {
    if (bytes > 0) piece(shared_address + box_offset, box_offset, bytes);
    return;
  }
  const uint32_t end = box_offset + bytes;
  while (box_offset < end) {
    const uint32_t address = shared_address + box_offset;
    const uint32_t length = std::min(end - box_offset, 16 - address % 16);
    piece(swizzle_address(map.swizzle, address), box_offset, length);
    box_offset += length;
  }
}

uint8_t* shared_bytes(SharedView shared, uint32_t address, uint32_t bytes) {
  if (bytes > shared.size || address > shared.size - bytes) {
    throw OperandFault(text("TMA: %u bytes at shared 0x%x are beyond its %u bytes", bytes, address, shared.size));
  }
  return shared.data + address;
}

// The ".ftz" and "tf32" types change what is loaded.
void convert_loaded(TmaType type, uint8_t* bytes, uint32_t count) {
  const bool flush = type == TmaType::kF32Ftz || type == TmaType::kTf32Ftz;
  const bool round = type == TmaType::kTf32 || type == TmaType::kTf32Ftz;
  if (!flush && !round) return;
  for (uint32_t i = 0; i < count; i += 4) {
    uint32_t bits;
    std::memcpy(&bits, bytes + i, 4);
    if (flush && (bits & 0x7f800000u) == 0) bits &= 0x80000000u;
    if (round) bits = f32_to_tf32<Round::kNearest>(bits_float(bits));
    std::memcpy(bytes + i, &bits, 4);
  }
}

void fill_out_of_bounds(const TensorMap& map, uint8_t* staged, uint32_t bytes) {
  std::memset(staged, 0, bytes);
  if (!map.nan_fill) return;
  const int element = info(map.type).bytes;
  const uint64_t nan = element == 2 ? 0x7fffu : element == 4 ? 0x7fffffffu : uint64_t{0x7fffffffffffffff};
  for (uint32_t i = 0; i < bytes; i += static_cast<uint32_t>(element)) {
    std::memcpy(staged + i, &nan, static_cast<size_t>(element));
  }
}

// ---- reductions ------------------------------------------------------------------------------

template <class Integer>
Integer reduce_integer(ReduceOp op, Integer old, Integer value) {
  using Unsigned = std::make_unsigned_t<Integer>;
  switch (op) {
    case ReduceOp::kAdd:
      return static_cast<Integer>(static_cast<Unsigned>(old) + static_cast<Unsigned>(value));
    case ReduceOp::kMin:
      return std::min(old, value);
    case ReduceOp::kMax:
      return std::max(old, value);
    case ReduceOp::kInc:
      return old >= value ? 0 : static_cast<Integer>(old + 1);
    case ReduceOp::kDec:
      return old == 0 || old > value ? value : static_cast<Integer>(old - 1);
    case ReduceOp::kAnd:
      return old & value;
    case ReduceOp::kOr:
      return old | value;
    case ReduceOp::kXor:
      return old ^ value;
  }
  return old;
}

// A number wins over NaN, and -0 is below +0, as PTX's min and max have it.
float reduce_min_max(ReduceOp op, float old, float value) {
  if (old != old) return value;
  if (value != value) return old;
  if (old == value) {
    const bool take_old = (float_bits(old) >> 31 != 0) == (op == ReduceOp::kMin);
    return take_old ? old : value;
  }
  return (old < value) == (op == ReduceOp::kMin) ? old : value;
}

// Additions of f32 to global memory flush subnormals to zero of the same sign; the 16-bit ones
// carry .noftz.
float flush_subnormal(float x) {
  const uint32_t bits = float_bits(x);
  return (bits & 0x7f800000u) == 0 ? bits_float(bits & 0x80000000u) : x;
}

template <class Bits, class Combine>
void reduce_elements(uint8_t* destination, const uint8_t* staged, uint32_t bytes, Combine&& combine) {
  for (uint32_t i = 0; i < bytes; i += sizeof(Bits)) {
    Bits value;
    std::memcpy(&value, staged + i, sizeof value);
    auto* target = reinterpret_cast<Bits*>(destination + i);
    Bits old = __atomic_load_n(target, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(target, &old, combine(old, value), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }
}

template <class Integer>
void reduce_integers(ReduceOp op, uint8_t* destination, const uint8_t* staged, uint32_t bytes) {
  using Bits = std::make_unsigned_t<Integer>;
  reduce_elements<Bits>(destination, staged, bytes, [op](Bits old, Bits value) {
    return static_cast<Bits>(reduce_integer(op, static_cast<Integer>(old), static_cast<Integer>(value)));
  });
}

}  // namespace

std::string encode_tensor_map(const TiledMapArguments& arguments, void* opaque) {
  if (opaque == nullptr) return "tensorMap is null";
  if (reinterpret_cast<uintptr_t>(opaque) % 64 != 0) return "tensorMap is not 64-byte aligned";
  std::string reason = check_arguments(arguments);
  if (!reason.empty()) return reason;
  TensorMap map;
  std::memset(&map, 0, sizeof map);  // the checksum covers the padding
  map.magic = kMagic;
  map.type = static_cast<TmaType>(arguments.type);
  map.rank = static_cast<uint8_t>(arguments.rank);
  map.swizzle = static_cast<Swizzle>(arguments.swizzle);
  map.l2_promotion = static_cast<uint8_t>(arguments.l2_promotion);
  map.nan_fill = static_cast<uint8_t>(arguments.oob_fill);
  map.address = arguments.address;
  for (uint32_t i = 0; i < arguments.rank; ++i) {
    map.element_stride[i] = static_cast<uint8_t>(arguments.element_strides[i]);
    map.box[i] = static_cast<uint16_t>(arguments.box_dim[i]);
    map.last[i] = static_cast<uint32_t>(arguments.global_dim[i] - 1);
    map.stride[i] = i == 0 ? static_cast<uint64_t>(info(map.type).bytes) : arguments.global_strides[i - 1];
  }
  map.check = checksum(map);
  std::memset(opaque, 0, 128);
  std::memcpy(opaque, &map, sizeof map);
  return {};
}

TensorMap decode_tensor_map(const void* opaque) {
  TensorMap map;
  std::memcpy(&map, opaque, sizeof map);
  if (map.magic != kMagic || map.check != checksum(map)) {
    throw OperandFault("TMA: these 128 bytes are not a tensor map made by cuTensorMapEncodeTiled");
  }
  return map;
}

int tma_element_bytes(TmaType type) { return info(type).bytes; }

uint32_t box_elements(const TensorMap& map, int dim) {
  const uint32_t stride = dim == 0 ? 1 : map.element_stride[dim];
  return (map.box[dim] + stride - 1) / stride;
}

uint32_t box_bytes(const TensorMap& map) {
  uint32_t bytes = static_cast<uint32_t>(map.stride[0]);
  for (int dim = 0; dim < map.rank; ++dim) bytes *= box_elements(map, dim);
  return bytes;
}

uint32_t required_shared_alignment(const TensorMap&) { return kTmaSharedAlignment; }

void append_box_rows(const TensorMap& map, const int32_t* coords, std::vector<BoxRow>& rows) {
  for_each_box_row(map, coords, [&](const BoxRow& row) { rows.push_back(row); });
}

void append_shared_ranges(const TensorMap& map, uint32_t shared_address, uint32_t box_offset, uint32_t bytes,
                          std::vector<ByteRange>& ranges) {
  const size_t first = ranges.size();
  for_each_shared_piece(map, shared_address, box_offset, bytes,
                        [&](uint32_t address, uint32_t, uint32_t length) { ranges.push_back({address, length}); });
  // The swizzle permutes within 128-byte lines: sorted, whole lines become single ranges.
  std::sort(ranges.begin() + static_cast<std::ptrdiff_t>(first), ranges.end(),
            [](const ByteRange& x, const ByteRange& y) { return x.begin < y.begin; });
  size_t kept = first;
  for (size_t i = first; i < ranges.size(); ++i) {
    if (kept > first && ranges[kept - 1].begin + ranges[kept - 1].size == ranges[i].begin) {
      ranges[kept - 1].size += ranges[i].size;
    } else {
      ranges[kept++] = ranges[i];
    }
  }
  ranges.resize(kept);
}

void read_tile(const TensorMap& map, const int32_t* coords, uint8_t* staged) {
  fill_out_of_bounds(map, staged, box_bytes(map));
  for_each_box_row(map, coords, [&](const BoxRow& row) {
    std::memcpy(staged + row.box_offset, reinterpret_cast<const void*>(row.global), row.bytes);
    convert_loaded(map.type, staged + row.box_offset, row.bytes);
  });
}

void place_tile(const TensorMap& map, const uint8_t* staged, SharedView shared, uint32_t shared_address) {
  for_each_shared_piece(map, shared_address, 0, box_bytes(map), [&](uint32_t address, uint32_t offset, uint32_t bytes) {
    std::memcpy(shared_bytes(shared, address, bytes), staged + offset, bytes);
  });
}

void collect_tile(const TensorMap& map, const int32_t* coords, SharedView shared, uint32_t shared_address,
                  uint8_t* staged) {
  for_each_box_row(map, coords, [&](const BoxRow& row) {
    for_each_shared_piece(map, shared_address, row.box_offset, row.bytes,
                          [&](uint32_t address, uint32_t offset, uint32_t bytes) {
                            std::memcpy(staged + offset, shared_bytes(shared, address, bytes), bytes);
                          });
  });
}

void write_tile(const TensorMap& map, const int32_t* coords, const uint8_t* staged) {
  for_each_box_row(map, coords, [&](const BoxRow& row) {
    std::memcpy(reinterpret_cast<void*>(row.global), staged + row.box_offset, row.bytes);
  });
}

const char* invalid_reduction(TmaType type, ReduceOp op) {
  const bool wide = info(type).bytes >= 4;
  switch (op) {
    case ReduceOp::kAdd:
      if (type == TmaType::kF16 || type == TmaType::kBf16 || wide) return nullptr;
      return "TMA reduction: .add needs f16, bf16 or elements of 32 or 64 bits";
    case ReduceOp::kMin:
    case ReduceOp::kMax:
      if (type == TmaType::kF16 || type == TmaType::kBf16) return nullptr;
      if (wide && !info(type).floating) return nullptr;
      return "TMA reduction: .min and .max need f16, bf16 or integers of 32 or 64 bits";
    case ReduceOp::kInc:
    case ReduceOp::kDec:
      return type == TmaType::kU32 ? nullptr : "TMA reduction: .inc and .dec need u32";
    default:
      if (wide && !info(type).floating) return nullptr;
      return "TMA reduction: .and, .or and .xor need integers of 32 or 64 bits";
  }
}

void reduce_bulk(TmaType type, ReduceOp op, uint8_t* destination, const uint8_t* staged, uint32_t bytes) {
  if (const char* reason = invalid_reduction(type, op)) throw OperandFault(reason);
  switch (type) {
    case TmaType::kU32:
      return reduce_integers<uint32_t>(op, destination, staged, bytes);
    case TmaType::kS32:
      return reduce_integers<int32_t>(op, destination, staged, bytes);
    case TmaType::kU64:
      return reduce_integers<uint64_t>(op, destination, staged, bytes);
    case TmaType::kS64:
      return reduce_integers<int64_t>(op, destination, staged, bytes);
    case TmaType::kF16:
      return reduce_elements<uint16_t>(destination, staged, bytes, [op](uint16_t old, uint16_t value) {
        const float a = f16_to_f32(old), b = f16_to_f32(value);
        return f32_to_f16(op == ReduceOp::kAdd ? a + b : reduce_min_max(op, a, b));
      });
    case TmaType::kBf16:
      return reduce_elements<uint16_t>(destination, staged, bytes, [op](uint16_t old, uint16_t value) {
        const float a = bf16_to_f32(old), b = bf16_to_f32(value);
        return f32_to_bf16(op == ReduceOp::kAdd ? a + b : reduce_min_max(op, a, b));
      });
    case TmaType::kF64:
      return reduce_elements<uint64_t>(destination, staged, bytes, [](uint64_t old, uint64_t value) {
        return std::bit_cast<uint64_t>(std::bit_cast<double>(old) + std::bit_cast<double>(value));
      });
    default:  // the f32 kinds
      return reduce_elements<uint32_t>(destination, staged, bytes, [](uint32_t old, uint32_t value) {
        return float_bits(flush_subnormal(flush_subnormal(bits_float(old)) + flush_subnormal(bits_float(value))));
      });
  }
}

void reduce_tile(const TensorMap& map, const int32_t* coords, ReduceOp op, const uint8_t* staged) {
  for_each_box_row(map, coords, [&](const BoxRow& row) {
    reduce_bulk(map.type, op, reinterpret_cast<uint8_t*>(row.global), staged + row.box_offset, row.bytes);
  });
}

}  // namespace flash_ext::emulator
