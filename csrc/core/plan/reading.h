// Who reads what in a description, and what that asks of the model's input.
#pragma once
#include <vector>

#include "description.h"
#include "layout.h"

namespace metafast {

class Reading {
 public:
  explicit Reading(const Description& given);

  // Does what node k makes reach the output?
  bool lives(size_t k) const { return live[k]; }
  // Does another node read a parameter of this one too? Then it must lie as that one wants it.
  bool shares(const Node& n) const;

 private:
  std::vector<bool> live;
  std::vector<int> readers;  // by parameter: live nodes
};

// How the model's input lies in memory.
struct InputPlacement {
  bool packed;             // without padding channels
  int border_y, border_x;  // of zeros around it
};

// The input is stored without padding channels where only contractions with weights of their own read it, and with a
// border of zeros where they all want the same one. Throws std::runtime_error where the input is the output.
InputPlacement chosen_input(const Description& given, const Reading& reading, const Layout& layout);

}  // namespace metafast
