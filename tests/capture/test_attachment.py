"""Which steps of which optimizers are training steps of the model that is monitored."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from lightning_bnmonitor import BatchNormTracker
from lightning_bnmonitor.capture.attachment import Attachment
from lightning_bnmonitor.capture.layer_hook import Gate

C, ROUNDS = 4, 5


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C), nn.Linear(C, C))


def sgd(*parameters: Tensor) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=1e-3)


class Steps:
    """What is attached to a model, and how many of its training steps have ended."""

    def __init__(self, model: nn.Module) -> None:
        self.gate = Gate(model)
        self.attachment = Attachment(model, self.gate, {}, drain=self.merge, after_step=self.merge)

    def merge(self) -> None:
        self.gate.steps += 1
        self.gate.is_full = False

    def of(self, *optimizers: torch.optim.Optimizer) -> int:
        """How many there are of one step of each."""
        before = self.gate.steps
        for optimizer in optimizers:
            optimizer.step()
        return self.gate.steps - before


@pytest.fixture
def model() -> nn.Sequential:
    return network()


@pytest.fixture
def steps(model: nn.Module) -> Iterator[Steps]:
    hooks = len(_global_optimizer_post_hooks)
    steps = Steps(model)
    yield steps
    for _ in range(2):
        steps.attachment.remove()
    assert len(_global_optimizer_post_hooks) == hooks


def test_the_two_networks_of_a_gan_each_have_their_own_steps() -> None:
    networks = network(), network()
    generator, discriminator = networks
    theirs = [sgd(*each.parameters()) for each in networks]
    first, second = [BatchNormTracker(each).attach() for each in networks]
    for round_ in range(1 + ROUNDS):
        if round_ == 1:  # only by then have both made a step
            before = [tracker._gate.steps for tracker in (first, second)]
        for optimizer in theirs[::-1]:
            discriminator(generator(torch.randn(8, C))).sum().backward()
            optimizer.step()
    assert [tracker._gate.steps - then for tracker, then in zip((first, second), before, strict=True)] == [ROUNDS] * 2
    for tracker in (first, second):
        tracker.detach()
        assert tracker.report()["1"].num_batches == 2 * (1 + ROUNDS)


def test_a_gan_that_is_saved_between_its_two_steps_is_resumed_from_the_middle_of_a_batch() -> None:
    generator, discriminator = network(), network()
    own, other = sgd(*generator.parameters()), sgd(*discriminator.parameters())
    with BatchNormTracker(generator) as tracker:
        for round_ in range(ROUNDS):
            fake = generator(torch.randn(8, C))
            discriminator(fake.detach()).sum().backward()
            other.step()
            if round_ == ROUNDS - 1:
                tracker.load_state_dict(tracker.state_dict())  # from here, this round will be run once more
                break
            discriminator(fake).sum().backward()
            own.step()
        assert "interrupted-batch" in tracker.report()["1"].flags


@pytest.mark.parametrize("is_full", [False, True])
def test_steps_of_an_optimizer_of_another_model_are_none(model: nn.Module, steps: Steps, is_full: bool) -> None:
    own, other = sgd(*model.parameters()), sgd(*network().parameters())
    assert steps.of(own) == 1
    steps.gate.is_full = is_full
    assert steps.of(other, other) == 0
    assert steps.gate.is_full is is_full
    assert steps.of(own, other, own) == 2


def test_an_optimizer_of_the_model_may_hold_other_parameters_too(model: nn.Sequential, steps: Steps) -> None:
    head = nn.Linear(C, C)
    shared, rest = sgd(*head.parameters(), model[2].bias), sgd(*model[0].parameters())
    assert steps.of(shared, rest, sgd(*head.parameters())) == 2


def test_parameters_that_an_optimizer_is_given_later_are_noticed(model: nn.Sequential, steps: Steps) -> None:
    other = sgd(*network().parameters())
    assert steps.of(sgd(*model[0].parameters()), other) == 1
    other.add_param_group({"params": list(model[2].parameters())})
    assert steps.of(other) == 1


def test_an_optimizer_stays_the_models_when_parameters_are_replaced(model: nn.Sequential, steps: Steps) -> None:
    optimizer = sgd(*model.parameters())
    assert steps.of(optimizer) == 1
    model[0] = nn.Linear(C, C)
    assert steps.of(optimizer, sgd(*model[0].parameters())) == 2


def test_an_optimizer_of_copies_counts_if_there_is_no_other(model: nn.Module, steps: Steps) -> None:
    master = sgd(*(parameter.detach().clone().double() for parameter in model.parameters()))
    assert steps.of(master, master) == 2


def test_all_count_again_when_the_models_own_optimizer_is_gone(model: nn.Module, steps: Steps) -> None:
    own, head = sgd(*model.parameters()), sgd(*nn.Linear(C, C).parameters())
    assert steps.of(own, head) == 1
    del own
    gc.collect()
    assert steps.of(head) == 1


def test_the_model_within_a_compiled_one_has_the_same_parameters(model: nn.Module) -> None:
    steps = Steps(torch.compile(model))
    assert steps.of(sgd(*model.parameters()), sgd(*network().parameters())) == 1
    steps.attachment.remove()


class Unhashable(torch.optim.SGD):
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise AssertionError


def test_an_optimizer_need_not_be_hashable(model: nn.Module, steps: Steps) -> None:
    own, other = (Unhashable(each.parameters(), lr=1e-3) for each in (model, network()))
    assert steps.of(own, other, own) == 2


def test_no_optimizer_is_kept_alive(steps: Steps) -> None:
    optimizer = sgd(*network().parameters())
    assert steps.of(optimizer) == 1
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None
