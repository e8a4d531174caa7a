// mma.sync, ldmatrix and stmatrix: registers come from and go to memory as [register][lane].
#include "ptx.cuh"

template <int kCount>
__device__ void load_lanes(uint32_t (&registers)[kCount], const uint32_t* from) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) registers[i] = from[32 * i + threadIdx.x];
}

template <int kCount>
__device__ void store_lanes(uint32_t* to, const uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[32 * i + threadIdx.x] = registers[i];
}

// The name's digits: registers of D and C, A, B.
#define MMA_4_4_2(NAME, SHAPE)                                                                                        \
  extern "C" __global__ void NAME(uint32_t* out, const uint32_t* a_in, const uint32_t* b_in, const uint32_t* c_in) {  \
    uint32_t d[4], a[4], b[2], c[4];                                                                                  \
    load_lanes(a, a_in), load_lanes(b, b_in), load_lanes(c, c_in);                                                    \
    asm volatile("mma.sync.aligned." SHAPE " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"               \
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]), \
                   "r"(c[3]));                                                                                        \
    store_lanes(out, d);                                                                                              \
  }

#define MMA_4_2_1(NAME, SHAPE)                                                                                       \
  extern "C" __global__ void NAME(uint32_t* out, const uint32_t* a_in, const uint32_t* b_in, const uint32_t* c_in) { \
    uint32_t d[4], a[2], b[1], c[4];                                                                                 \
    load_lanes(a, a_in), load_lanes(b, b_in), load_lanes(c, c_in);                                                   \
    asm volatile("mma.sync.aligned." SHAPE " {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"                          \
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));                     \
    store_lanes(out, d);                                                                                             \
  }

#define MMA_2_4_2(NAME, SHAPE)                                                                                       \
  extern "C" __global__ void NAME(uint32_t* out, const uint32_t* a_in, const uint32_t* b_in, const uint32_t* c_in) { \
    uint32_t d[2], a[4], b[2], c[2];                                                                                 \
    load_lanes(a, a_in), load_lanes(b, b_in), load_lanes(c, c_in);                                                   \
    asm volatile("mma.sync.aligned." SHAPE " {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%8,%9};"                              \
                 : "=r"(d[0]), "=r"(d[1])                                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]));          \
    store_lanes(out, d);                                                                                             \
  }

#define MMA_2_2_1(NAME, SHAPE)                                                                                       \
  extern "C" __global__ void NAME(uint32_t* out, const uint32_t* a_in, const uint32_t* b_in, const uint32_t* c_in) { \
    uint32_t d[2], a[2], b[1], c[2];                                                                                 \
    load_lanes(a, a_in), load_lanes(b, b_in), load_lanes(c, c_in);                                                   \
    asm volatile("mma.sync.aligned." SHAPE " {%0,%1}, {%2,%3}, {%4}, {%5,%6};"                                       \
                 : "=r"(d[0]), "=r"(d[1])                                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]), "r"(c[0]), "r"(c[1]));                                           \
    store_lanes(out, d);                                                                                             \
  }

