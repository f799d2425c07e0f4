"""Whatever comes before or behind the kernel, what is reported is what the layer received, and training is the same."""

from __future__ import annotations

import contextlib
import copy
import pickle
import random
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed._composable import checkpoint as composable_checkpoint
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from lightning_bnmonitor import BatchNormTracker, LayerReport
from lightning_bnmonitor.compat import HAS_UNPACK_HOOKS
from tests.capture.odd_forwards import (
    BEFORE,
    BEHIND,
    FRONTS,
    INNER,
    OUTPUTS,
    USUAL_FRONTS,
    C,
    Front,
    Layer,
    Pair,
    TokensLast,
    Watched,
    around_both,
    around_the_activation,
    around_the_kernel,
    batches,
    batches_that_require_grad,
    recomputed,
)
from tests.promises.activated_layers import BatchNormAct2d, BatchNormThen2d
from tests.promises.recorded_training import (
    Training,
    assert_all_exact,
    assert_exact,
    assert_identical,
    forward_and_backward,
    loss_of,
    train,
)

FORWARDS = {**BEHIND, **INNER}
PASSED_OVER = {"two parts of the batch", "split channels", "after the running statistics", "by the running statistics"}
PASSED_OVER |= {"by hand", "only an activation", "only a view", "of no importance", "branches"}
STEPS = 4  # three alike, and one of another size
reads_behind = pytest.mark.skipif(not HAS_UNPACK_HOOKS, reason="before torch 2.10 a pass is made")
any_front = pytest.mark.parametrize(
    "front", [name if name in USUAL_FRONTS else pytest.param(name, marks=pytest.mark.slow) for name in FRONTS]
)


def some_with(forwards: Collection[str]) -> pytest.MarkDecorator:
    """Every forward behind the usual fronts, and every third one behind each of the others, in turn."""
    chosen = [
        pytest.param(front, forward, marks=() if front in USUAL_FRONTS else pytest.mark.slow)
        for first, front in enumerate(FRONTS)
        for index, forward in enumerate(forwards)
        if front in USUAL_FRONTS or (first + index) % 3 == 0
    ]
    return pytest.mark.parametrize(("front", "forward"), chosen)


def same(make: Callable[[], nn.Module], inputs: Any = batches, **options: Any) -> Training:
    """A training with the tracker that is the same without it."""
    training = train(make, inputs, monitored=True, **{"steps": STEPS, **options})
    without = train(make, inputs, monitored=False, **{"steps": STEPS, **options})
    assert_identical(training.computed, without.computed)
    return training


def checked(make: Callable[[], nn.Module], inputs: Any = batches, **options: Any) -> Training:
    """In addition, all layers are exact."""
    training = same(make, inputs, **options)
    assert_all_exact(training)
    return training


