"""Which calls count, in any loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_bnmonitor import BatchNormTracker
from lightning_bnmonitor.capture.layer_hook import STASH_LIMIT
from tests.tracking.small_models import C, Several, assert_population, moments, network


def test_a_model_in_eval_counts_nothing_though_its_layer_be_in_train() -> None:
    model = network()
    with BatchNormTracker(model) as tracker:
        model.eval()
        model[1].train()
        model(torch.randn(8, 4))
    assert tracker.report()["1"].num_batches == 0
    assert tracker.report()["4"].num_batches == 0


def test_validation_between_training_steps_counts_nothing() -> None:
    model, batches = nn.Sequential(nn.BatchNorm1d(C)), [torch.randn(8, C) for _ in range(6)]
    with BatchNormTracker(model) as tracker:
        for x in batches:
            model.train()
            model(x)
            model.eval()
            with torch.no_grad():
                model(torch.full((8, C), 1e6))
    assert_population(tracker.report()["0"], batches)


def test_nothing_counts_while_paused_even_if_paused_twice() -> None:
    model, x = nn.Sequential(nn.BatchNorm1d(C)), torch.randn(8, C)
    with BatchNormTracker(model) as tracker:
        with tracker.paused():
            with tracker.paused():
                model(x + 100)
            model(x + 100)
        model(x)
        with pytest.raises(ZeroDivisionError), tracker.paused():
            raise ZeroDivisionError
        model(x + 1)
    assert_population(tracker.report()["0"], [x, x + 1])


def test_reset_begins_another_window() -> None:
    model, batches = nn.Sequential(nn.BatchNorm1d(C)), [torch.randn(8, C) + i for i in range(50)]
    with BatchNormTracker(model) as tracker:
        for x in batches:
            model(x)
        tracker.reset()
        assert tracker.report()["0"].num_batches == 0
        assert tracker.report()["0"].population_mean.isnan().all()
        for x in batches[:7]:
            model(x)
        assert_population(tracker.report()["0"], batches[:7])
        assert tracker.report()["0"].evidence["updates_per_call"] == 1


def test_before_it_is_attached_reset_flush_step_and_pause_are_harmless() -> None:
    tracker = BatchNormTracker(network())
    tracker.reset()
    tracker.flush()
    tracker.step()
    with tracker.paused():
        pass
    assert not tracker.is_attached


def test_before_it_is_attached_the_report_is_empty() -> None:
    report = BatchNormTracker(network()).report()
    assert len(report) == 0
    assert report.summary() == {}
    assert "No BatchNorm" in str(report)


def test_before_any_batch_the_report_lists_layers_that_saw_nothing() -> None:
    model = network()
    with BatchNormTracker(model) as tracker:
        report = tracker.report()
    assert list(report) == ["1", "4"]
    assert report.summary() == {"unhealthy_layers": 0.0}
    assert report["1"].num_batches == report["1"].num_samples == 0
    assert report["1"].population_mean.isnan().all()
    assert torch.equal(report["1"].running_var, torch.ones(C, dtype=torch.float64))
    assert "1" in str(report)


def test_an_empty_batch_in_a_frozen_layer_counts_nothing() -> None:
    model, x = nn.Sequential(nn.BatchNorm2d(C)), torch.randn(4, C, 2, 2)
    model[0].eval()
    with BatchNormTracker(model) as tracker:
        model(torch.randn(0, C, 2, 2))
        model(x)
        model(torch.randn(0, C, 2, 2))
    assert_population(tracker.report()["0"], [x])


def test_an_empty_batch_in_training_counts_nothing() -> None:
    model, x = nn.Sequential(nn.BatchNorm2d(C)), torch.randn(4, C, 2, 2)
    with BatchNormTracker(model) as tracker:
        model(torch.randn(0, C, 2, 2))
        model(x)
    assert_population(tracker.report()["0"], [x])


def test_frozen_layers_count_in_the_population() -> None:
    model, batches = nn.Sequential(nn.BatchNorm1d(C)), [torch.randn(8, C) + i for i in range(40)]
    model[0].eval()
    with BatchNormTracker(model) as tracker:
        for x in batches:
            model(x)
    layer = tracker.report()["0"]
    assert_population(layer, batches)
    assert torch.equal(layer.running_mean, torch.zeros(C, dtype=torch.float64))
    assert "updates_per_call" not in layer.evidence


def test_calls_with_momentum_0_count_in_the_population() -> None:
    model, batches = nn.Sequential(nn.BatchNorm1d(C)), [torch.randn(8, C) + i for i in range(40)]
    with BatchNormTracker(model) as tracker:
        for i, x in enumerate(batches):
            model[0].momentum = 0.1 if i % 3 else 0.0
            model(x)
    assert_population(tracker.report()["0"], batches)


def test_a_layer_frozen_halfway_counts_throughout() -> None:
    model, batches = nn.Sequential(nn.BatchNorm1d(C)), [torch.randn(8, C) * (1 + i) for i in range(40)]
    with BatchNormTracker(model) as tracker:
        for i, x in enumerate(batches):
            model[0].train(i < 20)
            model(x)
    assert_population(tracker.report()["0"], batches)
    assert tracker.report()["0"].evidence["updates_per_call"] == 1


def test_a_layer_without_running_stats_has_a_population_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C, track_running_stats=False), nn.BatchNorm1d(C))
    batches = [torch.randn(8, C) for _ in range(5)]
    with BatchNormTracker(model) as tracker:
        for x in batches:
            model(x)
    report = tracker.report()
    assert_population(report["0"], batches)
    assert not report["0"].has_running_stats
    assert report["0"].running_mean.isnan().all()
    assert report["0"].evidence["non_finite_channels"] == 0
    assert report.summary()["eval_error_max"] == pytest.approx(report["1"].summary()["eval_error"])


def test_a_layer_whose_buffers_are_no_longer_updated_is_reported_with_them() -> None:
    model, x = nn.Sequential(nn.BatchNorm1d(C)), torch.randn(8, C)
    model[0].track_running_stats = False
    with BatchNormTracker(model) as tracker:
        model(x)
    layer = tracker.report()["0"]
    assert_population(layer, [x])
    assert layer.has_running_stats
    assert torch.equal(layer.running_var, torch.ones(C, dtype=torch.float64))


def test_a_cumulative_average_over_equal_batches_is_the_population_mean() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C, momentum=None))
    with BatchNormTracker(model) as tracker:
        for _ in range(50):
            model(torch.randn(8, C) + 5)
    layer = tracker.report()["0"]
    assert layer.momentum is None
    torch.testing.assert_close(layer.running_mean, layer.population_mean, rtol=1e-6, atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing_counts_data_once_and_updates_twice(use_reentrant: bool) -> None:
    model, batches = nn.Sequential(nn.BatchNorm1d(C), nn.Linear(C, 2)), [torch.randn(8, C) for _ in range(40)]
    with BatchNormTracker(model) as tracker:
        for x in batches:
            checkpoint(model, x.requires_grad_(), use_reentrant=use_reentrant).square().sum().backward()
    layer = tracker.report()["0"]
    assert_population(layer, batches)
    assert layer.evidence["updates_per_call"] == 2


def test_calls_in_inference_mode_count_as_long_as_the_model_trains() -> None:
    model, batches = nn.Sequential(nn.BatchNorm1d(C)), [torch.randn(8, C) + i for i in range(10)]
    with BatchNormTracker(model) as tracker:
        for i, x in enumerate(batches):
            with torch.inference_mode(i % 2 == 0):
                model(x)
    assert_population(tracker.report()["0"], batches)


def test_so_many_calls_in_inference_mode_that_they_are_merged_there() -> None:
    model, batches = nn.Sequential(nn.BatchNorm1d(C)), [torch.randn(8, C) + i for i in range(80)]
    with BatchNormTracker(model) as tracker:
        with torch.inference_mode():
            for x in batches[:40]:
                model(x)
        for x in batches[40:]:
            model(x)
    assert_population(tracker.report()["0"], batches)


@pytest.mark.parametrize("action", ["flush", "report", "state_dict", "reset"])
def test_whatever_is_asked_in_inference_mode_training_goes_on(action: str) -> None:
    model, batches = nn.Sequential(nn.BatchNorm1d(C)), [torch.randn(8, C) for _ in range(6)]
    with BatchNormTracker(model) as tracker:
        for x in batches[:3]:
            model(x)
        with torch.inference_mode():
            getattr(tracker, action)()
        for x in batches[3:]:
            model(x)
    assert_population(tracker.report()["0"], batches[3:] if action == "reset" else batches)


@pytest.mark.parametrize("capture", ["auto", "pass"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_spoils_one_channel_until_the_next_window(value: float, capture: str) -> None:
    model, batches = nn.Sequential(nn.BatchNorm1d(C)), [torch.randn(8, C) for _ in range(50)]
    spoilt = torch.randn(8, C)
    spoilt[2, 1] = value
    with BatchNormTracker(model, capture=capture) as tracker:
        for x in [*batches[:20], spoilt, *batches[20:]]:
            model(x)
        layer = tracker.report()["0"]
        assert layer.population_mean.isnan().tolist() == [False, True, False]
        assert layer.population_var.isnan().tolist() == [False, True, False]
        assert layer.evidence["non_finite_channels"] == 1
        mean, _ = moments([*batches, spoilt.nan_to_num(0, 0, 0)])
        np.testing.assert_allclose(layer.population_mean[[0, 2]], mean[[0, 2]], rtol=0, atol=1e-6)

        tracker.reset()
        for x in batches:
            model(x)
        assert_population(tracker.report()["0"], batches)


# --- any loop ---------------------------------------------------------------------------------------------------------


def test_without_an_optimizer_what_waits_stays_bounded() -> None:
    model, batches = nn.Sequential(nn.BatchNorm1d(C)), [torch.randn(8, C) for _ in range(100)]
    most = 0
    with BatchNormTracker(model) as tracker:
        for x in batches:
            model(x)
            most = max(most, *(len(layer.hook.stash) for layer in tracker._recorder.layers))
    assert 1 < most <= STASH_LIMIT
    assert_population(tracker.report()["0"], batches)


def test_the_step_of_any_optimizer_merges_what_waits() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with BatchNormTracker(model) as tracker:
        for _ in range(STASH_LIMIT):
            model(torch.randn(8, C))
        assert [len(layer.hook.stash) for layer in tracker._recorder.layers] == [STASH_LIMIT]
        optimizer.step()
        assert [len(layer.hook.stash) for layer in tracker._recorder.layers] == [0]
    assert tracker.report()["0"].num_batches == STASH_LIMIT


def test_a_step_told_merges_what_waits() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C))
    with BatchNormTracker(model) as tracker:
        for _ in range(STASH_LIMIT):
            model(torch.randn(8, C))
        tracker.step()
        assert [len(layer.hook.stash) for layer in tracker._recorder.layers] == [0]
    assert tracker.report()["0"].num_batches == STASH_LIMIT


def test_two_networks_that_play_against_each_other_are_each_exact() -> None:
    class Game(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = nn.Sequential(nn.Linear(2, C), nn.BatchNorm1d(C), nn.Linear(C, C))
            self.critic = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C), nn.ReLU(), nn.Linear(C, 1))

    game = Game()
    received: dict[str, list[Tensor]] = {"generator.1": [], "critic.1": []}
    for name, batches in received.items():
        game.get_submodule(name).register_forward_pre_hook(lambda _, args, to=batches: to.append(args[0].detach()))
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01) for net in (game.generator, game.critic)]
    with BatchNormTracker(game) as tracker:
        for step in range(60):
            real, noise = torch.randn(8, C) + 2, torch.randn(8, 2)
            if step % 3 == 0:
                game.critic(game.generator(noise)).mean().neg().backward()
                optimizers[0].step()
            loss = game.critic(game.generator(noise).detach()).mean() - game.critic(real).mean()
            loss.backward()
            optimizers[1].step()
            for optimizer in optimizers:
                optimizer.zero_grad()
    report = tracker.report()
    assert [layer.num_batches for layer in report.values()] == [80, 140]
    for name, batches in received.items():
        assert_population(report[name], batches)


def test_a_layer_called_by_keyword_counts() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(C)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(input=x)

    model, batches = Keyword(), [torch.randn(8, C) for _ in range(5)]
    for capture in ("auto", "pass"):
        with BatchNormTracker(model, capture=capture) as tracker:
            for x in batches:
                model(x)
        assert_population(tracker.report()["bn"], batches)


@pytest.mark.parametrize("capture", ["auto", "pass"])
def test_another_default_device_disturbs_nothing(capture: str) -> None:
    model, batches = Several(3), [torch.randn(8, C) for _ in range(40)]
    with BatchNormTracker(model, capture=capture) as tracker, torch.device("meta"):
        for x in batches:
            model(x, [1, 0])
        report = tracker.report()
        summary, evidence = report.summary(), [layer.evidence for layer in report.values()]
        state = tracker.state_dict()
        tracker.load_state_dict(state)
        tracker.reset()
    assert_population(report["layers.0"], batches)
    for layer in report.values():
        assert layer.population_mean.device == layer.running_mean.device == torch.device("cpu")
    assert summary["eval_error_max"] > 0
    assert all(counts["non_finite_channels"] == 0 for counts in evidence)
    assert state["channels"].device == torch.device("cpu")


def test_another_default_dtype_disturbs_nothing() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model, batches = nn.Sequential(nn.BatchNorm1d(C)), [torch.randn(8, C) for _ in range(40)]
        single = nn.Sequential(nn.BatchNorm1d(C)).float()
        with BatchNormTracker(model) as tracker, BatchNormTracker(single) as of_single:
            for x in batches:
                model(x)
                single(x.float())
        assert_population(tracker.report()["0"], batches, 1e-12)
        assert_population(of_single.report()["0"], [x.float() for x in batches])
    finally:
        torch.set_default_dtype(torch.float32)


def test_deterministic_algorithms_disturb_nothing() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        model, batches = Several(3), [torch.randn(8, C) for _ in range(40)]
        with BatchNormTracker(model) as tracker:
            for i, x in enumerate(batches):
                model(x, [0, 1, 2] if i % 2 == 0 else [2])
            report = tracker.report()
            tracker.reset()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_population(report["layers.0"], batches[::2])
    assert_population(report["layers.2"], batches)


# --- what a layer may be given ----------------------------------------------------------------------------------------


class ChannelsSecondToLast(nn.BatchNorm1d):
    """Takes ``(N, L, C)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class TakesAList(nn.BatchNorm1d):
    def forward(self, parts: list[Tensor]) -> Tensor:
        return torch.relu(super().forward(torch.cat(parts)))


