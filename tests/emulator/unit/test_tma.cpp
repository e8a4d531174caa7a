// Tensor maps: what is refused, and random boxes against element-by-element loops.
#include "../src/tma.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "../src/formats.h"
#include "unit.h"

namespace {

using namespace flash_ext::emulator;

struct alignas(64) Opaque {
  uint8_t bytes[128];
};

constexpr uint32_t kSharedBytes = 160 * 1024;

// A random valid map over a buffer with gaps between its rows.
struct Problem {
  TmaType type;
  uint32_t rank;
  uint64_t dims[5];
  uint64_t strides[4];
  uint32_t box[5];
  uint32_t element_strides[5];
  int swizzle;
  int nan_fill;
  uint64_t bytes;                // of the tensor
  std::vector<uint8_t> storage;  // 64 bytes before, the tensor, 64 bytes after
  uint8_t* tensor() {
    const auto address = reinterpret_cast<uintptr_t>(storage.data());
    return storage.data() + (64 - address % 16);
  }
  TiledMapArguments arguments() {
    return {static_cast<int>(type),
            rank,
            reinterpret_cast<uint64_t>(tensor()),
            dims,
            strides,
            box,
            element_strides,
            0,
            swizzle,
            0,
            nan_fill};
  }
};

Problem random_problem(TmaType type, uint32_t rank, int swizzle, unit::Random& random) {
  Problem p{};
  p.type = type;
  p.rank = rank;
  p.swizzle = swizzle;
  const auto element = static_cast<uint32_t>(tma_element_bytes(type));
  const bool floating =
      type == TmaType::kF16 || type == TmaType::kBf16 || type == TmaType::kF32 || type == TmaType::kF64;
  p.nan_fill = floating ? random.below(2) : 0;
  const uint32_t span = swizzle == 0 ? 256 : swizzle_span(static_cast<Swizzle>(swizzle));
  const uint32_t inner =
      random.below(2) ? span : 16 * static_cast<uint32_t>(1 + random.below(static_cast<int>(span / 16)));
  p.box[0] = inner / element;
  if (p.box[0] > 256) p.box[0] = 256;
  p.dims[0] = static_cast<uint64_t>(random.between(1, static_cast<int>(2 * p.box[0])));
  p.element_strides[0] = static_cast<uint32_t>(random.between(1, 3));  // ignored
  uint64_t extent = (p.dims[0] * element + 15) / 16 * 16;
  for (uint32_t i = 1; i < rank; ++i) {
    p.dims[i] = static_cast<uint64_t>(random.between(1, 7));
    p.box[i] = static_cast<uint32_t>(random.between(1, rank == 2 ? 40 : 5));
    p.element_strides[i] = random.below(3) ? 1 : static_cast<uint32_t>(random.between(1, 8));
    p.strides[i - 1] = extent + 16 * static_cast<uint64_t>(random.below(3));
    extent = p.strides[i - 1] * p.dims[i];
  }
  p.bytes = extent;
  p.storage.resize(extent + 128 + 16);
  return p;
}

void fill_random(std::vector<uint8_t>& bytes, unit::Random& random) {
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random.bits());
}

// Visits the box elements: (dense index, inside, byte offset in the tensor).
void for_each_element(const Problem& p, const int32_t* coords,
                      const std::function<void(uint32_t, bool, uint64_t)>& visit) {
  const auto element = static_cast<uint64_t>(tma_element_bytes(p.type));
  uint32_t counts[5] = {p.box[0], 1, 1, 1, 1};
  for (uint32_t i = 1; i < p.rank; ++i) {
    counts[i] = (p.box[i] + p.element_strides[i] - 1) / p.element_strides[i];
  }
  uint32_t dense = 0;
  for (uint32_t i4 = 0; i4 < counts[4]; ++i4)
    for (uint32_t i3 = 0; i3 < counts[3]; ++i3)
      for (uint32_t i2 = 0; i2 < counts[2]; ++i2)
        for (uint32_t i1 = 0; i1 < counts[1]; ++i1)
          for (uint32_t i0 = 0; i0 < counts[0]; ++i0) {
            const uint32_t index[5] = {i0, i1, i2, i3, i4};
            bool inside = true;
            int64_t offset = 0;
            for (uint32_t dim = 0; dim < p.rank; ++dim) {
              const int64_t step = dim == 0 ? 1 : p.element_strides[dim];
              const int64_t at = coords[dim] + index[dim] * step;
              inside = inside && at >= 0 && at < static_cast<int64_t>(p.dims[dim]);
              offset += at * static_cast<int64_t>(dim == 0 ? element : p.strides[dim - 1]);
            }
            visit(dense++, inside, inside ? static_cast<uint64_t>(offset) : 0);
          }
}

