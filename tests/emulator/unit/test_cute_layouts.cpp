// Descriptors, swizzles and fragments against CuTe's own layouts, on the host.
#include "../src/tensor_core.h"

#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm89.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include <fcntl.h>
#include <unistd.h>

#include "unit.h"

namespace {

namespace fx = flash_ext::emulator;
using namespace cute;

constexpr size_t kBufferBytes = 256 * 1024;
alignas(4096) uint8_t buffer[kBufferBytes];

// make_gmma_desc has no shared-memory address on the host, prints so and takes 0.
template <GMMA::Major kMajor, class Tile>
uint64_t quiet_descriptor(const Tile& tile) {
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

// Every K block of a (rows, 4 blocks) tile: each element's address by the descriptor that
// make_gmma_desc builds, and by the layout. The buffer stands for shared memory.
template <GMMA::Major kMajor, class Element, class Atom, int kRows>
void check_descriptor(Atom atom, const char* what) {
  constexpr int kBlockK = 32 / sizeof(Element);
  auto layout = tile_to_shape(atom, Shape<Int<kRows>, Int<4 * kBlockK>>{});
  constexpr uint32_t kBase = 8192;
  auto tile = make_tensor(make_smem_ptr(reinterpret_cast<Element*>(buffer + kBase)), layout);
  for (int block = 0; block < 4; ++block) {
    auto part = local_tile(tile, Shape<Int<kRows>, Int<kBlockK>>{}, make_coord(0, block));
    const uint64_t bits = quiet_descriptor<kMajor>(part);
    fx::MatrixDescriptor desc = fx::decode_descriptor(bits);
    const auto* start = reinterpret_cast<const uint8_t*>(raw_pointer_cast(part.data()));
    desc.start = static_cast<uint32_t>(start - buffer);
    EXPECT(fx::decode_descriptor(fx::encode_descriptor(desc)).start == desc.start, "start");
    EXPECT((fx::encode_descriptor(desc) ^ bits) >> 14 == 0, "%s: descriptor 0x%llx", what,
           static_cast<unsigned long long>(bits));
    for (int row = 0; row < kRows; ++row) {
      for (int k = 0; k < kBlockK; ++k) {
        const auto* element = reinterpret_cast<const uint8_t*>(&part(row, k));
        const bool mn_major = kMajor == GMMA::Major::MN;
        const uint32_t offset = static_cast<uint32_t>((mn_major ? row : k) * sizeof(Element));
        const uint32_t got =
            fx::chunk_address(desc, mn_major, static_cast<uint32_t>(mn_major ? k : row), offset / 16) + offset % 16;
        EXPECT(got == static_cast<uint32_t>(element - buffer), "%s, block %d: (%d, %d) at 0x%x, not 0x%x", what, block,
               row, k, got, static_cast<uint32_t>(element - buffer));
      }
    }
  }
}

template <class Element, int kRows>
void check_k_major(const char* what) {
  constexpr auto kMajor = GMMA::Major::K;
  check_descriptor<kMajor, Element, GMMA::Layout_K_INTER_Atom<Element>, kRows>({}, what);
  check_descriptor<kMajor, Element, GMMA::Layout_K_SW32_Atom<Element>, kRows>({}, what);
  check_descriptor<kMajor, Element, GMMA::Layout_K_SW64_Atom<Element>, kRows>({}, what);
  check_descriptor<kMajor, Element, GMMA::Layout_K_SW128_Atom<Element>, kRows>({}, what);
}

template <class Element, int kRows>
void check_mn_major(const char* what) {
  constexpr auto kMajor = GMMA::Major::MN;
  check_descriptor<kMajor, Element, GMMA::Layout_MN_INTER_Atom<Element>, kRows>({}, what);
  check_descriptor<kMajor, Element, GMMA::Layout_MN_SW32_Atom<Element>, kRows>({}, what);
  check_descriptor<kMajor, Element, GMMA::Layout_MN_SW64_Atom<Element>, kRows>({}, what);
  check_descriptor<kMajor, Element, GMMA::Layout_MN_SW128_Atom<Element>, kRows>({}, what);
}

// CuTe's fragments map (thread, value) to row + rows * col; values count registers, then elements.
template <class Layout, class Coordinate>
void check_fragment(Layout layout, int threads, int rows, const char* what, Coordinate&& coordinate) {
  const int values = static_cast<int>(size<1>(layout));
  EXPECT(static_cast<int>(size<0>(layout)) == threads, "%s: threads", what);
  for (int thread = 0; thread < threads; ++thread) {
    for (int value = 0; value < values; ++value) {
      const int index = static_cast<int>(layout(thread, value));
      const fx::Coord got = coordinate(thread, value);
      EXPECT((got == fx::Coord{index % rows, index / rows}), "%s: thread %d value %d is (%d, %d)", what, thread, value,
             got.row, got.col);
    }
  }
}

template <int kN>
void check_wgmma_accumulator() {
  check_fragment(GMMA::CLayout_64xN<kN>{}, 128, 64, "accumulator",
                 [](int thread, int value) { return fx::accumulator_coord(thread / 32, thread % 32, value); });
  check_fragment(GMMA::CLayout_64xN<kN>{}, 128, 64, "f16 accumulator", [](int thread, int value) {
    return fx::accumulator_coord_f16(thread / 32, thread % 32, value / 2, value % 2);
  });
}

// A (and C) of both instruction families; B as (n, k).
template <class Layout>
void check_a(Layout layout, int threads, int bytes, const char* what) {
  check_fragment(layout, threads, threads / 2, what, [&](int thread, int value) {
    const int packed = 4 / bytes;
    return fx::fragment_a_coord(thread / 32, thread % 32, value / packed, value % packed, bytes);
  });
}

template <class Op>
void check_mma(int bytes, const char* what) {
  using Traits = MMA_Traits<Op>;
  check_a(typename Traits::ALayout{}, 32, bytes, what);
  check_fragment(typename Traits::BLayout{}, 32, 8, what, [&](int thread, int value) {
    const int packed = 4 / bytes;
    const fx::Coord at = fx::fragment_b_coord(thread, value / packed, value % packed, bytes);
    return fx::Coord{at.col, at.row};
  });
  check_fragment(typename Traits::CLayout{}, 32, 16, what,
                 [](int thread, int value) { return fx::accumulator_coord(0, thread, value); });
}

// Copy traits map (thread, bit) to a bit of the 8x8 matrices stored one after the other. ldmatrix
// reads rows (SrcLayout) into registers (DstLayout).
template <class Op>
void check_ldmatrix(int count, bool transposed, const char* what) {
  using Traits = Copy_Traits<Op>;
  uint16_t rows[4][8][8];
  for (int i = 0; i < 256; ++i) (&rows[0][0][0])[i] = static_cast<uint16_t>(i);
  const uint8_t* pointers[32];
  for (int lane = 0; lane < 32; ++lane) {
    pointers[lane] = reinterpret_cast<const uint8_t*>(rows[lane / 8][lane % 8]);
  }
  uint32_t registers[4][32];
  uint32_t* d[4] = {registers[0], registers[1], registers[2], registers[3]};
  fx::ldmatrix(pointers, count, transposed, d);
  typename Traits::DstLayout layout;
  for (int lane = 0; lane < 32; ++lane) {
    for (int element = 0; element < 2 * count; ++element) {
      const int want = static_cast<int>(layout(lane, 16 * element)) / 16;
      const uint32_t got = registers[element / 2][lane] >> 16 * (element % 2) & 0xffff;
      EXPECT(static_cast<int>(got) == want, "%s: lane %d element %d is %u, not %d", what, lane, element, got, want);
    }
  }
}

}  // namespace

int main() {
  check_k_major<half_t, 64>("K-major f16, 64 rows");
  check_k_major<bfloat16_t, 128>("K-major bf16, 128 rows");
  check_k_major<bfloat16_t, 256>("K-major bf16, 256 rows");
  check_k_major<bfloat16_t, 8>("K-major bf16, 8 rows");
  check_k_major<float_e4m3_t, 64>("K-major e4m3, 64 rows");
  check_k_major<float_e5m2_t, 192>("K-major e5m2, 192 rows");
  check_k_major<tfloat32_t, 64>("K-major tf32, 64 rows");
  check_k_major<int8_t, 96>("K-major s8, 96 rows");
  check_mn_major<half_t, 64>("MN-major f16, 64 rows");
  check_mn_major<bfloat16_t, 128>("MN-major bf16, 128 rows");
  check_mn_major<bfloat16_t, 256>("MN-major bf16, 256 rows");

  check_wgmma_accumulator<8>();
  check_wgmma_accumulator<64>();
  check_wgmma_accumulator<176>();
  check_wgmma_accumulator<256>();
  check_a(GMMA::ALayout_64x8{}, 128, 4, "wgmma A, tf32");
  check_a(GMMA::ALayout_64x16{}, 128, 2, "wgmma A, 16-bit");
  check_a(GMMA::ALayout_64x32{}, 128, 1, "wgmma A, 8-bit");

  check_mma<SM80_16x8x8_F16F16F16F16_TN>(2, "mma m16n8k8 f16");
  check_mma<SM80_16x8x16_F16F16F16F16_TN>(2, "mma m16n8k16 f16");
  check_mma<SM80_16x8x16_F32BF16BF16F32_TN>(2, "mma m16n8k16 bf16");
  check_mma<SM80_16x8x4_F32TF32TF32F32_TN>(4, "mma m16n8k4 tf32");
  check_mma<SM80_16x8x8_F32TF32TF32F32_TN>(4, "mma m16n8k8 tf32");
  check_mma<SM80_16x8x16_S32S8S8S32_TN>(1, "mma m16n8k16 s8");
  check_mma<SM80_16x8x32_S32S8S8S32_TN>(1, "mma m16n8k32 s8");
  check_mma<SM89_16x8x32_F32E4M3E5M2F32_TN>(1, "mma m16n8k32 fp8");

  check_ldmatrix<SM75_U32x1_LDSM_N>(1, false, "ldmatrix x1");
  check_ldmatrix<SM75_U32x2_LDSM_N>(2, false, "ldmatrix x2");
  check_ldmatrix<SM75_U32x4_LDSM_N>(4, false, "ldmatrix x4");
  check_ldmatrix<SM75_U16x2_LDSM_T>(1, true, "ldmatrix x1 trans");
  check_ldmatrix<SM75_U16x4_LDSM_T>(2, true, "ldmatrix x2 trans");
  check_ldmatrix<SM75_U16x8_LDSM_T>(4, true, "ldmatrix x4 trans");
  return unit::finish("cute_layouts");
}
