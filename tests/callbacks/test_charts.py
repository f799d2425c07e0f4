"""The layout of the custom scalars: which charts, of which tags, beside which others."""

from __future__ import annotations

import pytest

from lightning_bnmonitor import BatchNormMonitor
from tests.callbacks.dashboard_fits import (
    BATCHES,
    LAYERS,
    METRICS,
    OURS,
    STEPS,
    THEIRS,
    At,
    board,
    fit,
    scalar_tags,
)
from tests.callbacks.event_files import charts_of, events, matched, rendered
from tests.callbacks.expected_warnings import EXPECTED_WARNINGS

pytestmark = EXPECTED_WARNINGS


@pytest.mark.parametrize("prefix", ["bn", "b.n+x (c)/d-e"])
def test_the_charts_match_the_tags_that_are_meant_and_no_others(tmp_path, prefix):
    logger = board(tmp_path)
    for decoy in (
        *("bxn+x (c)/d-e/eval_error_max", "b.nnx (c)/d-e.eval_error/a", "bn_x/unhealthy_layers"),
        *(f"x{prefix}/eval_error_max", f"{prefix}/eval_error_max_2", f"x{prefix}.mean_shift/a"),
        *(f"{prefix}x.eval_error/a", f"{prefix}xeval_error/a", f"{prefix}.eval_errors/a"),
        *(f"{prefix}/unhealthy_layers/a", "val_loss"),
    ):
        logger.experiment.add_scalar(decoy, 0, 0)
    fit(logger, BatchNormMonitor(log_key_prefix=prefix), max_epochs=1)
    found = events(logger.log_dir)
    assert scalar_tags(prefix) <= set(found.scalars)
    assert (set(found.images), set(found.texts)) == ({f"{prefix}/heatmap"}, {f"{prefix}/report"})
    (layout,) = found.layouts
    suffix = "" if prefix == "bn" else f" ({prefix})"
    assert found.categories() == [f"BatchNorm health{suffix}", f"BatchNorm layers{suffix}"]
    health, layers = charts_of(layout).values()
    errors, attention = ([matched(pattern, found.scalars) for pattern in patterns] for patterns in health.values())
    assert errors == [{f"{prefix}/eval_error_{of}"} for of in ("max", "p90", "median")]
    assert attention == [{f"{prefix}/unhealthy_layers"}]
    assert set(layers) == set(METRICS)
    for metric, (pattern,) in layers.items():
        assert matched(pattern, found.scalars) == {f"{prefix}.{metric}/{layer}" for layer in LAYERS}


def test_the_layout_is_written_once(run):
    assert [len(layout.category) for layout in run.events.layouts] == [len(OURS)]


def test_a_layout_that_is_set_later_stands(tmp_path):
    logger = board(tmp_path)
    later = At(BATCHES + 3, lambda trainer: trainer.logger.experiment.add_custom_scalars(THEIRS))
    fit(logger, BatchNormMonitor(), later, max_epochs=3)
    found = events(logger.log_dir)
    assert [len(layout.category) for layout in found.layouts] == [2, 2]
    assert found.categories() == list(THEIRS)


def test_two_monitors_have_both_their_charts_pictures_and_texts(tmp_path):
    logger = board(tmp_path)
    one, other = BatchNormMonitor(include="quick"), BatchNormMonitor(include="slow", log_key_prefix="z")
    fit(logger, one, other)
    found = events(logger.log_dir)
    assert found.categories() == [*OURS, *(f"{title} (z)" for title in OURS)]
    assert found.at("bn/heatmap")[-1] == found.at("z/heatmap")[-1] == STEPS[1]
    for prefix, layer in (("bn", "quick"), ("z", "slow")):
        assert found.at(f"{prefix}/report") == STEPS[:2]
        assert [[row[0] for row in rendered(text).rows[1:]] for _, text in found.texts[f"{prefix}/report"]] == [
            [layer]
        ] * 2


def test_a_prefix_of_the_logger_is_that_of_pictures_texts_and_charts_as_of_scalars(tmp_path):
    logger = board(tmp_path, prefix="exp")
    fit(logger, BatchNormMonitor())
    found = events(logger.log_dir)
    assert found.at("exp-bn/heatmap") == found.at("exp-bn/report") == found.at("exp-bn/unhealthy_layers")
    patterns = [tag for chart in charts_of(found.layouts[-1]).values() for tags in chart.values() for tag in tags]
    assert patterns
    assert all(matched(pattern, found.scalars) for pattern in patterns)
