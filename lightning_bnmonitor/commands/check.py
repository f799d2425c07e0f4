"""``bnmonitor check``: whether a trained model can be trusted in ``eval()``, as text, JSON, a page, an exit status."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lightning_bnmonitor.commands.messages import CommandError
from lightning_bnmonitor.commands.options import add_exclude, add_num_batches, add_subject, repair_advice

_DESCRIPTION = """Compare the running statistics of a trained model with the exact statistics of training data, and of
validation data. Changes nothing. Exits with 2 if it cannot be done, and with --fail-on if no layer could be judged."""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those that there are."""
    parser = commands.add_parser("check", help="whether a checkpoint is right in eval()", description=_DESCRIPTION)
    add_subject(parser, needs_checkpoint=False, has_validation=True)
    add_num_batches(parser)
    add_exclude(parser)
    parser.add_argument("--html", type=Path, metavar="FILE", help="write TensorBoard's page of it to this file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--fail-on", choices=["unhealthy"], help="exit with 1 if a layer needs attention")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Examine the model and show what was asked for. Returns the exit status.

    Raises:
        CommandError: If it cannot be done.
    """
    from lightning_bnmonitor.commands.loading import load
    from lightning_bnmonitor.commands.messages import as_command_error, quietly

    with quietly():
        subject = load(arguments)
        subject.say_which_weights()
        from lightning_bnmonitor import examine

        with as_command_error():
            report = examine(
                subject.model,
                subject.batches(label="training data"),
                subject.evaluation(label="validation data"),
                subject.runner,
                arguments.num_batches,
                exclude=arguments.exclude,
            )
    if arguments.json:
        print(json.dumps(report.to_dict(), ensure_ascii=False))
    else:
        remedies = " ".join(layer.remedy for layer in report.unhealthy)
        print(f"{report}{repair_advice(arguments, remedies)}")
    if arguments.html is not None:
        try:
            report.to_html(arguments.html)
        except OSError as error:
            raise CommandError(f"The page could not be written to {arguments.html}: {error.strerror}.") from error
    if arguments.fail_on is None:
        return 0
    if not any(layer.diagnosis.is_judged for layer in report.values()):
        raise CommandError("No layer could be judged: whether they need attention is not known.")
    return int(bool(report.unhealthy))