def behind(front: str, forward: Callable[[Layer, Tensor], Any], **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: Front(Layer(forward, **kwargs), *FRONTS[front]())


def inputs_of(front: str) -> Any:
    return batches_that_require_grad if "requires grad" in front else batches


# --- what comes before and behind -------------------------------------------------------------------------------------


@some_with(FORWARDS)
def test_what_is_reported_is_what_the_layer_received(forward: str, front: str) -> None:
    checked(behind(front, FORWARDS[forward], has_inner=forward in INNER), inputs_of(front))


@pytest.mark.parametrize("kind", OUTPUTS)
def test_it_is_whatever_the_forward_returns(kind: str) -> None:
    for front in USUAL_FRONTS:
        checked(behind(front, OUTPUTS[kind]))


@any_front
def test_it_is_of_a_layer_that_returns_its_input(front: str) -> None:
    """Which, behind another layer, is what that layer's kernel returned."""
    checked(behind(front, lambda layer, x: x), inputs_of(front))
    checked(behind(front, lambda layer, x: (layer.norm(x), x)[1]), inputs_of(front))


def recording(received: list[np.ndarray]) -> Any:
    """A step that keeps what the kernel received last, which is what the layer's output comes from."""

    def step(model: Any, inputs: dict[str, Tensor], backward: Any) -> Any:
        computed = forward_and_backward(model, inputs, backward)
        received.append(model.norm.received[-1].double().numpy() if model.norm.received else np.array(0))
        return computed

    return step


@some_with(BEFORE)
def test_it_is_what_the_kernel_received_where_that_is_read_and_what_the_layer_did_where_a_pass_is_made(
    forward: str, front: str
) -> None:
    received: list[np.ndarray] = []
    make = behind(front, BEFORE[forward], has_inner=True)
    training = same(make, inputs_of(front), step=recording(received))
    (path,) = training.calls("norm")
    if path == "calls_saved":
        assert_exact(training.report["norm"], received[:STEPS], serial=True)
    else:
        assert path == "calls_pass"
        assert_exact(training.report["norm"], training.received.batches["norm"], serial=True)
    if HAS_UNPACK_HOOKS and "leaf" not in front:
        assert path == ("calls_pass" if forward in PASSED_OVER else "calls_saved")


PARTED: dict[str, Callable[[Tensor], Any]] = {
    "parts": lambda x: x.chunk(2),
    "of an operation": lambda x: (x, 3 * x),
    "of a stack": lambda x: torch.stack([x, 2 * x]).unbind(),
}


@reads_behind
@pytest.mark.parametrize("activated", [True, False])
@pytest.mark.parametrize("parted", PARTED)
def test_of_two_tensors_it_is_the_one_that_is_normalised(parted: str, activated: bool) -> None:
    received: list[np.ndarray] = []

    def inputs(step: int) -> dict[str, Tensor]:
        x = batches(step)["x"]
        return {"x": torch.cat([x, 2 * x])}

    def step(model: Pair, inputs: dict[str, Tensor], backward: Any) -> Any:
        _, second = PARTED[parted](model.mix(inputs["x"]))
        received.append(second.detach().double().numpy())
        return forward_and_backward(model, inputs, backward)

    training = same(lambda: Pair(PARTED[parted], activated), inputs, step=step)
    assert_exact(training.report["norm"], received[:STEPS], serial=True)


@pytest.mark.parametrize("parted", PARTED)
def test_without_parameters_it_is_the_first_of_them_unless_it_is_known_to_be_normalised(parted: str) -> None:
    def make() -> Pair:
        model = Pair(PARTED[parted], activated=True)
        model.norm.requires_grad_(False)
        return model

    checked(make)


def test_an_input_that_is_written_to_after_it_was_normalised_is_no_reason_to_fail() -> None:
    """It may be asked for no more, be it by a backward pass or by us."""

    def forward(layer: Layer, x: Tensor) -> Tensor:
        y = F.silu(layer.norm(x))
        x.detach().mul_(2)
        return y

    for front in USUAL_FRONTS:
        training = same(behind(front, forward), step=no_backward)
        assert training.report["norm"].num_batches == STEPS
        assert training.report["norm"].evidence["calls_skipped"] == 0


@reads_behind
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("length", [C, C + 1])
def test_tokens_with_channels_last_are_known_where_their_number_is_that_of_the_channels(
    length: int, requires_grad: bool
) -> None:
    """And else skipped: what a layer receives has its channels in dimension 1."""

    def inputs(step: int) -> dict[str, Tensor]:
        x = batches(step)["x"].flatten(2).repeat(1, 2, 1)[:, :length, :C].clone()
        return {"x": x.requires_grad_(requires_grad)}

    training = same(lambda: Front(TokensLast(C)), inputs)
    if length == C:
        received = [np.moveaxis(batch, 2, 1) for batch in training.received.batches["norm"]]
        assert_exact(training.report["norm"], received, serial=True)
    else:
        assert training.report["norm"].num_batches == 0
        assert training.calls("norm") == {"calls_skipped": STEPS}


# --- what changes between two calls -----------------------------------------------------------------------------------


@pytest.mark.parametrize("front", USUAL_FRONTS)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_another_forward_at_any_time_is_noticed(seed: int, front: str) -> None:
    generator = random.Random(seed)
    order = [name for name in FORWARDS for _ in range(2)]
    generator.shuffle(order)
    order = [name for name in order for _ in range(generator.choice([1, 1, 2, 3]))]

    def exchange(model: Any, step: int) -> None:
        model.norm.forward_as = FORWARDS[order[step]]
        model.norm.inner.train()

    make = behind(front, BEHIND["in place"], has_inner=True)
    training = checked(make, inputs_of(front), steps=len(order), before_step=exchange)
    assert training.report["norm"].num_batches == len(order)


CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any]]] = {
    "another activation": (
        lambda: BatchNormAct2d(C),
        lambda layer: setattr(layer, "act", nn.SiLU()),
    ),
    "no activation": (
        lambda: BatchNormAct2d(C),
        lambda layer: setattr(layer, "act", nn.Identity()),
    ),
    "an activation": (
        lambda: BatchNormAct2d(C, nn.Identity()),
        lambda layer: setattr(layer, "act", nn.ReLU(inplace=True)),
    ),
    "a long chain": (
        lambda: BatchNormAct2d(C),
        lambda layer: setattr(layer, "act", nn.Sequential(*[nn.LeakyReLU(0.9) for _ in range(9)])),
    ),
    "no dropout": (
        lambda: BatchNormAct2d(C, drop=nn.Dropout(0.3)),
        lambda layer: setattr(layer.drop, "p", 0.0),
    ),
    "dropout in eval mode": (
        lambda: BatchNormAct2d(C, drop=nn.Dropout2d(0.3)),
        lambda layer: layer.drop.eval(),
    ),
    "layer in eval mode": (lambda: BatchNormAct2d(C), lambda layer: layer.eval()),
    "eps": (lambda: BatchNormAct2d(C), lambda layer: setattr(layer, "eps", 0.5)),
    "momentum": (lambda: BatchNormAct2d(C), lambda layer: setattr(layer, "momentum", None)),
    "no tracking": (lambda: BatchNormAct2d(C), lambda layer: setattr(layer, "track_running_stats", False)),
    "frozen affine": (lambda: BatchNormAct2d(C), lambda layer: layer.requires_grad_(False)),
    "another class": (
        lambda: BatchNormThen2d(C, F.relu),
        lambda layer: setattr(layer, "__class__", nn.BatchNorm2d),
    ),
    "a function of the class": (
        lambda: BatchNormAct2d(C),
        lambda layer: setattr(layer, "forward", lambda x: F.relu(F.batch_norm(2 * x, None, None, training=True))),
    ),
}


