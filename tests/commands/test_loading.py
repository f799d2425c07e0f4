"""Where commands find model and data, how they run the model, and what they say if they cannot."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from tests.commands import projects
from tests.commands.checkpoints import assert_exact, bnmonitor, exact_stats, read, seeded, trained

X = projects.inputs(0)
DATA = ("--data", projects.DATA)
BOTH = ("--model", projects.MODEL, *DATA)


def named(name):
    return f"{projects.__name__}:{name}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of `Net`, with another width than by default."""
    return trained(tmp_path_factory.mktemp("trained"), seeded(projects.Net, width=5))


def repaired(capsys, folder, checkpoint, *arguments):
    """The weights after the repair, and what was said on stderr."""
    output = folder / "repaired.ckpt"
    status, _, errors = bnmonitor(capsys, "repair", "--ckpt_path", checkpoint, "--output", output, *arguments)
    assert status == 0, errors
    return read(output)["state_dict"], errors


def refused(capsys, folder, checkpoint, *arguments):
    """What is said where nothing can be done: no traceback, nothing written."""
    output = folder / "repaired.ckpt"
    status, text, errors = bnmonitor(capsys, "repair", "--ckpt_path", checkpoint, "--output", output, *arguments)
    assert (status, text) == (2, "")
    assert errors.startswith("bnmonitor: ")
    assert "Traceback" not in errors
    assert not output.exists()
    return errors


def config(folder, text):
    path = folder / "config.yaml"
    path.write_text(text)
    return path


# ---------------------------------------------------------------------------------------------------------- what it is


def test_hyperparameters_come_from_the_checkpoint(capsys, checkpoint, tmp_path):
    weights, errors = repaired(capsys, tmp_path, checkpoint, "--model", projects.MODEL, "--data", projects.DATA)
    assert errors == ""
    assert_exact(weights, exact_stats(weights, X))


def test_those_of_the_data_too(capsys, tmp_path):
    checkpoint = trained(tmp_path, seeded(projects.Net), data=projects.Data(batch_size=32))
    weights, _ = repaired(capsys, tmp_path, checkpoint, "--model", projects.MODEL, "--data", projects.DATA)
    assert_exact(weights, exact_stats(weights, X, batch_size=32))


def test_a_name_with_a_dot_in_the_place_of_the_colon(capsys, checkpoint, tmp_path):
    arguments = ("--model", projects.MODEL.replace(":", "."), "--data", projects.DATA.replace(":", "."))
    weights, _ = repaired(capsys, tmp_path, checkpoint, *arguments)
    assert_exact(weights, exact_stats(weights, X))


def test_hyperparameters_in_one_argument(capsys, tmp_path):
    checkpoint = trained(tmp_path, seeded(projects.OneDict, hparams={"width": 6}))
    weights, _ = repaired(capsys, tmp_path, checkpoint, "--model", named("OneDict"), "--data", projects.DATA)
    assert_exact(weights, exact_stats(weights, X, prefix="net."))


def test_functions_that_make_them(capsys, tmp_path):
    checkpoint = trained(tmp_path, seeded(projects.NeedsArguments, width=16))
    arguments = ("--model", named("wide_net"), "--data", named("training_loader"))
    weights, _ = repaired(capsys, tmp_path, checkpoint, *arguments)
    assert_exact(weights, exact_stats(weights, X))


def test_the_loaders_of_the_model(capsys, checkpoint, tmp_path):
    weights, _ = repaired(capsys, tmp_path, checkpoint, "--model", named("WithLoaders"))
    assert_exact(weights, exact_stats(weights, X))


def test_layers_that_setup_makes(capsys, checkpoint, tmp_path):
    content = read(checkpoint)
    del content["hyper_parameters"]
    content["state_dict"] = {f"net.{name}": value for name, value in projects.Net().state_dict().items()}
    torch.save(content, tmp_path / "built.ckpt")
    arguments = ("--model", named("BuiltInSetup"), "--data", projects.DATA)
    weights, errors = repaired(capsys, tmp_path, tmp_path / "built.ckpt", *arguments)
    assert errors == ""
    assert_exact(weights, exact_stats(weights, X, prefix="net."))


