"""``ChannelMoments`` as a metric among others: torchmetrics' conventions, also for what is derived from it."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection, MetricTracker
from torchmetrics.wrappers import Running

from lightning_bnmonitor import ChannelMoments, Moments
from tests.statistics import metric_tester
from tests.statistics.known_moments import assert_moments, equal, filled, moments_of, normal
from tests.statistics.metric_tester import NO_DATA, RUNS, Kind, assert_result, batch_after, batches_of
from tests.statistics.two_pass import two_pass

HALVES = [torch.float16, torch.bfloat16]


class Mean(ChannelMoments):
    """A result of its own."""

    def compute(self):
        return super().compute().mean


class Peak(ChannelMoments):
    """A state and a dictionary of its own."""

    def __init__(self, num_channels, **kwargs):
        super().__init__(num_channels, **kwargs)
        lowest = torch.full((num_channels,), -torch.inf, dtype=torch.float64)
        self.add_state("peak", lowest, dist_reduce_fx="max")

    def update(self, x):
        super().update(x)
        if len(x):
            self.peak = torch.maximum(self.peak, x.detach().double().movedim(1, -1).flatten(0, -2).amax(0))

    def compute(self):
        return {"peak": self.peak, "var": super().compute().var}


class Masked(ChannelMoments):
    """Another signature, and known moments instead of values."""

    def update(self, x, mask):
        values = x[mask].double()
        mean = values.mean(0)
        self.update_moments(len(values), mean, (values - mean).square().sum(0))


class Groups(ChannelMoments):
    """Moments of other channels than it has."""

    def compute(self):
        return Moments(*(field.reshape(2, -1).mean(1) for field in super().compute()))


def moments(values):
    return (np.full(values.shape[1], float(len(values))), *two_pass(values))


def mean(values):
    return two_pass(values)[0]


def peak_and_var(values):
    return {"peak": values.max(axis=0, initial=-np.inf), "var": two_pass(values)[1]}


def three_channels(**kwargs):
    return ChannelMoments(3, **kwargs)


def one_channel(**kwargs):
    return ChannelMoments(1, **kwargs)


def mean_of_three_channels(**kwargs):
    return Mean(3, **kwargs)


def peak_of_two_channels(**kwargs):
    return Peak(2, **kwargs)


KINDS = {
    "three channels": Kind(three_channels, 3, moments),
    "one channel": Kind(one_channel, 1, moments),
    "a result of its own": Kind(mean_of_three_channels, 3, mean),
    "a state of its own": Kind(peak_of_two_channels, 2, peak_and_var),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


class Network(torch.nn.Module):
    """A module that has gained a metric, or has not yet."""

    def __init__(self, metric=None):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        if metric is not None:
            self.metric = metric


# torchmetrics' tester


def test_forward_gives_the_result_of_the_batch_and_compute_that_of_all(kind):
    metric, batches = kind.metric(), [kind.batch(size, seed=size) for size in (4, 1, 7)]
    for i, batch in enumerate(batches):
        assert_result(metric(batch), kind.expected(batch))
        assert_result(metric.compute(), kind.expected(*batches[: i + 1]))
    assert metric.update_count == 3


def test_forward_gives_what_update_and_compute_do(kind):
    one, other, batch = kind.metric(), kind.metric(), kind.batch(4, seed=1)
    other.update(batch)
    torch.testing.assert_close(one(batch), other.compute(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "copied", [lambda metric: metric.clone(), copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_a_copy_goes_on_by_itself(kind, copied):
    metric, x, y = kind.metric(), kind.batch(4, seed=1), kind.batch(3, seed=2)
    metric.update(x)
    metric.compute()
    twin = copied(metric)
    assert type(twin) is type(metric)
    assert_result(twin.compute(), kind.expected(x))
    twin.update(y)
    assert_result(twin.compute(), kind.expected(x, y))
    assert_result(metric.compute(), kind.expected(x))


def test_metrics_share_no_state(kind):
    one, other = kind.metric(), kind.metric()
    one.update(kind.batch(4, seed=1))
    assert not other.update_called
    other.update(kind.batch(3, seed=2))
    assert_result(other.compute(), kind.expected(kind.batch(3, seed=2)))


def test_metrics_are_hashable_and_no_two_alike(kind):
    metrics = [kind.metric() for _ in range(3)]
    for metric in metrics:
        metric.update(kind.batch(4, seed=1))
    assert len({hash(metric) for metric in metrics}) == 3


@pytest.mark.parametrize("constant", ["is_differentiable", "higher_is_better", "full_state_update"])
def test_constants_cannot_be_changed(kind, constant):
    metric = kind.metric()
    with pytest.raises(RuntimeError, match=constant):
        setattr(metric, constant, True)
    assert not getattr(metric, constant)


def test_nothing_is_differentiable(kind):
    metric, batch = kind.metric(), kind.batch(4, seed=1).requires_grad_()
    assert_result(metric(batch), kind.expected(batch))  # and requires no gradient
    assert not any(state.requires_grad for state in metric.metric_state.values())


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_input_of_any_precision_has_the_float64_moments_of_its_values(kind, dtype):
    batches = [kind.batch(size, seed=size, dtype=dtype) for size in (4, 1, 7)]
    metric = kind.metric()
    for batch in batches:
        assert_result(metric(batch), kind.expected(batch))
    assert_result(metric.compute(), kind.expected(*batches))


def test_it_can_be_scripted_as_far_as_torchmetrics_can(kind):
    torch.jit.script(kind.metric())


def test_to_compute_before_any_update_is_warned_of(kind):
    with pytest.warns(UserWarning, match=NO_DATA):
        kind.metric().compute()


def test_reset_forgets_everything(kind):
    metric, y = kind.metric(), kind.batch(3, seed=2)
    metric(kind.batch(4, seed=1))
    metric.compute()
    metric.reset()
    assert not metric.update_called
    metric.update(y)
    assert_result(metric.compute(), kind.expected(y))


def test_arguments_that_torchmetrics_does_not_know_are_refused():
    with pytest.raises(ValueError, match="momentum"):
        ChannelMoments(2, momentum=0.1)


# Results


def test_compute_may_be_repeated_and_gives_no_view_of_the_state():
    x, y = normal((4, 1)), normal((3, 1), seed=1)
    metric = filled(x)
    for field in metric.compute():
        field.fill_(-1)
    assert_moments(metric.compute(), x)
    metric.update(y)
    assert_moments(metric.compute(), x, y)


@pytest.mark.parametrize("change", ["update", "forward", "update_moments", "merge_state", "reset"])
def test_a_cached_result_does_not_outlive_a_change(change):
    x, y = normal((4, 1)), normal((3, 1), seed=1)
    metric, count_mean_m2 = filled(x, compute_with_cache=True), (1, torch.zeros(1), torch.zeros(1))
    cached = metric.compute()
    assert equal(metric.compute(), cached)
    {
        "update": lambda: metric.update(y),
        "forward": lambda: metric(y),
        "update_moments": lambda: metric.update_moments(*count_mean_m2),
        "merge_state": lambda: metric.merge_state(filled(y)),
        "reset": lambda: (metric.reset(), metric.update(x[:1])),
    }[change]()
    assert metric.compute().count != cached.count


def test_a_subclass_may_update_with_known_moments_and_a_signature_of_its_own():
    x, mask = normal((40, 2)), torch.arange(40) % 3 > 0
    metric = Masked(2)
    assert_moments(metric(x, mask), x[mask])
    metric.update(x, ~mask)
    assert_moments(metric.compute(), x)
    assert metric.update_count == 2


def test_a_subclass_may_give_moments_of_other_channels():
    x = normal((40, 6))
    count, mean, _ = moments_of(x)
    metric = Groups(6)
    metric.update(x)
    assert metric.compute().count.tolist() == [count] * 2
    np.testing.assert_allclose(metric.compute().mean.numpy(), mean.reshape(2, 3).mean(1), rtol=1e-12)


# Other metrics


@pytest.mark.parametrize("name", ["three channels", "one channel", "a result of its own"])
def test_it_works_in_a_metric_collection(name):
    kind = KINDS[name]
    x, y = kind.batch(4, seed=1), kind.batch(3, seed=2)
    collection = MetricCollection({"one": kind.metric(), "two": kind.metric()})
    forwarded = collection(x)
    collection.update(y)
    for name, result in collection.compute().items():
        assert_result(forwarded[name], kind.expected(x))
        assert_result(result, kind.expected(x, y))


@pytest.mark.parametrize("compute_groups", [True, False])
def test_metrics_of_one_state_may_share_it_in_a_collection(compute_groups):
    batches = [normal((n, 3), 4.0, seed=n) for n in (4, 3, 5)]
    collection = MetricCollection({"all": ChannelMoments(3), "mean": Mean(3)}, compute_groups=compute_groups)
    for i, batch in enumerate(batches):
        collection.update(batch)
        assert len(collection.compute_groups) == (1 if compute_groups else 0)
        computed = collection.compute()
        assert_moments(computed["all"], *batches[: i + 1])
        assert torch.equal(computed["mean"], computed["all"].mean)
    collection.reset()
    collection.update(batches[0])
    assert_moments(collection.compute()["all"], batches[0])


def test_it_can_be_tracked_over_epochs(kind):
    tracker = MetricTracker(kind.metric(), maximize=True)
    epochs = [kind.batch(size, seed=size) for size in (4, 3)]
    for batch in epochs:
        tracker.increment()
        tracker.update(batch)
    assert_result(tracker.compute(), kind.expected(epochs[1]))


def test_all_tracked_moments_are_a_list():
    tracker = MetricTracker(ChannelMoments(2), maximize=True)
    epochs = [normal((size, 2)) for size in (4, 3)]
    for batch in epochs:
        tracker.increment()
        tracker.update(batch)
    for result, batch in zip(tracker.compute_all(), epochs, strict=True):
        assert_moments(result, batch)


def test_it_may_be_that_of_the_last_batches_alone(kind):
    running, batches = Running(kind.metric(), window=2), [kind.batch(size, seed=size) for size in (4, 1, 7)]
    for batch in batches:
        running.update(batch)
    assert_result(running.compute(), kind.expected(*batches[1:]))


def test_fields_of_two_metrics_can_be_composed():
    x, y = normal((4, 2)), normal((3, 2), 5.0, seed=1)
    train, val = ChannelMoments(2), ChannelMoments(2)
    shift = val[1] - train[1]
    train.update(x)
    val.update(y)
    np.testing.assert_allclose(shift.compute().numpy(), moments_of(y)[1] - moments_of(x)[1], rtol=1e-12)


# merge_state


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("computed_before", [False, True])
def test_merge_state_adds_the_data_of_the_other(kind, as_dict, computed_before):
    x, y, z = kind.batch(4, seed=1), kind.batch(6, seed=2), kind.batch(2, seed=3)
    metric, other = kind.metric(), kind.metric()
    metric.update(x)
    other.update(y)
    if computed_before:
        metric.compute()
        other.compute()
    metric.merge_state(other.metric_state if as_dict else other)
    assert_result(metric.compute(), kind.expected(x, y))
    metric.update(z)
    assert_result(metric.compute(), kind.expected(x, y, z))
    assert_result(other.compute(), kind.expected(y))


def test_merging_an_empty_metric_changes_nothing_and_into_one_copies():
    x = normal((4, 2), 1e3)
    metric, empty = filled(x), ChannelMoments(2)
    metric.merge_state(empty)
    assert_moments(metric.compute(), x, ratio=1e3)
    empty.merge_state(metric)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_moments(empty.compute(), x, ratio=1e3)


def test_a_metric_takes_the_state_of_a_subclass_and_not_the_other_way_round():
    x, y = normal((4, 2)), normal((3, 2), seed=1)
    metric, derived = filled(x), Mean(2)
    derived.update(y)
    metric.merge_state(derived)
    assert_moments(metric.compute(), x, y)
    with pytest.raises(ValueError, match="must be a Mean or a dictionary of its states, got ChannelMoments"):
        derived.merge_state(metric)


@pytest.mark.parametrize("incoming", [None, torch.zeros(3, 2), [1]], ids=["None", "Tensor", "list"])
def test_what_is_no_metric_is_not_merged(incoming):
    with pytest.raises(ValueError, match=f"must be a ChannelMoments .*, got {type(incoming).__name__}"):
        ChannelMoments(2).merge_state(incoming)


def test_a_dictionary_without_a_state_is_not_merged():
    x = normal((4, 2))
    metric = Peak(2)
    metric.update(x)
    with pytest.raises(ValueError, match=r"must have \['state', 'peak'\], but lacks \['peak'\]"):
        metric.merge_state({"state": metric.state})
    np.testing.assert_allclose(metric.compute()["var"].numpy(), moments_of(x)[2], rtol=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
def test_another_number_of_channels_is_not_merged(channels):
    with pytest.raises(ValueError, match=rf"must have shape \(3, 2\), got \(3, {channels}\)"):
        ChannelMoments(2).merge_state(ChannelMoments(channels))


@pytest.mark.parametrize("full_state_update", [True, None])
def test_as_in_torchmetrics_metrics_that_need_their_whole_state_are_not_merged(full_state_update):
    whole = type("Whole", (ChannelMoments,), {"full_state_update": full_state_update})
    with pytest.raises(RuntimeError, match=f"got {full_state_update} and False"):
        whole(2).merge_state(whole(2))
    with pytest.raises(RuntimeError, match="got False and True"):
        ChannelMoments(2, dist_sync_on_step=True).merge_state(ChannelMoments(2))


# Checkpoints


def test_the_state_is_saved_only_where_it_is_persistent(kind):
    metric = kind.metric()
    metric.update(kind.batch(4, seed=1))
    assert metric.state_dict() == {}
    assert Network(metric).state_dict().keys() == Network().state_dict().keys()
    metric.persistent(True)
    assert metric.state_dict().keys() == metric.metric_state.keys()
    metric.persistent(False)
    assert metric.state_dict() == {}


def test_a_persistent_state_is_restored(kind):
    x, y = kind.batch(4, seed=1), kind.batch(3, seed=2)
    saved = kind.metric()
    saved.persistent(True)
    saved.update(x)
    metric = kind.metric()
    metric.update(y)
    metric.load_state_dict(saved.state_dict())
    assert_result(metric.compute(), kind.expected(x))
    metric.update(y)
    assert_result(metric.compute(), kind.expected(x, y))
    assert_result(saved.compute(), kind.expected(x))


@pytest.mark.parametrize("persistent", [False, True])
def test_a_module_that_has_gained_the_metric_loads_older_checkpoints(persistent):
    x = normal((4, 2))
    network = Network(filled(x))
    network.metric.persistent(persistent)
    older = Network().state_dict()
    network.load_state_dict(older, strict=True)
    assert torch.equal(network.layer.weight, older["layer.weight"])
    assert_moments(network.metric.compute(), x)


@pytest.mark.parametrize("persistent", [False, True])
def test_a_checkpoint_that_has_the_state_is_loaded_and_is_data_to_compute(persistent, tmp_path):
    x = normal((4, 2))
    saved = Network(filled(x))
    saved.metric.persistent(True)
    torch.save(saved.state_dict(), tmp_path / "checkpoint.pt")
    network = Network(ChannelMoments(2))
    network.metric.persistent(persistent)
    network.load_state_dict(torch.load(tmp_path / "checkpoint.pt"), strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_moments(network.metric.compute(), x)


# Conversions

CONVERSIONS = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "float": lambda module: module.float(),
    "to(float16)": lambda module: module.to(torch.float16),
    "to(bfloat16)": lambda module: module.to(torch.bfloat16),
    "to(device, float32)": lambda module: module.to("cpu", torch.float32),
    "type": lambda module: module.type(torch.float16),
}


@pytest.mark.parametrize("converted", CONVERSIONS.values(), ids=CONVERSIONS)
def test_the_state_stays_float64_whatever_its_module_is_converted_to(converted):
    x, y = normal((64, 2), 1e4), normal((32, 2), 1e4, seed=1)
    for network in (Network(filled(x)), Network(MetricCollection([filled(x)]))):
        converted(network)
        metric = network.metric if isinstance(network.metric, ChannelMoments) else network.metric["ChannelMoments"]
        assert_moments(metric.compute(), x, ratio=1e4)
        metric.update(y)
        assert_moments(metric.compute(), x, y, ratio=1e4)
        metric.reset()
        assert metric.state.dtype == torch.float64


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_the_state_stays_float64_where_set_dtype_asks_for_less(dtype):
    x = normal((64, 2), 1e4)
    assert_moments(filled(x).set_dtype(dtype).compute(), x, ratio=1e4)


def test_other_states_and_modules_of_a_subclass_are_converted_as_ever():
    class Embedded(ChannelMoments):
        def __init__(self):
            super().__init__(2)
            self.add_state("single", torch.zeros(2), dist_reduce_fx="sum")
            self.layer = torch.nn.Linear(2, 2)

    assert Embedded().to(torch.bfloat16).single.dtype == torch.bfloat16
    assert Embedded().set_dtype(torch.bfloat16).single.dtype == torch.bfloat16
    assert Network(Embedded()).bfloat16().metric.single.dtype == torch.float32  # torchmetrics guards this
    assert Network(Embedded()).bfloat16().metric.layer.weight.dtype == torch.bfloat16


def test_it_moves_to_another_device():
    metric = filled(normal((4, 2))).to("meta")
    assert metric.device.type == metric.state.device.type == "meta"
    metric.update(torch.zeros(4, 2, device="meta"))
    metric.reset()
    assert metric.state.device.type == "meta"


class Counting(LightningModule):
    """Trains on batches, and has a metric of them or not."""

    def __init__(self, metric=None):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.metric = metric

    def training_step(self, batch, batch_idx):
        if self.metric is not None:
            self.metric.update(batch)
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fitted(module, batches, folder, precision):
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision=precision,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(torch.cat(batches), batch_size=len(batches[0])))
    return trainer


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16)])
def test_lightning_converts_the_batches_and_not_the_state(precision, dtype, tmp_path):
    batches = [normal((16, 2), 1e3, dtype=torch.float32, seed=seed) for seed in range(3)]
    module = Counting(ChannelMoments(2))
    fitted(module, batches, tmp_path, precision)
    assert module.layer.weight.dtype == dtype
    assert_moments(module.metric.compute(), *(x.to(dtype) for x in batches), ratio=1e3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning_resumes_with_a_metric_from_a_checkpoint_without(tmp_path):
    batches = [normal((16, 2), dtype=torch.float32, seed=seed) for seed in range(3)]
    fitted(Counting(), batches, tmp_path, "32-true").save_checkpoint(tmp_path / "older.ckpt")
    module = Counting.load_from_checkpoint(tmp_path / "older.ckpt", metric=ChannelMoments(2), strict=True)
    fitted(module, batches, tmp_path, "32-true")
    assert_moments(module.metric.compute(), *batches)


def test_autocast_costs_no_digits():
    x = normal((64, 2), 1e4, dtype=torch.float32)
    metric = ChannelMoments(2)
    with torch.autocast("cpu", torch.bfloat16):
        metric.update(x)
        assert_moments(metric(x), x, ratio=1e4)
        assert_moments(metric.compute(), x, x, ratio=1e4)


def test_it_goes_on_in_training_after_inference_mode():
    x, y = normal((4, 2)), normal((3, 2), seed=1)
    metric = ChannelMoments(2)
    with torch.inference_mode():
        metric(x)
    assert_moments(metric(y), y)
    assert_moments(metric.clone().compute(), x, y)


# Ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return metric_tester.on_two_ranks(KINDS, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(params=[run for run in RUNS if run != "sync_on_compute=False"])
def run(request):
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_on_every_rank_compute_gives_the_result_of_all_ranks(ranks, name, run):
    kind = KINDS[name]
    everything = [x for rank in range(2) for x in batches_of(kind, run, rank)]
    for results in ranks:
        assert_result(results[name, run]["computed"], kind.expected(*everything))
    torch.testing.assert_close(ranks[0][name, run]["computed"], ranks[1][name, run]["computed"], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_after_compute_every_rank_goes_on_with_its_own_data(ranks, name, run):
    kind = KINDS[name]
    everything = [x for rank in range(2) for x in [*batches_of(kind, run, rank), batch_after(kind, rank)]]
    for rank, results in enumerate(ranks):
        torch.testing.assert_close(results[name, run]["before"], results[name, run]["after"], rtol=0, atol=0)
        own = sum(2 * len(x) for x in batches_of(kind, run, rank))  # two positions a sample
        assert results[name, run]["after"]["state"][0].tolist() == [own] * kind.channels
        assert_result(results[name, run]["computed again"], kind.expected(*everything))
        assert results[name, run]["saved"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_forward_gives_the_result_of_the_batch_on_this_rank_or_if_asked_on_all(ranks, name, run):
    kind = KINDS[name]
    batches = [batches_of(kind, run, rank) for rank in range(2)]
    for rank, results in enumerate(ranks):
        forwarded = results[name, run]["forwarded"]
        assert len(forwarded) == len(batches[rank])
        for i, result in enumerate(forwarded):
            seen = [batches[0][i], batches[1][i]] if run == "dist_sync_on_step" else [batches[rank][i]]
            assert_result(result, kind.expected(*seen))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_without_sync_on_compute_every_rank_has_its_own_result(ranks, name):
    kind = KINDS[name]
    for rank, results in enumerate(ranks):
        own = batches_of(kind, "sync_on_compute=False", rank)
        assert_result(results[name, "sync_on_compute=False"]["computed"], kind.expected(*own))
