"""What the tab adds to the start of TensorBoard, in CPU seconds: ``python -m tests.tensorboard.measure``.

TensorBoard is started on an empty folder, turn by turn with our entry point and without (it is left out of those that
TensorBoard finds, in an environment that is otherwise the same), until it says that it serves and has told which tabs
there are. Counted is the CPU time of its process, user and system, as the kernel counts it: what else the
machine does delays it, and adds little. Needs Linux (``/proc``).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

START = """
import sys
from tensorboard import default
from tensorboard.main import run_main
left_out, found = sys.argv.pop(1), default._iter_entry_points
default._iter_entry_points = lambda group: [each for each in found(group) if each.name != left_out]
run_main()
"""
OPTIONS = ("--port", "0", "--host", "127.0.0.1", "--load_fast", "false")
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(left_out: str, folder: str) -> tuple[float, bool]:
    """CPU seconds until it serves, where an entry point of this name is left out; and whether our tab is there."""
    command = [sys.executable, "-c", START, left_out, "--logdir", folder, *OPTIONS]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            line = next(line for line in server.stderr if " at http" in line)
            address = next(word for word in line.split() if word.startswith("http"))
            with urllib.request.urlopen(f"{address}data/plugins_listing") as answer:
                has_tab = b'"batchnorm"' in answer.read()
            fields = Path(f"/proc/{server.pid}/stat").read_text().rsplit(")", 1)[1].split()
        finally:
            server.kill()
    return (int(fields[11]) + int(fields[12])) / TICKS, has_tab


def main() -> None:
    """Start it in pairs, and print each pair and the median of what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12, help="default: %(default)s")
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(-1, parser.parse_args().pairs):
            measured = {}
            for left_out in ("batchnorm", "none of them")[:: 1 if number % 2 else -1]:
                measured[left_out], has_tab = cpu_seconds(left_out, folder)
                assert has_tab == (left_out != "batchnorm"), "the package is not installed"
            if number >= 0:  # the first one reads files that the others find in memory
                pairs.append((measured["batchnorm"], measured["none of them"]))
                print("without {:.2f}  with {:.2f}".format(*pairs[-1]), flush=True)
    differences = [with_it - without for without, with_it in pairs]
    without = statistics.median(without for without, _ in pairs)
    middle, spread = statistics.median(differences), statistics.stdev(differences) / len(differences) ** 0.5
    print(
        f"median {middle:+.3f} s of {without:.2f} s: {middle / without:+.1%}, ± {1.25 * spread / without:.1%} of chance"
    )


if __name__ == "__main__":
    main()
