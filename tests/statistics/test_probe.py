"""Whether data come in random order: the scores by their definition, what they find, and what they leave alone."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch.quasirandom import SobolEngine

from lightning_bnmonitor.statistics.probe import LIMIT, InputProbe, Scores, _directions
from lightning_bnmonitor.statistics.scores import f_score

CPU = torch.device("cpu")


def probed(steps, every=None):
    """A probe that has seen what these steps were given: a tensor, or several."""
    probe = InputProbe()
    for number, step in enumerate(steps, 1):
        probe.see([step] if isinstance(step, torch.Tensor) else step)
        if every and number % every == 0:
            probe._merge()
    probe._merge()
    return probe


def scores(steps):
    return probed(steps).scores()


def is_found(result):
    return max(result) > LIMIT


# The reference, in float64, from the raw batches

NUMBERS = np.random.default_rng(0).standard_normal((256, 16), dtype=np.float32).astype(np.float64) / 16


def projected(x):
    """Of the first 64 samples the values at 256 points, or all token ids of a short sequence, times the numbers."""
    x = x[:64].double().numpy() if x.is_floating_point() or x.dtype is torch.uint8 else x[:64].numpy()
    is_tokens, shape = np.issubdtype(x.dtype, np.signedinteger), x.shape[1:]
    if not is_tokens or x[0].size > 256:
        places = [np.zeros(256, dtype=int)]
        if shape:
            unit = SobolEngine(len(shape), scramble=True, seed=0).draw(256, dtype=torch.float64).numpy()
            places = [np.floor(along * length).astype(int) for along, length in zip(unit.T, shape, strict=True)]
        x = x[(slice(None), *places)] if shape else np.repeat(x[:, None], 256, axis=1)
    if is_tokens:
        return np.array([[NUMBERS[i % 256] for i in sample.ravel()] for sample in x]).mean(axis=1)
    return x @ NUMBERS


def expected_scores(steps, block_size):
    """By the definitions, with blocks of so many batches."""
    steps = [[projected(x) for x in ([step] if isinstance(step, torch.Tensor) else step)] for step in steps]
    scatter = [np.sqrt(part.var(axis=0).mean()) for part in steps[0]]
    scales = [1, *(scatter[0] / own for own in scatter[1:])]
    batches = [sum(part * scale for part, scale in zip(step, scales, strict=True)) for step in steps]
    center = batches[0].mean(axis=0)
    both = [[batch - center for batch in batches], [abs(batch - center) for batch in batches]]
    return Scores(*np.max([scores_of_values(values, block_size) for values in both], axis=0))


def scores_of_values(batches, block_size):
    blocks = [batches[start : start + block_size] for start in range(0, len(batches), block_size)]
    everything = np.concatenate(batches)
    s, middle = everything.var(axis=0, ddof=1), everything.mean(axis=0)
    within, between = 0, 0
    for block in blocks:
        mean = np.concatenate(block).mean(axis=0)
        within = within + sum(len(batch) * (batch.mean(axis=0) - mean) ** 2 for batch in block)
        between = between + sum(map(len, block)) * (mean - middle) ** 2
    dof, free = len(batches) - len(blocks), len(blocks) - 1
    grouping = (within / dof / s).mean()
    ordering = (between / s).mean() / (free * grouping)
    return normal_score(ordering, free, dof), normal_score(grouping, dof, len(everything))


def normal_score(ratio, dof, dof_below):
    """The cube root of a mean square is all but normal, with a mean of 1 - 2/(9 dof) and a variance of 2/(9 dof)."""
    above, below = 2 / (9 * dof), 2 / (9 * dof_below)
    root = ratio ** (1 / 3)
    return (root * (1 - below) - (1 - above)) / math.hypot(math.sqrt(below) * root, math.sqrt(above))


@pytest.mark.parametrize(("dof", "dof_below"), [(7, 8), (15, 16), (15, 48), (48, 1024), (8, 200)])
def test_a_ratio_of_variances_is_on_the_scale_of_a_standard_normal_variable(dof, dof_below):
    rng = np.random.default_rng(7)
    ratio = rng.chisquare(dof, 200_000) / dof / (rng.chisquare(dof_below, 200_000) / dof_below)
    score = f_score(ratio, np.array(dof), np.array(dof_below))
    assert abs(score.mean()) < 0.01
    assert score.std() == pytest.approx(1, abs=0.02)
    assert 0.018 < (score > 2).mean() < 0.028


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def moving(num, *shape, seed=0, spread=1.0):
    """Batches whose mean and spread move."""
    x = normal(num, *shape, seed=seed)
    time = torch.linspace(0, 1, num).view(-1, *[1] * len(shape))
    return list(x * (1 + spread * time) + 0.5 * time)


def uneven(num, seed=0):
    sizes = torch.randint(2, 12, (num,), generator=generator(seed))
    return [batch[:size] for batch, size in zip(moving(num, 12, 6, seed=seed), sizes.tolist(), strict=True)]


def images(num, seed=0):
    return [(40 * (batch + 2)).clamp(0, 255).to(torch.uint8) for batch in moving(num, 8, 3, 5, 4, seed=seed)]


def tokens(num, length, seed=0):
    low = torch.linspace(0, 100, num).long().tolist()
    return [torch.randint(start, start + 2000, (6, length), generator=generator(seed + start)) for start in low]


CASES = {
    "numbers": lambda num: moving(num, 8, 6),
    "as many as points": lambda num: moving(num, 8, 256),
    "one more": lambda num: moving(num, 8, 257),
    "one a sample": lambda num: moving(num, 8),
    "one a sample in a column": lambda num: moving(num, 8, 1),
    "in random order": lambda num: moving(num, 8, 6, spread=0.0, seed=4),
    "batches of uneven sizes": uneven,
    "one sample a batch": lambda num: moving(num, 1, 6),
    "more samples than are looked at": lambda num: moving(num, 70, 6),
    "small images": lambda num: moving(num, 4, 3, 4, 5),
    "large images": lambda num: moving(num, 4, 3, 20, 17),
    "videos": lambda num: moving(num, 2, 3, 4, 9, 8),
    "images of several sizes": lambda num: [x[..., : 9 + t % 7] for t, x in enumerate(moving(num, 4, 3, 20, 17))],
    "images in bytes": images,
    "token ids": lambda num: tokens(num, 9),
    "long sequences of token ids": lambda num: tokens(num, 300),
    "token ids of several lengths": lambda num: [x[:, : 5 + t % 4].int() for t, x in enumerate(tokens(num, 9))],
    "negative token ids": lambda num: [x - 1000 for x in tokens(num, 9)],
    "float16": lambda num: [x.half() for x in moving(num, 8, 6)],
    "bfloat16": lambda num: [x.bfloat16() for x in moving(num, 8, 6)],
    "float64": lambda num: [x.double() for x in moving(num, 8, 6)],
    "several of unlike scale": lambda num: [
        [a, 1000 * b, c * 1e-3]
        for a, b, c in zip(moving(num, 8, 6), moving(num, 8, 4, seed=1), moving(num, 8, 2, 7, seed=2), strict=True)
    ],
}


@pytest.mark.parametrize(("num", "block_size"), [(8, 2), (9, 2), (32, 2), (33, 4)])
@pytest.mark.parametrize("case", CASES)
def test_the_scores_are_what_the_definitions_say(case, num, block_size):
    steps = CASES[case](num)
    assert tuple(scores(steps)) == pytest.approx(tuple(expected_scores(steps, block_size)), rel=1e-4, abs=1e-4)


def test_what_is_far_from_zero_cancels_little():
    steps = [x + 1000 for x in moving(40, 8, 6)]
    expected = expected_scores(steps, 4)
    assert is_found(expected)
    assert tuple(scores(steps)) == pytest.approx(tuple(expected), rel=1e-2)


# What is found


def classes(num, seed=0):
    """Samples of four classes and their labels: sums of waves, of 12 by 12 pixels."""
    labels = torch.arange(num) % 4
    along = torch.linspace(0, 3, 12)
    waves = torch.sin(along[:, None] * (labels[:, None, None] + 1) + along)
    return 0.7 * waves[:, None] + normal(num, 1, 12, 12, seed=seed), labels


def in_spread(num, seed=0):
    """Samples of two classes of equal means: of one the contrast is half as large."""
    labels = torch.arange(num) % 2
    return normal(num, 10, seed=seed) * (0.5 + 0.5 * labels[:, None]), labels


def with_one_direction(num, seed=0):
    """Skewed features that are nearly one."""
    size = normal(num, 1, seed=seed).exp()
    return size * (2 + 0.2 * normal(num, 30, seed=seed + 1)), (size[:, 0] > 1).long()


def words(num, seed=0):
    """Sequences of 20 token ids, whose law depends on the topic."""
    topics = torch.arange(num) % 3
    common, own = (torch.randint(low, 5000, (num, 20), generator=generator(seed + low)) for low in (0, 1))
    own = 17 * topics[:, None] + own % 11
    return torch.where(torch.rand(num, 20, generator=generator(seed)) < 0.3, own, common), topics


def bytes_of_classes(num, seed=0):
    x, labels = classes(num, seed)
    return (128 + 30 * x).clamp(0, 255).to(torch.uint8), labels


DATA = {
    "classes": classes,
    "classes in bytes": bytes_of_classes,
    "classes of another spread": in_spread,
    "one direction": with_one_direction,
    "topics": words,
}


def shuffled(data, size, seed):
    order = torch.randperm(len(data), generator=generator(seed))
    return [data[own] for own in order[: len(order) // size * size].split(size)]


def by_class(data, labels, size):
    return [data[own] for own in labels.argsort(stable=True).split(size)]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 8, 32])
def test_shuffled_data_exceed_the_limit_by_chance_alone(size):
    num_found = {}
    for kind, make in DATA.items():
        data, _ = make(size * 40)
        num_found[kind] = sum(is_found(scores(shuffled(data, size, seed))) for seed in range(40))
    print(f"windows of 40 batches of {size}, of 40 of each kind, above the limit: {num_found}")
    assert sum(num_found.values()) <= 0.03 * 40 * len(DATA)


@pytest.mark.parametrize("kind", DATA)
def test_sorted_data_are_found(kind):
    data, labels = DATA[kind](640)
    assert scores(by_class(data, labels, 16)).order > 1.25 * LIMIT
    assert not is_found(scores(shuffled(data, 16, seed=1)))


@pytest.mark.parametrize("kind", DATA)
def test_batches_of_one_class_each_are_found_though_these_come_in_random_order(kind):
    data, labels = DATA[kind](960)
    batches = by_class(data, labels, 16)
    batches = [batches[i] for i in torch.randperm(len(batches), generator=generator(5)).tolist()]
    assert scores(batches).group > 1.25 * LIMIT


def test_what_differs_in_spread_alone_is_found_by_the_sizes_alone():
    data, labels = in_spread(640)
    batches = [projected(batch) for batch in by_class(data, labels, 16)]
    center = batches[0].mean(axis=0)
    of_values, _ = scores_of_values([batch - center for batch in batches], 4)
    assert abs(of_values) < LIMIT < scores(by_class(data, labels, 16)).order


def test_a_drift_of_the_brightness_is_found():
    data = [x + 0.01 * t for t, x in enumerate(shuffled(classes(960)[0], 16, seed=2))]
    assert scores(data).order > 1.25 * LIMIT


def scenes(num, seed=0):
    """Images of one of two scenes, of any number of pixels: the same at the same relative position."""

    def scene(label, height, width, seed):
        rows, columns = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
        picture = torch.stack(torch.broadcast_tensors(rows * (1 - label) + columns * label, rows * columns, 1 - rows))
        return 2 * picture + 0.5 * normal(8, 3, height, width, seed=seed)

    sizes = torch.randint(20, 40, (num, 2), generator=generator(seed)).tolist()
    return [(lambda label, t=t, size=size: scene(label, *size, 100 + t)) for t, size in enumerate(sizes)]


def test_images_whose_size_varies_are_compared():
    draw = scenes(60)
    assert not is_found(scores([each(0) for each in draw]))
    assert scores([each(int(t >= 30)) for t, each in enumerate(draw)]).order > 1.25 * LIMIT


def test_sequences_whose_length_varies_are_compared():
    data, topics = words(960)
    lengths = torch.randint(10, 20, (60,), generator=generator(6)).tolist()

    def cut(batches):
        return [batch[:, :length] for batch, length in zip(batches, lengths, strict=True)]

    assert not is_found(scores(cut(shuffled(data, 16, seed=3))))
    assert scores(cut(by_class(data, topics, 16))).order > 1.25 * LIMIT


@pytest.mark.parametrize("which", [0, 1])
def test_an_order_of_either_of_two_inputs_is_found_whatever_their_scales(which):
    data, labels = classes(640)
    ordered, random_ = by_class(data, labels, 16), shuffled(normal(640, 5, seed=8), 16, seed=4)
    for scales in ((1, 1), (1, 1e4), (1e4, 1)):
        steps = [[a * scales[0], b * scales[1]] for a, b in zip(ordered, random_, strict=True)]
        assert scores([step[::-1] if which else step for step in steps]).order > LIMIT
    other = shuffled(data, 16, seed=5)
    assert not is_found(scores([[a, b] for a, b in zip(other, random_, strict=True)]))


# What is not known


def test_too_few_batches_tell_nothing():
    assert InputProbe().scores() is None
    assert scores(moving(7, 8, 6)) is None
    assert scores(moving(8, 8, 6)) is not None


@pytest.mark.parametrize("size", [1, 8])
def test_constant_inputs_tell_nothing(size):
    assert scores([torch.full((size, 6), 0.0)] * 40) is None
    assert scores([torch.full((size, 6), 0.3)] * 40) is None
    assert scores([torch.full((size + t % 3, 6), 0.3) for t in range(40)]) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 20])
def test_a_value_that_is_not_finite_tells_nothing(at, value):
    steps = moving(40, 8, 6)
    steps[at][3, 2] = value
    assert scores(steps) is None


@pytest.mark.parametrize("numbers", [(1, 2), (2, 1), (2, 3), (1, 0), (0, 1)])
def test_steps_with_differing_numbers_of_inputs_tell_nothing(numbers):
    steps = [[x] * numbers[t % 2] for t, x in enumerate(moving(40, 8, 6))]
    probe = probed(steps)
    assert probe.scores() is None
    probe.reset()
    for x in moving(40, 8, 6):
        probe.see([x])
    probe._merge()
    assert probe.scores() == scores(moving(40, 8, 6))


@pytest.mark.parametrize("offset", [0, 100])
@pytest.mark.parametrize("case", ["numbers", "token ids", "large images", "several of unlike scale"])
def test_a_batch_that_is_repeated_tells_nothing(case, offset):
    batch, *_ = CASES[case](1)
    batch = [x + offset for x in (batch if isinstance(batch, list) else [batch])]
    for num in (8, 16, 40, 64):
        assert scores([batch] * num) is None


# When, and what is left alone


@pytest.mark.parametrize("num", [64, 65, 128, 256, 1000])
def test_of_long_windows_steps_are_looked_at_more_and_more_seldom(num):
    looked_at = [*range(64), *range(64, 128, 4), *range(128, 256, 8), *range(256, 512, 16), *range(512, 1000, 32)]
    data, labels = in_spread(num * 4)
    steps = by_class(data, labels, 4)
    probe = probed(step if number in looked_at else step * math.nan for number, step in enumerate(steps))
    assert probe._window.blocks().num_batches[0].sum() == sum(number < num for number in looked_at)
    assert probe.scores() == scores(steps)
    assert probe.scores().order > LIMIT
    assert (
        num == 64 or scores([step * math.nan if n == looked_at[64] else step for n, step in enumerate(steps)]) is None
    )


def test_a_window_that_begins_anew_is_as_the_first():
    first, second = moving(70, 8, 6, seed=1), moving(40, 8, 6, seed=2)
    probe = probed(first)
    probe.reset()
    assert probe.scores() is None
    for x in second:
        probe.see([x])
    probe._merge()
    assert probe.scores() == scores(second)


def test_inputs_that_are_on_another_device_than_before_are_seen_from_the_next_window_on():
    steps = moving(40, 8, 6, seed=2)
    probe = InputProbe()
    probe.restore(probed(steps[:20]).state(), torch.device("meta"))  # where the model was, before it moved to the CPU
    probe.see([steps[20]])
    assert not probe.is_due  # the part of this window that was seen is lost
    probe.reset()
    for x in steps:
        probe.see([x])
    probe._merge()
    assert probe.scores() == scores(steps)


@pytest.mark.parametrize("case", ["numbers", "images of several sizes", "token ids", "several of unlike scale"])
def test_when_it_is_merged_changes_no_score(case):
    steps = CASES[case](100)
    at_once = scores(steps)
    for every in (1, 7, 30):
        assert tuple(probed(steps, every).scores()) == pytest.approx(tuple(at_once), rel=1e-9)


@pytest.mark.parametrize("saved_at", [0, 1, 12, 40, 90])
@pytest.mark.parametrize("case", ["numbers", "images of several sizes", "token ids", "several of unlike scale"])
def test_what_is_saved_in_mid_window_goes_on_to_the_same_bits(case, saved_at):
    steps = CASES[case](120)
    straight = probed(steps[:saved_at])
    state = straight.state()
    resumed = InputProbe()
    resumed.restore(state, CPU)
    for x in steps[saved_at:]:
        for probe in (straight, resumed):
            probe.see([x] if isinstance(x, torch.Tensor) else x)
    for probe in (straight, resumed):
        probe._merge()
    assert resumed.scores() == straight.scores()
    assert resumed.scores() is not None


def test_that_something_could_not_be_looked_at_is_saved():
    resumed = InputProbe()
    resumed.restore(probed([[], *moving(39, 8, 6)]).state(), CPU)
    assert resumed.scores() is None


def test_what_waits_and_what_is_kept_is_bounded():
    probe = InputProbe()
    for t in range(3000):
        probe.see([normal(2, 3, 20 + t % 9, 20, seed=t)])
        assert sum(len(sums.total) for sums in probe._waiting) <= 64 + 16


@pytest.mark.parametrize("case", CASES)
def test_no_generator_is_used_and_inputs_stay_as_they_are(case):
    steps = [[step] if isinstance(step, torch.Tensor) else step for step in CASES[case](40)]
    for x in (x for step in steps for x in step if x.is_floating_point()):
        x.requires_grad_()
    before = [[(x.detach().clone(), x._version, x.requires_grad, x.grad) for x in step] for step in steps]
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    states = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    result = scores(steps)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (str(np.random.get_state()), random.getstate()) == states[1:]
    for step, known in zip(steps, before, strict=True):
        for x, (values, *attributes) in zip(step, known, strict=True):
            assert torch.equal(x, values)
            assert [x._version, x.requires_grad, x.grad] == attributes
    assert result == scores([[x.detach() for x in step] for step in steps])


@pytest.fixture
def other_defaults():
    torch.set_default_dtype(torch.float64)
    with torch.device("meta"):  # not by `set_default_device`: torch 2.9 cannot ask for the default after None
        yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("case", CASES)
def test_defaults_of_dtype_and_device_change_no_bit(case, request):
    steps = CASES[case](40)
    plain, state = scores(steps), probed(steps[:20]).state()
    _directions.cache_clear()
    request.getfixturevalue("other_defaults")
    resumed = InputProbe()
    resumed.restore(state, CPU)
    assert resumed.scores() == probed(steps[:20]).scores()
    assert scores(steps) == plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["numbers", "token ids", "several of unlike scale", "bfloat16"])
def test_autocast_changes_no_bit(case, dtype):
    steps = CASES[case](40)
    with torch.autocast("cpu", dtype=dtype):
        under_autocast = scores(steps)
        assert torch.is_autocast_enabled("cpu")
    assert under_autocast == scores(steps)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_it_may_be_merged_and_go_on_in_any_mode(mode):
    steps = moving(80, 8, 6)
    probe = InputProbe()
    for t, x in enumerate(steps):
        with mode() if t % 20 < 10 else torch.enable_grad():
            probe.see([x])
        if t % 15 == 14:
            with torch.inference_mode(False):
                probe._merge()
    probe._merge()
    assert tuple(probe.scores()) == pytest.approx(tuple(scores(steps)), rel=1e-9)
