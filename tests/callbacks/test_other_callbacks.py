"""The monitor beside other callbacks: averaging, finetuning, pruning, finders, progress bars."""

import importlib.util

import pytest
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from lightning_bnmonitor import BatchNormMonitor
from tests.callbacks.compared_fits import MOMENTUM, Net, fit, fit_in_both_orders, samples, val_data
from tests.callbacks.expected_warnings import EXPECTED_WARNINGS
from tests.callbacks.lightning_versions import LIGHTNING, averaging

pytestmark = EXPECTED_WARNINGS


def test_the_reference_notices_a_batch_that_is_missing(tmp_path):
    ran = fit(tmp_path, twin=False).check(10, 20).check_healthy()
    del ran.recorder.batches[-1]["net.a"][0]
    with pytest.raises(AssertionError):
        ran.check(10, 20)


@pytest.mark.slow
def test_stochastic_weight_averaging(tmp_path):
    def others():
        return [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)]

    for ran in fit_in_both_orders(tmp_path, others=others, max_epochs=4):
        ran.check(10, 20, 30, 40, 50)  # the last epoch computes the averaged weights' statistics afresh
        assert [ran.flags_of_training(i)["net.a"] for i in range(5)] == [(), (), (), (), ("written-outside",)]
        assert ran.verdicts() == dict.fromkeys(("net.a", "net.b"), "healthy")
        for report in ran.reports[:4]:
            assert (report["net.a"].momentum, report["net.a"].evidence["updates_per_call"]) == (MOMENTUM, 1)
        weights = [report["net.a"].evidence["initial_weight"] for report in ran.reports]
        assert weights == [*(pytest.approx((1 - MOMENTUM) ** (10 * epoch)) for epoch in range(1, 5)), 0]
        assert ran.reports[4]["net.a"].momentum is None


@pytest.mark.parametrize(("name", "use_buffers"), [("WeightAveraging", True), ("EMAWeightAveraging", False)])
def test_weight_averaging_swaps_weights_in_validation_and_the_report_is_of_those_that_train(
    tmp_path, name, use_buffers
):
    def others():
        return [averaging(name)(use_buffers=use_buffers)]

    for ran in fit_in_both_orders(tmp_path, others=others, val_check_interval=0.5):
        ran.check(10, 20).check_healthy("other-weights")


class Unfreezes(BaseFinetuning):
    def __init__(self, train_bn):
        super().__init__()
        self.train_bn = train_bn

    def freeze_before_training(self, pl_module):
        self.freeze([pl_module.net.conv, pl_module.net.a], train_bn=self.train_bn)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 2:
            self.unfreeze_and_add_param_group([pl_module.net.conv, pl_module.net.a], optimizer, lr=0.002)


class FiltersParameters(Net):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.002)


@pytest.mark.slow
def test_finetuning_that_freezes_batch_norm_is_stale_until_it_is_unfrozen(tmp_path):
    for ran in fit_in_both_orders(tmp_path, FiltersParameters, lambda: [Unfreezes(False)], max_epochs=5):
        ran.check(10, 20, 30, 40, 50)
        assert [ran.verdicts(i)["net.a"] for i in (0, 1, 3, 4)] == ["stale", "stale", "healthy", "healthy"]
        assert ran.verdicts(2)["net.a"] in ("warming-up", "healthy")
        flags = [ran.flags_of_training(i)["net.a"] for i in range(5)]
        assert flags == [("not-updating",), ("not-updating",), (), (), ()]
        assert ran.reports[0]["net.a"].needs_attention
        assert {ran.flags_of_training(i)["net.b"] for i in range(5)} == {()}
        assert ran.reports[2]["net.a"].evidence["initial_weight"] == pytest.approx((1 - MOMENTUM) ** 10)


def test_finetuning_that_trains_batch_norm_is_as_without_it(tmp_path):
    ran = fit(tmp_path, FiltersParameters, lambda: [Unfreezes(True)], max_epochs=4)
    ran.check(10, 20, 30, 40).check_healthy()


def test_pruning_leaves_the_layers_alone(tmp_path):
    def others():
        return [ModelPruning("l1_unstructured", amount=0.3, parameter_names=["weight"], make_pruning_permanent=True)]

    ran = fit(tmp_path, others=others)
    ran.check(10, 20).check_healthy()


