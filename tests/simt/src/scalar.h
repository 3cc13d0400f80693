// Instructions of single threads and small warp operations: predicates, conversions, elect, setmaxnreg.
#pragma once

#include "ptx.h"

namespace simt {

void execute_setp_ne(const PtxCall& call);
void execute_selp(const PtxCall& call);
void execute_cvt_bf16x2(const PtxCall& call);
void execute_cvt_f16x2(const PtxCall& call);
void execute_cvt_f16x2_relu(const PtxCall& call);
void execute_cvt_tf32(const PtxCall& call);
void execute_max_nan(const PtxCall& call);
void execute_elect(const PtxCall& call);
void execute_setmaxnreg(const PtxCall& call);

}  // namespace simt
