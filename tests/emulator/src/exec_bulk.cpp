// cp.async.bulk, cp.reduce.async.bulk, their tensor forms, st.async, and bulk groups.
#include <algorithm>
#include <cstdio>

#include "memory_operand.h"

namespace flash_ext::emulator {

namespace {

// Operands of an Inst:
//   b, imm: destination (loads, copies) or source in shared memory (stores), as an address
//   a:      the global address, the tensor map, or the source of a copy within the cluster
//   c:      size in bytes (not tiled)
//   extra:  mbarrier address or kNoRef, mask of a multicast or kNoRef, then coordinates
enum BulkFlags : uint32_t {
  kTiled = 1,
  kStore = 2,
  kReduce = 4,
  kWithinCluster = 8,
  kMulticast = 16,
  kWideBarrier = 32,
  kWideSource = 64,
};
constexpr uint32_t flags_of(const Inst& i) { return i.first_target & 0xff; }
constexpr ReduceOp op_of(const Inst& i) { return static_cast<ReduceOp>(i.first_target >> 8 & 0xff); }
constexpr TmaType type_of(const Inst& i) { return static_cast<TmaType>(i.first_target >> 16 & 0xff); }

std::string hex(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

uint64_t lane_value(const Warp& w, Ref ref, bool wide, int l) {
  return wide ? in<uint64_t>(w, ref)[l] : in<uint32_t>(w, ref)[l];
}

uint32_t shared_address(Warp& w, int l, uint64_t address) {
  if (address >> 32) {
    if ((address & kWindowMask) != kSharedWindow)
      fault(w, 1u << l, "out-of-bounds", hex(address) + " is not in shared memory", address);
    address &= ~kWindowMask;
  }
  return static_cast<uint32_t>(address);
}

void need_alignment(Warp& w, int l, const char* what, uint64_t value, uint32_t alignment) {
  if (value % alignment) {
    fault(w, 1u << l, "misaligned",
          std::string(what) + " " + hex(value) + " is not a multiple of " + std::to_string(alignment), value);
  }
}

// The memory that a tile touches, row by row only when the whole tensor is not one known range.
void check_tile(Warp& w, int l, const TensorMap& map, const int32_t* coords, bool write) {
  std::vector<BoxRow> rows;
  uint64_t end = map.address + tma_element_bytes(map.type) * (uint64_t(map.last[0]) + 1);
  for (int k = 1; k < map.rank; ++k) end += map.last[k] * map.stride[k];
  for (const GlobalRangeEntry& range : w.launch->ranges) {
    if (range.begin <= map.address && end <= range.end && (!write || range.writable)) return;
  }
  append_box_rows(map, coords, rows);
  for (const BoxRow& row : rows) check_global(w, 1u << l, row.global, row.bytes, write);
}

void report_to_checks(Warp& w, int l, const BulkCopy& copy) {
  const Where at = w.where(1u << l);
  std::vector<GlobalRange> global;
  std::vector<SharedRange> shared;
  if (copy.tiled) {
    std::vector<BoxRow> rows;
    std::vector<ByteRange> bytes;
    append_box_rows(copy.map, copy.coords.data(), rows);
    for (const BoxRow& row : rows) {
      global.push_back({row.global, row.bytes});
      // Only what lies inside the tensor is read by a store.
      if (copy.kind != BulkCopy::kLoad)
        append_shared_ranges(copy.map, copy.shared_address, row.box_offset, row.bytes, bytes);
    }
    if (copy.kind == BulkCopy::kLoad) append_shared_ranges(copy.map, copy.shared_address, 0, copy.bytes, bytes);
    for (const ByteRange& range : bytes) shared.push_back({range.begin, range.size});
  } else {
    global.push_back({copy.global, copy.bytes});
    shared.push_back({copy.shared_address, copy.bytes});
  }
  if (copy.kind == BulkCopy::kStore || copy.kind == BulkCopy::kReduce) {
    w.checks->bulk_store(at, shared, global, copy.kind == BulkCopy::kReduce);
    return;
  }
  for (uint32_t rank = 0; rank < w.cluster->ctas.size(); ++rank) {
    if (!(copy.targets >> rank & 1)) continue;
    if (copy.kind == BulkCopy::kLoad)
      w.checks->async_load(at, rank, shared, copy.mbarrier, global);
    else
      w.checks->async_copy(at, {copy.source_address, copy.bytes}, rank, shared[0], copy.mbarrier);
  }
}

LaneBulk& lane_bulk(Warp& w, int l) {
  if (!w.bulk[l]) w.bulk[l] = std::make_unique<LaneBulk>();
  return *w.bulk[l];
}

void set_target(Warp& w, const Inst& i, int l, BulkCopy& copy, uint32_t destination) {
  const Ref* extra = w.launch->program->refs.data() + i.extra;
  Cta& target = cluster_cta(w, 1u << l, destination);
  copy.targets = 1u << target.rank;
  copy.shared_address = destination & kSharedOffsetMask;
  const uint32_t barrier = shared_address(w, l, lane_value(w, extra[0], flags_of(i) & kWideBarrier, l));
  copy.mbarrier = barrier & kSharedOffsetMask;
  if (flags_of(i) & kMulticast) {
    copy.targets = in<uint32_t>(w, extra[1])[l] & 0xffff;
    if (copy.targets == 0 || copy.targets >> w.cluster->ctas.size()) {
      fault(w, 1u << l, "out-of-bounds",
            "multicast mask " + hex(copy.targets) + " in a cluster of " + std::to_string(w.cluster->ctas.size()));
    }
  } else if (&cluster_cta(w, 1u << l, barrier) != &target) {
    fault(w, 1u << l, "mbarrier", "the mbarrier lies in another CTA than the destination", copy.mbarrier);
  }
  for (uint32_t rank = 0; rank < w.cluster->ctas.size(); ++rank) {
    if (!(copy.targets >> rank & 1)) continue;
    Cta& cta = *w.cluster->ctas[rank];
    if (cta.warps_left == 0)
      fault(w, 1u << l, "cluster-exit", "copy to CTA rank " + std::to_string(rank) + ", which has exited",
            copy.shared_address);
    check_shared(w, 1u << l, cta, copy.shared_address, copy.bytes);
    need_mbarrier(w, 1u << l, cta, copy.mbarrier);
  }
}

void issue_lane(Warp& w, const Inst& i, int l, uint64_t address) {
  const uint32_t flags = flags_of(i);
  const Ref* extra = w.launch->program->refs.data() + i.extra;
  auto copy = std::make_unique<BulkCopy>();
  copy->pc = w.pc;
  copy->cta = w.cta;
  copy->warp = w.index;
  const uint32_t shared = shared_address(w, l, address);
  const bool store = flags & kStore;
  copy->kind = flags & kWithinCluster ? BulkCopy::kSharedToShared
               : !store               ? BulkCopy::kLoad
               : flags & kReduce      ? BulkCopy::kReduce
                                      : BulkCopy::kStore;
  copy->op = op_of(i);
  if (flags & kTiled) {
    const uint64_t map_address = in<uint64_t>(w, i.a)[l];
    need_alignment(w, l, "tensor map address", map_address, 64);
    check_global(w, 1u << l, map_address, 128, false);
    copy->tiled = true;
    copy->map = decode_tensor_map(reinterpret_cast<const void*>(map_address));
    const int rank = i.num_extra - 2;
    if (copy->map.rank != rank) {
      fault(w, 1u << l, "tensor-map",
            "the tensor map has " + std::to_string(copy->map.rank) + " dimensions, the instruction " +
                std::to_string(rank));
    }
    for (int k = 0; k < rank; ++k) copy->coords[k] = static_cast<int32_t>(in<uint32_t>(w, extra[2 + k])[l]);
    copy->bytes = box_bytes(copy->map);
    if (copy->kind == BulkCopy::kReduce) {
      if (const char* why = invalid_reduction(copy->map.type, copy->op)) fault(w, 1u << l, "operand", why);
    }
    need_alignment(w, l, "shared address", shared & kSharedOffsetMask, required_shared_alignment(copy->map));
    check_tile(w, l, copy->map, copy->coords.data(), store);
  } else {
    copy->bytes = in<uint32_t>(w, i.c)[l];
    copy->type = type_of(i);
    need_alignment(w, l, "size", copy->bytes, 16);
    need_alignment(w, l, "shared address", shared & kSharedOffsetMask, 16);
    if (flags & kWithinCluster) {
      const uint32_t source = shared_address(w, l, lane_value(w, i.a, flags & kWideSource, l));
      if (&cluster_cta(w, 1u << l, source) != w.cta)
        fault(w, 1u << l, "out-of-bounds", "the source is not in the own CTA", source);
      copy->source_address = source & kSharedOffsetMask;
      need_alignment(w, l, "source address", copy->source_address, 16);
      check_shared(w, 1u << l, *w.cta, copy->source_address, copy->bytes);
    } else {
      copy->global = in<uint64_t>(w, i.a)[l];
      need_alignment(w, l, "global address", copy->global, 16);
      check_global(w, 1u << l, copy->global, copy->bytes, store);
    }
  }
  if (store) {
    if (&cluster_cta(w, 1u << l, shared) != w.cta)
      fault(w, 1u << l, "out-of-bounds", "the source is not in the own CTA", shared);
    copy->shared_address = shared & kSharedOffsetMask;
    copy->targets = 0;
    check_shared(w, 1u << l, *w.cta, copy->shared_address, copy->bytes);
    copy->group = lane_bulk(w, l).open;
    ++copy->group->reads_pending;
    ++copy->group->writes_pending;
  } else {
    set_target(w, i, l, *copy, shared);
  }
  if (w.checks) report_to_checks(w, l, *copy);
  start_copy(w, std::move(copy));
}

Status bulk(Warp& w, const Inst& i, Mask mask) {
  alignas(64) uint64_t addresses[kLanes];
  lane_addresses(w, i, addresses);
  try {
    for (int l = 0; l < kLanes; ++l) {
      if (mask >> l & 1) issue_lane(w, i, l, addresses[l]);
    }
  } catch (const OperandFault& e) {
    fault(w, mask, "operand", e.what());
  }
  return Status::kNext;
}

// st.async: the values travel with the copy. extra: mbarrier, unused, then the values.
Status store_async(Warp& w, const Inst& i, Mask mask) {
  alignas(64) uint64_t addresses[kLanes];
  lane_addresses(w, i, addresses);
  const Ref* extra = w.launch->program->refs.data() + i.extra;
  const uint32_t element = i.first_target >> 8 & 0xff;
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    auto copy = std::make_unique<BulkCopy>();
    copy->kind = BulkCopy::kSharedToShared;
    copy->pc = w.pc;
    copy->cta = w.cta;
    copy->warp = w.index;
    copy->bytes = element * (i.num_extra - 2);
    copy->staged.resize(copy->bytes);
    for (int k = 2; k < i.num_extra; ++k) {
      const uint64_t value = lane_value(w, extra[k], element == 8, l);
      std::copy_n(reinterpret_cast<const uint8_t*>(&value), element, copy->staged.data() + element * (k - 2));
    }
    const uint32_t destination = shared_address(w, l, addresses[l]);
    need_alignment(w, l, "address", destination, copy->bytes);
    set_target(w, i, l, *copy, destination);
    if (w.checks) {
      const SharedRange range{copy->shared_address, copy->bytes};
      for (uint32_t rank = 0; rank < w.cluster->ctas.size(); ++rank) {
        if (copy->targets >> rank & 1) w.checks->async_load(w.where(1u << l), rank, {&range, 1}, copy->mbarrier, {});
      }
    }
    start_copy(w, std::move(copy));
  }
  return Status::kNext;
}

Status commit(Warp& w, const Inst&, Mask mask) {
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    LaneBulk& bulk = lane_bulk(w, l);
    bulk.committed.push_back(bulk.open);
    bulk.open = std::make_shared<BulkGroup>();
  }
  if (w.checks) w.checks->bulk_commit(w.where(mask));
  return Status::kNext;
}

// aux: read only; imm: groups that may stay.
Status wait_group(Warp& w, const Inst& i, Mask mask) {
  const size_t keep = static_cast<size_t>(i.imm);
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1) || !w.bulk[l]) continue;
    auto& groups = w.bulk[l]->committed;
    for (size_t g = 0; g + keep < groups.size(); ++g) {
      if (i.aux ? groups[g]->reads_pending : groups[g]->writes_pending) {
        w.path->wait.kind = Wait::kBulk;
        return Status::kBlocked;
      }
    }
    while (!groups.empty() && groups.front()->writes_pending == 0) groups.pop_front();
  }
  w.path->wait = {};
  if (w.checks)
    w.checks->bulk_wait(w.where(mask), static_cast<uint32_t>(keep), i.aux ? BulkWait::kRead : BulkWait::kFull);
  return Status::kNext;
}

