// wgmma on operands given as images of shared memory: the test knows the layouts, not the kernel.
// One warpgroup; d[reg][thread] and a[reg][thread] are registers, descriptors come without start.
#include "ptx.cuh"

struct Operands {
  uint64_t a_desc, b_desc;      // the start address is added here
  uint32_t a_offset, b_offset;  // of the operands in the image
  uint32_t image_bytes;
  uint32_t skew;  // bytes of shared memory before the image
  uint32_t scale_d;
  uint32_t repeat;  // chained wgmmas on the same operands
};

template <int kRegisters>
__device__ void load_registers(uint32_t (&registers)[kRegisters], const uint32_t* from) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) registers[i] = from[128 * i + threadIdx.x];
}

template <int kRegisters>
__device__ void store_registers(uint32_t* to, const uint32_t (&registers)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) to[128 * i + threadIdx.x] = registers[i];
}

__device__ inline uint64_t descriptor(uint64_t bits, uint32_t image, uint32_t offset) {
  return bits | static_cast<uint64_t>((image + offset & 0x3ffff) >> 4);
}

__device__ inline uint32_t prepare(const Operands& p, const uint8_t* image) {
  copy16(dynamic_shared + p.skew, image, p.image_bytes);
  fence_proxy_async();
  __syncthreads();
  return shared_address(dynamic_shared) + p.skew;
}

#define FENCE "wgmma.fence.sync.aligned;\n\t"
#define FINISH "wgmma.commit_group.sync.aligned;\n\twgmma.wait_group.sync.aligned 0;\n\t"

#define D4 "{%0,%1,%2,%3}"
#define D8 "{%0,%1,%2,%3,%4,%5,%6,%7}"
#define D16 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}"
#define D32                                                                                     \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24," \
  "%25,%26,%27,%28,%29,%30,%31}"
#define R4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define R8(i) R4(i), R4(i + 4)
#define R16(i) R8(i), R8(i + 8)
#define R32(i) R16(i), R16(i + 16)

// SHAPE: "m64n64k16.f32.bf16.bf16"; COUNT registers of D; AD, BD, SD: operand numbers after D;
// FLAGS: the immediates after scale-d.
#define SS_KERNEL(NAME, SHAPE, COUNT, AD, BD, SD, FLAGS)                                                               \
  extern "C" __global__ void __launch_bounds__(128) NAME(uint32_t* out, const uint32_t* d_in, const uint8_t* image,    \
                                                         Operands p) {                                                 \
    const uint32_t base = prepare(p, image);                                                                           \
    const uint64_t a = descriptor(p.a_desc, base, p.a_offset);                                                         \
    const uint64_t b = descriptor(p.b_desc, base, p.b_offset);                                                         \
    uint32_t d[COUNT];                                                                                                 \
    load_registers(d, d_in);                                                                                           \
    for (uint32_t i = 0; i < p.repeat; ++i) {                                                                          \
      const uint32_t scale_d = p.scale_d | i;                                                                          \
      asm volatile("{\n\t.reg .pred scale;\n\tsetp.ne.b32 scale, %" SD ", 0;\n\t" FENCE                                \
                   "wgmma.mma_async.sync.aligned." SHAPE " " D##COUNT ", %" AD ", %" BD ", scale" FLAGS ";\n\t" FINISH \
                                                                      "}"                                              \
                   : R##COUNT(0)                                                                                       \
                   : "l"(a), "l"(b), "r"(scale_d)                                                                      \
                   : "memory");                                                                                        \
    }                                                                                                                  \
    store_registers(out, d);                                                                                           \
  }

#define RS_KERNEL(NAME, SHAPE, COUNT, A0, A1, A2, A3, BD, SD, FLAGS)                                                \
  extern "C" __global__ void __launch_bounds__(128) NAME(uint32_t* out, const uint32_t* d_in, const uint8_t* image, \
                                                         const uint32_t* a_in, Operands p) {                        \
    const uint32_t base = prepare(p, image);                                                                        \
    const uint64_t b = descriptor(p.b_desc, base, p.b_offset);                                                      \
    uint32_t d[COUNT], a[4];                                                                                        \
    load_registers(d, d_in);                                                                                        \
    load_registers(a, a_in);                                                                                        \
    for (uint32_t i = 0; i < p.repeat; ++i) {                                                                       \
      const uint32_t scale_d = p.scale_d | i;                                                                       \
      asm volatile("{\n\t.reg .pred scale;\n\tsetp.ne.b32 scale, %" SD ", 0;\n\t" FENCE                             \
                   "wgmma.mma_async.sync.aligned." SHAPE " " D##COUNT ", {%" A0 ",%" A1 ",%" A2 ",%" A3 "}, %" BD   \
                                                                      ", scale" FLAGS ";\n\t" FINISH "}"            \
                   : R##COUNT(0)                                                                                    \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d)                               \
                   : "memory");                                                                                     \
    }                                                                                                               \
    store_registers(out, d);                                                                                        \
  }

