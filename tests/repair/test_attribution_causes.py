"""What an attribution opens with, in models where the cause is known: against losses with buffers written by hand."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bnmonitor import recalibrate
from tests.repair.gap_results import assert_printed
from tests.repair.spoiled_models import (
    Net,
    attribute,
    exact_stats,
    healthy,
    losses_by_hand,
    mean_and_stderr,
    norms,
    numbers,
    per_sample,
    spoil_mean,
    with_exact,
)
from tests.repair.unchanged import Everything


def first_sentence(found):
    return assert_printed(found).split(". ")[0]


def changed(batches, factor=1.0, offset=0.0, noise=0.0):
    return [(factor * x + offset, y + noise * torch.randn_like(y)) for x, y in batches]


# --------------------------------------------------------------------------------------------------- data of evaluation


def test_all_losses_with_evaluation_data_are_those_of_buffers_written_by_hand():
    model, batches = healthy()
    evaluation = changed(batches[:4], 1.3, 0.5, noise=0.2)
    with torch.no_grad():
        spoil_mean(model.blocks[0].norm)
    everything = Everything(model)
    found = attribute(model, batches, evaluation=evaluation)
    everything.assert_same()
    exact = with_exact(model, exact_stats(model, batches)).eval()
    own = with_exact(model, exact_stats(model, evaluation)).eval()
    by_hand = {
        "eval_loss": losses_by_hand(copy.deepcopy(model).eval(), evaluation, per_sample),
        "exact_loss": losses_by_hand(exact, evaluation, per_sample),
        "own_loss": losses_by_hand(own, evaluation, per_sample),
        "exact_train_loss": losses_by_hand(exact, batches, per_sample),
        "train_loss": losses_by_hand(copy.deepcopy(model).train(), batches, per_sample),
    }
    for name, losses in by_hand.items():
        assert getattr(found, name) == pytest.approx(losses.mean(), rel=1e-5), name
    assert found.dropout_loss == found.eval_loss  # there is none
    stats, data, *_ = found.remaining
    assert stats[1:] == pytest.approx(mean_and_stderr(by_hand["exact_loss"] - by_hand["own_loss"]), rel=1e-3)
    apart = by_hand["own_loss"].mean() - by_hand["exact_train_loss"].mean()
    errors = [mean_and_stderr(by_hand[name])[1] for name in ("own_loss", "exact_train_loss")]
    assert data[1:] == pytest.approx((apart, np.hypot(*errors)), rel=1e-3)
    steps = sum(part.reduction for part in found.remaining)
    assert found.eval_loss - found.gap - steps == pytest.approx(found.train_loss, rel=1e-9)


def test_evaluation_data_of_another_scale_are_the_cause_and_their_own_statistics_repair_it():
    model, batches = healthy()
    evaluation = changed(batches, 2.0, 3.0)
    found = attribute(model, batches, evaluation=evaluation)
    assert first_sentence(found).startswith("The evaluation data have other statistics than the training data")
    assert found.largest.reduction == pytest.approx(found.exact_loss - found.own_loss)
    recalibrate(model, evaluation)
    by_hand = losses_by_hand(model.eval(), evaluation, per_sample).mean()
    assert found.own_loss == pytest.approx(by_hand, rel=1e-5)
    assert by_hand < found.eval_loss / 10


def test_evaluation_data_that_are_harder_are_no_matter_of_batchnorm():
    model, batches = healthy()
    found = attribute(model, batches, evaluation=changed(batches, noise=2.0))
    assert first_sentence(found).startswith(
        "With statistics of their own, too, the evaluation data have a loss that is "
    )
    assert "no matter of BatchNorm" in first_sentence(found)


def test_running_statistics_are_the_cause_on_evaluation_data_of_the_same_kind():
    model, batches = healthy()
    order = torch.randperm(len(batches)).tolist()
    evaluation = changed([batches[index] for index in order], noise=0.1)
    with torch.no_grad():
        spoil_mean(model.blocks[1].norm)
    found = attribute(model, batches, evaluation=evaluation)
    assert found.worst == "blocks.1.norm"
    assert first_sentence(found).startswith("Running statistics cost ")


def test_evaluation_data_may_be_an_iterator_or_a_loader_that_shuffles_and_nothing_is_changed():
    model, batches = healthy(num_batches=3)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(TensorDataset(x, y), 16, shuffle=True, generator=generator)
    everything = Everything(model, generator)
    found = attribute(model, batches, evaluation=loader)
    everything.assert_same()
    assert found.own_loss == pytest.approx(found.exact_train_loss, rel=0.2)
    assert numbers(attribute(model, batches, evaluation=iter(batches))) == numbers(
        attribute(model, batches, evaluation=list(batches))
    )
    everything.assert_same()


def test_errors_name_the_argument():
    model, batches = healthy(num_batches=3)
    everything = Everything(model)
    with pytest.raises(ValueError, match="`evaluation` must give two batches or more"):
        attribute(model, batches, evaluation=[])
    everything.assert_same()


# -------------------------------------------------------------------------------------------------------------- dropout


def test_the_loss_with_dropout_on_normalises_by_the_running_statistics():
    model, batches = healthy(Net(p=0.5))
    net = copy.deepcopy(model).eval()
    for block in net.blocks:
        block.dropout.train()
    state = torch.get_rng_state()
    by_hand = losses_by_hand(net, batches, per_sample).mean()
    torch.set_rng_state(state)
    found = attribute(model, batches)
    assert found.dropout_loss == pytest.approx(by_hand, rel=1e-5)
    assert found.dropout_loss > 2 * found.eval_loss
    assert "under dropout" not in str(found)


def test_running_statistics_of_activations_under_dropout_are_named_as_that():
    """A variance before BatchNorm that only dropout makes (Li et al., 2019)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.8), nn.Linear(40, 6), nn.BatchNorm1d(6, momentum=None))
    batches = [(torch.ones(256, 40) + 0.1 * torch.randn(256, 40), torch.zeros(256, 1)) for _ in range(20)]
    for x, _ in batches:
        model(x)
    loss = lambda output, batch: (output.square().mean(1) - 1).square()  # noqa: E731
    found = attribute(model, batches, loss)
    by_hand = losses_by_hand(copy.deepcopy(model).eval(), batches, loss).mean()
    assert found.eval_loss == pytest.approx(by_hand, rel=1e-5)
    assert first_sentence(found).startswith("Running statistics cost ")
    assert found.dropout_loss < 0.5 * by_hand
    assert "the running statistics are those of activations under dropout" in assert_printed(found)


# --------------------------------------------------------------------------------------------------------- stale layers


@pytest.mark.parametrize("how", ["momentum", "track_running_stats"])
def test_a_stale_layer_is_named_with_the_call_that_repairs_it(how):
    model, batches = healthy()
    with torch.no_grad():
        spoil_mean(model.head)
    setattr(model.head, how, 0)
    found = attribute(model, batches)
    assert found.worst == "head"
    assert found.repair == "lightning_bnmonitor.recalibrate(model, loader, frozen=True)"
    assert found.remaining[-1].reduction == 0  # what it does in training mode is no other module's
    assert f"Repair: `{found.repair}`." in str(found)
    recalibrate(model, [x for x, _ in batches], frozen=True)
    by_hand = losses_by_hand(model.eval(), batches, per_sample).mean()
    assert by_hand == pytest.approx(found.exact_loss, rel=1e-5)


def test_where_no_layer_is_stale_the_call_has_no_more_than_it_needs(spoiled):
    model, batches = spoiled
    assert attribute(model, batches).repair == "lightning_bnmonitor.recalibrate(model, loader)"
    assert len(norms(model)) == 4
