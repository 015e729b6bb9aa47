// PTX text into instructions that machine.h can run: the parts of the language that nvcc and Triton made of our
// kernels. Anything else is an error that quotes it.
#pragma once

#include <cctype>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {

struct Type {
  char kind = 'b';  // b, u, s, f, p (predicate), h (bfloat16)
  int bits = 32;
};

enum class Special { kTid, kNtid, kCtaid, kNctaid, kLane, kCount };

struct Operand {
  enum Kind : uint8_t { kNone, kRegister, kImmediate, kSpecial } kind = kNone;
  uint64_t value = 0;  // the register's number, the bits, or the special register's
};

struct Instruction {
  std::string text, op;
  std::vector<std::string> modifiers;
  std::vector<Type> types;  // as in its name, from left to right
  std::vector<Operand> out, in;
  int64_t offset = 0;  // of an address
  int predicate = -1;
  bool negated = false;
  int target = -1;
  int code = 0;  // the machine's

  bool has(const char* modifier) const {
    for (const std::string& m : modifiers)
      if (m == modifier) return true;
    return false;
  }
};

struct Kernel {
  std::vector<Instruction> code;
  std::vector<int> parameter_offsets, parameter_sizes;
  int parameter_bytes = 0, registers = 0, shared_bytes = 0;
};

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error("PTX: " + what); }

enum Code {
  kMov,
  kAdd,
  kSub,
  kMul,
  kMad,
  kFma,
  kDiv,
  kRem,
  kNeg,
  kAbs,
  kMin,
  kMax,
  kAnd,
  kOr,
  kXor,
  kNot,
  kShl,
  kShr,
  kSetp,
  kSelp,
  kCvt,
  kCvta,
  kLd,
  kSt,
  kBra,
  kRet,
  kBar,
  kShfl,
  kEx2,
  kRcp,
  kSqrt,
  kBfe,
  kBfi,
  kPrmt,
  kLdmatrix,
  kStmatrix,
};  // clang-format off
inline int code_of(const Instruction& i) {
  static const std::map<std::string, int> kCodes = {
      {"mov", kMov}, {"add", kAdd}, {"sub", kSub}, {"mul", kMul}, {"mad", kMad}, {"fma", kFma}, {"div", kDiv},
      {"rem", kRem}, {"neg", kNeg}, {"abs", kAbs}, {"min", kMin}, {"max", kMax}, {"and", kAnd}, {"or", kOr},
      {"xor", kXor}, {"not", kNot}, {"shl", kShl}, {"shr", kShr}, {"setp", kSetp}, {"selp", kSelp}, {"cvt", kCvt},
      {"cvta", kCvta}, {"ld", kLd}, {"st", kSt}, {"bra", kBra}, {"ret", kRet}, {"exit", kRet}, {"bar", kBar},
      {"barrier", kBar}, {"shfl", kShfl}, {"ex2", kEx2}, {"rcp", kRcp}, {"sqrt", kSqrt}, {"bfe", kBfe}, {"bfi", kBfi},
      {"prmt", kPrmt}, {"ldmatrix", kLdmatrix}, {"stmatrix", kStmatrix}};
  const auto found = kCodes.find(i.op);
  if (found == kCodes.end()) fail("cannot run " + i.text);
  return found->second;
}  // clang-format on

inline std::string trimmed(const std::string& s) {
  size_t a = s.find_first_not_of(" \t\n\r"), b = s.find_last_not_of(" \t\n\r");
  return a == std::string::npos ? "" : s.substr(a, b - a + 1);
}
inline bool starts(const std::string& s, const char* with) { return s.rfind(with, 0) == 0; }

// Parts at commas outside brackets.
inline std::vector<std::string> split(const std::string& s, char at) {
  std::vector<std::string> parts;
  std::string part;
  int depth = 0;
  for (char c : s) {
    depth += (c == '{' || c == '[' || c == '(') - (c == '}' || c == ']' || c == ')');
    if (c == at && depth == 0) {
      parts.push_back(trimmed(part));
      part.clear();
    } else {
      part += c;
    }
  }
  if (!trimmed(part).empty() || !parts.empty()) parts.push_back(trimmed(part));
  return parts;
}

// `.align 8 .b8 name[64]` or `.u64 .ptr .global .align 1 name`: how many bytes, on which boundary, and the name.
struct Declared {
  int bytes = 0, align = 1;
  std::string name;
};
inline Declared declared(const std::string& text) {
  Declared d;
  int size = 0, count = 1;
  std::string word;
  std::vector<std::string> words;
  for (char c : text + " ") {
    if (!isspace(c)) {
      word += c;
    } else if (!word.empty()) {
      words.push_back(word);
      word.clear();
    }
  }
  bool pointer = false;
  for (size_t i = 0; i < words.size(); ++i) {
    const std::string& w = words[i];
    pointer = pointer || w == ".ptr";
    if (w == ".align") {
      const int align = atoi(words[++i].c_str());
      if (!pointer) d.align = align;  // else it is that of what it points to
    } else if (w.size() > 2 && w[0] == '.' && isdigit(w[2])) {
      size = atoi(w.c_str() + 2) / 8;
    } else if (w[0] != '.') {
      const size_t bracket = w.find('[');
      d.name = w.substr(0, bracket);
      if (bracket != std::string::npos) count = atoi(w.c_str() + bracket + 1);
    }
  }
  d.bytes = size * count;
  if (d.align < size) d.align = size;
  return d;
}

