"""The page of one file, opened from disk in a real browser: what is shown, and what a reader does with it."""

import numpy as np
import pytest

from tests.page import made_documents as made

pytestmark = pytest.mark.slow

LEVELS = (0, 0.03, 0.1, 0.25, 0.6, 1.5)
MINUS = "\N{MINUS SIGN}"
COLORS = ("#f6f4ea", "#dcd9c4", "#e9b44c", "#d1603d", "#8c2f5b", "#2b1243")


def with_channels(document):
    return document, made.channels_document(document)


def values_of(document, metric):
    """A metric's ``(W, L)`` values, decoded by hand."""
    shape = len(document["windows"]["step"]), len(document["layers"]["name"])
    return made.words_of(document["metrics"][metric], shape[0] * shape[1]).view(np.float32).reshape(shape)


@pytest.fixture
def five(opened):
    opened.open({"run": with_channels(made.five_layers())})
    return opened


class TestHeatmap:
    def test_it_has_a_row_for_each_layer_in_the_models_order(self, five):
        assert five.labels() == ["stem.1", "body.1", "body.4", "body.7", "head.1"]

    def test_colours_are_the_steps_of_the_values(self, five):
        values = values_of(made.five_layers(), "eval_error")
        for row, column in [(0, 0), (0, 11), (1, 3), (2, 1), (3, 4), (4, 11)]:
            step = np.searchsorted(LEVELS, values[column, row], side="right") - 1
            assert five.color(row, column, 12) == COLORS[step]

    def test_another_metric_is_a_button_away_and_what_is_not_there_has_none(self, five):
        assert five.texts('[aria-label="Metric"] button') == [
            "eval_error",
            "val_error",
            "val_shift",
            "batch_jitter",
            "noise",
        ]
        five.button("noise")
        assert five.color(0, 0, 12) == COLORS[0]
        assert five.address() == {"metric": "noise"}

    def test_the_pointer_shows_the_numbers(self, five):
        text = five.hover(3, 4, 12)
        assert text.startswith("body.7step 320noisy (N): needs attention")
        assert "eval_error0.19" in text

    def test_a_click_selects_layer_and_window(self, five):
        five.click_cell(3, 4, 12)
        assert five.selected() == (["body.7"], "body.7")
        assert five.address() == {"layer": "body.7", "window": "320"}
        assert "worst: step 320" in five.texts('[aria-label="Window"] button[aria-pressed="false"]')
        assert five.text(".badge:first-child").startswith("noisy")

    def test_the_layer_that_is_worst_is_shown_at_first(self, five):
        assert five.selected() == (["stem.1"], "stem.1")
        assert five.address() == {}

    def test_arrows_move_and_escape_goes_back(self, five):
        five.click_cell(0, 11, 12)
        five.press("ARROW_DOWN", "ARROW_DOWN", "ARROW_LEFT")
        assert five.address() == {"layer": "body.4", "window": "704"}
        five.press("ARROW_UP", "HOME")
        assert five.address() == {"layer": "body.1", "window": "64"}
        assert "body.1, step 64: 0.0" in five.script("return document.querySelector('.spoken').textContent")
        five.press("END")
        assert five.address() == {"layer": "body.1"}
        five.press("ESCAPE")
        assert five.address() == {}

    def test_cells_of_windows_without_the_layer_stay_empty(self, opened):
        opened.open({"run": made.odd_names()})
        row = made.ODD_NAMES.index("a/b\\c")
        assert opened.color(row, 0, 3) is None
        assert opened.color(row, 1, 3) is not None
        assert opened.hover(row, 0, 3).endswith("The layer is not in this window.")

    def test_infinite_errors_have_the_last_colour(self, opened):
        opened.open({"run": made.odd_names()})
        assert opened.color(0, 2, 3) == COLORS[-1]
        assert "eval_error∞" in opened.hover(0, 2, 3)


