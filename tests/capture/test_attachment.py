"""What is put on a model and on torch's optimizers, and which training steps it tells of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.optimizer import _global_optimizer_post_hooks

from lightning_bnmonitor import BatchNormTracker
from lightning_bnmonitor.capture import attachment
from lightning_bnmonitor.capture.layer_hook import STASH_LIMIT

C = 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C), nn.Linear(C, C))


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=1e-3)


def batch() -> Tensor:
    return torch.randn(8, C)


def flags_after_a_resume(tracker: BatchNormTracker) -> tuple[str, ...]:
    model = network()
    resumed = BatchNormTracker(model)
    resumed.load_state_dict(tracker.state_dict())
    with resumed:
        return resumed.report()["1"].flags


@pytest.mark.parametrize("accumulated", [2, 3])
def test_a_state_that_is_saved_between_micro_batches_is_not_within_a_batch(accumulated: int) -> None:
    model = network()
    optimizer = sgd(model)
    with BatchNormTracker(model) as tracker:
        for _ in range(3):
            for _ in range(accumulated):
                model(batch()).square().mean().backward()
                assert "interrupted-batch" not in flags_after_a_resume(tracker)
            optimizer.step()
            optimizer.zero_grad()


def test_steps_of_another_models_optimizer_are_no_training_steps_of_this_one() -> None:
    model, other = network(), network()
    optimizer = sgd(other)
    with BatchNormTracker(model) as tracker:
        tracker.step()
        model(batch())  # within a step of this model, which nothing has ended
        other(batch()).square().mean().backward()
        optimizer.step()
        assert "interrupted-batch" in flags_after_a_resume(tracker)
        tracker.step()
        optimizer.step()
        assert "interrupted-batch" not in flags_after_a_resume(tracker)


def test_an_optimizers_step_merges_what_waits_as_soon_as_there_is_enough() -> None:
    model = network()
    optimizer = sgd(model)
    with BatchNormTracker(model) as tracker:
        (layer,) = tracker._recorder.layers
        most = 0
        for _ in range(2 * STASH_LIMIT):
            model(batch()).square().mean().backward()
            most = max(most, len(layer.hook.stash))
            optimizer.step()
        assert STASH_LIMIT // 2 <= most <= STASH_LIMIT
        assert len(layer.hook.stash) < most
        assert tracker.report()["1"].num_batches == 2 * STASH_LIMIT


@pytest.mark.parametrize("model", [network(), nn.Sequential(nn.Linear(C, C))], ids=["BatchNorm", "no BatchNorm"])
@pytest.mark.filterwarnings("ignore:No BatchNorm layer")
def test_nothing_stays_on_torchs_optimizers(model: nn.Module) -> None:
    before = len(_global_optimizer_post_hooks)
    tracker = BatchNormTracker(model).attach()
    assert len(_global_optimizer_post_hooks) == before + 1
    for _ in range(2):
        tracker.detach()
        assert len(_global_optimizer_post_hooks) == before


def with_a_switch(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing = True
    return model


@pytest.mark.parametrize("checkpointed", [checkpoint_wrapper, with_a_switch])
@pytest.mark.parametrize("is_compiled", [True, False])
def test_before_torch_2_10_a_compiled_model_with_checkpointing_is_refused_at_once(
    checkpointed: object, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attachment, "COMPILES_CHECKPOINTS", False)
    model: nn.Module = nn.Sequential(checkpointed(network()))
    before = len(_global_optimizer_post_hooks)
    root = torch.compile(model) if is_compiled else model
    tracker = BatchNormTracker(root)
    if not is_compiled:
        with tracker:
            model(batch())
        assert tracker.report()["0.1"].num_batches == 1
        return
    with pytest.raises(RuntimeError, match=r"Switch one of the two off, use torch 2\.10 or later, or train without"):
        tracker.attach()
    tracker.detach()
    assert len(_global_optimizer_post_hooks) == before
    assert not any(module._forward_hooks for module in model.modules())
