// mov, packing and unpacking, predicate logic, address conversion, special registers.
#include <cstring>

#include "lanes.h"

namespace flash_ext::emulator {

namespace {

template <class S>
Status copy(Warp& w, const Inst& i, Mask mask) {
  store_lanes(at<S>(w, i.d), in<S>(w, i.a), mask);
  return Status::kNext;
}

// Pieces of `kFrom` bits into one register of type S.
template <class S, int kBits>
Status pack(Warp& w, const Inst& i, Mask mask) {
  using P = std::conditional_t<kBits == 64, uint64_t, uint32_t>;
  alignas(64) S result[kLanes] = {};
  for (int k = 0; k < i.num_extra; ++k) {
    const P* piece = in<P>(w, w.launch->program->refs[i.extra + k]);
    const P low = kBits < 32 ? P((1u << (kBits & 31)) - 1) : ~P(0);
    for (int l = 0; l < kLanes; ++l) result[l] |= static_cast<S>(piece[l] & low) << (kBits * k);
  }
  store_lanes(at<S>(w, i.d), result, mask);
  return Status::kNext;
}
template <class S, int kBits>
Status unpack(Warp& w, const Inst& i, Mask mask) {
  alignas(64) S value[kLanes];
  std::memcpy(value, in<S>(w, i.a), sizeof(value));
  for (int k = 0; k < i.num_extra; ++k) {
    alignas(64) uint32_t piece[kLanes];
    const uint32_t low = kBits < 32 ? (1u << (kBits & 31)) - 1 : kFullMask;
    for (int l = 0; l < kLanes; ++l) piece[l] = static_cast<uint32_t>(value[l] >> (kBits * k)) & low;
    store_lanes(at<uint32_t>(w, w.launch->program->refs[i.extra + k]), piece, mask);
  }
  return Status::kNext;
}

struct And {
  static Mask run(Mask a, Mask b) { return a & b; }
};
struct Or {
  static Mask run(Mask a, Mask b) { return a | b; }
};
struct Xor {
  static Mask run(Mask a, Mask b) { return a ^ b; }
};

template <class Op>
Status predicate_logic(Warp& w, const Inst& i, Mask mask) {
  write_predicate(w, i.d, mask, Op::run(read_predicate(w, i.a), read_predicate(w, i.b)));
  return Status::kNext;
}
Status predicate_copy(Warp& w, const Inst& i, Mask mask) {
  write_predicate(w, i.d, mask, read_predicate(w, i.a));
  return Status::kNext;
}

template <class S>
Status add_window(Warp& w, const Inst& i, Mask mask) {
  const S* a = in<S>(w, i.a);
  alignas(64) uint64_t result[kLanes];
  for (int l = 0; l < kLanes; ++l) result[l] = a[l] | static_cast<uint64_t>(i.imm);
  store_lanes(at<uint64_t>(w, i.d), result, mask);
  return Status::kNext;
}
Status drop_window(Warp& w, const Inst& i, Mask mask) {
  const uint64_t* a = in<uint64_t>(w, i.a);
  alignas(64) uint64_t result[kLanes];
  for (int l = 0; l < kLanes; ++l) result[l] = a[l] & ~kWindowMask;
  store_lanes(at<uint64_t>(w, i.d), result, mask);
  return Status::kNext;
}
Status parameter_address(Warp& w, const Inst& i, Mask mask) {
  alignas(64) uint64_t result[kLanes];
  for (uint64_t& r : result) r = reinterpret_cast<uint64_t>(w.launch->params) + i.imm;
  store_lanes(at<uint64_t>(w, i.d), result, mask);
  return Status::kNext;
}

// isspacep: in.imm is the window, 0 for global.
Status is_space(Warp& w, const Inst& i, Mask mask) {
  const uint64_t* a = in<uint64_t>(w, i.a);
  Mask result = 0;
  for (int l = 0; l < kLanes; ++l) {
    bool yes = (a[l] & kWindowMask) == static_cast<uint64_t>(i.imm);
    if (i.aux) yes = yes && (a[l] >> kRankShift & 0xff) == 0;  // shared::cta: the own CTA
    result |= Mask(yes) << l;
  }
  write_predicate(w, i.d, mask, result);
  return Status::kNext;
}

enum Special : uint32_t {
  kTidX,
  kTidY,
  kTidZ,
  kNtidX,
  kNtidY,
  kNtidZ,
  kCtaidX,
  kCtaidY,
  kCtaidZ,
  kNctaidX,
  kNctaidY,
  kNctaidZ,
  kClusteridX,
  kClusteridY,
  kClusteridZ,
  kNclusteridX,
  kNclusteridY,
  kNclusteridZ,
  kClusterCtaidX,
  kClusterCtaidY,
  kClusterCtaidZ,
  kClusterNctaidX,
  kClusterNctaidY,
  kClusterNctaidZ,
  kClusterCtarank,
  kClusterNctarank,
  kIsExplicitCluster,
  kLaneid,
  kWarpid,
  kNwarpid,
  kSmid,
  kNsmid,
  kGridid,
  kLanemaskEq,
  kLanemaskLe,
  kLanemaskLt,
  kLanemaskGe,
  kLanemaskGt,
  kClock,
  kClockHi,
  kClock64,
  kGlobaltimer,
  kGlobaltimerLo,
  kGlobaltimerHi,
  kDynamicSmem,
  kTotalSmem,
  kReservedSmemBegin,
  kReservedSmemEnd,
  kReservedSmemCap,
};
constexpr std::pair<std::string_view, Special> kSpecials[] = {
    {"%tid.x", kTidX},
    {"%tid.y", kTidY},
    {"%tid.z", kTidZ},
    {"%ntid.x", kNtidX},
    {"%ntid.y", kNtidY},
    {"%ntid.z", kNtidZ},
    {"%ctaid.x", kCtaidX},
    {"%ctaid.y", kCtaidY},
    {"%ctaid.z", kCtaidZ},
    {"%nctaid.x", kNctaidX},
    {"%nctaid.y", kNctaidY},
    {"%nctaid.z", kNctaidZ},
    {"%clusterid.x", kClusteridX},
    {"%clusterid.y", kClusteridY},
    {"%clusterid.z", kClusteridZ},
    {"%nclusterid.x", kNclusteridX},
    {"%nclusterid.y", kNclusteridY},
    {"%nclusterid.z", kNclusteridZ},
    {"%cluster_ctaid.x", kClusterCtaidX},
    {"%cluster_ctaid.y", kClusterCtaidY},
    {"%cluster_ctaid.z", kClusterCtaidZ},
    {"%cluster_nctaid.x", kClusterNctaidX},
    {"%cluster_nctaid.y", kClusterNctaidY},
    {"%cluster_nctaid.z", kClusterNctaidZ},
    {"%cluster_ctarank", kClusterCtarank},
    {"%cluster_nctarank", kClusterNctarank},
    {"%is_explicit_cluster", kIsExplicitCluster},
    {"%laneid", kLaneid},
    {"%warpid", kWarpid},
    {"%nwarpid", kNwarpid},
    {"%smid", kSmid},
    {"%nsmid", kNsmid},
    {"%gridid", kGridid},
    {"%lanemask_eq", kLanemaskEq},
    {"%lanemask_le", kLanemaskLe},
    {"%lanemask_lt", kLanemaskLt},
    {"%lanemask_ge", kLanemaskGe},
    {"%lanemask_gt", kLanemaskGt},
    {"%clock", kClock},
    {"%clock_hi", kClockHi},
    {"%clock64", kClock64},
    {"%globaltimer", kGlobaltimer},
    {"%globaltimer_lo", kGlobaltimerLo},
    {"%globaltimer_hi", kGlobaltimerHi},
    {"%dynamic_smem_size", kDynamicSmem},
    {"%total_smem_size", kTotalSmem},
    {"%reserved_smem_offset_begin", kReservedSmemBegin},
    {"%reserved_smem_offset_end", kReservedSmemEnd},
    {"%reserved_smem_offset_cap", kReservedSmemCap},
};

// Time is counted in executed instructions and rounds, so that runs repeat.
uint64_t special_value(const Warp& w, uint32_t which, uint32_t lane) {
  const LaunchContext& launch = *w.launch;
  const Dim3 block = launch.launch.block, grid = launch.launch.grid, cluster = launch.launch.cluster;
  const Dim3 cta = w.cta->index;
  const uint32_t thread = w.index * kLanes + lane;
  const uint32_t bit = 1u << lane;
  switch (which) {
    case kTidX:
      return thread % block.x;
    case kTidY:
      return thread / block.x % block.y;
    case kTidZ:
      return thread / (block.x * block.y);
    case kNtidX:
      return block.x;
    case kNtidY:
      return block.y;
    case kNtidZ:
      return block.z;
    case kCtaidX:
      return cta.x;
    case kCtaidY:
      return cta.y;
    case kCtaidZ:
      return cta.z;
    case kNctaidX:
      return grid.x;
    case kNctaidY:
      return grid.y;
    case kNctaidZ:
      return grid.z;
    case kClusteridX:
      return cta.x / cluster.x;
    case kClusteridY:
      return cta.y / cluster.y;
    case kClusteridZ:
      return cta.z / cluster.z;
    case kNclusteridX:
      return launch.grid_in_clusters.x;
    case kNclusteridY:
      return launch.grid_in_clusters.y;
    case kNclusteridZ:
      return launch.grid_in_clusters.z;
    case kClusterCtaidX:
      return cta.x % cluster.x;
    case kClusterCtaidY:
      return cta.y % cluster.y;
    case kClusterCtaidZ:
      return cta.z % cluster.z;
    case kClusterNctaidX:
      return cluster.x;
    case kClusterNctaidY:
      return cluster.y;
    case kClusterNctaidZ:
      return cluster.z;
    case kClusterCtarank:
      return w.cta->rank;
    case kClusterNctarank:
      return launch.cluster_size;
    case kIsExplicitCluster:
      return launch.cluster_size > 1;
    case kLaneid:
      return lane;
    case kWarpid:
      return w.index;
    case kNwarpid:
      return launch.warps_per_cta;
    case kSmid:
      return (w.cluster->id * launch.cluster_size + w.cta->rank) % launch.options.num_sms;
    case kNsmid:
      return launch.options.num_sms;
    case kGridid:
      return 1;
    case kLanemaskEq:
      return bit;
    case kLanemaskLe:
      return bit | (bit - 1);
    case kLanemaskLt:
      return bit - 1;
    case kLanemaskGe:
      return ~(bit - 1);
    case kLanemaskGt:
      return ~(bit | (bit - 1));
    case kClock:
    case kClock64:
    case kGlobaltimer:
    case kGlobaltimerLo:
      return w.cluster->round * 32 + w.executed;
    case kClockHi:
    case kGlobaltimerHi:
      return (w.cluster->round * 32 + w.executed) >> 32;
    case kDynamicSmem:
      return launch.launch.dynamic_shared_bytes;
    case kTotalSmem:
      return launch.shared_bytes - launch.program->shared_base;
    case kReservedSmemBegin:
      return 0;
    default:
      return launch.program->shared_base;
  }
}
template <class S>
Status special(Warp& w, const Inst& i, Mask mask) {
  alignas(64) S result[kLanes];
  for (uint32_t l = 0; l < kLanes; ++l) result[l] = static_cast<S>(special_value(w, i.aux, l));
  store_lanes(at<S>(w, i.d), result, mask);
  return Status::kNext;
}

bool is_predicate(Decoder& d, const PtxOperand& operand) {
  return operand.kind == PtxOperand::kRegister && d.register_type(operand) == PtxType::kPred;
}

void decode_vector_move(Decoder& d, PtxType type) {
  const bool packing = d.operand(1).kind == PtxOperand::kVector;
  const PtxOperand& vector = d.operand(packing ? 1 : 0);
  const size_t n = vector.items.size();
  const uint32_t bytes = type_bytes(type), piece = n ? bytes / static_cast<uint32_t>(n) : 0;
  if (piece * n != bytes || (bytes != 4 && bytes != 8)) d.unsupported("vector form");
  const PtxType part = piece == 1 ? PtxType::kB8 : piece == 2 ? PtxType::kB16 : PtxType::kB32;
  Inst in;
  if (packing) {
    in.run = bytes == 8 ? (piece == 4   ? pack<uint64_t, 32>
                           : piece == 2 ? pack<uint64_t, 16>
                                        : pack<uint64_t, 8>)
                        : (piece == 2 ? pack<uint32_t, 16> : pack<uint32_t, 8>);
    std::vector<Ref> parts;
    for (const PtxOperand& item : vector.items) parts.push_back(d.source(item, part));
    for (const Ref ref : parts) d.add_extra(in, ref);
    in.d = d.destination(0, type);
  } else {
    in.run = bytes == 8 ? (piece == 4   ? unpack<uint64_t, 32>
                           : piece == 2 ? unpack<uint64_t, 16>
                                        : unpack<uint64_t, 8>)
                        : (piece == 2 ? unpack<uint32_t, 16> : unpack<uint32_t, 8>);
    in.a = d.source(1, type);
    for (const PtxOperand& item : vector.items) d.add_extra(in, d.destination(item, part));
  }
  d.emit(in);
}

void decode_mov(Decoder& d, PtxType type) {
  const PtxOperand& from = d.operand(1);
  Inst in;
  if (type == PtxType::kPred || is_predicate(d, d.operand(0))) {
    in.run = predicate_copy;
    in.a = d.predicate(from);
    in.d = d.predicate_destination(d.operand(0));
    d.emit(in);
    return;
  }
  if (d.operand(0).kind == PtxOperand::kVector || from.kind == PtxOperand::kVector) {
    return decode_vector_move(d, type);
  }
  const bool wide = type_bytes(type) == 8;
  if (type == PtxType::kNone || type_bytes(type) > 8) d.unsupported("type");
  if (from.kind == PtxOperand::kSpecial && decode_special(d, from.name, wide, in)) {
    in.d = d.destination(0, type);
    d.emit(in);
    return;
  }
  uint64_t offset = 0;
  if (from.kind == PtxOperand::kSymbol && d.find_parameter(from.name, &offset)) {
    in.run = parameter_address;
    in.imm = static_cast<int64_t>(offset) + from.value;
  } else {
    in.run = wide ? copy<uint64_t> : copy<uint32_t>;
    in.a = d.source(1, type);
  }
  in.d = d.destination(0, type);
  d.emit(in);
}

// Generic addresses of global, constant and parameter memory are plain host pointers.
void decode_cvta(Decoder& d) {
  const PtxInstruction& p = d.ptx();
  const bool to = p.has("to");
  const bool shared = p.has("shared") || p.has("shared::cta") || p.has("shared::cluster");
  const bool local = p.has("local");
  Inst in;
  if (parse_type(p.parts.back()) != PtxType::kU64) d.unsupported("32-bit addresses");
  uint64_t offset = 0;
  const PtxOperand& from = d.operand(1);
  if (from.kind == PtxOperand::kSymbol && d.find_parameter(from.name, &offset)) {
    in.run = parameter_address;
    in.imm = static_cast<int64_t>(offset) + from.value;
  } else {
    in.run = !shared && !local ? copy<uint64_t> : to ? drop_window : add_window<uint64_t>;
    in.imm = static_cast<int64_t>(shared ? kSharedWindow : kLocalWindow);
    in.a = d.source(1, PtxType::kU64);
  }
  in.d = d.destination(0, PtxType::kU64);
  d.emit(in);
}

}  // namespace

bool decode_special(Decoder&, std::string_view name, bool wide, Inst& in) {
  for (const auto& [text, which] : kSpecials) {
    if (text == name) {
      in.run = wide ? special<uint64_t> : special<uint32_t>;
      in.aux = which;
      return true;
    }
  }
  return false;
}

bool decode_move(Decoder& d) {
  const PtxInstruction& p = d.ptx();
  const std::string_view op = p.parts[0];
  const PtxType type = parse_type(p.parts.back());
  if (op == "mov") {
    decode_mov(d, type);
  } else if (op == "cvta") {
    decode_cvta(d);
  } else if (op == "isspacep") {
    Inst in;
    in.run = is_space;
    const std::string_view space = p.parts.back();
    in.imm = space == "local"                 ? static_cast<int64_t>(kLocalWindow)
             : space.substr(0, 6) == "shared" ? static_cast<int64_t>(kSharedWindow)
             : space == "global"              ? 0
                                              : -1;
    if (in.imm < 0) d.unsupported("space");
    in.aux = space == "shared" || space == "shared::cta";
    in.a = d.source(1, PtxType::kU64);
    in.d = d.predicate_destination(d.operand(0));
    d.emit(in);
  } else if (type == PtxType::kPred && (op == "and" || op == "or" || op == "xor" || op == "not")) {
    Inst in;
    in.a = d.predicate(d.operand(1));
    if (op == "not") {
      in.run = predicate_copy;
      in.a ^= kNegateBit;
    } else {
      in.run = op == "and" ? predicate_logic<And> : op == "or" ? predicate_logic<Or> : predicate_logic<Xor>;
      in.b = d.predicate(d.operand(2));
    }
    in.d = d.predicate_destination(d.operand(0));
    d.emit(in);
  } else {
    return false;
  }
  return true;
}

}  // namespace flash_ext::emulator
