"""What monitoring costs on a GPU: time of training steps, kernel launches, waits for the device, and memory.

Time: as in ``overhead.py``, each network is trained once for each variant, in rounds, in random order, and each one's
time is divided by that without a monitor in the same round; shown are medians with 95 % intervals. Time is that between
CUDA events around the steps of a round, host and device together. Ours ends each round with an update, more often than
it would by itself: its share of updates is in every round.

Direct share: as in ``overhead.py``, the host's time within our hooks and updates over that of the steps. Where a step
waits for the host's launches, as most do, that is what it takes longer; where it does not, it takes no longer.

Kernels, copies, launches, waits: what ``torch.profiler`` sees on the device, and of calls of CUDA, in a step of ours
beyond one without a monitor, on average over as many steps as have one update; waits also as PyTorch itself knows them
(``torch.cuda.set_sync_debug_mode``). Memory: the difference of the allocator's peaks until after the first update.

On the CPU (``--device cpu --quick``) all of it runs, with a clock in the place of events and nothing to launch.
Exits with 1 if a target is missed: by a ratio, which is noisy, with its whole interval.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from logging_cost import Residual, resnet18
from networks import Bottleneck, efficientnet, resnet50
from overhead import Network, Summary, Training, is_same, ratio, shares_of, shown, summary, verdict
from tabulate import tabulate
from torch import nn
from torch.autograd import DeviceType
from torch.nn.modules.batchnorm import _BatchNorm
from torch.profiler import ProfilerActivity, profile
from variants import AGAIN, EMPTY, NONE, OURS

from lightning_bnmonitor.capture.layer_hook import STASH_LIMIT

NAIVE = "naive mean and var"
COMPARED = (NONE, AGAIN, OURS)
EAGER = (*COMPARED, EMPTY, NAIVE)
CALLS = ("saved", "traced", "pass", "skipped")
ACTIVITIES = {"kernels": "kernels", "copies": "copies", "launches": "Launch", "waits": "Synchronize"}
MAX_RATIO = {"ResNet-50": 1.01, "ResNet-50, compiled": 1.01, "ResNet-18, 32 x 32": 1.03}
MAX_KERNELS = 1 / 20  # a step and layer
UPDATE_STEPS = STASH_LIMIT
MEGABYTE = 1e6


def networks(device: str, quick: bool) -> list[Network]:
    """In the order of how much they are worth waiting for."""
    mixed = {"device": device, "layout": torch.channels_last, "is_mixed": True}
    if quick:
        shape, steps = (2, 3, 32, 32), 2
        tiny = partial(efficientnet, stages=[(8, 2, 3, 1, 2)], stem=8, head=16)
        small = partial(_small, Residual)
        return [
            Network("ResNet-18, 32 x 32", small, shape, steps, compared=EAGER, **mixed),
            Network("ResNet-50", partial(_small, Bottleneck), shape, steps, compared=EAGER, **mixed),
            Network("EfficientNet-B0", tiny, shape, steps, compared=EAGER, **mixed),
            Network("ResNet-50, compiled", small, shape, steps, backend="inductor", compared=COMPARED, **mixed),
        ]
    shape, steps = (64, 3, 224, 224), UPDATE_STEPS // 2
    return [
        Network("ResNet-18, 32 x 32", resnet18, (16, 3, 32, 32), UPDATE_STEPS, compared=EAGER, **mixed),
        Network("ResNet-50", resnet50, shape, steps, compared=EAGER, **mixed),
        Network("EfficientNet-B0", efficientnet, shape, steps, compared=EAGER, **mixed),
        Network("ResNet-50, compiled", resnet50, shape, steps, backend="inductor", compared=COMPARED, **mixed),
        Network(
            "EfficientNet-B0, compiled", efficientnet, shape, steps, backend="inductor", compared=COMPARED, **mixed
        ),
    ]


def _small(block: Callable[[int, int, int], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), block(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


# --- measuring --------------------------------------------------------------------------------------------------------


def update(training: Training) -> None:
    """Merge what waits, if the variant has anything like it."""
    if hasattr(training.monitor.kept, "flush"):
        training.monitor.kept.flush()


def seconds_of(training: Training, steps: int) -> float:
    """Of some steps and an update, until the device has done them."""
    if training.x.is_cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        training.steps(steps)
        update(training)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000
    began = time.perf_counter()
    training.steps(steps)
    update(training)
    return time.perf_counter() - began


def rounds_of(
    trainings: dict[str, Any], steps: int, rounds: int, seconds_of: Callable[[Any, int], float] = seconds_of
) -> dict[str, list[float]]:
    """Seconds of a step of each training in each round, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    order, shuffle = list(trainings), random.Random(0).shuffle
    for number in range(1 + rounds):
        shuffle(order)
        for name in order:
            taken = seconds_of(trainings[name], steps)
            if number:
                seconds[name].append(taken / steps)
    return seconds


