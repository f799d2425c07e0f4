"""Which layer's running statistics cost how much: against losses computed by hand with buffers written by hand."""

import copy
import re

import pytest
import torch
from torch import nn

from tests.repair.gap_results import table
from tests.repair.spoiled_models import (
    INF,
    LAYERS,
    NAN,
    SPOILED,
    Net,
    attribute,
    error_by_hand,
    exact_stats,
    healthy,
    losses_by_hand,
    mean_and_stderr,
    mean_loss,
    normalising_by_the_batch,
    norms,
    per_sample,
    spoil_mean,
    spoil_nan,
    spoil_var,
    with_exact,
)
from tests.repair.unchanged import Everything

# -------------------------------------------------------------------------------------- against losses computed by hand


@pytest.mark.parametrize("loss", [per_sample, mean_loss])
def test_all_numbers_are_those_of_hand_written_buffers_and_paired_losses(loss):
    model, batches = healthy()
    batches[-1] = tuple(part[:11] for part in batches[-1])  # samples count alike, or batches do
    with torch.no_grad():
        spoil_mean(model.blocks[0].norm)
        spoil_var(model.stem)
    stats = exact_stats(model, batches)
    found = attribute(model, batches, loss)

    as_is, exact = (
        losses_by_hand(net.eval(), batches, loss) for net in (copy.deepcopy(model), with_exact(model, stats))
    )
    assert found.eval_loss == pytest.approx(as_is.mean(), rel=1e-5)
    assert found.exact_loss == pytest.approx(exact.mean(), rel=1e-5)
    by_batch = losses_by_hand(normalising_by_the_batch(model), batches, loss)
    assert found.batch_loss == found.train_loss == pytest.approx(by_batch.mean(), rel=1e-5)
    assert (found.gap, found.gap_stderr) == pytest.approx(mean_and_stderr(as_is - exact), rel=1e-4)
    assert len(as_is) == (5 * 32 + 11 if loss is per_sample else 6)

    names, present = [], as_is
    for part in found.contributions:
        names.append(part.name)
        following = losses_by_hand(with_exact(model, stats, names).eval(), batches, loss)
        assert (part.reduction, part.stderr) == pytest.approx(mean_and_stderr(present - following), rel=1e-3, abs=1e-7)
        assert part.eval_error == pytest.approx(error_by_hand(norms(model)[part.name], stats[part.name]), rel=1e-2)
        present = following
    if found.rest:
        assert (found.rest.reduction, found.rest.stderr) == pytest.approx(
            mean_and_stderr(present - exact), rel=1e-3, abs=1e-7
        )


@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize("name", LAYERS)
def test_the_one_layer_that_is_spoiled_is_named(name, how):
    model, batches = healthy()
    with torch.no_grad():
        SPOILED[how](norms(model)[name])
    everything = Everything(model)
    found = attribute(model, batches)
    everything.assert_same()
    assert found.worst == name
    assert found.is_significant
    assert [part.name for part in found.contributions] == [name]
    assert found.rest.name == "3 other layers"
    assert found.contributions[0].reduction == pytest.approx(found.gap, rel=0.01)
    first_line = str(found).splitlines()[0]
    assert re.search(rf"\b{re.escape(name)}\b", first_line)
    assert ("nan" in first_line) == (how == "NaN")


@pytest.mark.parametrize("pair", [("stem", "head"), ("blocks.0.norm", "blocks.1.norm"), ("head", "blocks.0.norm")])
def test_two_spoiled_layers_are_both_named_and_nothing_else(pair):
    model, batches = healthy()
    with torch.no_grad():
        for name in pair:
            spoil_mean(norms(model)[name])
    found = attribute(model, batches)
    assert {part.name for part in found.contributions} == set(pair)
    assert found.worst == max(found.contributions, key=lambda part: part.reduction).name


