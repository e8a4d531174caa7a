// Exchange among the lanes of a warp: shfl, vote, match, redux, elect, activemask.
#include <algorithm>

#include "formats.h"
#include "lanes.h"

namespace flash_ext::emulator {

namespace {

enum class Shuffle : uint32_t { kUp, kDown, kButterfly, kIndex };

// extra[0], if any, is the predicate that tells whether the source lane was in range.
Status shfl(Warp& w, const Inst& i, Mask mask) {
  const uint32_t* value = in<uint32_t>(w, i.a);
  const uint32_t* b = in<uint32_t>(w, i.b);
  const uint32_t* c = in<uint32_t>(w, i.c);
  alignas(64) uint32_t result[kLanes];
  Mask valid = 0;
  for (uint32_t l = 0; l < kLanes; ++l) {
    const uint32_t clamp = c[l] & 0x1f, segment = c[l] >> 8 & 0x1f, amount = b[l] & 0x1f;
    const uint32_t highest = (l & segment) | (clamp & ~segment), lowest = l & segment;
    uint32_t from = l;
    bool inside = false;
    switch (static_cast<Shuffle>(i.aux)) {
      case Shuffle::kUp:
        from = l - amount;
        inside = static_cast<int32_t>(from) >= static_cast<int32_t>(highest);
        break;
      case Shuffle::kDown:
        from = l + amount;
        inside = from <= highest;
        break;
      case Shuffle::kButterfly:
        from = l ^ amount;
        inside = from <= highest;
        break;
      case Shuffle::kIndex:
        from = lowest | (amount & ~segment);
        inside = from <= highest;
        break;
    }
    if (!inside) from = l;
    valid |= Mask(inside) << l;
    result[l] = value[from & 31];
    if ((mask >> l & 1) && !(mask >> (from & 31) & 1)) {
      fault(w, 1u << l, "shuffle",
            "lane " + std::to_string(l) + " reads lane " + std::to_string(from & 31) + ", which does not take part");
    }
  }
  store_lanes(at<uint32_t>(w, i.d), result, mask);
  if (i.num_extra) write_predicate(w, w.launch->program->refs[i.extra], mask, valid);
  return Status::kNext;
}

enum class Vote : uint32_t { kAll, kAny, kUni, kBallot };
Status vote(Warp& w, const Inst& i, Mask mask) {
  const Mask yes = read_predicate(w, i.a) & mask;
  switch (static_cast<Vote>(i.aux)) {
    case Vote::kAll:
      write_predicate(w, i.d, mask, yes == mask ? kFullMask : 0);
      break;
    case Vote::kAny:
      write_predicate(w, i.d, mask, yes ? kFullMask : 0);
      break;
    case Vote::kUni:
      write_predicate(w, i.d, mask, yes == mask || !yes ? kFullMask : 0);
      break;
    case Vote::kBallot: {
      alignas(64) uint32_t result[kLanes];
      for (uint32_t& r : result) r = yes;
      store_lanes(at<uint32_t>(w, i.d), result, mask);
      break;
    }
  }
  return Status::kNext;
}

template <class S, bool kAll>
Status match(Warp& w, const Inst& i, Mask mask) {
  const S* a = in<S>(w, i.a);
  alignas(64) uint32_t result[kLanes] = {};
  bool all = true;
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    for (int m = 0; m < kLanes; ++m) result[l] |= Mask((mask >> m & 1) && a[m] == a[l]) << m;
    all &= result[l] == mask;
  }
  if (kAll) {
    for (uint32_t& r : result) r = all ? mask : 0;
    if (i.num_extra) write_predicate(w, w.launch->program->refs[i.extra], mask, all ? kFullMask : 0);
  }
  store_lanes(at<uint32_t>(w, i.d), result, mask);
  return Status::kNext;
}

enum class Reduce : uint32_t { kAdd, kMinU, kMaxU, kMinS, kMaxS, kAnd, kOr, kXor };
Status redux(Warp& w, const Inst& i, Mask mask) {
  const uint32_t* a = in<uint32_t>(w, i.a);
  uint32_t total = a[first_lane(mask)];
  for (int l = first_lane(mask) + 1; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    const uint32_t x = a[l];
    switch (static_cast<Reduce>(i.aux)) {
      case Reduce::kAdd:
        total += x;
        break;
      case Reduce::kMinU:
        total = std::min(total, x);
        break;
      case Reduce::kMaxU:
        total = std::max(total, x);
        break;
      case Reduce::kMinS:
        total = std::min<int32_t>(total, x);
        break;
      case Reduce::kMaxS:
        total = std::max<int32_t>(total, x);
        break;
      case Reduce::kAnd:
        total &= x;
        break;
      case Reduce::kOr:
        total |= x;
        break;
      case Reduce::kXor:
        total ^= x;
        break;
    }
  }
  alignas(64) uint32_t result[kLanes];
  for (uint32_t& r : result) r = total;
  store_lanes(at<uint32_t>(w, i.d), result, mask);
  return Status::kNext;
}

// The lowest lane is elected. The destinations: the lane's number and a predicate.
Status elect(Warp& w, const Inst& i, Mask mask) {
  const uint32_t lane = static_cast<uint32_t>(first_lane(mask));
  if (i.d != kNoRef) {
    alignas(64) uint32_t result[kLanes];
    for (uint32_t& r : result) r = lane;
    store_lanes(at<uint32_t>(w, i.d), result, mask);
  }
  write_predicate(w, w.launch->program->refs[i.extra], mask, 1u << lane);
  return Status::kNext;
}

Status activemask(Warp& w, const Inst& i, Mask mask) {
  alignas(64) uint32_t result[kLanes];
  for (uint32_t& r : result) r = mask;
  store_lanes(at<uint32_t>(w, i.d), result, mask);
  return Status::kNext;
}

Status warp_sync(Warp& w, const Inst&, Mask mask) {
  if (w.checks) w.checks->warp_sync(w.where(mask));
  return Status::kNext;
}

void emit_gather(Decoder& d, Inst in, size_t member_operand) {
  in.member = d.source(member_operand, PtxType::kU32);
  in.flags |= kFlagGather;
  d.sink();
  d.emit(in);
}

}  // namespace

