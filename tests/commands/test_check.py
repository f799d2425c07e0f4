"""`bnmonitor check`: the report on a checkpoint, in all its forms, and the exit status."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.callbacks.lightning_versions import averaging
from tests.commands import projects
from tests.commands.checkpoints import bnmonitor, documents, exact_stats, read, seeded, trained

SUBJECT = ("--model", projects.MODEL, "--data", projects.DATA)
X = projects.inputs(0)


@pytest.fixture(scope="module")
def sick(tmp_path_factory):
    """Its running statistics have hardly left zero and one."""
    return trained(tmp_path_factory.mktemp("sick"), seeded(projects.Net, momentum=0.001))


@pytest.fixture(scope="module")
def sound(tmp_path_factory, sick):
    """The same with those that it should have."""
    content = read(sick)
    exact = exact_stats(content["state_dict"], X)
    content["state_dict"].update({name: torch.from_numpy(values).float() for name, values in exact.items()})
    path = tmp_path_factory.mktemp("sound") / "sound.ckpt"
    torch.save(content, path)
    return path


def checked(capsys, checkpoint, *more, subject=SUBJECT):
    return bnmonitor(capsys, "check", *subject, "--ckpt_path", checkpoint, *more)


def layers_of(output):
    return json.loads(output, parse_constant=pytest.fail)["layers"]


def test_it_says_what_is_off_and_what_to_do(capsys, sick):
    before = sick.read_bytes()
    status, output, errors = checked(capsys, sick)
    assert (status, errors) == (0, "")
    assert output.startswith("2 of 2 BatchNorm layers need attention")
    assert "warming-up" in output
    command = (
        f"bnmonitor repair --model {projects.MODEL} --data {projects.DATA} --ckpt_path {sick} --output repaired.ckpt"
    )
    assert output.endswith(f"\n\nFor this checkpoint, `recalibrate` is:\n{command}\n")
    assert sick.read_bytes() == before


def test_what_is_repaired_is_sound(capsys, sound):
    status, output, errors = checked(capsys, sound, "--fail-on", "unhealthy")
    assert (status, errors) == (0, "")
    assert output.startswith("None of 2 BatchNorm layers needs attention.")
    assert "bnmonitor repair" not in output


def test_it_fails_on_layers_that_need_attention_if_asked_to(capsys, sick):
    assert checked(capsys, sick, "--fail-on", "unhealthy")[0] == 1
    assert checked(capsys, sick, "--fail-on", "unhealthy", "--json")[0] == 1


def test_it_does_not_pass_what_it_could_not_judge(capsys, sound):
    few = ("--no-validation", "--num-batches", "2")
    status, output, errors = checked(capsys, sound, *few, "--fail-on", "unhealthy")
    assert status == 2
    assert "2 BatchNorm layers could not be judged" in output
    assert errors == "bnmonitor: No layer could be judged: whether they need attention is not known.\n"
    assert checked(capsys, sound, *few)[0] == 0


def test_repair_by_training_data_is_not_advised_where_the_validation_data_differ(capsys, sound):
    subject = ("--model", projects.MODEL, "--data", f"{projects.__name__}:OtherValidation")
    output = checked(capsys, sound, subject=subject)[1]
    assert "domain-shift" in output
    assert "`lightning_bnmonitor.recalibrate(model, evaluation_loader)`" in " ".join(output.split())
    assert "bnmonitor repair" not in output


def test_json_has_the_numbers_and_nothing_else_is_on_stdout(capsys, sick, monkeypatch):
    monkeypatch.setattr(projects.Data, "prepare_data", lambda self: print("Downloading"))
    status, output, errors = checked(capsys, sick, "--json")
    assert status == 0
    assert "Downloading" in errors
    first = layers_of(output)["first"]
    running = read(sick)["state_dict"]
    x = X.double().numpy()
    std = np.sqrt(x.var(0) + 1e-5)
    shift = (x.mean(0) - running["first.running_mean"].double().numpy()) / std
    scale = np.sqrt((x.var(0, ddof=1) + 1e-5) / (running["first.running_var"].double().numpy() + 1e-5))
    bound = np.sqrt(np.mean(shift**2 * scale**2))  # of the mean alone, in units of what eval() makes of it
    assert first["verdict"] == "warming-up"
    assert first["evidence"]["eval_error"] > 0.5 * min(bound, np.sqrt(np.mean(shift**2)))
    assert first["num_samples"] == len(x)


def test_validation_data_are_looked_at_unless_told_not_to(capsys, sound):
    subject = ("--model", projects.MODEL, "--data", f"{projects.__name__}:NormalisedOnDevice")
    _, output, _ = checked(capsys, sound, "--json", subject=subject)  # there they are 100 off
    assert "domain-shift" in layers_of(output)["first"]["flags"]
    assert layers_of(output)["first"]["evidence"]["val_batches"] == 6
    _, output, _ = checked(capsys, sound, "--json", "--no-validation", subject=subject)
    assert "val_error" not in layers_of(output)["first"]["evidence"]


def test_all_validation_loaders_one_after_another(capsys, sound):
    subject = ("--model", f"{projects.__name__}:NamedBatches", "--data", f"{projects.__name__}:SeveralLoaders")
    status, output, errors = checked(capsys, sound, "--json", subject=subject)
    assert (status, errors) == (0, "")
    assert layers_of(output)["first"]["evidence"]["val_batches"] == 12


def test_the_page(capsys, sick, tmp_path):
    page = tmp_path / "page.html"
    assert checked(capsys, sick, "--html", page)[0] == 0
    assert "warming-up" in page.read_text(encoding="utf-8")
    assert {"layers"} == set(documents(page))


def test_a_page_that_cannot_be_written(capsys, sick, tmp_path, monkeypatch):
    status, output, errors = checked(capsys, sick, "--html", tmp_path / "none" / "page.html")
    assert (status, output) == (2, "")  # it is known before anything is looked at
    assert f"There is no folder {tmp_path / 'none'} to write page.html to." in errors
    assert "is a folder: give a file" in checked(capsys, sick, "--html", tmp_path)[2]
    status, output, errors = checked(capsys, sick, "--html", "/dev/full")
    assert status == 2
    assert "need attention" in output
    assert errors == "bnmonitor: The page could not be written to /dev/full: No space left on device.\n"


def test_so_many_batches(capsys, sick):
    for number, expected in (("2", 2), ("all", 6), ("auto", 6)):
        _, output, _ = checked(capsys, sick, "--num-batches", number, "--json")
        assert layers_of(output)["first"]["evidence"]["batches"] == expected


@pytest.mark.parametrize("number", ["0", "-1", "many", "1.5"])
def test_a_number_of_batches_that_is_none(capsys, sick, number):
    with pytest.raises(SystemExit) as stopped:
        checked(capsys, sick, "--num-batches", number)
    assert stopped.value.code == 2
    assert "must be auto, all, or a positive number" in capsys.readouterr().err


def test_a_model_that_a_function_makes_needs_no_checkpoint(capsys):
    subject = ("--model", f"{projects.__name__}:plain_model", "--data", f"{projects.__name__}:training_loader")
    status, output, errors = bnmonitor(capsys, "check", *subject, "--fail-on", "unhealthy")
    assert (status, errors) == (1, "")
    assert "never-updated" in output
    assert "bnmonitor repair" not in output


def test_statistics_that_the_checkpoint_lacks_are_told_of(capsys, sick, tmp_path):
    content = read(sick)
    weights = content["state_dict"]
    content["state_dict"] = {name: weights[name] for name in weights if "running" not in name}
    torch.save(content, tmp_path / "without.ckpt")
    status, output, errors = checked(capsys, tmp_path / "without.ckpt")
    assert status == 0
    assert "lacks the running statistics of 2 BatchNorm layers" in errors
    assert "2 of 2 BatchNorm layers need attention" in output


def test_it_says_that_averaged_weights_are_evaluated(capsys, tmp_path):
    checkpoint = trained(tmp_path, seeded(projects.Net), averaging("EMAWeightAveraging")(decay=0.9))
    status, _, errors = checked(capsys, checkpoint)
    assert status == 0
    assert errors == (
        "bnmonitor: Looked at are the averaged weights (`state_dict`), not the weights in training "
        "(`current_model_state`).\n"
    )


def test_frozen_layers_have_the_command_that_repairs_them(capsys, tmp_path):
    checkpoint = trained(tmp_path, seeded(projects.Frozen))
    subject = ("--model", f"{projects.__name__}:Frozen", "--data", projects.DATA)
    _, output, _ = checked(capsys, checkpoint, subject=subject)
    command = output.splitlines()[-1].removeprefix("bnmonitor ").removesuffix("repaired.ckpt").split()
    assert "--frozen" in command
    assert bnmonitor(capsys, *command, tmp_path / "repaired.ckpt")[0] == 0
    status, output, _ = checked(capsys, tmp_path / "repaired.ckpt", "--fail-on", "unhealthy", subject=subject)
    assert status == 0, output


def test_layers_are_left_out_on_request(capsys, sick):
    _, output, _ = checked(capsys, sick, "--exclude", "first", "--json")
    assert list(layers_of(output)) == ["second"]
    command = checked(capsys, sick, "--exclude", "first")[1].splitlines()[-1]
    assert " --exclude first " in command