MMA_4_4_2(k16_f32_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
MMA_4_4_2(k16_f32_f16, "m16n8k16.row.col.f32.f16.f16.f32")
MMA_2_4_2(k16_f16_f16, "m16n8k16.row.col.f16.f16.f16.f16")
MMA_4_2_1(k8_f32_bf16, "m16n8k8.row.col.f32.bf16.bf16.f32")
MMA_4_2_1(k8_f32_f16, "m16n8k8.row.col.f32.f16.f16.f32")
MMA_2_2_1(k8_f16_f16, "m16n8k8.row.col.f16.f16.f16.f16")
MMA_4_4_2(k8_f32_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
MMA_4_2_1(k4_f32_tf32, "m16n8k4.row.col.f32.tf32.tf32.f32")
MMA_4_4_2(k32_s32_s8, "m16n8k32.row.col.s32.s8.s8.s32")
MMA_4_4_2(k32_s32_u8_s8, "m16n8k32.row.col.s32.u8.s8.s32")
MMA_4_4_2(k32_s32_s8_satfinite, "m16n8k32.row.col.satfinite.s32.s8.s8.s32")
MMA_4_2_1(k16_s32_s8, "m16n8k16.row.col.s32.s8.s8.s32")
#ifndef SM80_ONLY
MMA_4_4_2(k32_f32_e4m3, "m16n8k32.row.col.f32.e4m3.e4m3.f32")
MMA_4_4_2(k32_f32_e4m3_e5m2, "m16n8k32.row.col.f32.e4m3.e5m2.f32")
MMA_4_4_2(k32_f32_e5m2, "m16n8k32.row.col.f32.e5m2.e5m2.f32")
#endif

// Lane l gives the row at byte offsets[l] of the image; registers and image go out.
__device__ inline uint32_t stage(const uint8_t* image, int bytes, const uint32_t* offsets) {
  copy16(dynamic_shared, image, bytes);
  __syncthreads();
  return shared_address(dynamic_shared) + offsets[threadIdx.x];
}

#define LDMATRIX(NAME, SUFFIX, COUNT, LIST, OUTPUTS)                                                         \
  extern "C" __global__ void NAME(uint32_t* out, const uint8_t* image, int bytes, const uint32_t* offsets) { \
    const uint32_t address = stage(image, bytes, offsets);                                                   \
    uint32_t d[COUNT];                                                                                       \
    asm volatile("ldmatrix.sync.aligned.m8n8." SUFFIX " " LIST ", [%" #COUNT "];"                            \
                 : OUTPUTS                                                                                   \
                 : "r"(address)                                                                              \
                 : "memory");                                                                                \
    store_lanes(out, d);                                                                                     \
  }

#define OUT1 "=r"(d[0])
#define OUT2 "=r"(d[0]), "=r"(d[1])
#define OUT4 "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
LDMATRIX(ldmatrix_x1, "x1.shared.b16", 1, "{%0}", OUT1)
LDMATRIX(ldmatrix_x2, "x2.shared.b16", 2, "{%0,%1}", OUT2)
LDMATRIX(ldmatrix_x4, "x4.shared.b16", 4, "{%0,%1,%2,%3}", OUT4)
LDMATRIX(ldmatrix_x1_trans, "x1.trans.shared.b16", 1, "{%0}", OUT1)
LDMATRIX(ldmatrix_x2_trans, "x2.trans.shared.b16", 2, "{%0,%1}", OUT2)
LDMATRIX(ldmatrix_x4_trans, "x4.trans.shared.b16", 4, "{%0,%1,%2,%3}", OUT4)

#if !defined(SM80_ONLY) && !defined(SM89_ONLY)
#define STMATRIX(NAME, SUFFIX, COUNT, LIST, INPUTS)                                                          \
  extern "C" __global__ void NAME(uint8_t* out, const uint8_t* image, int bytes, const uint32_t* offsets,    \
                                  const uint32_t* values) {                                                  \
    const uint32_t address = stage(image, bytes, offsets);                                                   \
    uint32_t d[COUNT];                                                                                       \
    load_lanes(d, values);                                                                                   \
    __syncthreads();                                                                                         \
    asm volatile("stmatrix.sync.aligned.m8n8." SUFFIX " [%0], " LIST ";" ::"r"(address), INPUTS : "memory"); \
    __syncthreads();                                                                                         \
    copy16(out, dynamic_shared, bytes);                                                                      \
  }

#define IN1 "r"(d[0])
#define IN2 "r"(d[0]), "r"(d[1])
#define IN4 "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3])
STMATRIX(stmatrix_x1, "x1.shared.b16", 1, "{%1}", IN1)
STMATRIX(stmatrix_x2, "x2.shared.b16", 2, "{%1,%2}", IN2)
STMATRIX(stmatrix_x4, "x4.shared.b16", 4, "{%1,%2,%3,%4}", IN4)
STMATRIX(stmatrix_x1_trans, "x1.trans.shared.b16", 1, "{%1}", IN1)
STMATRIX(stmatrix_x2_trans, "x2.trans.shared.b16", 2, "{%1,%2}", IN2)
STMATRIX(stmatrix_x4_trans, "x4.trans.shared.b16", 4, "{%1,%2,%3,%4}", IN4)
#endif
