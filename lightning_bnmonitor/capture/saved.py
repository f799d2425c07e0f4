"""What a BatchNorm kernel has saved for its backward, read off the autograd graph behind a layer's output.

The kernel's node is that of the output itself, or lies a few steps behind it where the layer's own ``forward`` goes on
with an activation, dropout, a reshape. What lies behind the layer's input belongs to others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from lightning_bnmonitor.capture.batch_moments import FULL_PRECISION, BatchMoments
from lightning_bnmonitor.capture.hooks import Hook
from lightning_bnmonitor.compat import (
    FORWARD_PRE_HOOKS,
    HAS_PRE_HOOKS,
    HAS_UNPACK_HOOKS,
    PARAMETERS,
    SAVED_INVSTD,
    SAVED_MEAN,
    BatchNorm,
    batch_norm_kernel,
    eps_of_kernel,
    has_unpack_hooks,
    saved_by_synchronised,
    shape_of_output,
    top_saved_tensor_hooks,
)


class Way(NamedTuple):
    """From an output's autograd node to that of the kernel behind it."""

    steps: tuple[tuple[int, type], ...] = ()
    """Which of a node's inputs to go on with, and the type of the node there. None where the nodes are the same."""
    mark: tuple[int, str] = (0, "")
    """The input by which the kernel's node is known to be the layer's: its number, and the name of the parameter that
    it is, or "" if it is what the layer received."""


_MOST_STEPS = 6
_MOST_NODES = 200  # of a graph within a layer
_MAX_SERIAL = 4096  # values per channel that a serial float32 sum may have and still be exact enough
_FORWARDS = (BatchNorm.forward, nn.SyncBatchNorm.forward)


class Kernel(NamedTuple):
    """The kernel that has normalised in a call of a layer."""

    node: Any
    """Its autograd node."""
    way: Way
    """From the output's node to it: empty where that is the same."""


def kernel_behind(module: BatchNorm, x: object, output: object) -> Kernel | None:
    """The kernel that ``output`` comes from, if it is one of this layer's and at most 6 steps behind.

    A step is taken while one input matters: parameters do not, nor does ``x`` beside others (a residual connection). Of
    several inputs the one is taken that is the layer's kernel. What counts is what the kernel received: if a layer's
    ``forward`` scales its input first, or takes a part of the batch, that is what its running statistics are made of.
    """
    node: Any = getattr(output, "grad_fn", None)
    before: Any = getattr(x, "grad_fn", None)
    steps: tuple[tuple[int, type], ...] = ()
    while node is not None and node is not before:
        if batch_norm_kernel(node.__class__) is not None:
            mark = _mark_of(module, x, node)
            return None if mark is None else Kernel(node, Way(steps, mark))
        if len(steps) == _MOST_STEPS:
            return None
        inputs = [
            (index, following)
            for index, (following, _) in enumerate(node.next_functions)
            if following is not None and following is not before and not hasattr(following, "variable")
        ]
        if len(inputs) > 1:
            inputs = [each for each in inputs if _is_own_kernel(module, x, each[1])]
        if len(inputs) != 1:
            return None
        [(index, node)] = inputs
        steps = (*steps, (index, type(node)))
    return None


def is_made_without_kernel(module: BatchNorm, x: object, output: object) -> bool | None:
    """Whether a layer's own ``forward`` has made ``output`` from ``x`` without any BatchNorm kernel.

    None if that cannot be told: no graph was recorded, or a part of it is hidden (a custom function, compiled code).
    """
    if enters_no_context(module):
        return False
    first: Any = getattr(output, "grad_fn", None)
    before: Any = getattr(x, "grad_fn", None)
    if first is None:
        return None
    seen, left = {first}, [first]
    while left:
        node = left.pop()
        if batch_norm_kernel(node.__class__) is not None:
            return False
        if isinstance(node, BackwardCFunction) or len(seen) > _MOST_NODES:
            return None
        following = {each for each, _ in node.next_functions if each is not None and each is not before} - seen
        seen |= following
        left += following
    return True


def at_end_of(way: Way, node: Any, module: BatchNorm, before: Any) -> Any:
    """The kernel's node that a way from ``node`` leads to, None if it is another way or another layer's kernel now.

    ``before`` is the node of what the layer received.
    """
    for index, node_type in way.steps:
        following = node.next_functions
        if node is before or index >= len(following):
            return None
        node = following[index][0]
        if node.__class__ is not node_type:
            return None
    index, name = way.mark
    marked = node.next_functions[index][0]
    if name:
        own = vars(module)[PARAMETERS].get(name)
        is_own = own is not None and getattr(marked, "variable", None) is own
    else:
        is_own = marked is before is not None
    return node if is_own and node is not before else None


