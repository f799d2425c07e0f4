"""`bnmonitor repair`: the checkpoint that it writes is the old one, but for exact running statistics."""

from __future__ import annotations

import json
import re
import resource

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_bnmonitor import BatchNormMonitor, PreciseBatchNorm
from tests.callbacks.lightning_versions import averaging
from tests.commands import projects
from tests.commands.checkpoints import (
    assert_exact,
    bnmonitor,
    differences,
    documents,
    exact_stats,
    read,
    seeded,
    trained,
)

SUBJECT = ("--model", projects.MODEL, "--data", projects.DATA)
X = projects.inputs(0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("trained"), seeded(projects.Net), BatchNormMonitor())


def repaired(capsys, checkpoint, folder, *more, subject=SUBJECT):
    output = folder / "repaired.ckpt"
    status, text, errors = bnmonitor(capsys, "repair", *subject, "--ckpt_path", checkpoint, "--output", output, *more)
    assert status == 0, errors
    return read(output), text, errors


def stats_of(*layers, of="/state_dict"):
    return {f"{of}/{layer}.{name}" for layer in layers for name in ("running_mean", "running_var")}


def test_only_running_statistics_differ_and_they_are_exact(capsys, checkpoint, tmp_path):
    before = checkpoint.read_bytes()
    new, text, errors = repaired(capsys, checkpoint, tmp_path)
    old = read(checkpoint)
    assert set(differences(old, new)) == stats_of("first", "second")
    assert_exact(new["state_dict"], exact_stats(old["state_dict"], X))
    assert old["optimizer_states"][0]["state"]
    assert old["callbacks"]
    assert checkpoint.read_bytes() == before
    assert "first" in text
    assert f"Written to {tmp_path / 'repaired.ckpt'}: the weights with exact running statistics" in " ".join(
        text.split()
    )
    assert max(map(len, text.splitlines())) <= 120
    assert errors == ""
    assert list(tmp_path.iterdir()) == [tmp_path / "repaired.ckpt"]


def test_json_has_what_was_done(capsys, checkpoint, tmp_path):
    new, text, errors = repaired(capsys, checkpoint, tmp_path, "--json")
    done = json.loads(text)["the weights"]
    assert errors == ""
    assert (done["left_alone"], done["misfits"]) == ({}, {})
    layers = done["after"]["layers"]
    assert layers["first"]["running_mean"] == pytest.approx(new["state_dict"]["first.running_mean"].tolist())
    assert set(done["before"]["layers"]) == set(layers) == {"first", "second"}


@pytest.fixture
def of_batches(monkeypatch):
    """Training data of so many batches, of a size."""

    def give(number, size):
        monkeypatch.setattr(projects.Data, "train_dataloader", lambda self: projects.loader(0, size, number * size))

    return give


def test_the_page_has_before_and_after(capsys, checkpoint, tmp_path, of_batches):
    of_batches(20, 16)
    page = tmp_path / "page.html"
    repaired(capsys, checkpoint, tmp_path, "--exclude", "second", "--html", page)
    before, after = documents(page).items()
    assert (before[0], after[0]) == ("the weights, before", "the weights, after")
    assert [of["latest"]["layers"][0]["words"].split(", ")[0] for _, of in (before, after)] == ["warming-up", "healthy"]
    assert before[1]["layers"]["name"] == ["first"]


def test_the_page_of_averaged_weights_has_both(capsys, tmp_path):
    checkpoint, page = trained(tmp_path, seeded(projects.Net), averaging("EMAWeightAveraging")()), tmp_path / "p.html"
    repaired(capsys, checkpoint, tmp_path, "--html", page)
    averaged, trained_ones = "the averaged weights (`state_dict`)", "the weights in training (`current_model_state`)"
    assert {f"{what}, {when}" for what in (averaged, trained_ones) for when in ("before", "after")} == set(
        documents(page)
    )


def test_it_fails_if_a_layer_needs_attention_all_the_same(capsys, checkpoint, tmp_path, of_batches):
    """Exact statistics are enough for batches of 16; not for those of 4 values per channel, nor for what is left."""
    given = ("--output", tmp_path / "repaired.ckpt", "--force", "--fail-on", "unhealthy")
    command = ("repair", *SUBJECT, "--ckpt_path", checkpoint, *given)
    of_batches(40, 16)
    status, output, errors = bnmonitor(capsys, *command)
    assert (status, errors) == (0, "")
    assert "Exact ones are not enough" not in output
    status, output, _ = bnmonitor(capsys, *command, "--exclude", "sec*")
    assert status == 0  # what is excluded is not judged, as by `check`
    of_batches(40, 4)
    status, output, _ = bnmonitor(capsys, *command)
    assert status == bnmonitor(capsys, *command, "--json")[0] == 1
    said = "Exact ones are not enough for first (tiny-batch), second (tiny-batch): `bnmonitor check` on the new "
    assert " ".join(output.split()).endswith(f"{said}checkpoint says why.")
    assert (tmp_path / "repaired.ckpt").exists()


