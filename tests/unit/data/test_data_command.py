"""`losia-dist data`: what a user sees before a run."""

import json

import pytest

from losia_dist.cli.main import main
from tests.unit.data.test_data_encoding import CHAT, make_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    make_tokenizer().save_pretrained(directory)
    return str(directory)


def test_it_shows_what_is_learned_and_dropped_and_the_shares(tmp_path, model, capsys):
    long = {"messages": [{"role": "user", "content": "long " * 100}, *CHAT["messages"][1:2]], "id": 1}
    for name, rows in {"a": [CHAT, long], "b": [CHAT]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "data",
        str(tmp_path / "a.jsonl"),
        str(tmp_path / "b.jsonl"),
        "--model",
        model,
        "--max_length",
        "200",
        "--records",
        "1",
    ]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "assistant\n[[Red.<|im_end|>]]\n<|im_start|>user" in shown and shown.count("--- example") == 1
    assert "3 records of the form 'chat': 2 examples" in shown and "1 dropped without an answer" in shown
    assert "would keep all whole)" in shown and "not used: id" in shown
    assert f"2  66.7% {tmp_path / 'a.jsonl'}" in shown and f"1  33.3% {tmp_path / 'b.jsonl'}" in shown
    assert "tokens per example" in shown and "2 ########" in shown
    assert main([*words, "--color", "always"]) == 0
    assert "\033[32mRed.<|im_end|>\033[0m" in capsys.readouterr().out


def test_what_a_run_would_refuse_is_refused(tmp_path, model, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": 3}\n')
    assert main(["data", str(path), "--model", model]) == 2
    assert "line 1: 'text' must be a string" in capsys.readouterr().err
    assert main(["data", str(path), "--model", str(tmp_path)]) == 2
    assert "no tokenizer could be read" in capsys.readouterr().err