@pytest.mark.parametrize("front", ["a leaf", "of a convolution"])
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_noticed(what: str, front: str) -> None:
    make, change = CHANGES[what]

    def alter(model: Any, step: int) -> None:
        if step == 4:
            change(model.norm)

    training = same(lambda: Front(make(), *FRONTS[front]()), steps=8, before_step=alter)
    assert_all_exact(training)


@reads_behind
def test_what_is_normalised_before_the_activation_is_noticed_where_all_nodes_are_of_the_same_types() -> None:
    def alternate(model: Any, step: int) -> None:
        model.norm.forward_as = [BEHIND["in place"], BEFORE["scaled"], BEFORE["twice"]][step // 2 % 3]

    for front in ("a leaf", "of another layer", "of another layer and an activation"):
        received: list[np.ndarray] = []
        training = same(behind(front, BEHIND["in place"]), steps=12, before_step=alternate, step=recording(received))
        assert_exact(training.report["norm"], received[:12])


# --- how the forward and backward passes are run ----------------------------------------------------------------------


def without_graph(context: Callable[[], Any]) -> Any:
    def step(model: nn.Module, inputs: dict[str, Tensor], backward: Any) -> Tensor:
        with context():
            return model(**inputs)

    return step


def offloaded(model: nn.Module, inputs: dict[str, Tensor], backward: Any) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        output = model(**inputs)
    loss = loss_of(output)
    backward(loss)
    return loss.detach()


def twice_backward(model: nn.Module, inputs: dict[str, Tensor], backward: Any) -> Tensor:
    loss = loss_of(model(**inputs))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True)
    backward(loss)
    return loss.detach()


def penalised(model: nn.Module, inputs: dict[str, Tensor], backward: Any) -> Tensor:
    """By the gradient of the input: a backward pass through the backward pass."""
    x = inputs["x"].requires_grad_()
    loss = loss_of(model(x))
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    loss = loss + grad.square().sum()
    backward(loss)
    return loss.detach()


def late_backward(model: nn.Module, inputs: dict[str, Tensor], backward: Any) -> Tensor:
    """Of two calls at once."""
    losses = [loss_of(model(**inputs)) for _ in range(2)]
    backward(losses[1] + losses[0])
    return losses[0].detach()


def no_backward(model: nn.Module, inputs: dict[str, Tensor], backward: Any) -> Tensor:
    return loss_of(model(**inputs)).detach()


def under_autocast(model: nn.Module, inputs: dict[str, Tensor], backward: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs)
    loss = loss_of(output)
    backward(loss)
    return loss.detach()


def checkpointed(use_reentrant: bool) -> Any:
    def step(model: nn.Module, inputs: dict[str, Tensor], backward: Any) -> Tensor:
        loss = loss_of(checkpoint(model, inputs["x"].requires_grad_(), use_reentrant=use_reentrant))
        backward(loss)
        return loss.detach()

    return step


