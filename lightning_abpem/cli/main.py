"""The ``abpem`` command: which subcommand, and what becomes of its errors."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import warnings
from collections.abc import Sequence

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_abpem import __version__
from lightning_abpem.display import visible

__all__ = ["main"]

_COMPLETION = "--print-completion"
_COMMANDS = {
    "demo": "train a small model on digits seen and heard, corrupt its sensors, and adapt it",
    "inspect": "show every attention call of one step, and the ABPEM(...) line that fits",
    "tune": "try learning rates on the first batches of a stream, without labels",
    "corrupt": "write a corrupted copy of a data set of frames and sound",
    "bench": "compare methods on a benchmark, or two finished runs",
    "report": "write the HTML page of a run, or of a benchmark's",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the ``abpem`` command.

    Raises:
        SystemExit: with a message, for what cannot be parsed, imported or run.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="abpem", description="Test-time adaptation of multi-modal models.")
    parser.add_argument("--version", action="version", version=f"abpem {__version__}")
    is_completion = bool(argv) and argv[0].partition("=")[0] == _COMPLETION
    _add_completion(parser, is_asked=is_completion)
    commands = parser.add_subparsers(dest="command", required=True)
    chosen = argv[0] if argv and argv[0] in _COMMANDS else None
    for name, words in _COMMANDS.items():
        command = commands.add_parser(
            name, help=words, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        if name == chosen or is_completion:  # else the others need not even be importable
            try:
                module = importlib.import_module(f"lightning_abpem.cli.{name}")
            except ImportError as error:
                parser.exit(2, f"abpem {name}: {error}; pip install 'lightning_abpem[cli,bench]'\n")
            module.add_arguments(command)
            if is_completion and name == "bench":
                module.add_options_of_a_run(command)
    options, rest = parser.parse_known_args(argv)
    if "" not in sys.path:
        sys.path.append("")  # modules of the working directory can be imported; installed ones go before them
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.pytorch.*")
            module.run(options, rest)
    except KeyboardInterrupt:
        parser.exit(130, f"abpem {chosen}: interrupted; the same command goes on from here\n")
    except (ImportError, OSError, ValueError, MisconfigurationException) as error:
        parser.exit(2, f"abpem {chosen}: {visible(str(error), lines=True)}\n")
    finally:
        logger.setLevel(level)


def _add_completion(parser: argparse.ArgumentParser, is_asked: bool) -> None:
    words = "print the completion of all commands for a shell (bash, zsh, ...), and end"
    if not is_asked:
        parser.add_argument(_COMPLETION, metavar="SHELL", help=words)
        return
    try:
        shtab = importlib.import_module("shtab")
    except ImportError as error:
        parser.exit(2, f"abpem: {error}; pip install 'lightning_abpem[cli,bench]'\n")
    shtab.add_argument_to(parser, _COMPLETION, help=words)