def is_intercepted(kernel: Kernel | None) -> bool:
    """Whether something is known to intercept what autograd saves: activation checkpointing, ``save_on_cpu``."""
    if top_saved_tensor_hooks(True) is not None:
        return True
    return kernel is not None and HAS_UNPACK_HOOKS and has_unpack_hooks(kernel.node)


def _is_readable(module: BatchNorm, kernel: Kernel) -> bool:
    """Whether it is known that to read what was saved runs nothing."""
    return not is_intercepted(kernel) and (HAS_UNPACK_HOOKS or enters_no_context(module))


def has_own_forward(module: BatchNorm) -> bool:
    """Whether a layer has another ``forward`` than PyTorch's."""
    return type(module).forward not in _FORWARDS or "forward" in vars(module)


def enters_no_context(module: BatchNorm) -> bool:
    """Whether a layer has PyTorch's own ``forward`` and nothing before it, so that it saves as its surroundings do.

    (Hooks of ours enter none.)
    """
    if has_own_forward(module) or not HAS_PRE_HOOKS:
        return False
    return all(isinstance(hook, Hook) for hook in vars(module)[FORWARD_PRE_HOOKS].values())


def saved_moments(module: BatchNorm, x: Tensor, kernel: Kernel | None) -> BatchMoments | None:
    """What the kernel saved for its backward, without a kernel of our own.

    Args:
        module: The BatchNorm layer.
        x: What it received, ``(N, C, *)``. Only its layout matters.
        kernel: The kernel, None if there is none.

    Returns:
        None if nothing usable was saved: no graph (``no_grad``, or nothing that requires grad), the layer normalised by
        its running statistics, the CPU's kernel computed in half precision and saved in it. None also if saved-tensor
        hooks were active (activation checkpointing, ``save_on_cpu``): reading would run them, and under checkpointing a
        whole recomputation. And None for a large batch that the CPU's kernel sums value by value in float32, as it does
        with one position a sample and if ``x`` is not contiguous (channels-last, slices): the error grows with the root
        of the number of values.
    """
    if kernel is None or not _is_readable(module, kernel):
        return None
    shape, num_channels = shape_of_output(kernel.node), module.num_features
    if shape is None:
        return None
    num_ranks, is_synchronised = 1, batch_norm_kernel(kernel.node.__class__) == "synchronised"
    if is_synchronised:
        # The moments of the batches of all ranks together. How many values the other ranks had is on the device; each
        # is taken to have had as many as this one.
        mean, spread, group = saved_by_synchronised(kernel.node)
        num_ranks = dist.get_world_size(group)
    else:
        mean, spread = getattr(kernel.node, SAVED_MEAN), getattr(kernel.node, SAVED_INVSTD)
    if mean.numel() != num_channels or mean.dtype not in FULL_PRECISION:
        return None
    batch_size, num_samples = shape[0], shape.numel() // num_channels
    is_vectorised = x.is_contiguous() and x.shape == shape and num_samples > batch_size
    serial = not is_synchronised and not is_vectorised
    if serial and num_samples > _MAX_SERIAL and x.device.type == "cpu":
        return None
    counts = num_samples * num_ranks, batch_size * num_ranks
    eps = eps_of_kernel(kernel.node, module.eps)
    return BatchMoments("saved", *counts, mean, spread, eps, serial, num_ranks=num_ranks)


def _is_own_kernel(module: BatchNorm, x: object, node: Any) -> bool:
    return batch_norm_kernel(node.__class__) is not None and _mark_of(module, x, node) is not None


def _mark_of(module: BatchNorm, x: object, node: Any) -> tuple[int, str] | None:
    """The mark of :class:`Way`: which of the layer's parameters is an input of a node; without any, ``x``."""
    own: dict[str, object] = {
        name: value for name, value in module.named_parameters(recurse=False) if value.requires_grad
    }
    for name, tensor in (own or {"": x}).items():
        for index, (following, number) in enumerate(node.next_functions):
            if following is None or not isinstance(tensor, Tensor):
                continue
            if getattr(following, "variable", None) is tensor:
                return index, name
            if following is tensor.grad_fn and number == tensor.output_nr:
                return index, name
    return None