Status nothing(Warp&, const Inst&, Mask) { return Status::kNext; }

void set_address(Decoder& d, Inst& in, const PtxOperand& operand) {
  MemoryMode mode;
  const Decoder::Address address = d.address(operand);
  in.b = address.base;
  in.imm = address.offset;
  mode.wide = address.wide;
  in.aux = pack_mode(mode);
}

// A plain address, its offset folded into a register of its own if there is one.
Ref plain_address(Decoder& d, const PtxOperand& operand, bool& wide) {
  const Decoder::Address address = d.address(operand);
  wide = address.wide;
  if (address.offset == 0) return address.base;
  return d.add_offset(address);
}

ReduceOp reduce_op(Decoder& d) {
  constexpr std::pair<std::string_view, ReduceOp> kOps[] = {
      {"add", ReduceOp::kAdd}, {"min", ReduceOp::kMin}, {"max", ReduceOp::kMax}, {"inc", ReduceOp::kInc},
      {"dec", ReduceOp::kDec}, {"and", ReduceOp::kAnd}, {"or", ReduceOp::kOr},   {"xor", ReduceOp::kXor}};
  for (const auto& [name, op] : kOps) {
    if (d.ptx().has(name)) return op;
  }
  d.unsupported("reduction");
}

TmaType reduce_type(Decoder& d) {
  switch (parse_type(d.ptx().parts.back())) {
    case PtxType::kU32:
    case PtxType::kB32:
      return TmaType::kU32;
    case PtxType::kS32:
      return TmaType::kS32;
    case PtxType::kU64:
    case PtxType::kB64:
      return TmaType::kU64;
    case PtxType::kS64:
      return TmaType::kS64;
    case PtxType::kF16:
      return TmaType::kF16;
    case PtxType::kBF16:
      return TmaType::kBf16;
    case PtxType::kF32:
      return TmaType::kF32;
    case PtxType::kF64:
      return TmaType::kF64;
    default:
      d.unsupported("type");
  }
}

