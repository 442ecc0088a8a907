"""How a user's own classes are divided: by shares, counts, lists of names or folders."""

from __future__ import annotations

import itertools
import re
import shutil
from dataclasses import replace

import pytest
from PIL import Image

from metafast.cli.main import main
from metafast.episodes import division, load_folder, sources
from metafast.episodes.division import divide
from metafast.training.checkpoint import CheckpointError
from metafast.training.data import open_episodes
from metafast.training.recipes import recipe
from metafast.training.run import Options, Training
from metafast.training.saved_run import open_run, retest

NAMES = tuple(f"c{k:02d}" for k in range(50))
SMALL = recipe("folder-5w1s", iterations=2, ways=2, tasks=1, steps=1, queries=1, channels=2, test_steps=(1,))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METAFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def fill(root, *names, count=2, level=0):
    for k, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("L", (4, 4), level + 10 * k + i).save(root / name / f"{i}.png")
    return root


def names_of(splits):
    return [None if part is None else part.class_names for part in vars(splits).values()]


@pytest.fixture
def nested(tmp_path):
    return fill(tmp_path / "nested", *(f"{a}/{c}" for a in ("Greek", "Latin") for c in ("a", "b", "c")))


class TestNumbers:
    @pytest.mark.parametrize(
        ("split", "sizes"),
        [
            ("64/16/20", [32, 8, 10]),
            ("0.64/0.16/0.2", [32, 8, 10]),
            (" 64 / 16 / 20 ", [32, 8, 10]),
            ("20/10/20", [20, 10, 20]),
            ("33.3/33.3/33.4", [16, 17, 17]),
            ("80/20", [40, 0, 10]),
            ("30/20", [30, 0, 20]),
            ((0.5, 0.0, 0.5), [26 - 1, 0, 25]),
            ((20, 10, 20), [20, 10, 20]),
        ],
    )
    def test_shares_and_counts(self, tmp_path, split, sizes):
        parts = divide(NAMES, split, 0, tmp_path)
        assert [len(group) for group in parts.values()] == sizes
        assert sorted(itertools.chain(*parts.values())) == list(NAMES)
        assert all(group == sorted(group) for group in parts.values())

    def test_the_order_is_random_and_always_the_same(self, tmp_path):
        one, two = divide(NAMES, "64/16/20", 0, tmp_path), divide(NAMES, (32, 8, 10), 0, tmp_path)
        assert one == two
        assert one["train"] != list(NAMES[:32])
        assert one["test"][:4] == ["c03", "c05", "c08", "c26"]
        assert divide(NAMES, "64/16/20", 1, tmp_path) != one

    @pytest.mark.parametrize(
        "split", ["", "64", "a/b/c", "64,16,20", "1/2/3/4", "nan/1/1", "-5/5/100", "inf/1", "//", ","]
    )
    def test_what_cannot_be_understood_is_answered_with_the_forms(self, tmp_path, split):
        with pytest.raises(ValueError, match=rf"^split is '{split}'; it must be .*64/16/20, or files of class names"):
            divide(NAMES, split, 0, tmp_path)

    @pytest.mark.parametrize("split", [("cat", "dog"), [["cat"], ["dog"]], 0.5, (1, 2, 3, 4)])
    def test_other_objects_are_refused(self, tmp_path, split):
        with pytest.raises(ValueError, match=r"^split is .*; it must be "):
            divide(NAMES, split, 0, tmp_path)

    def test_other_sums_are_refused(self, tmp_path):
        text = (
            r"split is 60/16/20, which sums to 96; shares must sum to 100 .*, numbers of classes to the 50 that there"
        )
        with pytest.raises(ValueError, match=text):
            divide(NAMES, "60/16/20", 0, tmp_path)
        with pytest.raises(ValueError, match=r"split is 20/10/19, which sums to 49"):
            divide(NAMES, (20, 10, 19), 0, tmp_path)

    @pytest.mark.parametrize(
        ("split", "text"),
        [
            ("64/16/20", "makes 2 train, 0 validation, 0 test: none for validation"),
            ("100/0", "makes 2 train, 0 validation, 0 test: none for test"),
            ("0/0/2", "makes 0 train, 0 validation, 2 test: none for train"),
        ],
    )
    def test_a_part_without_classes_is_named(self, tmp_path, split, text):
        with pytest.raises(ValueError, match=rf"has 2 classes, of which split {split} {text}; divide them in another"):
            divide(NAMES[:2], split, 0, tmp_path)