bool decode_warp(Decoder& d) {
  const PtxInstruction& p = d.ptx();
  const std::string_view op = p.parts[0];
  const PtxType u32 = PtxType::kU32;
  Inst in;
  if (op == "activemask") {
    in.run = activemask;
    in.d = d.destination(0, u32);
    d.emit(in);
    return true;
  }
  if (op == "bar" && p.parts.size() > 1 && p.parts[1] == "warp") {
    in.run = warp_sync;
    in.flags = kFlagAnyPlace;
    emit_gather(d, in, 0);
    return true;
  }
  if (op != "shfl" && op != "vote" && op != "match" && op != "redux" && op != "elect") return false;
  if (!p.has("sync")) d.unsupported("form without .sync");
  if (op == "shfl") {
    const Shuffle kind = p.has("up")     ? Shuffle::kUp
                         : p.has("down") ? Shuffle::kDown
                         : p.has("bfly") ? Shuffle::kButterfly
                                         : Shuffle::kIndex;
    in.run = shfl;
    in.aux = static_cast<uint32_t>(kind);
    in.a = d.source(1, u32);
    in.b = d.source(2, u32);
    in.c = d.source(3, u32);
    const PtxOperand& to = d.operand(0);
    if (to.kind == PtxOperand::kPair) {
      in.d = d.destination(to.items[0], u32);
      d.add_extra(in, d.predicate_destination(to.items[1]));
    } else {
      in.d = d.destination(to, u32);
    }
    emit_gather(d, in, 4);
  } else if (op == "vote") {
    const Vote kind = p.has("all") ? Vote::kAll : p.has("any") ? Vote::kAny : p.has("uni") ? Vote::kUni : Vote::kBallot;
    in.run = vote;
    in.aux = static_cast<uint32_t>(kind);
    in.a = d.predicate(d.operand(1));
    in.d = kind == Vote::kBallot ? d.destination(0, u32) : d.predicate_destination(d.operand(0));
    emit_gather(d, in, 2);
  } else if (op == "match") {
    const PtxType type = parse_type(p.parts.back());
    const bool all = p.has("all"), wide = type_bytes(type) == 8;
    in.run = all ? (wide ? match<uint64_t, true> : match<uint32_t, true>)
                 : (wide ? match<uint64_t, false> : match<uint32_t, false>);
    in.a = d.source(1, type);
    const PtxOperand& to = d.operand(0);
    if (to.kind == PtxOperand::kPair) {
      in.d = d.destination(to.items[0], u32);
      d.add_extra(in, d.predicate_destination(to.items[1]));
    } else {
      in.d = d.destination(to, u32);
    }
    emit_gather(d, in, 2);
  } else if (op == "redux") {
    const PtxType type = parse_type(p.parts.back());
    const bool is_signed_type = type == PtxType::kS32;
    if (type_bytes(type) != 4 || is_float(type)) d.unsupported("type");
    in.run = redux;
    in.aux = static_cast<uint32_t>(p.has("add")   ? Reduce::kAdd
                                   : p.has("min") ? (is_signed_type ? Reduce::kMinS : Reduce::kMinU)
                                   : p.has("max") ? (is_signed_type ? Reduce::kMaxS : Reduce::kMaxU)
                                   : p.has("and") ? Reduce::kAnd
                                   : p.has("or")  ? Reduce::kOr
                                                  : Reduce::kXor);
    in.a = d.source(1, u32);
    in.d = d.destination(0, u32);
    emit_gather(d, in, 2);
  } else {
    const PtxOperand& to = d.operand(0);
    if (to.kind != PtxOperand::kPair) d.unsupported("a pair of results is expected");
    in.run = elect;
    in.d = to.items[0].kind == PtxOperand::kSink ? kNoRef : d.destination(to.items[0], u32);
    d.add_extra(in, d.predicate_destination(to.items[1]));
    emit_gather(d, in, 1);
  }
  return true;
}

}  // namespace flash_ext::emulator
