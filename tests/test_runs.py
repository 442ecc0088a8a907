import csv
from dataclasses import replace

import pytest
import torch
from PIL import Image

from metafast.training.progress import Progress
from metafast.training.recipes import recipe
from metafast.training.run import Options, Training, load_learner
from metafast.training.saved_run import explain_recipe, open_run, predict, retest


@pytest.fixture(scope="module")
def sine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sine")
    Training(recipe("sinusoid", iterations=150, tasks=5, lr=0.01), Options(folder, device="cpu")).run(Progress())
    return folder


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glyphs")
    chosen = recipe("glyphs-5w1s", iterations=60, tasks=8, steps=3, lr=0.01, channels=8, eval_every=0)
    training = Training(chosen, Options(folder, device="cpu"))
    training.run(Progress())
    return folder, training


def pictures(root, images, light=False):
    """Writes ``images [classes, n, 1, H, W]`` as one sub-folder a class, dark on light if wanted."""
    for label, group in enumerate(images):
        (root / f"class{label}").mkdir(parents=True)
        for i, image in enumerate(group):
            pixels = (255 * image[0]).round().to(torch.uint8)
            Image.fromarray((255 - pixels if light else pixels).numpy()).save(root / f"class{label}" / f"{i}.png")


def write_csv(path, columns, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def test_a_run_reads_back_its_parameters(sine):
    run = open_run(sine, "cpu")
    training = Training(run.recipe, Options(sine, device="cpu", resume=True))
    state = training.learner.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in run.learner.state_dict().items())
    assert (run.iteration, run.seed, run.data) == (150, 0, None)


def test_a_retest_with_the_runs_own_settings_repeats_its_result(sine):
    run = open_run(sine, "cpu")
    one = retest(run, None, 20, None, None, None)
    assert [(row["shots"], row["steps"]) for row in one["tests"]] == [(k, s) for k in (5, 10) for s in (0, 1, 5, 10)]
    other = retest(run, None, 20, [10], None, [1])
    assert other["tests"] == [row for row in one["tests"] if (row["shots"], row["steps"]) == (10, 1)]
    assert other["result"] == other["tests"][0]


def test_regression_on_ones_own_points(sine, tmp_path):
    run = open_run(sine, "cpu")
    points = [(x / 2, 3 * torch.sin(torch.tensor(x / 2)).item()) for x in range(-9, 10)]
    support = write_csv(tmp_path / "support.csv", ["x", "y"], points)
    query = write_csv(tmp_path / "query.csv", ["x"], [[0.5], [2.0]])
    rows = predict(run, support, query, 3, tmp_path / "out.csv")
    support_x, support_y = (torch.tensor([p[i] for p in points]).view(1, -1, 1) for i in (0, 1))
    wanted = run.learner.adapt(support_x, support_y, steps=3)(torch.tensor([0.5, 2.0]).view(1, 2, 1))[0, :, 0]
    assert [row["x"] for row in rows] == [0.5, 2.0]
    assert [row["y"] for row in rows] == pytest.approx(wanted.tolist())
    with (tmp_path / "out.csv").open() as file:
        assert [float(row["y"]) for row in csv.DictReader(file)] == [row["y"] for row in rows]


def test_a_fit_is_drawn(sine, tmp_path):
    points = write_csv(tmp_path / "points.csv", ["x", "y"], [(0, 1), (1, 2)])
    predict(open_run(sine, "cpu"), points, points, None, tmp_path / "fit.png")
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"--out .*fit.txt must end in .csv or .png"):
        predict(open_run(sine, "cpu"), points, points, None, tmp_path / "fit.txt")


def test_pictures_are_classified_as_the_learner_would(glyphs, tmp_path):
    folder, training = glyphs
    batch = training.episodes.test[1].batch(0)
    pictures(tmp_path / "support", batch.support_x[0].unflatten(0, (5, 1)))
    query = tmp_path / "query"
    query.mkdir()
    for i, image in enumerate(batch.query_x[0]):
        Image.fromarray((255 * image[0]).round().to(torch.uint8).numpy()).save(query / f"{i}.png")
    run = open_run(folder, "cpu")
    rows = predict(run, tmp_path / "support", query, None, None)
    fast = run.learner.adapt(batch.support_x[:1], batch.support_y[:1], steps=3)
    for i, row in enumerate(rows):
        logits = fast(torch.cat([batch.support_x[:1], batch.query_x[:1, i : i + 1]], 1))[0, -1]
        assert row["class"] == f"class{int(logits.argmax())}"
        assert row["probability"] == pytest.approx(float(logits.softmax(-1).max()), rel=1e-4)


