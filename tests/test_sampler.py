"""The counter, the data set and the classification sampler."""

import itertools

import pytest
import torch

from metafast.episodes import ClassificationSampler, ImageDataset, SinusoidSampler
from metafast.episodes.counter import Counter, choose, local_tasks, uniform

CPU = torch.device("cpu")
WRAP = 2**64


def reference_mix(z):
    """The SplitMix64 finaliser on unbounded integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % WRAP
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % WRAP
    return z ^ (z >> 31)


def numbered(classes=30, instances=20, counts=None):
    """Images of two pixels that say which class and which instance they are."""
    images = torch.empty(classes, instances, 1, 1, 2, dtype=torch.uint8)
    images[..., 0] = torch.arange(classes)[:, None, None, None]
    images[..., 1] = torch.arange(instances)[:, None, None]
    return ImageDataset(images, tuple(f"c{i}" for i in range(classes)), counts)


def read_back(x):
    """Classes and instances ``[T, n]`` of a batch drawn from ``numbered``."""
    numbers = (x * 255).round().long().flatten(2)
    return numbers[..., 0], numbers[..., 1]


def excess(counts):
    """Pearson's chi-square for equal expected counts, in standard deviations above its mean."""
    counts = counts.double()
    expected = counts.mean()
    freedom = counts.numel() - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom).item() / (2 * freedom) ** 0.5


def same_bits(a, b):
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("support_x", "support_y", "query_x", "query_y"))


class TestCounter:
    def test_is_the_published_generator(self):
        golden = 0x9E3779B97F4A7C15
        published = [6457827717110365317, 3203168211198807973, 9817491932198370423]  # SplitMix64 from state 1234567
        assert [reference_mix((1234567 + k * golden) % WRAP) for k in (1, 2, 3)] == published

    @pytest.mark.parametrize("seed", [0, 7, -1, 2**63, 2**70 + 3])
    @pytest.mark.parametrize("step", [0, 12, 2**40])
    def test_words_follow_the_formula(self, seed, step):
        import hashlib

        name = int.from_bytes(hashlib.sha256(b"train").digest()[:8], "little")
        words = Counter(seed, "train").words(step, range(3, 6), 4, CPU)
        for i, j in itertools.product(range(3), range(4)):
            h = reference_mix(seed % WRAP)
            for coordinate in (name, step, 3 + i, j):
                h = reference_mix((h + (coordinate + 1) * 0x9E3779B97F4A7C15) % WRAP)
            assert words[i, j].item() % WRAP == h

    def test_no_word_comes_twice(self):
        words = [
            Counter(seed, stream).words(step, range(8), 50, CPU).flatten()
            for seed in (0, 1)
            for stream in ("train", "validation", "test")
            for step in range(20)
        ]
        assert torch.cat(words).unique().numel() == 2 * 3 * 20 * 8 * 50

    def test_bits_are_balanced(self):
        words = Counter(0, "train").words(0, range(100), 1000, CPU)
        ones = torch.stack([(words >> bit & 1).double().mean() for bit in range(64)])
        assert (ones - 0.5).abs().max() < 5 * 0.5 / 100_000**0.5

    def test_uniform_is_exact_and_in_range(self):
        extremes = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
        assert uniform(extremes).tolist() == [0.0, 1 - 2.0**-53, 0.5 - 2.0**-53, 0.5]

    def test_choose_is_fisher_yates(self):
        words = Counter(5, "x").words(0, range(40), 6, CPU)
        for row, chosen in zip((words & (2**63 - 1)).tolist(), choose(words, 9).tolist(), strict=True):
            pool = list(range(9))
            for i, word in enumerate(row):
                j = i + word % (9 - i)
                pool[i], pool[j] = pool[j], pool[i]
            assert chosen == pool[:6]

    def test_choose_all_is_a_permutation(self):
        chosen = choose(Counter(5, "x").words(0, range(40), 7, CPU), 7)
        assert torch.equal(chosen.sort().values, torch.arange(7).expand(40, 7))

    def test_every_ordered_choice_is_equally_likely(self):
        chosen = choose(Counter(1, "x").words(0, range(60_000), 3, CPU), 5)
        counts = torch.bincount((chosen * torch.tensor([25, 5, 1])).sum(1), minlength=125)
        assert (counts > 0).sum() == 5 * 4 * 3
        assert abs(excess(counts[counts > 0])) < 5

    def test_permutation_is_one(self):
        order = Counter(0, "split").permutation(500)
        assert sorted(order) == list(range(500)) != order

    @pytest.mark.parametrize("seed", [1.5, "1", None, True])
    def test_seed_must_be_an_integer(self, seed):
        with pytest.raises(TypeError, match=r"seed is .* must be an integer"):
            Counter(seed, "train")

    def test_stream_must_be_a_name(self):
        with pytest.raises(TypeError, match="stream is ''; it must be a name"):
            Counter(0, "")