#define SS32(NAME, SHAPE, FLAGS) SS_KERNEL(NAME, SHAPE, 32, "32", "33", "34", FLAGS)
#define SS16(NAME, SHAPE, FLAGS) SS_KERNEL(NAME, SHAPE, 16, "16", "17", "18", FLAGS)
#define SS4(NAME, SHAPE, FLAGS) SS_KERNEL(NAME, SHAPE, 4, "4", "5", "6", FLAGS)
#define RS32(NAME, SHAPE, FLAGS) RS_KERNEL(NAME, SHAPE, 32, "32", "33", "34", "35", "36", "37", FLAGS)
#define RS16(NAME, SHAPE, FLAGS) RS_KERNEL(NAME, SHAPE, 16, "16", "17", "18", "19", "20", "21", FLAGS)

// 16-bit types: negation of A and B, then transposition of A (SS only) and B.
SS32(bf16_ss, "m64n64k16.f32.bf16.bf16", ", 1, 1, 0, 0")
SS32(bf16_ss_tb, "m64n64k16.f32.bf16.bf16", ", 1, 1, 0, 1")
SS32(bf16_ss_ta, "m64n64k16.f32.bf16.bf16", ", 1, 1, 1, 0")
SS32(bf16_ss_ta_tb, "m64n64k16.f32.bf16.bf16", ", 1, 1, 1, 1")
SS32(bf16_ss_na, "m64n64k16.f32.bf16.bf16", ", -1, 1, 0, 0")
SS32(bf16_ss_na_nb, "m64n64k16.f32.bf16.bf16", ", -1, -1, 0, 0")
RS32(bf16_rs, "m64n64k16.f32.bf16.bf16", ", 1, 1, 0")
RS32(bf16_rs_tb, "m64n64k16.f32.bf16.bf16", ", 1, 1, 1")
RS32(bf16_rs_nb, "m64n64k16.f32.bf16.bf16", ", 1, -1, 0")
SS4(bf16_ss_n8, "m64n8k16.f32.bf16.bf16", ", 1, 1, 0, 0")
SS32(f16_ss, "m64n64k16.f32.f16.f16", ", 1, 1, 0, 0")
SS32(f16_ss_ta_tb, "m64n64k16.f32.f16.f16", ", 1, 1, 1, 1")
RS32(f16_rs_tb, "m64n64k16.f32.f16.f16", ", 1, 1, 1")
SS16(f16_f16_ss, "m64n64k16.f16.f16.f16", ", 1, 1, 0, 0")
RS16(f16_f16_rs, "m64n64k16.f16.f16.f16", ", 1, 1, 0")

// 8-bit floats and tf32: K-major only.
SS32(e4m3_ss, "m64n64k32.f32.e4m3.e4m3", ", 1, 1")
SS32(e4m3_e5m2_ss, "m64n64k32.f32.e4m3.e5m2", ", 1, 1")
SS32(e5m2_ss_na, "m64n64k32.f32.e5m2.e5m2", ", -1, 1")
RS32(e4m3_rs, "m64n64k32.f32.e4m3.e4m3", ", 1, 1")
RS32(e5m2_e4m3_rs, "m64n64k32.f32.e5m2.e4m3", ", 1, 1")
SS16(e4m3_f16_ss, "m64n64k32.f16.e4m3.e4m3", ", 1, 1")
SS32(tf32_ss, "m64n64k8.f32.tf32.tf32", ", 1, 1")
RS32(tf32_rs, "m64n64k8.f32.tf32.tf32", ", 1, 1")

// Integers have scale-d only.
SS32(s8_ss, "m64n64k32.s32.s8.s8", "")
SS32(u8_s8_ss, "m64n64k32.s32.u8.s8", "")
RS32(s8_rs, "m64n64k32.s32.s8.s8", "")