void decode_copy(Decoder& d) {
  const PtxInstruction& p = d.ptx();
  const bool tensor = p.has("tensor"), reduce = p.parts[1] == "reduce", store = p.has("bulk_group");
  if (p.has("im2col") || p.has("tile::gather4") || p.has("tile::scatter4") || p.has("cp_mask") ||
      p.has("im2col_no_offs"))
    d.unsupported("mode");
  uint32_t flags = (tensor ? kTiled : 0u) | (store ? kStore : 0u) | (reduce ? kReduce : 0u);
  const bool within = !store && !p.has("global");
  if (within) flags |= kWithinCluster;
  if (within && reduce) d.unsupported("reduction into shared memory");
  Inst in;
  in.run = bulk;
  // Loads: [shared], [global or map], ...; stores the other way round.
  const PtxOperand& shared = d.operand(store ? 1 : 0);
  const PtxOperand& other = d.operand(store ? 0 : 1);
  size_t next = 2;
  bool wide = true;
  if (tensor && (other.kind != PtxOperand::kAddress || other.items.size() != 2))
    d.unsupported("a tensor map with coordinates is expected");
  in.a = plain_address(d, other, wide);
  if (wide && within) flags |= kWideSource;
  if (!wide && !within) d.unsupported("32-bit global address");
  if (!tensor) in.c = d.source(next++, PtxType::kU32);
  Ref barrier = d.constant32(0), multicast = barrier;
  if (!store) {
    bool wide_barrier = true;
    barrier = plain_address(d, d.operand(next++), wide_barrier);
    if (wide_barrier) flags |= kWideBarrier;
    if (p.has("multicast::cluster")) {
      flags |= kMulticast;
      multicast = d.source(next++, PtxType::kU16);
    }
  }
  std::vector<Ref> coords;
  if (tensor) {
    for (const PtxOperand& item : other.items[1].items) coords.push_back(d.source(item, PtxType::kS32));
  }
  set_address(d, in, shared);
  d.add_extra(in, barrier);
  d.add_extra(in, multicast);
  for (const Ref ref : coords) d.add_extra(in, ref);
  in.first_target = flags;
  if (reduce) in.first_target |= static_cast<uint32_t>(reduce_op(d)) << 8;
  if (reduce && !tensor) in.first_target |= static_cast<uint32_t>(reduce_type(d)) << 16;
  d.sink();
  d.emit(in);
}

