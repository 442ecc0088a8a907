// The table of kinds as those read it who plan and run no rules.
#pragma once
#define METAFAST_NAMESPACE metafast::planning
#include "../kinds.h"

namespace metafast {

using planning::facts;
using planning::Features;

}  // namespace metafast