def test_it_fails_if_a_layer_that_is_left_alone_needs_attention(capsys, tmp_path, of_batches, monkeypatch):
    checkpoint = trained(tmp_path, seeded(projects.Frozen))
    monkeypatch.setattr(projects.Frozen, "__init__", lambda self: (projects.Net.__init__(self), self.first.eval())[0])
    of_batches(40, 16)
    subject = ("--model", f"{projects.__name__}:Frozen", "--data", projects.DATA, "--ckpt_path", checkpoint)
    given = ("--output", tmp_path / "repaired.ckpt", "--fail-on", "unhealthy")
    status, output, errors = bnmonitor(capsys, "repair", *subject, *given)
    assert status == 1
    assert "Exact ones are not enough for first (frozen)" in output
    assert "--frozen repairs them, too." in errors
    assert bnmonitor(capsys, "repair", *subject, *given, "--force", "--frozen")[0] == 0


def test_it_does_not_pass_what_it_could_not_judge(capsys, checkpoint, tmp_path, of_batches):
    of_batches(4, 16)
    errors = refused(capsys, checkpoint, tmp_path / "repaired.ckpt", "--fail-on", "unhealthy")
    assert errors == "bnmonitor: No layer could be judged: whether they need attention is not known.\n"
    repaired(capsys, checkpoint, tmp_path)


def test_what_is_repaired_twice_does_not_change_any_more(capsys, checkpoint, tmp_path):
    once, *_ = repaired(capsys, checkpoint, tmp_path)
    (tmp_path / "again").mkdir()
    twice, *_ = repaired(capsys, tmp_path / "repaired.ckpt", tmp_path / "again")
    assert differences(once, twice) == []


def test_so_many_batches(capsys, checkpoint, tmp_path):
    new, *_ = repaired(capsys, checkpoint, tmp_path, "--num-batches", 2)
    assert_exact(new["state_dict"], exact_stats(read(checkpoint)["state_dict"], X[:32]))


def test_training_goes_on_from_it(capsys, checkpoint, tmp_path):
    repaired(capsys, checkpoint, tmp_path)
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(projects.Net(), projects.Data(), ckpt_path=tmp_path / "repaired.ckpt")
    assert trainer.global_step == 12


def test_averaged_weights_and_those_in_training_are_repaired_each_with_its_own_statistics(capsys, tmp_path):
    checkpoint = trained(tmp_path, seeded(projects.Net), averaging("EMAWeightAveraging")(decay=0.9), epochs=2)
    new, text, _ = repaired(capsys, checkpoint, tmp_path)
    old = read(checkpoint)
    changed = stats_of("first", "second") | stats_of("first", "second", of="/current_model_state")
    assert set(differences(old, new)) == changed
    for key in ("state_dict", "current_model_state"):
        assert_exact(new[key], exact_stats(old[key], X))
    assert not torch.allclose(
        new["state_dict"]["second.running_mean"], new["current_model_state"]["second.running_mean"]
    )
    (tmp_path / "resumed").mkdir()
    again = averaging("EMAWeightAveraging")(decay=0.9)
    resumed = trained(tmp_path / "resumed", projects.Net(), again, epochs=3, ckpt_path=tmp_path / "repaired.ckpt")
    assert read(resumed)["global_step"] == 18
    assert "The averaged weights (`state_dict`):\n2 BatchNorm layers recalibrated" in text
    assert "The weights in training (`current_model_state`):\n2 BatchNorm layers recalibrated" in text


def test_statistics_that_are_put_back_in_training_stay_as_they_are(capsys, tmp_path):
    checkpoint = trained(tmp_path, seeded(projects.Net), PreciseBatchNorm(restore=True))
    new, *_ = repaired(capsys, checkpoint, tmp_path, "--num-batches", 2)
    assert set(differences(read(checkpoint), new)) == stats_of("first", "second")


@pytest.mark.parametrize("missing", ["running", "running|num_batches"])
@pytest.mark.parametrize("keeps_versions", [False, True])
def test_running_statistics_that_are_missing_are_told_of_and_added(
    capsys, checkpoint, tmp_path, missing, keeps_versions
):
    content = read(checkpoint)
    weights = content["state_dict"]
    complete = dict(weights)
    for name in [name for name in weights if re.search(missing, name)]:
        del weights[name]
    content["state_dict"] = weights if keeps_versions else dict(weights)
    torch.save(content, tmp_path / "without.ckpt")
    new, _, errors = repaired(capsys, tmp_path / "without.ckpt", tmp_path)
    assert_exact(new["state_dict"], exact_stats(complete, X))
    projects.Net().load_state_dict(new["state_dict"])
    assert "lacks the running statistics of 2 BatchNorm layers, as of first" in errors


