"""What the forward hook of a BatchNorm layer does: it keeps the moments of each call that counts, and little else."""

from __future__ import annotations

import itertools
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from lightning_bnmonitor.capture.batch_moments import BatchMoments, pass_moments, traced_moments
from lightning_bnmonitor.capture.calls import Call, CallKind, Signature, kind_of, settings_of, signature_of
from lightning_bnmonitor.capture.hooks import Hook
from lightning_bnmonitor.capture.hooks import InertHook as InertHook  # of modules that were pickled with it here
from lightning_bnmonitor.capture.saved import (
    at_end_of,
    is_intercepted,
    is_made_without_kernel,
    kernel_behind,
    saved_moments,
)
from lightning_bnmonitor.compat import (
    BUFFERS,
    FORWARD_PRE_HOOKS,
    SAVED_INVSTD,
    SAVED_MEAN,
    BatchNorm,
    current_backward,
    functorch_is_active,
    is_abstract,
    is_compiling,
    is_dynamo_compiling,
    is_exporting,
    is_stream_capturing,
    never_compiled,
    normalises_by_batch,
    top_saved_tensor_hooks,
    tracing_state,
    uncompiled,
    unpack_hook_of_mean,
)

STASH_LIMIT = 72
"""Most calls of a layer that may wait for the next update."""
_call_counter = itertools.count()
_PART = 16  # a mark has the number of a group, of at most 9, below this


class Gate:
    """Whether calls count: while the root module is in training mode, nobody has paused, and the window is open."""

    def __init__(self, root: nn.Module) -> None:
        self.validating = False  # whether calls in eval mode are looked at
        self.is_validation_new = False  # whether none of it was looked at yet
        self.root = weakref.ref(uncompiled(root))  # a compiled module has no mode of its own
        self.paused = 0  # pauses that are in force
        self.is_closed = False  # whether the window has ended
        self.steps = 0  # training steps that have ended
        self.mark = 0  # what a call is kept with: see `parts`, and the number of its batch's group
        self.parts_before = 0  # those of the steps that have ended
        self.has_groups = False  # whether batches were ever said to be of groups
        self.steps_in_eval_mode = 0  # of the root's optimizers in this window while the root was in eval mode
        self.has_stepped = False  # whether an optimizer has stepped in this window
        self.is_full = False  # whether as many calls of a layer wait as may
        self.is_guarded = False  # whether running statistics are to be checked after each part of a step
        self.has_warned_of_graph = False  # that is captured
        self.is_traced = False  # whether compiled graphs may have left anything behind
        # Replicas of a model may be called in several threads. They need no lock to append to a list.
        self.lock = threading.RLock()

    @property
    def parts(self) -> int:
        """Parts of training steps that have ended, times 16: at a step of an optimizer the weights change."""
        return parts_of(self.mark)

    def begin_group(self, number: int) -> None:
        """What is called until the step ends is of a batch of this group; 0: of none."""
        self.has_groups |= number > 0
        self.mark = self.parts + number

    def end_part(self) -> None:
        """A part of a training step has ended, with an optimizer's step."""
        self.mark += _PART
        self.has_stepped = True

    def end_step(self) -> None:
        """A training step has ended."""
        self.steps += 1
        self.parts_before = self.mark = self.parts + _PART


def parts_of(mark: int) -> int:
    """Of what a call is kept with, the parts of training steps that had ended, times 16."""
    return mark & -_PART


def group_of(mark: int) -> int:
    """Of what a call is kept with, the number of its batch's group; 0: of none."""
    return mark % _PART


