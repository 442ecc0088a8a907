import gc
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from metafast.training import checkpoint
from metafast.training.checkpoint import CheckpointError
from metafast.training.data import TEST_BATCH, fixed_list, open_episodes
from metafast.training.evaluate import final_test, interval, scores
from metafast.training.metrics import read_metrics
from metafast.training.progress import Bar, Lines, Progress
from metafast.training.recipes import recipe
from metafast.training.report import finish
from metafast.training.run import BEST, LAST, Diverged, Interrupted, Options, Training

SMALL = recipe("sinusoid", iterations=60, tasks=3)
UNTIMED = ("tasks_per_s",)


def run(chosen, out, progress=None, **options):
    training = Training(chosen, Options(out, device="cpu", **options))
    training.run(progress or Progress())
    return training


def parameters(folder, name=LAST):
    return {k: v for k, v in checkpoint.load(folder / name)[0].items() if k != "window"}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def record(folder):
    return [{k: v for k, v in line.items() if k not in UNTIMED} for line in read_metrics(folder)]


class StopAt(Progress):
    """Sends this process what Ctrl-C sends, once an iteration is done."""

    def __init__(self, iteration):
        self.iteration = iteration

    def step(self, done):
        if done == self.iteration:
            os.kill(os.getpid(), signal.SIGINT)


def test_training_lowers_the_loss(tmp_path):
    run(recipe("sinusoid", iterations=200, lr=0.01), tmp_path / "run")
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    assert [line["iteration"] for line in read_metrics(tmp_path / "run")] == list(range(25, 201, 25))
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


@pytest.mark.parametrize("algorithm", ["maml", "metasgd", "reptile", "maml++"])
@pytest.mark.parametrize("stop", [1, 37])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, algorithm, stop):
    chosen = recipe("sinusoid", algorithm, iterations=60, tasks=3, eval_every=20, eval_tasks=10)
    handler = signal.getsignal(signal.SIGINT)  # ignored, where a shell runs this in the background
    run(chosen, tmp_path / "straight")
    with pytest.raises(Interrupted, match=f"interrupted after iteration {stop}, which is saved.*--resume"):
        run(chosen, tmp_path / "stopped", StopAt(stop))
    assert checkpoint.load(tmp_path / "stopped" / LAST)[1]["iteration"] == stop
    run(chosen, tmp_path / "stopped", resume=True)
    for name in (LAST, BEST):
        assert same(parameters(tmp_path / "straight", name), parameters(tmp_path / "stopped", name))
    assert record(tmp_path / "straight") == record(tmp_path / "stopped")
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_run_can_be_made_longer(tmp_path):
    run(SMALL, tmp_path / "straight")
    run(replace(SMALL, iterations=30), tmp_path / "longer")
    run(SMALL, tmp_path / "longer", resume=True)
    assert same(parameters(tmp_path / "straight"), parameters(tmp_path / "longer"))


def test_kill_dash_nine_at_a_random_moment_loses_nothing_but_time(tmp_path):
    options = ["--iterations", "300", "--tasks", "3", "--device", "cpu", "--eval-every", "100"]
    program = [sys.executable, "-c", "from metafast.cli.main import main; main()", "train", "sinusoid", *options]
    killed = [*program, "--checkpoint-every", "20", "--test-tasks", "2", "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(killed, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    path = tmp_path / "killed" / LAST
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.7))
    process.kill()
    process.wait()
    at = checkpoint.load(path)[1]["iteration"]
    assert at % 20 == 0 or at == 300
    subprocess.run([*killed, "--resume"], check=True, capture_output=True)
    chosen = recipe("sinusoid", iterations=300, tasks=3, eval_every=100)
    run(chosen, tmp_path / "straight")
    assert same(parameters(tmp_path / "straight"), parameters(tmp_path / "killed")), f"killed at {at}"
    assert same(parameters(tmp_path / "straight", BEST), parameters(tmp_path / "killed", BEST))
    assert record(tmp_path / "straight") == record(tmp_path / "killed")


def test_lines_beyond_the_checkpoint_and_a_torn_one_are_dropped_on_resume(tmp_path):
    run(replace(SMALL, iterations=50), tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"iteration": 75, "kind": "train", "loss": 9.0}\n{"iterat')
    run(SMALL, tmp_path, resume=True)
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [25, 50, 60]


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"shots": 5, "test_shots": (5,)}, "shots: 5 here, 10 in the checkpoint"),
        ({"algorithm": "fomaml"}, 'algorithm: "fomaml" here, "maml" in the checkpoint'),
        ({"channels": 20}, "channels: 20 here, 40 in the checkpoint"),
        ({"iterations": 10}, "is at iteration 60, past --iterations 10"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, changed, text):
    run(SMALL, tmp_path)
    with pytest.raises(CheckpointError, match=text):
        Training(replace(SMALL, **changed), Options(tmp_path, device="cpu", resume=True))


