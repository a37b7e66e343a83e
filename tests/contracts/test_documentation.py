"""The documentation says what the code does: the README's loop, the support matrix, the options."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from losia_dist import LoSiAConfig
from tests.support import deepspeed_keys
from tests.support.documents import PAGES
from tests.support.matrix import render
from tests.support.models import batches, tiny_llama
from tests.support.trl_models import save_tiny_model

ROOT = Path(__file__).parents[2]


def test_the_readmes_plain_loop_trains_and_exports(tmp_path, monkeypatch):
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(tmp_path / "given"))
    model = tiny_llama()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    loader = [step[0] for step in batches(steps=3, micro_batches=1, batch=2, length=8, vocab=97, seed=0)]
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"model": model, "loader": loader, "tokenizer": tokenizer})
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained").state_dict()
    assert AutoTokenizer.from_pretrained(tmp_path / "trained").get_vocab() == tokenizer.get_vocab()
    assert trained.keys() == before.keys()
    changed = {name for name in before if not torch.equal(trained[name], before[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}


def test_the_support_matrix_of_the_documentation_is_the_tested_one():
    assert render() in (ROOT / "docs" / "support-matrix.md").read_text(), "run python -m tests.support.matrix and paste it"


def test_the_table_of_deepspeeds_keys_in_the_documentation_is_the_tested_one():
    table = deepspeed_keys.render()
    assert table in (ROOT / "docs" / "support-matrix.md").read_text(), "run python -m tests.support.deepspeed_keys and paste it"
    assert len({key.name for key in (*deepspeed_keys.SAME, *deepspeed_keys.REFUSED)}) >= 40


def _anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        assert not anchor or anchor in _anchors(there), target


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages == set(re.findall(r"\]\((\w[\w-]*\.md)", index))


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "quality.md"], ids=lambda page: page.name)
def test_a_page_that_is_read_at_once_stays_short(page):
    assert len(page.read_text().splitlines()) <= 120


def test_the_glossary_has_ten_terms_at_most():
    terms = re.findall(r"^\| \*\*(.*?)\*\* \|", (ROOT / "docs" / "README.md").read_text(), re.MULTILINE)
    assert 0 < len(terms) <= 10


def test_every_option_of_the_configuration_is_explained():
    explained = inspect.cleandoc(LoSiAConfig.__doc__)
    missing = [field.name for field in fields(LoSiAConfig) if not re.search(rf"^    {field.name}: ", explained, re.MULTILINE)]
    assert not missing
