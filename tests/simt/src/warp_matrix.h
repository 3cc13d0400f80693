// Matrix instructions of one warp: mma.sync, ldmatrix, stmatrix.
#pragma once

#include "ptx.h"

namespace simt {

void execute_mma_k16(const PtxCall& call);  // parameter: MatrixElement
void execute_mma_k8_tf32(const PtxCall& call);

// Parameter of both: the number of matrices, plus kTransposed.
constexpr int kTransposed = 256;
void execute_ldmatrix(const PtxCall& call);
void execute_stmatrix(const PtxCall& call);

}  // namespace simt
