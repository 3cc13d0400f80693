// The entry points alone: on a GPU the instances are compiled beside them, one process each.
#include "api.h"
#include "entmax_api.h"
