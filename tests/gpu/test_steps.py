"""What a training step must not notice: that the host waits for the device, and that anything is computed otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn

from lightning_bnmonitor import BatchNormTracker
from tests.gpu.training import DEVICE, Checkpointed, images, needs_cuda, network, train, training_step

STEPS = 160  # in which there are two updates at least
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


LAST = torch.channels_last
VARIANTS: dict[str, tuple[Callable[[], nn.Module], torch.dtype | None, dict[str, Any]]] = {
    "eager": (network, None, {}),
    "autocast": (network, HALF, {}),
    "channels-last": (lambda: network().to(memory_format=LAST), HALF, {"memory_format": LAST}),
    "half precision": (lambda: network().to(HALF), None, {"dtype": HALF}),
    "checkpointing": (lambda: Checkpointed(reentrant=False), None, {}),
    "reentrant checkpointing": (lambda: Checkpointed(reentrant=True), None, {}),
    "compiled": (lambda: torch.compile(network()), None, {}),
}
EAGER = [(variant, capture) for variant in VARIANTS for capture in ("auto", "pass") if variant != "compiled"]


@needs_cuda
@pytest.mark.parametrize(("variant", "capture"), [*EAGER, ("compiled", "auto")])
def test_training_steps_never_wait_for_the_device(variant, capture):
    build, autocast, options = VARIANTS[variant]
    model = build()
    batches = [images(step, **options) for step in range(STEPS)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with BatchNormTracker(model, capture=capture) as tracker:
        for step, x in enumerate(batches):
            torch.cuda.set_sync_debug_mode("default" if step < 10 else "error")
            training_step(model, optimizer, x, autocast)
            tracker.step()
        torch.cuda.set_sync_debug_mode("default")
    assert {layer.num_batches for layer in tracker.report().values()} == {STEPS}


@needs_cuda
def test_validation_steps_never_wait_for_the_device():
    model = network()
    batches = [images(step) for step in range(8)]
    with BatchNormTracker(model) as tracker:
        train(model, 5)
        model.eval()
        tracker.start_validation()
        with torch.no_grad():
            model(batches[0])
            torch.cuda.set_sync_debug_mode("error")
            for x in batches[1:]:
                model(x)
        torch.cuda.set_sync_debug_mode("default")
        assert tracker.validation_report()["1"].evidence["val_batches"] == len(batches)


def left_half(x: Tensor) -> Tensor:
    return (torch.arange(x.shape[-1], device=x.device) < x.shape[-1] // 2)[None, None].expand(len(x), 1, -1)


@needs_cuda
def test_masks_never_wait_for_the_device():
    model = network()
    batches = [images(step) for step in range(40)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with BatchNormTracker(model, mask=left_half) as tracker:
        for step, x in enumerate(batches):
            torch.cuda.set_sync_debug_mode("default" if step < 10 else "error")
            tracker.see_inputs(x)
            training_step(model, optimizer, x, None)
            tracker.step()
        torch.cuda.set_sync_debug_mode("default")
    assert tracker.report()["1"].evidence["padding_batches"] == len(batches)


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_masked_statistics_are_those_of_the_values_that_count(layout):
    model, kept = nn.Sequential(nn.BatchNorm2d(3)).to(DEVICE, memory_format=layout), []
    with BatchNormTracker(model, mask=left_half) as tracker:
        for step in range(10):
            x = images(step, memory_format=layout)
            tracker.see_inputs(x)
            model(x)
            kept.append(x[..., : x.shape[-1] // 2].double().movedim(1, -1).reshape(-1, 3).cpu())
        layer = tracker.report()["0"]
    values = torch.cat(kept)
    torch.testing.assert_close(layer.unpadded[0], values.mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(layer.unpadded[1], values.var(0), rtol=1e-6, atol=1e-7)


@needs_cuda
def test_a_wait_would_be_noticed():
    x = torch.ones(3, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchroniz"):
        x.sum().item()


@needs_cuda
@pytest.mark.parametrize("capture", ["auto", "pass"])
def test_an_update_is_on_its_way_before_the_device_gets_to_it(capture):
    """A wait that PyTorch does not know of, as that for pageable memory, is one, too."""
    model = nn.Sequential(*(nn.BatchNorm1d(2048) for _ in range(20))).to(DEVICE)
    x = torch.randn(8, 2048, device=DEVICE)
    with BatchNormTracker(model, capture=capture) as tracker:
        for _ in range(100):
            model(x)
        tracker.flush()
        for _ in range(20):
            model(x)
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000_000)  # cycles: a second
        woken = torch.cuda.Event()
        woken.record()
        tracker.flush()
        assert not woken.query()
    assert tracker.report()["0"].num_batches == 120


# ------------------------------------------------------------------------------------------------------- bit-identity


def outcome(variant: str, monitored: bool, capture: str) -> dict[str, Tensor]:
    """All that a training leaves behind, on the CPU."""
    torch._dynamo.reset()
    build, autocast, options = VARIANTS[variant]
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    torch.manual_seed(1)
    with BatchNormTracker(model, capture=capture) if monitored else contextlib.nullcontext() as tracker:
        losses = [training_step(model, optimizer, images(step, **options), autocast) for step in range(80)]
        model(images(80, **options)).square().mean().backward()
    if tracker is not None:
        assert {layer.num_batches for layer in tracker.report().values()} == {81}
    left = {f"state {name}": value for name, value in model.state_dict().items()}
    left |= {f"gradient {name}": parameter.grad for name, parameter in model.named_parameters()}
    left |= {f"momentum {i}": each["momentum_buffer"] for i, each in enumerate(optimizer.state.values())}
    left |= {"losses": torch.stack(losses), "random numbers": torch.rand(4, device=DEVICE)}
    return {name: value.detach().cpu() for name, value in left.items()}


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each that is not the same."""
    assert set(one) == set(other)
    return {
        name: float((value.double() - other[name].double()).abs().max())
        for name, value in one.items()
        if not torch.equal(value, other[name])
    }


@pytest.mark.parametrize(("variant", "capture"), EAGER)
def test_training_is_bit_identical_with_and_without(variant, capture):
    assert not differences(outcome(variant, False, capture), outcome(variant, True, capture))


def test_compiled_training_is_bit_identical_with_and_without():
    settings = {"deterministic": True} if hasattr(torch._inductor.config, "deterministic") else {}
    with torch._inductor.config.patch(settings):  # no kernel that is chosen by how fast it is
        plain = outcome("compiled", False, "auto")
        if differences(plain, outcome("compiled", False, "auto")):
            pytest.skip("what is compiled is not reproducible here, without a monitor")
        assert not differences(plain, outcome("compiled", True, "auto"))