// Shared address of a dense byte, written out from the definition of the three patterns.
uint32_t swizzled(int mode, uint32_t address) {
  switch (mode) {
    case 1:
      return address ^ (address >> 7 & 1) << 4;
    case 2:
      return address ^ (address >> 7 & 3) << 4;
    case 3:
      return address ^ (address >> 7 & 7) << 4;
    default:
      return address;
  }
}

uint64_t nan_bits(int element) { return element == 2 ? 0x7fff : element == 4 ? 0x7fffffff : 0x7fffffffffffffff; }

uint32_t covered(const std::vector<ByteRange>& ranges, std::vector<int>& seen) {
  uint32_t bytes = 0;
  for (const ByteRange& range : ranges) {
    bytes += range.size;
    for (uint32_t i = 0; i < range.size; ++i) ++seen[range.begin + i];
  }
  return bytes;
}

void check_box(Problem& p, unit::Random& random) {
  const auto element = static_cast<uint32_t>(tma_element_bytes(p.type));
  Opaque opaque;
  const std::string reason = encode_tensor_map(p.arguments(), &opaque);
  EXPECT(reason.empty(), "refused: %s", reason.c_str());
  if (!reason.empty()) return;
  const TensorMap map = decode_tensor_map(&opaque);
  int32_t coords[5] = {};
  for (uint32_t i = 0; i < p.rank; ++i) {
    coords[i] = random.between(-static_cast<int>(p.box[i]), static_cast<int>(p.dims[i]) + 1);
  }
  fill_random(p.storage, random);
  const uint32_t total = box_bytes(map);
  const uint32_t start = 1024 + 128 * static_cast<uint32_t>(random.below(9));
  EXPECT(start + total + 128 < kSharedBytes, "the test's box is too large");

  // Load.
  std::vector<uint8_t> shared(kSharedBytes, 0xcd), staged(total);
  read_tile(map, coords, staged.data());
  place_tile(map, staged.data(), {shared.data(), kSharedBytes}, start);
  const uint64_t fill = p.nan_fill ? nan_bits(static_cast<int>(element)) : 0;
  uint32_t elements = 0, inside_bytes = 0;
  std::vector<int> written(kSharedBytes);
  for_each_element(p, coords, [&](uint32_t dense, bool inside, uint64_t offset) {
    ++elements;
    inside_bytes += inside ? element : 0;
    const void* want = inside ? static_cast<const void*>(p.tensor() + offset) : &fill;
    const uint32_t at = swizzled(p.swizzle, start + dense * element);
    for (uint32_t i = 0; i < element; ++i) written[at + i] = 1;
    EXPECT(std::memcmp(&shared[at], want, element) == 0, "load: rank %u type %d swizzle %d: %u", p.rank,
           static_cast<int>(p.type), p.swizzle, dense);
  });
  EXPECT(elements * element == total, "box_bytes is %u, not %u", total, elements * element);
  bool untouched = true;
  for (uint32_t i = 0; i < kSharedBytes; ++i) {
    untouched = untouched && (written[i] || shared[i] == 0xcd);
  }
  EXPECT(untouched, "a load wrote beside its box");

  // Ranges: the whole box, and the in-bounds rows.
  std::vector<ByteRange> ranges;
  append_shared_ranges(map, start, 0, total, ranges);
  std::vector<int> seen(kSharedBytes);
  EXPECT(covered(ranges, seen) == total && seen == written, "shared ranges are not the box");
  std::vector<BoxRow> rows;
  append_box_rows(map, coords, rows);
  uint32_t row_bytes = 0;
  ranges.clear();
  for (const BoxRow& row : rows) {
    row_bytes += row.bytes;
    append_shared_ranges(map, start, row.box_offset, row.bytes, ranges);
    const auto begin = reinterpret_cast<uint64_t>(p.tensor());
    EXPECT(row.global >= begin && row.global + row.bytes <= begin + p.bytes, "row out of bounds");
  }
  EXPECT(row_bytes == inside_bytes, "rows hold %u bytes, not %u", row_bytes, inside_bytes);

  // Store: random data, clipped, nothing else changes; the source may change after the snapshot.
  fill_random(shared, random);
  const std::vector<uint8_t> source = shared, before = p.storage;
  std::vector<int> read(kSharedBytes), need(kSharedBytes);
  covered(ranges, read);
  collect_tile(map, coords, {shared.data(), kSharedBytes}, start, staged.data());
  std::fill(shared.begin(), shared.end(), uint8_t{0});
  EXPECT(p.storage == before, "a store landed before it was applied");
  write_tile(map, coords, staged.data());
  std::vector<uint8_t> want = before;
  const auto skew = static_cast<size_t>(p.tensor() - p.storage.data());
  for_each_element(p, coords, [&](uint32_t dense, bool inside, uint64_t offset) {
    if (!inside) return;
    const uint32_t at = swizzled(p.swizzle, start + dense * element);
    for (uint32_t i = 0; i < element; ++i) need[at + i] = 1;
    std::memcpy(&want[skew + offset], &source[at], element);
  });
  EXPECT(p.storage == want, "store: rank %u type %d swizzle %d", p.rank, static_cast<int>(p.type), p.swizzle);
  EXPECT(read == need, "the rows of a store are not what it reads");
}