def test_a_healthy_trained_model_has_nothing_to_explain():
    model = Net()
    inputs = [torch.randn(64, 6) for _ in range(20)]
    batches = [(x, torch.stack([x[:, 0], x[:, 1] * x[:, 2]], 1) + 0.3 * torch.randn(64, 2)) for x in inputs]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for rate in (0.1, 0.1, 0.1, 0.0):  # running statistics catch up with the weights
        optimizer.param_groups[0]["lr"] = rate
        for batch in batches:
            optimizer.zero_grad()
            mean_loss(model(batch[0]), batch).backward()
            optimizer.step()
    optimizer.zero_grad()
    stats = exact_stats(model, batches)
    with_exact_stats = with_exact(model, stats)
    for net in (model, with_exact_stats):
        as_is, exact = (
            losses_by_hand(one.eval(), batches, mean_loss) for one in (copy.deepcopy(net), with_exact_stats)
        )
        gap, stderr = mean_and_stderr(as_is - exact)
        net.train()
        found = attribute(net, batches, mean_loss)
        assert found.gap == pytest.approx(gap, abs=1e-5)
        assert abs(gap) < 0.01 * found.eval_loss
        assert not found.is_significant
        assert (found.contributions, found.rest, found.worst) == ((), None, None)
        assert "Repair" not in str(found)
        assert found.gap_stderr == pytest.approx(stderr, rel=0.01, abs=1e-6)
    assert not attribute(with_exact_stats, batches, mean_loss).contributions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_gap_of_rounding_alone_is_nothing_to_explain(dtype):
    """The same in all batches, so that its spread does not show that it is nothing."""
    model, batches = healthy(num_batches=4)
    exact = model.head.running_mean.clone()
    with torch.no_grad():
        spoil_mean(model.head)
    last_place = torch.finfo(dtype).eps
    signed = [(*batch, (-1) ** index) for index, batch in enumerate(batches)]  # 2 % of the mean loss is nothing, too
    for units, is_significant in ((1, False), (2, False), (3, True)):

        def loss(output, batch, units=units):
            is_spoiled = not torch.allclose(model.head.running_mean, exact, atol=1e-4)
            return torch.tensor(float(batch[2]), dtype=dtype) + is_spoiled * units * last_place

        found = attribute(model.eval(), signed, loss)
        assert found.gap == units * last_place
        assert found.gap_stderr == pytest.approx(last_place)
        assert found.is_significant == is_significant
        assert found.worst == ("head" if is_significant else None)


@pytest.mark.parametrize(
    ("factors", "between", "is_significant"),
    [((1, -1, 1, -1.2), (-1, 0), False), ((1, 1, 1, -0.5), (1, 2), False), ((1, 1, 1, 0.2), (2, 9), True)],
)
def test_a_gap_below_two_standard_errors_is_nothing_to_explain_and_one_above_is(factors, between, is_significant):
    model, batches = healthy(num_batches=4)
    with torch.no_grad():
        spoil_mean(model.head)
    weighted = [(x, y, factor) for (x, y), factor in zip(batches, factors, strict=True)]
    found = attribute(model, weighted, lambda output, batch: mean_loss(output, batch) * batch[2])
    assert between[0] < found.gap / found.gap_stderr < between[1]
    assert found.is_significant == is_significant
    assert bool(found.contributions) == is_significant
    assert str(found).startswith("Running statistics cost") == is_significant


@pytest.mark.parametrize(("offset", "is_significant"), [(0.5, True), (2.0, False)])
def test_a_gap_below_a_fiftieth_of_the_loss_is_not_taken_apart_and_one_above_is(offset, is_significant):
    """However certain it is."""
    model, batches = healthy()
    with torch.no_grad():
        spoil_mean(model.head)
    gap = attribute(model, batches).gap
    found = attribute(model, batches, lambda output, batch: per_sample(output, batch) + offset * 50 * gap)
    assert found.gap == pytest.approx(gap, rel=1e-3)
    assert found.gap > 5 * found.gap_stderr
    assert found.is_significant == is_significant
    assert bool(found.contributions) == is_significant
    assert str(found).startswith("Nothing to explain") != is_significant


@pytest.mark.parametrize("is_training", [True, False])
def test_contributions_and_the_rest_add_up_to_the_gap_and_all_steps_to_the_losses(is_training):
    model, batches = healthy(Net(p=0.3))
    with torch.no_grad():
        for layer in norms(model).values():
            layer.running_mean += torch.randn(6) * layer.running_var.sqrt()
    found = attribute(model.train(is_training), batches)
    parts = [*found.contributions, *([found.rest] if found.rest else [])]
    assert sum(part.reduction for part in parts) == pytest.approx(found.gap, rel=1e-9)
    assert found.eval_loss - found.exact_loss == pytest.approx(found.gap, rel=1e-9)
    steps = [part.reduction for part in found.remaining]
    assert found.eval_loss - found.gap - sum(steps) == pytest.approx(found.train_loss, rel=1e-9)


def test_layers_are_taken_in_the_order_of_eval_error():
    model, batches = healthy(num_batches=3)
    with torch.no_grad():
        for layer, shift in zip(norms(model).values(), (0.5, 2.0, 1.0, 0.2), strict=True):
            layer.running_mean += shift * layer.running_var.sqrt()
    stats = exact_stats(model, batches)
    errors = {name: error_by_hand(layer, stats[name]) for name, layer in norms(model).items()}
    found = attribute(model, batches)
    expected = sorted(errors, key=errors.__getitem__, reverse=True)
    names = [part.name for part in found.contributions]
    assert names == expected[: len(names)]
    assert len(names) >= 3
    if found.rest:
        assert found.rest.name == "1 other layer"
        assert found.rest.eval_error == pytest.approx(errors[expected[-1]], rel=1e-2)