class TestRows:
    @pytest.fixture
    def resnet(self, opened):
        opened.open({"run": made.two_sick_of_53()})
        return opened

    def test_the_worst_come_first_if_asked_for(self, resnet):
        resnet.button("worst")
        document = made.two_sick_of_53()
        last = values_of(document, "eval_error")[-1]
        names = np.array(document["layers"]["name"])
        expected = names[np.argsort(-last, kind="stable")]
        assert resnet.labels()[:10] == expected[:10].tolist()
        assert resnet.labels()[:2] == ["layer4.1.bn2", "layer2.0.downsample.1"]

    def test_by_name_numbers_count_as_numbers(self, opened):
        names = ["b.10.bn", "b.9.bn", "a.bn"]
        opened.open({"run": made.run_document(names, [1], {"eval_error": np.ones((1, 3))}, [["healthy"] * 3])})
        opened.button("name")
        assert opened.labels() == ["a.bn", "b.9.bn", "b.10.bn"]

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("DOWNSAMPLE", [f"layer{stage}.0.downsample.1" for stage in (1, 2, 3, 4)]),
            ("layer4.?.bn2", [f"layer4.{block}.bn2" for block in (0, 1, 2)]),
            ("*.1", [f"layer{stage}.0.downsample.1" for stage in (1, 2, 3, 4)]),
            ("lagging", ["layer2.0.downsample.1", "layer4.1.bn2"]),
            ("[", []),
        ],
    )
    def test_the_filter_takes_parts_patterns_and_causes(self, resnet, text, expected):
        resnet.type(text)
        assert resnet.labels() == expected
        assert (resnet.texts(".heatmap > p") == ["No layer matches the filter."]) is not bool(expected)

    def test_a_cause_of_the_legend_filters(self, resnet):
        resnet.click('button[data-cause="lagging"]')
        assert resnet.labels() == ["layer2.0.downsample.1", "layer4.1.bn2"]
        resnet.click('button[data-cause="lagging"]')
        assert len(resnet.labels()) > 20

    def test_enter_folds_a_module_and_unfolds_it(self, resnet):
        resnet.script("document.querySelector('.scroller').focus()")
        resnet.press("ENTER")
        assert resnet.selected() == (["layer4.1"], "layer4.1.bn2")  # the worst of them is shown
        assert resnet.text(".below .quiet").startswith("in layer4.1.*")
        resnet.press_with_shift("ENTER")
        assert resnet.selected() == (["layer4"], "layer4.1.bn2")
        assert "layer4.2.bn1" not in resnet.labels()
        resnet.press(" ")
        assert resnet.selected()[1] == "layer4.0.bn1"
        assert resnet.address()["fold"] == "layer4.1"

    def test_a_folded_module_has_the_worst_of_its_layers(self, resnet):
        resnet.choose("Fold modules", "1")
        assert resnet.labels() == ["bn1", "layer1", "layer2", "layer3", "layer4"]
        assert resnet.texts(".labels .size") == ["10", "13", "19", "10"]
        document = made.two_sick_of_53()
        names = document["layers"]["name"]
        values = values_of(document, "eval_error")[:, [name.startswith("layer4.") for name in names]].max(axis=1)
        for column in (0, 8, 29):
            step = np.searchsorted(LEVELS, values[column], side="right") - 1
            assert resnet.color(4, column, 30) == COLORS[step]
        assert "worst of 10: layer4.1.bn2" in resnet.hover(4, 29, 30)

    def test_a_name_in_the_head_leads_to_the_layer_whatever_hides_it(self, resnet):
        resnet.choose("Fold modules", "1")
        resnet.type("bn1")
        resnet.button("layer2.0.downsample.1")
        assert resnet.selected() == (["layer2.0.downsample.1"], "layer2.0.downsample.1")


class TestManyLayers:
    @pytest.fixture(scope="class")
    def document(self):
        return made.thousand_layers()

    def test_only_visible_rows_are_there_and_scrolling_brings_others(self, opened, document):
        opened.open({"run": document}, "sort=name")
        assert 10 < len(opened.labels()) < 60
        opened.script("document.querySelector('.scroller').scrollTop = 1e6")
        opened.wait(lambda: "blocks.49.unit4.shortcut.bn" in opened.labels())
        assert opened.color(len(opened.labels()) - 1, 200, 400) is not None

    def test_the_selected_layer_is_in_sight_and_keys_keep_it_so(self, opened, document):
        opened.open({"run": document}, "layer=blocks.30.unit0.conv.bn")
        opened.wait(lambda: opened.selected()[0] == ["blocks.30.unit0.conv.bn"])
        opened.script("document.querySelector('.scroller').focus()")
        opened.press("PAGE_DOWN", "PAGE_DOWN", "PAGE_DOWN")
        keys, heading = opened.selected()
        assert keys == [heading]
        assert heading.startswith("blocks.3")
        assert not heading.startswith("blocks.30")

    def test_every_window_of_400_can_be_pointed_at(self, opened, document):
        opened.open({"run": document}, "filter=blocks.0.unit0.conv.bn")
        for column in (0, 133, 398, 399):
            assert f"step {50 * (column + 1)}" in opened.hover(0, column, 400).replace("\u2009", "")


