"""The options that commands on trained models share: what model, with which weights, on which data. No torch."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Literal


def add_subject(parser: argparse.ArgumentParser, *, needs_checkpoint: bool, has_validation: bool) -> None:
    """Add the options that say what is looked at."""
    subject = parser.add_argument_group("model and data")
    subject.add_argument(
        "--config", type=Path, metavar="FILE", help="config.yaml of LightningCLI, with the model, the data and the seed"
    )
    subject.add_argument(
        "--ckpt_path",
        "--ckpt-path",
        type=Path,
        metavar="FILE",
        required=needs_checkpoint,
        help="checkpoint of Lightning, or a file with a state_dict" + ("" if needs_checkpoint else "; none: as made"),
    )
    subject.add_argument(
        "--model",
        metavar="MODULE:NAME",
        help="class of the model, made with the config's arguments or the checkpoint's hyperparameters, or a function "
        "that returns the model",
    )
    subject.add_argument(
        "--data",
        metavar="MODULE:NAME",
        help="class of the LightningDataModule, likewise, or a function that returns one or a DataLoader of training "
        "data; none: the loaders of the model",
    )
    if has_validation:
        subject.add_argument(
            "--validation",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="look at the validation data, too, if there are any",
        )
    how = parser.add_argument_group("how to run it")
    how.add_argument(
        "--forward",
        metavar="HOW",
        help="training_step, model (called with the first of each batch), or MODULE:NAME of a function of the model "
        "and a batch; none: the first of these that works, validation_step on validation data",
    )
    how.add_argument("--device", help="cpu, cuda, cuda:1, mps; none: a GPU if there is one")
    how.add_argument(
        "--no-weights-only",
        dest="weights_only",
        action="store_false",
        help="load a checkpoint that has more than tensors and plain values in it. It can run any code: trust it first",
    )


def add_num_batches(parser: argparse.ArgumentParser, default: int | Literal["auto"] = "auto", more: str = "") -> None:
    """Add the option that says from how many batches exact statistics are taken, and what more that means."""
    parser.add_argument(
        "--num-batches",
        "--num_batches",
        type=number_of_batches,
        default=default,
        metavar="N",
        help="at most N batches of training data, all, or auto: until the noise of their statistics is small"
        f"{more} (default: %(default)s)",
    )


def add_exclude(parser: argparse.ArgumentParser) -> None:
    """Add the option that leaves layers alone."""
    parser.add_argument(
        "--exclude",
        action="append",
        metavar="PATTERN",
        help="names of layers to leave alone, as 'backbone.*': those that a callback freezes in training, say",
    )


def add_output(parser: argparse.ArgumentParser, *, html: str, fail_on: str, if_what: str) -> None:
    """Add the options that say what is made of what was found.

    Args:
        parser: Of a command.
        html: What the page shows.
        fail_on: What the exit status can tell.
        if_what: When it does.
    """
    parser.add_argument("--html", type=Path, metavar="FILE", help=f"write TensorBoard's page of {html} to this file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--fail-on", choices=[fail_on], help=f"exit with 1 if {if_what}")


def number_of_batches(text: str) -> int | Literal["auto"] | None:
    """``auto``, None for ``all``, or a positive number.

    Raises:
        ArgumentTypeError: If it is none of these.
    """
    if text == "auto":
        return "auto"
    if text == "all":
        return None
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be auto, all, or a positive number, got {text!r}")
    return number


def repair_advice(arguments: argparse.Namespace, text: str) -> str:
    """The command that repairs the checkpoint, where a text has advised to recalibrate the model; empty if it has not.

    Args:
        arguments: Of the command that has found it.
        text: What it has to say.
    """
    if arguments.ckpt_path is None or "recalibrate(model, loader" not in text:
        return ""
    words = ["bnmonitor", "repair"]
    for option in ("config", "model", "data", "forward", "device", "ckpt_path"):
        value = getattr(arguments, option)
        words += [f"--{option}", str(value)] if value is not None else []
    for pattern in getattr(arguments, "exclude", None) or ():
        words += ["--exclude", pattern]
    words += [] if arguments.weights_only else ["--no-weights-only"]
    words += ["--frozen"] if "frozen=True" in text else []
    command = shlex.join([*words, "--output", f"repaired{arguments.ckpt_path.suffix}"])
    return f"\n\nFor this checkpoint, `recalibrate` is:\n{command}"
