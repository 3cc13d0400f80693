// Operations of a warp: the lanes of a mask meet, the last one carries the operation out for all.
#pragma once

#include "scheduler.h"

namespace simt {

using LaneArguments = void* const*;  // by lane, null for lanes that take no part
using WarpOperation = void (*)(LaneArguments lanes, uint32_t mask);

// PTX's .aligned: all lanes execute the same instruction.
enum class Aligned { kNo, kYes };

// `what` names the operation: lanes that meet under different names, masks or (aligned) source lines diverge, an error.
void rendezvous(uint32_t mask, const char* what, void* argument, WarpOperation operation, Site site, Aligned aligned);

void reset_rendezvous();
void check_no_rendezvous_at_exit(const Thread& thread);

}  // namespace simt
