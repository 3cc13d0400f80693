// The interpreter of inline PTX: parses a statement once, checks its operands' shape, and calls the instruction.
#pragma once

#include <simt_api.h>

#include <cstring>
#include <string>
#include <vector>

#include "report.h"

namespace simt {

struct PtxCall;
using PtxHandler = void (*)(const PtxCall& call);

// An operand, found once: an asm operand of the wrapper, a register declared in the text, or a number.
struct OperandRef {
  enum Source { kAsm, kLocal, kImmediate } source;
  uint32_t value;  // index, index or number
};

struct PtxInstruction {
  const char* opcode;  // one pointer for each opcode: rendezvous() compares it
  PtxHandler handler;
  int parameter;                     // what the opcode says beside the operation: see ptx_opcodes.cpp
  std::vector<OperandRef> operands;  // in the order of the text, braces and brackets flattened
};

// One instruction about to be executed by the current thread.
struct PtxCall {
  const PtxInstruction* instruction;
  const Operand* asm_operands;
  uint64_t* locals;
  Site site;

  int parameter() const { return instruction->parameter; }
  uint64_t u64(int i) const {
    const OperandRef ref = instruction->operands[i];
    if (ref.source == OperandRef::kImmediate) return ref.value;
    if (ref.source == OperandRef::kLocal) return locals[ref.value];
    const Operand& operand = asm_operands[ref.value];
    if (!operand.is_address) return operand.bits;
    uint32_t word;
    std::memcpy(&word, reinterpret_cast<const void*>(operand.bits), sizeof word);
    return word;
  }
  uint32_t u32(int i) const { return static_cast<uint32_t>(u64(i)); }
  int32_t s32(int i) const { return static_cast<int32_t>(u32(i)); }
  float f32(int i) const {
    const uint32_t bits = u32(i);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  // The variable behind an output operand.
  void* address(int i) const { return reinterpret_cast<void*>(asm_operands[instruction->operands[i].value].bits); }
  void set_u32(int i, uint32_t value) const {
    if (instruction->operands[i].source == OperandRef::kLocal) {
      locals[instruction->operands[i].value] = value;
    } else {
      std::memcpy(address(i), &value, sizeof value);
    }
  }
  void set_f32(int i, float value) const { std::memcpy(address(i), &value, sizeof value); }
};

// An instruction that the emulator knows. `shape` is its operand list with every leaf replaced by its kind:
// r, l, f as in asm, n a number, p a predicate, _ the sink; for example "[r],[l],n,r".
struct PtxOpcode {
  std::string shape;
  PtxHandler handler;
  int parameter;
};
// The forms of an instruction, by its full name; null if there is none. *interned_name is the table's copy of the name.
const std::vector<PtxOpcode>* find_opcodes(const std::string& name, const char** interned_name);

}  // namespace simt
