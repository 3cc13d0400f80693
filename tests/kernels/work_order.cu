// The order of blocks alone, quick to build.
#include "work_order_api.h"