class TestPanel:
    def test_it_says_what_is_the_matter_and_what_to_do(self, five):
        assert five.texts(".badge") == ["warming-upW", "domain-shift"]
        assert five.text(".explanation") == made.EXPLAINED["warming-up"]
        assert five.texts(".remedy code") == ["momentum=0.157", "lightning_bnmonitor.recalibrate(model, loader)"]

    def test_the_remedys_code_is_copied_by_one_click(self, five):
        five.browser.execute_cdp_cmd(
            "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
        )
        five.button("Copy")
        five.wait(lambda: five.texts(".copy") == ["Copied"])
        read = "const done = arguments[0]; navigator.clipboard.readText().then(done, error => done(String(error)))"
        assert (
            five.browser.execute_async_script(read) == "momentum=0.157\nlightning_bnmonitor.recalibrate(model, loader)"
        )

    def test_metrics_are_drawn_over_the_floor(self, five):
        drawn = five.script(
            "return [...document.querySelectorAll('.panel path.line[data-name]')].map(e => e.dataset.name)"
        )
        assert drawn[:4] == ["eval_error", "val_error", "val_shift", "batch_jitter"]
        assert five.script("return document.querySelectorAll('.charts:first-of-type path.band').length") == 1

    def test_every_channel_is_drawn_and_the_worst_are_named(self, five):
        channels = made.channels_document(made.five_layers())["layers"]["stem.1"]["latest"]
        error = made.words_of(channels["values"]["eval_error"], 64).view(np.float32)
        section = (
            "[...document.querySelectorAll('.panel .charts')].find(e => e.textContent.startsWith('Running against'))"
        )
        five.wait(lambda: five.script(f"return {section}") is not None)
        count = "[...chart.querySelectorAll('.dots')].map(e => e.getAttribute('d').split('M').length - 1)"
        charts = five.script(f"return [...{section}.querySelectorAll('.chart')].map(chart => {count})")
        assert charts == [[60, 4], [60, 4]]
        named = five.script(f"return [...{section}.querySelectorAll('.point')].map(e => e.textContent)")
        assert set(named) <= {str(index) for index in np.argsort(-error)[:4]}
        assert str(error.argmax()) in named
        assert five.texts(".panel h3")[1:] == [
            "Running against exact statistics: 64 channels",
            f"Over the window: channel {error.argmax()}",
            "Validation beside training",
        ]

    def test_a_healthy_layers_channels_stand_on_the_line(self, five):
        five.click_cell(1, 11, 12)
        off = """
            const chart = document.querySelectorAll(".panel .charts")[1]?.querySelector(".chart");
            if (!chart) return null;
            const points = path =>
                path.getAttribute("d").match(/[ML][^MLhV]+/g).map(p => p.slice(1).split(" ").map(Number));
            const [a, b] = points(chart.querySelector(".line")), dots = points(chart.querySelector(".dots"));
            const slope = (b[1] - a[1]) / (b[0] - a[0]);
            return Math.max(...dots.map(([x, y]) => Math.abs(y - (a[1] + slope * (x - a[0])))));
        """
        assert five.wait(lambda: five.script(off)) < 6  # pixels of some 200

    def test_latest_and_worst_window_are_switched(self, five):
        five.click('[aria-label="Window"] button[data-value="worst"]')
        assert five.address() == {"window": "worst"}
        assert five.texts(".numbers dd")[0] == "1.13"
        five.click('[aria-label="Window"] button[data-value="latest"]')
        assert five.texts(".numbers dd")[0] == "0.57"

    def test_a_worst_window_that_was_merged_with_its_neighbour_keeps_its_words(self, opened):
        document = made.five_layers()
        document["worst"]["layers"][0]["window"] = 5
        opened.open({"run": document}, "window=worst")
        assert opened.texts('[aria-label="Window"] [aria-pressed="true"]') == ["worst: step 5"]
        assert opened.text(".explanation") == made.EXPLAINED["warming-up"]
        assert "needs no attention" not in opened.text(".badges")

    def test_the_evidence_is_explained(self, five):
        five.click("summary")
        values = made.five_layers()["latest"]["layers"][0]["evidence"]
        numbers = {"eval_error": str(values["eval_error"]), "initial_weight": "0.774", "severity": "∞"}
        assert five.texts(".evidence tr") == [f"{name}{text}{made.DEFINITIONS[name]}" for name, text in numbers.items()]