void check_boxes() {
  unit::Random random(7);
  for (uint32_t rank = 1; rank <= 5; ++rank) {
    for (int swizzle = 0; swizzle < 4; ++swizzle) {
      for (TmaType type : {TmaType::kU8, TmaType::kU16, TmaType::kF16, TmaType::kBf16, TmaType::kS32, TmaType::kF32,
                           TmaType::kU64, TmaType::kF64}) {
        for (int repeat = 0; repeat < 6; ++repeat) {
          Problem p = random_problem(type, rank, swizzle, random);
          check_box(p, random);
        }
      }
    }
  }
}

// Types that change what they load: subnormals to zero, tf32 rounded to nearest.
void check_converting_loads() {
  alignas(16) float data[4] = {bits_float(0x80000001u), 1.0f + 0x1p-11f + 0x1p-20f, -3.0f, 0x1p-130f};
  const uint64_t dims[1] = {4};
  const uint32_t box[1] = {4}, ones[1] = {1};
  const int32_t coords[1] = {0};
  for (TmaType type : {TmaType::kF32Ftz, TmaType::kTf32, TmaType::kTf32Ftz}) {
    Opaque opaque;
    const std::string reason = encode_tensor_map(
        {static_cast<int>(type), 1, reinterpret_cast<uint64_t>(data), dims, nullptr, box, ones, 0, 0, 0, 0}, &opaque);
    EXPECT(reason.empty(), "refused: %s", reason.c_str());
    uint32_t loaded[4];
    read_tile(decode_tensor_map(&opaque), coords, reinterpret_cast<uint8_t*>(loaded));
    const bool flush = type != TmaType::kTf32, round = type != TmaType::kF32Ftz;
    EXPECT(loaded[0] == (flush || round ? 0x80000000u : 1u), "a subnormal became 0x%x", loaded[0]);
    EXPECT(loaded[1] == float_bits(round ? 1.0f + 0x1p-10f : data[1]), "0x%x", loaded[1]);
    EXPECT(loaded[2] == float_bits(-3.0f), "0x%x", loaded[2]);
    EXPECT(loaded[3] == (flush ? 0 : float_bits(0x1p-130f)), "0x%x", loaded[3]);
  }
}