def activity_of(training: Training, steps: int) -> dict[str, float]:
    """Kernels and copies on the device, and calls of CUDA by their names, in a step, on average over so many."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        training.steps(steps)
        torch.cuda.synchronize()
    counts: Counter[str] = Counter()
    for event in profiler.profiler.kineto_results.events():  # without the tree that `profiler.events()` makes of them
        name = event.name()
        if event.device_type() == DeviceType.CUDA:
            counts["copies" if name.startswith("Mem") else "kernels"] += 1
        elif re.fullmatch(r"cu(da)?[A-Z]\w*", name):
            counts[name] += 1
            for what in ("Launch", "Synchronize"):
                counts[what] += what in name
    return {name: count / steps for name, count in counts.items()}


def waits_of(training: Training, steps: int) -> float:
    """How often a step makes the host wait for the device, as far as PyTorch knows, on average over so many."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            training.steps(steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(each.message) for each in caught) / steps


def peak_of(training: Training, steps: int) -> int:
    """Bytes that some steps allocate at most, beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    training.steps(steps)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def on_device(training: Training, steps: int, measure: Callable[[Training, int], Any], otherwise: Any) -> Any:
    """What a measurement says; in a rehearsal on the CPU, the steps alone are made."""
    if training.x.is_cuda:
        return measure(training, steps)
    training.steps(steps)
    return otherwise


def measured(network: Network, rounds: int, steps: int | None = None) -> dict[str, Any]:
    """All numbers of a network: seconds a step by variant and round, and by variant what steps do on the device.

    The latter in so many steps; None: as many as have one update.
    """
    trainings = {variant: Training(network, variant) for variant in network.variants}
    peaks = {}
    for variant, training in trainings.items():
        training.steps(3)
        if variant in COMPARED:
            peaks[variant] = on_device(training, steps or UPDATE_STEPS + 1, peak_of, 0)
    say("  warm")
    seconds = rounds_of(trainings, network.steps, rounds)
    say("  timed")
    bare, again, ours = (trainings[variant] for variant in COMPARED)
    are_same = [is_same(bare.module, other.module) for other in (again, ours)]
    waits, activity = {}, {}
    for found, measure, otherwise in ((waits, waits_of, 0.0), (activity, activity_of, {})):
        cycle = steps or ours.prepare_update()
        for variant, training in ((NONE, bare), (OURS, ours)):
            found[variant] = on_device(training, cycle, measure, otherwise)
    shares = shares_of(network, ours, 2, steps)
    report = ours.monitor.kept.report()
    for training in trainings.values():
        training.monitor.close()
    widths = [module.num_features for module in bare.module.modules() if isinstance(module, _BatchNorm)]
    return {
        "layers": len(widths),
        "channels": sum(widths),
        "seconds": seconds,
        "shares": shares,
        "peak_bytes": peaks,
        "waits": waits,
        "activity": activity,
        "calls": {path: sum(layer.evidence[f"calls_{path}"] for layer in report.values()) for path in CALLS},
        "is_reproducible": are_same[0],
        "is_bit_identical": are_same[1],
    }


def extra(result: dict[str, Any], what: str) -> float:
    """Of a step of ours beyond one without a monitor."""
    none, ours = (result["activity"][variant].get(what, 0.0) for variant in (NONE, OURS))
    return ours - none


# --- tables -----------------------------------------------------------------------------------------------------------


def table(results: dict[str, dict[str, Any]]) -> str:
    """A column for each network."""
    of = list(results.values())
    rows = [
        ["BatchNorm layers", *(result["layers"] for result in of)],
        ["channels", *(result["channels"] for result in of)],
        ["a step without monitor, ms", *(f"{1000 * summary(each['seconds'][NONE]).median:.3f}" for each in of)],
    ]
    for variant in (AGAIN, EMPTY, OURS, NAIVE):
        cells = [shown(ratio(r["seconds"], variant, NONE), 4) if variant in r["seconds"] else "-" for r in of]
        rows.append([variant, *cells])
    rows.append(["ours, to empty hook", *(shown(to_empty(r), 4) if EMPTY in r["seconds"] else "-" for r in of)])
    rows.append(["**direct share of ours**", *(f"{100 * max(result['shares']):.2f} %" for result in of)])
    rows.append(["kernels without monitor, a step", *(f"{r['activity'][NONE].get('kernels', 0):.0f}" for r in of)])
    for what, name in ACTIVITIES.items():
        rows.append([f"{what} of ours, a step", *(f"{extra(result, name):.2f}" for result in of)])
    rows.append(["known waits of ours, a step", *(f"{r['waits'][OURS] - r['waits'][NONE]:.2f}" for r in of)])
    rows.append(["memory of ours, MB", *(f"{memory(result) / MEGABYTE:.2f}" for result in of)])
    rows.append(["memory of ours, bytes a channel", *(f"{memory(r) / r['channels']:.0f}" for r in of)])
    rows.append(["calls of ours by path", *(", ".join(f"{n:.0f} {p}" for p, n in r["calls"].items() if n) for r in of)])
    rows.append(["trained the same, to the bit", *(_sameness(result) for result in of)])
    return tabulate(rows, headers=["", *results], tablefmt="github", disable_numparse=True)


def to_empty(result: dict[str, Any]) -> Summary:
    """Ratio of ours to the hook that does nothing."""
    return ratio(result["seconds"], OURS, EMPTY)


def memory(result: dict[str, Any]) -> int:
    """Bytes of ours beyond those without a monitor."""
    return int(result["peak_bytes"][OURS] - result["peak_bytes"][NONE])


def _sameness(result: dict[str, Any]) -> str:
    if result["is_bit_identical"]:
        return "yes"
    return "no" if result["is_reproducible"] else "not without monitor either"


def verdicts_on(results: dict[str, dict[str, Any]], is_on_device: bool) -> list[tuple[bool, str]]:
    """Whether targets are met, and the lines that say so: of those that can be measured here."""
    found = []
    for name, result in results.items():
        if name in MAX_RATIO:
            value = ratio(result["seconds"], OURS, NONE)
            found.append(verdict(f"ratio to no monitor, {name}", value, MAX_RATIO[name], "", is_stable=False))
            share = Summary(*[max(result["shares"])] * 3)
            found.append(verdict(f"direct share, {name}", share, MAX_RATIO[name] - 1, "%", is_stable=True))
        if is_on_device:
            most = {"kernels": result["layers"] * MAX_KERNELS, "Synchronize": 0.0}
            for what, limit in most.items():
                value = Summary(*[extra(result, what)] * 3)
                found.append(verdict(f"{what} a step, {name}", value, limit, "", is_stable=True))
            waits = Summary(*[result["waits"][OURS] - result["waits"][NONE]] * 3)
            found.append(verdict(f"known waits a step, {name}", waits, 0.0, "", is_stable=True))
    return found


def machine() -> dict[str, str]:
    """What was measured on."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    return {"date": time.strftime("%Y-%m-%d"), "card": card, **versions, "cudnn": str(torch.backends.cudnn.version())}


