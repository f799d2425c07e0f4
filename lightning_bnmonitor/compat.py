"""Every private or version-dependent name of torch, its compiler and Lightning that this package uses, and why.

No other file touches one. "From 2.10" tells where a name appeared, or from where on it does what we need. The names
without a version are older than torch 2.8, below which neither saved-tensor hooks within a layer nor calls in compiled
code can be told reliably.

A name that is gone from a later torch ends no run: what needs it is switched off, or done in a way that takes longer,
and :func:`what_is_missing` tells what that means, in one sentence a name.

What a hook needs at each call of a layer is torch's own C function, or the name of an attribute for ``getattr``: a
function in Python would cost more than what it hides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn
from torch.compiler import is_compiling as is_compiling
from torch.compiler import is_dynamo_compiling as is_dynamo_compiling
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

if TYPE_CHECKING:
    from torch.nn.modules import batchnorm

    BatchNorm = batchnorm._BatchNorm
else:
    BatchNorm = nn.BatchNorm1d.__base__
    """The base class of BatchNorm1d to 3d and SyncBatchNorm. There is no public one."""

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])

_missing: list[str] = []


def what_is_missing() -> list[str]:
    """What this torch lacks of what is used here, and what that means, a sentence each: what was not told before."""
    _look_at_a_kernel()
    told = [f"torch {torch.__version__} {sentence}" for sentence in _missing]
    _missing.clear()
    return told


def _private(path: str, otherwise: Any, without: str) -> Any:
    """A name in torch, or what does in its place, and what is then said."""
    try:
        return attrgetter(path)(torch)
    except AttributeError:
        _missing.append(f"has no `torch.{path}`: {without}")
        return otherwise


# ------------------------------------------------------------------------------------------------------ torch: modules

_module = vars(nn.Module())
BUFFERS = "_buffers" if "_buffers" in _module else "_modules"  # where none is found: it is then looked up as any other
"""Where a module's ``__dict__`` has its buffers. ``module.running_mean`` looks there last, which takes long."""
PARAMETERS = "_parameters" if "_parameters" in _module else "_modules"
"""Where it has its parameters, likewise."""
FORWARD_PRE_HOOKS = "_forward_pre_hooks"
"""Where a module's ``__dict__`` has what is called before its ``forward``, and may enter a context that this is in."""
HAS_PRE_HOOKS = FORWARD_PRE_HOOKS in _module
"""Whether it has."""
WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""Under which names ``torch.compile``, ``checkpoint_wrapper`` and FSDP hold the module that they wrap."""


def is_lazy(tensor: object) -> bool:
    """Whether a parameter or buffer (of ``LazyBatchNorm*``) has no shape yet."""
    return isinstance(tensor, UninitializedBuffer | UninitializedParameter)


def before_state_dict(module: nn.Module, hook: Callable[..., None]) -> Any:
    """Have a hook called before a module's ``state_dict`` is made. Public; typed here, as torch's own is not."""
    return module.register_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers of a module itself, to be replaced in place: setting an attribute would refuse some tensors."""
    buffers: dict[str, Tensor | None] = getattr(module, "_buffers", vars(module))
    return buffers