def test_another_seed_is_another_run(tmp_path):
    run(SMALL, tmp_path)
    with pytest.raises(CheckpointError, match=r"episodes.seed: 1 here, 0 in the checkpoint"):
        Training(SMALL, Options(tmp_path, device="cpu", resume=True, seed=1))


def test_resuming_from_a_truncated_checkpoint_is_refused(tmp_path):
    run(SMALL, tmp_path)
    path = tmp_path / LAST
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"is truncated or not a safetensors file"):
        Training(SMALL, Options(tmp_path, device="cpu", resume=True))


def test_resuming_where_nothing_is_says_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no checkpoint at .*; leave out --resume"):
        Training(SMALL, Options(tmp_path, device="cpu", resume=True))


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    run(SMALL, tmp_path)
    before = (tmp_path / LAST).read_bytes()
    with pytest.raises(ValueError, match=r"holds a run already; add --resume to go on with it, or give another --out"):
        Training(SMALL, Options(tmp_path, device="cpu"))
    assert (tmp_path / LAST).read_bytes() == before


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file is a file; give a folder"):
        Training(SMALL, Options(tmp_path / "file", device="cpu"))


def test_a_diverging_run_stops_names_the_iteration_and_keeps_the_last_good_checkpoint(tmp_path):
    training = Training(SMALL, Options(tmp_path, device="cpu", checkpoint_every=10))
    for _ in range(10):
        training.step()
    training.save(LAST)
    good = (tmp_path / LAST).read_bytes()
    with torch.no_grad():
        training.learner.model.head.bias.fill_(float("inf"))
    with pytest.raises(Diverged, match=rf"iteration 11: the loss is (nan|inf); .*{LAST} still holds iteration 10"):
        training.run(Progress())
    assert (tmp_path / LAST).read_bytes() == good


def test_a_last_step_that_breaks_the_parameters_is_not_saved(tmp_path):
    training = Training(SMALL, Options(tmp_path, device="cpu"))
    training.step()
    with torch.no_grad():
        training.learner.model.head.bias.fill_(float("nan"))
    with pytest.raises(Diverged, match=r"iteration 1: learner.model.head.bias holds NaN or infinity"):
        training.save(LAST)
    assert checkpoint.load(tmp_path / LAST)[1]["iteration"] == 0


def test_the_best_validated_parameters_are_tested(tmp_path):
    chosen = recipe("sinusoid", iterations=100, tasks=3, eval_every=25, eval_tasks=30, lr=0.02)
    training = run(chosen, tmp_path)
    validations = [line for line in read_metrics(tmp_path) if line["kind"] == "validation"]
    assert [line["iteration"] for line in validations] == [25, 50, 75, 100]
    best = min(validations, key=lambda line: line["mse"])
    tested = training.load_tested()
    assert tested == {
        "checkpoint": BEST, "iteration": best["iteration"], "value": best["mse"], "chosen_by": "validation mse",
    }  # fmt: skip
    settings = {"steps": chosen.test_steps[-1]}
    found = scores(training.learner, fixed_list(training.episodes.validation, 30), settings, False)
    assert interval(found)[0] == best["mse"]


