"""``bnmonitor attribute``: which layer's running statistics cost how much of the loss in ``eval()``."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from typing import Any

from lightning_bnmonitor.commands.messages import CommandError
from lightning_bnmonitor.commands.options import add_subject, number_of_batches, repair_advice

_DESCRIPTION = """Take apart by how much the loss of a trained model is worse in eval() than in training mode: running
statistics, layer by layer, dropout, the data. Changes nothing. Exits with 2 if it cannot be done."""


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
    parser.add_argument(
        "--num-batches",
        type=number_of_batches,
        default=64,
        metavar="N",
        help="at most N batches, or all; each is run again for every layer that matters (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
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

    if arguments.num_batches == "auto":
        raise CommandError("--num-batches must be a positive number or all.")
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
            found = attribute_eval_gap(
                subject.model,
                subject.batches(arguments.num_batches),
                loss,
                subject.runner,
                progress=sys.stderr.isatty(),
                evaluation=subject.evaluation(arguments.num_batches),
            )
    if arguments.json:
        print(json.dumps(found.to_dict(), ensure_ascii=False))
        return 0
    said, table = str(found).split("\n\n", 1)
    print(f"{textwrap.fill(said, 120, break_long_words=False)}\n\n{table}{repair_advice(arguments, said)}")
    return 0


def _loss_of_step(output: Any, batch: Any) -> Any:  # noqa: ARG001
    """The loss in what ``training_step`` has returned."""
    loss = output.get("loss") if isinstance(output, dict) else output
    if loss is None:
        raise ValueError("`training_step` has returned none: give --loss package.module:function")
    return loss