class TestComparison:
    @pytest.fixture
    def two(self, opened):
        after = made.five_layers(momentum=0.01, seed=1)
        opened.open({"before": with_channels(made.five_layers()), "after": with_channels(after)}, "versus=run%3Aafter")
        return opened

    def test_two_runs_stand_side_by_side(self, two):
        assert two.texts(".head") == ["before", "after"]
        assert two.texts(".comparison th") == ["", "before", "after", "change"]
        row = two.texts(".comparison tbody tr")
        assert row[0] == "verdictwarming-uphealthy"
        assert row[1] == f"eval_error0.570.011{MINUS}0.56"

    def test_a_sentence_says_what_changed(self, two):
        assert (
            two.text(".changes")
            == f"At step 768, of 5 layers: 1 better (stem.1 by {MINUS}0.56), 0 worse, 4 within 0.03."
        )

    def test_the_difference_is_drawn_too(self, two):
        two.button("difference")
        before, after = (
            values_of(made.five_layers(**how), "eval_error") for how in ({}, {"momentum": 0.01, "seed": 1})
        )
        assert (after - before)[3, 0] < -0.6
        assert two.color(0, 3, 12) == "#08306b"
        assert two.color(1, 3, 12) == "#f4f3ee"
        assert f"change{MINUS}0.84" in two.hover(0, 3, 12)

    def test_two_windows_of_a_run(self, five):
        five.choose("Compare with", "step:64")
        assert five.texts(".head") == ["step 64", "step 768", "change"]
        assert five.text(".changes").startswith(
            f"From step 64 to step 768, of 5 layers: 1 better (stem.1 by {MINUS}0.57)"
        )
        assert five.texts(".comparison tbody tr")[1] == f"eval_error1.130.57{MINUS}0.57"

    def test_windows_of_runs_are_paired_by_their_steps(self, opened):
        a = made.run_document(["bn"], [10, 20, 30, 40], {"eval_error": np.full((4, 1), 0.5)}, [["lagging"]] * 4)
        b = made.run_document(["bn"], [30, 41], {"eval_error": np.full((2, 1), 0.1)}, [["healthy"]] * 2)
        opened.open({"a": a, "b": b}, "versus=run%3Ab&view=difference")
        assert [opened.color(0, column, 4) for column in range(4)] == [None, None, "#2166ac", "#2166ac"]
        assert opened.hover(0, 3, 4).endswith(f"a0.50b0.10change{MINUS}0.40")

    def test_a_layer_that_only_one_run_has(self, opened):
        values = {"eval_error": np.full((1, 2), 0.5)}
        first = made.run_document(["both", "first"], [10], values, [["lagging"] * 2])
        second = made.run_document(["both", "second"], [10], values, [["lagging"] * 2])
        opened.open({"a": first, "b": second}, "versus=run%3Ab&view=difference")
        assert opened.labels() == ["both", "first", "second"]
        assert [opened.color(row, 0, 1) for row in range(3)] == ["#f4f3ee", None, None]
        opened.click('[data-key="second"]')
        assert opened.text(".panel p") == "The run “a” has no such layer."


