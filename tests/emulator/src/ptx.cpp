#include "ptx.h"

#include <charconv>
#include <cstring>

#include "machine.h"

namespace flash_ext::emulator {

namespace {

bool is_name_start(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || c == '$' || c == '%';
}
bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_name_char(char c) { return is_name_start(c) || is_digit(c); }

// A lexical scope of a function body: registers, labels and variables of one { }.
struct Scope {
  std::unordered_map<std::string_view, uint32_t> registers, labels;
  struct Family {
    std::string_view prefix;
    uint32_t first, count;
  };
  std::vector<Family> families;  // .reg .b32 %r<100>
  // Operands that name a label not yet seen: (instruction, operand path) kept as instruction and
  // operand number; a branch target list is the other place where labels occur.
  struct Use {
    uint32_t instruction;
    uint32_t operand;
    std::string_view name;
    uint32_t line;
  };
  std::vector<Use> uses;
};

class Parser {
 public:
  Parser(PtxModule& module, const std::string& name)
      : module_(module), name_(name), at_(module.text.data()), end_(at_ + module.text.size()) {}

  void run() {
    bool has_version = false, has_target = false;
    for (skip_space(); at_ < end_; skip_space()) {
      if (*at_ != '.') fail("expected a directive");
      const std::string_view word = directive();
      if (word == "version") {
        has_version = true;
        until_line_end();
      } else if (word == "target") {
        has_target = true;
        module_.target = std::string(name());
        until_line_end();
      } else if (word == "address_size") {
        if (integer() != 64) fail("only 64-bit addresses are supported");
      } else if (word == "file") {
        const uint32_t number = static_cast<uint32_t>(integer());
        module_.files[number] = std::string(quoted());
        until_line_end();
      } else if (word == "section") {
        while (at_ < end_ && *at_ != '{') ++at_;
        skip_braces();
      } else if (!has_version || !has_target) {
        fail("expected .version and .target first");
      } else {
        declaration(word);
      }
    }
    if (!has_version || !has_target) fail("not PTX: no .version or .target");
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    std::string near(at_, std::min<size_t>(40, end_ - at_));
    near = near.substr(0, near.find('\n'));
    throw LoadError(name_ + ": PTX line " + std::to_string(line_) + ": " + what +
                    (near.empty() ? " at the end of the text" : " at '" + near + "'"));
  }

  void skip_space() {
    while (at_ < end_) {
      const char c = *at_;
      if (c == '\n') {
        ++line_;
        ++at_;
      } else if (c == ' ' || c == '\t' || c == '\r') {
        ++at_;
      } else if (c == '/' && at_ + 1 < end_ && at_[1] == '/') {
        while (at_ < end_ && *at_ != '\n') ++at_;
      } else if (c == '/' && at_ + 1 < end_ && at_[1] == '*') {
        at_ += 2;
        while (at_ + 1 < end_ && !(at_[0] == '*' && at_[1] == '/')) line_ += *at_++ == '\n';
        if (at_ + 1 >= end_) fail("comment without end");
        at_ += 2;
      } else {
        break;
      }
    }
  }
  bool peek(char c) {
    skip_space();
    return at_ < end_ && *at_ == c;
  }
  bool accept(char c) {
    if (!peek(c)) return false;
    ++at_;
    return true;
  }
  void expect(char c) {
    if (!accept(c)) fail(std::string("expected '") + c + "'");
  }
  std::string_view name() {
    skip_space();
    const char* begin = at_;
    if (at_ >= end_ || !is_name_start(*at_)) fail("expected a name");
    ++at_;
    while (at_ < end_ && is_name_char(*at_)) ++at_;
    // Special registers have components: %tid.x
    if (*begin == '%' && at_ + 1 < end_ && *at_ == '.' && at_[1] >= 'w' && at_[1] <= 'z' &&
        (at_ + 2 >= end_ || !is_name_char(at_[2]))) {
      at_ += 2;
    }
    return {begin, static_cast<size_t>(at_ - begin)};
  }
  std::string_view directive() {
    expect('.');
    const char* begin = at_;
    while (at_ < end_ && is_name_char(*at_)) ++at_;
    if (at_ == begin) fail("expected a directive");
    return {begin, static_cast<size_t>(at_ - begin)};
  }
  std::string_view quoted() {
    expect('"');
    const char* begin = at_;
    while (at_ < end_ && *at_ != '"' && *at_ != '\n') ++at_;
    const std::string_view text(begin, at_ - begin);
    expect('"');
    return text;
  }
  void until_line_end() {
    while (at_ < end_ && *at_ != '\n') ++at_;
  }
  void skip_braces() {
    expect('{');
    for (int depth = 1; depth; ++at_) {
      if (at_ >= end_) fail("'{' without '}'");
      if (*at_ == '{') ++depth;
      if (*at_ == '}') --depth;
      if (*at_ == '\n') ++line_;
    }
  }