void check_refusals() {
  std::vector<uint8_t> storage(8192);
  const uint64_t address = (reinterpret_cast<uint64_t>(storage.data()) + 63) / 64 * 64;
  auto refusal = [&](auto change) {
    uint64_t dims[6] = {64, 8, 2, 1, 1, 1}, strides[5] = {128, 1024, 2048, 2048, 2048};
    uint32_t box[6] = {32, 4, 1, 1, 1, 1}, steps[6] = {1, 1, 1, 1, 1, 1};
    TiledMapArguments a{static_cast<int>(TmaType::kBf16), 3, address, dims, strides, box, steps, 0, 2, 0, 0};
    Opaque opaque;
    change(a, dims, strides, box, steps);
    return encode_tensor_map(a, &opaque);
  };
#define REFUSED(word, body)                                                                                   \
  do {                                                                                                        \
    const std::string reason =                                                                                \
        refusal([](TiledMapArguments& a, uint64_t* dims, uint64_t* strides, uint32_t* box, uint32_t* steps) { \
          (void)a, (void)dims, (void)strides, (void)box, (void)steps;                                         \
          body;                                                                                               \
        });                                                                                                   \
    EXPECT(reason.find(word) != std::string::npos, "%s gave '%s'", #body, reason.c_str());                    \
  } while (0)
  EXPECT(refusal([](auto&&...) {}).empty(), "the valid map is refused");
  REFUSED("data type", a.type = 14);
  REFUSED("data type", a.type = -1);
  REFUSED("rank", a.rank = 0);
  REFUSED("rank", a.rank = 6);
  REFUSED("aligned", a.address += 8);
  REFUSED("null", a.address = 0);
  REFUSED("null", a.box_dim = nullptr);
  REFUSED("null", a.global_strides = nullptr);
  REFUSED("globalDim[1]", dims[1] = 0);
  REFUSED("globalDim[0]", dims[0] = (uint64_t{1} << 32) + 1);
  REFUSED("globalStrides[0]", strides[0] = 136);
  REFUSED("globalStrides[1]", strides[1] = uint64_t{1} << 40);
  REFUSED("boxDim[0]", box[0] = 257);
  REFUSED("boxDim[2]", box[2] = 0);
  REFUSED("multiple of 16", box[0] = 12);
  REFUSED("swizzle's 64", box[0] = 40);
  REFUSED("elementStrides[1]", steps[1] = 9);
  REFUSED("elementStrides[0]", steps[0] = 0);
  REFUSED("interleave", a.interleave = 1);
  REFUSED("swizzle", a.swizzle = 4);
  REFUSED("L2", a.l2_promotion = 4);
  REFUSED("fill", a.oob_fill = 2);
  REFUSED("floating", (a.oob_fill = 1, a.type = static_cast<int>(TmaType::kU16)));
#undef REFUSED
  EXPECT(refusal([](TiledMapArguments&, uint64_t* dims, uint64_t* strides, auto&&...) {
           dims[2] = uint64_t{1} << 32;
           strides[1] = 0;
         }).empty(),
         "a stride of 0 or 2^32 elements are refused");

  Opaque garbage{};
  bool thrown = false;
  try {
    decode_tensor_map(&garbage);
  } catch (const OperandFault&) {
    thrown = true;
  }
  EXPECT(thrown, "garbage passes for a tensor map");
}

void check_shared_bounds() {
  alignas(16) static uint8_t data[1024];
  const uint64_t dims[1] = {1024};
  const uint32_t box[1] = {256}, ones[1] = {1};
  const int32_t coords[1] = {0};
  Opaque opaque;
  encode_tensor_map({0, 1, reinterpret_cast<uint64_t>(data), dims, nullptr, box, ones, 0, 0, 0, 0}, &opaque);
  const TensorMap map = decode_tensor_map(&opaque);
  std::vector<uint8_t> shared(512), staged(256);
  int thrown = 0;
  for (uint32_t start : {0u, 256u, 384u, 512u, 0xffffff80u}) {
    try {
      place_tile(map, staged.data(), {shared.data(), 512}, start);
    } catch (const OperandFault&) {
      ++thrown;
    }
    try {
      collect_tile(map, coords, {shared.data(), 512}, start, staged.data());
    } catch (const OperandFault&) {
      ++thrown;
    }
  }
  EXPECT(thrown == 6, "%d of 6 boxes beyond shared memory were noticed", thrown);
}

// Each operation on values whose result is known.
template <class T>
void check_reduction(TmaType type, ReduceOp op, T old, T value, T want) {
  EXPECT(invalid_reduction(type, op) == nullptr, "type %d op %d", static_cast<int>(type), static_cast<int>(op));
  alignas(16) T target[16 / sizeof(T)], staged[16 / sizeof(T)];
  for (size_t i = 0; i < 16 / sizeof(T); ++i) target[i] = old, staged[i] = value;
  reduce_bulk(type, op, reinterpret_cast<uint8_t*>(target), reinterpret_cast<uint8_t*>(staged), 16);
  for (T got : target) {
    EXPECT(got == want, "reduction type %d op %d: 0x%llx, not 0x%llx", static_cast<int>(type), static_cast<int>(op),
           static_cast<unsigned long long>(got), static_cast<unsigned long long>(want));
  }
}

void check_reductions() {
  using R = ReduceOp;
  check_reduction<uint32_t>(TmaType::kU32, R::kAdd, 0xffffffff, 2, 1);
  check_reduction<uint32_t>(TmaType::kU32, R::kMin, 0xffffffff, 2, 2);
  check_reduction<uint32_t>(TmaType::kU32, R::kMax, 0xffffffff, 2, 0xffffffff);
  check_reduction<uint32_t>(TmaType::kS32, R::kMin, 0xffffffff, 2, 0xffffffff);
  check_reduction<uint32_t>(TmaType::kS32, R::kMax, 0xffffffff, 2, 2);
  check_reduction<uint32_t>(TmaType::kU32, R::kInc, 4, 5, 5);
  check_reduction<uint32_t>(TmaType::kU32, R::kInc, 5, 5, 0);
  check_reduction<uint32_t>(TmaType::kU32, R::kDec, 0, 5, 5);
  check_reduction<uint32_t>(TmaType::kU32, R::kDec, 6, 5, 5);
  check_reduction<uint32_t>(TmaType::kU32, R::kDec, 3, 5, 2);
  check_reduction<uint32_t>(TmaType::kU32, R::kAnd, 12, 10, 8);
  check_reduction<uint32_t>(TmaType::kU32, R::kOr, 12, 10, 14);
  check_reduction<uint32_t>(TmaType::kU32, R::kXor, 12, 10, 6);
  check_reduction<uint64_t>(TmaType::kU64, R::kAdd, 0xffffffff, 1, 0x100000000);
  check_reduction<uint64_t>(TmaType::kS64, R::kMin, ~uint64_t{0}, 1, ~uint64_t{0});
  check_reduction<uint64_t>(TmaType::kU64, R::kXor, 12, 10, 6);
  check_reduction<uint16_t>(TmaType::kF16, R::kAdd, f32_to_f16(2048), f32_to_f16(1), f32_to_f16(2048));
  check_reduction<uint16_t>(TmaType::kF16, R::kAdd, 1, 2, 3);  // subnormals survive
  check_reduction<uint16_t>(TmaType::kF16, R::kMin, 0x7fff, f32_to_f16(1), f32_to_f16(1));
  check_reduction<uint16_t>(TmaType::kF16, R::kMin, 0, 0x8000, 0x8000);
  check_reduction<uint16_t>(TmaType::kF16, R::kMax, 0, 0x8000, 0);
  check_reduction<uint16_t>(TmaType::kBf16, R::kAdd, f32_to_bf16(1.5f), f32_to_bf16(-4), f32_to_bf16(-2.5f));
  // 257 lies between 256 and 258 and goes to the even one.
  check_reduction<uint16_t>(TmaType::kBf16, R::kAdd, f32_to_bf16(256), f32_to_bf16(1.0f), f32_to_bf16(256));
  check_reduction<uint16_t>(TmaType::kBf16, R::kMax, f32_to_bf16(-1), f32_to_bf16(-4), f32_to_bf16(-1));
  check_reduction<uint32_t>(TmaType::kF32, R::kAdd, float_bits(1.5f), float_bits(2.0f), float_bits(3.5f));
  check_reduction<uint32_t>(TmaType::kF32, R::kAdd, 1, 0x80000001u, 0);
  check_reduction<uint64_t>(TmaType::kF64, R::kAdd, std::bit_cast<uint64_t>(0.5), std::bit_cast<uint64_t>(0.25),
                            std::bit_cast<uint64_t>(0.75));
  constexpr std::pair<TmaType, ReduceOp> kMissing[] = {{TmaType::kU8, R::kAdd},  {TmaType::kF32, R::kMin},
                                                       {TmaType::kF16, R::kOr},  {TmaType::kS32, R::kInc},
                                                       {TmaType::kU16, R::kXor}, {TmaType::kF32, R::kAnd}};
  for (auto [type, op] : kMissing) {
    EXPECT(invalid_reduction(type, op) != nullptr, "type %d has no operation %d", static_cast<int>(type),
           static_cast<int>(op));
  }

  // A clipped box adds to its in-bounds elements only, and concurrent reductions lose nothing.
  unit::Random random(8);
  for (int repeat = 0; repeat < 20; ++repeat) {
    Problem p = random_problem(TmaType::kU32, 2, random.below(4), random);
    Opaque opaque;
    encode_tensor_map(p.arguments(), &opaque);
    const TensorMap map = decode_tensor_map(&opaque);
    const int32_t coords[2] = {random.between(-5, 5), random.between(-2, 3)};
    fill_random(p.storage, random);
    std::vector<uint8_t> want = p.storage;
    const auto skew = static_cast<size_t>(p.tensor() - p.storage.data());
    std::vector<uint8_t> staged(box_bytes(map), 1);
    auto reduce = [&] {
      for (int i = 0; i < 50; ++i) reduce_tile(map, coords, R::kAdd, staged.data());
    };
    std::thread other(reduce);
    reduce();
    other.join();
    for_each_element(p, coords, [&](uint32_t, bool inside, uint64_t offset) {
      if (!inside) return;
      uint32_t x;
      std::memcpy(&x, &want[skew + offset], 4);
      x += 100 * 0x01010101u;
      std::memcpy(&want[skew + offset], &x, 4);
    });
    EXPECT(p.storage == want, "reduce_tile");
  }
}

}  // namespace

int main() {
  check_boxes();
  check_converting_loads();
  check_refusals();
  check_shared_bounds();
  check_reductions();
  return unit::finish("tma");
}
