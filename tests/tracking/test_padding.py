"""Masks in training: statistics without padding against every value that counted, whatever happens."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_bnmonitor import BatchNormTracker
from tests.compiling import by_wrapping, in_place
from tests.tracking.padded_models import Records, assert_unpadded, batches, lengths_to_mask, network
from tests.tracking.small_models import assert_same, hooks_on, saved_and_loaded

LAYERS = ("1", "4", "7", "11")


def train(model, tracker, its, records=None, forward=None, step=True):
    for batch in its:
        tracker.see_inputs(batch)
        if records is not None:
            records.mask = lengths_to_mask(batch)
        (forward or model)(batch[0]).square().mean().backward()
        if step:
            tracker.step()


def test_statistics_without_padding_are_those_of_every_value_that_counts():
    model, its = network(), batches(20)
    records = Records(model)
    with BatchNormTracker(model, mask=lengths_to_mask) as tracker:
        train(model, tracker, its, records)
        report = tracker.close()
    for name in LAYERS:
        assert_unpadded(report[name], records, name)
        assert report[name].evidence["padding_batches"] == 20
    assert report["11"].evidence["padding_share"] == 0  # whole samples
    mean, _ = records.unpadded("1")
    every = np.concatenate(records.values["1"])
    assert np.abs(mean - every.mean(axis=0)).max() > 0.1  # with padding they are others,
    assert np.abs(report["1"].population_mean.numpy() - every.mean(axis=0)).max() < 1e-6  # which stay what they were


def test_padding_that_varies_is_flagged_and_padding_that_does_not_is_not():
    model = network()
    with BatchNormTracker(model, mask=lengths_to_mask) as tracker:
        train(model, tracker, batches(30, offset=3.0))
        moved = tracker.close()
        tracker.reset()
        half = torch.cat([torch.ones(16), torch.zeros(16)])
        train(model, tracker, [((torch.randn(6, 4, 32) + 3) * half, torch.tensor([16] * 6)) for _ in range(30)])
        alike = tracker.close()
    assert "padded" in moved["1"].flags
    assert moved["1"].needs_attention
    assert moved["1"].evidence["padding_shift"] > 0.1
    assert "mT[mask]" in moved["1"].remedy
    assert not any("padded" in layer.flags for layer in alike.values())
    assert alike["1"].evidence["padding_share"] == 0.5


def test_nothing_is_changed_by_a_bit():
    def trained(mask):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        torch.manual_seed(1)
        outputs = []
        with BatchNormTracker(model, mask=mask) as tracker:
            for batch in batches(15):
                tracker.see_inputs(batch)
                optimizer.zero_grad()
                output = nn.functional.dropout(model(batch[0]))
                output.square().mean().backward()
                optimizer.step()
                tracker.step()
                outputs.append(output.detach())
            report = tracker.close()
        left = [hook for hook in hooks_on(model) if "bnmonitor" in repr(hook)]
        return [*outputs, *model.state_dict().values(), torch.get_rng_state()], report, left

    (plain, without, _), (masked, with_, left) = trained(None), trained(lengths_to_mask)
    assert all(map(torch.equal, plain, masked))
    assert not left
    assert "padding_share" in with_["1"].evidence
    for name, layer in without.items():  # and all else is said as without a mask
        assert layer.unpadded is None
        assert torch.equal(layer.numbers.nan_to_num(), with_[name].numbers.nan_to_num())
        assert not any(number.startswith("padding") for number in layer.evidence)


def test_a_restart_in_mid_window_goes_on():
    its = batches(20)
    whole, model = network(), network()
    with BatchNormTracker(whole, mask=lengths_to_mask) as tracker:
        train(whole, tracker, its)
        expected = tracker.close()
    with BatchNormTracker(model, mask=lengths_to_mask) as tracker:
        train(model, tracker, its[:11])
        state = saved_and_loaded(tracker.state_dict())
        assert_same(copy.deepcopy(tracker).attach().report(), tracker.report())
    again = BatchNormTracker(model, mask=lengths_to_mask)
    again.load_state_dict(state)
    with again:
        train(model, again, its[11:])
        assert_same(again.close(), expected)
    without = BatchNormTracker(model)  # with no mask what was kept is left out
    without.load_state_dict(state)
    with without:
        assert all(layer.unpadded is None for layer in without.report().values())


def test_a_state_of_before_there_were_masks_is_taken():
    model = network()
    with BatchNormTracker(model) as tracker:
        train(model, tracker, batches(9))
        state = tracker.state_dict()
    del state["paddings"]
    with BatchNormTracker(model, mask=lengths_to_mask) as tracker:
        tracker.load_state_dict(state)
        train(model, tracker, batches(9, seed=1))
        report = tracker.close()
    assert report["1"].num_batches == 18
    assert report["1"].evidence["padding_batches"] == 9


def test_each_window_has_its_own_padding():
    model = network()
    with BatchNormTracker(model, mask=lengths_to_mask) as tracker:
        train(model, tracker, batches(9))
        tracker.reset()
        records = Records(model)
        train(model, tracker, batches(9, seed=1), records)
        report = tracker.close()
    assert_unpadded(report["1"], records, "1")


def test_what_does_not_count_does_not_count_here():
    model, its = network(), batches(12)
    records = Records(model)
    with BatchNormTracker(model, mask=lengths_to_mask) as tracker:
        train(model, tracker, its, records)
        records.mask = None
        model(its[0][0])  # between two steps no mask is known
        with tracker.paused():
            train(model, tracker, its[:3])
        model.eval()
        train(model, tracker, its[:3])
        model.train()
        report = tracker.close()
        train(model, tracker, its[:3])
    assert_unpadded(report["1"], records, "1")
    assert report["1"].num_batches == 13


def test_layers_that_are_shared_and_frozen_ones_are_followed_call_by_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.frozen = nn.BatchNorm1d(4), nn.BatchNorm1d(4).eval()
            self.halve = nn.Conv1d(4, 4, 3, stride=2, padding=1)

        def forward(self, x):
            return self.frozen(self.norm(self.halve(self.norm(x))))

    model = Twice()
    records = Records(model)
    with BatchNormTracker(model, mask=lengths_to_mask) as tracker:
        train(model, tracker, batches(20, offset=3.0), records)
        report = tracker.close()
    for name in ("norm", "frozen"):
        assert_unpadded(report[name], records, name)
    assert report["norm"].evidence["padding_batches"] == 40
    assert "padded" in report["norm"].flags
    assert "padded" not in report["frozen"].flags  # batches are not what it normalises by


def test_gradients_of_several_batches_may_be_accumulated():
    model = network()
    records = Records(model)
    with BatchNormTracker(model, mask=lengths_to_mask) as tracker:
        for index, batch in enumerate(batches(12)):
            train(model, tracker, [batch], records, step=index % 4 == 3)
        report = tracker.close()
    assert_unpadded(report["4"], records, "4")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_what_activation_checkpointing_makes_again_counts_once(use_reentrant):
    model = network()
    records = Records(model)

    def forward(x):
        x.requires_grad_()
        return checkpoint(model, x, use_reentrant=use_reentrant)

    with BatchNormTracker(model, mask=lengths_to_mask) as tracker:
        for batch in batches(9):
            tracker.see_inputs(batch)
            records.mask = lengths_to_mask(batch)
            output = forward(batch[0])
            records.mask = None
            output.square().mean().backward()
            tracker.step()
        report = tracker.close()
    assert_unpadded(report["1"], records, "1")
    assert report["1"].evidence["padding_batches"] == 9


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_stands_in_padding_does_not_matter(value):
    model = nn.Sequential(nn.BatchNorm1d(4))
    records = Records(model)
    its = [(torch.where(lengths_to_mask((x, n))[:, None], x, value), n) for x, n in batches(10)]
    with BatchNormTracker(model, mask=lengths_to_mask) as tracker:
        for batch in its:
            tracker.see_inputs(batch)
            records.mask = lengths_to_mask(batch)
            model(batch[0])
        layer = tracker.close()["0"]
    mean, var = records.unpadded("0")
    np.testing.assert_allclose(layer.unpadded[0].numpy(), mean, atol=1e-6)
    np.testing.assert_allclose(layer.unpadded[1].numpy(), var, rtol=1e-5)


def test_batches_that_are_padding_alone_are_counted_and_harm_nothing():
    model = nn.Sequential(nn.BatchNorm1d(4))
    its = batches(10)
    its[4] = (its[4][0], torch.zeros(6, dtype=torch.long))
    with BatchNormTracker(model, mask=lengths_to_mask) as tracker:
        train(model, tracker, its)
        layer = tracker.close()["0"]
    assert layer.evidence["padding_batches"] == 9
    assert torch.isfinite(layer.unpadded).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_other_precisions_and_under_autocast(dtype):
    model, its = network().to(dtype), [(x.to(dtype), n) for x, n in batches(12)]
    records = Records(model)
    with BatchNormTracker(model, mask=lengths_to_mask) as tracker:
        train(model, tracker, its, records)
        report = tracker.close()
    assert_unpadded(report["4"], records, "4")
    model = network()
    records = Records(model)
    with BatchNormTracker(model, mask=lengths_to_mask) as tracker, torch.autocast("cpu", dtype=torch.bfloat16):
        train(model, tracker, batches(12), records)
        report = tracker.close()
    assert_unpadded(report["4"], records, "4")


@pytest.mark.parametrize("spoiled", ["a value that counts", "padding"])
def test_a_batch_that_a_guard_undoes_is_not_in_them(spoiled):
    model, its = network(), batches(20)
    x, lengths = its[3]
    shortest = int(lengths.argmin())
    assert lengths[shortest] < x.shape[-1]
    x[shortest, 0, -1 if spoiled == "padding" else 0] = float("nan")
    records = Records(model)
    with BatchNormTracker(model, mask=lengths_to_mask, guard=True) as tracker:
        train(model, tracker, its, records)
        report = tracker.close()
    for name in LAYERS:
        for values in (records.values[name], records.kept[name]):
            del values[3]
        assert report[name].num_batches == report[name].evidence["padding_batches"] == 19
        assert_unpadded(report[name], records, name)


def test_images_in_channels_last_with_masks_of_two_dimensions():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    seen, kept = [], []
    model[1].register_forward_hook(lambda _, args, __: seen.append(args[0].detach().double()))

    def mask(batch):
        _, height, width = batch
        return (torch.arange(8)[:, None] < height[:, None, None]) & (torch.arange(8) < width[:, None, None])

    with BatchNormTracker(model, mask=mask) as tracker:
        for _ in range(10):
            batch = torch.randn(4, 3, 8, 8), torch.randint(2, 9, (4,)), torch.randint(2, 9, (4,))
            tracker.see_inputs(batch)
            model(batch[0].contiguous(memory_format=torch.channels_last)).mean().backward()
            kept.append(mask(batch))
        layer = tracker.close()["1"]
    values = torch.cat([x.movedim(1, -1)[its] for x, its in zip(seen, kept, strict=True)])
    torch.testing.assert_close(layer.unpadded[0], values.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.unpadded[1], values.var(0), rtol=1e-5, atol=1e-6)


def test_a_function_that_fails_is_told_of_once_and_training_goes_on():
    its = batches(12)

    def mask(batch):
        if batch is its[5]:
            raise KeyError("lengths")
        return lengths_to_mask(batch)

    model = network()
    with BatchNormTracker(model, mask=mask) as tracker:
        with pytest.warns(UserWarning, match=r"`mask` failed.*KeyError\('lengths'\)") as told:
            train(model, tracker, its)
        report = tracker.close()
        tracker.reset()
        train(model, tracker, its)
        later = tracker.close()
    assert len(told) == 1
    assert report["1"].num_batches == later["1"].num_batches == 12
    assert report["1"].evidence["padding_batches"] == 5
    assert later["1"].unpadded is None


def test_a_loop_that_tells_of_no_batch_is_told_so_once():
    model = network()
    with BatchNormTracker(model, mask=lengths_to_mask) as tracker:
        model(batches(1)[0][0])
        with pytest.warns(UserWarning, match=r"`mask` was not asked.*tracker\.see_inputs\(batch\)"):
            tracker.close()
        tracker.reset()
        model(batches(1)[0][0])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tracker.close()


def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match=r"`mask` must be a function or None, got 'lengths'"):
        BatchNormTracker(network(), mask="lengths")


def test_the_remedy_normalises_what_counts_alone():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(4)

        def forward(self, x, mask):
            scope = {"torch": torch, "x": x, "mask": mask, "bn": self.bn}
            exec(code, scope)
            return scope["y"]

    model = nn.Sequential(nn.BatchNorm1d(4))
    with BatchNormTracker(model, mask=lengths_to_mask) as tracker:
        train(model, tracker, batches(20, offset=3.0))
        flagged = tracker.close()["0"]
    code = flagged.remedy.split("`")[3]
    assert code.startswith("y = torch.zeros_like(x)")
    repaired = Masked()
    with warnings.catch_warnings(), BatchNormTracker(repaired, mask=lengths_to_mask) as tracker:
        warnings.simplefilter("error")
        for batch in batches(20, offset=3.0):
            tracker.see_inputs(batch)
            x = batch[0].requires_grad_()
            output = repaired(x, mask := lengths_to_mask(batch))
            output.square().sum().backward()
            tracker.step()
            assert x.grad is not None
            torch.testing.assert_close(output.mT[mask].mean(0), torch.zeros(4), atol=1e-5, rtol=0)
            assert not output.mT[~mask].any()
        layer = tracker.close()["bn"]
    assert "padded" not in layer.flags
    assert (layer.population_mean - 3).abs().max() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [by_wrapping, in_place])
def test_compiled_layers_are_said_not_to_be_looked_at_and_train_as_ever(compiled):
    def trained(mask):
        torch._dynamo.reset()
        model = compiled(network(), backend="eager")
        with BatchNormTracker(model, mask=mask) as tracker:
            train(model, tracker, batches(9, longest=9))
            if mask is None:
                report = tracker.close()
            else:
                with pytest.warns(UserWarning, match="compiled code"):
                    report = tracker.close()
        return report, list(model.state_dict().values())

    (plain, before), (masked, after) = trained(None), trained(lengths_to_mask)
    assert all(map(torch.equal, before, after))
    for one, other in zip(plain.values(), masked.values(), strict=True):
        assert torch.equal(one.numbers.nan_to_num(), other.numbers.nan_to_num())
        assert other.unpadded is None
        assert other.num_batches == 9


def test_without_a_mask_padded_inputs_are_told_to_look_padded_and_with_one_what_that_does():
    def flagged(mask, model):
        with BatchNormTracker(model, mask=mask) as tracker:
            train(model, tracker, batches(12))
            return tracker.close()

    report = flagged(None, network())
    for name in ("1", "4", "7"):
        assert report[name].flags == ("maybe-padded",)
        assert 0.3 < report[name].evidence["constant_ends"] < 0.7
    assert report["11"].flags == ()  # has no positions
    assert "BatchNormMonitor(mask=fn)" in str(report)
    assert not any("maybe-padded" in layer.flags for layer in flagged(lengths_to_mask, network()).values())
    images = nn.Sequential(nn.Unflatten(1, (1, 4)), nn.BatchNorm2d(1), nn.Flatten(1, 2))
    assert flagged(None, images)["1"].flags == ()


def test_sequences_that_are_not_padded_do_not_look_so():
    model = network()
    with BatchNormTracker(model) as tracker:
        train(model, tracker, [(torch.randn(6, 4, 32).relu(), None) for _ in range(12)])
        report = tracker.close()
    assert not any(layer.flags for layer in report.values())


def test_a_pass_that_fails_is_told_of_once_and_training_goes_on(monkeypatch):
    def without_memory(x, mask):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("lightning_bnmonitor.capture.masked_calls.masked_moments_of", without_memory)
    model = nn.Sequential(nn.BatchNorm1d(4))
    with BatchNormTracker(model, mask=lengths_to_mask) as tracker:
        with pytest.warns(UserWarning, match=r"layer '0'.*out of memory") as told:
            train(model, tracker, batches(9))
        layer = tracker.close()["0"]
    assert len(told) == 1
    assert (layer.num_batches, layer.unpadded) == (9, None)


def test_an_interrupt_loses_nothing(monkeypatch):
    its = batches(20)
    whole, model = network(), network()
    with BatchNormTracker(whole, mask=lengths_to_mask) as tracker:
        train(whole, tracker, its)
        expected = tracker.close()
    from lightning_bnmonitor.tracking import paddings

    merge = paddings.with_batches

    def interrupted(*args):
        monkeypatch.setattr(paddings, "with_batches", merge)
        raise KeyboardInterrupt

    with BatchNormTracker(model, mask=lengths_to_mask) as tracker:
        for index, batch in enumerate(its):
            if index == 7:  # with this one it is merged
                monkeypatch.setattr(paddings, "with_batches", interrupted)
                tracker.see_inputs(batch)
                with pytest.raises(KeyboardInterrupt):
                    model(batch[0])
                for layer in (model[4], model[7], model[11]):  # what it kept from being called
                    assert layer.num_batches_tracked == 7
                break
            train(model, tracker, [batch])
        report = tracker.report()
    assert report["1"].evidence["padding_batches"] == 8
    assert report["4"].evidence["padding_batches"] == 7
    assert expected["1"].evidence["padding_batches"] == 20
