"""Every private or version-dependent name of torch, its compiler and Lightning that this package uses, and why.

No other file touches one. All were tested with torch 2.13 and Lightning 2.6; "from 2.10" tells where a name appeared,
or from where on it does what we need. The names without a version are older than torch 2.8, below which neither
saved-tensor hooks within a layer nor calls in compiled code can be told reliably.

What a hook needs at each call of a layer is torch's own C function, or the name of an attribute for ``getattr``: a
function in Python would cost more than what it hides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cache
from operator import attrgetter
from typing import Any, Literal, TypeVar

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch.compiler import is_compiling as is_compiling
from torch.compiler import is_dynamo_compiling as is_dynamo_compiling
from torch.compiler import is_exporting as is_exporting
from torch.nn.modules import batchnorm
from torch.nn.parameter import is_lazy as is_lazy

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])

# ------------------------------------------------------------------------------------------------------ torch: modules
#
# is_lazy: tells of a tensor of LazyBatchNorm* that it has no shape yet. In no documentation, but without underscore.

BatchNorm = batchnorm._BatchNorm
"""The base class of BatchNorm1d to 3d and SyncBatchNorm. There is no public one."""
BUFFERS = "_buffers"
"""Where a module's ``__dict__`` has its buffers. ``module.running_mean`` looks there last, which takes long."""
FORWARD_PRE_HOOKS = "_forward_pre_hooks"
"""Where a module's ``__dict__`` has what is called before its ``forward``, and may enter a context that this is in."""
WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""Under which names ``torch.compile``, ``checkpoint_wrapper`` and FSDP hold the module that they wrap."""


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers of a module itself, to be replaced in place: setting an attribute would refuse some tensors."""
    return module._buffers


# ----------------------------------------------------------------------------------------------------- torch: autograd

SAVED_MEAN = "_saved_result1"
"""Where the node of a BatchNorm kernel has the batch mean that was saved for backward. To read it runs its hooks."""
SAVED_INVSTD = "_saved_result2"
"""Where it has the inverse standard deviation, (var + eps)^-1/2."""
unpack_hook_of_mean: Callable[[Any], Any] = attrgetter("_raw_saved_result1.unpack_hook")
"""The saved-tensor hook that reading :data:`SAVED_MEAN` would run, or None. ``unpack_hook`` is there from 2.10."""
top_saved_tensor_hooks: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks
"""The saved-tensor hooks that are in force, or None. Given True, also while something traces."""
current_backward: Callable[[], int] = torch._C._current_graph_task_id
"""Number of the backward pass that this is called within; -1 outside."""
functorch_is_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""Whether a transform of ``torch.func`` is active: tensors then have no values of their own."""
tracing_state: Callable[[], Any] = torch._C._get_tracing_state
"""What ``torch.jit.trace`` is at, or None."""


@cache
def batch_norm_kernel(node_type: type[Any]) -> Literal["plain", "synchronised"] | None:
    """Which BatchNorm kernel autograd nodes of this type belong to: PyTorch's own, or SyncBatchNorm's on several ranks.

    Known by the names of the classes, as each device has its own and they cannot be imported.
    """
    if node_type.__name__ == "SyncBatchNormBackward":
        return "synchronised"
    return "plain" if "BatchNorm" in node_type.__name__ and hasattr(node_type, SAVED_MEAN) else None


def saved_by_synchronised(node: Any) -> tuple[Tensor, Tensor, dist.ProcessGroup]:
    """Mean and inverse standard deviation that SyncBatchNorm's node has saved, and over which ranks they were taken."""
    _, _, mean, invstd, _ = node.saved_tensors
    return mean, invstd, node.process_group


def has_unpack_hooks(node: Any) -> bool:
    """Whether reading what a BatchNorm kernel's node has saved would run saved-tensor hooks."""
    if batch_norm_kernel(node.__class__) == "plain":
        return unpack_hook_of_mean(node) is not None
    return any(tensor.unpack_hook is not None for tensor in node._raw_saved_tensors)


# ----------------------------------------------------------------------------------------------------- torch: compiler
#
# FakeTensor: what a compiler runs a model on to learn shapes.
# is_compiling, is_dynamo_compiling: public; Dynamo knows them as constants, by which it leaves a branch out.
# is_exporting: public, from 2.7; within a hook, Dynamo of 2.7 to 2.11 takes it to be True in all compiled code.

COMPILER_SETTINGS: Mapping[str, bool] = {
    "skip_nnmodule_hook_guards": False,
    "skip_fwd_side_effects_in_bwd_under_checkpoint": True,
}
"""What ``torch.compile`` must do differently for hooks on a model's layers to see every call, and no call twice.

- Look for changed hooks: by default compiled code does not, and hooks that were registered again, or on a model that
  was compiled after an unmonitored one of the same class, record nothing, silently.
- Let a function under activation checkpointing leave something behind: by default that breaks the graph, and the
  checkpointed part then runs eagerly, where it updates the buffers twice. What is left behind is that of the first
  forward alone, as it should be. From 2.10.
"""


def change_compiler_settings(settings: Mapping[str, bool]) -> dict[str, bool]:
    """Write settings of Dynamo, and return those that they replace."""
    config = torch._dynamo.config
    before = {name: getattr(config, name) for name in settings}
    for name, value in settings.items():
        setattr(config, name, value)
    return before


def forget_compiled_code() -> None:
    """Have all be compiled anew if anything was compiled, which nothing public tells."""
    if torch._dynamo.convert_frame.input_codes.seen:
        torch._dynamo.reset()


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
    is_wrapper = isinstance(module, torch._dynamo.OptimizedModule)
    return is_wrapper or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")


def compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """What ``module.compile()`` has put in the place of calling the module, its hooks included; None if it has not."""
    call: Callable[..., Any] | None = module._compiled_call_impl
    return call


def set_compiled_call(module: nn.Module, call: Callable[..., Any]) -> None:
    """Put something in the place of :func:`compiled_call`."""
    module._compiled_call_impl = call


# -------------------------------------------------------------------------------------------------- torch: distributed


def device_for_objects(group: dist.ProcessGroup) -> torch.device:
    """Where a process group takes tensors from that its ranks exchange: the CPU if it can."""
    return torch.device(dist.distributed_c10d._get_object_coll_device(group))


# ----------------------------------------------------------------------------------------------------------- Lightning
#
# Arguments are Any: ``lightning`` and ``pytorch_lightning`` have one class each, and this file imports neither.


def batches_that_stepped(trainer: Any) -> int:
    """The step of what a Trainer logs: batches after which an optimizer has stepped, whatever their number."""
    batches: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return batches


def prepared_batch(pl_module: Any, batch: Any) -> Any:
    """A batch as the module's hook ``on_before_batch_transfer`` gives it, or the datamodule's if that has the hook."""
    return pl_module._on_before_batch_transfer(batch)


def logger_prefix(logger: Any) -> str:
    """What a logger puts before the names of scalars, with its ``LOGGER_JOIN_CHAR`` in between; "" if nothing."""
    prefix: str = getattr(logger, "_prefix", "")
    return prefix
