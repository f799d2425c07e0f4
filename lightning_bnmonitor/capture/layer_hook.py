"""What sits on a model while it is monitored, how it gets there and how it is all removed again.

Forward hooks only. They change nothing, and copies of the model (deep copies, pickles) carry inert ones.
"""

from __future__ import annotations

import itertools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeGuard

import torch
import torch._dynamo
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.compiler import is_dynamo_compiling
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_bnmonitor.capture.batch_moments import (
    BatchMoments,
    is_intercepted,
    pass_moments,
    saved_moments,
    top_saved_tensor_hooks,
    traced_moments,
)
from lightning_bnmonitor.capture.calls import UNKNOWN, Call, Kind, kind_of, usual_of

STASH_LIMIT = 72
"""Most calls of a layer that may wait for the next update."""
_current_backward = torch._C._current_graph_task_id
_tracing_state = torch._C._get_tracing_state
_functorch_is_active = torch._C._are_functorch_transforms_active
_call_counter = itertools.count()


class Gate:
    """Whether calls count: while the root module is in training mode, nobody has paused, and the window is open."""

    def __init__(self, root: nn.Module) -> None:
        self.validating = False  # whether calls in eval mode are looked at
        self.root = weakref.ref(getattr(root, "_orig_mod", root))  # a compiled module has no mode of its own
        self.paused = 0  # pauses that are in force
        self.is_closed = False  # whether the window has ended
        self.steps = 0  # training steps that have ended
        self.is_full = False  # whether as many calls of a layer wait as may
        self.is_traced = False  # whether compiled graphs may have left anything behind
        # Replicas of a model may be called in several threads. They need no lock to append to a list.
        self.lock = threading.RLock()


class _Hook:
    """A hook whose copies do nothing: a copied model is not monitored, and a pickled one does not carry the tracker."""

    def __deepcopy__(self, memo: dict[int, Any]) -> InertHook:
        return InertHook()

    def __reduce__(self) -> tuple[type[InertHook], tuple[()]]:
        return InertHook, ()


class InertHook:
    """What copies of a monitored model carry in the place of our hooks."""

    def __call__(self, *_: Any) -> None:
        """Do nothing."""


