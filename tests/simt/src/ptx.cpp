#include "ptx.h"

#include <cctype>
#include <cstdlib>
#include <map>

#include "scheduler.h"

namespace simt {

namespace {

constexpr int kMaxLocals = 4;

struct Program {
  std::vector<PtxInstruction> instructions;
};

std::string trimmed(const std::string& text) {
  const char* kBlank = " \t\n";
  const size_t first = text.find_first_not_of(kBlank);
  if (first == std::string::npos) return "";
  return text.substr(first, text.find_last_not_of(kBlank) - first + 1);
}

class Parser {
 public:
  Parser(const char* text, const Operand* operands, int num_operands, Site site)
      : text_(text), operands_(operands), num_operands_(num_operands), site_(site), is_used_(num_operands, false) {}

  Program parse() {
    Program program;
    std::string rest = trimmed(text_);
    if (!rest.empty() && rest.front() == '{') {
      if (rest.back() != '}') reject("unbalanced braces");
      rest = rest.substr(1, rest.size() - 2);
    }
    while (!(rest = trimmed(rest)).empty()) {
      const size_t end = rest.find(';');
      if (end == std::string::npos) reject("a statement lacks its semicolon");
      parse_statement(trimmed(rest.substr(0, end)), program);
      rest = rest.substr(end + 1);
    }
    for (int i = 0; i < num_operands_; ++i) {
      if (!is_used_[i]) reject("operand %" + std::to_string(i) + " is not used");
    }
    return program;
  }

 private:
  [[noreturn]] void reject(const std::string& reason) const {
    fail("PTX at %s: %s, in \"%s\"", source_line(site_).c_str(), reason.c_str(), text_);
  }

  void parse_statement(const std::string& statement, Program& program) {
    const size_t blank = statement.find_first_of(" \t\n");
    const std::string name = statement.substr(0, blank);
    const std::string rest = blank == std::string::npos ? "" : trimmed(statement.substr(blank));
    if (name == ".reg") {
      declare(rest);
      return;
    }
    PtxInstruction instruction{};
    const std::vector<PtxOpcode>* forms = find_opcodes(name, &instruction.opcode);
    if (forms == nullptr) reject("the emulator knows no instruction " + name);
    const std::string shape = parse_operands(rest, instruction.operands);
    std::string known_shapes;
    for (const PtxOpcode& form : *forms) {
      if (form.shape == shape) {
        instruction.handler = form.handler;
        instruction.parameter = form.parameter;
        program.instructions.push_back(std::move(instruction));
        return;
      }
      known_shapes += (known_shapes.empty() ? "" : " or ") + form.shape;
    }
    reject(name + " takes the operands " + known_shapes + ", not " + shape);
  }

  void declare(const std::string& declaration) {
    const size_t blank = declaration.find(' ');
    if (blank == std::string::npos || declaration.substr(0, blank) != ".pred") reject("only .pred registers are known");
    locals_.push_back(trimmed(declaration.substr(blank)));
    if (locals_.size() > kMaxLocals) reject("too many registers");
  }

  // Replaces every leaf by its kind and drops blanks, and commas inside braces.
  std::string parse_operands(const std::string& text, std::vector<OperandRef>& operands) {
    std::string shape;
    bool is_in_braces = false;
    for (size_t i = 0; i < text.size();) {
      const char c = text[i];
      if (std::isspace(static_cast<unsigned char>(c))) {
        ++i;
      } else if (std::strchr("[]{}|,", c) != nullptr) {
        if (c == '{') is_in_braces = true;
        if (c == '}') is_in_braces = false;
        if (c != ',' || !is_in_braces) shape += c;
        ++i;
      } else {
        size_t end = i;
        while (end < text.size() && std::strchr("[]{}|, \t\n", text[end]) == nullptr) ++end;
        shape += parse_leaf(text.substr(i, end - i), operands);
        i = end;
      }
    }
    return shape;
  }

  char parse_leaf(const std::string& leaf, std::vector<OperandRef>& operands) {
    if (leaf == "_") return '_';
    if (leaf[0] == '%') {
      const int index = std::atoi(leaf.c_str() + 1);
      if (index >= num_operands_) reject("operand " + leaf + " does not exist");
      is_used_[index] = true;
      operands.push_back({OperandRef::kAsm, static_cast<uint32_t>(index)});
      return operands_[index].constraint;
    }
    if (std::isdigit(static_cast<unsigned char>(leaf[0]))) {
      operands.push_back({OperandRef::kImmediate, static_cast<uint32_t>(std::strtoul(leaf.c_str(), nullptr, 0))});
      return 'n';
    }
    for (size_t i = 0; i < locals_.size(); ++i) {
      if (locals_[i] != leaf) continue;
      operands.push_back({OperandRef::kLocal, static_cast<uint32_t>(i)});
      return 'p';
    }
    reject("\"" + leaf + "\" is not declared");
  }

  const char* text_;
  const Operand* operands_;
  int num_operands_;
  Site site_;
  std::vector<bool> is_used_;
  std::vector<std::string> locals_;
};

}  // namespace

void execute_ptx(PtxStatement& statement, const Operand* operands, int num_operands, const void* site) {
  if (statement.program == nullptr) {
    statement.program = new Program(Parser(statement.text, operands, num_operands, site).parse());
  }
  uint64_t locals[kMaxLocals];
  for (const PtxInstruction& instruction : static_cast<const Program*>(statement.program)->instructions) {
    instruction.handler(PtxCall{&instruction, operands, locals, site});
  }
}

}  // namespace simt
