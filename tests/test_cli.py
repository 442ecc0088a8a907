import builtins
import inspect
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from metafast.cli.app import COMMANDS, app
from metafast.cli.main import main
from metafast.cli.options import OF_OWN_MODEL
from metafast.training.recipes import RECIPES

TRAIN = ["train", "sinusoid", "--iterations", "50", "--tasks", "3", "--device", "cpu", "--test-tasks", "10"]


def call(capsys, *arguments):
    """Runs a command; returns its exit code, standard output and standard error."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    with pytest.raises(SystemExit):
        main([*TRAIN, "--out", str(folder), "--json"])
    return folder


def test_train_prints_the_summary_as_json_and_nothing_else(tmp_path, capsys):
    code, out, err = call(capsys, *TRAIN, "--out", tmp_path / "run", "--json")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "iteration 50/50" in err
    assert "testing on 10 tasks" in err
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "adaptation.png", "checkpoint.safetensors", "curves.png", "metrics.jsonl", "recipe.json", "summary.json",
    }  # fmt: skip


def test_train_prints_a_table_for_people(tmp_path, capsys):
    code, out, _ = call(capsys, *TRAIN, "--out", tmp_path / "run")
    assert code == 0
    assert "mse with 95% interval" in out
    assert "over 10 tasks" in out
    assert "of iteration 50" in out


def test_options_reach_the_recipe(tmp_path, capsys):
    extra = ["--algorithm", "metasgd", "--lr", "0.01", "--inner-lr", "0.02", "--steps", "2", "--shots", "4"]
    code, out, _ = call(capsys, *TRAIN, *extra, "--queries", "6", "--seed", "5", "--out", tmp_path / "r", "--json")
    assert code == 0
    summary = json.loads(out)
    wanted = {"algorithm": "metasgd", "lr": 0.01, "inner_lr": 0.02, "steps": 2, "shots": 4, "queries": 6, "tasks": 3}
    assert wanted.items() <= summary["settings"].items()
    assert summary["seed"] == 5
    assert summary["tests"][0]["shots"] == 4


def test_eval_tests_again(run, capsys):
    code, out, _ = call(capsys, "eval", run, "--tasks", 20, "--shots", 10, "--steps", 0, "--steps", 2, "--json")
    assert code == 0
    assert [(r["shots"], r["steps"], r["tasks"]) for r in json.loads(out)["tests"]] == [(10, 0, 20), (10, 2, 20)]


def test_adapt_predicts(run, tmp_path, capsys):
    (tmp_path / "s.csv").write_text("x,y\n0,0\n1,1\n2,1\n")
    (tmp_path / "q.csv").write_text("x\n0.5\n1.5\n")
    code, out, _ = call(capsys, "adapt", run, "--support", tmp_path / "s.csv", "--query", tmp_path / "q.csv", "--json")
    assert code == 0
    assert [row["x"] for row in json.loads(out)] == [0.5, 1.5]
    code, out, _ = call(capsys, "adapt", run, "--support", tmp_path / "s.csv", "--query", tmp_path / "q.csv")
    assert code == 0
    assert out.splitlines()[0] == "x  y"
    assert len(out.splitlines()) == 3


@pytest.mark.parametrize("what", ["sinusoid", "glyphs-5w1s", None])
def test_explain_shows_settings_and_layers(run, capsys, what):
    code, out, _ = call(capsys, "explain", what or run, "--device", "cpu")
    assert code == 0
    assert "inner_lr: " in out
    assert "executor: " in out
    assert "head" in out


def test_doctor_is_healthy_here(capsys):
    code, out, _ = call(capsys, "doctor", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["healthy"]
    assert all(f["remedy"] for f in report["findings"] if f["state"] != "ok")
    triton = [f for f in report["findings"] if f["subject"] == "executor triton" and f["state"] == "missing"]
    assert all("pip install 'metafast[triton]'" in f["remedy"] for f in triton)
    gradients = [f for f in report["findings"] if f["subject"].startswith("executor ")]
    assert any(f["state"] == "ok" and "differs from autograd's by" in f["text"] for f in gradients)


def test_help_names_every_recipe_and_gives_examples(capsys):
    code, out, _ = call(capsys, "train", "--help")
    words = out.replace("│", " ").split()
    assert code == 0
    assert all(any(name in word for word in words) for name in RECIPES)
    assert "Examples:" in out
    assert "metafast train sinusoid --out runs/sine" in out
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert all(name in out for name in ("train", "eval", "adapt", "explain", "doctor", "demo"))


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["train", "omniglot-5w"], 2, "there is no recipe 'omniglot-5w'; choose from sinusoid"),
        (["train", "sinusoid", "--algorithm", "maml2"], 2, "there is no algorithm 'maml2'"),
        (["train", "sinusoid", "--iterations", "0"], 2, "iterations is 0; it must be at least 1"),
        (["train", "sinusoid", "--device", "gpu"], 2, "--device is 'gpu'"),
        (["train", "sinusoid", "--backend", "fast"], 2, "backend='fast' is unknown"),
        (["train", "sinusoid", "--resume"], 2, "--resume needs --out"),
        (["train", "sinusoid", "--data", "x"], 2, "draws its own data; leave out --data x"),
        (["train", "glyphs-5w1s", "--data", "x"], 2, "renders its own data; leave out --data x"),
        (["train", "omniglot-5w1s"], 2, "needs --data: the folder that holds images_background.zip"),
        (["train", "omniglot-5w1s", "--data", "x", "--split", "odd"], 2, "--split is 'odd'"),
        (["train", "folder-5w1s"], 2, "needs --data: a folder with one sub-folder of pictures a class"),
        (["train", "omniglot-5w1s", "--data", "/nowhere"], 1, "/nowhere"),
        (["train", "sinusoid", "--checkpoint-every", "0"], 2, "--checkpoint-every is 0"),
        (["eval", "/nowhere"], 1, "there is no checkpoint at /nowhere/checkpoint.safetensors"),
        (["explain", "/nowhere"], 2, "there is no recipe '/nowhere'"),
        (["bench", "sin25-1", "--ways", "3"], 2, "--ways goes with --model FILE.py:FACTORY"),
        (["bench", "--load", "x", "sin25-1"], 2, "WORKLOAD has no use with --load"),
        (["bench", "--load", "x", "--rounds", "3"], 2, "--rounds has no use with --load"),
        (["bench", "--compare", "x", "y", "--json", "z"], 2, "--json has no use with --compare"),
        (["bench", "sin25-1", "--threshold", "0.2"], 2, "--threshold goes with --compare"),
        (["bench", "sin25-1", "--device", "gpu"], 2, "--device is 'gpu'"),
        (["profile", "sin25-1", "--input-shape", "1"], 2, "--input-shape goes with --model FILE.py:FACTORY"),
    ],
)
def test_errors_are_one_line_with_the_remedy(tmp_path, monkeypatch, capsys, arguments, code, text):
    monkeypatch.chdir(tmp_path)
    found, out, err = call(capsys, *arguments)
    assert (found, out) == (code, "")
    assert err.startswith("metafast: ")
    assert text in err
    assert len(err.splitlines()) == 1


def test_every_command_is_a_file_that_the_application_lists():
    folder = Path(inspect.getfile(main)).parent
    helpers = {"__init__", "app", "main", "options", "output"}
    assert sorted(COMMANDS) == sorted({file.stem for file in folder.glob("*.py")} - helpers)
    assert list(get_command(app).commands) == [{"evaluate": "eval"}.get(name, name) for name in COMMANDS]


def test_commands_that_take_a_model_of_your_own_share_its_options():
    found = [{p.name: p for p in get_command(app).commands[name].params} for name in ("bench", "profile", "verify")]
    for name in (*OF_OWN_MODEL, "device"):
        assert len({(options[name].help, options[name].rich_help_panel) for options in found}) == 1, name


def test_resume_stands_alone_or_with_auto_anywhere(tmp_path, capsys):
    out = ["--out", tmp_path / "run"]
    for words in (
        [*TRAIN, "--resume", "auto", *out],
        [*TRAIN, *out, "--resume"],
        ["train", "--resume", *TRAIN[1:], *out],
    ):
        code, _, err = call(capsys, *words)
        assert code == 0, err
    code, _, err = call(capsys, *TRAIN, *out)
    assert (code, "holds a run already; add --resume" in err) == (2, True)


def test_a_second_process_on_one_folder_is_refused_and_kill_dash_nine_frees_it(tmp_path, capsys):
    arguments = [*TRAIN, "--iterations", "1000000", "--checkpoint-every", "1000000", "--out", str(tmp_path / "run")]
    program = [sys.executable, "-c", "from metafast.cli.main import main; main()", *arguments]
    process = subprocess.Popen(program, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        next(line for line in process.stderr if line.startswith("iteration"))
        for resume in ([], ["--resume"], ["--resume", "auto"]):
            code, out, err = call(capsys, *arguments, *resume)
            assert (code, out, len(err.splitlines())) == (1, "", 1)
            assert f"{tmp_path / 'run'} is in use: process {process.pid} trains in it" in err
    finally:
        process.kill()
        process.communicate()
    code, _, err = call(capsys, *TRAIN, "--out", tmp_path / "run", "--resume")
    assert code == 0, err


@pytest.mark.parametrize("command", ["eval", "adapt", "explain", "train"])
def test_a_damaged_checkpoint_is_one_line_in_every_command(run, tmp_path, capsys, command):
    folder = tmp_path / "run"
    folder.mkdir()
    content = (run / "checkpoint.safetensors").read_bytes()
    (tmp_path / "points.csv").write_text("x,y\n0,0\n")
    points = ["--support", tmp_path / "points.csv", "--query", tmp_path / "points.csv"]
    words = [*TRAIN, "--out", folder, "--resume"] if command == "train" else [command, folder]
    for bit in (3, 8 * 30, 8 * 200 + 5, 8 * (len(content) // 2), 8 * len(content) - 1):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (folder / "checkpoint.safetensors").write_bytes(flipped)
        code, out, err = call(capsys, *words, *(points if command == "adapt" else []))
        assert (code, out, len(err.splitlines())) == (1, "", 1), err
        assert err.startswith(f"metafast: {folder / 'checkpoint.safetensors'} ")
        assert "use another checkpoint or train again" in err


@pytest.mark.parametrize("arguments", [["trane"], ["train"], ["train", "sinusoid", "--iterations", "many"]])
def test_bad_usage_exits_with_two(capsys, arguments):
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert "Usage:" in err


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match=r"there is no recipe 'x'"):
        main(["train", "x", "--debug"])


def test_a_missing_package_is_named_with_its_extra(monkeypatch, capsys):
    real = builtins.__import__

    def without_typer(name, *rest):
        if name == "typer":
            raise ModuleNotFoundError("No module named 'typer'", name="typer")
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "typer", raising=False)
    monkeypatch.setattr("metafast.extras.importlib.import_module", without_typer)
    code, _, err = call(capsys, "doctor")
    assert code == 1
    assert 'pip install "metafast[train]"' in err


def test_ctrl_c_saves_says_how_to_go_on_and_exits_with_130(tmp_path):
    arguments = ["train", "sinusoid", "--tasks", "3", "--device", "cpu", "--out", str(tmp_path / "run")]
    program = [sys.executable, "-c", "from metafast.cli.main import main; main()", *arguments]
    process = subprocess.Popen(program, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("iteration"):
            break
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert "which is saved; go on with the same command and --out" in err
    assert "Traceback" not in err
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()
