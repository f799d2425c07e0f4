"""What is imported and when, each in a process of its own, and what a wheel has in it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lightning_bnmonitor
from lightning_bnmonitor.page.html import ASSETS

ROOT = Path(lightning_bnmonitor.__file__).parents[1]


def said(script, *arguments, path=ROOT):
    """What a script prints in a fresh process, with a folder before all others on its path."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(path)!r}); {script}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(sys.prefix))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = "print(sorted({'torch', 'lightning', 'pytorch_lightning', 'torchmetrics', 'matplotlib'} & set(sys.modules)))"


@pytest.mark.parametrize(
    "module",
    [
        "lightning_bnmonitor",
        "lightning_bnmonitor.tensorboard",
        "lightning_bnmonitor.tensorboard.plugin",
        "lightning_bnmonitor.commands",
    ],
)
def test_what_tensorboard_and_the_command_import_has_no_torch(module):
    assert said(f"import {module}; {HEAVY}") == "[]"


def test_the_package_alone_imports_nothing_that_takes_time():
    more = "set(sys.modules) - before"
    script = f"import typing, importlib; before = set(sys.modules); import lightning_bnmonitor; print(len({more}))"
    assert int(said(script)) == 1


def test_what_tensorboard_starts_with_is_its_own_but_for_two_modules():
    script = (
        "import tensorboard.default; before = set(sys.modules); import lightning_bnmonitor.tensorboard; "
        "print(sorted(set(sys.modules) - before))"
    )
    assert said(script) == str(["lightning_bnmonitor", "lightning_bnmonitor.tensorboard"])


def test_names_are_all_there_listed_and_kept():
    names = said(
        "import lightning_bnmonitor as p; from lightning_bnmonitor import *; "
        "assert all(globals()[name] is getattr(p, name) is vars(p)[name] for name in p.__all__); "
        "assert set(p.__all__) | {'__version__'} <= set(dir(p)); print(*p.__all__)"
    )
    assert names.split() == lightning_bnmonitor.__all__


def test_a_name_that_is_not_there_is_an_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lightning_bnmonitor.nothing  # noqa: B018
    with pytest.raises(ImportError, match="nothing"):
        exec("from lightning_bnmonitor import nothing")


# ------------------------------------------------------------------------------------------------------------ installed


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with nothing but a wheel of this package in it, as pip puts it there."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = subprocess.run(
        [*pip, "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)], capture_output=True, text=True, check=False
    )
    if built.returncode:
        pytest.skip(f"pip cannot build here (it fetches hatchling): {built.stderr[-300:]}")
    (wheel,) = folder.glob("*.whl")
    target = folder / "target"
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return wheel, target


@pytest.mark.slow
def test_a_wheel_has_the_page_in_it(installed):
    wheel, _ = installed
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"lightning_bnmonitor/page/assets/{path.name}" for path in ASSETS.iterdir() if path.is_file()} <= names
    assert "lightning_bnmonitor/py.typed" in names


@pytest.mark.slow
def test_what_is_installed_shows_the_tab_and_the_command(installed, tmp_path):
    _, target = installed
    script = (
        "import tensorboard.default; names = [f'{each.__module__}.{each.__qualname__}' "
        "for each in tensorboard.default.get_dynamic_plugins()]; "
        "import lightning_bnmonitor; print(lightning_bnmonitor.__file__, *names)"
    )
    file, *plugins = said(script, path=target).split()
    assert Path(file).is_relative_to(target)
    assert plugins.count("lightning_bnmonitor.tensorboard.Loader") == 1
    command = [sys.executable, str(target / "bin" / "bnmonitor"), "show", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(target)})
    assert done.returncode == 2
    assert "no event files" in done.stderr
