// Handlers that apply one scalar function to 32 lanes. The loops are written to vectorise.
#pragma once

#include <bit>
#include <type_traits>

#include "decode.h"
#include "state.h"

namespace flash_ext::emulator {

template <class T>
using Slot = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <class T>
inline T from_slot(Slot<T> bits) {
  if constexpr (std::is_floating_point_v<T>) {
    return std::bit_cast<T>(bits);
  } else {
    return static_cast<T>(bits);
  }
}
template <class T>
inline Slot<T> to_slot(T value) {
  if constexpr (std::is_floating_point_v<T>) {
    return std::bit_cast<Slot<T>>(value);
  } else {
    return static_cast<Slot<T>>(static_cast<std::make_unsigned_t<T>>(value));
  }
}

// Op::run(A) -> R, Op::run(A, B) -> R, Op::run(A, B, C) -> R.
template <class Op, class R, class A>
Status unary(Warp& w, const Inst& i, Mask mask) {
  const Slot<A>* __restrict a = in<Slot<A>>(w, i.a);
  alignas(64) Slot<R> result[kLanes];
  for (int l = 0; l < kLanes; ++l) result[l] = to_slot<R>(Op::run(from_slot<A>(a[l])));
  store_lanes(at<Slot<R>>(w, i.d), result, mask);
  return Status::kNext;
}

template <class Op, class R, class A, class B>
Status binary(Warp& w, const Inst& i, Mask mask) {
  const Slot<A>* __restrict a = in<Slot<A>>(w, i.a);
  const Slot<B>* __restrict b = in<Slot<B>>(w, i.b);
  alignas(64) Slot<R> result[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    result[l] = to_slot<R>(Op::run(from_slot<A>(a[l]), from_slot<B>(b[l])));
  }
  store_lanes(at<Slot<R>>(w, i.d), result, mask);
  return Status::kNext;
}

template <class Op, class R, class A, class B, class C>
Status ternary(Warp& w, const Inst& i, Mask mask) {
  const Slot<A>* __restrict a = in<Slot<A>>(w, i.a);
  const Slot<B>* __restrict b = in<Slot<B>>(w, i.b);
  const Slot<C>* __restrict c = in<Slot<C>>(w, i.c);
  alignas(64) Slot<R> result[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    result[l] = to_slot<R>(Op::run(from_slot<A>(a[l]), from_slot<B>(b[l]), from_slot<C>(c[l])));
  }
  store_lanes(at<Slot<R>>(w, i.d), result, mask);
  return Status::kNext;
}

// A generic lambda or function object template per type: Make<T>::handler for the type's C++ type.
template <template <class> class Make>
Handler for_integer(PtxType type) {
  switch (type) {
    case PtxType::kU16:
    case PtxType::kB16:
      return Make<uint16_t>::handler;
    case PtxType::kS16:
      return Make<int16_t>::handler;
    case PtxType::kU32:
    case PtxType::kB32:
      return Make<uint32_t>::handler;
    case PtxType::kS32:
      return Make<int32_t>::handler;
    case PtxType::kU64:
    case PtxType::kB64:
      return Make<uint64_t>::handler;
    case PtxType::kS64:
      return Make<int64_t>::handler;
    default:
      return nullptr;
  }
}
// For operations in which the sign does not matter.
template <template <class> class Make>
Handler for_bits(PtxType type) {
  switch (type_bytes(type)) {
    case 2:
      return Make<uint16_t>::handler;
    case 4:
      return Make<uint32_t>::handler;
    case 8:
      return Make<uint64_t>::handler;
    default:
      return nullptr;
  }
}

template <class Op, class T>
struct Binary {
  static constexpr Handler handler = binary<Op, T, T, T>;
};

}  // namespace flash_ext::emulator