void decode_store_async(Decoder& d) {
  const PtxInstruction& p = d.ptx();
  const PtxType type = parse_type(p.parts.back());
  Inst in;
  in.run = store_async;
  bool wide_barrier = true;
  const Ref barrier = plain_address(d, d.operand(2), wide_barrier);
  std::vector<Ref> values;
  const PtxOperand& value = d.operand(1);
  if (value.kind == PtxOperand::kVector) {
    for (const PtxOperand& item : value.items) values.push_back(d.source(item, type));
  } else {
    values.push_back(d.source(value, type));
  }
  set_address(d, in, d.operand(0));
  in.first_target = (wide_barrier ? kWideBarrier : 0u) | type_bytes(type) << 8;
  d.add_extra(in, barrier);
  d.add_extra(in, barrier);
  for (const Ref ref : values) d.add_extra(in, ref);
  d.sink();
  d.emit(in);
}

}  // namespace

bool decode_bulk(Decoder& d) {
  const PtxInstruction& p = d.ptx();
  if (p.parts[0] == "st" && p.has("async")) {
    decode_store_async(d);
    return true;
  }
  if (p.parts[0] != "cp" || !p.has("bulk")) return false;
  Inst in;
  if (p.has("commit_group")) {
    in.run = commit;
    d.emit(in);
  } else if (p.has("wait_group")) {
    in.run = wait_group;
    in.aux = p.has("read");
    in.imm = d.integer(d.operand(0));
    d.emit(in);
  } else if (p.has("prefetch")) {
    in.run = nothing;
    d.emit(in);
  } else {
    decode_copy(d);
  }
  return true;
}

}  // namespace flash_ext::emulator