def test_the_summary_says_what_was_measured_and_how(tmp_path):
    training = run(SMALL, tmp_path)
    finish(training, 30, wall_seconds=1.0)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {(row["shots"], row["steps"]) for row in summary["tests"]} == {
        (k, s) for k in (5, 10) for s in (0, 1, 5, 10)
    }
    assert summary["result"] == next(r for r in summary["tests"] if (r["shots"], r["steps"]) == (5, 10))
    assert all(row["tasks"] == 30 and row["ci95"] > 0 for row in summary["tests"])
    assert summary["tested"] == {"checkpoint": LAST, "iteration": 60, "chosen_by": "last iteration"}
    assert summary["settings"] == SMALL.to_json() == json.loads((tmp_path / "recipe.json").read_text())
    assert summary["seed"] == 0
    assert summary["queries"] == "100 a task"
    assert summary["batch_norm"] is None
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["episodes"]["train"] == training.episodes.train.settings
    assert summary["training"]["iterations"] == 60
    assert summary["training"]["tasks_per_s"] > 0
    assert summary["executor"][0].startswith("executor: ")
    for picture in ("curves.png", "adaptation.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_the_test_agrees_with_a_calculation_by_hand(tmp_path):
    training = Training(replace(SMALL, test_shots=(5,), test_steps=(0, 2)), Options(tmp_path, device="cpu"))
    rows = final_test(training.learner, training.recipe, training.episodes, 10)
    batch = training.episodes.test[5].batch(0).tasks(slice(0, 10))
    model, lr = training.learner.model, training.recipe.inner_lr
    start = [p.detach().clone() for p in model.parameters()]
    for row in rows:
        found = []
        for t in range(10):
            for p, value in zip(model.parameters(), start, strict=True):
                p.data = value.clone()
            for _ in range(row["steps"]):
                loss = (model(batch.support_x[t]) - batch.support_y[t]).square().mean()
                for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
                    p.data = p.data - lr * g
            found.append((model(batch.query_x[t]) - batch.query_y[t]).square().mean().item())
        wanted = torch.tensor(found, dtype=torch.float64)
        assert row["mse"] == pytest.approx(float(wanted.mean()), rel=1e-5)
        assert row["ci95"] == pytest.approx(1.96 * float(wanted.std()) / 10**0.5, rel=1e-5)


def test_every_run_is_tested_on_the_same_tasks_whatever_its_seed():
    one, two = (open_episodes(replace(SMALL, eval_every=20), None, seed, "cpu") for seed in (0, 1))
    assert torch.equal(one.test[5].batch(3).query_x, two.test[5].batch(3).query_x)
    assert not torch.equal(one.train.batch(3).query_x, two.train.batch(3).query_x)
    assert not torch.equal(one.test[5].batch(0).query_x, one.validation.batch(0).query_x)


def test_a_list_of_tasks_is_the_start_of_a_longer_one():
    sampler = open_episodes(SMALL, None, 0, "cpu").test[5]
    short = torch.cat([b.support_x for b in fixed_list(sampler, TEST_BATCH + 3)])
    long = torch.cat([b.support_x for b in fixed_list(sampler, 2 * TEST_BATCH)])
    assert len(short) == TEST_BATCH + 3
    assert torch.equal(short, long[: TEST_BATCH + 3])


def test_a_test_of_one_task_has_no_interval(tmp_path):
    training = Training(SMALL, Options(tmp_path, device="cpu"))
    with pytest.raises(ValueError, match=r"number of test tasks is 1; a confidence interval needs at least 2"):
        final_test(training.learner, SMALL, training.episodes, 1)


def test_the_log_has_loss_rate_and_time_left(tmp_path, capsys):
    run(SMALL, tmp_path, Lines(sys.stderr))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("iteration 25/60  loss ")
    assert lines[-1].startswith("iteration 60/60  loss ")
    assert lines[-1].endswith("0:00:00 left")
    assert all("tasks/s" in line for line in lines)


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    run(SMALL, tmp_path, tensorboard=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert found == [(line["iteration"], pytest.approx(line["loss"], rel=1e-6)) for line in read_metrics(tmp_path)]


def test_the_bar_shows_the_same(tmp_path):
    stream = io.StringIO()
    run(SMALL, tmp_path, Bar(stream))
    assert "60/60" in stream.getvalue()
    assert "tasks/s  0:00:00 left" in stream.getvalue()


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    run(SMALL, tmp_path)
    before, lines = parameters(tmp_path), read_metrics(tmp_path)
    run(SMALL, tmp_path, resume=True)
    assert same(before, parameters(tmp_path))
    assert lines == read_metrics(tmp_path)


@pytest.mark.parametrize("stop", [None, 37])
def test_resume_auto_starts_where_nothing_is_and_goes_on_where_something_is(tmp_path, stop):
    run(SMALL, tmp_path / "straight")
    if stop:
        with pytest.raises(Interrupted):
            run(SMALL, tmp_path / "auto", StopAt(stop), resume="auto")
        assert checkpoint.load(tmp_path / "auto" / LAST)[1]["iteration"] == stop
    run(SMALL, tmp_path / "auto", resume="auto")
    assert same(parameters(tmp_path / "straight"), parameters(tmp_path / "auto"))
    assert record(tmp_path / "straight") == record(tmp_path / "auto")


def test_resume_auto_does_not_start_over_a_damaged_checkpoint(tmp_path):
    run(SMALL, tmp_path)
    content = bytearray((tmp_path / LAST).read_bytes())
    content[-10] ^= 4
    (tmp_path / LAST).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged: its content does not match the checksum in it; use anot"):
        run(SMALL, tmp_path, resume="auto")
    assert (tmp_path / LAST).read_bytes() == content


def test_a_word_that_resume_does_not_know_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--resume is 'maybe'; give it alone, or --resume auto"):
        Training(SMALL, Options(tmp_path, device="cpu", resume="maybe"))


def test_a_folder_is_held_from_the_first_look_to_the_end_of_the_run(tmp_path):
    lock = tmp_path / "run" / ".lock"
    training = Training(SMALL, Options(tmp_path / "run", device="cpu"))
    assert lock.exists()
    training.run(Progress())
    assert not lock.exists()
    with pytest.raises(ValueError, match="holds a run already"):
        Training(SMALL, Options(tmp_path / "run", device="cpu"))
    gc.collect()
    assert not lock.exists()


def test_nothing_is_made_where_there_is_nothing_to_resume(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"there is no checkpoint .*; leave out --resume .*--resume auto, which st"
    ):
        Training(SMALL, Options(tmp_path / "none", device="cpu", resume=True))
    assert not (tmp_path / "none").exists()


def test_a_damaged_record_is_named_with_its_line(tmp_path):
    run(SMALL, tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([lines[0], lines[1][:20] + "\0" + lines[1][21:], *lines[2:], ""]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, is damaged .*; take that line away"):
        run(SMALL, tmp_path, resume=True)
