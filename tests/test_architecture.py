"""The house: rooms that lie above one another, one word for one thing."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "metafast"
# Imports go down only. The rooms of one line know nothing of each other, but for what their own line says.
FLOORS = (
    ("extras", "files", "machine", "terminal", "tasks", "kernels", "models"),
    ("program",),
    ("executors",),
    ("inner",),
    ("learners", "episodes"),
    ("training",),
    ("verification",),
    ("bench",),
    ("profile",),
    ("cli",),
)
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
WITHIN_A_FLOOR = {("machine", "extras"), ("files", "extras"), ("terminal", "extras")}
SOURCES = [p for p in sorted(PACKAGE.rglob("*.py")) if p.parent != PACKAGE or p.stem != "__init__"]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> list[str]:
    """The modules of metafast that a file imports, at its head or inside a function."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            of_root = node.module == "metafast"
            found += [f"metafast.{alias.name}" for alias in node.names] if of_root else [node.module]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return [name for name in found if name.split(".")[0] == "metafast"]


def test_every_room_has_its_floor():
    rooms = {room_of(p) for p in SOURCES}
    assert rooms - {"compat", "rl"} == set(FLOOR) - {"kernels"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    here = room_of(path)
    for name in imported(path):
        parts = name.split(".")
        assert len(parts) > 1, f"{path} imports the root package"
        there = parts[1]
        if there == "_C":
            assert here == "executors", f"{path} imports the extension past the executors"
            continue
        assert there in FLOOR, f"{path} imports {name}, which is a name of the root package"
        allowed = there == here or FLOOR[there] < FLOOR[here] or (here, there) in WITHIN_A_FLOOR
        assert allowed, f"{path}: {here} lies below {there}, which it imports"


def test_kernels_know_only_torch_and_themselves():
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        assert imported(path) == [], path


def test_nothing_installed_imports_benchmarks():
    for path in SOURCES:
        assert not re.search(r"^\s*(from|import) benchmarks\b", path.read_text(), re.MULTILINE), path


def test_few_modules_lie_flat():
    flat = sorted(p.name for p in PACKAGE.glob("*.py"))
    assert len(flat) <= 6, flat


# What is not said any more, by where it might be, and what is said in its place.
SAID_OTHERWISE = {
    "python": {
        r"\bSweep\b|\bsweeps?\b": "InnerLoopRun; the way back",
        r"\bMetaStep\b": "InnerLoop",
        r"\bStem\b|\.stem\b(?<!path\.stem)|\bpull_stem\b": "FixedPrefix, kind",
        r"\bclass Watch\b|\b_Watched\b": "ModuleSnapshot",
        r"\bdef (push|pull|bend|slope|curve)\b": "jvp, vjp, hvp, derivative, second_derivative",
        r"\bforeign\b|\bclass Order\b|\bdef ready\b": "unsupported_layer, RaggedPacking, as_input",
        r"\bdef (refuses|unrecordable|memory_plan|gradients)\(self": "plan, meta_gradient",
        r"\bdef at\(self, precision": "with_precision",
        r"\bneeds_lr\b|\blr_grad\b": "learns_rates, rates_grad",
        r"\bNativeExecutor\b|\bNativeCudaExecutor\b|native-cuda": "CpuExecutor, CudaExecutor",
        r"\bBlockMachine\b": "BlockLimits",
        r"\blayer\.given\b|\.given\b": "fixed_statistics",
    },
    "cpp": {
        r"\bSweep\b|\bsweeps?\b": "Pass",
        r"\bWalk\b": "InnerLoopRun",
        r"\bclass Task\b|\bstruct Task\b": "InnerLoopRun",
        r"\bforth\b|\bjudge\b": "adapt, query",
        r"\bStem\b|\bstem\b": "Kind",
        r"\bFrame\b": "RuleContext",
        r"\b(class|struct) (Core|Lanes|Block|Watch|Ledger|Toucher|Turns|Recording)\b": "see csrc/README.md",
        r"\bbend\b|(?<!negative[ _])\bslope\b|\bcurve\b": "hvp, derivative, second_derivative",
        r"PassKind::(plain|taped)\b|LossKind::given": "gradient, gradient_and_tangent, external",
        r"\bneeds_lr\b|\blr(_\w+)?\b": "learns_rates, rates, rates_grad, rate_rows",
    },
}
SAID_OTHERWISE["prose"] = {
    r"\bsweeps?\b": "inner loop, way back",
    r"metafast\.benchmarks|native-cuda|NativeExecutor|walk\.cuh|description\.py|recognise": "what is there now",
}
PLACES = {
    "prose": [
        ROOT / "README.md",
        *(p for folder in ("docs", "csrc", "kernels", "benchmarks") for p in sorted((ROOT / folder).rglob("*.md"))),
    ],
    "python": [p for folder in ("metafast", "kernels", "benchmarks") for p in sorted((ROOT / folder).rglob("*.py"))],
    "cpp": [p for p in sorted((ROOT / "csrc").rglob("*")) if p.suffix in (".h", ".cpp", ".cu", ".cuh")],
}


@pytest.mark.parametrize(
    ("language", "words"), [(language, words) for language, table in SAID_OTHERWISE.items() for words in table]
)
def test_one_word_for_one_thing(language, words):
    assert len(PLACES[language]) > 8
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in PLACES[language]
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(words, line) and not re.search(r"(path|file|half|Path\(file\))\.stem", line)
    ]
    assert not found, f"say {SAID_OTHERWISE[language][words]}: " + "\n".join(found)
