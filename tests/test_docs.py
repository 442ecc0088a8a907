"""What the documents say can be typed: commands and options exist, files and modules are where they are said to be."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch.nn.functional as F
from torch.func import functional_call
from typer.main import get_command

from metafast.bench import WORKLOADS
from metafast.bench.peers import peers
from metafast.bench.run import contenders
from metafast.cli.app import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            found += [(page.name, line) for line in block.splitlines() if line.startswith("metafast ")]
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_have_the_options_that_are_shown(page: str, line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)[1:]
    command = get_command(app).commands[name]
    with command.make_context(name, arguments) as context:
        if name == "bench":
            contenders(context.params["backend"] or [], context.params["peer"] or [], peers())
            assert set(context.params["names"] or []) <= set(WORKLOADS)


def test_there_are_commands_of_every_kind() -> None:
    assert {line.split()[1] for _, line in commands()} >= {"bench", "profile", "verify", "train", "eval", "adapt"}


@pytest.mark.parametrize("page", ["README.md", "docs/models.md", "docs/inner_loops.md"])
def test_examples_run(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page follow one another; the page is the module that they stand in."""
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    vars(module).update(cross_entropy=F.cross_entropy, functional_call=functional_call)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) > 1
    for block in blocks:
        exec(compile(block, page, "exec"), vars(module))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    paths = re.findall(r"`((?:metafast|kernels|csrc|tests|benchmarks|docs|examples)/[\w/]+\.(?:py|h|cpp|md))`", text)
    for link in links:
        assert (page.parent / link).exists(), link
    for path in paths:
        assert (ROOT / path).exists(), path
