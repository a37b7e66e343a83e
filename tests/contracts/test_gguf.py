"""examples/to_gguf.py: the file holds the exported model, as Transformers reads it back."""

import runpy
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, export_model, get_losia_model, losia_parameter_groups
from tests.support.launching import ROOT, make_material
from tests.support.trl_models import save_tiny_model


def convert(monkeypatch, model, output):
    monkeypatch.setattr(sys, "argv", ["to_gguf.py", "--model", str(model), "--output", str(output)])
    runpy.run_path(str(ROOT / "examples" / "to_gguf.py"), run_name="__main__")


def test_an_exported_model_is_the_same_as_gguf(tmp_path, monkeypatch):
    base = make_material(tmp_path)["model"]
    config = LoSiAConfig(rank_factor=0.25, period=1)
    converted = get_losia_model(AutoModelForCausalLM.from_pretrained(base), config)
    losia = LoSiA(converted, LoSiAAdamW(losia_parameter_groups(converted, lr=1e-2)), config)
    tokens = torch.arange(3, 35).reshape(2, 16)
    converted(input_ids=tokens, labels=tokens).loss.backward()
    losia.state.optimizer.step()
    losia.step()
    export_model(losia, tmp_path / "trained", base_model=base)
    (tmp_path / "gguf").mkdir()
    convert(monkeypatch, tmp_path / "trained", tmp_path / "gguf" / "trained.gguf")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="trained.gguf", dtype=torch.float32).eval()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(read(input_ids=tokens).logits, plain(input_ids=tokens).logits, rtol=0, atol=1e-6)
    known, given = (AutoTokenizer.from_pretrained(tmp_path / "trained"), AutoTokenizer.from_pretrained(base))
    assert known("red one sun").input_ids == given("red one sun").input_ids


def test_what_the_example_cannot_write_is_said(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"error: .* has a WordLevel tokenizer: use llama.cpp's convert_hf_to_gguf.py"):
        convert(monkeypatch, save_tiny_model(tmp_path / "words"), tmp_path / "words.gguf")