def say(what: str) -> None:
    """Progress, at once."""
    print(f"[{time.perf_counter() - BEGAN:5.0f} s] {what}", flush=True)


BEGAN = time.perf_counter()


def main() -> int:
    """Print the table, whether the targets are met, and write all numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="of each network (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small networks, to try the script")
    parser.add_argument("--only", default="", help="of the networks, those with this in their names (default: all)")
    parser.add_argument(
        "--budget", type=float, default=200, help="seconds in which networks begin (default: %(default)s)"
    )
    parser.add_argument(
        "--json", type=Path, default=Path("gpu.json"), help="file for all numbers (default: %(default)s)"
    )
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 4 * len(EAGER)  # each variant compiles the same code
    results: dict[str, dict[str, Any]] = {}
    failed = []
    for network in networks(args.device, args.quick):
        if args.only not in network.name:
            continue
        needed = 45 if network.backend is not None and not args.quick else 0  # before anything is compiled
        if time.perf_counter() - BEGAN + needed > args.budget:
            say(f"{network.name}: left out, {args.budget:.0f} s are over")
            continue
        say(network.name)
        try:
            results[network.name] = measured(network, args.rounds, 4 if args.quick else None)
        except Exception:
            traceback.print_exc(limit=-6, file=sys.stdout)
            failed.append(network.name)
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
        args.json.write_text(json.dumps({"machine": machine(), "overhead": results, "failed": failed}, indent=1))
    say("done")
    print(f"\n{table(results)}\n")
    verdicts = verdicts_on(results, is_on_device=args.device == "cuda")
    for _, line in verdicts:
        print(line)
    for name in failed:
        print(f"FAILED: {name}, see above.")
    return 0 if all(is_met for is_met, _ in verdicts) and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
