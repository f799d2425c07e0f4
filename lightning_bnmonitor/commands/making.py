"""Models and data from other people's code: by a LightningCLI config, or by import."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_bnmonitor.commands.messages import CommandError, told

_PARSER = 'What LightningCLI has saved is read by jsonargparse: pip install "jsonargparse[signatures]".'


def read_config(path: Path) -> dict[str, Any]:
    """What a config of LightningCLI says: ``model``, ``data``, ``seed_everything`` and others.

    Raises:
        CommandError: If it cannot be read.
    """
    import yaml  # which Lightning brings

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"The config {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CommandError(f"The config {path} is no YAML: {told(error)}.") from error
    if isinstance(config, dict) and isinstance(config.get("fit"), dict):  # written for the command, not saved by it
        config = config["fit"]
    if not isinstance(config, dict) or not ({"model", "data"} & config.keys()):
        raise CommandError(f"{path} is no config of LightningCLI: it has neither `model` nor `data`.")
    return config


def imported(option: str, name: str, source: str | None = None) -> Callable[..., Any]:
    """A class or function by its name, ``package.module:name`` or ``package.module.name``.

    Modules of the working directory can be imported, too.

    Args:
        option: The option that takes such a name, for errors.
        name: The name.
        source: What has asked for it, if not the option.

    Raises:
        CommandError: If there is none.
    """
    renamed = f" If it has another name now, add {option} package.module:Class." if source else ""
    source = source or option
    module_name, _, attribute = name.rpartition(":" if ":" in name else ".")
    if not module_name or not attribute:
        raise CommandError(f"{source} must be package.module:name, got {name!r}.")
    if module_name == "__main__":
        raise CommandError(
            f"{source} is {name}, of the script that was run. Give it by the name of that: if it was train.py, as "
            f"`{option} train:{attribute}`."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        is_unknown = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        hint = " Go to the folder that your training script is in, or add it to PYTHONPATH." if is_unknown else ""
        why = f"{module_name} cannot be imported: {told(error)}.{hint}{renamed}"
        raise CommandError(f"{source} {name}: {why}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise CommandError(f"{source} {name}: {module_name} has no {attribute}.{renamed}")
        found = getattr(found, part)
    if not callable(found):
        raise CommandError(f"{source} {name} must be a class or a function, got {type(found).__name__}.")
    maker: Callable[..., Any] = found
    return maker


def class_path(section: object) -> str | None:
    """The class that a section of a config names; None if its command was made for one class."""
    named = section.get("class_path") if isinstance(section, Mapping) else section
    return named if isinstance(named, str) else None


def made(option: str, maker: Callable[..., Any], section: object, kept: Mapping[str, Any], argument: str | None) -> Any:
    """Call a class or a function with its arguments, as LightningCLI and ``load_from_checkpoint`` do.

    Args:
        option: What asked for it, for errors.
        maker: The class or function.
        section: Of a config: ``class_path`` and ``init_args``, or arguments; None if there is no config.
        kept: Hyperparameters from a checkpoint.
        argument: The one argument that they are given in; None if each is one.

    Raises:
        CommandError: If it cannot be made.
    """
    try:
        parameters = inspect.signature(maker).parameters
        if not parameters and not isinstance(maker, type):
            return maker()
        if section is None and "_instantiator" not in kept:
            return maker(**_arguments(parameters, kept, argument))
        return _parsed(option.strip("-"), maker, _section(parameters, section, kept))
    except CommandError:
        raise
    except Exception as error:
        source = "its hyperparameters in the checkpoint" if kept else "no hyperparameters in the checkpoint"
        with_what = "the arguments in the config" if section is not None else source
        raise CommandError(
            f"{_name(maker)} cannot be made with {with_what}: {told(error)}. Give {option} a function without "
            "arguments that makes it."
        ) from error


def _arguments(
    parameters: Mapping[str, inspect.Parameter], kept: Mapping[str, Any], argument: str | None
) -> dict[str, Any]:
    takes_any = {name for name, parameter in parameters.items() if parameter.kind is inspect.Parameter.VAR_KEYWORD}
    if argument in parameters.keys() - takes_any:
        return {str(argument): dict(kept)}
    if takes_any:
        return dict(kept)
    return {name: value for name, value in kept.items() if name in parameters}


def _section(parameters: Mapping[str, inspect.Parameter], section: object, kept: Mapping[str, Any]) -> dict[str, Any]:
    """The section of a config, with what was linked to other arguments, which a config lacks, from the checkpoint."""
    if section is None:
        given = {name: value for name, value in kept.items() if name not in ("_instantiator", "_class_path")}
        return {"class_path": kept["_class_path"], "dict_kwargs": given} if "_class_path" in kept else given
    filled: dict[str, Any] = {"class_path": section} if isinstance(section, str) else dict(section)  # type: ignore[call-overload]
    given = dict(filled.get("init_args") or {}) if "class_path" in filled else filled
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in given and name in kept:
            given[name] = kept[name]
    return {**filled, "init_args": given} if "class_path" in filled else given


def _parsed(key: str, maker: Callable[..., Any], section: dict[str, Any]) -> Any:
    """What jsonargparse makes of a section."""
    try:
        from jsonargparse import ArgumentParser, class_from_function  # type: ignore[attr-defined]
    except ImportError as error:
        raise CommandError(_PARSER) from error
    parser = ArgumentParser(exit_on_error=False)
    if "class_path" in section and isinstance(maker, type):
        section = {**section, "class_path": f"{maker.__module__}.{maker.__qualname__}"}
        parser.add_subclass_arguments(maker, key, fail_untyped=False)
    else:
        one = maker if isinstance(maker, type) else class_from_function(maker)
        section = section.get("init_args", {}) if "class_path" in section else section
        parser.add_class_arguments(one, key, fail_untyped=False)
    parsed = parser.parse_object({key: section})
    make = getattr(parser, "instantiate", None) or parser.instantiate_classes  # until 4.49
    return make(parsed)[key]


def _name(maker: Callable[..., Any]) -> str:
    return f"{maker.__module__}:{maker.__qualname__}"
