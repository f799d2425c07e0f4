"""The command: what it prints of event files, and its exit status."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
from torch.utils.tensorboard import SummaryWriter

from lightning_bnmonitor import Report
from lightning_bnmonitor.commands import main
from lightning_bnmonitor.page.document import encode
from lightning_bnmonitor.report.history import History
from lightning_bnmonitor.tensorboard.events import HISTORY, summary
from tests.tensorboard.written_runs import GOOD, ODD_NAMES, SICK, history, write


@pytest.fixture
def logdir(tmp_path):
    write(tmp_path / "logs" / "run 10", history(SICK))
    write(tmp_path / "logs" / "run 9", history(GOOD))
    write(tmp_path / "logs" / "another")
    return tmp_path / "logs"


def shown(capsys, *arguments):
    """Exit status, output, errors."""
    status = main(["show", *map(str, arguments)])
    output, errors = capsys.readouterr()
    return status, output, errors


def test_it_prints_the_report_of_the_last_window_of_each_run(capsys, logdir):
    status, output, errors = shown(capsys, logdir)
    assert (status, errors) == (0, "")
    good, sick = (history(windows).document()["latest"]["text"] for windows in (GOOD, SICK))
    assert output == f"run 9, step 20\n\n{good}\n\n\nrun 10, step 30\n\n{sick}\n"


@pytest.mark.parametrize("options", [[], ["--window", 20], ["--json"]])
def test_what_version_0_5_has_written_is_shown_the_same(capsys, logdir, tmp_path, options):
    write(tmp_path / "older", history(SICK), format=1)
    assert shown(capsys, tmp_path / "older", *options) == shown(capsys, logdir / "run 10", *options)


def test_of_an_earlier_window_it_prints_the_sentence_and_a_table_of_metrics(capsys, logdir):
    status, output, _ = shown(capsys, logdir / "run 10", "--window", 20)
    assert status == 0
    head, _, said, _, *table = output.splitlines()
    assert head == "., step 20"
    assert said == history(SICK).to_dict()["windows"][1]["headline"]
    assert [row.split() for row in table[2:]] == [
        ["stem", "lagging", "0.2500", "0.0500"],
        ["head", "healthy", "0.0000", "0.0500"],
    ]
    assert table[0].split() == ["layer", "cause", "eval_error", "noise"]


@pytest.mark.parametrize(("step", "window"), [(0, 10), (10, 10), (11, 20), (20, 20), (21, 30), (30, 30)])
def test_a_step_is_in_the_window_that_ended_with_it_or_next(capsys, logdir, step, window):
    _, output, _ = shown(capsys, logdir / "run 10", "--window", step, "--json")
    assert json.loads(output)["."]["step"] == window


@pytest.mark.parametrize("step", [-1, 31])
def test_a_step_that_is_in_no_window_is_refused(capsys, logdir, step):
    status, output, errors = shown(capsys, logdir / "run 10", "--window", step)
    assert (status, output) == (2, "")
    assert f"Step {step} is in none" in errors
    assert "step 30" in errors


def test_runs_that_have_that_window_are_shown_beside_those_that_have_not(capsys, logdir):
    status, output, errors = shown(capsys, logdir, "--window", 30)
    assert status == 2
    assert "run 10, step 30" in output
    assert "run 9: Step 30" in errors


def test_json_is_json(capsys, logdir):
    status, output, _ = shown(capsys, logdir, "--json")
    found = json.loads(output)
    assert status == 0
    assert list(found) == ["run 9", "run 10"]
    expected = history(SICK).to_dict()["windows"][-1]
    assert found["run 10"] == expected
    assert list(found["run 10"]["layers"]) == ["stem", "head"]  # the worst first


def test_what_json_lacks_is_spelled_out(capsys, tmp_path):
    write(tmp_path, history({1: {"a": float("inf")}}))
    status, output, _ = shown(capsys, tmp_path, "--json")
    assert status == 0
    assert json.loads(output, parse_constant=pytest.fail)["."]["layers"]["a"]["eval_error"] == "Infinity"


@pytest.mark.parametrize(
    ("run", "options", "status"),
    [
        ("run 9", [], 0),
        ("run 10", [], 1),
        ("", [], 1),
        ("run 9", ["--window", 10], 1),
        ("run 10", ["--window", 10], 0),
        ("run 10", ["--json"], 1),
    ],
)
def test_it_fails_on_layers_that_need_attention_if_asked_to(capsys, logdir, run, options, status):
    found, output, errors = shown(capsys, logdir / run, "--fail-on", "unhealthy", *options)
    assert (found, errors) == (status, "")
    assert output


def test_the_page_has_all_runs_in_it(capsys, logdir, tmp_path):
    path = tmp_path / "page.html"
    status, _, errors = shown(capsys, logdir, "--html", path)
    assert (status, errors) == (0, "")
    data = path.read_text(encoding="utf-8").split('id="bnmonitor-data">')[1].split("</script>")[0]
    runs = json.loads(data)["runs"]
    assert list(runs) == ["run 9", "run 10"]
    assert runs["run 10"] == {"history": history(SICK).document(), "channels": history(SICK).channels()}


def test_a_page_that_cannot_be_written_is_told_of(capsys, logdir, tmp_path):
    status, output, errors = shown(capsys, logdir, "--html", tmp_path / "none" / "page.html")
    assert status == 2
    assert "run 9" in output
    assert "page.html: No such file or directory." in errors


def test_names_come_out_as_they_are(capsys, tmp_path):
    write(tmp_path / "<b> & ü", history({1: dict.fromkeys(ODD_NAMES, 0.5)}))
    _, output, _ = shown(capsys, tmp_path)
    assert output.startswith("<b> & ü, step 1\n")
    assert all(name in output for name in ODD_NAMES)
    _, output, _ = shown(capsys, tmp_path, "--json")
    assert set(json.loads(output)["<b> & ü"]["layers"]) == set(ODD_NAMES)


def test_letters_that_a_terminal_lacks_are_spelled_out(tmp_path):
    write(tmp_path, history({1: {"größe.层": 0.5}}))
    command = [sys.executable, "-m", "lightning_bnmonitor", "show", str(tmp_path)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"gr\xf6\xdfe.\u5c42" in done.stdout


def test_further_monitors_of_a_run_are_shown_by_themselves(capsys, tmp_path):
    write(tmp_path, history(GOOD), history(SICK, prefix="z"))
    _, output, _ = shown(capsys, tmp_path, "--json")
    assert {name: window["step"] for name, window in json.loads(output).items()} == {".": 20, ". (z)": 30}


# ------------------------------------------------------------------------------------------------------------ bad input


def assert_refused(capsys, folder, *sentences):
    status, output, errors = shown(capsys, folder)
    assert (status, output) == (2, "")
    assert errors.startswith("bnmonitor: ")
    assert errors.endswith(".\n")
    assert "Traceback" not in errors
    for sentence in sentences:
        assert sentence in errors


def test_a_folder_that_is_not_there(capsys, tmp_path):
    assert_refused(capsys, tmp_path / "none", "There is no folder", "none")


def test_a_folder_that_is_a_file(capsys, tmp_path):
    assert_refused(capsys, write(tmp_path, history(GOOD)), "is no folder")


def test_a_folder_without_event_files(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    assert_refused(capsys, tmp_path, "no event files")


def test_a_name_that_no_folder_can_have(capsys, tmp_path):
    assert_refused(capsys, tmp_path / ("a" * 5000), "cannot be read: File name too long")


def test_files_and_folders_that_cannot_be_read_are_named_beside_what_can(capsys, logdir, monkeypatch):
    (logdir / "run 9" / "events.out.tfevents.1").symlink_to("nothing")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("run 10"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    status, output, errors = shown(capsys, logdir, "--fail-on", "unhealthy")
    assert status == 2
    assert output.startswith("run 9, step 20")
    assert "run 10 cannot be read: Permission denied." in errors
    assert "events.out.tfevents.1 cannot be read." in errors
    assert_refused(capsys, logdir / "run 10", "cannot be read: Permission denied")


@pytest.mark.parametrize("part", [{"metrics": []}, {"cause": None}, {"layers": 3}, {"latest": None}, {"windows": {}}])
def test_data_of_other_types_are_damaged_in_either_format(capsys, tmp_path, part):
    for name in (1, 2):
        writer = SummaryWriter(str(tmp_path / str(name)))
        writer.file_writer.add_summary(summary(HISTORY, encode(history(GOOD).document() | part | {"format": name})), 1)
        writer.close()
    assert_refused(capsys, tmp_path, "1: Its data are damaged", "2: Its data are damaged")


def test_event_files_without_our_data(capsys, tmp_path):
    writer = SummaryWriter(str(tmp_path))
    writer.add_scalar("batchnorm/loss", 1.0)
    writer.close()
    assert_refused(capsys, tmp_path, "have no BatchNorm data", "BatchNormMonitor()")


def test_data_of_another_version(capsys, tmp_path):
    write(tmp_path / "newer", history(GOOD), format=3)
    assert_refused(capsys, tmp_path, "newer: The data have format 3", "install")


def test_a_run_without_layers(capsys, tmp_path):
    made = History()
    made.add(Report([]), 1)
    write(tmp_path, made)
    assert_refused(capsys, tmp_path, "No BatchNorm layer was monitored")


def test_data_that_lack_what_they_should_have(capsys, tmp_path):
    for name, document in (("a", {"format": 2}), ("b", {**history(GOOD).document(), "cause": "AAAAA"})):
        writer = SummaryWriter(str(tmp_path / name))

        writer.file_writer.add_summary(summary(HISTORY, encode(document)), 1)
        writer.file_writer.add_summary(summary(HISTORY + "/z", b"no data"), 1)
        writer.close()
    assert_refused(
        capsys,
        tmp_path,
        "a: Its data are damaged",
        "b: Its data are damaged",
        "(z): These are no data of lightning_bnmonitor",
    )


def test_one_run_that_cannot_be_read_hides_no_other_and_is_told_of(capsys, logdir):
    write(logdir / "newer", history(GOOD), format=3)
    status, output, errors = shown(capsys, logdir, "--fail-on", "unhealthy")
    assert status == 2
    assert "run 10, step 30" in output
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [[], ["show"], ["none"], ["show", ".", "--window", "x"], ["show", ".", "--fail-on", "x"]]
)
def test_arguments_that_are_none_exit_with_2_as_well(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: bnmonitor" in capsys.readouterr().err


def test_it_needs_no_torch(logdir):
    script = (
        "import sys; from lightning_bnmonitor.commands import main; status = main(['show', sys.argv[1]]); "
        "print(status, sorted({'torch', 'lightning', 'pytorch_lightning'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(logdir)], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n0 []\n")


# ---------------------------------------------------------------------------------------------------- files as they are


def test_of_a_file_that_is_cut_off_what_came_before_is_shown(capsys, tmp_path):
    writer, sizes = SummaryWriter(str(tmp_path)), []
    for number in range(1, 4):
        made = history(dict(list(SICK.items())[:number]))
        writer.file_writer.add_summary(summary(HISTORY, encode(made.document())), 10 * number)
        writer.flush()
        sizes.append(max(tmp_path.glob("*tfevents*")).stat().st_size)
    writer.close()
    path = max(tmp_path.glob("*tfevents*"))
    whole = path.read_bytes()
    for kept, window in ((sizes[1] + 5, 20), (sizes[1], 20), (sizes[2] - 1, 20), (sizes[2], 30)):
        path.write_bytes(whole[:kept])
        status, output, _ = shown(capsys, tmp_path)
        assert (status, output.splitlines()[0]) == (0, f"., step {window}")
    path.write_bytes(whole[: sizes[1] + 40] + b"\xff" * 8 + whole[sizes[1] + 48 :])
    status, output, _ = shown(capsys, tmp_path)
    assert (status, output.splitlines()[0]) == (0, "., step 20")
    path.write_bytes(whole[:40])
    assert_refused(capsys, tmp_path, "no BatchNorm data")


def test_of_several_files_of_a_run_the_newest_counts(capsys, tmp_path):
    first = write(tmp_path, history({10: SICK[10]}))
    first.rename(first.with_name("events.out.tfevents.1000000000.host"))
    write(tmp_path, history(SICK))
    _, output, _ = shown(capsys, tmp_path)
    assert output.startswith("., step 30")


def test_links_to_folders_are_followed_as_tensorboard_does(capsys, logdir, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "linked").symlink_to(logdir / "run 9")
    _, output, _ = shown(capsys, tmp_path / "links")
    assert output.startswith("linked, step 20")


def test_as_a_module_it_is_the_same_command_and_stops_quietly_when_nobody_reads_on(logdir):
    command = [sys.executable, "-m", "lightning_bnmonitor", "show", str(logdir)]
    done = subprocess.run([*command, "--fail-on", "unhealthy"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("run 9, step 20")
    if shutil.which("sh"):
        ended = subprocess.run(
            f"{' '.join(map(repr, command))} | true", shell=True, capture_output=True, text=True, check=False
        )
        assert (ended.returncode, ended.stderr) == (0, "")
