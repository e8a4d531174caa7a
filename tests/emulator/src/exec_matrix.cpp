// wgmma with its groups, mma.sync, ldmatrix, stmatrix. The arithmetic is in tensor_core.h.
#include <algorithm>
#include <charconv>
#include <span>

#include "memory_operand.h"
#include "tensor_core.h"

namespace flash_ext::emulator {

namespace {

MmaFormat parse_format(Decoder& d, std::string_view name) {
  constexpr std::pair<std::string_view, MmaFormat> kFormats[] = {
      {"f16", MmaFormat::kF16},   {"bf16", MmaFormat::kBf16}, {"tf32", MmaFormat::kTf32},
      {"e4m3", MmaFormat::kE4m3}, {"e5m2", MmaFormat::kE5m2}, {"s8", MmaFormat::kS8},
      {"u8", MmaFormat::kU8},     {"f32", MmaFormat::kF32},   {"s32", MmaFormat::kS32},
  };
  for (const auto& [text, format] : kFormats) {
    if (text == name) return format;
  }
  d.unsupported("format " + std::string(name));
}

struct Shape {
  int m = 0, n = 0, k = 0;
};
Shape parse_shape(Decoder& d, size_t& part) {
  const auto& parts = d.ptx().parts;
  for (part = 1; part < parts.size(); ++part) {
    const std::string_view text = parts[part];
    const size_t n = text.find('n'), k = text.find('k');
    if (text[0] != 'm' || n == std::string_view::npos || k == std::string_view::npos || n > k) continue;
    Shape shape;
    std::from_chars(text.data() + 1, text.data() + n, shape.m);
    std::from_chars(text.data() + n + 1, text.data() + k, shape.n);
    std::from_chars(text.data() + k + 1, text.data() + text.size(), shape.k);
    if (shape.m && shape.n && shape.k) return shape;
  }
  d.unsupported("shape");
}

// ---- wgmma ----

// WgmmaOp in Inst::imm; a, b: descriptors; c: predicate scale-d; extra: D, then A if in registers.
enum OpFlags : uint8_t { kRegisterA = 1, kMnA = 2, kMnB = 4, kNegA = 8, kNegB = 16, kSat = 32 };

int64_t pack_op(const WgmmaOp& op) {
  const uint64_t flags = (op.a_in_registers ? kRegisterA : 0) | (op.mn_major_a ? kMnA : 0) |
                         (op.mn_major_b ? kMnB : 0) | (op.negate_a ? kNegA : 0) | (op.negate_b ? kNegB : 0) |
                         (op.satfinite ? kSat : 0);
  return static_cast<int64_t>(uint64_t(op.n) | uint64_t(op.a) << 16 | uint64_t(op.b) << 24 | uint64_t(op.d) << 32 |
                              flags << 40);
}
WgmmaOp unpack_op(int64_t packed) {
  const uint64_t bits = static_cast<uint64_t>(packed);
  const uint64_t flags = bits >> 40;
  WgmmaOp op;
  op.n = static_cast<int>(bits & 0xffff);
  op.a = static_cast<MmaFormat>(bits >> 16 & 0xff);
  op.b = static_cast<MmaFormat>(bits >> 24 & 0xff);
  op.d = static_cast<MmaFormat>(bits >> 32 & 0xff);
  op.a_in_registers = flags & kRegisterA;
  op.mn_major_a = flags & kMnA;
  op.mn_major_b = flags & kMnB;
  op.negate_a = flags & kNegA;
  op.negate_b = flags & kNegB;
  op.satfinite = flags & kSat;
  return op;
}

void execute(Cta& cta, uint32_t index, const WgmmaIssue& issue) {
  const WgmmaOp op = unpack_op(issue.inst->imm);
  const Ref* refs = cta.launch->program->refs.data() + issue.inst->extra;
  const int nd = wgmma_d_registers(op);
  uint32_t* d[4 * 128];
  const uint32_t* a[16];
  for (int k = 0; k < 4; ++k) {
    Warp& w = cta.warps[4 * index + k];
    for (int r = 0; r < nd; ++r) d[k * nd + r] = at<uint32_t>(w, refs[r]);
    if (!op.a_in_registers) continue;
    for (int r = 0; r < wgmma_a_registers; ++r) a[k * wgmma_a_registers + r] = in<uint32_t>(w, refs[nd + r]);
  }
  try {
    wgmma(op, issue.scale_d, d, op.a_in_registers ? a : nullptr, issue.a_desc, issue.b_desc, cta.view(),
          static_cast<int>(cta.launch->options.fp8_fraction_bits));
  } catch (const OperandFault& e) {
    fault_at(*cta.launch, issue.pc, &cta, 4 * index, kFullMask, "operand", e.what());
  }
}

void require_whole_warp(const Warp& w, Mask mask) {
  if (mask != kFullMask) fault(w, mask, "operand", "the instruction needs all lanes of the warp");
}

// The value that all lanes must share.
template <class T>
T uniform(const Warp& w, const T* lanes, const char* what) {
  for (int l = 1; l < kLanes; ++l) {
    if (lanes[l] != lanes[0]) fault(w, 1u << l, "wgmma", std::string(what) + " differs between lanes");
  }
  return lanes[0];
}

bool uniform_scale(const Warp& w, const Inst& i) {
  if (i.c == kNoRef) return true;
  const Mask scale = read_predicate(w, i.c);
  if (scale != 0 && scale != kFullMask) fault(w, scale, "wgmma", "scale-d differs between lanes");
  return scale != 0;
}

// Reads are A in registers, then descriptors, D and scale-d; writes are D.
void check_registers(Warp& w, const Inst& i, const WgmmaOp& op, bool scale_d) {
  const RegisterUses& uses = w.launch->program->uses[w.pc];
  const std::span<const uint32_t> reads = uses.reads;
  const size_t a = op.a_in_registers ? wgmma_a_registers : 0, descriptors = op.a_in_registers ? 1 : 2;
  w.checks->registers(w.where(kFullMask), reads.subspan(a, descriptors), {}, true);
  w.checks->registers(w.where(kFullMask), reads.subspan(a + descriptors + uses.writes.size()), {}, true);
  const uint64_t shape = (i.imm & 0xffff) | (i.imm >> 24 & 0xff) << 16 | (i.imm >> 32 & 0xff) << 24;
  w.checks->wgmma_registers(w.where(kFullMask), reads.first(a), uses.writes, scale_d, static_cast<uint32_t>(shape));
}

Status wgmma_issue(Warp& w, const Inst& i, Mask mask) {
  require_whole_warp(w, mask);
  Cta& cta = *w.cta;
  const uint32_t index = w.index / 4, bit = 1u << (w.index % 4);
  if (4 * index + 4 > cta.warps.size()) fault(w, mask, "wgmma", "the warpgroup has less than four warps");
  Warpgroup& group = cta.warpgroups[index];
  const uint64_t number = w.wgmma_issued - group.executed;
  if (number == group.queue.size()) group.queue.emplace_back();
  WgmmaIssue& issue = group.queue[number];
  const WgmmaOp op = unpack_op(i.imm);
  const uint64_t a_desc = op.a_in_registers ? 0 : uniform(w, in<uint64_t>(w, i.a), "descriptor A");
  const uint64_t b_desc = uniform(w, in<uint64_t>(w, i.b), "descriptor B");
  const bool scale_d = uniform_scale(w, i);
  if (!issue.issued) {
    issue.inst = &i;
    issue.pc = w.pc;
    issue.a_desc = a_desc;
    issue.b_desc = b_desc;
    issue.scale_d = scale_d;
  } else if (issue.inst != &i || issue.a_desc != a_desc || issue.b_desc != b_desc || issue.scale_d != scale_d) {
    fault(w, mask, "wgmma", "the warps of a warpgroup issue different wgmma, or with different descriptors");
  }
  ++w.wgmma_issued;
  issue.issued |= bit;
  if (w.checks) [[unlikely]] {
    check_registers(w, i, op, scale_d);
    if (issue.issued == 0xf) w.checks->wgmma_shared(w.where(mask), op, a_desc, b_desc);
  }
  if (issue.issued == 0xf) {
    const uint64_t delay = pick_delay(*w.cluster);
    if (delay == 0 && number == 0) {
      run_wgmma(cta, index, group.executed + 1);
    } else if (delay != kNever) {
      issue.due = w.cluster->round + delay;
      ++w.cluster->wgmmas_due;
    }
  }
  return Status::kNext;
}

Status wgmma_fence(Warp& w, const Inst&, Mask mask) {
  require_whole_warp(w, mask);
  if (w.checks) w.checks->wgmma_fence(w.where(mask));
  return Status::kNext;
}
Status wgmma_commit(Warp& w, const Inst&, Mask mask) {
  require_whole_warp(w, mask);
  w.wgmma_groups.push_back(w.wgmma_issued);
  if (w.checks) w.checks->wgmma_commit(w.where(mask));
  return Status::kNext;
}
Status wgmma_wait(Warp& w, const Inst& i, Mask mask) {
  require_whole_warp(w, mask);
  const size_t keep = static_cast<size_t>(i.imm);
  auto& groups = w.wgmma_groups;
  if (groups.size() > keep) {
    const uint64_t end = groups[groups.size() - 1 - keep];
    if (!run_wgmma(*w.cta, w.index / 4, end)) {
      w.path->wait.kind = Wait::kWgmma;
      return Status::kBlocked;
    }
    groups.erase(groups.begin(), groups.end() - static_cast<ptrdiff_t>(keep));
  }
  w.path->wait = {};
  if (w.checks) w.checks->wgmma_wait(w.where(mask), static_cast<uint32_t>(keep));
  return Status::kNext;
}

void decode_wgmma(Decoder& d) {
  const PtxInstruction& p = d.ptx();
  Inst in;
  in.flags = kFlagGather;
  if (p.parts[1] == "fence") {
    in.run = wgmma_fence;
    d.emit(in);
    return;
  }
  if (p.parts[1] == "commit_group") {
    in.run = wgmma_commit;
    d.emit(in);
    return;
  }
  if (p.parts[1] == "wait_group") {
    in.run = wgmma_wait;
    in.imm = d.integer(d.operand(0));
    in.flags |= kFlagWgmmaWait;
    d.emit(in);
    return;
  }
  if (p.parts[1] != "mma_async" || p.has("sp")) d.unsupported();
  size_t part;
  const Shape shape = parse_shape(d, part);
  if (p.parts.size() < part + 4) d.unsupported("types");
  WgmmaOp op;
  op.n = shape.n;
  op.d = parse_format(d, p.parts[part + 1]);
  op.a = parse_format(d, p.parts[part + 2]);
  op.b = parse_format(d, p.parts[part + 3]);
  op.satfinite = p.has("satfinite");
  if (shape.m != 64 || shape.k * element_bytes(op.a) != 32) d.unsupported("shape");
  op.a_in_registers = d.operand(1).kind == PtxOperand::kVector;

  // D, A, B, scale-d, negations of A and B, transposition of A (not from registers) and B.
  size_t next = 3;
  const bool integer = op.d == MmaFormat::kS32;
  const PtxOperand* scale = d.operand_count() > next ? &d.operand(next++) : nullptr;
  if (!integer && d.operand_count() >= next + 2) {
    op.negate_a = d.integer(d.operand(next++)) == -1;
    op.negate_b = d.integer(d.operand(next++)) == -1;
    if (element_bytes(op.a) == 2) {
      if (!op.a_in_registers && d.operand_count() > next) op.mn_major_a = d.integer(d.operand(next++)) != 0;
      if (d.operand_count() > next) op.mn_major_b = d.integer(d.operand(next++)) != 0;
    }
  }
  if (d.operand_count() != next) d.unsupported("operands");
  if (const char* why = invalid_wgmma(op)) d.unsupported(why);
  const auto& accumulators = d.operand(0).items;
  if (static_cast<int>(accumulators.size()) != wgmma_d_registers(op)) d.unsupported("number of accumulators");
  // check_registers relies on the order of the reads. D is one: its old values must stay alive.
  std::vector<Ref> a, result;
  if (op.a_in_registers) {
    if (d.operand(1).items.size() != wgmma_a_registers) d.unsupported("number of registers of A");
    for (const PtxOperand& item : d.operand(1).items) a.push_back(d.source(item, PtxType::kB32));
  } else {
    in.a = d.source(1, PtxType::kB64);
  }
  in.b = d.source(2, PtxType::kB64);
  for (const PtxOperand& item : accumulators) {
    d.source(item, PtxType::kB32);
    result.push_back(d.destination(item, PtxType::kB32));
  }
  if (scale) in.c = d.predicate(*scale);
  for (const Ref ref : result) d.add_extra(in, ref);
  for (const Ref ref : a) d.add_extra(in, ref);
  in.run = wgmma_issue;
  in.imm = pack_op(op);
  in.flags |= kFlagAsyncRead;
  d.emit(in);
}

// ---- mma.sync ----

// Inst::imm: k | a << 8 | b << 16 | c << 24 | d << 32 | satfinite << 40; extra: D, A, B, C.
MmaOp unpack_mma(int64_t packed) {
  const uint64_t bits = static_cast<uint64_t>(packed);
  MmaOp op;
  op.k = static_cast<int>(bits & 0xff);
  op.a = static_cast<MmaFormat>(bits >> 8 & 0xff);
  op.b = static_cast<MmaFormat>(bits >> 16 & 0xff);
  op.c = static_cast<MmaFormat>(bits >> 24 & 0xff);
  op.d = static_cast<MmaFormat>(bits >> 32 & 0xff);
  op.satfinite = bits >> 40 & 1;
  return op;
}
Status mma(Warp& w, const Inst& i, Mask mask) {
  require_whole_warp(w, mask);
  const MmaOp op = unpack_mma(i.imm);
  const Ref* refs = w.launch->program->refs.data() + i.extra;
  uint32_t* d[4];
  const uint32_t *a[8], *b[4], *c[4];
  for (int k = 0; k < mma_d_registers(op); ++k) d[k] = at<uint32_t>(w, *refs++);
  for (int k = 0; k < mma_a_registers(op); ++k) a[k] = in<uint32_t>(w, *refs++);
  for (int k = 0; k < mma_b_registers(op); ++k) b[k] = in<uint32_t>(w, *refs++);
  for (int k = 0; k < mma_c_registers(op); ++k) c[k] = in<uint32_t>(w, *refs++);
  mma_sync(op, d, a, b, c, static_cast<int>(w.launch->options.fp8_fraction_bits));
  return Status::kNext;
}

void decode_mma(Decoder& d) {
  const PtxInstruction& p = d.ptx();
  size_t part;
  const Shape shape = parse_shape(d, part);
  if (shape.m != 16 || shape.n != 8 || p.has("sp") || !p.has("row") || !p.has("col")) d.unsupported("shape");
  std::vector<MmaFormat> formats;
  for (size_t k = part + 3; k < p.parts.size(); ++k) {
    if (p.parts[k] != "satfinite") formats.push_back(parse_format(d, p.parts[k]));
  }
  if (formats.size() != 4) d.unsupported("types");
  MmaOp op;
  op.k = shape.k;
  op.d = formats[0];
  op.a = formats[1];
  op.b = formats[2];
  op.c = formats[3];
  op.satfinite = p.has("satfinite");
  if (const char* why = invalid_mma(op)) d.unsupported(why);
  const size_t counts[4] = {size_t(mma_d_registers(op)), size_t(mma_a_registers(op)), size_t(mma_b_registers(op)),
                            size_t(mma_c_registers(op))};
  Inst in;
  std::vector<Ref> refs;
  for (size_t k = 0; k < 4; ++k) {
    const PtxOperand& operand = d.operand(k);
    const bool vector = operand.kind == PtxOperand::kVector;
    if ((vector ? operand.items.size() : 1) != counts[k]) d.unsupported("number of registers");
    for (size_t r = 0; r < counts[k]; ++r) {
      const PtxOperand& item = vector ? operand.items[r] : operand;
      const PtxType type = k == 3 && op.c == MmaFormat::kF32 ? PtxType::kF32 : PtxType::kB32;
      refs.push_back(k == 0 ? d.destination(item, PtxType::kB32) : d.source(item, type));
    }
  }
  for (const Ref ref : refs) d.add_extra(in, ref);
  in.run = mma;
  in.flags = kFlagGather;
  in.imm = static_cast<int64_t>(uint64_t(op.k) | uint64_t(op.a) << 8 | uint64_t(op.b) << 16 | uint64_t(op.c) << 24 |
                                uint64_t(op.d) << 32 | uint64_t(op.satfinite) << 40);
  d.emit(in);
}

// ---- ldmatrix, stmatrix: b, imm are the address; first_target: matrices | transposed << 8 ----

template <bool kLoad>
Status matrix(Warp& w, const Inst& i, Mask mask) {
  require_whole_warp(w, mask);
  alignas(64) uint64_t addresses[kLanes];
  lane_addresses(w, i, addresses);
  const uint32_t count = i.first_target & 0xff;
  const bool transposed = i.first_target >> 8;
  const Mask rows = count == 4 ? kFullMask : (1u << (8 * count)) - 1;
  Lookup found;
  resolve(w, rows, unpack_mode(i.aux).space, addresses, 16, kLoad ? Access::kRead : Access::kWrite, Scope::kWeak,
          Order::kRelaxed, found);
  const Ref* refs = w.launch->program->refs.data() + i.extra;
  if constexpr (kLoad) {
    uint32_t* d[4];
    for (uint32_t k = 0; k < count; ++k) d[k] = at<uint32_t>(w, refs[k]);
    ldmatrix(found.data.data(), static_cast<int>(count), transposed, d);
  } else {
    const uint32_t* s[4];
    for (uint32_t k = 0; k < count; ++k) s[k] = in<uint32_t>(w, refs[k]);
    stmatrix(found.data.data(), static_cast<int>(count), transposed, s);
  }
  return Status::kNext;
}

void decode_ldmatrix(Decoder& d, bool load) {
  const PtxInstruction& p = d.ptx();
  if (!p.has("m8n8") || p.parts.back() != "b16") d.unsupported("shape");
  const uint32_t count = p.has("x4") ? 4 : p.has("x2") ? 2 : 1;
  const PtxOperand& registers = d.operand(load ? 0 : 1);
  const bool vector = registers.kind == PtxOperand::kVector;
  if ((vector ? registers.items.size() : 1) != count) d.unsupported("number of registers");
  Inst in;
  MemoryMode mode = decode_mode(d);
  const Decoder::Address address = d.address(d.operand(load ? 1 : 0));
  in.b = address.base;
  in.imm = address.offset;
  mode.wide = address.wide;
  in.aux = pack_mode(mode);
  in.first_target = count | (p.has("trans") ? 0x100u : 0u);
  std::vector<Ref> refs;
  for (uint32_t k = 0; k < count; ++k) {
    const PtxOperand& item = vector ? registers.items[k] : registers;
    refs.push_back(load ? d.destination(item, PtxType::kB32) : d.source(item, PtxType::kB32));
  }
  for (const Ref ref : refs) d.add_extra(in, ref);
  in.run = load ? matrix<true> : matrix<false>;
  in.flags = kFlagGather;
  d.sink();
  d.emit(in);
}

// movmatrix.sync.aligned.m8n8.trans.b16: the transpose of an 8x8 matrix of halves held in a register.
Status movmatrix(Warp& w, const Inst& i, Mask mask) {
  require_whole_warp(w, mask);
  const uint32_t* a = in<uint32_t>(w, i.a);
  alignas(64) uint32_t result[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    uint32_t value = 0;
    for (int h = 0; h < 2; ++h) {
      const int row = 2 * (l % 4) + h, col = l / 4;
      value |= (a[row * 4 + col / 2] >> (16 * (col % 2)) & 0xffff) << (16 * h);
    }
    result[l] = value;
  }
  store_lanes(at<uint32_t>(w, i.d), result, mask);
  return Status::kNext;
}

}  // namespace

bool run_wgmma(Cta& cta, uint32_t index, uint64_t up_to) {
  Warpgroup& group = cta.warpgroups[index];
  while (group.executed < up_to) {
    if (group.queue.empty() || group.queue.front().issued != 0xf) return false;
    execute(cta, index, group.queue.front());
    if (group.queue.front().due != kNever) --cta.cluster->wgmmas_due;
    group.queue.pop_front();
    ++group.executed;
  }
  return true;
}

bool decode_matrix(Decoder& d) {
  const std::string_view op = d.ptx().parts[0];
  if (op == "wgmma")
    decode_wgmma(d);
  else if (op == "mma")
    decode_mma(d);
  else if (op == "ldmatrix")
    decode_ldmatrix(d, true);
  else if (op == "stmatrix")
    decode_ldmatrix(d, false);
  else if (op == "movmatrix") {
    Inst in;
    in.run = movmatrix;
    in.a = d.source(1, PtxType::kB32);
    in.d = d.destination(0, PtxType::kB32);
    in.flags = kFlagGather;
    d.emit(in);
  } else {
    return false;
  }
  return true;
}

}  // namespace flash_ext::emulator
