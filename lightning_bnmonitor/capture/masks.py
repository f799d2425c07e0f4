"""Which positions of what a layer receives count, by what the user's function says of each batch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

Masks = Tensor | Mapping[str, Tensor | None] | None
"""What the function returns: see :class:`BatchMasks`."""


class BatchMasks:
    """The masks of the present batch, each fitted to what a layer receives.

    A batch knows lengths, and no layer does: so the function is asked once a batch, and what it returns is fitted to
    each layer by shape. For sequences ``x``, ``(B, C, T)``, of these ``lengths``, ``(B,)``, it is two lines::

        def mask(batch):
            x, lengths, _ = batch
            return torch.arange(x.shape[-1], device=x.device) < lengths[:, None]

    A mask is bool (or, as tokenizers make them, integers 0 and 1), ``(B, *positions)``, True where a position counts,
    or ``(B,)`` for whole samples. (A ``key_padding_mask`` is the other way round: return ``~mask``.) It fits an input

    - ``(B, C, *positions)`` with as many dimensions of positions: where one has another size there (a convolution with
      a stride, an upsampling), the nearest position of the mask is taken; a dimension of size 1 stands for all;
    - ``(B * T, C, *)``, flattened: a mask of ``B * T`` positions in all;
    - ``(B, C)``, pooled: a sample counts if any position of it does;
    - ``(B, C, *)`` with a mask ``(B,)``.

    Nothing else is guessed: what fits no mask is left out.

    Args:
        function: Called with a batch. It returns a mask for all layers; several, by ``fnmatch`` patterns of their
            names, of which the first that matches is taken; or None: all positions count.
    """

    def __init__(self, function: Callable[[object], Masks]) -> None:
        self.function = function
        self.has_seen = False  # a batch
        self._is_given_up = False
        self._has_warned = False  # of a mask that does not fit,
        self._has_warned_of_use = False  # and of none
        self._given: Mapping[str, Tensor | None] = {}  # by pattern
        self._fitted: dict[tuple[str, torch.Size, torch.device], Tensor | None] = {}  # of this batch

    @torch.no_grad()
    def see(self, batch: object) -> None:
        """Ask for the masks of a batch, which the calls that follow are made with."""
        self.forget()
        self.has_seen = True
        if self._is_given_up:
            return
        try:
            self._given = _by_pattern(self.function(batch))
        except Exception as error:  # no reason not to train
            self._is_given_up = True
            warnings.warn(
                f"`mask` failed, and is not asked again: what counts as padding is not known from here on. {error!r}",
                stacklevel=5,
            )

    def forget(self) -> None:
        """The step is over: what is called until the next batch has no mask."""
        self._given = {}
        self._fitted.clear()

    def check_use(self, was_called: bool, was_compiled: bool) -> None:
        """Warn, once, if a window has ended in which layers could not be looked at.

        Args:
            was_called: Whether a layer was called in it.
            was_compiled: Whether in compiled code.
        """
        what = ""
        if was_called and not self.has_seen:
            what = "`mask` was not asked, as no batch was told: call `tracker.see_inputs(batch)` before each step."
        elif was_compiled:
            what = "`mask` tells nothing of layers in compiled code: without padding there are no statistics of them."
        if what and not self._has_warned_of_use:
            self._has_warned_of_use = True
            warnings.warn(what, stacklevel=5)

    def of(self, name: str, x: Tensor) -> Tensor | None:
        """Which positions of what a layer receives count; None if that is not known.

        Args:
            name: The layer's.
            x: ``(N, C, *positions)``.

        Returns:
            Bool, ``(N, *positions)``, or of size 1 where all are alike.
        """
        pattern = next((pattern for pattern in self._given if fnmatchcase(name, pattern)), None)
        if pattern is None:
            return None
        key = pattern, x.shape, x.device
        if key not in self._fitted:
            self._fitted[key] = self._fit(name, self._given[pattern], x)
        return self._fitted[key]

    def _fit(self, name: str, mask: Tensor | None, x: Tensor) -> Tensor | None:
        if mask is None:
            return torch.ones([1] * (x.ndim - 1), dtype=torch.bool, device=x.device)
        fitted = fitted_mask(mask.to(x.device, non_blocking=True), x.shape)
        # What was selected by the mask, or packed, has no padding.
        is_selected = x.ndim == 2 and len(x) <= mask.numel()
        if fitted is None and not is_selected and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"`mask` gave {tuple(mask.shape)}, which does not fit what layer {name!r} receives, {tuple(x.shape)}: "
                "without padding there are no statistics of it, nor of others that the mask does not fit. It fits "
                "(N, C, *positions) as (N, *positions), (N, 1, ...) or (N,), and (N, C) as any of N positions in all. "
                "Where layers need several, or none, return them by name: {'encoder.*': mask, 'decoder.*': other}.",
                stacklevel=3,
            )
        return fitted


def fitted_mask(mask: Tensor, shape: Sequence[int]) -> Tensor | None:
    """A mask as it fits an input of this shape, ``(N, *positions)`` or 1 in their place; None if it does not."""
    num, _, *positions = shape
    samples, *own = mask.shape
    if num == samples:
        if not positions:
            return mask.flatten(1).any(1) if own else mask
        if not own:
            return mask.view(num, *[1] * len(positions))
        if len(own) != len(positions):
            return None
        for dim, (size, wanted) in enumerate(zip(own, positions, strict=True), start=1):
            if size not in (1, wanted):
                middles = (2 * torch.arange(wanted, device=mask.device) + 1) * size // (2 * wanted)
                mask = mask.index_select(dim, middles)
        return mask
    return mask.reshape(num, *[1] * len(positions)) if num == math.prod(mask.shape) else None


def _by_pattern(masks: Masks) -> Mapping[str, Tensor | None]:
    if isinstance(masks, Mapping):
        return {pattern: None if mask is None else _checked(mask) for pattern, mask in masks.items()}
    return {"*": None if masks is None else _checked(masks)}


def _checked(mask: object) -> Tensor:
    """A mask as bool. Raises TypeError of anything else that says which positions count, or may not say that."""
    if isinstance(mask, Tensor) and mask.ndim and (mask.dtype is torch.bool or _is_of_integers(mask)):
        return mask.bool()
    got = f"{tuple(mask.shape)} of {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
    raise TypeError(
        "`mask` must return a bool tensor (B, *positions), True where a position counts; such tensors by the names of "
        f"layers; or None. Got {got}. From lengths: `torch.arange(x.shape[-1], device=x.device) < lengths[:, None]`."
    )


def _is_of_integers(mask: Tensor) -> bool:
    """Whether it is 0 and 1 in integers, as tokenizers make them; ``(B,)`` would rather be lengths."""
    return mask.ndim > 1 and not mask.is_floating_point() and not mask.is_complex()