@pytest.mark.slow
def test_callbacks_that_only_watch(tmp_path):
    def others():
        return [
            *(LearningRateMonitor(), Timer(), TQDMProgressBar(), ModelSummary(max_depth=-1)),
            *([DeviceStatsMonitor()] if importlib.util.find_spec("psutil") else []),
            *(ModelCheckpoint(save_last=True), EarlyStopping("val_loss", patience=9)),
            GradientAccumulationScheduler({0: 1, 1: 3}),
        ]

    options = {"logger": [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb")]}
    options |= {"num_sanity_val_steps": 2, "enable_progress_bar": True}
    for ran in fit_in_both_orders(tmp_path, others=others, **options):
        ran.check(10, 20).check_healthy()
    assert "bn/eval_error_max" in (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()


@pytest.mark.skipif(LIGHTNING < (2, 5, 6), reason="the progress bar of Lightning 2.5.0 fails with rich 15")
def test_rich_progress_bar_and_model_summary_with_an_example_input(tmp_path, capsys):
    pytest.importorskip("rich")

    class WithExample(Net):
        example_input_array = torch.full((5, 1, 6), 1e3)

    def others():
        return [RichProgressBar(), RichModelSummary(max_depth=-1)]

    options = {"enable_progress_bar": True, "enable_model_summary": True}
    for ran in fit_in_both_orders(tmp_path, WithExample, others, **options):
        ran.check(10, 20).check_healthy()
    assert capsys.readouterr().out.count("BatchNorm: running statistics in the last window") == 2


# ----------------------------------------------------------------------------------------------- trials before training


class OwnData(Net):
    """Has its batch size and learning rate where the finders look for them."""

    def __init__(self):
        super().__init__()
        self.batch_size, self.lr = 8, 0.002

    def train_dataloader(self):
        return DataLoader(samples(), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return val_data()


class LearningRateFinderAt(LearningRateFinder):
    def on_fit_start(self, trainer, pl_module):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.lr_find(trainer, pl_module)


def finds_learning_rate(at_start=True):
    finder = LearningRateFinder if at_start else LearningRateFinderAt
    return [finder(min_lr=1e-4, max_lr=0.1, num_training_steps=25)]


def finds_batch_size():
    return [BatchSizeFinder(init_val=16, max_trials=2, steps_per_trial=2)]


@pytest.mark.slow
@pytest.mark.skipif(LIGHTNING < (2, 5, 6), reason="Lightning 2.5.0 then leaves out batches of the first epoch")
@pytest.mark.parametrize("finder", [finds_learning_rate, finds_batch_size])
def test_what_a_finder_tries_before_training_does_not_count(tmp_path, finder):
    for ran in fit_in_both_orders(tmp_path, OwnData, finder, data=None, max_epochs=2):
        batches = ran.trainer.num_training_batches
        assert batches == (40 if finder is finds_learning_rate else 10 if LIGHTNING >= (2, 6) else 5)
        ran.check(batches, 2 * batches)
        assert {flags for window in (0, 1) for flags in ran.flags_of_training(window).values()} == {()}
        for report in ran.reports:
            assert {layer.evidence["updates_per_call"] for layer in report.values()} == {1}
        weights = [layer.evidence["initial_weight"] for layer in ran.reports[0].values()]
        assert weights == pytest.approx([(1 - MOMENTUM) ** batches] * 2)


@pytest.mark.slow
def test_what_a_finder_tries_between_epochs_does_not_count(tmp_path):
    # (After a BatchSizeFinder there, Lightning 2.6 trains on nothing any more, with or without us.)
    def others():
        return finds_learning_rate(at_start=False)

    twin = True
    for number, (window, monitor_first, ends) in enumerate(
        [
            ({}, True, [40, 80]),
            ({}, False, [40, 80]),
            ({"every_n_train_batches": 28}, True, [28, 56, 80]),
            ({"every_n_train_batches": 28}, False, [28, 56, 80]),
            ({"every_n_epochs": 2}, True, [80]),
        ]
    ):
        monitor, options = BatchNormMonitor(**window), {"data": None, "max_epochs": 2, "twin": twin}
        ran = fit(tmp_path / str(number), OwnData, others, monitor, monitor_first, **options).check(*ends)
        twin = ran.twin
        for window, report in enumerate(ran.reports):
            assert set(ran.flags_of_training(window).values()) == {()}
            assert {layer.evidence["updates_per_call"] for layer in report.values()} == {1}