class Program {
 public:
  explicit Program(const std::string& text) : text_(without_comments(text)) {
    // Shared memory of the module comes first in every kernel's.
    for (size_t at = text_.find(".entry"); at != std::string::npos; at = text_.find(".entry", at + 1)) {
      const size_t name = text_.find_first_not_of(" \t\n", at + 6), open = text_.find('(', name);
      bodies_[trimmed(text_.substr(name, open - name))] = open;
    }
    int depth = 0;
    std::string statement;
    for (char c : text_) {
      depth += (c == '{') - (c == '}');
      if (depth > 0) continue;
      if (c == ';' || c == '}') {
        const size_t shared = statement.find(".shared");
        if (shared != std::string::npos) place(module_shared_, module_bytes_, statement.substr(shared + 7));
        statement.clear();
      } else {
        statement += c;
      }
    }
  }

  const Kernel& kernel(const std::string& name) {
    auto found = kernels_.find(name);
    if (found != kernels_.end()) return found->second;
    auto body = bodies_.find(name);
    if (body == bodies_.end()) fail("no kernel is called " + name);
    return kernels_[name] = parse(body->second);
  }

 private:
  static std::string without_comments(const std::string& text) {
    std::string out;
    for (size_t i = 0; i < text.size(); ++i) {
      if (text[i] == '/' && text[i + 1] == '/') {
        while (i < text.size() && text[i] != '\n') ++i;
        out += '\n';
      } else if (text[i] == '/' && text[i + 1] == '*') {
        i = text.find("*/", i) + 1;
      } else {
        out += text[i];
      }
    }
    return out;
  }

  static void place(std::map<std::string, int>& symbols, int& bytes, const std::string& declaration) {
    const Declared d = declared(declaration);
    bytes = (bytes + d.align - 1) / d.align * d.align;
    symbols[d.name] = bytes;
    bytes += d.bytes;
  }

  // One kernel's, from its parameters' bracket on.
  struct Scope {
    std::set<std::string> names;
    std::string prefix;
  };

  Kernel parse(size_t at) {
    Kernel k;
    symbols_ = module_shared_;
    k.shared_bytes = module_bytes_;
    registers_.clear();
    scopes_.assign(1, Scope{});
    std::map<std::string, int> parameters, labels;
    size_t close = text_.find(')', at), open = text_.find('{', close);
    for (const std::string& p : split(text_.substr(at + 1, close - at - 1), ',')) {
      if (p.empty()) continue;
      place(parameters, k.parameter_bytes, p.substr(p.find(".param") + 6));
      const Declared d = declared(p.substr(p.find(".param") + 6));
      k.parameter_offsets.push_back(parameters[d.name]);
      k.parameter_sizes.push_back(d.bytes);
    }
    for (const auto& [name, offset] : parameters) symbols_[name] = offset;

    std::vector<std::string> targets;
    std::string statement;
    int scope = 0;
    for (size_t i = open + 1;; ++i) {
      const char c = text_.at(i);
      const bool fresh = trimmed(statement).empty();
      if (fresh && c == '{') {
        scopes_.push_back(Scope{{}, std::to_string(++scope) + ":"});
      } else if (fresh && c == '}') {
        scopes_.pop_back();
        if (scopes_.empty()) break;
      } else if (c == ';') {
        const std::string s = trimmed(statement);
        statement.clear();
        if (starts(s, ".reg")) {
          for (const std::string& name : split(trimmed(s.substr(s.find_first_of(" \t", 5))), ','))
            if (name[0] != '%' || name.find('<') == std::string::npos) scopes_.back().names.insert(name);
        } else if (starts(s, ".shared")) {
          place(symbols_, k.shared_bytes, s.substr(7));
        } else if (!starts(s, ".")) {
          targets.emplace_back();
          k.code.push_back(instruction(s, targets.back()));
        }
      } else if (c == ':' && trimmed(statement).find(' ') == std::string::npos) {
        labels[trimmed(statement)] = int(k.code.size());
        statement.clear();
      } else if (c == '\n' && starts(trimmed(statement), ".") && !starts(trimmed(statement), ".reg") &&
                 !starts(trimmed(statement), ".shared")) {
        statement.clear();  // a directive that ends with its line
      } else {
        statement += c;
      }
    }
    for (size_t i = 0; i < k.code.size(); ++i) {
      k.code[i].code = code_of(k.code[i]);
      if (targets[i].empty()) continue;
      if (!labels.count(targets[i])) fail("no label " + targets[i]);
      k.code[i].target = labels[targets[i]];
    }
    k.registers = int(registers_.size());
    return k;
  }

