"""The examples of the documentation, run."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
EXAMPLES = {
    match[1]: match[2]
    for match in re.finditer(r"\n#+ ([^\n]+)\n(?:(?!\n#).)*?```python\n(.*?)```", PAGE, flags=re.DOTALL)
}


def test_every_family_has_one():
    families = {"ViLT", "FLAVA", "VisualBERT", "LXMERT", "BridgeTower", "torch's own transformers"}
    assert families < set(EXAMPLES)
    assert len(EXAMPLES) == 9


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.filterwarnings("ignore:A frozen module gave another output", "ignore:.*nested tensor")
def test_example(name):
    if "from transformers" in EXAMPLES[name]:
        pytest.importorskip("transformers")
    namespace = {}
    exec(EXAMPLES[name], namespace)
    assert namespace["adaptation"].updates >= 1


def test_a_method_of_ones_own():
    page = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
    use, own = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    namespace = {}
    exec(use, namespace)
    assert namespace["read"].settings.reset == "dataloader"
    exec(own, namespace)
    assert namespace["adaptation"].updates == 1
    assert list(namespace["adaptation"].params) == ["head.bias"]
