"""The command ``bnmonitor``, also ``python -m lightning_bnmonitor``. ``show`` needs neither torch nor Lightning."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from lightning_bnmonitor.commands import attribute, check, repair, show
from lightning_bnmonitor.commands.messages import CommandError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with its arguments, those of the process if they are None.

    Returns:
        The exit status: 0; 1 if what was asked for is found to be so (``--fail-on``); 2 if it could not be done, with a
        sentence on stderr; 130 if it was interrupted.
    """
    parser = argparse.ArgumentParser(
        "bnmonitor", description="BatchNorm in eval(): of trained models, and of trainings that were monitored."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (check, repair, attribute, show):
        command.add_to(commands)
    chosen = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of layers may have letters that a terminal lacks
    try:
        status: int = chosen.run(chosen)
        sys.stdout.flush()
    except CommandError as error:
        print(f"bnmonitor: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bnmonitor: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads it has seen enough; Python itself would flush once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status