  int number_of(const std::string& name) {
    std::string full = name;
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope)
      if (scope->names.count(name)) {
        full = scope->prefix + name;
        break;
      }
    return registers_.emplace(full, int(registers_.size())).first->second;
  }
  bool is_register(const std::string& name) const {
    if (name[0] == '%') return true;
    for (const Scope& scope : scopes_)
      if (scope.names.count(name)) return true;
    return false;
  }

  Operand operand(const std::string& s) {
    static const std::map<std::string, Special> kSpecials = {
        {"%tid", Special::kTid}, {"%ntid", Special::kNtid}, {"%ctaid", Special::kCtaid}, {"%nctaid", Special::kNctaid}};
    if (s == "_") return Operand{};
    if (s == "%laneid") return Operand{Operand::kSpecial, uint64_t(Special::kLane) * 4};
    const auto special = kSpecials.find(s.substr(0, s.find('.')));
    if (special != kSpecials.end())
      return Operand{Operand::kSpecial, uint64_t(special->second) * 4 + uint64_t(s.back() - 'x')};
    if (is_register(s)) return Operand{Operand::kRegister, uint64_t(number_of(s))};
    if (starts(s, "0f") || starts(s, "0d")) return Operand{Operand::kImmediate, strtoull(s.c_str() + 2, nullptr, 16)};
    if (isdigit(s[0]) || s[0] == '-')
      return Operand{Operand::kImmediate,
                     s[0] == '-' ? uint64_t(strtoll(s.c_str(), nullptr, 0)) : strtoull(s.c_str(), nullptr, 0)};
    const auto symbol = symbols_.find(s);
    if (symbol != symbols_.end()) return Operand{Operand::kImmediate, uint64_t(symbol->second)};
    fail("what is " + s + "?");
  }

  Instruction instruction(const std::string& s, std::string& target) {
    Instruction i;
    i.text = s;
    std::string rest = s;
    if (s[0] == '@') {
      const size_t end = s.find_first_of(" \t");
      i.negated = s[1] == '!';
      i.predicate = number_of(s.substr(1 + i.negated, end - 1 - i.negated));
      rest = trimmed(s.substr(end));
    }
    const size_t end = rest.find_first_of(" \t");
    const std::string name = rest.substr(0, end);
    for (const std::string& part : split(name, '.')) {
      if (i.op.empty()) {
        i.op = part;
      } else if (part == "pred") {
        i.types.push_back(Type{'p', 64});
      } else if (part == "bf16" || part == "bf16x2") {
        i.types.push_back(Type{'h', part == "bf16" ? 16 : 32});
      } else if (part == "f16x2") {
        i.types.push_back(Type{'f', -32});
      } else if (part.size() > 1 && isdigit(part[1]) && strchr("busf", part[0])) {
        i.types.push_back(Type{part[0], atoi(part.c_str() + 1)});
      } else {
        i.modifiers.push_back(part);
      }
    }
    if (end == std::string::npos) return i;
    std::vector<std::string> operands = split(trimmed(rest.substr(end)), ',');
    if (i.op == "bra") {
      target = operands.at(0);
      return i;
    }
    const bool no_result = i.op == "st" || i.op == "stmatrix" || i.op == "bar" || i.op == "barrier";
    for (size_t k = 0; k < operands.size(); ++k) {
      const bool result = k == 0 && !no_result;
      std::vector<Operand>& into = result ? i.out : i.in;
      std::string o = operands[k];
      if (o[0] == '[') {
        o = trimmed(o.substr(1, o.size() - 2));
        const size_t plus = o.find('+');
        into.push_back(operand(trimmed(o.substr(0, plus))));
        if (plus != std::string::npos) i.offset = strtoll(trimmed(o.substr(plus + 1)).c_str(), nullptr, 0);
      } else if (o[0] == '{') {
        for (const std::string& element : split(o.substr(1, o.size() - 2), ',')) into.push_back(operand(element));
      } else if (result && o.find('|') != std::string::npos) {
        for (const std::string& element : split(o, '|')) into.push_back(operand(element));
      } else {
        into.push_back(operand(o));
      }
    }
    return i;
  }

  std::string text_;
  std::map<std::string, size_t> bodies_;
  std::map<std::string, Kernel> kernels_;
  std::map<std::string, int> module_shared_, symbols_;
  int module_bytes_ = 0;
  std::unordered_map<std::string, int> registers_;
  std::vector<Scope> scopes_;
};

}  // namespace ptx