class TestAddress:
    FRAGMENT = "run=b&metric=val_error&sort=worst&filter=bn&layer=layer3.2.bn1&window=800&fold=layer1&fold=layer4.0"

    def test_a_link_shows_the_same(self, opened):
        opened.open({"a": made.healthy(), "b": made.two_sick_of_53()})
        opened.click('button[data-run="b"]')
        opened.button("val_error")
        opened.button("name")
        opened.type("layer4")
        opened.click_cell(1, 3, 30)
        opened.press("ENTER")
        opened.choose("Compare with", "run:a")
        before = opened.labels(), opened.selected(), opened.address(), opened.texts(".head")
        assert before[2]["run"] == "b"
        assert len(before[2]) == 8
        opened.go(opened.script("return location.href"))
        assert (opened.labels(), opened.selected(), opened.address(), opened.texts(".head")) == before

    def test_everything_in_the_address_counts(self, opened):
        opened.open({"a": made.healthy(), "b": made.two_sick_of_53()}, self.FRAGMENT)
        assert opened.script("return document.querySelector('.run[aria-pressed=true]').dataset.run") == "b"
        assert opened.texts('.toolbar [aria-pressed="true"]') == ["val_error", "worst"]
        assert opened.text(".panel h2") == "layer3.2.bn1"
        assert opened.texts('[aria-label="Window"] [aria-pressed="true"]') == ["step 800"]
        assert {"layer1", "layer4.0"} <= set(opened.labels())

    def test_a_link_to_what_is_not_there_shows_what_is(self, opened):
        opened.open({"a": made.five_layers()}, "run=gone&metric=gone&versus=run%3Agone&window=7")
        assert opened.labels()[0] == "stem.1"
        assert opened.selected() == (["stem.1"], "stem.1")

    def test_a_changed_address_is_followed(self, five):
        five.script("location.hash = 'layer=head.1'")
        five.wait(lambda: five.text(".panel h2") == "head.1")


def test_dark_follows_the_system_and_colours_keep_their_order(opened):
    opened.open({"run": made.five_layers()})
    light = opened.color(0, 0, 12)
    opened.emulate(prefers_color_scheme="dark")
    opened.wait(lambda: opened.script("return document.documentElement.dataset.mode") == "dark")
    assert opened.color(0, 0, 12) != light
    ground = opened.script("return getComputedStyle(document.body).backgroundColor")
    assert max(int(part) for part in ground[4:-1].split(",")) < 60


class TestOddNames:
    def test_names_are_shown_as_they_are(self, opened):
        opened.open(
            {"<i>run</i>": with_channels(made.odd_names()), "b & c": made.odd_names()}, title="</title><script>"
        )
        assert opened.labels() == list(made.ODD_NAMES)
        assert opened.texts(".run .name") == ["<i>run</i>", "b & c"]
        assert opened.script("return document.querySelectorAll('header i, .labels b, .labels script').length") == 0
        assert opened.browser.title == "</title><script>"

    def test_they_can_be_selected_and_linked(self, opened):
        opened.open({"run": made.odd_names()})
        for row, name in enumerate(made.ODD_NAMES):
            opened.click_cell(row, 1, 3)
            assert opened.text(".panel h2") == name
            assert opened.address() == {"layer": name, "window": "20"}


class TestEmpty:
    def test_no_data_yet(self, opened):
        opened.open({})
        assert opened.text(".message h1") == "No BatchNorm data yet"
        assert "BatchNormMonitor()" in opened.text(".message p:nth-child(2)")

    def test_a_run_without_batchnorm(self, opened):
        opened.open({"run": made.run_document([], [10], {"eval_error": np.zeros((1, 0))}, [])})
        assert opened.text(".message h1") == "No BatchNorm layer was monitored"

    def test_a_run_without_a_window(self, opened):
        opened.open({"run": made.run_document(["bn"], [], {"eval_error": np.zeros((0, 1))}, [])})
        assert opened.text(".message h1") == "No BatchNorm data yet"

    def test_a_newer_format_names_itself_and_other_runs_can_be_seen(self, opened):
        opened.open({"new": {"format": 3}, "old": made.five_layers()})
        assert "format 3; this page reads 2" in opened.text(".message p")
        opened.click('button[data-run="old"]')
        assert opened.labels()[0] == "stem.1"

    @pytest.mark.parametrize("document", [{"format": 2}, {"format": "x"}, None], ids=["without-content", "odd", "none"])
    def test_a_run_that_cannot_be_read(self, opened, document):
        opened.open({"bad": document})
        assert opened.text(".message h1") == "The run “bad” cannot be shown"