def test_the_precision_of_weights_stays(capsys, checkpoint, tmp_path):
    content = read(checkpoint)
    exact = exact_stats(content["state_dict"], X)
    for name, value in content["state_dict"].items():
        content["state_dict"][name] = value.bfloat16() if value.is_floating_point() else value
    torch.save(content, tmp_path / "half.ckpt")
    new, *_ = repaired(capsys, tmp_path / "half.ckpt", tmp_path)
    assert set(differences(content, new)) == stats_of("first", "second")
    expected = torch.from_numpy(exact["first.running_mean"]).bfloat16()
    assert torch.equal(new["state_dict"]["first.running_mean"], expected)


def test_a_layer_with_two_names_is_repaired_under_both(capsys, tmp_path):
    checkpoint = trained(tmp_path, seeded(projects.Shared))
    subject = ("--model", f"{projects.__name__}:Shared", "--data", projects.DATA)
    new, *_ = repaired(capsys, checkpoint, tmp_path, subject=subject)
    assert set(differences(read(checkpoint), new)) == stats_of("first", "second", "again")
    assert torch.equal(new["state_dict"]["again.running_var"], new["state_dict"]["first.running_var"])


def test_a_file_with_nothing_but_weights(capsys, tmp_path):
    torch.manual_seed(0)
    weights = projects.plain_model().state_dict()
    torch.save(weights, tmp_path / "weights.pt")
    subject = ("--model", f"{projects.__name__}:plain_model", "--data", f"{projects.__name__}:training_loader")
    new, *_ = repaired(capsys, tmp_path / "weights.pt", tmp_path, subject=subject)
    assert set(differences(weights, new)) == stats_of("0", "2", of="")
    x = X.double()
    torch.testing.assert_close(new["0.running_mean"].double(), x.mean(0), rtol=0, atol=2e-6)
    torch.testing.assert_close(new["0.running_var"].double(), x.var(0), rtol=0, atol=4e-6)


def as_of_ddp(model, x):
    return {f"module.{name}": value for name, value in model.state_dict().items()}


def as_compiled(model, x):
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    return compiled.state_dict()


def as_compiled_of_ddp(model, x):
    return {f"module.{name}": value for name, value in as_compiled(model, x).items()}


def as_averaged(model, x):
    return torch.optim.swa_utils.AveragedModel(model).state_dict()


@pytest.mark.parametrize(
    ("saved", "first"),
    [
        (as_of_ddp, "module."),
        (as_compiled, "_orig_mod."),
        (as_compiled_of_ddp, "module._orig_mod."),
        (as_averaged, "module."),
    ],
)
def test_names_that_begin_otherwise_stay_as_they_were(capsys, tmp_path, saved, first):
    torch.manual_seed(0)
    weights = saved(projects.plain_model(), X)
    torch.save(weights, tmp_path / "weights.pt")
    subject = ("--model", f"{projects.__name__}:plain_model", "--data", f"{projects.__name__}:training_loader")
    new, _, errors = repaired(capsys, tmp_path / "weights.pt", tmp_path, subject=subject)
    assert set(differences(weights, new)) == stats_of(f"{first}0", f"{first}2", of="")
    torch.testing.assert_close(new[f"{first}0.running_mean"].double(), X.double().mean(0), rtol=0, atol=2e-6)
    assert errors == (
        f"bnmonitor: {tmp_path / 'weights.pt'} has `{first}0.weight` where Sequential has `0.weight`: all names are "
        "matched this way.\n"
    )


@pytest.mark.parametrize("missing", ["running", "running|num_batches"])
def test_running_statistics_that_are_missing_are_added_by_the_names_of_the_file(capsys, tmp_path, missing):
    torch.manual_seed(0)
    complete = as_of_ddp(projects.plain_model(), X)
    torch.save({name: complete[name] for name in complete if not re.search(missing, name)}, tmp_path / "weights.pt")
    subject = ("--model", f"{projects.__name__}:plain_model", "--data", f"{projects.__name__}:training_loader")
    new, _, errors = repaired(capsys, tmp_path / "weights.pt", tmp_path, subject=subject)
    assert set(new) == set(complete)
    assert "lacks the running statistics of 2 BatchNorm layers, as of 0" in errors
    torch.testing.assert_close(new["module.0.running_mean"].double(), X.double().mean(0), rtol=0, atol=2e-6)