def test_dark_ink_on_light_paper_gives_the_same_answer_and_other_queries_do_not_matter(glyphs, tmp_path):
    folder, training = glyphs
    batch = training.episodes.test[1].batch(1)
    run = open_run(folder, "cpu")
    for name, light in (("dark", False), ("light", True)):
        pictures(tmp_path / name, batch.support_x[0].unflatten(0, (5, 1)), light)
        pictures(tmp_path / f"{name}query", batch.query_x[0].unflatten(0, (1, 5)), light)
    dark = predict(run, tmp_path / "dark", tmp_path / "darkquery" / "class0", None, None)
    light = predict(run, tmp_path / "light", tmp_path / "lightquery" / "class0", None, None)
    alone = predict(run, tmp_path / "dark", tmp_path / "darkquery" / "class0" / "2.png", None, None)
    assert [r["class"] for r in dark] == [r["class"] for r in light]
    assert [r["probability"] for r in dark] == pytest.approx([r["probability"] for r in light], rel=1e-5)
    assert alone == dark[2:3]


def test_fewer_classes_than_ways_are_chosen_among_those(glyphs, tmp_path):
    folder, training = glyphs
    batch = training.episodes.test[1].batch(2)
    pictures(tmp_path / "two", batch.support_x[0, :2].unflatten(0, (2, 1)))
    rows = predict(open_run(folder, "cpu"), tmp_path / "two", tmp_path / "two" / "class1", None, None)
    assert rows[0]["class"] in ("class0", "class1")
    assert rows[0]["probability"] >= 0.5


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("a,b\n1,2\n", "has columns a, b and lacks x, y; its first line must be x,y"),
        ("x,y\n", "holds no points below its header"),
        ("x,y\n1,2\n3,four\n", r"line 3: .*'four'.* is not all numbers"),
        ("", "has columns none and lacks x, y"),
    ],
)
def test_a_bad_csv_is_explained(sine, tmp_path, content, text):
    path = tmp_path / "support.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=text):
        predict(open_run(sine, "cpu"), path, path, None, None)


def test_bad_folders_are_explained(glyphs, tmp_path):
    run = open_run(glyphs[0], "cpu")
    image = torch.zeros(6, 1, 1, 28, 28)
    pictures(tmp_path / "six", image)
    with pytest.raises(ValueError, match=r"six has 6 classes and the run was trained for 5; .* train with --ways 6"):
        predict(run, tmp_path / "six", tmp_path / "six", None, None)
    pictures(tmp_path / "one", image[:1])
    with pytest.raises(ValueError, match=r"one has 1 sub-folders; give one sub-folder of pictures a class"):
        predict(run, tmp_path / "one", tmp_path / "one", None, None)
    pictures(tmp_path / "two", image[:2])
    (tmp_path / "two" / "class1" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"class 'class1' in .*two holds no pictures"):
        predict(run, tmp_path / "two", tmp_path / "two", None, None)
    pictures(tmp_path / "good", image[:2])
    with pytest.raises(FileNotFoundError, match=r"there is no picture at .*nothing.png"):
        predict(run, tmp_path / "good", tmp_path / "nothing.png", None, None)
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"broken.png is not a readable image"):
        predict(run, tmp_path / "good", tmp_path / "broken.png", None, None)


def test_parameters_of_another_model_are_refused(sine):
    run = open_run(sine, "cpu")
    tensors = {f"learner.{k}": v for k, v in run.learner.state_dict().items()}
    tensors["learner.model.head.weight"] = torch.zeros(2, 40)
    with pytest.raises(RuntimeError, match=r"another model: model.head.weight: \[1, 40\] here, \[2, 40\] in the check"):
        load_learner(run.learner, tensors)


@pytest.mark.parametrize("name", ["sinusoid", "glyphs-5w1s", "omniglot-20w5s", "folder-5w1s"])
def test_every_layer_is_explained_without_data(name):
    chosen = replace(recipe(name), channels=4, tasks=2)
    text = explain_recipe(chosen, "cpu", "auto")
    assert text.startswith("executor: ")
    assert "head" in text
