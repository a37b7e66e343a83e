"""Preparing the quickstart: what is there is used, made anew, or left alone because it is somebody's."""

import json
from importlib.util import module_from_spec, spec_from_file_location

import pytest

from tests.support.launching import ROOT

SPEC = spec_from_file_location("prepare_quickstart", ROOT / "launch" / "prepare_quickstart.py")
prepare = module_from_spec(SPEC)
SPEC.loader.exec_module(prepare)


def convert(gguf, target):
    target.mkdir()
    (target / "config.json").write_text("{}")
    return 1.0


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(heldout) -> exit code, with nine problems and without the conversion itself."""
    (tmp_path / "problems").write_text("".join(json.dumps({"question": str(n), "answer": "a"}) + "\n" for n in range(9)))
    monkeypatch.setattr(prepare, "find", lambda package, file: tmp_path / "problems")
    monkeypatch.setattr(prepare, "convert_model", convert)

    def prepared(heldout):
        monkeypatch.setattr("sys.argv", ["prepare", "--output", str(tmp_path / "quick"), "--heldout", str(heldout)])
        return prepare.main()

    return prepared


def test_it_is_prepared_once_and_anew_with_other_inputs(run, tmp_path, capsys):
    assert run(2) == 0 and run(2) == 0 and "already prepared" in capsys.readouterr().out
    assert run(3) == 0 and len((tmp_path / "quick" / "heldout.jsonl").read_text().splitlines()) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["problems", "quick"]


class Killed(BaseException):
    pass


def test_one_that_is_killed_while_it_deletes_the_old_one_is_made_anew(run, tmp_path, monkeypatch):
    assert run(2) == 0
    rmtree = prepare.shutil.rmtree

    def killed(path, **how):
        if path.exists():
            rmtree(path / "model")
            raise Killed

    with monkeypatch.context() as during:
        during.setattr(prepare.shutil, "rmtree", killed)
        with pytest.raises(Killed):
            run(3)
    assert run(2) == 0
    assert (tmp_path / "quick" / "model" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["problems", "quick"]


@pytest.mark.parametrize("moment", [1, 2])
def test_one_that_is_killed_while_it_puts_the_new_one_in_place_is_made_anew(run, tmp_path, monkeypatch, moment):
    """Before the old one is moved away, and before the new one is moved in."""
    assert run(2) == 0
    calls, replace = [], prepare.os.replace

    def killed(source, target):
        calls.append(source)
        if len(calls) == moment:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as during:
        during.setattr(prepare.os, "replace", killed)
        with pytest.raises(Killed):
            run(3)
    assert run(2) == 0
    assert (tmp_path / "quick" / "model" / "config.json").is_file()
    assert len((tmp_path / "quick" / "heldout.jsonl").read_text().splitlines()) == 2


def test_what_was_not_prepared_is_never_deleted(run, tmp_path, capsys):
    (tmp_path / "quick" / "model").mkdir(parents=True)
    (tmp_path / "quick" / "model" / "mine").touch()
    assert run(2) == 2 and "holds what was not prepared (no prepared.json)" in capsys.readouterr().err
    (tmp_path / "quick" / "thesis.txt").touch()
    assert run(2) == 2 and "(thesis.txt)" in capsys.readouterr().err
    assert (tmp_path / "quick" / "model" / "mine").is_file()