  // Numbers: decimal, hexadecimal, octal, binary, 0f/0d floats, decimal floats.
  PtxOperand number() {
    skip_space();
    PtxOperand result;
    const char* begin = at_;
    const bool negative = at_ < end_ && *at_ == '-';
    if (negative || (at_ < end_ && *at_ == '+')) ++at_;
    if (at_ >= end_ || !is_digit(*at_)) fail("expected a number");
    uint64_t bits = 0;
    const char second = at_ + 1 < end_ ? at_[1] : ' ';
    auto read = [&](int base) {
      const auto [next, error] = std::from_chars(at_, end_, bits, base);
      if (error != std::errc()) fail("bad number");
      at_ = next;
    };
    if (*at_ == '0' && std::strchr("fFdD", second)) {
      at_ += 2;
      const char* digits = at_;
      read(16);
      result.single = second == 'f' || second == 'F';
      if (at_ - digits != (result.single ? 8 : 16)) fail("bad floating-point constant");
      result.kind = PtxOperand::kFloat;
      if (negative) bits ^= result.single ? 0x80000000u : uint64_t(1) << 63;
    } else if (*at_ == '0' && (second == 'x' || second == 'X')) {
      at_ += 2;
      read(16);
    } else if (*at_ == '0' && (second == 'b' || second == 'B')) {
      at_ += 2;
      read(2);
    } else if (*at_ == '0' && is_digit(second)) {
      read(8);
    } else {
      const char* digits = at_;
      read(10);
      if (at_ < end_ && (*at_ == '.' || *at_ == 'e')) {
        double value = 0;
        const auto [next, error] = std::from_chars(digits, end_, value);
        if (error != std::errc()) fail("bad number");
        at_ = next;
        if (negative) value = -value;
        std::memcpy(&bits, &value, 8);
        result.kind = PtxOperand::kFloat;
        result.value = static_cast<int64_t>(bits);
        return result;
      }
    }
    if (at_ < end_ && *at_ == 'U') ++at_;
    if (at_ < end_ && is_name_char(*at_)) {
      at_ = begin;
      fail("bad number");
    }
    result.value = static_cast<int64_t>(result.kind == PtxOperand::kInteger && negative ? -bits : bits);
    return result;
  }
  int64_t integer() {
    const PtxOperand value = number();
    if (value.kind != PtxOperand::kInteger) fail("expected an integer");
    return value.value;
  }

  // ---- module level ----

  void declaration(std::string_view word) {
    bool is_extern = false;
    while (word == "visible" || word == "extern" || word == "weak" || word == "common") {
      is_extern |= word == "extern";
      word = directive();
    }
    if (word == "entry" || word == "func") {
      function(word == "entry");
    } else if (word == "global" || word == "const" || word == "shared") {
      variables(word, is_extern, module_.variables);
    } else if (word == "alias" || word == "pragma") {
      while (at_ < end_ && *at_ != ';') ++at_;
      expect(';');
    } else {
      fail("unknown directive ." + std::string(word));
    }
  }

  // After the space directive: attributes, type, declarators.
  void variables(std::string_view space, bool is_extern, std::vector<PtxVariable>& out) {
    PtxVariable base;
    base.space = space;
    base.is_extern = is_extern;
    const PtxType type = variable_type(base);
    do {
      out.push_back(declarator(base, type));
    } while (accept(','));
    expect(';');
  }

  uint32_t vector_width_ = 1;
  PtxType variable_type(PtxVariable& variable) {
    vector_width_ = 1;
    for (;;) {
      const std::string_view word = directive();
      if (word == "align") {
        variable.alignment = static_cast<uint32_t>(integer());
      } else if (word == "v2" || word == "v4") {
        vector_width_ = word[1] - '0';
      } else if (word == "attribute") {
        while (at_ < end_ && *at_ != ')') ++at_;
        expect(')');
      } else if (word == "ptr") {
        // Only tells what a pointer parameter points to.
        while (peek('.')) {
          if (directive() == "align") integer();
        }
        return PtxType::kB64;
      } else {
        const PtxType type = parse_type(word);
        if (type == PtxType::kNone) fail("unknown type ." + std::string(word));
        if (variable.alignment == 1) variable.alignment = std::max(1u, type_bytes(type) * vector_width_);
        return type;
      }
    }
  }

