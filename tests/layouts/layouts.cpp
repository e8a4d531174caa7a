// Every index map of csrc/common/fragment.cuh, swizzle.cuh and outputs.cuh against CuTe's own layouts, on the host.
// Prints each mismatch's first place and returns the number of maps that differ.
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include <fcntl.h>
#include <unistd.h>

#include <cstdio>

#include "common/fragment.cuh"
#include "common/outputs.cuh"
#include "common/swizzle.cuh"

namespace {

namespace fx = flash_ext;
using namespace cute;
using Element = cutlass::bfloat16_t;

int failures = 0;

// One line a map; `places` counts what was compared, so that an empty loop cannot pass.
struct Comparison {
  const char* name;
  long places = 0;
  long mismatches = 0;

  explicit Comparison(const char* name) : name(name) {}
  void expect(long ours, long theirs, int a, int b) {
    ++places;
    if (ours != theirs && mismatches++ == 0) {
      std::printf("%s: at (%d, %d) ours is %ld, CuTe's %ld\n", name, a, b, ours, theirs);
    }
  }
  ~Comparison() {
    std::printf("%-44s %7ld places, %ld mismatches\n", name, places, mismatches);
    if (mismatches != 0 || places == 0) ++failures;
  }
};

// CuTe's thread-value layouts give row + 64 * column.
template <int kN>
void compare_accumulator(const char* name) {
  Comparison compare(name);
  const SM90::GMMA::CLayout_64xN<kN> layout{};
  static_assert(size(layout) == 64 * kN);
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < kN / 2; ++i) {
      const int ours = fx::acc_row(thread, fx::acc_half(i)) + 64 * fx::acc_col(thread, i);
      compare.expect(ours, layout(thread, i), thread, i);
    }
  }
}

using RegisterAtom = SM90::GMMA::MMA_64x128x16_F32BF16BF16_RS<GMMA::Major::K, GMMA::Major::MN>;

void compare_a_operand() {
  Comparison compare("A operand in registers");
  const MMA_Traits<RegisterAtom>::ALayout layout{};
  for (int thread = 0; thread < 128; ++thread) {
    for (int r = 0; r < 4; ++r) {
      for (int x = 0; x < 2; ++x) {
        const int ours = fx::a_operand_row(thread, r) + 64 * fx::a_operand_col(thread, r, x);
        compare.expect(ours, layout(thread, 2 * r + x), thread, 2 * r + x);
      }
    }
  }
}

// The accumulators that become A register r of step s must be the same matrix elements by both of CuTe's layouts.
void compare_weights() {
  Comparison compare("weights: accumulator to A operand");
  using ScoreAtom = SM90::GMMA::MMA_64x128x16_F32BF16BF16_SS<GMMA::Major::K, GMMA::Major::K>;
  const MMA_Traits<ScoreAtom>::CLayout scores{};
  const MMA_Traits<RegisterAtom>::ALayout operand{};
  for (int thread = 0; thread < 128; ++thread) {
    for (int step = 0; step < 8; ++step) {
      for (int r = 0; r < 4; ++r) {
        for (int x = 0; x < 2; ++x) {
          compare.expect(scores(thread, fx::a_operand_source(step, r) + x),
                         operand(thread, 2 * r + x) + 64 * 16 * step, thread, 8 * step + 2 * r + x);
        }
      }
    }
  }
}

// CuTe swizzles addresses: this array stands for shared memory, so that tiles lie as in a kernel.
alignas(1024) Element storage[256 * 128];

template <class Tile>
long byte_offset(const Tile& tile, int a, int b) {
  return 2 * (raw_pointer_cast(&tile(a, b)) - storage);
}

// Swizzled byte offsets, and the descriptors' unswizzled steps, of a K-major tile (Q and K).
template <int kRows, int kCols>
void compare_k_major(const char* name) {
  const auto layout =
      tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{}, Shape<Int<kRows>, Int<kCols>>{}, Step<_1, _2>{});
  const auto tile = make_tensor(make_smem_ptr(storage), layout);
  {
    Comparison compare(name);
    for (int row = 0; row < kRows; ++row) {
      for (int col = 0; col < kCols; ++col) {
        compare.expect(fx::tile_offset(kRows, row, col), byte_offset(tile, row, col), row, col);
      }
    }
  }
  Comparison compare("  its descriptor's steps");
  for (int step = 0; step < kCols / 16; ++step) {
    compare.expect(16 * fx::k_major_step(kRows, step), 2 * layout.layout_b()(0, 16 * step), kRows, step);
  }
}