STEP_KINDS: dict[str, Any] = {
    "no_grad": without_graph(torch.no_grad),
    "inference mode": without_graph(torch.inference_mode),
    "save_on_cpu": offloaded,
    "retain_graph": twice_backward,
    "double backward": penalised,
    "backward of two calls": late_backward,
    "no backward": no_backward,
    "autocast": under_autocast,
    "reentrant checkpointing": checkpointed(use_reentrant=True),
    "non-reentrant checkpointing": checkpointed(use_reentrant=False),
}
READ_THROUGH = {
    "activation": lambda layer, x: F.silu(layer.norm(x)),
    "dropout": lambda layer, x: F.relu(F.dropout(layer.norm(x), 0.3)),
    "shape": lambda layer, x: layer.norm(x).flatten(2).transpose(1, 2),
}


@pytest.mark.parametrize("front", [pytest.param("a leaf", marks=pytest.mark.slow), "of a convolution"])
@pytest.mark.parametrize("forward", READ_THROUGH)
@pytest.mark.parametrize("kind", STEP_KINDS)
def test_it_is_exact_and_changes_nothing_however_it_is_trained(kind: str, forward: str, front: str) -> None:
    training = checked(behind(front, READ_THROUGH[forward]), step=STEP_KINDS[kind])
    assert training.report["norm"].num_batches == (2 * STEPS if "two" in kind else STEPS)
    if kind in ("no_grad", "inference mode", "save_on_cpu") or "checkpointing" in kind:
        assert training.calls("norm") == {"calls_pass": STEPS}


INTERCEPTED = {
    "hooks around the kernel": around_the_kernel,
    "hooks around the activation": around_the_activation,
    "hooks around both": around_both,
    **{
        f"checkpointed {what}, {'reentrant' if use_reentrant else 'non-reentrant'}": recomputed(
            use_reentrant, activated
        )
        for what, activated in (("kernel", False), ("kernel and activation", True))
        for use_reentrant in (True, False)
    },
}


@pytest.mark.parametrize("front", ["of a convolution", "of another layer"])
@pytest.mark.parametrize("forward", INTERCEPTED)
def test_what_the_forward_intercepts_is_not_read(forward: str, front: str) -> None:
    """To read it would recompute the call, or take what comes but once."""
    training = checked(behind(front, INTERCEPTED[forward]))
    if forward != "hooks around the activation":
        assert training.calls("norm") == {"calls_pass": STEPS}


@pytest.mark.parametrize("forward", INTERCEPTED)
def test_what_the_forward_intercepts_later_is_not_read_either(forward: str) -> None:
    def intercept(model: Any, step: int) -> None:
        model.norm.forward_as = [READ_THROUGH["activation"], INTERCEPTED[forward]][step // 3 % 2]

    checked(behind("of a convolution", READ_THROUGH["activation"]), steps=12, before_step=intercept)


def test_what_hooks_of_the_layer_intercept_is_not_read() -> None:
    def make() -> nn.Module:
        model = Front(BatchNormAct2d(C, nn.SiLU()), nn.Conv2d(C, C, 1))
        composable_checkpoint(model.norm)
        return model

    assert checked(make).calls("norm") == {"calls_pass": STEPS}


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward hook": lambda layer: layer.register_forward_hook(lambda layer, args, output: F.relu(output)),
    "forward hook that scales": lambda layer: layer.register_forward_hook(lambda layer, args, output: output * 3),
    "forward pre-hook": lambda layer: layer.register_forward_pre_hook(lambda layer, args: None),
    "backward hook": lambda layer: layer.register_full_backward_hook(lambda layer, *_: None),
    "backward pre-hook": lambda layer: layer.register_full_backward_pre_hook(lambda layer, grad: None),
    "hook of the output": lambda layer: layer.register_forward_hook(
        lambda layer, args, output: output.register_hook(lambda grad: grad * 2) and None
    ),
    "hook of the node": lambda layer: layer.register_forward_hook(
        lambda layer, args, output: output.grad_fn.register_prehook(lambda grads: (grads[0] * 2,)) and None
    ),
}


