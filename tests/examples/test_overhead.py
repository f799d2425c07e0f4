"""The benchmark of what monitoring costs: that it measures what it says, however long anything takes."""

from __future__ import annotations

import gc
import itertools
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tests.examples.scripts import EXAMPLES, run

sys.path.insert(0, str(EXAMPLES))
import networks
import overhead

sys.path.remove(str(EXAMPLES))

QUICK = {network.name: network for network in overhead.networks(quick=True)}


class Clock:
    """Tells what time others say it is."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.slow
@pytest.mark.long
def test_every_table_has_its_rows_and_every_target_its_verdict() -> None:
    done = run("overhead.py", "--quick", "--rounds", 2, "--repeats", 1)
    assert "Traceback" not in done.errors, done.errors
    times, memory, windows = done.output.split("\n\n")[:3]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in times.splitlines()]
    assert rows[0] == ["CPU time", *QUICK]
    assert rows[2][0] == "a step without monitor"
    assert [row[0] for row in rows[3:-4]] == list(overhead.VARIANTS)[1:]
    for name, *cells in zip(*(row[1:] for row in (rows[0], *rows[3:-4])), strict=True):
        compared = QUICK[name].variants
        assert [cell == "-" for cell in cells] == [variant not in compared for variant in overhead.VARIANTS][1:]
    assert [row[0] for row in rows[-4:-1]] == [overhead.SHARE, overhead.UNTOLD_SHARE, overhead.GUARDED_SHARE]
    shares = [cell for row in rows[-4:-1] for cell in row[1:] if cell != "-"]
    assert len(shares) == len(QUICK) + 2 + 1
    assert all(cell.endswith("%") and 0 < float(cell.split()[0]) < 100 for cell in shares)
    assert rows[-1][0] == "operations of ours, a step"
    assert [cell == "-" for cell in rows[-1][1:]] == [name == "compiled" for name in QUICK]
    assert len(memory.splitlines()) == 2 + len(overhead.VARIANTS) - 2
    assert [row.split("|")[2].strip() for row in windows.splitlines()[2:]] == ["1000", "10000"]
    verdicts = done.output.rstrip().split("\n\n")[-1].splitlines()
    assert len(verdicts) == 7 + 2 + 2  # direct shares, operations, ratios
    assert {line.split(":")[0] for line in verdicts} <= {"Met", "MISSED"}
    assert done.code == any(line.startswith("MISSED") for line in verdicts)


def test_what_is_named_alone_is_measured_alone(capsys: pytest.CaptureFixture[str]) -> None:
    code = overhead.measure(list(QUICK.values()), ["sequences, mask", overhead.MEMORY], 1, 1, is_quick=True)
    times, memory, verdicts = capsys.readouterr().out.rstrip().split("\n\n")
    assert [cell.strip() for cell in times.splitlines()[0].strip("|").split("|")] == ["CPU time", "sequences, mask"]
    assert "bytes a channel" in memory
    assert verdicts.split(":")[1] == " direct share, sequences, mask"
    assert code == verdicts.startswith("MISSED")


def test_a_name_that_no_table_has_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["overhead.py", "--quick", "--only", "narrow MLP", "ResNet"])
    with pytest.raises(SystemExit):
        overhead.main()
    error = capsys.readouterr().err
    assert "'narrow MLP', 'compiled'" in error
    assert error.endswith("got 'ResNet'\n")


def test_shares_are_measured_with_and_without_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(network: overhead.Network, steps: int | None, variant: str = overhead.OURS) -> list[object]:
        return [(network.groups, network.mask is not None, variant, steps)]

    monkeypatch.setattr(overhead, "direct_shares", asked)
    monkeypatch.setattr(overhead, "summary", lambda values: values[0])
    found = {name: overhead.all_shares(network, 5) for name, network in QUICK.items()}
    ours, without, guarded = overhead.SHARE, overhead.UNTOLD_SHARE, overhead.GUARDED_SHARE
    plain = (0, False, overhead.OURS, 5)
    assert found.pop("ResNet-18, 4 groups") == {ours: (4, False, overhead.OURS, 5), without: plain}
    assert found.pop("sequences, mask") == {ours: (0, True, overhead.OURS, 5), without: plain}
    assert found.pop("narrow MLP") == {ours: plain, guarded: (0, False, overhead.GUARDED, 5)}
    assert all(shares == {ours: plain} for shares in found.values())


def test_what_is_not_small_is_what_the_table_is_about() -> None:
    full = {network.name: network for network in overhead.networks(quick=False)}
    assert set(overhead.MAX_SHARE) | {name for name, _ in overhead.MAX_RATIO} == set(full)
    assert set(overhead.MAX_OPERATIONS) < set(full)
    assert full["compiled"].variants == [name for name in overhead.VARIANTS if name != "stack all inputs"]
    layers = {
        name: [module.num_features for module in network.build().modules() if isinstance(module, overhead._BatchNorm)]
        for name, network in full.items()
    }
    assert len(layers["ResNet-18"]) == 20
    assert len(layers["120 layers"]) == 120
    assert layers["narrow MLP"] == [64] * 6
    assert (len(layers["EfficientNet-B0"]), sum(layers["EfficientNet-B0"])) == (49, 21008)  # as in timm
    assert all(len(each) == 20 for name, each in layers.items() if name.startswith("ResNet-18"))
    resnet50 = [layer.num_features for layer in resnet50_layers()]
    assert (len(resnet50), sum(resnet50)) == (53, 26560)  # as in torchvision


def resnet50_layers() -> list[torch.nn.Module]:
    return [module for module in networks.resnet50().modules() if isinstance(module, overhead._BatchNorm)]


@pytest.mark.parametrize("name", [name for name in QUICK if name not in ("narrow MLP", "compiled")])
def test_a_network_is_trained_as_its_column_says_and_the_same_with_and_without(name: str) -> None:
    network = QUICK[name]
    bare, ours = overhead.Training(network, overhead.NONE), overhead.Training(network, overhead.OURS)
    bare.steps(3)
    ours.steps(3)
    assert overhead.is_same(bare.module, ours.module)
    parts = {type(module) for module in ours.module.modules()}
    assert (networks.Checkpointed in parts) is (name == "ResNet-18, checkpointing")
    assert (networks.BatchNormAct2d in parts) is (name == "EfficientNet-B0")
    is_half = {parameter.dtype for parameter in ours.module.parameters()} == {torch.bfloat16}
    assert is_half is (ours.x.dtype is torch.bfloat16) is (name == "ResNet-18, bfloat16")
    for layer in ours.monitor.kept.report().values():
        assert layer.num_batches == 3
        assert layer.evidence["calls_pass"] == 3 or name != "ResNet-18, pass"
    ours.monitor.close()


def test_operations_are_those_beyond_the_models_own() -> None:
    saved, by_pass = (
        overhead.operations_a_step(replace(QUICK["narrow MLP"], capture=capture)) for capture in ("auto", "pass")
    )
    assert 0 < saved <= overhead.MAX_OPERATIONS["narrow MLP"]
    assert by_pass > saved + 6 * 4  # two passes of two operations for each layer, at least


@pytest.mark.parametrize("variant", list(overhead.VARIANTS))
def test_every_variant_trains_the_same_and_keeps_what_it_is_to_keep(variant: str) -> None:
    network = QUICK["narrow MLP"]
    bare, other = overhead.Training(network, overhead.NONE), overhead.Training(network, variant)
    inputs: list[torch.Tensor] = []
    other.module[1].register_forward_hook(lambda module, args, output: inputs.append(args[0].detach().double()))
    bare.steps(3)
    other.steps(3)
    assert overhead.is_same(bare.module, other.module)
    bare.steps(1)
    assert not overhead.is_same(bare.module, other.module)
    together = torch.cat(inputs)
    if variant == "naive mean and var":
        mean, var = other.monitor.kept[0]
        torch.testing.assert_close(mean.double(), inputs[-1].mean(0))
        torch.testing.assert_close(var.double(), inputs[-1].var(0))
    elif variant == "Welford in float64":
        count, mean, m2 = other.monitor.kept[0]
        assert count == len(together)
        torch.testing.assert_close(mean, together.mean(0))
        torch.testing.assert_close(m2 / (count - 1), together.var(0))
    elif variant == "stack all inputs":
        assert torch.equal(torch.cat(other.monitor.kept[0]).double(), together)
    elif variant == overhead.OURS:
        assert other.monitor.kept.report()["1"].num_samples == len(together)
    other.monitor.end_round()
    other.monitor.close()


def test_a_round_divides_the_time_of_each_by_its_steps_and_leaves_the_first_out() -> None:
    clock, calls = Clock(), []
    speed = {"slow": 3.0, "fast": 1.0}

    def training(name: str) -> SimpleNamespace:
        def steps(num: int) -> None:
            calls.append(name)
            clock.now += num * speed[name] * (100 if len(calls) <= 2 else 1)

        def end_round() -> None:
            clock.now += 1000

        return SimpleNamespace(steps=steps, monitor=SimpleNamespace(end_round=end_round))

    seconds = overhead.step_seconds({name: training(name) for name in speed}, steps=5, rounds=8, clock=clock)
    assert seconds == {"slow": [3.0] * 8, "fast": [1.0] * 8}
    rounds = list(zip(calls[0::2], calls[1::2], strict=True))
    assert all(set(each) == set(speed) for each in rounds)
    assert len(set(rounds)) == 2  # in random order
    assert overhead.ratio(seconds, "slow", "fast") == (3.0, 3.0, 3.0)


def test_the_stopwatch_counts_what_is_called_within_something_once() -> None:
    clock = Clock()
    stopwatch = overhead.Stopwatch(clock)

    def takes(seconds: float) -> None:
        clock.now += seconds

    inner = stopwatch.wrapped(takes)

    def outer() -> None:
        clock.now += 1
        inner(2)

    stopwatch.wrapped(outer)()
    clock.now += 50
    inner(4)
    assert (stopwatch.seconds, stopwatch.calls) == (7, 2)
    with pytest.raises(ZeroDivisionError):
        stopwatch.wrapped(lambda: 1 / 0)()
    inner(1)
    assert (stopwatch.seconds, stopwatch.calls) == (8, 4)


def test_what_the_wrapper_takes_itself_is_what_the_clock_says_between_two_looks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(overhead, "Stopwatch", partial(overhead.Stopwatch, lambda: 0.5 * next(ticks)))
    assert overhead.wrapper_seconds(QUICK["narrow MLP"]) == 0.5
    assert next(ticks) == 2 * (204 + 2 * 6)  # two looks at each call: 34 steps of six layers, and two that do not count


def test_hooks_are_wrapped_where_they_sit_and_no_others() -> None:
    gc.collect()  # trackers that other tests have dropped while they were attached
    training = overhead.Training(QUICK["narrow MLP"], overhead.OURS)
    theirs = []
    training.module[0].register_forward_hook(lambda *args: theirs.append(1))
    hooks = [each for m in training.module.modules() for each in (m._forward_pre_hooks, m._forward_hooks)]
    before = [dict(each) for each in hooks]
    stopwatch = overhead.Stopwatch()
    with stopwatch.on_our_hooks(training.model, is_compiled=False):
        training.steps(2)
        assert stopwatch.calls == 2 * (1 + 6 + 1)  # what the model is given, each layer, and the optimizer
    assert [dict(each) for each in hooks] == before
    training.steps(1)
    assert stopwatch.calls == 16
    assert len(theirs) == 3
    training.monitor.close()


def test_the_direct_share_is_a_share() -> None:
    shares = overhead.direct_shares(QUICK["narrow MLP"], steps=3)
    assert len(shares) == QUICK["narrow MLP"].chunks
    assert all(0 < share < 1 for share in shares)


def test_the_interval_holds_the_median_of_19_values_in_95_of_100_cases() -> None:
    assert overhead.summary([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert overhead.summary([float(i) for i in range(6)]) == (2.5, 0.0, 5.0)
    assert overhead.summary([float(i) for i in range(1, 21)]) == (10.5, 6.0, 15.0)  # as in tables of the sign test


@pytest.mark.parametrize(
    ("low", "median", "is_stable", "is_met"),
    [(0.9, 1.0, True, True), (0.9, 1.1, True, False), (0.9, 1.1, False, True), (1.01, 1.1, False, False)],
)
def test_a_ratio_is_missed_by_its_whole_interval_and_what_is_stable_by_its_median(low, median, is_stable, is_met):
    value = overhead.Summary(median, low, 1.2)
    met, line = overhead.verdict("it", value, 1.0, "", is_stable)
    assert met is is_met
    assert line == f"{'Met' if is_met else 'MISSED'}: it: {median:.3f} ({low:.3f}-1.200), target at most 1."


def test_bytes_are_those_of_what_is_kept() -> None:
    kept = overhead.bytes_kept(QUICK["narrow MLP"], "stack all inputs", 2)
    assert kept == [6 * 48 * 64 * 4, 2 * 6 * 48 * 64 * 4]
    x = torch.zeros(10)
    assert overhead.bytes_of([x, x[:5]], {"a": (x,)}, torch.nn.Linear(3, 3)) == 40


def test_the_end_of_a_window_is_timed_without_its_batches() -> None:
    widths = overhead.widths_of(7, 100)
    assert len(widths) == 7
    assert sum(widths) == 100
    assert min(widths) >= 1
    ticks = itertools.count()
    assert overhead.window_ends(widths, 3, 2, clock=lambda: float(next(ticks))) == [1.0, 1.0]