class TestShares:
    @pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
    def test_rank_out_of_range(self, rank, world):
        with pytest.raises(ValueError, match=f"rank is {rank} and world is {world}"):
            local_tasks(8, 0, rank, world)

    def test_world_must_divide(self):
        with pytest.raises(ValueError, match="batch of 8 tasks cannot be shared equally by world=3"):
            local_tasks(8, 0, 0, 3)

    def test_negative_step(self):
        with pytest.raises(ValueError, match="step is -1; steps count from 0"):
            local_tasks(8, -1, 0, 1)

    def test_step_tensor_of_a_wrong_kind(self):
        with pytest.raises(ValueError, match=r"shape \(1,\) and torch.float32; it must be int64"):
            local_tasks(8, torch.zeros(1), 0, 1)


@pytest.mark.parametrize(
    "sampler",
    [
        ClassificationSampler(numbered(), 5, 2, 3, 8, seed=4),
        ClassificationSampler(numbered(counts=torch.arange(30) % 10 + 8), 5, 2, 3, 8, seed=4),
        SinusoidSampler(10, 5, 8, seed=4),
    ],
    ids=["images", "ragged", "sinusoid"],
)
class TestEverySampler:
    def test_same_bits_twice_and_from_any_start(self, sampler):
        forward = [sampler.batch(step) for step in range(5)]
        for step in (4, 0, 3):
            assert same_bits(sampler.batch(step), forward[step])
        assert not torch.equal(forward[0].support_x, forward[1].support_x)

    @pytest.mark.parametrize("world", [2, 4, 8])
    def test_ranks_share_the_global_batch(self, sampler, world):
        whole = sampler.batch(3)
        for rank in range(world):
            share = slice(rank * 8 // world, (rank + 1) * 8 // world)
            assert same_bits(sampler.batch(3, rank, world), whole.tasks(share))

    def test_step_may_be_a_tensor(self, sampler):
        assert same_bits(sampler.batch(torch.tensor(2**33 + 1)), sampler.batch(2**33 + 1))

    def test_step_may_be_a_row_of_them(self, sampler):
        steps = [3, 2**33 + 1, 0, *range(40, 60)]
        row = sampler.batch(torch.tensor(steps))
        assert len(row) == 8 * len(steps)
        for i, step in enumerate(steps):
            assert same_bits(row.tasks(slice(8 * i, 8 * i + 8)), sampler.batch(step))

    def test_settings_are_plain_and_complete(self, sampler):
        import json

        settings = json.loads(json.dumps(sampler.settings))
        assert settings == sampler.settings
        assert {"kind", "shots", "queries", "tasks", "seed", "stream"} <= settings.keys()

    @pytest.mark.gpu
    def test_same_bits_on_the_gpu(self, sampler):
        moved = on_gpu(sampler)
        for step in (0, 2**33 + 1):
            there, here = moved.batch(step).to("cpu"), sampler.batch(step)
            assert torch.equal(there.support_x, here.support_x)
            torch.testing.assert_close(there.support_y, here.support_y, rtol=2e-7, atol=1e-7)

    @pytest.mark.gpu
    def test_can_be_captured(self, sampler):
        moved = on_gpu(sampler)
        step = torch.tensor(1, device="cuda")
        moved.batch(step)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = moved.batch(step)
        for value in (5, 6):
            step.fill_(value)
            graph.replay()
            assert same_bits(captured, moved.batch(value))


def on_gpu(sampler):
    if isinstance(sampler, SinusoidSampler):
        return SinusoidSampler(sampler.shots, sampler.queries, sampler.tasks, sampler.seed, device="cuda")
    s = sampler
    return ClassificationSampler(s.dataset.to("cuda"), s.ways, s.shots, s.queries, s.tasks, s.seed)


class TestClassification:
    sampler = ClassificationSampler(numbered(), ways=5, shots=3, queries=4, tasks=3000)

    def test_shapes_and_types(self):
        batch = ClassificationSampler(numbered(), 5, 3, 4, 6).batch(0)
        assert batch.support_x.shape == (6, 15, 1, 1, 2)
        assert batch.query_x.shape == (6, 20, 1, 1, 2)
        assert (batch.support_x.dtype, batch.support_y.dtype) == (torch.float32, torch.int64)
        assert batch.support_y.tolist() == [[0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3] * 6
        assert batch.query_y.shape == (6, 20)

    def test_pixels_are_scaled_to_one(self):
        levels = torch.arange(256, dtype=torch.uint8).reshape(2, 2, 1, 8, 8)
        batch = ClassificationSampler(ImageDataset(levels, ("a", "b")), 2, 1, 1, 1).batch(0)
        values = torch.cat([batch.support_x, batch.query_x], dim=1).flatten().sort().values
        assert values[0] == 0
        assert values[-1] == 1
        torch.testing.assert_close(values, torch.arange(256) / 255, rtol=1e-7, atol=0)

    def test_a_label_is_a_class_and_no_class_comes_twice(self):
        batch = self.sampler.batch(0)
        support, _ = read_back(batch.support_x)
        query, _ = read_back(batch.query_x)
        support, query = support.unflatten(1, (5, 3)), query.unflatten(1, (5, 4))
        classes = support[:, :, :1]
        assert (support == classes).all()
        assert (query == classes).all()
        assert (classes.flatten(1).sort(dim=1).values.diff(dim=1) > 0).all()

    def test_support_and_query_are_disjoint(self):
        batch = self.sampler.batch(1)
        _, support = read_back(batch.support_x)
        _, query = read_back(batch.query_x)
        samples = torch.cat([support.unflatten(1, (5, 3)), query.unflatten(1, (5, 4))], dim=2)
        assert (samples.sort(dim=2).values.diff(dim=2) > 0).all()

    def test_classes_labels_and_instances_are_uniform(self):
        classes, instances = read_back(self.sampler.batch(2).support_x)
        first = classes[:, ::3]
        by_label = torch.stack([torch.bincount(first[:, w], minlength=30) for w in range(5)])
        assert abs(excess(by_label.flatten())) < 5
        for place in range(3):
            assert abs(excess(torch.bincount(instances[:, place::3].flatten(), minlength=20))) < 5
        pairs = torch.bincount((first[:, 0] * 30 + first[:, 1]), minlength=900)[~torch.eye(30, dtype=bool).flatten()]
        assert abs(excess(pairs)) < 5

    def test_the_bound_on_uniformity_can_fail(self):
        words = Counter(0, "x").words(0, range(3000), 5, CPU)
        lopsided = torch.where(words % 11 == 0, 0, (words & 2**62 - 1) % 30)
        assert excess(torch.bincount(lopsided.flatten(), minlength=30)) > 5

    def test_steps_and_tasks_are_independent(self):
        small = ClassificationSampler(numbered(5, 2), 1, 1, 1, 4)
        drawn = torch.stack([read_back(small.batch(step).support_x)[0].flatten() for step in range(2500)])
        for a, b in ((drawn[:-1, 0], drawn[1:, 0]), (drawn[:, 0], drawn[:, 1]), (drawn[:, 1], drawn[:, 3])):
            assert abs(excess(torch.bincount(a * 5 + b, minlength=25))) < 5

    def test_streams_and_seeds_do_not_coincide(self):
        def tasks(seed, stream):
            x = ClassificationSampler(numbered(), 5, 1, 1, 500, seed, stream).batch(0).support_x
            return set(map(tuple, (x * 255).round().flatten(1).tolist()))

        lists = [tasks(*key) for key in itertools.product((0, 1), ("train", "validation", "test"))]
        assert len(set().union(*lists)) == sum(map(len, lists)) == 6 * 500

    def test_ragged_classes_never_give_padding(self):
        counts = torch.tensor([4, 7, 20, 5])
        sampler = ClassificationSampler(numbered(4, 20, counts), 3, 2, 2, 2000)
        batch = sampler.batch(0)
        classes, instances = read_back(torch.cat([batch.support_x, batch.query_x], dim=1))
        for c, count in enumerate(counts.tolist()):
            drawn = torch.bincount(instances[classes == c], minlength=20)
            assert (drawn[count:] == 0).all()
            assert (drawn[:count] > 0).all()

    @pytest.mark.parametrize("name", ["ways", "shots", "queries", "tasks"])
    @pytest.mark.parametrize("value", [0, -2, 1.0])
    def test_numbers_must_be_positive(self, name, value):
        numbers = {"ways": 5, "shots": 1, "queries": 1, "tasks": 4, name: value}
        with pytest.raises(ValueError, match=f"{name} is {value}; it must be an integer of at least 1"):
            ClassificationSampler(numbered(), **numbers)

    def test_more_ways_than_classes(self):
        with pytest.raises(ValueError, match="31-way task needs 31 classes; the data set has 30"):
            ClassificationSampler(numbered(), 31, 1, 1, 4)

    def test_too_few_instances(self):
        with pytest.raises(ValueError, match="each class has 20 instances, but 6 shots and 15 queries take 21"):
            ClassificationSampler(numbered(), 5, 6, 15, 4)

    def test_too_few_instances_in_one_class(self):
        counts = torch.full((30,), 20)
        counts[17] = 3
        with pytest.raises(ValueError, match="class 'c17' has 3 instances, but 1 shots and 3 queries take 4"):
            ClassificationSampler(numbered(counts=counts), 5, 1, 3, 4)


class TestDataset:
    def test_rotations_are_new_classes(self):
        image = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)
        turned = ImageDataset(image.expand(3, 5, 1, 2, 2), ("a", "b", "c"), torch.tensor([5, 4, 5])).with_rotations()
        assert len(turned) == 12
        assert turned.class_names[::3] == ("a", "a 90°", "a 180°", "a 270°")
        seen = [turned.images[k, 0, 0].tolist() for k in (0, 3, 6, 9)]
        assert seen == [[[1, 2], [3, 4]], [[2, 4], [1, 3]], [[4, 3], [2, 1]], [[3, 1], [4, 2]]]
        assert turned.counts.tolist() == [5, 4, 5] * 4

    def test_split_is_disjoint_complete_and_seeded(self):
        data = numbered(50)
        splits = data.split((0.6, 0.2, 0.2), seed=1)
        names = [part.class_names for part in (splits.train, splits.validation, splits.test)]
        assert list(map(len, names)) == [30, 10, 10]
        assert sorted(itertools.chain(*names)) == sorted(data.class_names)
        assert data.split((0.6, 0.2, 0.2), seed=1).test.class_names == names[2]
        assert data.split((0.6, 0.2, 0.2), seed=2).test.class_names != names[2]
        for part in (splits.train, splits.validation, splits.test):
            assert [f"c{v}" for v in part.images[:, 0, 0, 0, 0].tolist()] == list(part.class_names)

    def test_split_without_validation(self):
        splits = numbered(10).split((0.8, 0, 0.2))
        assert splits.validation is None
        assert (len(splits.train), len(splits.test)) == (8, 2)

    def test_splits_rotate_training_alone_unless_asked(self):
        splits = ImageDataset(torch.zeros(10, 2, 1, 4, 4, dtype=torch.uint8), tuple("abcdefghij")).split(
            (0.5, 0.3, 0.2)
        )
        assert [len(p) for p in vars(splits.with_rotations()).values()] == [20, 3, 2]
        assert [len(p) for p in vars(splits.with_rotations(test=True)).values()] == [20, 12, 8]

    def test_fingerprint_sees_pixels_names_and_counts(self):
        data = numbered(3, 4)
        other = data.images.clone()
        other[2, 3, 0, 0, 1] += 1
        prints = {
            data.fingerprint,
            ImageDataset(other, data.class_names).fingerprint,
            ImageDataset(data.images, ("c0", "c1", "d2")).fingerprint,
            ImageDataset(data.images, data.class_names, torch.tensor([4, 4, 3])).fingerprint,
            ImageDataset(data.images.transpose(3, 4), data.class_names).fingerprint,
        }
        assert len(prints) == 5
        assert numbered(3, 4).fingerprint == data.fingerprint

    def test_select_keeps_order_and_counts(self):
        chosen = numbered(4, 6, torch.tensor([6, 5, 4, 3])).select([3, 1])
        assert (chosen.class_names, chosen.counts.tolist()) == (("c3", "c1"), [3, 5])
        assert chosen.images[:, 0, 0, 0, 0].tolist() == [3, 1]

    @pytest.mark.parametrize(
        ("change", "error", "text"),
        [
            ({"images": torch.zeros(3, 2, 1, 4, 4)}, TypeError, "images is torch.float32; it must be a torch.uint8"),
            ({"images": torch.zeros(3, 4, 4, dtype=torch.uint8)}, ValueError, r"shape \(3, 4, 4\); it must be \[cl"),
            ({"class_names": ("a",)}, ValueError, "1 class names for 3 classes"),
            ({"counts": torch.ones(2, dtype=torch.int64)}, ValueError, r"shape \(2,\); it must be torch.int64 of"),
            ({"counts": torch.tensor([1, 3, 2])}, ValueError, r"counts must lie in 1\.\.2"),
        ],
    )
    def test_wrong_parts(self, change, error, text):
        parts = {"images": torch.zeros(3, 2, 1, 4, 4, dtype=torch.uint8), "class_names": tuple("abc"), **change}
        with pytest.raises(error, match=text):
            ImageDataset(**parts)

    @pytest.mark.parametrize("fractions", [(0.5, 0.2, 0.2), (1.2, -0.4, 0.2), (0.5, 0.5)])
    def test_fractions_must_sum_to_one(self, fractions):
        with pytest.raises(ValueError, match=r"must be \(train, validation, test\), summing to 1"):
            numbered().split(fractions)

    def test_a_split_without_classes(self):
        with pytest.raises(ValueError, match="of 3 classes leave the validation split without a class"):
            numbered(3).split((0.64, 0.1, 0.26))

    def test_oblong_images_do_not_rotate(self):
        with pytest.raises(ValueError, match="images of 1x2 cannot be turned by 90 degrees"):
            numbered().with_rotations()

    def test_select_outside(self):
        with pytest.raises(IndexError, match=r"class 30 is outside 0\.\.29"):
            numbered().select([0, 30])
