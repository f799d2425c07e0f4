"""What a model is given is looked at: when, whatever the loop, and what a report says by it."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader, TensorDataset

from lightning_bnmonitor import BatchNormMonitor, BatchNormTracker, LayerReport
from lightning_bnmonitor.statistics.probe import LIMIT, InputProbe, Scores
from tests.compiling import by_wrapping, in_place, its_forward, its_parts
from tests.promises.recorded_training import assert_identical
from tests.promises.recorded_training import train as recorded_training
from tests.promises.test_cost import bytes_held
from tests.tracking.small_models import hooks_on, network, saved_and_loaded


def scores_of(steps: list[Any]) -> Scores | None:
    """Of what was given in these steps, a tensor each or several."""
    probe = InputProbe()
    for step in steps:
        probe.see([step] if isinstance(step, Tensor) else step)
    probe._merge()
    return probe.scores()


def assert_seen(tracker: BatchNormTracker, steps: list[Any]) -> None:
    """These steps and no others, in each layer's report."""
    expected = scores_of(steps)
    assert expected is not None
    for layer in tracker.report().values():
        said = layer.evidence["order_score"], layer.evidence["group_score"]
        assert said == pytest.approx(tuple(expected), rel=1e-9)


def assert_nothing_seen(tracker: BatchNormTracker) -> None:
    for layer in tracker.report().values():
        assert layer.num_batches >= 8
        assert not {"order_score", "group_score"} & layer.evidence.keys()


def batches(num: int = 20, size: int = 8, width: int = 4) -> list[Tensor]:
    """In an order, so that each that is left out changes the scores."""
    return [torch.randn(size, width) + 0.1 * t for t in range(num)]


