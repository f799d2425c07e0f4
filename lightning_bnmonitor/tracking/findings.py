"""What is found of each layer, in plain values, and as one tensor that rank 0 sends to the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bnmonitor.diagnosis.diagnosis import EVIDENCE, FLAGS, VERDICTS, Diagnosis

_ROWS = 10  # of numbers of each channel
_OTHERS = ("position", "num_batches", "num_samples", "has_running_stats", "verdict", "flags", "needs_attention")
_COLUMNS = len(_OTHERS) + len(EVIDENCE)


class Finding(NamedTuple):
    """What is found of one layer."""

    numbers: Tensor
    """Mean and variance of the population, of the running statistics, of now; z and standard errors, ``(10, C)``."""
    num_batches: int
    """Counted calls, on rank 0 if they are of all ranks."""
    num_samples: int
    """Values per channel."""
    has_running_stats: bool
    """Whether there are running statistics."""
    diagnosis: Diagnosis
    """Verdict, flags, evidence."""


def packed_size(widths: Sequence[int]) -> int:
    """Numbers in what :func:`pack` returns for layers of so many channels."""
    return _ROWS * sum(widths) + _COLUMNS * len(widths)


def pack(findings: Sequence[Finding], positions: Sequence[int]) -> Tensor:
    """Findings as one float64 tensor, with the position of each in the report."""
    table = [
        [
            *(position, finding.num_batches, finding.num_samples, finding.has_running_stats),
            VERDICTS.index(finding.diagnosis.verdict),
            sum(2**bit for bit, flag in enumerate(FLAGS) if flag in finding.diagnosis.flags),
            finding.diagnosis.needs_attention,
            *(finding.diagnosis.evidence.get(name, math.nan) for name in EVIDENCE),
        ]
        for finding, position in zip(findings, positions, strict=True)
    ]
    numbers = [finding.numbers.flatten() for finding in findings]
    return torch.cat([torch.tensor(table, dtype=torch.float64, device="cpu").flatten(), *numbers])


def unpack(packed: Tensor, widths: Sequence[int]) -> tuple[list[Finding], list[int]]:
    """The findings and positions that :func:`pack` was given, on layers of so many channels."""
    sizes = [_ROWS * width for width in widths]
    table, *numbers = torch.split(packed, [_COLUMNS * len(widths), *sizes])
    findings, positions = [], []
    for row, own, width in zip(table.view(-1, _COLUMNS).tolist(), numbers, widths, strict=True):
        position, num_batches, num_samples, has_running_stats, verdict, flags, needs_attention, *evidence = row
        diagnosis = Diagnosis(
            verdict=VERDICTS[int(verdict)],
            flags=tuple(flag for bit, flag in enumerate(FLAGS) if int(flags) & 2**bit),
            needs_attention=bool(needs_attention),
            evidence={name: value for name, value in zip(EVIDENCE, evidence, strict=True) if not math.isnan(value)},
        )
        findings.append(
            Finding(own.view(_ROWS, width), int(num_batches), int(num_samples), bool(has_running_stats), diagnosis)
        )
        positions.append(int(position))
    return findings, positions
