"""The package as a whole: what it needs, how it is laid out, what it promises."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import metafast as mf
from metafast import kernels
from metafast.kernels.contract.layer import Layer, Loss

ROOT = Path(__file__).parent.parent
FOLDERS = ("metafast", "kernels", "tests", "benchmarks", "examples", "csrc")
SOURCES = [
    path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh") and not path.is_symlink()
]  # fmt: skip
EXTRAS = ("typer", "rich", "safetensors", "PIL", "matplotlib", "tensorboard", "triton", "pytest", "hypothesis", "ninja")
RULES_OF_GRADIENTS = ("backward", "tangent_forward", "tangent_backward")


def run(code):
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT.parent)


def test_torch_and_numpy_are_enough():
    """With everything else blocked, and without the extension, a learner still learns."""
    code = f"""
import sys
for name in {EXTRAS} + ("metafast._C",):
    sys.modules[name] = None
import torch, metafast as mf, metafast.episodes
learner = mf.MAML(torch.nn.Linear(2, 1), loss="mse", lr=0.1)
x, y = torch.randn(3, 4, 2), torch.randn(3, 4, 1)
learner.backward(mf.TaskBatch(x, y, x, y))
assert all(p.grad is not None for p in learner.model.parameters())
print(learner.explain().splitlines()[0])
"""
    found = run(code)
    assert found.returncode == 0, found.stderr
    assert found.stdout == "executor: reference (backend='auto')\n"


def test_importing_touches_no_device_and_stays_quiet():
    found = run("import metafast, torch; assert not torch.cuda.is_initialized()")
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_first_call_imports_no_sympy(backend):
    """Where metafast has all the rules, torch's symbolic shapes and with them 34 MB of SymPy are not needed."""
    code = f"""
import sys, torch, metafast as mf
learner = mf.MAML(torch.nn.Linear(2, 1), loss="mse", lr=mf.Rate(0.1, learn=True), backend={backend!r})
x, y = torch.randn(3, 4, 2), torch.randn(3, 4, 1)
learner.backward(mf.TaskBatch(x, y, x, y))
assert all(p.grad is not None for p in learner.parameters())
print("sympy" in sys.modules)
"""
    found = run(code)
    assert (found.returncode, found.stdout) == (0, "False\n"), found.stderr


@pytest.mark.parametrize("module", ["metafast", "metafast.episodes"])
def test_public_names_are_documented(module):
    namespace = sys.modules[module] if module in sys.modules else __import__(module, fromlist=["__all__"])
    assert sorted(namespace.__all__) == sorted(set(namespace.__all__))
    for name in namespace.__all__:
        value = getattr(namespace, name)
        if not callable(value):
            continue
        assert inspect.getdoc(value), f"{name} has no docstring"
        if inspect.isclass(value) and not issubclass(value, Exception):
            for key, member in vars(value).items():
                if not key.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                    assert inspect.getdoc(getattr(value, key)), f"{name}.{key} has no docstring"


def test_learners_name_their_paper():
    learners = [mf.learners.by_name(name) for name in mf.learners.names()]
    assert {mf.MAML, mf.FOMAML, mf.MetaSGD, mf.ANIL, mf.Reptile, mf.MAMLPlusPlus} <= set(learners)
    for learner in learners:
        number = re.search(r"\d{4}\.\d{5}", learner.paper)
        assert number, learner.__name__
        assert number[0] in inspect.getdoc(learner), learner.__name__


def test_kernels_are_imported_by_one_name():
    """From the root ``import kernels`` works too, and makes a second copy of every module."""
    wrong = re.compile(r"^\s*(import kernels\b|from kernels\b)", re.MULTILINE)
    assert [str(p) for p in SOURCES if p.suffix == ".py" and wrong.search(p.read_text())] == []


def test_sources_are_short():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in SOURCES}
    assert len(lengths) > 60
    assert {name: n for name, n in lengths.items() if n > 450} == {}


def test_every_layer_has_its_folder():
    """Its ``reference.py`` has classes of the folder's kind, by themselves or by their base.

    All that carry a gradient have cases; the others have no rules but ``forward``.
    """
    tables = {table.__name__.split(".")[-2]: table.CASES for table in kernels.modules("cases")}
    kinds, forward_alone = [], set()
    assert all(case.rule for case in tables.pop("rules"))  # steps are no layers
    for reference in kernels.modules("reference"):
        folder = reference.__name__.split(".")[-2]
        if folder == "rules":
            continue
        classes = {c for c in vars(reference).values() if inspect.isclass(c) and c.__module__ == reference.__name__}
        classes = {c for c in classes if issubclass(c, Layer | Loss)}
        assert classes, folder
        without = {c for c in classes if not getattr(c, "carries_gradient", True)}
        forward_alone |= {c.kind for c in without}
        for found in without:
            assert all(getattr(found, rule) is getattr(Layer, rule) for rule in RULES_OF_GRADIENTS), found
        cases = tables.pop(folder, [])
        assert classes - without == {type(getattr(case, "layer", None) or case.loss) for case in cases}, folder
        for found in classes:
            assert folder in {getattr(base, "kind", None) for base in found.__mro__}, f"{found} in {folder}"
        kinds += [found.kind for found in classes]
    assert tables == {}
    assert forward_alone == {"noise", "input_part"}
    assert len(kinds) >= 18
    assert len(set(kinds)) == len(kinds)


def test_type_hints_are_shipped_and_versions_agree():
    assert (Path(mf.__file__).parent / "py.typed").exists()
    assert re.fullmatch(r"\d+\.\d+\.\d+", mf.__version__)
    assert metadata.version("metafast") == mf.__version__
    assert f'version = "{mf.__version__}"' in (ROOT / "pyproject.toml").read_text()