def test_layers_that_are_equally_far_off_are_taken_in_the_order_of_the_model():
    model, batches = healthy()
    with torch.no_grad():
        spoil_nan(model.blocks[0].norm)
        spoil_nan(model.head)
    found = attribute(model, batches)
    assert [part.name for part in found.contributions] == ["blocks.0.norm", "head"]
    assert [part.reduction for part in found.contributions] == pytest.approx([NAN, INF], nan_ok=True)
    assert found.worst == "blocks.0.norm"


@pytest.mark.slow
@pytest.mark.parametrize("num_spoiled", [1, 3, 12])
def test_no_pass_is_made_for_layers_that_explain_less_than_a_hundredth(num_spoiled):
    model, batches = healthy(Net(num_blocks=10), num_batches=3)
    with torch.no_grad():
        for layer in list(norms(model).values())[:num_spoiled]:
            layer.running_mean += 2 * layer.running_var.sqrt()
    stats = exact_stats(model, batches)
    errors = {name: error_by_hand(layer, stats[name]) for name, layer in norms(model).items()}
    order = sorted(errors, key=errors.__getitem__, reverse=True)
    exact = losses_by_hand(with_exact(model, stats).eval(), batches, per_sample).mean()
    left = [
        losses_by_hand(with_exact(model, stats, order[:number]).eval(), batches, per_sample).mean() - exact
        for number in range(len(order) + 1)
    ]
    expected = next(number for number in range(1, len(order) + 1) if abs(left[number]) < 0.01 * left[0])
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    found = attribute(model, batches)
    assert [part.name for part in found.contributions] == order[:expected]
    assert len(calls) == 3 * (5 + expected - (expected == len(order)))
    assert (found.rest is None) == (expected == len(order))
    if found.rest:
        others = len(order) - expected
        assert found.rest.name == f"{others} other layer{'s' * (others > 1)}"
        assert abs(found.rest.reduction) < 0.01 * found.gap


# --------------------------------------------------------------------------------------------------------- what remains


def test_dropout_is_in_what_other_modules_do_in_training_mode():
    model, batches = healthy(Net(p=0.5), size=256, noise=0.01)
    state = torch.get_rng_state()
    training = losses_by_hand(model.train(), batches, per_sample).mean()
    torch.set_rng_state(state)
    found = attribute(model, batches)
    assert found.train_loss == pytest.approx(training, rel=1e-5)
    by_batch, others = (part.reduction for part in found.remaining)
    assert by_batch == pytest.approx(found.exact_loss - found.batch_loss)
    assert others == pytest.approx(found.batch_loss - found.train_loss)
    assert others < -20 * abs(by_batch)
    assert abs(found.gap) < 1e-6 * found.eval_loss
    rows = table(found)[1]
    assert float(rows["- dropout, other modules in training mode"]["explains"]) == pytest.approx(others, rel=1e-3)


def test_a_model_that_is_worse_in_eval_mode_for_another_reason_says_so():
    class Bug(nn.Module):
        def forward(self, x):
            return x if self.training else 3 * x

    model, batches = healthy()
    targets = normalising_by_the_batch(model)
    with torch.no_grad():
        batches = [(x, targets(x)) for x, _ in batches]
    found = attribute(nn.Sequential(model, Bug()), batches)
    assert found.largest is found.remaining[-1]
    assert found.largest.reduction > 10 * found.train_loss + 0.1
    assert str(found).startswith("Dropout or other modules, which act otherwise in training mode, are worth ")


def test_tiny_batches_are_in_normalising_by_the_batch():
    model, _ = healthy(num_batches=40, size=64)
    x = torch.randn(200, 6)
    with torch.no_grad():
        target = normalising_by_the_batch(model)(x)
    batches = list(zip(x.split(2), target.split(2), strict=True))
    found = attribute(model, batches)
    by_hand = losses_by_hand(normalising_by_the_batch(model), batches, per_sample).mean()
    assert found.batch_loss == pytest.approx(by_hand, rel=1e-5)
    by_batch, others = (part.reduction for part in found.remaining)
    assert others == 0
    assert by_batch == pytest.approx(found.exact_loss - found.train_loss)
    assert abs(by_batch) > 0.5 * found.exact_loss
