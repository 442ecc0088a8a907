"""Says in words what runs a Program."""

from __future__ import annotations

from metafast.executors import Choice
from metafast.program import Program


def explained(program: Program, choice: Choice, backend: str) -> str:
    """Says which executor runs each layer, and why; ``backend`` is what the user asked for."""
    hows, memory = choice.plan.layers(), choice.plan.memory()
    width = max(len(n.name) for n in program.nodes)
    sizes = [sum(program.parameters[k].size for k in n.params) for n in program.nodes]
    lines = [f"executor: {choice.executor.name} (backend={backend!r})"]
    lines += [f"  passed over {name}: {reason}" for name, reason in choice.passed_over]
    for node, size, how in zip(program.nodes, sizes, hows, strict=True):
        label = getattr(node.layer, "label", node.layer.kind)
        lines.append(f"  {node.name:<{width}}  {label:<20} {size:>9,} parameters  {how}")
    moved = sum(p.size for p in program.parameters if p.adapted)
    loss, of_query = program.loss.label, program.query.loss.label
    loss += "" if program.query_loss is None else f", {of_query} on query sets"
    lines.append(f"  loss: {loss}; {moved:,} of {program.size:,} parameters are adapted")
    lines += [] if memory is None else [f"  memory of a meta-gradient: {memory}"]
    return "\n".join(lines)
