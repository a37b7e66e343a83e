"""The data of each task: records to train on, to choose the learning rate by, and to report on; and unrelated text."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from losia_dist.data import Records, load_records
from losia_dist.data.record_files import RawRecords

CHOICE, HELD_OUT = 32, 96  # problems that the learning rate is chosen by, and others that are reported

# reasoning-gym's generators, easy enough for a small model to learn something of in a few dozen steps.
GENERATORS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "spell_backward": {"min_word_len": 3, "max_word_len": 5},
    "family_relationships": {},
    "number_filtering": {"min_numbers": 3, "max_numbers": 5, "min_decimals": 0, "max_decimals": 0},
}


class MissingDataError(RuntimeError):
    """Data that is not installed or not prepared, and the fix."""


@dataclass
class Task:
    """Records of one task.

    choice: held-out records that the learning rate is chosen by. held_out: other ones, that results are reported on.
    score: answer that the model wrote, number of the held-out record -> score between 0 and 1; None: not scored.
    batch: records a step. answer_tokens: most tokens that an answer is given.
    """

    name: str
    train: Records
    choice: Records
    held_out: Records
    batch: int
    answer_tokens: int
    score: Callable[[str, int], float] | None = None


def load_task(name: str, data: Path) -> Task:
    """The task of this name: "gsm8k" (from the quickstart's directory), "reasoning", or a file of records.

    Raises:
        MissingDataError: its data is not there.
    """
    if name == "gsm8k":
        return _gsm8k(data)
    if name == "reasoning":
        return _reasoning()
    if Path(name).suffix in (".jsonl", ".json"):
        return _file(Path(name))
    raise MissingDataError(f"task {name!r} is not known: give gsm8k, reasoning, or a file of instructions (.jsonl).")


def _gsm8k(data: Path) -> Task:
    for file in ("train.jsonl", "heldout.jsonl"):
        if not (data / file).is_file():
            raise MissingDataError(f"{data / file} is missing: python launch/prepare_quickstart.py --output {data}")
    held_out = load_records(data / "heldout.jsonl")
    chosen, reported = _parts(held_out)

    def score(answer: str, index: int) -> float:
        return float(final_number(answer) == final_number(reported[index]["output"]))

    return Task("gsm8k", load_records(data / "train.jsonl"), chosen, reported, batch=4, answer_tokens=200, score=score)


def final_number(answer: str) -> str | None:
    """The number after "####", as GSM8K's answers end; None if there is none."""
    found = re.search(r"####\s*(-?[\d,.]*\d)", answer)
    return found.group(1).replace(",", "") if found else None


def _reasoning(train_size: int = 2000) -> Task:
    try:
        import reasoning_gym
    except ImportError:
        raise MissingDataError("reasoning-gym is not installed: pip install 'losia_dist[benchmarks]'") from None

    def problems(size: int, seed: int) -> list[tuple[Any, dict[str, Any]]]:
        sets = [
            reasoning_gym.create_dataset(name, size=-(-size // len(GENERATORS)), seed=seed, **settings)
            for name, settings in GENERATORS.items()
        ]
        return [(sets[place % len(sets)], sets[place % len(sets)][place // len(sets)]) for place in range(size)]

    train = problems(train_size, seed=0)
    seen = {entry["question"] for _, entry in train}
    # Far apart: a generator's problem i with seed s is its problem i - 1 with seed s + 1.
    others = problems(4 * (CHOICE + HELD_OUT), seed=1_000_000)
    held_out = [(source, entry) for source, entry in others if entry["question"] not in seen]
    random.Random(0).shuffle(held_out)
    held_out = held_out[: CHOICE + HELD_OUT]
    chosen, reported = _parts(_instructions([entry for _, entry in held_out], "reasoning (held out)"))

    def score(answer: str, index: int) -> float:
        source, entry = held_out[CHOICE + index]
        return float(source.score_answer(answer, entry))

    records = _instructions([entry for _, entry in train], "reasoning")
    return Task("reasoning", records, chosen, reported, batch=16, answer_tokens=32, score=score)


def _instructions(entries: list[dict[str, Any]], name: str) -> Records:
    rows = [{"instruction": entry["question"], "output": entry["answer"]} for entry in entries]
    return Records(RawRecords(rows, name), "instruction")


def _file(path: Path) -> Task:
    records = load_records(path)
    order = random.Random(0).sample(range(len(records)), len(records))
    size = CHOICE + HELD_OUT
    if len(records) < 2 * size:
        raise MissingDataError(f"{path}: {len(records)} records are too few: {size} are held out, as many must be left.")
    chosen, reported = _parts(records.select(order[:size]))
    return Task(str(path), records.select(order[size:]), chosen, reported, batch=4, answer_tokens=200)


def _parts(held_out: Records) -> tuple[Records, Records]:
    return held_out.select(range(CHOICE)), held_out.select(range(CHOICE, min(len(held_out), CHOICE + HELD_OUT)))


def unrelated_texts(count: int = 12, words: int = 160) -> list[str]:
    """Plain English that no task trains on: prose from Python's own language reference, which Python brings along."""
    from pydoc_data.topics import topics

    paragraphs = [
        " ".join(paragraph.split())
        for name in sorted(topics)
        for paragraph in topics[name].split("\n\n")
        # Headings, grammar, code and lists are indented, short or marked.
        if len(paragraph) > 200 and paragraph[0].isalpha() and "::" not in paragraph and "->" not in paragraph
    ]
    paragraphs = list(dict.fromkeys(paragraphs))
    random.Random(0).shuffle(paragraphs)
    texts, current = [], ""
    for paragraph in paragraphs:
        current = f"{current} {paragraph}".strip()
        if len(current.split()) >= words:
            texts.append(" ".join(current.split()[:words]))
            current = ""
        if len(texts) == count:
            break
    return texts
