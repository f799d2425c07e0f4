"""What sits on a model while it is monitored, how it gets there and how it is all removed again.

Hooks only. They change nothing, and copies of the model (deep copies, pickles) carry inert ones.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_bnmonitor.capture.guard import BeforeCall, BeforeState, Guard
from lightning_bnmonitor.capture.hooks import Hook
from lightning_bnmonitor.capture.layer_hook import Gate, LayerHook
from lightning_bnmonitor.capture.masked_calls import MaskHook
from lightning_bnmonitor.capture.model_inputs import InputHook
from lightning_bnmonitor.compat import (
    COMPILER_SETTINGS,
    COMPILES_CHECKPOINTS,
    BatchNorm,
    before_state_dict,
    change_compiler_settings,
    compiled_call,
    forget_compiled_code,
    has_compiled_forward,
    is_capturing,
    is_dynamo_compiling,
    set_compiled_call,
    uncompiled,
    uses_checkpointing,
    what_is_missing,
)


class Attachment:
    """All that one tracker has put on a model, from its creation until :meth:`remove`.

    Args:
        model: The root.
        gate: Counts the steps.
        hooks: The BatchNorm layers and their hooks.
        mask_hooks: Further ones of these layers, where masks tell what counts.
        see: Told of what ``model`` is given, before each call.
        drain: Called after each call of a compiled module in ``model``.
        after_step: Called after a step of one of the model's optimizers if there is more to do than to count it.
        guard: What keeps running statistics free of NaN and Inf; None if nothing does.

    Raises:
        RuntimeError: If hooks would change what this model is trained to, which they do before torch 2.10 where it is
            compiled and uses activation checkpointing.
    """

    def __init__(
        self,
        model: nn.Module,
        gate: Gate,
        hooks: Mapping[BatchNorm, LayerHook],
        mask_hooks: Mapping[BatchNorm, MaskHook],
        see: Callable[[object], None],
        drain: Callable[[], None],
        after_step: Callable[[], None],
        guard: Guard | None = None,
    ) -> None:
        _check_version(model)
        self._handles: list[Any] = []
        self._drained: list[tuple[weakref.ref[nn.Module], _DrainedCall]] = []
        CompilerSettings.acquire()
        forget_compiled_code()  # of this model or another of the same class, as it does not look for our hooks
        for layer, hook in hooks.items():
            self._handles.append(layer.register_forward_hook(hook, with_kwargs=True))
            if guard is not None:
                self._handles.append(layer.register_forward_pre_hook(BeforeCall(guard, layer), with_kwargs=True))
                self._handles.append(before_state_dict(layer, BeforeState(guard)))
        for layer, mask_hook in mask_hooks.items():
            self._handles.append(layer.register_forward_hook(mask_hook, with_kwargs=True))
        if compiled_call(model) is None:
            self._handles.append(model.register_forward_pre_hook(InputHook(see), with_kwargs=True))
        for module in model.modules():
            before = None if guard is None else BeforeCall(guard, uncompiled(module))
            if has_compiled_forward(module):
                self._handles.append(module.register_forward_hook(_DrainHook(drain)))
                if before is not None:
                    self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            if (compiled := compiled_call(module)) is not None:
                call = _DrainedCall(compiled, see if module is model else None, drain, before)
                set_compiled_call(module, call)
                self._drained.append((weakref.ref(module), call))
        # These are not the model's, and would outlive it and a tracker that is dropped while attached.
        step_hook = register_optimizer_step_post_hook(_after_step(gate, after_step))
        self._release = weakref.finalize(self, _release, step_hook)
        self._release.atexit = False

    def remove(self) -> None:
        """Remove everything. Harmless when repeated."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for reference, call in self._drained:
            module = reference()
            if module is not None and compiled_call(module) is call:
                set_compiled_call(module, call.compiled)
        self._drained.clear()
        self._release()


def _check_version(model: nn.Module) -> None:
    """Refuse what this version of torch cannot do, and tell what it does otherwise."""
    modules = list(model.modules())
    is_compiled = any(has_compiled_forward(module) or compiled_call(module) is not None for module in modules)
    if is_compiled and not COMPILES_CHECKPOINTS and uses_checkpointing(modules):
        raise RuntimeError(
            f"torch {torch.__version__} trains a compiled model with activation checkpointing otherwise while hooks "
            "are on its layers. Switch one of the two off, use torch 2.10 or later, or train without the monitor."
        )
    for sentence in what_is_missing():
        warnings.warn(sentence, stacklevel=4)


def _release(step_hook: Any) -> None:
    step_hook.remove()
    CompilerSettings.release()


class _DrainHook(Hook):
    """Runs eagerly after each call of a compiled module, so that the next one finds its tuples empty again."""

    def __init__(self, drain: Callable[[], None]) -> None:
        self.drain = drain

    def __call__(self, *_: Any) -> None:
        if not is_dynamo_compiling():  # which it is where this is within another compiled module
            self.drain()


class _DrainedCall:
    """The same for ``module.compile()``, which compiles the module's hooks too."""

    def __init__(
        self,
        compiled: Callable[..., Any],
        see: Callable[[object], None] | None,
        drain: Callable[[], None],
        before: BeforeCall | None,
    ) -> None:
        self.compiled = compiled
        self.see = see
        self.drain = drain
        self.before = before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            self.before(self.before.module, args, kwargs)
        if self.see is not None and not is_dynamo_compiling():
            self.see((args, kwargs))
        try:
            return self.compiled(*args, **kwargs)
        finally:
            if not is_dynamo_compiling():
                self.drain()


def _after_step(gate: Gate, merge: Callable[[], None]) -> Callable[..., None]:
    """What ``torch.optim`` calls after a step of any optimizer, of whatever model: a good time to merge what waits."""
    reference = weakref.WeakMethod(merge)

    def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if is_dynamo_compiling():
            return
        gate.end_part()
        root = gate.root()
        if root is not None and not root.training and _updates(optimizer, root):
            gate.steps_in_eval_mode += 1
        is_due = (gate.is_full or gate.is_traced or gate.is_guarded) and not is_capturing()
        if is_due and (alive := reference()) is not None:
            alive()

    return after_step


def _updates(optimizer: torch.optim.Optimizer, model: nn.Module) -> bool:
    """Whether an optimizer has parameters of this model."""
    own = {id(parameter) for parameter in model.parameters()}
    return any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])


class CompilerSettings:
    """Dynamo's settings while anything is attached to any model: see :data:`~..compat.COMPILER_SETTINGS`."""

    users: ClassVar[int] = 0
    before: ClassVar[dict[str, bool]] = {}

    @classmethod
    def acquire(cls) -> None:
        """Change them if nobody has."""
        if cls.users == 0:
            cls.before = change_compiler_settings(COMPILER_SETTINGS)
        cls.users += 1

    @classmethod
    def release(cls) -> None:
        """Write them back if nobody needs them any more."""
        cls.users -= 1
        if cls.users == 0:
            change_compiler_settings(cls.before)
