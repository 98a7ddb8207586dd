"""YAML that a stranger may have written: plain values alone, few and shallow."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from lightning_abpem.engine.checks import shown

__all__ = ["read_config", "read_trusted", "read_yaml", "refuse_code"]

_BYTES, _DEPTH, _NODES, _BITS = 1 << 20, 32, 20_000, 63
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one that reads the values too
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("bool", "float", "int", "map", "null", "seq", "str")}


def read_config(path: Path) -> dict[str, Any]:
    """Return the options of a YAML file, by their names.

    Raises:
        ValueError: it is no YAML, no mapping by names, or not as `read_yaml` wants it.
    """
    with path.open("rb") as file:
        content = file.read(_BYTES + 1)
    if len(content) > _BYTES:
        raise ValueError(f"Expected {path} to be a config of at most {_BYTES} bytes, but it is larger.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not YAML in UTF-8: {error}") from error
    options = read_yaml(text, str(path))
    if options is None or (isinstance(options, str) and not options.strip()):
        return {}
    if not isinstance(options, dict):
        raise ValueError(f"Expected {path} to map options to values, but got {shown(options)}.")
    return options


def read_yaml(text: str, where: str) -> Any:
    """Return what YAML or JSON says: numbers, strings, None, lists and mappings by strings.

    Raises:
        ValueError: it has tags, aliases, names that are no strings, huge numbers, or too many or too deep values.
    """
    _check_events(text, where)
    try:
        value = jsonargparse.get_loader("yaml")(text)  # whose numbers are those of the command line
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{where} is not YAML: {' '.join(str(error).split())}") from error
    for path, item in _walk(value, ()):
        at = f"`{'.'.join(path) or '.'}` of {where}"
        if isinstance(item, dict) and (odd := [name for name in item if not isinstance(name, str)]):
            raise ValueError(f"Expected names to be strings, but got {shown(odd[0])} in {at}.")
        if isinstance(item, int) and item.bit_length() > _BITS:
            raise ValueError(f"Expected {at} to be a number of at most {_BITS} bits, but got {item.bit_length()}.")
    return value


def read_trusted(path: Path) -> dict[str, Any]:
    """Return what a config of the user's own says, with aliases and of any size.

    Raises:
        ValueError: it is no YAML, or no mapping.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError(f"Expected {path} to be YAML of less depth than Python can follow.") from error
    if not isinstance(config, (dict, type(None))):
        raise ValueError(f"Expected {path} to map options to values, but got {shown(config)}.")
    return config or {}


def refuse_code(sections: Mapping[str, object], path: Path) -> None:
    """Let words pass that can name nothing: no class, no import path, no file, no YAML of its own.

    Raises:
        ValueError: there are others, with the place and the value.
    """
    for at, value in _walk(sections, ()):
        if not isinstance(value, str):
            continue
        names_a_class = len(at) == 1 or at[-1] == "class_path"
        if names_a_class or not re.fullmatch(r"[\w -]*", value) or os.path.exists(value):
            raise ValueError(
                f"Expected `{'.'.join(at)}` of {path} to be a number or a word that names neither code nor a file, "
                f"but got {shown(value)}. Add --trust-config if the file is yours: what it names is imported and run."
            )


def _events(text: str, where: str) -> Iterator[Any]:
    try:
        yield from yaml.parse(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def _check_events(text: str, where: str) -> None:
    """Refuse what is costly or more than data, before any value is made of it."""
    depth = nodes = 0
    for event in _events(text, where):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"Expected values without aliases in {where}, but got *{event.anchor} in line {line}.")
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if not isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)):
            continue
        if event.tag is not None and event.tag not in _TAGS:
            raise ValueError(f"Expected values without tags in {where}, but got {event.tag!r} in line {line}.")
        nodes += 1
        depth += isinstance(event, yaml.CollectionStartEvent)
        if depth > _DEPTH or nodes > _NODES:
            most = f"{_NODES} values in {where}, nested {_DEPTH} deep"
            raise ValueError(f"Expected at most {most}, but got more in line {line}.")


def _walk(value: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield a value and all that it holds, each with its path."""
    yield path, value
    for name, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _walk(item, (*path, str(name)))