class TestLists:
    @pytest.mark.parametrize(
        "content",
        [
            b"Greek/b\nLatin/c\n",
            b"\xef\xbb\xbfGreek/b\r\nLatin/c\r\n",
            b"Latin/c\r\rGreek/b",
            "Greek\\b\r\n\r\n  ./Latin/c/ \r\n".encode("utf-16"),
            "\N{ZERO WIDTH NO-BREAK SPACE}Latin/c\nGreek\\b".encode("utf-16-be"),
        ],
    )
    def test_any_editors_text_is_understood(self, nested, tmp_path, content):
        (tmp_path / "train.txt").write_bytes(content)
        (tmp_path / "test.txt").write_bytes(b"Greek/a")
        assert names_of(load_folder(nested, 4, 1, "train.txt,test.txt")) == [("Greek/b", "Latin/c"), None, ("Greek/a",)]

    def test_three_lists_and_names_from_python(self, nested, tmp_path):
        parts = {"train": ["Latin/a", "Greek/a"], "val": ["Greek/b"], "test": ["Latin/b", "Latin/c"]}
        wanted = [("Greek/a", "Latin/a"), ("Greek/b",), ("Latin/b", "Latin/c")]
        for part, group in parts.items():
            (tmp_path / f"{part}.txt").write_text("\n".join(group))
        for split in (parts, "train.txt, val.txt, test.txt"):
            splits = load_folder(nested, 4, 1, split)
            assert names_of(splits) == wanted
            assert splits.train.images[:, 0, 0, 0, 0].tolist() == [0, 30]
            assert splits.test.images[:, 1, 0, 0, 0].tolist() == [41, 51]

    def test_accents_are_found_however_they_are_written(self, tmp_path):
        root = fill(tmp_path / "d", "caf\N{LATIN SMALL LETTER E WITH ACUTE}", "the\N{COMBINING ACUTE ACCENT}")
        split = {"train": ["cafe\N{COMBINING ACUTE ACCENT}"], "test": ["th\N{LATIN SMALL LETTER E WITH ACUTE}"]}
        assert names_of(load_folder(root, 4, 1, split))[1] is None

    @pytest.mark.parametrize(
        ("train", "test", "text"),
        [
            (
                "Greek/a\n\nGreek/z",
                "Latin/a",
                r"train\.txt, line 3 names 'Greek/z', which is no class of .*nested; it has",
            ),
            (
                "Greek/a\nGreek/b",
                "Latin/a\nGreek/b",
                r"test\.txt, line 2 names 'Greek/b', which .*train\.txt, line 2 names",
            ),
            (
                "Greek/a\nGreek\\a",
                "Latin/a",
                r"train\.txt, line 2 names 'Greek/a', which .*line 1 names already; name each",
            ),
            ("Greek", "Latin/a", r"names 'Greek', which is no class of .* 'Greek/a', 'Greek/b', 'Greek/c' and 3 more"),
            ("\r\n", "Latin/a", "no list names a class of .*nested for train; only validation can be left out"),
            ("Greek/a", "", "no list names a class of .*nested for test"),
        ],
    )
    def test_a_list_that_does_not_fit_is_named_with_its_line(self, nested, tmp_path, train, test, text):
        (tmp_path / "train.txt").write_text(train)
        (tmp_path / "test.txt").write_text(test)
        with pytest.raises(ValueError, match=text):
            load_folder(nested, 4, 1, "train.txt,test.txt")

    def test_files_that_are_no_lists(self, nested, tmp_path):
        (tmp_path / "test.txt").write_bytes(b"caf\xe9")
        with pytest.raises(FileNotFoundError, match=r"there is no list of class names at train\.txt"):
            load_folder(nested, 4, 1, "train.txt,test.txt")
        (tmp_path / "train.txt").write_text("Greek/a")
        with pytest.raises(ValueError, match=r"test\.txt is not text in UTF-8 \(.* at byte 3\); save it so"):
            load_folder(nested, 4, 1, "train.txt,test.txt")
        with pytest.raises(ValueError, match="split has a part 'tests'; the parts are train, validation, test"):
            load_folder(nested, 4, 1, {"train": ["Greek/a"], "tests": ["Greek/b"]})


