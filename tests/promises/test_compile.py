"""Compiled models: nothing recompiled, nothing lost, nothing changed."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo
import torch._inductor
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_bnmonitor import BatchNormMonitor, BatchNormTracker, Report
from tests.compiling import by_wrapping, in_place, its_forward, its_parts

compiles_checkpoints = not torch.__version__.startswith(("2.8.", "2.9."))
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler (g++)")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """Three BatchNorm layers; a short one, which Inductor compiles in less time, has only the first and the third."""

    def __init__(self, reentrant: bool | None = None, dropout: float = 0.0, is_short: bool = False) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        second = () if is_short else (nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.second = nn.Sequential(*second, nn.Dropout(dropout))
        self.third = nn.Sequential(nn.Linear(8 if is_short else 6, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) if self.reentrant is None else checkpoint(self.first, x, use_reentrant=self.reentrant)
        return self.third(self.second(x).mean(dim=(2, 3)))


class Twelve(nn.Module):
    """Calls its part 12 times a step."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.part(x + shift).sum() for shift in range(12)]).sum()


WAYS = [by_wrapping, in_place, its_forward, its_parts]
LAYERS = ["first.1", "second.1", "third.1"]


def train(model: nn.Module, steps: int = 3, batch_size: int = 4) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        model(torch.randn(batch_size, 3, 8, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def graphs() -> tuple[int, int]:
    """Compiled graphs and graph breaks since the counters were cleared."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def calls(report: Report, prefix: str = "part.") -> list[dict[str, float]]:
    keys = ("calls_saved", "calls_traced", "calls_pass")
    return [{key: report[prefix + name].evidence[key] for key in keys} for name in LAYERS]


@pytest.mark.slow
@pytest.mark.parametrize(("compiled", "fullgraph"), [*((way, True) for way in WAYS), (by_wrapping, False)])
def test_twelve_calls_a_step_compile_one_graph_and_all_are_counted_also_if_it_was_run_compiled_before(
    compiled: Callable[..., nn.Module], fullgraph: bool
) -> None:
    model = Twelve(compiled(Net(), fullgraph=fullgraph))
    train(model, steps=2)
    graphs_without = graphs()
    for steps in (2, 3):
        with BatchNormTracker(model) as tracker:
            train(model, steps)
        assert [entry["calls_traced"] for entry in calls(tracker.report())] == [12 * steps] * 3
        train(model, steps=1)  # and what is not tracked is not counted
        assert [entry["calls_traced"] for entry in calls(tracker.report())] == [12 * steps] * 3
    torch._dynamo.reset()
    counters.clear()
    model = Twelve(compiled(Net(), fullgraph=fullgraph))
    with BatchNormTracker(model) as tracker:
        train(model, steps=2)
    assert graphs() == graphs_without
    report = tracker.report()
    assert calls(report) == [{"calls_saved": 0, "calls_traced": 24, "calls_pass": 0}] * 3
    assert [report["part." + name].num_samples for name in LAYERS] == [24 * 4 * 36, 24 * 4 * 16, 24 * 4]


@pytest.mark.slow
def test_a_model_is_counted_after_an_unmonitored_sibling_of_its_class_was_compiled() -> None:
    train(torch.compile(Net(), backend="eager"))
    model = torch.compile(Net(), backend="eager")
    with BatchNormTracker(model) as tracker:
        train(model)
        train(torch.compile(Net(), backend="eager"))
    assert [entry["calls_traced"] for entry in calls(tracker.report(), "")] == [3, 3, 3]


@pytest.mark.slow
def test_a_model_compiled_after_attaching_is_counted_although_a_sibling_was_compiled_before() -> None:
    train(torch.compile(Net(), backend="eager"))
    net = Net()
    with BatchNormTracker(net) as tracker:
        train(torch.compile(net, backend="eager"))
    assert [entry["calls_traced"] for entry in calls(tracker.report(), "")] == [3, 3, 3]


@pytest.mark.slow
def test_batches_of_other_sizes_and_evaluation_compile_no_more_graphs_than_without() -> None:
    def run(model: nn.Module) -> tuple[int, int]:
        torch._dynamo.reset()
        counters.clear()
        for size in (4, 5, 6, 7):
            train(model, 1, size)
        model.eval()
        model(torch.randn(4, 3, 8, 8))
        model.train()
        train(model, 1, 9)
        return graphs()

    without = run(torch.compile(Net(), backend="eager"))
    model = torch.compile(Net(), backend="eager")
    with BatchNormTracker(model) as tracker:
        assert run(model) == without
    report = tracker.report()
    assert [entry["calls_traced"] for entry in calls(report, "")] == [5, 5, 5]
    assert report["third.1"].num_samples == 4 + 5 + 6 + 7 + 9


@pytest.mark.slow
def test_a_frozen_layer_in_a_training_model_is_counted_and_evaluation_is_not() -> None:
    model = torch.compile(Net(), backend="eager")
    with BatchNormTracker(model) as tracker:
        model._orig_mod.first[1].eval()
        train(model)
        model.eval()
        model(torch.randn(4, 3, 8, 8))
    report = tracker.report()
    assert [entry["calls_traced"] for entry in calls(report, "")] == [3, 3, 3]
    assert "updates_per_call" not in report["first.1"].evidence
    assert report["second.1"].evidence["updates_per_call"] == 1


def test_nothing_counts_while_paused() -> None:
    model = torch.compile(Net(), backend="eager")
    with BatchNormTracker(model) as tracker:
        train(model, 2)
        with tracker.paused():
            train(model, 3)
        train(model, 1)
    assert [entry["calls_traced"] for entry in calls(tracker.report(), "")] == [3, 3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("compiled", WAYS)
def test_what_is_called_between_two_windows_belongs_to_neither(compiled: Callable[..., nn.Module]) -> None:
    model = compiled(Net(), fullgraph=False)
    with BatchNormTracker(model) as tracker:
        train(model, 2)
        closed = tracker.close()
        assert [entry["calls_traced"] for entry in calls(closed, "")] == [2, 2, 2]
        train(model, 2)
        with tracker.paused():
            train(model, 1)
        assert tracker.report() is closed
        tracker.reset()
        with tracker.paused():
            train(model, 1)
        train(model, 3)
        assert [entry["calls_traced"] for entry in calls(tracker.close(), "")] == [3, 3, 3]
        with tracker.paused():
            tracker.reset()
            train(model, 1)
        train(model, 1)
        assert [entry["calls_traced"] for entry in calls(tracker.close(), "")] == [1, 1, 1]


@pytest.mark.slow
def test_what_a_compiled_function_calls_between_two_windows_belongs_to_neither() -> None:
    """Nothing drains the model there: the tracker does when it is asked."""
    model = Net()
    step = torch.compile(lambda x: model(x).sum(), backend="eager")
    x = torch.randn(4, 3, 8, 8)
    with BatchNormTracker(model) as tracker:
        step(x)
        step(x)
        closed = tracker.close()
        assert [entry["calls_traced"] for entry in calls(closed, "")] == [2, 2, 2]
        step(x + 100)
        tracker.reset()
        step(x)
        with tracker.paused():
            step(x + 100)
        assert [entry["calls_traced"] for entry in calls(tracker.report(), "")] == [1, 1, 1]
        tracker.reset()
        step(x)
        tracker.load_state_dict(tracker.state_dict())
        step(x)
    report = tracker.report()
    assert [entry["calls_traced"] for entry in calls(report, "")] == [2, 2, 2]
    assert [layer.evidence["updates_per_call"] for layer in report.values()] == [1, 1, 1]


def test_history_crosses_windows() -> None:
    model = torch.compile(Net(), backend="eager")
    with BatchNormTracker(model) as tracker:
        for window in range(1, 4):
            train(model, 10, batch_size=16)
            report = tracker.close()
            assert all(layer.flags == () for layer in report.values())
            for layer in report.values():
                assert layer.evidence["initial_weight"] == pytest.approx(0.9 ** (10 * window))
            tracker.reset()


@pytest.mark.slow
def test_where_dynamo_gives_up_and_runs_eagerly_the_calls_are_read_off_the_kernel() -> None:
    model = torch.compile(Net(), backend="eager", dynamic=False)
    with BatchNormTracker(model) as tracker, torch._dynamo.config.patch(recompile_limit=2):
        for size in (4, 5, 6, 7, 8):
            train(model, 1, size)
    assert calls(tracker.report(), "") == [{"calls_saved": 3, "calls_traced": 2, "calls_pass": 0}] * 3


@pytest.mark.slow
def test_a_graph_break_in_the_model_loses_no_call() -> None:
    class Broken(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            x = self.second(x)
            torch._dynamo.graph_break()
            return self.third(x.mean(dim=(2, 3)))

    train(torch.compile(Broken(), backend="eager"))
    without = graphs()
    torch._dynamo.reset()
    counters.clear()
    model = torch.compile(Broken(), backend="eager")
    with BatchNormTracker(model) as tracker:
        train(model)
    assert graphs() == without
    assert [entry["calls_traced"] for entry in calls(tracker.report(), "")] == [3, 3, 3]


def test_the_compilers_settings_are_restored_when_the_last_tracker_detaches() -> None:
    wanted = {"skip_nnmodule_hook_guards": False}
    if compiles_checkpoints:
        wanted["skip_fwd_side_effects_in_bwd_under_checkpoint"] = True

    def settings() -> dict[str, bool]:
        return {name: getattr(torch._dynamo.config, name) for name in wanted}

    before = settings()
    one, other = Net(), Net()
    with BatchNormTracker(one):
        with BatchNormTracker(other):
            assert settings() == wanted
        assert settings() == wanted
    assert settings() == before


@pytest.mark.slow
def test_a_compiled_call_is_restored_when_the_tracker_detaches() -> None:
    net = in_place(Net(), fullgraph=False)
    compiled_call = net._compiled_call_impl
    with BatchNormTracker(net):
        assert net._compiled_call_impl is not compiled_call
    assert net._compiled_call_impl is compiled_call
    wrapped = torch.compile(Net())
    with BatchNormTracker(wrapped):
        assert wrapped._forward_hooks
    assert not wrapped._forward_hooks


def test_a_copy_of_a_compiled_model_is_not_monitored() -> None:
    model = torch.compile(Net(), backend="eager")
    with BatchNormTracker(model) as tracker:
        train(model, 1)
        train(torch.compile(copy.deepcopy(model._orig_mod), backend="eager"), 5)
        train(model, 1)
    assert [entry["calls_traced"] for entry in calls(tracker.report(), "")] == [2, 2, 2]


def test_exporting_an_attached_model_counts_nothing() -> None:
    net = Net()
    with BatchNormTracker(net) as tracker:
        torch.export.export(net, (torch.randn(4, 3, 8, 8),))
        assert [layer.num_batches for layer in tracker.report().values()] == [0, 0, 0]
        train(net, 1)
    assert [layer.num_batches for layer in tracker.report().values()] == [1, 1, 1]


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.net(batch[0]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("what", ["module", "net"])
def test_a_trainer_counts_every_batch_of_a_compiled_module_in_two_fits(what: str, tmp_path: object) -> None:
    module = Module()
    if what == "net":
        module.net = torch.compile(module.net, backend="eager")
    model = torch.compile(module, backend="eager") if what == "module" else module
    data = DataLoader(TensorDataset(torch.randn(20, 3, 8, 8)), batch_size=4)
    for _ in range(2):
        monitor = BatchNormMonitor()
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=[monitor],
            default_root_dir=str(tmp_path),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, data, data)
        report = monitor.report()
        assert [entry["calls_traced"] for entry in calls(report, "net.")] == [5, 5, 5]
        assert report["net.third.1"].num_samples == 20


def trained(
    monitored: bool,
    model: nn.Module,
    backend: str,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> dict[str, object]:
    """All that a training run changes, and the report."""
    torch._dynamo.reset()
    model = copy.deepcopy(model).to(dtype=dtype, memory_format=memory_format)
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    tracker = BatchNormTracker(compiled)
    if monitored:
        tracker.attach()
    torch.manual_seed(5)
    losses = []
    for _ in range(6):
        x = (torch.randn(16, 3, 12, 12) * 2 + 20).to(dtype=dtype, memory_format=memory_format).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = compiled(x).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tracker.detach()
    return {
        "model": model.state_dict(),
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "momenta": {str(k): v["momentum_buffer"] for k, v in optimizer.state_dict()["state"].items()},
        "losses": {"losses": torch.tensor(losses)},
        "rng": {"rng": torch.get_rng_state()},
        "report": tracker.report(),
    }


def assert_bit_identical(model: nn.Module, backend: str, **kwargs: object) -> Report:
    without, with_monitor = (trained(monitored, model, backend, **kwargs) for monitored in (False, True))
    for group in ("model", "gradients", "momenta", "losses", "rng"):
        for name, value in without[group].items():
            assert torch.equal(value, with_monitor[group][name]), (group, name)
    return with_monitor["report"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reentrant", "backend"),
    [(None, "aot_eager"), (True, "aot_eager"), pytest.param(False, "inductor", marks=needs_compiler)],
)
@pytest.mark.skipif(not compiles_checkpoints, reason="refused before torch 2.10, where it can be seen")
def test_training_is_bit_identical_with_and_without_the_monitor_also_under_activation_checkpointing(
    reentrant: bool | None, backend: str
) -> None:
    is_short = backend == "inductor"
    report = assert_bit_identical(Net(reentrant, dropout=0.1, is_short=is_short), backend)
    # Compiled checkpointing recomputes the data, not the update of the buffers.
    expected = {name: (6, 1) for name in LAYERS if not (is_short and name == "second.1")}
    counted = {
        name: (layer.evidence["calls_traced"], layer.evidence["updates_per_call"]) for name, layer in report.items()
    }
    assert counted == expected


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("layers", "kwargs"),
    [
        (3, {}),
        (2, {"memory_format": torch.channels_last}),
        (2, {"autocast": True}),
        (2, {"dtype": torch.bfloat16}),
    ],
    ids=["default", "channels-last", "bf16-autocast", "bf16"],
)
def test_inductor_trains_bit_identically_with_and_without_the_monitor(layers: int, kwargs: dict[str, object]) -> None:
    report = assert_bit_identical(Net(dropout=0.1, is_short=layers == 2), "inductor", **kwargs)
    assert [layer.evidence["calls_traced"] for layer in report.values()] == [6] * layers


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("layer", "shape"), [(nn.BatchNorm2d(8), (16, 8, 6, 6)), (nn.BatchNorm1d(8), (4096, 8))])
def test_compiled_moments_are_as_exact_as_those_of_a_serial_kernel(layer: nn.Module, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    std = torch.logspace(-2, 2, 8).view(-1, *[1] * (len(shape) - 2))
    model = torch.compile(nn.Sequential(copy.deepcopy(layer)))
    for ratio in (0.0, 1.0, 9.0, 30.0):
        batches = []
        with BatchNormTracker(model) as tracker:  # one for each: none knows of an earlier window how far it is from 0
            for _ in range(20):
                batches.append((torch.randn(shape, generator=generator) + ratio) * std)
                model(batches[-1].requires_grad_()).sum().backward()
        values = torch.cat(batches).detach().double().transpose(0, 1).flatten(1)
        reported = tracker.report()["0"]
        assert reported.evidence["calls_traced"] == 20
        assert reported.num_samples == values.shape[1]
        var = values.var(dim=1)
        assert ((reported.population_mean - values.mean(dim=1)).abs() / var.sqrt()).max() <= 40 * 2e-8 * (1 + ratio)
        assert ((reported.population_var - var).abs() / (var + layer.eps)).max() <= 2e-6


@pytest.mark.slow
@needs_compiler
def test_with_all_options_of_the_compilers_modes_every_call_is_recorded() -> None:
    mode, options = "max-autotune", torch._inductor.list_mode_options()
    for other in ("reduce-overhead", "max-autotune-no-cudagraphs"):
        assert options[other].items() <= options[mode].items()
    net = Net(is_short=True)
    compiled, batches = torch.compile(net, mode=mode), []
    with BatchNormTracker(compiled) as tracker:
        for step in range(8):
            batches.append(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step)))
            compiled(batches[-1]).square().mean().backward()
    received = net.first[0](torch.cat(batches)).detach().double()
    reported = tracker.report()["first.1"]
    assert [layer.evidence["calls_traced"] for layer in tracker.report().values()] == [8, 8]
    assert reported.num_samples == received[:, 0].numel()
    error = (reported.population_mean - received.mean(dim=(0, 2, 3))).abs() / received.std(dim=(0, 2, 3))
    assert (error < 1e-5).all()


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("shape", "dtype"), [((64, 4), torch.float32), ((64, 4), torch.float64), ((16, 4, 5, 5), torch.float32)]
)
def test_what_the_compiled_backward_pass_does_with_its_memory_does_not_reach_the_moments(shape, dtype):
    # It writes into what was saved for it; with a layer that nothing trainable precedes, into the batch means.
    torch.manual_seed(0)
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    net = nn.Sequential(kind(4), nn.Flatten(), nn.Linear(4 if len(shape) == 2 else 100, 8), nn.BatchNorm1d(8)).to(dtype)
    compiled, batches = torch.compile(net), [(2 * torch.randn(shape) + 1).to(dtype) for _ in range(6)]
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    with BatchNormTracker(compiled) as tracker:
        for batch in batches:
            optimizer.zero_grad()
            compiled(batch).square().mean().backward()
            optimizer.step()
        report = tracker.report()
    inputs = torch.cat(batches).double().transpose(0, 1).flatten(1)
    assert report["0"].evidence["calls_traced"] == len(batches)
    torch.testing.assert_close(report["0"].population_mean, inputs.mean(dim=1), rtol=0, atol=1e-5)
    torch.testing.assert_close(report["0"].population_var, inputs.var(dim=1), rtol=1e-5, atol=0)
