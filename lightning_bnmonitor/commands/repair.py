"""``bnmonitor repair``: a checkpoint with exact running statistics in it, and all else as it was."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_bnmonitor.commands.messages import CommandError
from lightning_bnmonitor.commands.options import add_exclude, add_num_batches, add_subject

if TYPE_CHECKING:
    from lightning_bnmonitor.commands.checkpoint import Checkpoint
    from lightning_bnmonitor.commands.loading import Subject
    from lightning_bnmonitor.repair.recalibration import Recalibration

_DESCRIPTION = """Write a checkpoint that is the old one, but for the running statistics of its BatchNorm layers, which
are the exact ones of training data. The averaged weights of WeightAveraging are repaired, too. Exits with 2, and writes
nothing, if it cannot be done."""


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
    parser.add_argument("--json", action="store_true", help="print JSON: of each set of weights, what was done")
    parser.add_argument("--force", action="store_true", help="replace the file if it is there")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Repair the weights, and write the checkpoint. Returns the exit status.

    Raises:
        CommandError: If it cannot be done.
    """
    from lightning_bnmonitor.commands.checkpoint import check_output, write
    from lightning_bnmonitor.commands.loading import load
    from lightning_bnmonitor.commands.messages import quietly

    check_output(arguments.output, arguments.ckpt_path, arguments.force)
    with quietly():
        subject = load(arguments)
        assert subject.checkpoint is not None
        done = _repair(subject, subject.checkpoint, arguments)
    check_output(arguments.output, arguments.ckpt_path, arguments.force)  # it may have come meanwhile
    write(subject.checkpoint, arguments.output)
    if arguments.json:
        print(json.dumps({what: result.to_dict() for what, result in done.items()}, ensure_ascii=False))
        return 0
    print("\n\n".join(f"{what[0].upper()}{what[1:]}:\n{table}" for what, table in done.items()))
    num = len(set(next(iter(done.values())).after) - set(next(iter(done.values())).left_alone))
    print(
        f"\nWritten to {arguments.output}: {' and '.join(done)} with exact running statistics in {num} "
        f"layer{'s' * (num > 1)}, all else as it was."
    )
    return 0


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
