#include "facts.h"

#include <cstddef>
#include <vector>

#include "../core/plan/planned_kinds.h"
#include "../core/trace.h"
#include "../cuda/block_job.h"

namespace metafast {

namespace {

std::string quoted(const std::string& name) { return '"' + name + '"'; }

std::string list(const std::vector<std::string>& values) {
  std::string text;
  for (const std::string& value : values) text += (text.empty() ? "" : ", ") + value;
  return "[" + text + "]";
}

// Values under their names.
class Table {
 public:
  void add(const std::string& name, const std::string& value) {
    text_ += (text_.empty() ? "" : ", ") + quoted(name) + ": " + value;
  }
  void add(const std::string& name, size_t value) { add(name, std::to_string(value)); }
  std::string text() const { return "{" + text_ + "}"; }

 private:
  std::string text_;
};

#define METAFAST_QUOTED(name, ...) quoted(#name),

// The number of each kind that a node of a model can have.
Table kinds() {
  Table table;
#define METAFAST_NUMBER(kind, ...) table.add(#kind, static_cast<size_t>(Kind::kind));
  METAFAST_KINDS(METAFAST_NUMBER)
  METAFAST_OTHER_NODES(METAFAST_NUMBER)
#undef METAFAST_NUMBER
  table.add("flatten", static_cast<size_t>(Kind::flatten));
  return table;
}

// The number of each loss, and what it reads.
Table losses() {
  const std::vector<std::string> reads{"labels", "targets", "gradient"};
  Table table;
  const auto add = [&](LossKind kind) {
    Table loss;
    loss.add("number", static_cast<size_t>(kind));
    loss.add("reads", quoted(reads[static_cast<size_t>(facts(kind).reads)]));
    table.add(facts(kind).name, loss.text());
  };
#define METAFAST_LOSS(kind, ...) add(LossKind::kind);
  METAFAST_LOSSES(METAFAST_LOSS)
#undef METAFAST_LOSS
  return table;
}

// The rules of inner steps: the number of each, how many hyper-parameters it has, and the place of weight decay among
// them.
Table steps() {
  Table table;
#define METAFAST_STEP(kind, formula, names, decay)           \
  {                                                          \
    Table step;                                              \
    step.add("number", static_cast<size_t>(StepKind::kind)); \
    step.add("names", static_cast<size_t>(names));           \
    step.add("decay", static_cast<size_t>(decay));           \
    table.add(#kind, step.text());                           \
  }
  METAFAST_STEP_RULES(METAFAST_STEP)
#undef METAFAST_STEP
  return table;
}

// A Span as numpy describes a record, and what spans are about.
Table spans() {
  std::vector<std::string> names, formats, offsets;
#define METAFAST_FIELD(field)                                           \
  names.push_back(quoted(#field));                                      \
  formats.push_back(quoted("i" + std::to_string(sizeof(Span::field)))); \
  offsets.push_back(std::to_string(offsetof(Span, field)));
  METAFAST_FIELD(begin)
  METAFAST_FIELD(end)
  METAFAST_FIELD(kind)
  METAFAST_FIELD(index)
  METAFAST_FIELD(task)
  METAFAST_FIELD(tasks)
  METAFAST_FIELD(thread)
#undef METAFAST_FIELD
  Table record, table;
  record.add("names", list(names));
  record.add("formats", list(formats));
  record.add("offsets", list(offsets));
  record.add("itemsize", sizeof(Span));
  table.add("record", record.text());
  table.add("phases", list({METAFAST_PHASES(METAFAST_QUOTED)}));
  table.add("rules", list({METAFAST_RULES(METAFAST_QUOTED)}));
  return table;
}

}  // namespace

std::string facts_as_json() {
  Table table;
  table.add("kinds", kinds().text());
  table.add("losses", losses().text());
  table.add("spans", spans().text());
  table.add("precisions", list({METAFAST_PRECISIONS(METAFAST_QUOTED)}));
  table.add("launch_settings", list({METAFAST_LAUNCH_SETTINGS(METAFAST_QUOTED)}));
  table.add("loop_settings", list({METAFAST_LOOP_SETTINGS(METAFAST_QUOTED)}));
  table.add("steps", steps().text());
  table.add("memory_numbers", list({METAFAST_MEMORY_NUMBERS(METAFAST_QUOTED)}));
  return table.text();
}

}  // namespace metafast