class LayerHook(_Hook):
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
        self.room = STASH_LIMIT  # calls that may wait with moments in float32
        self.is_wide = False  # whether there are some in float64, as the mean of a pass is
        self.usual = UNKNOWN  # the last call, if another like it may go the short way
        self.by_pass = False
        self.skipped = 0  # calls that cannot be looked at
        self.first_call = -1  # the earlier the layer was called for the first time, the smaller
        self.checkpointed = (
            False  # whether a call may have been recomputed (or was), with another update of the buffers
        )
        # A compiled graph may not append to a list (that recompiles at every call), but it may leave a tuple behind
        # that it found empty.
        self.traced: tuple[tuple[BatchMoments, bool, bool], ...] = ()
        self.traced_validation: tuple[BatchMoments, ...] = ()
        self.validation_room = 0  # calls in validation that are still to be looked at

    @property
    def limit(self) -> int:
        """Calls that may wait."""
        return self.room // 2 if self.is_wide else self.room

    def make_room(self, calls: int) -> None:
        """Let so many calls wait from now on, half as many in float64."""
        if calls != self.room:
            self.room = calls
            self.look_closer()

    def look_closer(self) -> None:
        """Let the next call go the long way."""
        self.usual = UNKNOWN

    @property
    def by_pass(self) -> bool:
        """Whether moments are taken by a pass over the input, whatever the kernel saved."""
        return self._by_pass

    @by_pass.setter
    def by_pass(self, by_pass: bool) -> None:
        self._by_pass = by_pass
        self.look_closer()

    def __call__(self, module: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The forward hook."""
        gate = self.gate
        root = gate.root()
        if root is not None and not root.training:
            if gate.validating and not gate.paused:
                self._look_at_validation(module, args[0] if args else _by_keyword(kwargs))
            return
        x = args[0] if args else _by_keyword(kwargs)
        if is_dynamo_compiling():
            if _has_channels(x, module) and not torch.compiler.is_exporting():
                updating = module.training and module.track_running_stats and module.running_mean is not None
                self.traced += ((traced_moments(x), module.training, updating),)
                gate.is_traced = True
            return
        # Within a backward pass: activation checkpointing recomputes a call that was counted when it was made.
        if _current_backward() != -1:
            self.checkpointed = True
            return
        # The same as above: but `module.running_mean` takes as long as the rest, as modules look up their buffers last.
        has_stats = module.track_running_stats and (
            module._buffers.get("running_mean") is not None or module.running_mean is not None
        )
        # What follows finds the processor's caches cold: it takes as long as it touches memory. So a call that is like
        # the last one (the same shape and kernel) makes no function call in Python, and is checked for no more than can
        # have changed since. All others go the long way, which tells the same of it.
        limit, shape, node_type, contiguous, nbytes, eps, momentum, training, updating, plain, kind = self.usual
        stash = self.stash
        if (
            len(stash) < limit
            and _tracing_state() is None
            and output.__class__ is Tensor
            and output.shape == shape
            and (node := output.grad_fn).__class__ is node_type
            and module.training is training
            and (training and has_stats) is updating
            and module.eps == eps
            and module.momentum == momentum
            and (contiguous is None or (x.__class__ is Tensor and x.is_contiguous() is contiguous))
            and top_saved_tensor_hooks(True) is None
            and not _functorch_is_active()
            and (
                (module.__class__ is plain and "forward" not in module.__dict__ and not module._forward_pre_hooks)
                or node._raw_saved_result1.unpack_hook is None  # type: ignore[union-attr]
            )
        ):
            saved: Any = node
            mean, spread = saved._saved_result1, saved._saved_result2
            if mean.nbytes == nbytes and not mean.is_meta:
                stash.append((mean, spread, gate.steps, kind))
                if len(stash) >= limit:
                    gate.is_full = True
                return
        self._take(module, x, output, module.training and has_stats)

    def _take(self, module: _BatchNorm, x: object, output: object, updating: bool) -> None:
        """A call that is not like the last one."""
        if self.gate.paused or self.gate.is_closed or torch.compiler.is_exporting():
            return
        if _is_abstract(x) or not _has_channels(x, module):
            self.skipped += 1
            return
        try:
            moments = None if self.by_pass else saved_moments(module, x, output)
            if moments is None and x.numel():
                self.checkpointed |= is_intercepted(output)
                moments = pass_moments(x)
        except Exception as error:
            self._leave_out(module, error)
            return
        kind = self.receive(module, moments, module.training, updating)
        self.usual = UNKNOWN if kind is None else usual_of(kind, self.limit, module, x, output)

    def _look_at_validation(self, module: _BatchNorm, x: object) -> None:
        if torch.compiler.is_compiling():
            if _has_channels(x, module) and not torch.compiler.is_exporting():
                self.traced_validation += (traced_moments(x),)
                self.gate.is_traced = True
        elif self.validation_room and not _is_abstract(x) and _has_channels(x, module) and x.numel():
            try:
                moments = pass_moments(x)
            except Exception as error:
                self._leave_out(module, error)
                return
            self.validate(moments)

    def _leave_out(self, module: _BatchNorm, error: Exception) -> None:
        """What cannot be had (memory that a pass over the input does not find) is no reason not to train."""
        if not self.skipped:
            warnings.warn(f"The moments of a call of {type(module).__name__} are left out: {error!r}", stacklevel=3)
        self.skipped += 1

    def receive(self, module: _BatchNorm, moments: BatchMoments | None, training: bool, updating: bool) -> Kind | None:
        """Take the moments of one call, None of an empty batch. Returns of what kind it was."""
        if moments is None:
            self.receive_empty(updating)
            return None
        if self.first_call < 0:
            self.first_call = next(_call_counter)
        if moments.mean.dtype is torch.float64 and not self.is_wide:
            self.is_wide = True
            self.look_closer()
        if len(self.stash) >= self.limit:
            self.flush()
        kind = kind_of(moments, module, training, updating)
        self.stash.append((moments.mean, moments.spread, self.gate.steps, kind))
        if len(self.stash) >= self.limit:
            self.gate.is_full = True
        return kind


def _by_keyword(kwargs: dict[str, Any]) -> Any:
    """The input among keyword arguments: by the names that it has as a rule, or else the first."""
    for name in ("input", "x"):
        if name in kwargs:
            return kwargs[name]
    return next(iter(kwargs.values()), None)


def _has_channels(x: object, module: _BatchNorm) -> TypeGuard[Tensor]:
    """Whether ``x`` is ``(N, C, *)``: a subclass may take anything else, and rearrange it for the kernel."""
    return isinstance(x, Tensor) and x.ndim >= 2 and x.shape[1] == module.num_features


def _is_abstract(x: object) -> bool:
    """Whether ``x`` has no values of its own: within a transform of ``torch.func``, while tracing, or if it is fake."""
    is_transformed = _functorch_is_active() or _tracing_state() is not None
    return is_transformed or isinstance(x, FakeTensor) or (isinstance(x, Tensor) and x.is_meta)


# Where a graph breaks at a layer, its hook runs eagerly, and what that calls may be compiled, to which all is abstract.
torch._dynamo.eval_frame.skip_code(_is_abstract.__code__)


class _DrainHook(_Hook):
    """Runs eagerly after each call of a compiled module, so that the next one finds its tuples empty again."""

    def __init__(self, drain: Callable[[], None]) -> None:
        self.drain = drain

    def __call__(self, *_: Any) -> None:
        self.drain()


class _DrainedCall:
    """The same for ``module.compile()``, which compiles the module's hooks too."""

    def __init__(self, compiled: Callable[..., Any], drain: Callable[[], None]) -> None:
        self.compiled = compiled
        self.drain = drain

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.compiled(*args, **kwargs)
        finally:
            self.drain()


class Attachment:
    """All that one tracker has put on a model, from its creation until :meth:`remove`.

    Args:
        model: The root.
        gate: Counts the steps.
        hooks: The BatchNorm layers and their hooks.
        drain: Called after each call of a compiled module in ``model``.
        after_step: Called after a step of any ``torch.optim`` optimizer if there is more to do than to count it.
    """

    def __init__(
        self,
        model: nn.Module,
        gate: Gate,
        hooks: Mapping[_BatchNorm, LayerHook],
        drain: Callable[[], None],
        after_step: Callable[[], None],
    ) -> None:
        self._handles: list[Any] = []
        self._drained: list[tuple[weakref.ref[nn.Module], _DrainedCall]] = []
        _CompilerSettings.acquire()
        if torch._dynamo.convert_frame.input_codes.seen:
            # What was compiled before, from this model or from another of the same class, does not look for our hooks.
            torch._dynamo.reset()
        for layer, hook in hooks.items():
            self._handles.append(layer.register_forward_hook(hook, with_kwargs=True))
        for module in model.modules():
            if isinstance(module, torch._dynamo.OptimizedModule) or "forward" in _compiled_callables(module):
                self._handles.append(module.register_forward_hook(_DrainHook(drain)))
            if module._compiled_call_impl is not None:
                call = _DrainedCall(module._compiled_call_impl, drain)
                module._compiled_call_impl = call
                self._drained.append((weakref.ref(module), call))
        # These are not the model's, and would outlive it and a tracker that is dropped while attached.
        step_hook = register_optimizer_step_post_hook(_after_step(gate, after_step))
        self._release = weakref.finalize(self, _release, step_hook)
        self._release.atexit = False

    def remove(self) -> None:
        """Remove everything. Harmless when repeated."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for reference, call in self._drained:
            module = reference()
            if module is not None and module._compiled_call_impl is call:
                module._compiled_call_impl = call.compiled
        self._drained.clear()
        self._release()


def _release(step_hook: Any) -> None:
    step_hook.remove()
    _CompilerSettings.release()


class _CompilerSettings:
    """What ``torch.compile`` must do differently while anything is attached.

    - Look for changed hooks: by default compiled code does not, and hooks that were registered again, or on a model
      that was compiled after an unmonitored one of the same class, record nothing, silently.
    - Let a function under activation checkpointing leave its tuple behind: by default that breaks the graph, and the
      checkpointed part then runs eagerly, where it updates the buffers twice. What is left behind is that of the first
      forward alone, as it should be.
    """

    SETTINGS: ClassVar[dict[str, bool]] = {
        "skip_nnmodule_hook_guards": False,
        "skip_fwd_side_effects_in_bwd_under_checkpoint": True,
    }
    users: ClassVar[int] = 0
    previous: ClassVar[dict[str, bool]] = {}

    @classmethod
    def acquire(cls) -> None:
        if cls.users == 0:
            for name, value in cls.SETTINGS.items():
                cls.previous[name] = getattr(torch._dynamo.config, name)
                setattr(torch._dynamo.config, name, value)
        cls.users += 1

    @classmethod
    def release(cls) -> None:
        cls.users -= 1
        if cls.users == 0:
            for name, value in cls.previous.items():
                setattr(torch._dynamo.config, name, value)


def _after_step(gate: Gate, callback: Callable[[], None]) -> Callable[..., None]:
    reference = weakref.WeakMethod(callback)

    def after_step(*_: Any) -> None:
        if is_dynamo_compiling():
            return
        if not gate.is_full and not gate.is_traced:
            gate.steps += 1  # all there is to it, as a rule
        elif (alive := reference()) is not None:
            alive()

    return after_step


def _compiled_callables(module: nn.Module) -> list[str]:
    """Names under which a module holds compiled code: itself, by ``module.compile()``, or as methods replaced by it."""

    def names() -> Iterator[str]:
        if isinstance(module, torch._dynamo.OptimizedModule):
            yield "forward"
            return
        for name, value in vars(module).items():
            if value is not None and (name == "_compiled_call_impl" or hasattr(value, "_torchdynamo_orig_callable")):
                yield name

    return list(names())
