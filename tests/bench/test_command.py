"""The command `abpem bench`: a config, comparisons, errors, interrupts."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_abpem.bench.command import compare_runs, run_benchmark
from lightning_abpem.cli import main
from tests.bench.runs import files, lines, run
from tests.toybench import ToyBench


def test_the_command_with_a_config_and_a_comparison(tmp_path, capsys):
    config = {
        "methods": ["source", "gentle"],
        "variants": {"gentle": {"method": "abpem", "options": {"learning_rate": 1e-5}}},
        "protocol": "iid",
        "seeds": [7, 8],
        "samples": 20,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    bench, out = "tests.toybench.ToyBench", str(tmp_path / "a")
    main(["bench", bench, "--config", str(tmp_path / "run.yaml"), "--out", out, "--workers", "1"])
    shown = capsys.readouterr().out
    assert "iid, severity 5, batch size 8" in shown
    assert "gentle" in shown
    assert {line["seed"] for line in lines(tmp_path / "a")} == {"7", "8"}
    main(
        [
            "bench",
            bench,
            "--out",
            str(tmp_path / "b"),
            "--workers=1",
            "--methods=read",
            "--seeds=7,8",
            "--samples",
            "20",
        ]
    )
    capsys.readouterr()
    main(["bench", "--compare", f"{out}:source", f"{tmp_path / 'b'}:read"])
    shown = capsys.readouterr().out
    assert "difference" in shown
    assert "12" in shown  # pairs: 3 rows, 2 seeds, 2 sources
    assert "| p |" in compare_runs(f"{out}:source", f"{tmp_path / 'b'}:read")
    assert compare_runs(out, out).count("+0.00") == 2


def test_a_config_that_is_printed_can_be_read_again(tmp_path, capsys):
    """With what has no default, which is null in it, in the file or on the command line."""
    command = ["bench", "tests.toybench.ToyBench"]
    with pytest.raises(SystemExit) as end:
        main([*command, "--print-config", "--seeds=1", "--sources=one", "--methods", "source", "--workers=1"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    options = yaml.safe_load(printed)
    own = inspect.signature(run_benchmark).parameters.keys() | inspect.signature(ToyBench).parameters.keys()
    assert options.keys() == own - {"benchmark", "arguments", "console"}
    assert (options["out"], options["seeds"], options["samples"]) == (None, 1, 24)
    config = tmp_path / "run.yaml"
    config.write_text(printed)
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--config", str(config)])
    assert "out" in capsys.readouterr().err
    main([*command, "--config", str(config), "--out", str(tmp_path / "a")])
    config.write_text(yaml.safe_dump({**options, "out": str(tmp_path / "b")}))
    main([*command, "--config", str(config)])
    assert len(lines(tmp_path / "a")) == len(lines(tmp_path / "b")) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Expected a benchmark, digits-avc, kinetics50-c, vggsound-c or an import path"),
        (["toys"], "Expected a benchmark first, digits-avc, .* such as my_package.MyBenchmark, .* but got 'toys'"),
        (["--workers", "1", "B"], "Expected a benchmark first, .* and the options after it, but got '1'"),
        (["--learning-rate", "0.1", "B"], "Expected a benchmark first, .* but got '0.1'"),
        (["--config", "./run.yaml", "B"], "Expected a benchmark first, .* but got './run.yaml'"),
        (["--config", "run.yaml", "digits-avc"], "Expected a benchmark first, .* but got 'run.yaml'"),
        (["tests.toybench.Nothing"], "tests.toybench has no Nothing"),
        (["tests.toy.Toy"], "Expected tests.toy.Toy to be a Benchmark"),
        (["B", "--methods", "tent,sources"], "Expected `methods` to be among source, .* but got sources"),
        (["B", "--methods", "tent,tent"], "Expected `methods` to have one at least, and each once, but got tent, tent"),
        (["B", "--methods", "[]"], "Expected `methods` to have one at least, and each once, but got none"),
        (["B", "--protocol", "[]"], "Expected `protocol` to have one at least, and each once, but got none"),
        (["B", "--seeds", "1,1"], "Expected `seeds` to have one at least, and each once, but got 1, 1"),
        (["B", "--workers", "0"], "Expected `workers` to be an integer >= 1, but got 0"),
        (
            ["B", "--methods", "x", "--variants", '{"x": {"method": "abpem", "options": {"memory_samples": "32"}}}'],
            "Expected `memory_samples` to be an integer >= 1, but got '32'",
        ),
        (
            ["B", "--variants", '{"x": {"method": "abpem", "options": {"memory_samples": 8, "memory_batches": 1}}}'],
            "Expected `memory_samples` or `memory_batches`, which say the same, but got both",
        ),
        (["digits-avc", "--pairs", "0"], "Expected `pairs` to be an integer >= 1, but got 0"),
        (["B", "--protocol", "idd"], "Expected `protocol` to be one of clean, iid"),
        (["B", "--severity", "6"], r"Expected `severity` in \[1, 5\], but got 6"),
        (["B", "--severity", "high"], "Expected `severity` to be an integer or several with commas, but got 'high'"),
        (["B", "--seeds", "9"], "Expected `seeds` to be how many of .* or a list, but got 9"),
        (["B", "--batch-size", "0"], r"Expected `batch_size` in \[1, "),
        (["B", "--sources", "three"], r"Expected `sources` to be among one, two, but got \['three'\]"),
        (["B", "--sample", "3"], "--sample"),
        (
            ["B", "--kinds", "fog", "haze", "audio:fog"],
            "among those of image: fog, gaussian_noise; of audio: wind; but got haze, audio:fog",
        ),
        (["B", "--kinds", "fog,fog"], "Expected `kinds` to have one at least, and each once, but got fog, fog"),
        (["B", "--kinds"], "--kinds"),
        (["B", "--device", "cpu", "wind"], "wind"),
        (["B", "--variants", '{"x": {"method": "tant"}}'], "Expected `method` to be one of source, tent"),
        (["B", "--variants", '{"x": {"method": "tent", "options": {"kk": 1}}}'], r"but got \['kk'\]"),
        (["B", "--variants", '{"x": {"method": "tent", "options": {"restore": false}}}'], r"but got \['restore'\]"),
        (["B", "--variants", '{"x": {"method": "tent", "options": {"report": "x.html"}}}'], r"but got \['report'\]"),
        (["B", "--variants", '{"x": {"methd": "tent"}}'], "Expected variant 'x' to have a `method` and its `options`"),
        (
            ["B", "--methods", "x", "--variants", '{"x": {"method": "abpem", "options": {"k": -1}}}'],
            "Expected `k` to be",
        ),
        (
            ["B", "--methods", "x", "--variants", '{"x": {"method": "tent", "options": {"learning_rate": "fast"}}}'],
            "Expected `learning_rate` to be a finite number above 0, but got 'fast'",
        ),
        (["B", "--device", "cuda:7"], "Expected `device` to be one that torch has here, but got 'cuda:7'"),
        (["--compare", "no", "where"], "Expected no to be the folder of a finished run"),
        (["B", "--compare", "no", "where"], "Expected --compare alone"),
        (["B", "--print_config", "--variants", "{}"], "Expected `--print_config` with neither"),
    ],
)
def test_errors_of_the_command(tmp_path, capsys, arguments, words):
    arguments = ["tests.toybench.ToyBench" if word == "B" else word for word in arguments]
    if arguments and "--compare" not in arguments:
        arguments += ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        main(["bench", *arguments])
    assert end.value.code == 2
    assert re.search(words, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "out" / "cells").exists() or not files(tmp_path / "out" / "cells")


def test_comparing_runs_on_other_data(tmp_path):
    run(tmp_path / "a", methods="source")
    run(tmp_path / "b", methods="source", arguments={"samples": 20})
    with pytest.raises(
        ValueError, match="Expected two runs on the same data, but `arguments.samples` is 24 in .* and 20"
    ):
        compare_runs(str(tmp_path / "a"), str(tmp_path / "b"))


def test_comparing_methods_that_are_not_there(tmp_path):
    run(tmp_path / "a", methods="source")
    run(tmp_path / "b", methods="read")
    with pytest.raises(ValueError, match="Expected a method of source, but got tent of .*a:tent"):
        compare_runs(f"{tmp_path / 'a'}:tent", f"{tmp_path / 'b'}:read")
    with pytest.raises(ValueError, match="Expected a method of read, but got source of .*b"):
        compare_runs(f"{tmp_path / 'a'}:source", str(tmp_path / "b"))
    with pytest.raises(ValueError, match="Expected runs with a method in common"):
        compare_runs(str(tmp_path / "a"), str(tmp_path / "b"))


def interrupted(out, workers):
    words = [sys.executable, "-m", "tests.interrupted", str(out), str(workers)]
    root = Path(__file__).parents[2]
    ended = subprocess.run(words, capture_output=True, text=True, cwd=root, env=os.environ, start_new_session=True)
    assert ended.returncode == 130, ended.stderr
    assert "the same command goes on from here" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_an_interrupt_of_workers_that_start_is_as_quiet_as_later_ones(tmp_path):
    """They get Ctrl-C too, while they import, when no handler of ours is there yet."""
    interrupted(tmp_path, workers=2)


@pytest.mark.slow
def test_an_interrupted_command_says_how_to_go_on(tmp_path):
    """A real process, which gets a signal when its first cell is there."""
    interrupted(tmp_path, workers=1)
    kept = files(tmp_path / "cells")
    assert kept
    run(tmp_path, methods="source,abpem", seeds=5)
    assert kept.items() <= files(tmp_path / "cells").items()