  PtxVariable declarator(const PtxVariable& base, PtxType type) {
    PtxVariable variable = base;
    while (peek('.')) {  // .param .u64 .ptr .align 1 name
      if (directive() == "align") integer();
    }
    variable.name = name();
    const uint64_t element = uint64_t(type_bytes(type)) * vector_width_;
    uint64_t count = 1;
    bool open = false;
    while (accept('[')) {
      if (accept(']')) {
        open = true;
        continue;
      }
      const int64_t extent = integer();
      if (extent < 0 || extent > (int64_t(1) << 40)) fail("bad array size");
      count *= static_cast<uint64_t>(extent);
      expect(']');
    }
    variable.bytes = open ? 0 : element * count;
    if (accept('=')) {
      initializer(variable, element);
      if (open) variable.bytes = variable.data.size();
      if (variable.data.size() > variable.bytes) fail("initialiser longer than the variable");
    }
    return variable;
  }

  void initializer(PtxVariable& variable, uint64_t element) {
    if (accept('{')) {
      while (!accept('}')) {
        initializer(variable, element);
        if (!accept(',') && !peek('}')) fail("expected ',' or '}'");
      }
      return;
    }
    const uint64_t offset = variable.data.size();
    skip_space();
    if (at_ < end_ && is_name_start(*at_)) {
      std::string_view symbol = name();
      if (symbol == "generic") {
        expect('(');
        symbol = name();
        expect(')');
      }
      const int64_t addend = peek('+') ? integer() : 0;
      variable.fixups.push_back({offset, symbol, addend});
      variable.data.resize(offset + element);
      return;
    }
    const PtxOperand value = number();
    uint64_t bits = static_cast<uint64_t>(value.value);
    variable.data.resize(offset + element);
    std::memcpy(variable.data.data() + offset, &bits, std::min<uint64_t>(element, 8));
  }

  std::vector<PtxVariable> parameter_list() {
    std::vector<PtxVariable> list;
    expect('(');
    if (accept(')')) return list;
    do {
      const std::string_view space = directive();
      if (space != "param" && space != "reg") fail("expected .param");
      PtxVariable base;
      base.space = space;
      const PtxType type = variable_type(base);
      list.push_back(declarator(base, type));
    } while (accept(','));
    expect(')');
    return list;
  }

  void function(bool is_entry) {
    auto result = std::make_unique<PtxFunction>();
    function_ = result.get();
    function_->is_entry = is_entry;
    function_->line = line_;
    if (peek('(')) function_->results = parameter_list();
    function_->name = name();
    if (peek('(')) function_->params = parameter_list();
    while (peek('.')) {
      const std::string_view word = directive();
      uint32_t* triple = word == "reqntid"             ? function_->required_threads
                         : word == "maxntid"           ? function_->max_threads
                         : word == "reqnctapercluster" ? function_->required_cluster
                                                       : nullptr;
      if (triple) {
        for (int i = 0; i < 3; ++i) triple[i] = i == 0 || accept(',') ? static_cast<uint32_t>(integer()) : 1;
      } else if (word == "minnctapersm") {
        function_->min_ctas = static_cast<uint32_t>(integer());
      } else if (word == "maxnreg") {
        function_->max_registers = static_cast<uint32_t>(integer());
      } else if (word == "pragma") {
        quoted();
        expect(';');
      } else if (word == "maxnctapersm" || word == "maxclusterrank") {
        integer();
      } else if (word != "noreturn" && word != "explicitcluster" && word != "blocksareclusters") {
        fail("unknown directive ." + std::string(word));
      }
    }
    if (!accept(';')) {
      expect('{');
      function_->has_body = true;
      scopes_.clear();
      source_file_ = source_line_ = caller_file_ = caller_line_ = 0;
      block();
    }
    module_.functions.push_back(std::move(result));
    function_ = nullptr;
  }

  // ---- bodies ----

  void block() {
    scopes_.emplace_back();
    while (!accept('}')) {
      if (at_ >= end_) fail("function without end");
      if (accept('{')) {
        block();
      } else if (*at_ == '.') {
        body_directive();
      } else if (!label()) {
        instruction();
      }
    }
    close_scope();
  }

