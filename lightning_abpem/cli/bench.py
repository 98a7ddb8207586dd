"""``abpem bench``: methods on a benchmark, or two finished runs side by side."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse
from rich.console import Console
from rich.markdown import Markdown

from lightning_abpem.bench.benchmark import Benchmark
from lightning_abpem.bench.command import compare_runs, run_benchmark
from lightning_abpem.cli.fitting import fit, option_types
from lightning_abpem.cli.importing import import_object
from lightning_abpem.cli.untrusted import read_config, read_yaml

__all__ = ["add_arguments", "run"]

_KNOWN = {
    "digits-avc": "lightning_abpem.bench.digits.DigitsAVC",
    "kinetics50-c": "lightning_abpem.bench.kinetics.Kinetics50C",
    "vggsound-c": "lightning_abpem.bench.kinetics.VGGSoundC",
}
_NO_OPTIONS = {"benchmark", "arguments", "console"}  # of `run_benchmark`, for programs
_SEVERAL = {f"--{name}" for name in ("methods", "protocol", "kinds", "severity", "seeds", "sources", "batch_size")}
_EPILOG = """examples:
  abpem bench digits-avc --methods source,tent,read,abpem --protocol iid --severity 5 --seeds 5 --out runs/iid
  abpem bench digits-avc --config run.yaml --out runs/sweep
  abpem bench digits-avc --print_config > run.yaml
  abpem bench digits-avc --kinds fog audio:gaussian_noise --out runs/some
  abpem bench kinetics50-c --data-root DATA --checkpoint cav_mae_ks50.pth --out runs/ks50
  abpem bench my_package.MyBenchmark --out runs/mine
  abpem bench --compare runs/iid:read runs/iid:abpem
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark and the comparison; the options of a run are those of `run_benchmark` and of the benchmark."""
    parser.epilog = f"{_options_of_a_run()}\n{_EPILOG}"
    parser.add_argument("data", nargs="?", help=f"{', '.join(_KNOWN)}, or the import path of a Benchmark")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="folders of finished runs, or FOLDER:METHOD")
    parser.add_argument("--options", action="store_true", help="show the options of a run on this benchmark, and end")


def add_options_of_a_run(parser: argparse.ArgumentParser) -> None:
    """Add the options that `run` reads later, for a shell's completion."""
    for name in ("config", "print_config", *option_types(run_benchmark), *option_types(Benchmark)):
        if name not in _NO_OPTIONS:
            parser.add_argument(f"--{name}", help="an option of a run")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Run, or compare."""
    if options.compare:
        if options.data or rest:
            raise ValueError(f"Expected --compare alone, but got {' '.join(filter(None, [options.data, *rest]))} too.")
        console, table = Console(), compare_runs(*options.compare)
        if console.is_terminal:
            console.print(Markdown(table))
        else:  # where Markdown is of more use than a table cut to 80 columns
            console.print(table, soft_wrap=True, markup=False, emoji=False, highlight=False)
        return
    if options.data is None:
        raise ValueError(f"Expected a benchmark, {', '.join(_KNOWN)} or an import path; or --compare A B.")
    benchmark = _found(options.data)
    if not (isinstance(benchmark, type) and issubclass(benchmark, Benchmark)):
        raise ValueError(f"Expected {options.data} to be a Benchmark, but it is {benchmark!r}.")
    if options.options:
        _parser(benchmark, known=set()).print_help()
        return
    given = _parse(benchmark, [_underscored(word) for word in rest])
    own = {name: given.pop(name) for name in inspect.signature(benchmark).parameters if name in given}
    run_benchmark(benchmark, own, **given)


def _options_of_a_run() -> str:
    """The help on the options that a run has on any benchmark."""
    words = _parser(Benchmark, set()).format_help()
    return "options of a run, and those of the benchmark, which NAME --options shows:" + words.partition("options:")[2]


def _found(name: str) -> Any:
    if name in _KNOWN:
        return import_object(_KNOWN[name])
    try:
        return import_object(name)
    except (ImportError, ValueError) as error:  # often it is the value of an option that came before the name
        raise ValueError(
            f"Expected a benchmark first, {', '.join(_KNOWN)} or an import path such as my_package.MyBenchmark, and "
            f"the options after it, but got {name!r}: {error}"
        ) from error


def _parser(benchmark: type[object], known: set[str]) -> jsonargparse.ArgumentParser:
    """A parser of the options of a run, but for those that are known."""
    parser = jsonargparse.ArgumentParser(prog="abpem bench", exit_on_error=False, allow_abbrev=False)
    parser.add_argument(
        "--config", action="config", metavar="FILE", help="YAML of these options; the command line goes over it"
    )
    parser.add_function_arguments(run_benchmark, skip={*_NO_OPTIONS, *known})
    parser.add_class_arguments(benchmark, skip=known)
    return parser


def _parse(benchmark: type[Benchmark], words: list[str]) -> dict[str, Any]:
    """The options of files and of the command line. What a file has is never parsed as what could be run."""
    words, files = _taken(_joined(words), "--config")
    words, variants = _taken(words, "--variants")
    from_files: dict[str, Any] = {}
    for path in files:
        from_files |= _read_options(Path(path), benchmark)
    for text in variants:
        from_files["variants"] = read_yaml(text, "`--variants`")
    on_line = {word[2:].partition("=")[0].partition(".")[0] for word in words if word.startswith("--")}
    known = {name: value for name, value in from_files.items() if name not in on_line}
    is_printed = any(word.partition("=")[0] == "--print_config" for word in words)
    if is_printed and (files or variants):  # which jsonargparse would have to parse
        raise ValueError("Expected `--print_config` with neither `--config` nor `--variants`.")
    parser = _parser(benchmark, set() if is_printed else {*known, "variants"})
    try:
        parsed = parser.parse_args(words)
    except jsonargparse.ArgumentError as error:
        raise ValueError(error) from error
    given = parser.instantiate(parsed).as_dict()
    given.pop("config", None)
    return {**given, **known}


def _read_options(path: Path, benchmark: type[Benchmark]) -> dict[str, Any]:
    """The options of a config, each of its type."""
    types = {**option_types(run_benchmark), **option_types(benchmark)}
    options = read_config(path)
    for name in _required(run_benchmark) | _required(benchmark):
        if options.get(name, name) is None:  # as --print_config has what is yet to be given
            del options[name]
    if unknown := sorted(set(options) - (set(types) - _NO_OPTIONS)):
        raise ValueError(f"Expected options of `--options` in {path}, but got {', '.join(unknown)}.")
    return {
        name: value if name == "variants" else fit(value, types[name], f"`{name}` of {path}")
        for name, value in options.items()
    }


def _required(function: Callable[..., Any]) -> set[str]:
    """Return the names of the arguments that have no default."""
    return {name for name, own in inspect.signature(function).parameters.items() if own.default is own.empty}


def _joined(words: list[str]) -> list[str]:
    """`--kinds fog wind` as `--kinds fog,wind`, and so for all options of which there may be several."""
    joined: list[str] = []
    option = ""
    for word in words:
        if word.startswith("--"):
            option = word
        elif option in _SEVERAL and not joined[-1].startswith("--"):
            joined[-1] += f",{word}"
            continue
        joined.append(word)
    return joined


def _taken(words: list[str], option: str) -> tuple[list[str], list[str]]:
    """The words without an option, and its values."""
    left, values, rest = [], [], iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name != option:
            left.append(word)
            continue
        given = value if equals else next(rest, None)
        if given is None:
            raise ValueError(f"Expected a value after {option}, but got none.")
        values.append(given)
    return left, values


def _underscored(word: str) -> str:
    """--batch-size as --batch_size: both are taken."""
    name, equals, value = word.partition("=")
    return (name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name) + equals + value