class TestFolders:
    def test_a_class_is_a_folder_that_directly_holds_pictures(self, tmp_path):
        root = fill(tmp_path / "d", "cat", "birds/owl", "birds/seen at night/owl", "birds")
        (root / "cat" / "notes").mkdir()  # lies in a class and holds none
        (root / "birds" / ".hidden").mkdir()
        fill(root, "cat/not a picture.png", count=0)
        train, _, test = names_of(load_folder(root, 4, 1, "2/2"))
        assert sorted(train + test) == ["birds", "birds/owl", "birds/seen at night/owl", "cat"]

    def test_an_empty_folder_was_meant_to_be_a_class(self, nested):
        (nested / "Greek" / "empty").mkdir()
        with pytest.raises(ValueError, match=r"class 'Greek/empty' in .*nested has 0 images; it needs at least 2"):
            load_folder(nested, 4, 1, "50/50")

    def test_pictures_without_a_folder(self, tmp_path):
        fill(tmp_path, "d")
        with pytest.raises(FileNotFoundError, match=r"d has no sub-folders but 2 images; it must hold one sub-folder"):
            load_folder(tmp_path / "d", 4, 1)

    def test_a_link_that_leads_back_is_refused(self, nested):
        (nested / "Latin" / "again").symlink_to(nested)
        with pytest.raises(ValueError, match=r"again leads back to .*nested, which it lies in; take that link away"):
            load_folder(nested, 4, 1)

    def test_links_to_classes_are_followed(self, nested, tmp_path):
        for part, alphabet in (("train", "Greek"), ("test", "Latin")):
            (tmp_path / "linked" / part).mkdir(parents=True)
            (tmp_path / "linked" / part / alphabet).symlink_to(nested / alphabet)
        assert names_of(load_folder(tmp_path / "linked", 4, 1))[0] == ("Greek/a", "Greek/b", "Greek/c")

    @pytest.mark.parametrize("names", [("train", "val", "test"), ("Train", "Valid", "TEST"), ("train", None, "test")])
    def test_folders_divide(self, tmp_path, names):
        root = tmp_path / "d"
        for k, name in enumerate(names):
            if name:
                fill(root / name, f"X/c{k}", f"X/d{k}")
        assert names_of(load_folder(root, 4, 1)) == [name and (f"X/c{k}", f"X/d{k}") for k, name in enumerate(names)]
        with pytest.raises(
            ValueError, match=rf"split '50/50' has no use: .*d is divided already, by its folders .*{names[0]}/"
        ):
            load_folder(root, 4, 1, "50/50")

    def test_classes_may_be_called_train_and_test(self, tmp_path):
        assert names_of(load_folder(fill(tmp_path / "d", "train", "test", "car"), 4, 1, "2/1"))[1] is None

    @pytest.mark.parametrize(
        ("names", "text"),
        [
            (("train", "val"), r"d has train/, val/ but no test/; add it, or pass .*d/train alone to have its classes"),
            (("test",), r"d has test/ but no train/; add it"),
            (("train", "test", "val", "valid"), r"d has val/ and valid/, both for validation; make one of them"),
        ],
    )
    def test_folders_that_divide_in_part_are_refused(self, tmp_path, names, text):
        for k, name in enumerate(names):
            fill(tmp_path / "d" / name, f"a{k}", f"b{k}")
        with pytest.raises(ValueError, match=text):
            load_folder(tmp_path / "d", 4, 1)


def test_what_is_kept_depends_on_the_division(nested, cache):
    """Each division finds its own pictures, whichever came first, and a list that changed is read again."""
    splits = [
        "50/50",
        "3/1/2",
        {"train": ["Latin/c"], "test": ["Greek/a"]},
        {"train": ["Greek/a"], "test": ["Latin/c"]},
    ]
    fresh = []
    for split in splits:
        shutil.rmtree(cache, ignore_errors=True)
        fresh.append([part and part.fingerprint for part in vars(load_folder(nested, 4, 1, split)).values()])
    assert len({tuple(prints) for prints in fresh}) == len(splits)
    for _ in range(2):
        for split, prints in zip(splits, fresh, strict=True):
            assert [part and part.fingerprint for part in vars(load_folder(nested, 4, 1, split)).values()] == prints
    fill(nested, "Latin/c", level=99)
    assert load_folder(nested, 4, 1, splits[2]).train.fingerprint != fresh[2][0]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"ways": 5},
            r"has 4 for train, 1 for validation, 1 for test, too few for train and test; add classes, to 10 at",
        ),
        (
            {"split": "3/1/2"},
            r"too few for test; give --ways 2 or less, or divide them otherwise \(--split, or the fold",
        ),
        ({"split": "3/0/3", "eval_every": 1}, r"has no classes set aside for validation; give --eval-every 0, or set"),
        (
            {"split": "3/1/2", "eval_every": 1},
            r"too few for validation and test; divide them without validation \(--spl",
        ),
        (
            {"ways": 2, "split": "3/1/2", "eval_every": 1},
            r"too few for validation; divide .*, or do without validation",
        ),
    ],
)
def test_too_few_classes_are_counted_with_the_remedy(nested, changes, text):
    chosen = replace(SMALL, **{"ways": 3, **changes})
    with pytest.raises(ValueError, match=text) as found:
        open_episodes(chosen, nested, 0, "cpu")
    if "no classes" not in text:
        assert str(found.value).startswith(f"a {chosen.ways}-way task needs {chosen.ways} classes, and {nested} has ")


