"""The page: every part that the run has, no other; the user's words as they are; nothing from elsewhere."""

import re
from functools import cache
from html.parser import HTMLParser
from typing import Any

import pytest

from lightning_abpem.report.bench_page import bench_page
from lightning_abpem.report.page import run_page
from tests.report.records import record

WICKED = "<img src=x onerror=alert(1)>\"'&amp;$x^2$</text></svg><script>alert(1)</script>{}\x1b[31m"
VOID = {"meta", "link", "br", "img", "input"}


class Seen(HTMLParser):
    """Elements, their attributes and words; fails where an end does not fit its beginning."""

    def __init__(self, page):
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[Any] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += [(tag, *both) for both in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += [(tag, *both) for both in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


PAGES = {
    "run": cache(lambda word: run_page(record(word))),
    "bench": cache(lambda word: bench_page(word, lines(word))),
}


def lines(word="source"):
    return [
        {
            **{"protocol": "iid", "severity": 5, "batch_size": 8, "row": row, "method": method, "source": "s"},
            **{"seed": seed, "accuracy": 50.0 + 10 * (method == word) + seed, "seconds": "1.5", "updates": "3"},
        }
        for row in ("image: fog", "audio: wind")
        for method in ("other", word)
        for seed in (0, 2)
    ]


@pytest.mark.parametrize("kind", PAGES)
def test_words_are_shown_as_they_are(kind):
    plain, wicked = Seen(PAGES[kind]("audio")), Seen(PAGES[kind](WICKED))
    assert wicked.tags == plain.tags
    assert "script" not in wicked.tags
    assert {own[:2] for own in wicked.attributes} == {own[:2] for own in plain.attributes}
    shown = WICKED.replace("\x1b", "\\x1b")
    assert any(shown in words for words in wicked.words)
    assert any(shown[:30] in words for words in wicked.words if len(words) < 60)  # shortened, in a chart
    assert not any(name[:2] == "on" for _, name, _ in wicked.attributes)


@pytest.mark.parametrize("kind", PAGES)
def test_nothing_comes_from_elsewhere(kind):
    page = PAGES[kind]("audio")
    seen = Seen(page)
    for _, name, value in seen.attributes:
        if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert value.startswith(("#", "data:"))
        assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", value or ""))
    assert "http" not in page
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []
    identities = [value for _, name, value in seen.attributes if name == "id"]
    assert len(set(identities)) == len(identities)


@pytest.mark.parametrize("kind", PAGES)
def test_colours_and_sizes_are_the_pages(kind):
    page = PAGES[kind]("audio")
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        colours = set(re.findall(r"#[0-9a-f]{6}", svg))
        assert colours <= {"#ffffff", "#000000"}  # of what is transparent, or an outline that is not drawn
        assert "font-family" not in svg
        assert not re.match(r"<svg[^>]*(width|height)=", svg)
    used, known = set(re.findall(r"var\((--\w+)\)", page)), set(re.findall(r"(--\w+):", page))
    assert used <= known
    [dark] = re.findall(r"prefers-color-scheme: dark\) \{(.*?)\} \}", page, flags=re.DOTALL)
    assert set(re.findall(r"(--\w+):", dark)) == known


def titles(content):
    return re.findall(r"<h[23]>(.*?)</h[23]>", run_page(content))


@pytest.mark.usefixtures("undrawn")
def test_every_part_that_the_run_has():
    assert titles(record()) == [
        *("Over the stream", "Entropy", "Class share", "Flip rate", "Information", "Attention gap", "Divergence"),
        "Attention before and after",
        *(f"Sample {i}, {when}" for i in (1, 2) for when in ("before", "after", "change")),
        *("By dataloader", "Guard events", "Skipped steps", "Further figures", "loss", "Steps taken"),
        *("Options", "Versions"),
    ]
    page = run_page(record())
    for words in ("40%", "of 12 s spent adapting: 5 s", "figures of all processes", "ValueError: audio"):
        assert words in page


@pytest.mark.usefixtures("undrawn")
def test_no_part_that_it_has_not():
    content = record()
    for name in ("flip_rate", "source_entropy", "information", "class_share"):
        del content["steps"]["figures"][name]
    for name in ("attention_gap/audio_to_video", "divergence/audio_to_video"):
        del content["steps"]["figures"][name]
    content |= {"blocks": None, "no_blocks": "The first batch cannot be copied.", "metrics": {}, "events": []}
    content |= {
        "resets": [],
        "skipped": {},
        "counts": {"steps": 6, "resets": 0, "updates": 6, "skipped": 0, "left_out": 0},
    }
    content["seconds"]["adapting"] = None
    found = titles(content)
    assert found[:3] == ["Over the stream", "Entropy", "Class share"]
    assert not {"Flip rate", "Information", "Attention gap", "Guard events", "Skipped steps"} & set(found)
    page = run_page(content)
    assert page.count("<li>") == 1 + 5  # a key of the marks, and a sentence for each thing that is missing
    for words in ("monitor=&quot;source&quot;", "cannot be copied", "log a metric in your step", "could not be read"):
        assert words in page


def test_a_run_without_a_step():
    content = record()
    content["steps"] = {"every": 1, "first": [], "samples": [], "figures": {}}
    content["classes"] = {"first": [], "names": [], "counts": [[]], "used": 0}
    content |= {"dataloaders": [], "metrics": {}, "blocks": None, "events": [], "resets": []}
    assert "Over the stream" not in run_page(content)
    Seen(run_page(content))


@pytest.mark.usefixtures("undrawn")
def test_resets_that_are_too_many_are_told_and_not_drawn():
    content = record()
    content["resets"], content["counts"]["resets"] = list(range(200)), 200
    assert "came back 200 times, too often to mark" in run_page(content)


@pytest.mark.usefixtures("undrawn")
def test_metrics_stand_with_their_dataloader():
    row = re.findall(r"<tr><td>accuracy</td>(.*?)</tr>", run_page(record()))[0]
    assert re.findall(r">([^<]+)</td>", row) == ["0.5", "0.25", "-"]
    content = record()
    content["dataloaders"] = content["dataloaders"][:1]
    content["metrics"] = {"accuracy": 0.75}
    row = re.findall(r"<tr><td>accuracy</td>(.*?)</tr>", run_page(content))[0]
    assert re.findall(r">([^<]+)</td>", row) == ["0.75"]


@pytest.mark.usefixtures("undrawn")
def test_accuracy_of_a_benchmark_is_averaged_over_seeds():
    page = bench_page("iid", lines())
    row = re.findall(r"<tr><td>image: fog</td>(.*?)</tr>", page)[0]
    assert re.sub(r"<[^>]*>", " ", row).split() == ["51.0", "±", "1.4", "61.0", "±", "1.4"]
    assert re.findall(r'class="number best">([\d.]+)', page) == ["61.0"] * 3
    assert re.findall(r"<tr><td>other</td>(.*?)</tr>", page)[0].count("1.5") == 1
    with pytest.raises(ValueError, match="but got 0"):
        bench_page("none", [])
