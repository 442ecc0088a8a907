// From the description of a model to a Program with its tables and memory, for one layout of packs and panels.
#pragma once
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "layout.h"
#include "../program.h"
#include "tables.h"

namespace metafast {

// Owns everything that a Program and its passes point to.
class Plan {
 public:
  // `description` is what metafast/executors/native/encode.py writes. Throws std::runtime_error with the reason where
  // the model cannot be run.
  Plan(const std::vector<double>& description, Layout layout, int element_size);
  Plan(const Plan&) = delete;

  const Program& program() const { return program_; }
  // Where a pass over n samples keeps things; planned once and kept.
  const PassLayout& pass_layout(int n, PassKind kind);
  // Does the loss read labels [n], and not targets of the outputs' shape?
  bool reads_labels() const;
  // [P]: where an element of the user's vector lies in the inner one. Where several blocks share the weights, their
  // inner vectors count as one row.
  const std::vector<int32_t>& inner() const { return inner_; }
  // [P] and inner [size]: is the element adapted?
  const std::vector<uint8_t>& adapted() const { return adapted_; }
  const std::vector<uint8_t>& moved() const { return moved_; }
  // Running means and variances as rules read them, made of the user's, which are those of all layers in a row.
  template <class T>
  std::vector<T> constants(const T* given) const {
    std::vector<T> out(constants_size_, T(1));
    for (const Constants& c : constants_) {
      for (int row = 0; row < 2; ++row) {
        for (int i = 0; i < c.ld; ++i) out[c.at + row * c.ld + i] = i < c.c ? given[c.from + row * c.c + i] : T(row);
      }
    }
    return out;
  }

 private:
  friend class PlanBuilder;

  struct Constants {
    int64_t from, at;
    int32_t c, ld;
  };

  struct OwnedPassLayout {
    std::vector<int64_t> value, adjoint, saved, tangent, d_adjoint;
    PassLayout layout;
  };

  // Does it multiply what no parameter changes? Then it is linear in its weights, and its tangent rules read neither
  // them nor the adjoint of what it makes.
  bool multiplies_constants(const Op& op) const;
  void build_pass_layout(int n, PassKind kind, OwnedPassLayout& out) const;

  Layout layout_;
  int element_size_;
  Program program_{};
  std::vector<Op> ops_;
  std::vector<Grid> grids_;  // by value
  std::unique_ptr<bool[]> moving_, depends_;
  std::vector<int32_t> inner_;
  std::vector<uint8_t> adapted_, moved_;  // [P] and inner [size]: is the element adapted?
  std::vector<Constants> constants_;
  int64_t constants_size_ = 0;
  Tables tables_;
  std::mutex mutex_;  // guards layouts_
  std::map<std::pair<int, int>, std::unique_ptr<OwnedPassLayout>> layouts_;
};

}  // namespace metafast