class Takes(nn.Module):
    """Takes what it is given by position, by keyword or in a structure."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Any = None, *, image: Tensor | None = None, target: Tensor | None = None) -> Tensor:
        x = x["image"] if isinstance(x, dict) else x
        return self.net(image if x is None else x)


LABELS = torch.zeros(8, dtype=torch.long)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, x: model(x),
        lambda model, x: model(x, target=LABELS),
        lambda model, x: model(image=x, target=LABELS),
        lambda model, x: model(target=LABELS, image=x),
        lambda model, x: model({"target": LABELS.float(), "image": x}),
    ],
    ids=["positional", "positional with labels", "keyword", "keywords in another order", "a structure"],
)
def test_what_the_root_is_given_is_seen(call: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model, steps = Takes(), batches()
    with BatchNormTracker(model) as tracker:
        for x in steps:
            call(model, x)
        model.net(torch.randn(8, 4))  # a part of it, which is given what it makes
    assert_seen(tracker, steps)


def test_what_does_not_count_is_not_seen() -> None:
    model, steps = network(), batches()
    with BatchNormTracker(model) as tracker:
        for x in steps[:10]:
            model(x)
        with tracker.paused():
            model(x + 100)
            tracker.see_inputs(x + 100)
        model.eval()
        model(x + 100)
        model.train()
        tracker._recorder._is_told_of_inputs = False
        for x in steps[10:]:
            model(x)
        tracker.close()
        model(x + 100)
        assert_seen(tracker, steps)
        twin = copy.deepcopy(model)
        resumed = BatchNormTracker(twin)
        resumed.load_state_dict(tracker.state_dict())
        with resumed:
            assert_seen(resumed, steps)
        tracker.reset()
        others = batches(12)
        for x in others:
            model(x)
        assert_seen(tracker, others)
    model(x + 100)
    assert_seen(tracker, others)


def test_what_a_frozen_layer_in_a_training_model_is_given_is_seen() -> None:
    model, steps = network(), batches()
    model[1].eval()
    with BatchNormTracker(model) as tracker:
        for x in steps:
            model(x)
    assert_seen(tracker, steps)


def test_whoever_tells_of_inputs_takes_precedence() -> None:
    model, steps = network(), batches()
    with BatchNormTracker(model) as tracker:
        for x in steps:
            tracker.see_inputs({"x": x[:, :3], "y": LABELS})
            model(x)
            tracker.step()
    assert_seen(tracker, [x[:, :3] for x in steps])


def test_a_model_of_which_only_parts_are_called_is_told_of() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

    model, steps = Parts(), batches()
    with BatchNormTracker(model) as tracker:
        for x in steps:
            model.net(x)
        assert_nothing_seen(tracker)
        tracker.reset()
        for x in steps:
            tracker.see_inputs((x, LABELS))
            model.net(x)
    assert_seen(tracker, steps)


def test_inputs_that_cannot_be_looked_at_tell_nothing_and_end_no_run() -> None:
    model = Takes()
    with BatchNormTracker(model) as tracker:
        for t, x in enumerate(batches()):
            if t == 7:
                model({"image": x, "rest": torch.randn(8, 5)})  # another number of inputs
            elif t == 9:
                with torch.inference_mode():
                    model(x)
            else:
                model(x)
        assert_nothing_seen(tracker)
        tracker.reset()
        steps = batches()
        with torch.inference_mode():
            model(steps[0])
        for x in steps[1:]:
            model(x)
    assert_seen(tracker, steps)


@pytest.mark.parametrize("tells", [True, False])
def test_of_a_step_with_several_calls_the_first_is_seen_if_the_loop_tells_of_steps(tells: bool) -> None:
    """As of a discriminator: real images, then those that were made."""
    model, seen = network(), []
    with BatchNormTracker(model) as tracker:
        for t, x in enumerate(batches()):
            model(x)
            model(x - 3)
            seen += [x] if tells and t else [x, x - 3]  # before the first step has ended, nobody knows
            if tells:
                tracker.step()
    assert_seen(tracker, seen)


def _in_eval_mode(tracker: BatchNormTracker, model: nn.Module, x: Tensor) -> None:
    model.eval()
    model(x)
    model.train()


def _paused(tracker: BatchNormTracker, model: nn.Module, x: Tensor) -> None:
    with tracker.paused():
        model(x)


@pytest.mark.parametrize("called", [_in_eval_mode, _paused])
def test_a_call_that_does_not_count_is_not_taken_for_the_first_of_its_step(called: Callable[..., None]) -> None:
    """As of a model that labels a batch before it is trained on it."""
    model, steps = network(), batches()
    with BatchNormTracker(model) as tracker:
        for x in steps:
            called(tracker, model, x + 100)
            model(x)
            tracker.step()
    assert_seen(tracker, steps)


@pytest.mark.parametrize("tells", [True, False])
def test_of_accumulated_gradients_the_first_call_or_each_is_seen(tells: bool) -> None:
    model, steps = network(), batches(40)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with BatchNormTracker(model) as tracker:
        for start in range(0, 40, 2):
            for x in steps[start : start + 2]:
                model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if tells:
                tracker.step()
    assert_seen(tracker, [steps[0], *steps[1:2], *steps[2::2]] if tells else steps)


# --- compiled models --------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [by_wrapping, in_place, its_forward, its_parts])
def test_of_a_compiled_model_inputs_are_seen_and_no_more_is_compiled(
    compiled: Callable[..., nn.Module], fresh_compiler: None
) -> None:
    steps = [x[: 8 - t % 3] for t, x in enumerate(batches(21))]

    def run(model: nn.Module) -> tuple[int, int]:
        torch._dynamo.reset()
        counters.clear()
        for x in steps:
            model(x).sum().backward()
        model.eval()
        model(steps[0] + 100)
        model.train()
        return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())

    without = run(compiled(Takes(), "eager"))
    model = compiled(Takes(), "eager")
    with BatchNormTracker(model) as tracker:
        assert run(model) == without
    assert without[0] > 0
    assert [layer.evidence["calls_traced"] for layer in tracker.report().values()] == [21, 21]
    assert_seen(tracker, steps)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler (g++)")
@pytest.mark.parametrize("compiled", [by_wrapping, in_place])
def test_of_what_inductor_compiles_inputs_are_seen(compiled: Callable[..., nn.Module], fresh_compiler: None) -> None:
    model, steps = compiled(Takes(), "inductor"), batches(10)
    with BatchNormTracker(model) as tracker:
        for x in steps:
            model(x).sum().backward()
    assert_seen(tracker, steps)


def test_what_is_compiled_around_the_model_compiles_to_one_graph(fresh_compiler: None) -> None:
    model = Takes()
    step = torch.compile(lambda x: model(x).sum(), backend="eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with BatchNormTracker(model) as tracker:
        for x in batches():
            step(x).backward()
            optimizer.step()
    assert counters["stats"]["unique_graphs"] == 1
    assert_nothing_seen(tracker)


# --- states, copies, what stays as it is ------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("saved_at", [0, 5, 17, 90])
def test_a_window_that_is_resumed_says_what_an_uninterrupted_one_does(saved_at: int, told: bool) -> None:
    steps = batches(100)

    def feed(model: nn.Module, tracker: BatchNormTracker, own: list[Tensor]) -> None:
        for x in own:
            if told:
                tracker.see_inputs((x, LABELS))
            model(x)

    torch.manual_seed(1)
    model = network()
    tracker = BatchNormTracker(model).attach()
    feed(model, tracker, steps[:saved_at])
    saved = saved_and_loaded({"model": model.state_dict(), "tracker": tracker.state_dict()})
    feed(model, tracker, steps[saved_at:])
    resumed = network()
    resumed.load_state_dict(saved["model"])
    other = BatchNormTracker(resumed)
    other.load_state_dict(saved["tracker"])
    with other:
        feed(resumed, other, steps[saved_at:])
    tracker.detach()
    for mine, theirs in zip(other.report().values(), tracker.report().values(), strict=True):
        assert (mine.verdict, mine.explanation) == (theirs.verdict, theirs.explanation)
        assert mine.evidence["order_score"] > LIMIT
    assert_seen(tracker, steps)
    assert_seen(other, steps)


@pytest.mark.parametrize("load_first", [False, True])
@pytest.mark.parametrize("saved_at", [40, 41])
def test_resumed_within_a_step_or_between_two_the_same_calls_are_seen(saved_at: int, load_first: bool) -> None:
    """Two calls a step, of which the first counts, whether or not the resumed loop has told of a step yet."""

    def feed(model: nn.Module, tracker: BatchNormTracker, calls: range) -> None:
        for t in calls:
            model(steps[t])
            if t % 2:
                tracker.step()

    steps, model = batches(80), network()
    with BatchNormTracker(model) as tracker:
        feed(model, tracker, range(2))
        tracker.reset()
        feed(model, tracker, range(2, saved_at))
        saved = saved_and_loaded(tracker.state_dict())
        resumed = copy.deepcopy(model)
        feed(model, tracker, range(saved_at, 80))
        assert_seen(tracker, steps[2::2])
    other = BatchNormTracker(resumed)
    if load_first:
        other.load_state_dict(saved)
    with other:
        if not load_first:
            other.load_state_dict(saved)
        feed(resumed, other, range(saved_at, 80))
        assert_seen(other, steps[2::2])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("compiled", [False, True])
def test_copies_of_a_model_tell_nothing(copied: Callable[[nn.Module], nn.Module], compiled: bool) -> None:
    model, steps = network(), batches()
    if compiled:
        model = by_wrapping(model, "eager")
        if copied is not copy.deepcopy:
            pytest.skip("torch does not pickle what it has compiled")
    before = hooks_on(model)
    with BatchNormTracker(model) as tracker:
        for x in steps[:10]:
            model(x)
        twin = copied(model)
        twin(steps[0] + 100)
        for x in steps[10:]:
            model(x)
        twin(steps[0] + 100)
        assert_seen(tracker, steps)
    assert hooks_on(model) == before
    del tracker
    twin(steps[0])


def inputs_of_a_step(index: int) -> dict[str, Tensor]:
    return {"x": torch.randn(5, 2, 7 + index % 3, 9).requires_grad_(), "target": torch.randint(3, (5,))}


class Images(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv, self.norm, self.dropout = nn.Conv2d(2, width, 3), nn.BatchNorm2d(width), nn.Dropout2d(0.3)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        return self.head(self.dropout(self.norm(self.conv(x)).relu()).mean((2, 3)))


def with_targets(model: nn.Module, batch: dict[str, Any], backward: Callable[[Tensor], None]) -> list[Tensor]:
    loss = nn.functional.cross_entropy(model(**batch), batch["target"])
    backward(loss)
    return [loss.detach()]


def test_training_is_bit_identical() -> None:
    with_, without = (
        recorded_training(Images, inputs_of_a_step, monitored, steps=100, step=with_targets)
        for monitored in (True, False)
    )
    assert "order_score" in with_.layer.evidence
    assert_identical(with_.computed, without.computed)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 4, 64])
@pytest.mark.parametrize("side", [8, 12])
def test_no_more_is_held_than_a_kibibyte_a_channel_and_64_more(side: int, width: int) -> None:
    model = Images(width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    most = 0
    with BatchNormTracker(model) as tracker:
        for step in range(140):
            model(torch.randn(65, 2, side, side + (step % 6 if side > 11 else 0))).sum().backward()
            most = max(most, bytes_held(tracker))
            if step % 10 == 9:
                optimizer.step()
    assert "order_score" in tracker.report()["norm"].evidence
    assert 8 * 1024 < most <= 1024 * width + 64 * 1024


# --- in Lightning -----------------------------------------------------------------------------------------------------


class Module(LightningModule):
    """Its ``forward`` is never called."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)
        )
        self.lr = lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Reports(Callback):
    def __init__(self, monitor: BatchNormMonitor) -> None:
        self.monitor = monitor
        self.layers: list[LayerReport] = []
        self.given: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.given = [*(self.given if batch_idx else []), batch[0]]

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.layers += self.monitor.report().values()


