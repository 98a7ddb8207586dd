"""The examples of the documentation, run."""

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_abpem import metrics
from lightning_abpem.bench.command import run_benchmark
from lightning_abpem.bench.variants import METHODS

PAGE = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
EXAMPLES = {
    match[1]: match[2]
    for match in re.finditer(r"\n#+ ([^\n]+)\n(?:(?!\n#).)*?```python\n(.*?)```", PAGE, flags=re.DOTALL)
}


def blocks(page, language="python"):
    """The code of a page."""
    text = (Path(__file__).parent.parent / "docs" / page).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_every_family_has_one():
    families = {"ViLT", "FLAVA", "VisualBERT", "LXMERT", "BridgeTower", "torch's own transformers"}
    assert families < set(EXAMPLES)
    assert len(EXAMPLES) == 11


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.filterwarnings("ignore:A frozen module gave another output", "ignore:.*nested tensor")
def test_example(name):
    if "from transformers" in EXAMPLES[name]:
        pytest.importorskip("transformers")
    namespace = {}
    exec(EXAMPLES[name], namespace)
    if "model" in namespace or "trainer" in namespace:  # else it shows options alone
        assert namespace["adaptation"].updates >= 1


def test_a_method_of_ones_own():
    page = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
    use, unimodal, own = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    namespace = {}
    exec(use, namespace)
    assert namespace["read"].settings.reset == "dataloader"
    exec(unimodal, namespace)
    assert namespace["sumi"].settings.method.total_batches == 308
    exec(own, namespace)
    assert namespace["adaptation"].updates == 1
    assert list(namespace["adaptation"].params) == ["head.bias"]


def test_metrics_in_a_module_of_ones_own(capsys):
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    module, by_hand = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    namespace = {}
    exec(module, namespace)
    tokens = torch.randn(6, 10, 16)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    [results] = trainer.test(namespace["Model"](), DataLoader(tokens, batch_size=4), verbose=False)
    assert set(results) == {"entropy", "information", "gap"}
    exec(by_hand, namespace)
    assert capsys.readouterr().out.startswith("{'audio_to_video': tensor(")


def test_the_page_of_metrics_names_them_all():
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    assert set(re.findall(r"^\| `(\w+)\(", page, flags=re.MULTILINE)) == set(metrics.__all__)


def test_the_page_on_tuning():
    [block] = blocks("tune.md")
    namespace = {}
    exec(block, namespace)
    assert namespace["tuning"].batches == 4
    assert len(namespace["tuning"].rows) == 5


def test_the_page_on_whether_to_adapt():
    [block] = blocks("should-i-adapt.md")
    namespace = {}
    exec(block, namespace)
    assert namespace["abpem"].updates == 4
    assert {"flip_rate", "information", "class_share", "drift"} <= set(namespace["figures"])


def test_a_benchmark_of_ones_own(tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "benchmark.md").read_text()
    _, own = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    namespace = {}
    exec(own, namespace)
    run_benchmark(namespace["Mine"], {}, out=tmp_path, protocol="iid,missing", seeds=1, workers=1)
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + (2 + 2) * len(METHODS)