  void close_scope() {
    Scope scope = std::move(scopes_.back());
    scopes_.pop_back();
    for (const Scope::Use& use : scope.uses) {
      const auto found = scope.labels.find(use.name);
      if (found != scope.labels.end()) {
        if (use.instruction == UINT32_MAX) {
          PtxLabel& list = function_->labels[use.operand];
          list.branch_targets.push_back(found->second);
        } else {
          PtxOperand& operand = function_->body[use.instruction].operands[use.operand];
          operand.kind = PtxOperand::kLabel;
          operand.index = found->second;
        }
      } else if (!scopes_.empty()) {
        scopes_.back().uses.push_back(use);
      } else if (use.instruction == UINT32_MAX || function_->body[use.instruction].parts[0] == "bra") {
        line_ = use.line;
        fail("unknown label " + std::string(use.name));
      }
    }
  }

  void body_directive() {
    const std::string_view word = directive();
    if (word == "reg") {
      registers();
    } else if (word == "loc") {
      location();
    } else if (word == "shared" || word == "local" || word == "param") {
      variables(word, false, function_->variables);
    } else if (word == "pragma") {
      quoted();
      expect(';');
    } else {
      fail("unknown directive ." + std::string(word));
    }
  }

  void location() {
    source_file_ = static_cast<uint32_t>(integer());
    source_line_ = static_cast<uint32_t>(integer());
    caller_file_ = caller_line_ = 0;
    integer();
    const char* line_end = static_cast<const char*>(std::memchr(at_, '\n', end_ - at_));
    const std::string_view rest(at_, (line_end ? line_end : end_) - at_);
    const size_t inlined = rest.find("inlined_at ");
    if (inlined != std::string_view::npos) {
      at_ += inlined + 11;
      caller_file_ = static_cast<uint32_t>(integer());
      caller_line_ = static_cast<uint32_t>(integer());
    }
    until_line_end();
  }

  void registers() {
    const PtxType type = parse_type(directive());
    if (type == PtxType::kNone) fail("unknown register type");
    Scope& scope = scopes_.back();
    do {
      const std::string_view id = name();
      const uint32_t first = static_cast<uint32_t>(function_->registers.size());
      if (accept('<')) {
        const int64_t count = integer();
        if (count < 0 || count > 1 << 22) fail("bad register count");
        expect('>');
        scope.families.push_back({id, first, static_cast<uint32_t>(count)});
        for (int32_t i = 0; i < count; ++i) function_->registers.push_back({id, i, type});
      } else {
        scope.registers[id] = first;
        function_->registers.push_back({id, -1, type});
      }
    } while (accept(','));
    expect(';');
  }

  bool label() {
    const char* begin = at_;
    const uint32_t line = line_;
    if (!is_name_start(*at_)) return false;
    const std::string_view id = name();
    skip_space();
    if (at_ >= end_ || *at_ != ':' || (at_ + 1 < end_ && at_[1] == ':')) {
      at_ = begin;
      line_ = line;
      return false;
    }
    ++at_;
    const uint32_t index = static_cast<uint32_t>(function_->labels.size());
    function_->labels.push_back({id, static_cast<uint32_t>(function_->body.size()), {}});
    if (!scopes_.back().labels.emplace(id, index).second) fail("label defined twice");
    if (peek('.')) {
      const char* mark = at_;
      const std::string_view word = directive();
      if (word == "branchtargets") {
        do {
          scopes_.back().uses.push_back({UINT32_MAX, index, name(), line_});
        } while (accept(','));
        expect(';');
      } else if (word == "callprototype" || word == "calltargets") {
        while (at_ < end_ && *at_ != ';') ++at_;
        expect(';');
      } else {
        at_ = mark;
      }
    }
    return true;
  }

  bool find_register(std::string_view id, uint32_t& index) const {
    for (size_t s = scopes_.size(); s-- > 0;) {
      const Scope& scope = scopes_[s];
      const auto found = scope.registers.find(id);
      if (found != scope.registers.end()) {
        index = found->second;
        return true;
      }
      size_t digits = id.size();
      while (digits > 0 && is_digit(id[digits - 1])) --digits;
      if (digits == id.size()) continue;
      for (const Scope::Family& family : scope.families) {
        // The prefix may itself end in digits, so compare it rather than split the name.
        if (id.size() <= family.prefix.size() || id.substr(0, family.prefix.size()) != family.prefix) continue;
        const std::string_view tail = id.substr(family.prefix.size());
        uint32_t number = 0;
        const auto [next, error] = std::from_chars(tail.data(), tail.data() + tail.size(), number);
        if (error == std::errc() && next == tail.data() + tail.size() && number < family.count) {
          index = family.first + number;
          return true;
        }
      }
    }
    return false;
  }