def test_modules_of_the_working_directory_can_be_imported(capsys, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "my_training.py").write_text(f"from {projects.__name__} import Data, Net\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    weights, _ = repaired(capsys, tmp_path, checkpoint, "--model", "my_training:Net", "--data", "my_training:Data")
    assert_exact(weights, exact_stats(weights, X))


CLASSES = f"""
seed_everything: 3
model:
  class_path: {projects.__name__}.Net
  init_args: {{width: 5, momentum: 1e-1}}
data:
  class_path: {projects.__name__}.Data
  init_args: {{batch_size: 24}}
"""
ARGUMENTS = """
trainer: {max_epochs: 3}
model: {width: 5}
data: {batch_size: 24}
"""


def test_a_config_with_classes(capsys, checkpoint, tmp_path):
    weights, errors = repaired(capsys, tmp_path, checkpoint, "--config", config(tmp_path, CLASSES))
    assert errors == ""
    assert_exact(weights, exact_stats(weights, X, batch_size=24))


def test_a_config_of_a_command_for_one_class_takes_the_classes_besides(capsys, checkpoint, tmp_path):
    path = config(tmp_path, ARGUMENTS)
    weights, _ = repaired(
        capsys, tmp_path, checkpoint, "--config", path, "--model", projects.MODEL, "--data", projects.DATA
    )
    assert_exact(weights, exact_stats(weights, X, batch_size=24))
    (tmp_path / "repaired.ckpt").unlink()
    errors = refused(capsys, tmp_path, checkpoint, "--config", path)
    assert "has the arguments of the model, but not its class" in errors
    assert "give --model package.module:Class, too." in errors
    errors = refused(capsys, tmp_path, checkpoint, "--config", path, "--model", projects.MODEL)
    assert "give --data package.module:Class, too." in errors


def test_a_config_that_is_written_for_fit(capsys, checkpoint, tmp_path):
    nested = "fit:\n" + CLASSES.replace("\n", "\n  ")
    weights, _ = repaired(capsys, tmp_path, checkpoint, "--config", config(tmp_path, nested))
    assert_exact(weights, exact_stats(weights, X, batch_size=24))


def test_arguments_that_were_linked_to_others_come_from_the_checkpoint(capsys, tmp_path):
    checkpoint = trained(tmp_path, seeded(projects.NeedsArguments, width=5))
    content = read(checkpoint)
    content["hyper_parameters"] = {"width": 5}
    torch.save(content, checkpoint)
    text = CLASSES.replace(".Net", ".NeedsArguments").replace("width: 5, momentum: 1e-1", "")
    weights, _ = repaired(capsys, tmp_path, checkpoint, "--config", config(tmp_path, text))
    assert_exact(weights, exact_stats(weights, X, batch_size=24))


def test_a_config_takes_jsonargparse(capsys, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    errors = refused(capsys, tmp_path, checkpoint, "--config", config(tmp_path, CLASSES))
    assert 'pip install "jsonargparse[signatures]"' in errors


def fit_by_command(folder, monkeypatch, *arguments, classes=(None, None)):
    """Config and checkpoint that Lightning's command leaves."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    trainer = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    LightningCLI(*classes, args=["fit", *trainer, *arguments], seed_everything_default=1)
    (checkpoint,) = folder.glob("lightning_logs/version_0/checkpoints/*.ckpt")
    return folder / "lightning_logs" / "version_0" / "config.yaml", checkpoint


@pytest.mark.parametrize("has_classes", [True, False])
def test_what_lightnings_command_has_written(capsys, tmp_path, monkeypatch, has_classes):
    given = [f"--model={projects.__name__}.Net", f"--data={projects.__name__}.Data"] if has_classes else []
    of = (None, None) if has_classes else (projects.Net, projects.Data)
    arguments = [*given, "--model.width=7", "--data.batch_size=32"]
    path, checkpoint = fit_by_command(tmp_path, monkeypatch, *arguments, classes=of)
    for arguments in (("--config", path) if has_classes else ("--config", path, *BOTH), BOTH):
        weights, errors = repaired(capsys, tmp_path, checkpoint, *arguments)
        assert errors == ""
        assert_exact(weights, exact_stats(weights, X, batch_size=32))
        (tmp_path / "repaired.ckpt").unlink()


def test_arguments_that_are_objects(capsys, tmp_path, monkeypatch):
    given = [
        f"--model={projects.__name__}.WithHead",
        f"--data={projects.__name__}.Data",
        "--model.head=torch.nn.Linear",
    ]
    arguments = [*given, "--model.width=6", "--model.head.in_features=6", "--model.head.out_features=1"]
    path, checkpoint = fit_by_command(tmp_path, monkeypatch, *arguments)
    for arguments in (("--config", path), ("--model", named("WithHead"), *DATA)):
        weights, errors = repaired(capsys, tmp_path, checkpoint, *arguments)
        assert errors == ""
        assert_exact(weights, exact_stats(weights, X))
        (tmp_path / "repaired.ckpt").unlink()


def test_training_data_that_are_drawn_by_the_seed_are_those_of_training(capsys, tmp_path, monkeypatch):
    given = [f"--model={projects.__name__}.Net", f"--data={projects.__name__}.SplitByChance"]
    projects.SplitByChance.drawn.clear()
    path, checkpoint = fit_by_command(tmp_path, monkeypatch, *given, "--seed_everything=5")
    weights, _ = repaired(capsys, tmp_path, checkpoint, "--config", path)
    (rows, again) = projects.SplitByChance.drawn
    assert torch.equal(rows, again)
    assert_exact(weights, exact_stats(weights, X[rows]))


# -------------------------------------------------------------------------------------------------------- how it is run


def test_hooks_prepare_batches_as_in_training(capsys, checkpoint, tmp_path):
    arguments = ("--model", projects.MODEL, "--data", named("NormalisedOnDevice"))
    weights, _ = repaired(capsys, tmp_path, checkpoint, *arguments)
    assert_exact(weights, exact_stats(weights, X - projects.SHIFT))


def test_training_step_takes_what_the_model_could_not(capsys, checkpoint, tmp_path):
    arguments = ("--model", named("NamedBatches"), "--data", named("SeveralLoaders"))
    weights, errors = repaired(capsys, tmp_path, checkpoint, *arguments)
    assert errors == ""
    assert_exact(weights, exact_stats(weights, X))


def test_a_step_that_steps_itself_is_not_run(capsys, checkpoint, tmp_path):
    weights, errors = repaired(capsys, tmp_path, trained_like(checkpoint, tmp_path), "--model", named("Manual"), *DATA)
    assert errors == ""
    assert_exact(weights, exact_stats(weights, X))


def test_where_training_step_fails_the_model_is_called_and_that_is_said(capsys, checkpoint, tmp_path):
    weights, errors = repaired(capsys, tmp_path, checkpoint, "--model", named("NeedsOptimizers"), *DATA)
    assert_exact(weights, exact_stats(weights, X))
    assert "`training_step` cannot be run by itself" in errors
    assert "give --forward" in errors


def test_a_step_that_changes_weights_is_not_run(capsys, checkpoint, tmp_path):
    weights, errors = repaired(capsys, tmp_path, checkpoint, "--model", named("MovesWeights"), *DATA)
    assert_exact(weights, exact_stats(weights, X))
    assert "it changes weights" in errors


@pytest.mark.parametrize("how", ["model", named("run_on_inputs"), "training_step"])
def test_it_is_run_as_told(capsys, checkpoint, tmp_path, how):
    weights, _ = repaired(capsys, tmp_path, checkpoint, "--model", projects.MODEL, *DATA, "--forward", how)
    assert_exact(weights, exact_stats(weights, X))


def trained_like(checkpoint, folder):
    """A checkpoint with weights of the default width."""
    content = read(checkpoint)
    content["state_dict"] = projects.Net().state_dict()
    torch.save(content, folder / "default.ckpt")
    return folder / "default.ckpt"


def test_what_the_models_own_hook_makes_of_a_checkpoint_is_loaded_and_never_written(capsys, checkpoint, tmp_path):
    content = read(checkpoint)
    weights = content["state_dict"]
    content["state_dict"] = {name.replace("first.", "old."): value for name, value in weights.items()}
    torch.save(content, tmp_path / "old.ckpt")
    subject = ("--model", named("OldNames"), *DATA)
    assert bnmonitor(capsys, "check", *subject, "--ckpt_path", tmp_path / "old.ckpt")[0] == 0
    assert "no first.running_mean is among them" in refused(capsys, tmp_path, tmp_path / "old.ckpt", *subject)


def test_a_checkpoint_may_lack_weights_where_the_model_says_so(capsys, checkpoint, tmp_path):
    content = read(checkpoint)
    del content["state_dict"]["head.weight"]
    torch.save(content, tmp_path / "some.ckpt")
    weights, _ = repaired(capsys, tmp_path, tmp_path / "some.ckpt", "--model", named("LoadsSome"), *DATA)
    assert "head.weight" not in weights
    (tmp_path / "repaired.ckpt").unlink()
    assert "lacks head.weight" in refused(capsys, tmp_path, tmp_path / "some.ckpt", "--model", projects.MODEL, *DATA)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "sentences"),
    [
        ((), ["Which model?", "--config", "--model"]),
        (("--model", "Net"), ["--model must be package.module:name, got 'Net'"]),
        (("--model", "no_such_package.net:Net"), ["No module named 'no_such_package'", "PYTHONPATH"]),
        (("--model", named("Nett")), ["tests.commands.projects has no Nett"]),
        (("--model", named("NOT_CALLABLE")), ["must be a class or a function, got int"]),
        (("--model", named("no_model")), ["--model has given a int"]),
        (("--model", "__main__:Net", *DATA), ["of the script that was run", "`--model train:Net`"]),
        (("--model", projects.MODEL), ["Net has no `train_dataloader`. Which data? Give --data"]),
        (("--model", projects.MODEL, "--data", named("no_model")), ["--data has given a int"]),
        (("--model", projects.MODEL, "--data", named("NoData")), ["The training data give no batch: they are empty"]),
        (
            ("--model", projects.MODEL, "--data", named("FailingData")),
            ["`setup` of FailingData", "the disk is gone", "projects.py, line"],
        ),
        (("--model", named("NoNorm"), *DATA), ["do not fit NoNorm", "size mismatch for body.weight"]),
        (
            ("--model", named("NeedsArguments"), "--forward", "nothing", *DATA),
            ["--forward must be package.module:name"],
        ),
        ((*BOTH, "--device", "nonsense"), ["--device must be cpu, cuda"]),
        ((*BOTH, "--config", "none.yaml"), ["none.yaml cannot be read: No such file"]),
        ((*BOTH, "--forward", named("squared_error")), ["cannot take batch 0 of `batches`", "Argument `forward`"]),
        ((*BOTH, "--exclude", "layer9"), ["`exclude` pattern 'layer9' matches no BatchNorm layer", "first, second"]),
    ],
)
def test_what_is_given_wrong_is_named(capsys, checkpoint, tmp_path, arguments, sentences):
    errors = refused(capsys, tmp_path, checkpoint, *arguments)
    for sentence in sentences:
        assert sentence in errors


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [", "is no YAML"),
        ("a: 1", "it has neither `model` nor `data`"),
        (CLASSES.replace("width", "wdith"), "wdith"),
        (
            CLASSES.replace("projects.Net", "projects.Nett"),
            "has no Nett. If it has another name now, add --model package.module:Class.",
        ),
        (
            CLASSES.replace("tests.commands.projects.Data", "old_project.Data"),
            "or add it to PYTHONPATH. If it has another name now, add --data package.module:Class.",
        ),
        (CLASSES.replace("width: 5", "width: broad"), "Give --model a function without arguments that makes it"),
        (CLASSES.replace(projects.__name__, "__main__"), "`--model train:Net`"),
    ],
)
def test_a_config_that_is_wrong(capsys, checkpoint, tmp_path, text, sentence):
    assert sentence in refused(capsys, tmp_path, checkpoint, "--config", config(tmp_path, text))


def test_a_class_that_has_another_name_now_is_given_besides(capsys, checkpoint, tmp_path):
    path = config(tmp_path, CLASSES.replace("projects.Net", "projects.Nett"))
    weights, _ = repaired(capsys, tmp_path, checkpoint, "--config", path, "--model", projects.MODEL)
    assert_exact(weights, exact_stats(weights, X, batch_size=24))


def test_a_checkpoint_of_another_model(capsys, checkpoint, tmp_path):
    errors = refused(
        capsys, tmp_path, checkpoint, "--config", config(tmp_path, CLASSES.replace("width: 5", "width: 6"))
    )
    assert "do not fit Net" in errors
    assert "size mismatch for body.weight" in errors
    assert "and 4 more. Is it of another project" in errors
    errors = refused(capsys, tmp_path, checkpoint, "--model", named("Shared"), *DATA)
    assert "do not fit Shared" in errors  # made without the width, which it takes no argument for
    content = read(checkpoint)
    content["state_dict"]["extra.weight"] = torch.ones(1)
    del content["state_dict"]["head.bias"]
    torch.save(content, tmp_path / "other.ckpt")
    errors = refused(capsys, tmp_path, tmp_path / "other.ckpt", *BOTH)
    assert "lacks head.bias, has extra.weight, which the model has not" in errors


def test_weights_of_a_part_are_told_how_to_get_at_them(capsys, tmp_path):
    weights = {f"student.{name}": value for name, value in projects.plain_model().state_dict().items()}
    weights |= {f"teacher.{name}": value for name, value in projects.Net().state_dict().items()}
    path = tmp_path / "both.pt"
    torch.save(weights, path)
    subject = ("--model", named("plain_model"), "--data", named("training_loader"))
    errors = refused(capsys, tmp_path, path, *subject)
    assert "is no checkpoint of this Sequential" in errors
    assert "Those whose names begin with `student.` are the model's" in errors
    line = re.search(r"`(torch\.save\(.*\))`", errors)[1]
    path = tmp_path / "part.pt"
    exec(line, {"torch": torch, "weights": weights, "path": path})
    status, _, errors = bnmonitor(capsys, "check", *subject, "--ckpt_path", path)
    assert (status, errors) == (0, "")


def test_names_that_begin_otherwise_and_differ_in_more_are_told_without_that(capsys, tmp_path):
    weights = {f"module.{name}": value for name, value in projects.plain_model().state_dict().items()}
    del weights["module.1.weight"]
    weights["module.other"] = torch.ones(1)
    torch.save(weights, tmp_path / "other.pt")
    subject = ("--model", named("plain_model"), "--data", named("training_loader"))
    errors = refused(capsys, tmp_path, tmp_path / "other.pt", *subject)
    assert "has `module.0.weight` where Sequential has `0.weight`: all names are matched this way." in errors
    assert "it lacks 1.weight, has other, which the model has not" in errors


def test_a_checkpoint_without_hyperparameters(capsys, tmp_path):
    checkpoint = trained(tmp_path, seeded(projects.NeedsArguments, width=16))
    errors = refused(capsys, tmp_path, checkpoint, "--model", named("NeedsArguments"), *DATA)
    assert "cannot be made with no hyperparameters in the checkpoint" in errors
    assert "missing 1 required positional argument: 'width'" in errors
    assert "Give --model a function without arguments that makes it." in errors


def test_files_that_are_no_checkpoints(capsys, checkpoint, tmp_path):
    assert "There is no checkpoint" in refused(capsys, tmp_path, tmp_path / "none.ckpt", *BOTH)
    assert "is a folder" in refused(capsys, tmp_path, tmp_path, *BOTH)
    path = tmp_path / "bad.ckpt"
    for content in (b"", b"nonsense", checkpoint.read_bytes()[:1000]):
        path.write_bytes(content)
        assert "bad.ckpt" in refused(capsys, tmp_path, path, *BOTH)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    errors = refused(capsys, tmp_path, path, *BOTH)
    assert "or is no checkpoint: Unsupported operand 118. If you trust" in errors
    for saved, sentence in (([1], "holds a list"), ({"epoch": 1}, "has no `state_dict`, but epoch")):
        torch.save(saved, path)
        assert sentence in refused(capsys, tmp_path, path, *BOTH)


def test_weights_within_another_dict_are_found_by_what_is_printed(capsys, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"epoch": 3, "model": read(checkpoint)["state_dict"]}, "nested.pt")
    errors = refused(capsys, tmp_path, "nested.pt", *BOTH)
    assert "`torch.save(torch.load('nested.pt')['model'], path)`" in errors


def test_a_checkpoint_that_could_run_code_is_loaded_on_request_alone(capsys, checkpoint, tmp_path):
    content = read(checkpoint)
    content["hyper_parameters"]["optimizer"] = projects.squared_error
    path = tmp_path / "unsafe.ckpt"
    torch.save(content, path)
    errors = refused(capsys, tmp_path, path, *BOTH)
    assert "tests.commands.projects.squared_error" in errors
    assert "--no-weights-only" in errors
    assert "add_safe_globals" not in errors
    assert errors.count("\n") == 1
    output = ("--output", tmp_path / "repaired.ckpt")
    assert bnmonitor(capsys, "repair", *BOTH, "--ckpt_path", path, *output, "--no-weights-only")[0] == 0
    written = read(tmp_path / "repaired.ckpt", weights_only=False)
    assert written["hyper_parameters"]["optimizer"] is projects.squared_error


def test_a_plain_model_without_data(capsys, tmp_path):
    """Which can be iterated, as data can."""
    torch.save(projects.plain_model().state_dict(), tmp_path / "weights.pt")
    errors = refused(capsys, tmp_path, tmp_path / "weights.pt", "--model", named("plain_model"))
    assert "Sequential has no `train_dataloader`. Which data? Give --data" in errors


def test_a_model_without_batchnorm(capsys, tmp_path):
    checkpoint = trained(tmp_path, seeded(projects.NoNorm))
    assert "no BatchNorm layer in NoNorm" in refused(capsys, tmp_path, checkpoint, "--model", named("NoNorm"), *DATA)
