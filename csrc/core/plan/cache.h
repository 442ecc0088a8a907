// The plans made lately: a model is planned once for each layout and type, not once for each call.
#pragma once
#include "plan.h"

namespace metafast {

// The plan of the model in numbers (description.h). Throws std::runtime_error where the model cannot be run.
std::shared_ptr<Plan> find_plan(const std::vector<double>& description, Layout layout, int element_size);

}  // namespace metafast