  void instruction() {
    PtxInstruction in;
    in.line = line_;
    in.source_file = source_file_;
    in.source_line = source_line_;
    in.caller_file = caller_file_;
    in.caller_line = caller_line_;
    if (accept('@')) {
      in.guard_negated = accept('!');
      uint32_t index = 0;
      if (!find_register(name(), index)) fail("unknown predicate");
      in.guard = static_cast<int32_t>(index);
    }
    skip_space();
    const char* begin = at_;
    if (at_ >= end_ || !is_name_start(*at_)) fail("expected an instruction");
    while (at_ < end_ && (is_name_char(*at_) || *at_ == '.' || *at_ == ':')) ++at_;
    in.opcode = {begin, static_cast<size_t>(at_ - begin)};
    for (size_t i = 0; i <= in.opcode.size();) {
      const size_t dot = std::min(in.opcode.find('.', i), in.opcode.size());
      in.parts.push_back(in.opcode.substr(i, dot - i));
      i = dot + 1;
    }
    if (!accept(';')) {
      do {
        in.operands.push_back(operand());
      } while (accept(','));
      expect(';');
    }
    const uint32_t index = static_cast<uint32_t>(function_->body.size());
    for (uint32_t i = 0; i < in.operands.size(); ++i) {
      const PtxOperand& o = in.operands[i];
      if (o.kind == PtxOperand::kSymbol) scopes_.back().uses.push_back({index, i, o.name, in.line});
    }
    function_->body.push_back(std::move(in));
  }

  PtxOperand operand() {
    PtxOperand result = primary();
    if (peek('|')) {
      ++at_;
      PtxOperand pair;
      pair.kind = PtxOperand::kPair;
      pair.items.push_back(std::move(result));
      pair.items.push_back(primary());
      return pair;
    }
    return result;
  }

  PtxOperand primary() {
    skip_space();
    if (at_ >= end_) fail("expected an operand");
    PtxOperand result;
    if (accept('[')) {
      result.kind = PtxOperand::kAddress;
      result.items.push_back(primary());
      PtxOperand& base = result.items[0];
      if (base.kind == PtxOperand::kSymbol) std::swap(result.value, base.value);
      while (peek('+') || peek('-')) {
        if (*at_ == '+') ++at_;
        result.value += integer();
      }
      while (accept(',')) result.items.push_back(primary());
      expect(']');
      return result;
    }
    if (accept('{') || accept('(')) {
      const char close = at_[-1] == '{' ? '}' : ')';
      result.kind = close == '}' ? PtxOperand::kVector : PtxOperand::kList;
      while (!accept(close)) {
        result.items.push_back(operand());
        if (!accept(',') && !peek(close)) fail("expected ','");
      }
      return result;
    }
    if (accept('!')) {
      result = primary();
      result.negated = true;
      return result;
    }
    if (!is_name_start(*at_)) return number();
    const std::string_view id = name();
    if (id == "_") {
      result.kind = PtxOperand::kSink;
    } else if (find_register(id, result.index)) {
      result.kind = PtxOperand::kRegister;
    } else if (id[0] == '%') {
      result.kind = PtxOperand::kSpecial;
      result.name = id;
    } else {
      result.kind = PtxOperand::kSymbol;
      result.name = id;
      skip_space();
      if (at_ < end_ && *at_ == '+') {
        ++at_;
        result.value = integer();
      }
    }
    return result;
  }

  PtxModule& module_;
  const std::string& name_;
  const char* at_;
  const char* end_;
  uint32_t line_ = 1;
  PtxFunction* function_ = nullptr;
  std::vector<Scope> scopes_;
  uint32_t source_file_ = 0, source_line_ = 0, caller_file_ = 0, caller_line_ = 0;
};

}  // namespace

bool PtxInstruction::has(std::string_view part) const {
  for (size_t i = 1; i < parts.size(); ++i) {
    if (parts[i] == part) return true;
  }
  return false;
}

std::unique_ptr<PtxModule> parse_ptx(std::string text, const std::string& module_name) {
  auto module = std::make_unique<PtxModule>();
  while (!text.empty() && text.back() == '\0') text.pop_back();
  module->text = std::move(text);
  Parser(*module, module_name).run();
  return module;
}

}  // namespace flash_ext::emulator