def test_a_model_that_has_more_before_its_names_than_the_file(capsys, checkpoint, tmp_path):
    """The weights of the network alone, and the class around it."""
    weights = read(checkpoint)["state_dict"]
    torch.save(dict(weights), tmp_path / "weights.pt")
    subject = ("--model", f"{projects.__name__}:Wrapped", "--data", projects.DATA)
    new, _, errors = repaired(capsys, tmp_path / "weights.pt", tmp_path, subject=subject)
    assert set(differences(dict(weights), new)) == stats_of("first", "second", of="")
    assert_exact(new, exact_stats(weights, X))
    assert "has `first.weight` where Wrapped has `net.first.weight`" in errors


def test_frozen_layers_are_repaired_on_request(capsys, tmp_path):
    checkpoint = trained(tmp_path, seeded(projects.Frozen))
    subject = ("--model", f"{projects.__name__}:Frozen", "--data", projects.DATA)
    output = tmp_path / "repaired.ckpt"
    status, text, errors = bnmonitor(capsys, "repair", *subject, "--ckpt_path", checkpoint, "--output", output)
    assert (status, text) == (2, "")
    assert "--frozen repairs them, too." in errors
    assert not output.exists()
    new, *_ = repaired(capsys, checkpoint, tmp_path, "--frozen", subject=subject)
    assert set(differences(read(checkpoint), new)) == stats_of("first", "second")


def test_layers_are_left_alone_on_request(capsys, checkpoint, tmp_path):
    new, *_ = repaired(capsys, checkpoint, tmp_path, "--exclude", "sec*")
    assert set(differences(read(checkpoint), new)) == stats_of("first")


# -------------------------------------------------------------------------------------------------------------- writing


def refused(capsys, checkpoint, output, *more):
    status, text, errors = bnmonitor(capsys, "repair", *SUBJECT, "--ckpt_path", checkpoint, "--output", output, *more)
    assert (status, text) == (2, "")
    assert errors.startswith("bnmonitor: ")
    return errors


def test_never_in_place(capsys, checkpoint, tmp_path):
    (tmp_path / "link.ckpt").symlink_to(checkpoint)
    before = checkpoint.read_bytes()
    for output in (checkpoint, tmp_path / "link.ckpt"):
        assert "is not repaired in place" in refused(capsys, checkpoint, output, "--force")
    assert checkpoint.read_bytes() == before


def test_a_file_that_is_there_is_replaced_on_request_alone(capsys, checkpoint, tmp_path):
    output = tmp_path / "repaired.ckpt"
    output.write_text("precious")
    assert "--force" in refused(capsys, checkpoint, output)
    assert output.read_text() == "precious"
    repaired(capsys, checkpoint, tmp_path, "--force")


def test_a_folder_that_is_not_there_or_a_file_that_is_one(capsys, checkpoint, tmp_path):
    assert "There is no folder" in refused(capsys, checkpoint, tmp_path / "none" / "repaired.ckpt")
    assert "is a folder" in refused(capsys, checkpoint, tmp_path)


def test_a_full_disk_leaves_what_was_there(capsys, checkpoint, tmp_path):
    output = tmp_path / "repaired.ckpt"
    output.write_text("precious")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        errors = refused(capsys, checkpoint, output, "--force")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "could not be written" in errors
    assert output.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [output]


def test_an_interrupt_leaves_nothing(capsys, checkpoint, tmp_path, monkeypatch):
    def interrupted(self, batch, batch_idx):
        raise KeyboardInterrupt

    monkeypatch.setattr(projects.Net, "training_step", interrupted)
    output = ("--output", tmp_path / "repaired.ckpt")
    status, text, errors = bnmonitor(capsys, "repair", *SUBJECT, "--ckpt_path", checkpoint, *output)
    assert (status, text, errors) == (130, "", "bnmonitor: interrupted.\n")
    assert list(tmp_path.iterdir()) == []


def test_who_may_read_it_is_as_of_the_old_one(capsys, checkpoint, tmp_path):
    checkpoint.chmod(0o640)
    repaired(capsys, checkpoint, tmp_path)
    assert (tmp_path / "repaired.ckpt").stat().st_mode & 0o777 == 0o640


def test_inputs_that_are_not_finite_write_nothing(capsys, checkpoint, tmp_path):
    content = read(checkpoint)
    content["state_dict"]["body.weight"][0, 0] = float("nan")
    torch.save(content, tmp_path / "nan.ckpt")
    errors = refused(capsys, tmp_path / "nan.ckpt", tmp_path / "repaired.ckpt")
    assert "`running_mean` of layer 'second' would not be finite" in errors
    assert list(tmp_path.iterdir()) == [tmp_path / "nan.ckpt"]