class LayerHook(Hook):
    """Takes the batch moments of one BatchNorm layer, in as little time as can be: all else waits for the next update.

    Args:
        gate: Tells whether a call counts.
        flush: Called before a call that would make more than :attr:`limit` wait.
        receive_empty: Called of an empty batch, with whether BatchNorm counted it in ``num_batches_tracked``.
        validate: Called with the batch moments of calls that are made while the root is in eval mode.
    """

    def __init__(
        self,
        gate: Gate,
        flush: Callable[[], None],
        receive_empty: Callable[[bool], None],
        validate: Callable[[BatchMoments], None],
    ) -> None:
        self.gate = gate
        self.flush = flush
        self.receive_empty = receive_empty
        self.validate = validate
        self.stash: list[Call] = []  # always the same list: threads append to it while others look
        self.last_call: tuple[Signature, CallKind] | None = None  # if another that is like it may go the short way
        self.may_be_repeated = False  # whether a call recorded no graph: a backward pass may make it again
        self.room = STASH_LIMIT  # calls that may wait with moments in float32
        self.is_wide = False
        self.by_pass = False
        self._has_warned = False  # of a call that could not be measured
        self.skipped = 0  # calls that cannot be looked at
        self.trained_in_validation = False  # whether a call in validation has updated the running statistics
        self.calls_in_eval_mode = 0  # those with gradients while the root was in eval mode
        self.first_call = -1  # the earlier the layer was called for the first time, the smaller
        self.own_forward: bool | None = None  # whether outputs are made without a BatchNorm kernel; None if not known
        self.recomputed = 0  # calls that were to update and were made again in a backward pass
        self.checkpointed = False  # whether a call was (or may be) recomputed, which updates the buffers once more
        # A compiled graph may not append to a list (that recompiles at every call), but it may leave a tuple behind
        # that it found empty.
        self.traced: tuple[tuple[BatchMoments, bool, bool], ...] = ()
        self.traced_validation: tuple[BatchMoments, ...] = ()
        self.traced_in_eval_mode: tuple[None, ...] = ()  # one for each call with gradients
        self.last_traced: tuple[tuple[Any, ...], CallKind] | None = None

    @property
    def is_wide(self) -> bool:
        """Whether moments in float64 may wait, as the mean of a pass is: there is room for half as many."""
        return self._is_wide

    @is_wide.setter
    def is_wide(self, is_wide: bool) -> None:
        self._is_wide = is_wide
        self.make_room(self.room)

    def make_room(self, calls: int) -> None:
        """Let so many calls wait from now on, half as many in float64."""
        self.room = calls
        self.limit = calls // 2 if self._is_wide else calls  # calls that may wait now

    @property
    def by_pass(self) -> bool:
        """Whether moments are taken by a pass over the input, whatever the kernel saved."""
        return self._by_pass

    @by_pass.setter
    def by_pass(self, by_pass: bool) -> None:
        self._by_pass = by_pass
        self.forget_last_call()

    def forget_last_call(self) -> None:
        """Let the next call go the long way, which asks for all that the short way takes to be as it was."""
        self.last_call = None

    def __call__(self, module: BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The forward hook."""
        gate = self.gate
        root = gate.root()
        if root is not None and not root.training:
            if gate.validating and not gate.paused:
                self._look_at_validation(module, args[0] if args else by_keyword(kwargs))
            if torch.is_grad_enabled():
                self._count_in_eval_mode()
            return
        x = args[0] if args else by_keyword(kwargs)
        if is_dynamo_compiling():
            if has_channels(x, module) and not is_exporting():
                updating = module.training and module.track_running_stats and module.running_mean is not None
                self.traced += ((traced_moments(x), module.training, updating),)
                gate.is_traced = True
            return
        # What follows finds the processor's caches cold: it takes as long as it touches memory. So a call that is like
        # the last one (the same shape and kernel) makes no function call in Python, and is checked for no more than can
        # have changed since. All others go the long way, which tells the same of it. `module.running_mean` would take
        # as long as the rest: modules look up their buffers last, and all else of theirs slowly, too.
        attributes, last, stash, limit = module.__dict__, self.last_call, self.stash, self.limit
        if last is not None and len(stash) < limit and tracing_state() is None and output.__class__ is Tensor:
            settings, running_mean, on_cuda, shape, node_type, contiguous, plain, way = last[0]
            if (
                output.shape == shape
                and (node := output.grad_fn).__class__ is node_type
                and attributes[BUFFERS].get("running_mean") is running_mean
                and settings_of(attributes) == settings
                and (contiguous is None or (x.__class__ is Tensor and x.is_contiguous() is contiguous))
                and top_saved_tensor_hooks(True) is None
                and not functorch_is_active()
                and (not self.may_be_repeated or current_backward() == -1)
                and not (on_cuda and is_stream_capturing())
                and (
                    (
                        module.__class__ is plain
                        and "forward" not in attributes
                        and (
                            not attributes[FORWARD_PRE_HOOKS]
                            or (gate.is_guarded and len(attributes[FORWARD_PRE_HOOKS]) == 1)  # the guard's
                        )
                    )
                    or (
                        (node := at_end_of(way, node, module, getattr(x, "grad_fn", None))) is not None
                        and unpack_hook_of_mean(node) is None
                    )
                )
            ):
                mean, spread = getattr(node, SAVED_MEAN), getattr(node, SAVED_INVSTD)
                if plain is not None or len(mean):  # there are none if a `forward` of its own has told the kernel so
                    stash.append((mean, spread, gate.mark, last[1]))
                    if len(stash) >= limit:
                        gate.is_full = True
                    return
        self._take(module, x, output)

    # Where a graph breaks at a layer, its hook runs eagerly, but what that calls would be compiled, as abstract values.
    @never_compiled
    def _take(self, module: BatchNorm, x: object, output: object) -> None:
        """A call that is not like the last one."""
        updating = module.training and module.track_running_stats and module.running_mean is not None
        # Within a backward pass: activation checkpointing makes a call again that was counted when it was made.
        if current_backward() != -1:
            self.checkpointed = True
            self.recomputed += updating and not (self.gate.paused or self.gate.is_closed)
            return
        if self.gate.validating and updating and not self.gate.paused:
            self.trained_in_validation = True
        if self.gate.paused or self.gate.is_closed or is_exporting():
            return
        if is_abstract(x) or not has_channels(x, module):
            self.skipped += 1
            return
        if x.is_cuda and is_stream_capturing():
            self._tell_of_graph()
            self.skipped += 1
            return
        try:
            kernel = kernel_behind(module, x, output)
            # A `forward` of its own may normalise by the running statistics in training mode, too.
            by_batch = module.training and (kernel is None or normalises_by_batch(kernel.node))
            if kernel is None and module.training and self.own_forward is None:
                self.own_forward = is_made_without_kernel(module, x, output)
            moments = None if self.by_pass else saved_moments(module, x, kernel)
            intercepted = moments is None and x.numel() > 0 and is_intercepted(kernel)
            self.checkpointed |= intercepted
            if moments is None and x.numel():
                moments = pass_moments(x)
        except Exception as error:
            self._warn_of(module, error)
            self.skipped += 1
            return
        last = None
        if moments is None:
            self.receive_empty(updating)
        else:
            kind = kind_of(moments, module, by_batch, updating, intercepted)
            signature = None if kernel is None else signature_of(kind, module, x, output, kernel)
            last = None if signature is None else (signature, kind)
            self.may_be_repeated |= not torch.is_grad_enabled()
            self._keep(moments, kind)
        self.last_call = last

    def _count_in_eval_mode(self) -> None:
        if is_dynamo_compiling():
            if not is_exporting():
                self.traced_in_eval_mode += (None,)
                self.gate.is_traced = True
        elif not (self.gate.paused or self.gate.is_closed):
            self.calls_in_eval_mode += 1

    def _look_at_validation(self, module: BatchNorm, x: object) -> None:
        if not is_compiling():
            self._take_in_validation(module, x)
        elif has_channels(x, module) and not is_exporting():
            self.traced_validation += (traced_moments(x),)
            self.gate.is_traced = True

    @never_compiled
    def _take_in_validation(self, module: BatchNorm, x: object) -> None:
        if not is_abstract(x) and has_channels(x, module) and x.numel() and not (x.is_cuda and is_stream_capturing()):
            try:
                moments = pass_moments(x)
            except Exception as error:
                self._warn_of(module, error)
                return
            if module.training and module.track_running_stats and module.running_mean is not None:
                self.trained_in_validation = True
            self.validate(moments)

    def _warn_of(self, module: BatchNorm, error: Exception) -> None:
        """What cannot be measured (memory that a pass over the input does not find) is no reason not to train."""
        if not self._has_warned:
            warnings.warn(f"The moments of a call of {type(module).__name__} are left out: {error!r}", stacklevel=3)
        self._has_warned = True

    def _tell_of_graph(self) -> None:
        """The kernels of a CUDA graph run again without Python, and write over what they had saved."""
        if not self.gate.has_warned_of_graph:
            warnings.warn(
                "A CUDA graph is being captured: its replays run no hooks, so that what BatchNorm layers receive in "
                "them is not counted. `torch.compile(mode='reduce-overhead')` has CUDA graphs that are.",
                stacklevel=4,
            )
        self.gate.has_warned_of_graph = True

    def receive(self, module: BatchNorm, training: bool, updating: bool, moments: BatchMoments) -> None:
        """Take the moments of a call, or of an empty batch, that compiled code has left behind."""
        if not moments.num_samples:
            self.receive_empty(updating)
            return
        last = self.last_traced  # as a rule, the next one is the same in all of it
        asked = training, updating, module.momentum, moments.num_samples, moments.batch_size, moments.mean.nbytes
        if last is None or asked != last[0]:
            self.last_traced = last = asked, kind_of(moments, module, training, updating)
        self._keep(moments, last[1])

    def _keep(self, moments: BatchMoments, kind: CallKind) -> None:
        if self.first_call < 0:
            self.first_call = next(_call_counter)
        if moments.mean.dtype is torch.float64 and not self.is_wide:
            self.is_wide = True
        if len(self.stash) >= self.limit:
            self.flush()
        self.stash.append((moments.mean, moments.spread, self.gate.mark, kind))
        if len(self.stash) >= self.limit:
            self.gate.is_full = True


def by_keyword(kwargs: dict[str, Any]) -> Any:
    """The input among keyword arguments: by the names that it has as a rule, or else the first."""
    for name in ("input", "x"):
        if name in kwargs:
            return kwargs[name]
    return next(iter(kwargs.values()), None)


def has_channels(x: object, module: BatchNorm) -> TypeGuard[Tensor]:
    """Whether ``x`` is ``(N, C, *)``: a subclass may take anything else, and rearrange it for the kernel."""
    return isinstance(x, Tensor) and x.ndim >= 2 and x.shape[1] == module.num_features