def _copy_each(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """What does in its place."""
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


copy_all: Callable[[Sequence[Tensor], Sequence[Tensor]], Any] = getattr(torch, "_foreach_copy_", _copy_each)
"""Copies tensors into others; torch's own takes few kernels for many of them."""


# ----------------------------------------------------------------------------------------------------- torch: autograd

SAVED_MEAN = "_saved_result1"
"""Where the node of a BatchNorm kernel has the batch mean that was saved for backward. To read it runs its hooks."""
SAVED_INVSTD = "_saved_result2"
"""Where it has the inverse standard deviation, (var + eps)^-1/2."""
HAS_UNPACK_HOOKS = hasattr(torch._C, "_autograd") and hasattr(
    getattr(torch._C._autograd, "SavedTensor", None), "unpack_hook"
)
"""Whether it can be told which hooks reading would run: from 2.10. Else only a layer with PyTorch's own ``forward``,
which enters no context, is known to have none."""
if not HAS_UNPACK_HOOKS and torch.__version__ >= "2.10":
    _missing.append(
        "does not tell which saved-tensor hooks would run: layers with a `forward` of their own are measured by a pass "
        "over their input, which takes longer."
    )
unpack_hook_of_mean: Callable[[Any], Any] = (
    attrgetter("_raw_saved_result1.unpack_hook") if HAS_UNPACK_HOOKS else attrgetter("__class__")
)
"""The saved-tensor hook that reading :data:`SAVED_MEAN` would run, or None. Without :data:`HAS_UNPACK_HOOKS`, never."""
top_saved_tensor_hooks: Callable[[bool], Any] = _private(
    "_C._autograd._top_saved_tensors_default_hooks",
    lambda _: (),
    "batch moments are taken by a pass over each layer's input, which takes longer.",
)
"""The saved-tensor hooks that are in force, or None. Given True, also while something traces."""
current_backward: Callable[[], int] = _private(
    "_C._current_graph_task_id",
    lambda: -1,
    "calls that activation checkpointing makes again in the backward pass count twice.",
)
"""Number of the backward pass that this is called within; -1 outside."""
functorch_is_active: Callable[[], bool] = _private(
    "_C._are_functorch_transforms_active",
    lambda: False,
    "calls within transforms of `torch.func` are not told from others.",
)
"""Whether a transform of ``torch.func`` is active: tensors then have no values of their own."""
tracing_state: Callable[[], Any] = _private(
    "_C._get_tracing_state", lambda: None, "calls within `torch.jit.trace` are not told from others."
)
"""What ``torch.jit.trace`` is at, or None."""


is_stream_capturing = torch.cuda.is_current_stream_capturing
"""Whether a CUDA graph is being captured. Public; without CUDA it raises an error."""


def is_capturing() -> bool:
    """The same anywhere."""
    has_device: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return has_device and is_stream_capturing()


Kernels = Literal["plain", "synchronised"] | None
_kernels: WeakKeyDictionary[type[Any], Kernels] = WeakKeyDictionary()  # classes of compiled code come and go


def batch_norm_kernel(node_type: type[Any]) -> Kernels:
    """Which BatchNorm kernel autograd nodes of this type belong to: PyTorch's own, or SyncBatchNorm's on several ranks.

    Known by the names of the classes, as each device has its own and they cannot be imported.
    """
    if node_type not in _kernels:
        is_plain = "BatchNorm" in node_type.__name__ and all(hasattr(node_type, name) for name in _saved_names())
        is_synchronised = node_type.__name__ == "SyncBatchNormBackward"
        _kernels[node_type] = "synchronised" if is_synchronised else "plain" if is_plain else None
    return _kernels[node_type]


def _saved_names() -> tuple[str, ...]:
    return (SAVED_MEAN, SAVED_INVSTD, *(("_raw_saved_result1",) if HAS_UNPACK_HOOKS else ()))


@cache
def _look_at_a_kernel() -> None:
    """Whether nodes of BatchNorm kernels have what is read off them, which no name tells before there is one."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(2, 1, device="cpu", requires_grad=True)
        node = nn.functional.batch_norm(x, None, None, training=True).grad_fn
    if batch_norm_kernel(type(node)) is None or shape_of_output(node) is None:
        _missing.append(
            "does not tell what a BatchNorm kernel has saved: batch moments are taken by a pass over each layer's "
            "input, which takes longer."
        )


def eps_of_kernel(node: Any, otherwise: float) -> float:
    """The ``eps`` of a BatchNorm kernel, which a ``forward`` of the layer's own may have chosen."""
    eps: float = getattr(node, "_saved_eps", getattr(node, "_saved_epsilon", otherwise))  # the second is cuDNN's
    return eps


batch_norm_stats: Callable[[Tensor, float], tuple[Tensor, Tensor]] | None = getattr(torch, "batch_norm_stats", None)
"""BatchNorm's own reduction on a GPU, undocumented: mean and (var + eps)^-1/2 per channel."""


def saved_by_synchronised(node: Any) -> tuple[Tensor, Tensor, dist.ProcessGroup]:
    """Mean and inverse standard deviation that SyncBatchNorm's node has saved, and over which ranks they were taken."""
    _, _, mean, invstd, _ = node.saved_tensors
    return mean, invstd, node.process_group


def has_unpack_hooks(node: Any) -> bool:
    """Whether reading what a BatchNorm kernel's node has saved would run saved-tensor hooks, or may do so."""
    if batch_norm_kernel(node.__class__) == "plain":
        return unpack_hook_of_mean(node) is not None
    return not HAS_UNPACK_HOOKS or any(tensor.unpack_hook is not None for tensor in node._raw_saved_tensors)


def normalises_by_batch(node: Any) -> bool:
    """Whether a BatchNorm kernel has normalised by its batch; no if by running statistics, as in eval mode."""
    return bool(getattr(node, "_saved_training", True))


def shape_of_output(node: Any) -> torch.Size | None:
    """The shape of what the operation of an autograd node has returned; None if it cannot be told."""
    described = getattr(node, "_input_metadata", None)  # of what the node receives, which is the gradient of that
    return torch.Size(described[0].shape) if described else None


def is_fake(tensor: object) -> bool:
    """Whether a tensor is what a compiler runs a model on to learn shapes. Known by the names of its classes."""
    return any(base.__name__ == "FakeTensor" for base in type(tensor).__mro__)


def is_abstract(x: object) -> bool:
    """Whether ``x`` has no values of its own: within a transform of ``torch.func``, while tracing, or if it is fake."""
    is_transformed = functorch_is_active() or tracing_state() is not None
    return is_transformed or is_fake(x) or (isinstance(x, Tensor) and x.is_meta)


# ----------------------------------------------------------------------------------------------------- torch: compiler
#
# is_compiling, is_dynamo_compiling: public; Dynamo knows them as constants, by which it leaves a branch out.

_SETTINGS: Mapping[str, bool] = {
    "skip_nnmodule_hook_guards": False,
    "skip_fwd_side_effects_in_bwd_under_checkpoint": True,
}
COMPILER_SETTINGS = {name: value for name, value in _SETTINGS.items() if hasattr(torch._dynamo.config, name)}
"""What ``torch.compile`` must do differently for hooks on a model's layers to see every call, and no call twice.

- Look for changed hooks: by default compiled code does not, and hooks that were registered again, or on a model that
  was compiled after an unmonitored one of the same class, record nothing, silently.
- Let a function under activation checkpointing leave something behind: by default that breaks the graph, and the
  checkpointed part then runs eagerly, where it updates the buffers twice. What is left behind is that of the first
  forward alone, as it should be. From 2.10.
"""
if "skip_nnmodule_hook_guards" not in COMPILER_SETTINGS:
    _missing.append("may go on with what it compiled without a monitor: attach one before the first compiled call.")
COMPILES_CHECKPOINTS = "skip_fwd_side_effects_in_bwd_under_checkpoint" in COMPILER_SETTINGS
"""Whether a model can be compiled with activation checkpointing while hooks are on its layers, and train the same."""
_CHECKPOINTING = ("gradient_checkpointing", "grad_checkpointing")  # of transformers and timm


def uses_checkpointing(modules: Iterable[nn.Module]) -> bool:
    """Whether activation checkpointing can be seen on any of these: a wrapper, or what libraries call their switch."""
    return any(
        hasattr(module, "_checkpoint_wrapped_module") or any(vars(module).get(name) is True for name in _CHECKPOINTING)
        for module in modules
    )


if hasattr(torch.compiler, "_is_exporting_flag"):

    def is_exporting() -> bool:
        """Whether ``torch.export`` traces. In a hook, Dynamo of 2.7 to 2.11 takes the public function to be True."""
        flag: bool = torch.compiler._is_exporting_flag
        return flag

else:
    is_exporting = torch.compiler.is_exporting


def change_compiler_settings(settings: Mapping[str, bool]) -> dict[str, bool]:
    """Write settings of Dynamo, and return those that they replace."""
    config = torch._dynamo.config
    before = {name: getattr(config, name) for name in settings}
    for name, value in settings.items():
        setattr(config, name, value)
    return before


def forget_compiled_code() -> None:
    """Have all be compiled anew if anything was compiled, which nothing public tells."""
    try:
        was_compiled = bool(torch._dynamo.convert_frame.input_codes.seen)
    except AttributeError:
        was_compiled = True
    if was_compiled:
        torch.compiler.reset()


def never_compiled(function: AnyFunction) -> AnyFunction:
    """A function that Dynamo leaves alone, with all that it calls. Public; typed here, as torch's own is not."""
    left_alone: AnyFunction = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return left_alone


def run_eagerly() -> AbstractContextManager[Any]:
    """A context in which compiled models run uncompiled. Public, from 2.6."""
    context: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return context


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile(module)`` has wrapped, or ``module``."""
    original: nn.Module = getattr(module, "_orig_mod", module)
    return original


def has_compiled_forward(module: nn.Module) -> bool:
    """Whether ``torch.compile`` has made the module, or the function that its attribute ``forward`` holds."""
    is_wrapper = isinstance(module, getattr(torch._dynamo, "OptimizedModule", ()))
    return is_wrapper or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")


def compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """What ``module.compile()`` has put in the place of calling the module, its hooks included; None if it has not."""
    call: Callable[..., Any] | None = getattr(module, "_compiled_call_impl", None)
    return call


def set_compiled_call(module: nn.Module, call: Callable[..., Any]) -> None:
    """Put something in the place of :func:`compiled_call`."""
    module._compiled_call_impl = call


# -------------------------------------------------------------------------------------------------- torch: distributed


def device_for_objects(group: dist.ProcessGroup) -> torch.device:
    """Where a process group takes tensors from that its ranks exchange: the CPU if it can."""
    if hasattr(dist.distributed_c10d, "_get_object_coll_device"):
        return torch.device(dist.distributed_c10d._get_object_coll_device(group))
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


# ----------------------------------------------------------------------------------------------------------- Lightning
#
# Arguments are Any: ``lightning`` and ``pytorch_lightning`` have one class each, and this file imports neither.


def batches_that_stepped(trainer: Any) -> int:
    """The step of what a Trainer logs: batches after which an optimizer has stepped, whatever their number."""
    batches: int = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step)
    return batches


def prepared_batch(pl_module: Any, batch: Any) -> Any:
    """A batch as the module's hook ``on_before_batch_transfer`` gives it, or the datamodule's if that has the hook."""
    if hasattr(pl_module, "_on_before_batch_transfer"):
        return pl_module._on_before_batch_transfer(batch)
    return pl_module.on_before_batch_transfer(batch, 0)


def averaging_callbacks(trainer: Any) -> list[Any]:
    """Callbacks that average weights, and put them into the model at some time of a ``fit``, if only at its end."""
    return [callback for callback in trainer.callbacks if getattr(callback, "_average_model", None) is not None]


def swapping_callbacks(trainer: Any) -> list[Any]:
    """Those of them that do so for each validation, as ``WeightAveraging``."""
    return [callback for callback in averaging_callbacks(trainer) if hasattr(callback, "_swap_models")]


def file_writer(experiment: Any) -> Any:
    """What a logger's ``SummaryWriter`` writes its event files with, opened again if it was closed; None for others.

    The one way to summaries of a plugin of one's own.
    """
    return experiment._get_file_writer() if hasattr(type(experiment), "_get_file_writer") else None


def logger_prefix(logger: Any) -> str:
    """What a logger puts before the names of scalars, with its ``LOGGER_JOIN_CHAR`` in between; "" if nothing."""
    prefix: str = getattr(logger, "_prefix", "")
    return prefix
