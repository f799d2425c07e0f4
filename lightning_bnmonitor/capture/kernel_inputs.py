"""What reaches a BatchNorm kernel within a layer whose ``forward`` is its own, and may be another than it receives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from lightning_bnmonitor.compat import BatchNorm

_KERNELS = (F.batch_norm, torch.batch_norm, torch.native_batch_norm)


class _Recording(TorchFunctionMode):
    """Within it, inputs and weights of BatchNorm kernels are recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.received: list[tuple[Tensor, Tensor | None]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _KERNELS:
            at = 3 if func is F.batch_norm else 1  # of the weight
            weight = args[at] if len(args) > at else kwargs.get("weight")
            self.received.append((args[0] if args else kwargs["input"], weight))
        return func(*args, **kwargs)


@contextmanager
def kernel_inputs(layer: BatchNorm, hook: Callable[..., None], no_kernel: Callable[[], None]) -> Iterator[None]:
    """A context in which a forward hook is called with what the layer's own kernel has received, for each time it runs.

    If none of that can be told, with what the layer has received; if no BatchNorm kernel has run at all, ``no_kernel``
    is called before.
    """
    running: list[tuple[_Recording, ExitStack]] = []

    def begin(*_: Any) -> None:
        recording, context = _Recording(), ExitStack()
        context.enter_context(recording)
        running.append((recording, context))

    def end(module: BatchNorm, args: Any, kwargs: Any, output: Any) -> None:
        recording, context = running.pop()
        context.close()
        if output is None:  # it has failed
            return
        own = [x for x, weight in recording.received if weight is module.weight]
        if not own and len(recording.received) == 1:
            own = [x for x, _ in recording.received]
        for received in own:
            hook(module, (received,), {}, output)
        if not recording.received:
            no_kernel()
        if not own:
            hook(module, args, kwargs, output)

    with ExitStack() as stack:
        stack.callback(layer.register_forward_pre_hook(begin).remove)
        stack.callback(layer.register_forward_hook(end, with_kwargs=True, always_call=True).remove)
        yield