@pytest.mark.parametrize("front", ["of a convolution", pytest.param("of another layer", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layer", [lambda: nn.BatchNorm2d(C), lambda: BatchNormAct2d(C, nn.SiLU())])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_the_layer_disturb_nothing(kind: str, layer: Callable[[], nn.Module], front: str) -> None:
    def make() -> nn.Module:
        model = Front(layer(), *FRONTS[front]())
        HOOKS[kind](model.norm)
        return model

    checked(make)


# --- kinds of layers and inputs ---------------------------------------------------------------------------------------


def with_frozen_affine() -> nn.Module:
    model = Front(BatchNormAct2d(C, nn.SiLU()))
    model.norm.requires_grad_(False)
    return model


KINDS: dict[str, Callable[[], nn.Module]] = {
    "nothing requires grad": lambda: Front(BatchNormAct2d(C, nn.SiLU(), affine=False)),
    "affine=False": lambda: Front(BatchNormAct2d(C, affine=False), nn.Conv2d(C, C, 1)),
    "frozen affine": with_frozen_affine,
    "no running statistics": lambda: Front(BatchNormAct2d(C, track_running_stats=False), nn.Conv2d(C, C, 1)),
    "cumulative average": lambda: Front(BatchNormAct2d(C, momentum=None), nn.Conv2d(C, C, 1)),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "double": torch.float64}


@pytest.mark.parametrize("inputs", [batches, batches_that_require_grad])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_layers(kind: str, inputs: Any) -> None:
    checked(KINDS[kind], inputs)


@pytest.mark.parametrize("forward", READ_THROUGH)
@pytest.mark.parametrize("dtype", DTYPES)
def test_modules_in_other_precisions(dtype: str, forward: str) -> None:
    training = checked(
        lambda: Front(Layer(READ_THROUGH[forward])).to(DTYPES[dtype]),
        lambda step: {"x": batches(step)["x"].to(DTYPES[dtype])},
    )
    if dtype != "double":
        assert training.calls("norm") == {"calls_pass": STEPS}


def test_a_layer_that_returns_another_precision() -> None:
    checked(behind("of a convolution", lambda layer, x: F.silu(layer.norm(x)).bfloat16()))
    checked(behind("of a convolution", lambda layer, x: layer.norm(x).double()))


@pytest.mark.parametrize("size", [5, 40])
@pytest.mark.parametrize("forward", READ_THROUGH)
def test_channels_last(forward: str, size: int) -> None:
    """Large inputs the kernel sums less exactly, so that a pass is made."""

    def inputs(step: int) -> dict[str, Tensor]:
        x = torch.randn(4 + step // 3, C, size, size) * 2 + 1
        return {"x": x.contiguous(memory_format=torch.channels_last)}

    def make() -> nn.Module:
        return behind("of a convolution", READ_THROUGH[forward])().to(memory_format=torch.channels_last)

    training = checked(make, inputs)
    assert training.received.serial == {"norm"}
    if size == 40:
        assert training.calls("norm") == {"calls_pass": STEPS}


def test_many_rows_and_pooled_images() -> None:
    """With one position a sample the kernel sums value by value, whatever shape comes out."""

    def forward(layer: Layer, x: Tensor) -> Tensor:
        return F.silu(layer.norm(x)).repeat(1, 1, 2, 2)

    for num in (100, 5000):
        training = checked(behind("a leaf", forward), lambda step, num=num: {"x": torch.randn(num, C, 1, 1) + 1})
        if num == 5000:
            assert training.calls("norm") == {"calls_pass": STEPS}


def test_a_layer_far_from_0_is_passed_over_from_the_next_window_on() -> None:
    x, model = torch.randn(8, C, 5, 5) + 1e3, nn.Sequential(BatchNormAct2d(C, nn.SiLU()))
    with BatchNormTracker(model) as tracker:
        for _ in range(2):
            tracker.reset()
            model(x)
        layer = tracker.report()["0"]
    assert layer.evidence["calls_pass"] == 1
    np.testing.assert_allclose(layer.population_mean.numpy(), x.double().mean((0, 2, 3)).numpy(), rtol=1e-9)


def test_empty_batches_count_nothing() -> None:
    """Of a layer that leaves them out, as BatchNorm refuses them."""

    def forward(layer: Layer, x: Tensor) -> Tensor:
        return F.relu(layer.norm(x) if x.numel() else x * layer.weight.view(1, -1, 1, 1))

    training = same(
        behind("of a convolution", forward), lambda step: {"x": batches(step)["x"][: 0 if step % 3 == 1 else None]}
    )
    assert_exact(training.report["norm"], [x for x in training.received.batches["norm"] if x.size])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_of_its_channel_alone(value: float) -> None:
    def inputs(step: int) -> dict[str, Tensor]:
        x = batches(step)["x"]
        x[1, 2, 0, 0] = value if step == 2 else 1.0
        return {"x": x}

    def without_the_spoilt(model: Any, inputs: dict[str, Tensor], backward: Any) -> Tensor:
        loss = loss_of(model(**inputs)[:, [0, 1, 3]])
        backward(loss)
        return loss.detach()

    training = same(behind("a leaf", READ_THROUGH["activation"]), inputs, step=without_the_spoilt)
    layer, finite = training.report["norm"], [0, 1, 3]
    received = np.concatenate([np.moveaxis(x, 1, 0).reshape(C, -1) for x in training.received.batches["norm"]], 1)[
        finite
    ]
    assert layer.population_mean.isnan().tolist() == [False, False, True, False]
    np.testing.assert_allclose(layer.population_mean[finite].numpy(), received.mean(1), rtol=1e-6)
    np.testing.assert_allclose(layer.population_var[finite].numpy(), received.var(1, ddof=1), rtol=1e-5)


class Shared(nn.Module):
    """One layer in two places, behind the other and with images of another size."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm = nn.Conv2d(C, C, 1), BatchNormAct2d(C, nn.SiLU())
        self.alias = self.norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.norm(self.mix(x)))  # the second behind its own kernel
        return self.alias(F.avg_pool2d(x, 2))


def test_a_layer_that_is_called_in_several_places() -> None:
    training = checked(Shared)
    assert training.report["norm"].num_batches == 3 * STEPS


# --- copies, transforms, compiled code, memory ------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_not_counted(copied: Callable[[nn.Module], nn.Module]) -> None:
    def with_copy(model: nn.Module, inputs: dict[str, Tensor], backward: Any) -> list[Tensor]:
        twin = copied(model)
        losses = [loss_of(each(**inputs)) for each in (model, twin, copied(twin), model)]
        for loss in losses:
            backward(loss)
        return [loss.detach() for loss in losses]

    training = checked(lambda: Front(BatchNormAct2d(C, nn.SiLU(), nn.Dropout(0.1)), nn.Conv2d(C, C, 1)), step=with_copy)
    assert training.report["norm"].num_batches == 2 * STEPS


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("what", ["vmap", "grad", "trace"])
def test_calls_within_a_transform_are_skipped(what: str) -> None:
    model = nn.Sequential(BatchNormAct2d(C, nn.SiLU(), track_running_stats=False))
    received = []
    with BatchNormTracker(model) as tracker:
        for step in range(STEPS):
            x = batches(step)["x"]
            received.append(x.double().numpy())
            model(x)
            if what == "vmap":
                torch.func.vmap(model)(torch.stack([x, x]))
            elif what == "grad":
                torch.func.grad(lambda x: model(x).square().sum())(x)
            else:
                torch.jit.trace(model, x, check_trace=False)
        layer = tracker.report()["0"]
    assert_exact(layer, received)
    assert layer.evidence["calls_skipped"] >= STEPS


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_layers_are_traced(backend: str) -> None:
    def trained(monitored: bool) -> tuple[nn.Module, list[np.ndarray], LayerReport | None]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(BatchNormAct2d(C, nn.SiLU(), nn.Dropout2d(0.1)), nn.Conv2d(C, 2, 3))
        compiled, received = torch.compile(model, backend=backend), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with BatchNormTracker(compiled) if monitored else contextlib.nullcontext() as tracker:
            for step in range(STEPS):
                x = batches(step)["x"]
                received.append(x.double().numpy())
                loss_of(compiled(x)).backward()
                optimizer.step()
                optimizer.zero_grad()
            layers = list(tracker.report().values()) if tracker else [None]
        return model, received, layers[0]

    model, received, layer = trained(monitored=True)
    assert_exact(layer, received)
    assert layer.evidence["calls_traced"] == STEPS
    assert_identical(model.state_dict(), trained(monitored=False)[0].state_dict())
    torch._dynamo.reset()


@pytest.mark.parametrize("forward", [lambda layer, x: F.silu(Watched.apply(layer.norm(x))), BEHIND["identity"]])
def test_no_graph_is_kept_alive(forward: Callable[[Layer, Tensor], Any]) -> None:
    Watched.tokens.clear()
    model = Front(Layer(forward), nn.Conv2d(C, C, 1), Layer(lambda layer, x: Watched.apply(layer.norm(x))))
    with BatchNormTracker(model):
        for step in range(STEPS):
            y = model(**batches(step))
            alive = [token for token in Watched.tokens if token() is not None]
            assert len(alive) == len(Watched.tokens) // (step + 1)
            if step % 2:
                loss_of(y).backward()
            del y
            assert [token for token in Watched.tokens if token() is not None] == []
