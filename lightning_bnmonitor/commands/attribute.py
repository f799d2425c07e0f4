"""``bnmonitor attribute``: which layer's running statistics cost how much of the loss in ``eval()``."""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
from typing import TYPE_CHECKING, Any

from lightning_bnmonitor.commands.messages import CommandError
from lightning_bnmonitor.commands.options import add_num_batches, add_output, add_subject, repair_advice

if TYPE_CHECKING:
    from lightning_bnmonitor.commands.loading import Subject
    from lightning_bnmonitor.report.report import Report

_DESCRIPTION = """Take apart by how much the loss of a trained model is worse in eval() than in training mode: running
statistics, layer by layer, dropout, the data. Changes nothing. Exits with 2 if it cannot be done, and with --fail-on if
the loss is not finite in any mode."""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those that there are."""
    parser = commands.add_parser("attribute", help="which layer costs how much of the loss", description=_DESCRIPTION)
    add_subject(parser, needs_checkpoint=False, has_validation=True)
    parser.add_argument(
        "--loss",
        metavar="MODULE:NAME",
        help="a function of the model's output and the batch: a mean, or a loss for each sample; none: what "
        "training_step returns, also of validation data",
    )
    add_num_batches(parser, 64, "; each is run again for every layer that matters")
    add_output(
        parser,
        html="the layers",
        fail_on="gap",
        if_what="running statistics cost more than chance and than 2 %% of the loss",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Attribute the gap, and print what was found. Returns the exit status.

    Raises:
        CommandError: If it cannot be done.
    """
    from lightning_bnmonitor import attribute_eval_gap
    from lightning_bnmonitor.commands.loading import load
    from lightning_bnmonitor.commands.making import imported
    from lightning_bnmonitor.commands.messages import as_command_error, quietly
    from lightning_bnmonitor.commands.outcome import check_folder, write_page

    if arguments.html is not None:
        check_folder(arguments.html)
    loss = _loss_of_step
    if arguments.loss is not None:
        loss = imported("--loss", arguments.loss)
        arguments.forward = arguments.forward or "model"
    with quietly():
        subject = load(arguments)
        subject.say_which_weights()
        if arguments.loss is None and subject.runner.forward != "training_step":
            raise CommandError("What is the loss? Give --loss package.module:function, of the output and the batch.")
        subject.runner.steps_alike = True
        with as_command_error():
            report, num_batches = _examined(subject, arguments)
            found = attribute_eval_gap(
                subject.model,
                subject.batches(num_batches),
                loss,
                subject.runner,
                progress=sys.stderr.isatty(),
                evaluation=subject.evaluation(num_batches),
            )
    if arguments.json:
        print(json.dumps(found.to_dict(), ensure_ascii=False))
    else:
        said, table = str(found).split("\n\n", 1)
        print(f"{textwrap.fill(said, 120, break_long_words=False)}\n\n{table}{repair_advice(arguments, said)}")
    if arguments.html is not None and report is not None:
        write_page(arguments.html, {"layers": report})
    if arguments.fail_on is None:
        return 0
    if math.isnan(found.gap):
        raise CommandError("The loss is finite in no mode: what running statistics cost is not known.")
    return int(found.is_significant)


def _examined(subject: Subject, arguments: argparse.Namespace) -> tuple[Report | None, int | None]:
    """A report on the layers, if a page is wanted, and from how many batches; None for all."""
    if arguments.html is None and arguments.num_batches != "auto":
        return None, arguments.num_batches
    from lightning_bnmonitor import examine
    from lightning_bnmonitor.commands.messages import say

    is_auto = arguments.num_batches == "auto"
    training = subject.batches(None if is_auto else arguments.num_batches, "training data")
    evaluation = subject.evaluation(None if is_auto else arguments.num_batches, "validation data")
    report = examine(subject.model, training, evaluation, subject.runner, "auto" if is_auto else None)
    if is_auto:
        say(f"--num-batches auto: {training.num_given} batches.")
    return report, training.num_given


def _loss_of_step(output: Any, batch: Any) -> Any:  # noqa: ARG001
    """The loss in what ``training_step`` has returned."""
    loss = output.get("loss") if isinstance(output, dict) else output
    if loss is None:
        raise ValueError("`training_step` has returned none: give --loss package.module:function")
    return loss
