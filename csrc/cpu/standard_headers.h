// Everything the CPU kernels use of the standard library, included before csrc/cpu/isa/*.cpp choose their instruction
// set: so no template of the standard library is compiled for an instruction set that the machine may not have.
#pragma once

#include <algorithm>
#include <atomic>
#include <bitset>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "adasplash2.h"
#include "cpu/isa.h"
#include "cpu/page_cache.h"
#include "error.h"