// The same for V, whose rows are the contraction: CuTe sees the transposed, MN-major matrix.
template <int kRows, int kCols>
void compare_mn_major(const char* name) {
  const auto layout =
      tile_to_shape(GMMA::Layout_MN_SW128_Atom<Element>{}, Shape<Int<kCols>, Int<kRows>>{}, Step<_2, _1>{});
  const auto tile = make_tensor(make_smem_ptr(storage), layout);
  {
    Comparison compare(name);
    for (int row = 0; row < kRows; ++row) {
      for (int col = 0; col < kCols; ++col) {
        compare.expect(fx::tile_offset(kRows, row, col), byte_offset(tile, col, row), row, col);
      }
    }
  }
  Comparison compare("  its descriptor's steps");
  for (int step = 0; step < kRows / 16; ++step) {
    compare.expect(16 * fx::mn_major_step(step), 2 * layout.layout_b()(0, 16 * step), kRows, step);
  }
}

// make_gmma_desc knows no shared-memory address on the host: it prints that and takes 0.
template <GMMA::Major kMajor, class Tile>
uint64_t cute_descriptor(const Tile& tile) {
  std::fflush(stdout);
  const int output = dup(1), null = open("/dev/null", O_WRONLY);
  dup2(null, 1);
  const uint64_t bits = SM90::GMMA::make_gmma_desc<kMajor>(tile).desc_;
  std::fflush(stdout);
  dup2(output, 1);
  close(output);
  close(null);
  return bits;
}

template <int kRows, int kCols>
void compare_descriptors(const char* name) {
  Comparison compare(name);
  const auto k_layout =
      tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{}, Shape<Int<kRows>, Int<kCols>>{}, Step<_1, _2>{});
  const auto mn_layout =
      tile_to_shape(GMMA::Layout_MN_SW128_Atom<Element>{}, Shape<Int<kCols>, Int<kRows>>{}, Step<_2, _1>{});
  const auto k_major = make_tensor(make_smem_ptr(storage), k_layout);
  const auto mn_major = make_tensor(make_smem_ptr(storage), mn_layout);
  const auto k_slice = local_tile(k_major, Shape<Int<kRows>, _16>{}, make_coord(0, 0));
  const auto mn_slice = local_tile(mn_major, Shape<Int<kCols>, _16>{}, make_coord(0, 0));
  const uint64_t high = uint64_t(fx::kDescriptorHigh) << 32;
  compare.expect(high | fx::k_major_descriptor(0), cute_descriptor<GMMA::Major::K>(k_slice), kRows, kCols);
  // The leading offset leads from slab to slab: where there is one slab, CuTe leaves it out.
  const uint64_t leading = kCols > fx::kSlabColumns ? 0 : uint64_t(0x3fff) << 16;
  compare.expect((high | fx::mn_major_descriptor(0, kRows)) | leading,
                 cute_descriptor<GMMA::Major::MN>(mn_slice) | leading, kRows, kCols);
}

// Staging of the output: stmatrix by CuTe's layout of matrix rows and registers, then 16-byte reads.
void compare_staging() {
  Comparison compare("output staging: stmatrix and 16-byte reads");
  using StoreTraits = Copy_Traits<SM90_U32x4_STSM_N>;
  const StoreTraits::SrcLayout registers{};  // (thread, bit) -> bit of the 32 matrix rows of 128 bits
  using Atom = SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<GMMA::Major::K, GMMA::Major::K>;
  const MMA_Traits<Atom>::CLayout accumulator{};
  int staged[fx::kStagingBytesPerWarp / 2];  // what lies at each 16-bit place: row + 64 * column
  for (int& place : staged) place = -1;
  for (int pair = 0; pair < 4; ++pair) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int r = 0; r < 4; ++r) {
        for (int x = 0; x < 2; ++x) {
          const int bit = registers(lane, 32 * r + 16 * x);
          const int place = fx::staging_write_offset(bit / 128, pair) / 2 + bit % 128 / 16;
          staged[place] = accumulator(lane, fx::staging_source(pair, r) + x);
        }
      }
    }
  }
  for (int pass = 0; pass < 4; ++pass) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int x = 0; x < 8; ++x) {
        const int expected = fx::staging_read_row(lane, pass) + 64 * (lane % 8 * 8 + x);
        compare.expect(expected, staged[fx::staging_read_offset(lane, pass) / 2 + x], pass, lane);
      }
    }
  }
}

}  // namespace

int main() {
  compare_accumulator<64>("accumulator 64x64");
  compare_accumulator<128>("accumulator 64x128");
  compare_accumulator<176>("accumulator 64x176");
  compare_a_operand();
  compare_weights();
  compare_k_major<192, 64>("K-major tile 192x64");
  compare_k_major<128, 128>("K-major tile 128x128");
  compare_k_major<176, 128>("K-major tile 176x128");
  compare_mn_major<128, 64>("MN-major tile 128x64");
  compare_mn_major<128, 128>("MN-major tile 128x128");
  compare_mn_major<176, 128>("MN-major tile 176x128");
  compare_descriptors<128, 64>("descriptors 128x64");
  compare_descriptors<128, 128>("descriptors 128x128");
  compare_descriptors<176, 128>("descriptors 176x128");
  compare_staging();
  std::printf("%d maps differ\n", failures);
  return failures;
}
