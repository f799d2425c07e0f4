"""``bnmonitor check``: whether a trained model can be trusted in ``eval()``, as text, JSON, a page, an exit status."""

from __future__ import annotations

import argparse
import json

from lightning_bnmonitor.commands.options import add_exclude, add_num_batches, add_output, add_subject, repair_advice

_DESCRIPTION = """Compare the running statistics of a trained model with the exact statistics of training data, and of
validation data. Changes nothing. Exits with 2 if it cannot be done, and with --fail-on if no layer could be judged."""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those that there are."""
    parser = commands.add_parser("check", help="whether a checkpoint is right in eval()", description=_DESCRIPTION)
    add_subject(parser, needs_checkpoint=False, has_validation=True)
    add_num_batches(parser)
    add_exclude(parser)
    add_output(parser, html="the layers", fail_on="unhealthy", if_what="a layer needs attention")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Examine the model and show what was asked for. Returns the exit status.

    Raises:
        CommandError: If it cannot be done.
    """
    from lightning_bnmonitor.commands.loading import load
    from lightning_bnmonitor.commands.messages import as_command_error, quietly
    from lightning_bnmonitor.commands.outcome import check_folder, need_attention, write_page

    if arguments.html is not None:
        check_folder(arguments.html)
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
        write_page(arguments.html, {"layers": report})
    return int(arguments.fail_on is not None and need_attention([report]))