@pytest.mark.parametrize("name", ["sinusoid", "glyphs-5w1s"])
def test_a_split_of_data_that_have_one_is_refused(name):
    with pytest.raises(ValueError, match=rf"recipe {name} \w+ its own data, in one way; leave out --split 64/16/20"):
        open_episodes(recipe(name, split="64/16/20"), None, 0, "cpu")
    assert all(source.splits or source.division or source.folder is None for source in sources.known().values())


class TestRuns:
    @pytest.fixture
    def lists(self, nested, tmp_path):
        (tmp_path / "train.txt").write_text("Greek/a\nGreek/b\n")
        (tmp_path / "test.txt").write_text("Latin/a\nLatin/b\n")
        return replace(SMALL, split="train.txt,test.txt")

    def test_a_run_finds_its_lists_from_anywhere(self, lists, nested, tmp_path, monkeypatch):
        Training(lists, Options(tmp_path / "run", nested, device="cpu"))
        monkeypatch.chdir("/")
        run = open_run(tmp_path / "run", "cpu")
        assert run.recipe.split == f"{tmp_path}/train.txt,{tmp_path}/test.txt"
        assert retest(run, None, 2, None, None, None)["tests"][0]["tasks"] == 2

    def test_a_run_goes_on_with_lists_that_moved_and_not_with_others(self, lists, nested, tmp_path):
        Training(lists, Options(tmp_path / "run", nested, device="cpu"))
        (tmp_path / "train.txt").rename(tmp_path / "moved.txt")
        (tmp_path / "moved.txt").write_bytes(b"\xef\xbb\xbfGreek/b\r\nGreek/a\r\n")
        again = Options(tmp_path / "run", nested, device="cpu", resume=True)
        Training(replace(lists, split="moved.txt,test.txt"), again)
        (tmp_path / "test.txt").write_text("Latin/a\nLatin/c\n")
        with pytest.raises(
            CheckpointError, match=r'belongs to another run \(split: "lists \w+" here, "lists \w+" in the'
        ):
            Training(replace(lists, split="moved.txt,test.txt"), again)

    def test_a_test_on_classes_that_may_have_been_trained_on_is_refused(self, nested, tmp_path):
        Training(replace(SMALL, split="50/50"), Options(tmp_path / "run", nested, device="cpu"))
        run = open_run(tmp_path / "run", "cpu")
        rows = retest(run, nested, 2, None, None, None)["tests"]
        shutil.copytree(nested, tmp_path / "copy")
        assert retest(run, tmp_path / "copy", 2, None, None, None)["tests"] == rows
        fill(nested, "Greek/new")
        text = rf"training classes in {re.escape(str(nested))} are not those that the run was trained on.*restore them"
        for data, split in ((None, None), (nested, None), (None, "40/60")):
            with pytest.raises(ValueError, match=text):
                retest(run, data, 2, None, None, None, split)
        fill(tmp_path / "other", "a", "b", "c", "d")
        assert retest(run, tmp_path / "other", 2, None, None, None, "2/2")["tests"][0]["tasks"] == 2

    def test_the_command_line_divides(self, nested, tmp_path, capsys):
        words = [
            "train",
            "folder-5w1s",
            "--data",
            "nested",
            "--iterations",
            "1",
            "--ways",
            "2",
            "--tasks",
            "1",
            "--steps",
        ]
        words += ["1", "--queries", "1", "--test-tasks", "2", "--device", "cpu", "--out", "run"]
        for split, code, text in (
            ("50/50", 0, "classes: 3 for train, 0 for validation, 3 for test\n"),
            ("a.txt,b.txt", 1, "metafast: there is no list of class names at a.txt"),
            ("60/50", 2, "metafast: split is 60/50, which sums to 110; shares must sum to 100"),
        ):
            with pytest.raises(SystemExit) as stop:
                main([*words, "--split", split])
            captured = capsys.readouterr()
            assert (stop.value.code or 0) == code
            assert text in captured.out + captured.err
            shutil.rmtree("run", ignore_errors=True)


def test_a_division_in_words_is_left_alone():
    for split in ("", "background", "maml", "64/16/20"):
        assert division.absolute(split) == division.identity(split) == split
