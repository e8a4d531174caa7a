// Tensor maps and bulk copies. Every copy has two halves, because the source may be read long
// before the destination changes: the first fills `staged`, the second applies it.
//
// Global addresses are host pointers. The caller checks them: for_each_box_row lists them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "shared_view.h"

namespace flash_ext::emulator {

// Values as in CUtensorMapDataType.
enum class TmaType : uint8_t {
  kU8,
  kU16,
  kU32,
  kS32,
  kU64,
  kS64,
  kF16,
  kF32,
  kF64,
  kBf16,
  kF32Ftz,
  kTf32,
  kTf32Ftz,
};

enum class ReduceOp : uint8_t { kAdd, kMin, kMax, kInc, kDec, kAnd, kOr, kXor };

constexpr int kMaxTmaRank = 5;

// What lies in the 128 opaque bytes of an emulated CUtensorMap.
struct TensorMap {
  uint32_t magic;
  TmaType type;
  uint8_t rank;
  Swizzle swizzle;
  uint8_t l2_promotion;
  uint8_t nan_fill;
  uint8_t element_stride[kMaxTmaRank];  // [0] is ignored
  uint16_t box[kMaxTmaRank];            // innermost first, as all arrays here
  uint64_t address;
  uint64_t stride[kMaxTmaRank];  // bytes; [0] is the size of an element
  uint32_t last[kMaxTmaRank];    // size - 1
  uint32_t check;                // of all that stands before; decode_tensor_map verifies it
};
static_assert(sizeof(TensorMap) <= 128);

// The arguments of cuTensorMapEncodeTiled, in its order and with its enumerators' values.
struct TiledMapArguments {
  int type;
  uint32_t rank;
  uint64_t address;
  const uint64_t* global_dim;       // [rank]
  const uint64_t* global_strides;   // [rank - 1], bytes
  const uint32_t* box_dim;          // [rank]
  const uint32_t* element_strides;  // [rank]
  int interleave;
  int swizzle;
  int l2_promotion;
  int oob_fill;
};

// Writes 128 bytes to `opaque`. Returns an empty string, or why the driver would refuse
// (CUDA_ERROR_INVALID_VALUE); unsupported kinds (interleave, sub-byte types) are refused alike.
std::string encode_tensor_map(const TiledMapArguments& arguments, void* opaque);

// Throws OperandFault for bytes that encode_tensor_map did not write.
TensorMap decode_tensor_map(const void* opaque);

int tma_element_bytes(TmaType type);
uint32_t box_elements(const TensorMap& map, int dim);  // after the element stride
uint32_t box_bytes(const TensorMap& map);              // the whole box: what complete_tx counts
uint32_t required_shared_alignment(const TensorMap& map);

// A run of elements along dimension 0 that lies inside the tensor.
struct BoxRow {
  uint32_t box_offset;  // bytes, in the densely packed box (before the swizzle)
  uint64_t global;
  uint32_t bytes;
};

// The in-bounds rows of the box at `coords` ([rank], signed, innermost first).
void append_box_rows(const TensorMap& map, const int32_t* coords, std::vector<BoxRow>& rows);

// Shared ranges that hold bytes [box_offset, box_offset + bytes) of the dense box.
void append_shared_ranges(const TensorMap& map, uint32_t shared_address, uint32_t box_offset, uint32_t bytes,
                          std::vector<ByteRange>& ranges);

// -- loads: global -> staged (dense box, filled out of bounds) -> shared
void read_tile(const TensorMap& map, const int32_t* coords, uint8_t* staged);
void place_tile(const TensorMap& map, const uint8_t* staged, SharedView shared, uint32_t shared_address);

// -- stores: shared -> staged (in-bounds part of the dense box) -> global
void collect_tile(const TensorMap& map, const int32_t* coords, SharedView shared, uint32_t shared_address,
                  uint8_t* staged);
void write_tile(const TensorMap& map, const int32_t* coords, const uint8_t* staged);

// -- reductions: collect_tile, then this; atomic per element between host threads
const char* invalid_reduction(TmaType type, ReduceOp op);  // null when it exists
void reduce_tile(const TensorMap& map, const int32_t* coords, ReduceOp op, const uint8_t* staged);

// -- bulk copies move plain bytes (memcpy to and from a staged buffer); this applies `bytes` of
// staged elements to `destination`, atomically per element between host threads.
void reduce_bulk(TmaType type, ReduceOp op, uint8_t* destination, const uint8_t* staged, uint32_t bytes);

}  // namespace flash_ext::emulator
