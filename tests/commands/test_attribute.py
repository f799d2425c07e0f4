"""`bnmonitor attribute`: which layer costs how much, by the losses that the model itself returns, or others."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from tests.commands import projects
from tests.commands.checkpoints import bnmonitor, documents, exact_stats, read, seeded, trained

SUBJECT = ("--model", projects.MODEL, "--data", projects.DATA)
X = projects.inputs(0)


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    """All is exact but the second layer, whose mean is off by one standard deviation."""
    folder = tmp_path_factory.mktemp("spoiled")
    content = read(trained(folder, seeded(projects.Net), epochs=3))
    weights = content["state_dict"]
    weights.update({name: torch.from_numpy(values).float() for name, values in exact_stats(weights, X).items()})
    weights["second.running_mean"] += weights["second.running_var"].sqrt()
    torch.save(content, folder / "spoiled.ckpt")
    return folder / "spoiled.ckpt"


def attributed(capsys, checkpoint, *more, subject=SUBJECT):
    return bnmonitor(capsys, "attribute", *subject, "--ckpt_path", checkpoint, *more)


def loss_by_hand(weights, x):
    """The loss in eval mode, in float64."""
    w = {name: value.double().numpy() for name, value in weights.items()}
    h = x.double().numpy()
    for norm, layer in (("first", "body"), ("second", "head")):
        scale = w[f"{norm}.weight"] / np.sqrt(w[f"{norm}.running_var"] + 1e-5)
        h = (h - w[f"{norm}.running_mean"]) * scale + w[f"{norm}.bias"]
        h = (np.maximum(h, 0) if norm == "second" else h) @ w[f"{layer}.weight"].T + w[f"{layer}.bias"]
    return np.mean((h - x.double().numpy().sum(1, keepdims=True)) ** 2)


def printed_loss(output, state):
    return float(re.search(rf"^{state} +([\d.e+]+)", output, re.M).group(1))


def test_it_names_the_layer_and_the_command_that_repairs_it(capsys, spoiled):
    before = spoiled.read_bytes()
    status, output, errors = attributed(capsys, spoiled, "--no-validation")
    assert (status, errors) == (0, "")
    weights = read(spoiled)["state_dict"]
    exact = {**weights, **{name: torch.from_numpy(value) for name, value in exact_stats(weights, X).items()}}
    assert printed_loss(output, "eval mode as it is") == pytest.approx(loss_by_hand(weights, X), rel=1e-3)
    assert printed_loss(output, "exact statistics") == pytest.approx(loss_by_hand(exact, X), rel=1e-3)
    assert "100% of that by second." in output
    command = (
        f"bnmonitor repair --model {projects.MODEL} --data {projects.DATA} --ckpt_path {spoiled} --output repaired.ckpt"
    )
    assert output.endswith(f"\n\nFor this checkpoint, `recalibrate` is:\n{command}\n")
    assert max(map(len, output.partition("\n\n")[0].splitlines())) <= 120
    assert spoiled.read_bytes() == before


def test_json_has_all_numbers(capsys, spoiled):
    status, output, _ = attributed(capsys, spoiled, "--no-validation", "--json")
    found, weights = json.loads(output), read(spoiled)["state_dict"]
    assert status == 0
    assert found["eval_loss"] == pytest.approx(loss_by_hand(weights, X), rel=1e-3)
    assert found["gap"] == pytest.approx(found["eval_loss"] - found["exact_loss"], rel=1e-6)
    assert found["contributions"][0]["name"] == "second"
    assert found["explanation"].startswith("Running statistics cost")


def test_validation_data_are_told_apart(capsys, spoiled):
    _, output, _ = attributed(capsys, spoiled)
    expected = loss_by_hand(read(spoiled)["state_dict"], projects.inputs(1))
    assert printed_loss(output, "eval mode as it is") == pytest.approx(expected, rel=1e-3)
    assert "statistics of the evaluation data" in output


def test_a_loss_of_ones_own(capsys, spoiled):
    _, by_step, _ = attributed(capsys, spoiled, "--no-validation")
    status, output, errors = attributed(
        capsys, spoiled, "--no-validation", "--loss", f"{projects.__name__}:squared_error"
    )
    assert (status, errors) == (0, "")
    for state in ("eval mode as it is", "exact statistics", "training mode"):
        assert printed_loss(output, state) == pytest.approx(printed_loss(by_step, state), rel=1e-3)


def test_shuffled_data_come_in_the_same_order_each_time(capsys, spoiled, monkeypatch):
    def shuffled():
        return projects.loader(0, 16, shuffle=True, generator=torch.Generator().manual_seed(1))

    monkeypatch.setattr(projects.Data, "train_dataloader", lambda self: shuffled())
    _, output, _ = attributed(capsys, spoiled, "--no-validation", "--num-batches", 4)
    x = torch.cat([x for x, _ in list(shuffled())[:4]])
    expected = loss_by_hand(read(spoiled)["state_dict"], x)
    assert printed_loss(output, "eval mode as it is") == pytest.approx(expected, rel=1e-3)
    assert printed_loss(output, "eval mode with dropout on") == pytest.approx(expected, rel=1e-3)


def test_a_step_that_cannot_be_run_needs_a_loss(capsys, spoiled):
    subject = ("--model", f"{projects.__name__}:NeedsOptimizers", "--data", projects.DATA)
    status, output, errors = attributed(capsys, spoiled, subject=subject)
    assert (status, output) == (2, "")
    assert "Give --loss package.module:function" in errors


def test_a_step_without_a_loss(capsys, spoiled, monkeypatch):
    monkeypatch.setattr(projects.Net, "training_step", lambda self, batch, batch_idx: None)
    status, output, errors = attributed(capsys, spoiled)
    assert (status, output) == (2, "")
    assert "`training_step` has returned none: give --loss" in errors


def test_one_batch_is_too_few(capsys, spoiled):
    status, output, errors = attributed(capsys, spoiled, "--num-batches", 1)
    assert (status, output) == (2, "")
    assert "must give two batches or more" in errors


def test_as_many_batches_as_make_the_statistics_certain(capsys, spoiled, monkeypatch):
    """As of `check`: the noise of 8 batches is too large, that of 64 is not; the same batches for all numbers."""
    monkeypatch.setattr(projects.Data, "train_dataloader", lambda self: projects.loader(0, 64, rows=64 * 1000))
    status, output, errors = attributed(capsys, spoiled, "--num_batches", "auto", "--no-validation")
    assert status == 0
    num_batches = int(re.fullmatch(r"bnmonitor: --num-batches auto: (\d+) batches.\n", errors)[1])
    assert 8 < num_batches < 1000
    checked = bnmonitor(capsys, "check", *SUBJECT, "--ckpt_path", spoiled, "--no-validation")[1]
    assert f"\n{num_batches} batches with {num_batches * 64} samples were looked at" in checked
    x = projects.inputs(0, 64 * 1000)[: 64 * num_batches]
    expected = loss_by_hand(read(spoiled)["state_dict"], x)
    assert printed_loss(output, "eval mode as it is") == pytest.approx(expected, rel=1e-3)


def test_the_page_has_the_layers_by_the_same_batches(capsys, spoiled, tmp_path):
    page = tmp_path / "page.html"
    plain = attributed(capsys, spoiled, "--num-batches", 3)
    assert attributed(capsys, spoiled, "--num-batches", 3, "--html", page) == plain
    (layers,) = documents(page).values()
    assert layers["layers"]["name"] == ["first", "second"]
    assert layers["latest"]["layers"][1]["evidence"]["batches"] == 3
    assert layers["latest"]["layers"][1]["evidence"]["val_batches"] == 3
    status, output, errors = attributed(capsys, spoiled, "--html", tmp_path / "none" / "page.html")
    assert (status, output) == (2, "")
    assert "There is no folder" in errors


def sound(spoiled, folder):
    content = read(spoiled)
    weights = content["state_dict"]
    weights.update({name: torch.from_numpy(values).float() for name, values in exact_stats(weights, X).items()})
    torch.save(content, folder / "sound.ckpt")
    return folder / "sound.ckpt"


def test_it_fails_on_a_gap_if_asked_to(capsys, spoiled, tmp_path):
    given = ("--no-validation", "--fail-on", "gap")
    assert attributed(capsys, spoiled, *given)[0] == 1
    assert attributed(capsys, spoiled, *given, "--json")[0] == 1
    status, output, errors = attributed(capsys, sound(spoiled, tmp_path), *given)
    assert (status, errors) == (0, "")
    assert output.startswith("Nothing to explain: eval mode is as good as training mode. Exact running statistics ")
    assert "bnmonitor repair" not in output


def test_it_does_not_pass_losses_that_are_not_finite(capsys, spoiled, tmp_path, monkeypatch):
    monkeypatch.setattr(projects.Net, "training_step", lambda self, batch, batch_idx: self(batch[0]).mean() * np.nan)
    status, output, errors = attributed(capsys, spoiled, "--fail-on", "gap")
    assert status == 2
    assert output.startswith("The loss in eval mode is not finite, and not with exact running statistics either.")
    assert errors == "bnmonitor: The loss is finite in no mode: what running statistics cost is not known.\n"
    assert attributed(capsys, spoiled)[0] == 0
