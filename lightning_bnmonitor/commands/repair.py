"""``bnmonitor repair``: a checkpoint with exact running statistics in it, and all else as it was."""

from __future__ import annotations

import argparse
import json
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_bnmonitor.commands.messages import CommandError
from lightning_bnmonitor.commands.options import add_exclude, add_num_batches, add_output, add_subject

if TYPE_CHECKING:
    from lightning_bnmonitor.commands.checkpoint import Checkpoint
    from lightning_bnmonitor.commands.loading import Subject
    from lightning_bnmonitor.repair.recalibration import Recalibration
    from lightning_bnmonitor.report.report import Report

_DESCRIPTION = """Write a checkpoint that is the old one, but for the running statistics of its BatchNorm layers, which
are the exact ones of training data. The averaged weights of WeightAveraging are repaired, too. Exits with 2, and writes
nothing, if it cannot be done, and with --fail-on if no layer could be judged."""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those that there are."""
    parser = commands.add_parser("repair", help="write a checkpoint that is right in eval()", description=_DESCRIPTION)
    add_subject(parser, needs_checkpoint=True, has_validation=False)
    add_num_batches(parser)
    add_exclude(parser)
    parser.add_argument(
        "--frozen", action="store_true", help="repair layers, too, that are in eval mode or update nothing in training"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="where to write the new checkpoint")
    parser.add_argument("--force", action="store_true", help="replace the file if it is there")
    add_output(
        parser,
        html="the layers before and after",
        fail_on="unhealthy",
        if_what="a layer needs attention after it; the checkpoint is written",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Repair the weights, and write the checkpoint. Returns the exit status.

    Raises:
        CommandError: If it cannot be done.
    """
    from lightning_bnmonitor.commands.checkpoint import check_output, write
    from lightning_bnmonitor.commands.loading import load
    from lightning_bnmonitor.commands.messages import quietly
    from lightning_bnmonitor.commands.outcome import check_folder, need_attention, write_page

    check_output(arguments.output, arguments.ckpt_path, arguments.force)
    if arguments.html is not None:
        check_folder(arguments.html)
    with quietly():
        subject = load(arguments)
        assert subject.checkpoint is not None
        done = _repair(subject, subject.checkpoint, arguments)
    now = {what: _in_new_checkpoint(result) for what, result in done.items()}
    status = int(arguments.fail_on is not None and need_attention(now.values()))
    if arguments.html is not None:
        befores = {f"{what}, before": result.before for what, result in done.items()}
        write_page(arguments.html, {**befores, **{f"{what}, after": report for what, report in now.items()}})
    check_output(arguments.output, arguments.ckpt_path, arguments.force)  # it may have come meanwhile
    write(subject.checkpoint, arguments.output)
    if arguments.json:
        print(json.dumps({what: result.to_dict() for what, result in done.items()}, ensure_ascii=False))
    else:
        _tell(done, now, arguments.output)
    return status


def _repair(subject: Subject, checkpoint: Checkpoint, arguments: argparse.Namespace) -> dict[str, Recalibration]:
    """Replace the running statistics of all weights in a checkpoint, in memory.

    Returns:
        What was done, by what the weights are.
    """
    from lightning_bnmonitor import recalibrate
    from lightning_bnmonitor.commands.checkpoint import load_weights, put_stats
    from lightning_bnmonitor.commands.messages import as_command_error, say
    from lightning_bnmonitor.tracking.discovery import find_layers

    done: dict[str, Recalibration] = {}
    layers = find_layers(subject.model, None, None)
    missing = subject.missing
    for what, weights in checkpoint.states.items():
        if done:
            missing = load_weights(subject.model, weights, checkpoint.path)
        warnings.filterwarnings("ignore", "recalibrate has left layers alone")
        with as_command_error():
            batches = subject.batches(label=what)
            done[what] = result = recalibrate(
                subject.model,
                batches,
                subject.runner,
                arguments.num_batches,
                exclude=arguments.exclude,
                frozen=arguments.frozen,
            )
        if result.misfits:
            say(
                f"Left alone, though wrong: {', '.join(result.misfits)}. They are in eval mode in training, or update "
                "nothing. --frozen repairs them, too."
            )
        repaired = [layers[name] for name in result.after if name not in result.left_alone]
        if not repaired:
            raise CommandError(f"No layer can be repaired: {result}")
        put_stats(weights, subject.model, repaired, missing)
    return done


def _in_new_checkpoint(result: Recalibration) -> Report:
    """All layers as they are now: those that were left alone as they were."""
    from lightning_bnmonitor.report.report import Report

    return Report(result.after.get(name, was) for name, was in result.before.items())


def _tell(done: Mapping[str, Recalibration], now: Mapping[str, Report], output: Path) -> None:
    """Print what was done, by what the weights are, and what needs attention all the same."""
    print("\n\n".join(f"{what[0].upper()}{what[1:]}:\n{table}" for what, table in done.items()))
    first = next(iter(done.values()))
    num = len(set(first.after) - set(first.left_alone))
    said = f"Written to {output}: {' and '.join(done)} with exact running statistics in {num} layer{'s' * (num > 1)}, "
    print("\n" + _filled(f"{said}all else as it was."))
    sick = {layer.name: layer.diagnosis.cause for report in now.values() for layer in report.unhealthy}
    if sick:
        listed = ", ".join(f"{name} ({cause})" for name, cause in sick.items())
        print(_filled(f"Exact ones are not enough for {listed}: `bnmonitor check` on the new checkpoint says why."))


def _filled(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)