@pytest.mark.parametrize(
    ("layer", "given"),
    [(ChannelsSecondToLast(8), torch.randn(4, 5, 8)), (TakesAList(8), [torch.randn(4, 8), torch.randn(3, 8)])],
)
def test_a_subclass_that_takes_anything_else_is_skipped_and_disturbs_nothing(layer: nn.Module, given: object) -> None:
    model = nn.Sequential(layer)
    with BatchNormTracker(model) as tracker:
        for _ in range(3):
            model(given)
    report = tracker.report()["0"]
    assert (report.num_batches, report.evidence["calls_skipped"]) == (0, 3)
    assert torch.equal(report.running_mean, layer.running_mean.double())


def test_skipped_calls_are_counted_in_their_own_window() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C, track_running_stats=False))
    with BatchNormTracker(model) as tracker:
        for _ in range(2):
            torch.func.vmap(model)(torch.randn(4, 8, C))
            assert tracker.close()["0"].evidence["calls_skipped"] == 1
            tracker.reset()
        model(torch.randn(8, C))
    assert tracker.report()["0"].evidence["calls_skipped"] == 0


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_calls_under_a_transform_or_while_tracing_are_skipped() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C, track_running_stats=False))
    with BatchNormTracker(model) as tracker:
        torch.func.vmap(model)(torch.randn(4, 8, C))
        torch.jit.trace(model, torch.randn(8, C), check_trace=False)
        model(torch.randn(8, C))
    layer = tracker.report()["0"]
    assert (layer.num_batches, layer.evidence["calls_skipped"]) == (1, 2)