def fit(folder: Path, shuffle: bool, lr: float, epochs: int = 3, offset: float = 0.0) -> Reports:
    """Four classes, whose means and spreads differ. With an offset their mean behind a linear layer is its weights'."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(1024) // 256
    x = torch.randn(1024, 8, generator=generator) + offset
    x[:, 0] += labels - 1.5
    x[:, 1] *= 1 + labels
    monitor = BatchNormMonitor(on_unhealthy="ignore")
    reports = Reports(monitor)
    loader = DataLoader(TensorDataset(x, labels), batch_size=16, shuffle=shuffle, generator=generator)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=[monitor, reports],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Module(lr), loader)
    return reports


quiet = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


@quiet
def test_the_monitor_tells_of_the_batch_where_the_module_itself_is_not_called(tmp_path: Path) -> None:
    reports = fit(tmp_path, shuffle=True, lr=0.01, epochs=2)
    expected = scores_of(reports.given)
    assert expected is not None
    assert len(reports.given) == 64
    for layer in reports.layers[-2:]:
        said = layer.evidence["order_score"], layer.evidence["group_score"]
        assert said == pytest.approx(tuple(expected), rel=1e-9)


@quiet
def test_sorted_data_are_called_so_with_what_the_model_is_given_as_the_reason(tmp_path: Path) -> None:
    reports = fit(tmp_path, shuffle=False, lr=0.01, epochs=2)
    for layer in reports.layers:
        assert layer.evidence["order_score"] > LIMIT
    first = reports.layers[-2]
    assert first.verdict == "ordered-batches"
    score = f"{first.evidence['order_score']:.3g}"
    assert "The data come in an order" in first.explanation
    assert f"what the model is given ({score} standard deviations from random order" in first.explanation
    assert "Shuffle" in first.remedy
    assert "If they are shuffled" not in first.remedy
    assert "move with the weights" not in first.explanation


@quiet
@pytest.mark.slow
def test_shuffled_data_are_never_called_sorted_however_fast_the_weights_move(tmp_path: Path) -> None:
    moved = 0
    for lr in (0.03, 0.3, 1.0):
        for layer in fit(tmp_path, shuffle=True, lr=lr, offset=3.0).layers:
            evidence = layer.evidence
            assert layer.verdict not in ("ordered-batches", "grouped-batches")
            assert max(evidence["order_score"], evidence["group_score"]) <= LIMIT
            ordered = evidence["ordering_ratio"] > evidence["ordering_limit"] and evidence["ordering_share"] > 0.02
            grouped = evidence["grouping_ratio"] > evidence["grouping_limit"] and evidence["grouping_share"] > 0.02
            assert ("Its inputs move with the weights" in layer.explanation) == (ordered or grouped)
            moved += ordered or grouped
    assert moved >= 3


def test_inputs_that_raise_an_error_end_no_run_and_tell_nothing(monkeypatch):
    def fails(self, inputs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(InputProbe, "see", fails)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with BatchNormTracker(model) as tracker:
        with pytest.warns(UserWarning, match="out of memory"):
            model(torch.randn(8, 4))
        for _ in range(19):  # nor is anything said again
            model(torch.randn(8, 4))
    layer = tracker.report()["1"]
    assert layer.num_batches == 20
    assert "order_score" not in layer.evidence
