"""Tokenizing once: the first start of several ranks beside one `datasets.map`, the second start, and the memory of a rank.

    python -m benchmarks.data [--records 200000] [--ranks 4] [--model DIRECTORY] [--source FILE] [--json FILE]

The records are the source's, repeated, each with its number in front so that no two are equal. `datasets.map` renders and
tokenizes one record at a time with the tokenizer's own `apply_chat_template`, in one process that has imported everything
before. The ranks run the training script's own code, up to data sets that are ready. "processor" is user and system time of
all ranks, which other programs on the machine change less than the clock. Memory is a rank's above what it held before: its
own at the end, and the peak of all that is resident, with mapped pages, after a pass over the data.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.common import RESULTS, bar, bar_table, header, on_ranks, table, write_json
from benchmarks.loading import held

MAP, AGAIN, MEMORY = 1.3, 0.03, 300e6  # at most: of the map's time, of the first start's, bytes above a small run's
SMALL = 2_000  # records


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--model", default="quickstart/model")
    parser.add_argument("--source", default="quickstart/train.jsonl")
    parser.add_argument("--json", default=str(RESULTS / "data.json"))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        large = write_records(options.source, options.records, Path(directory) / "large.jsonl")
        small = write_records(options.source, SMALL, Path(directory) / "small.jsonl")
        print(header())
        starts = {
            name: on_ranks(options.ranks, start, options.model, str(file), directory)
            for name, file in (("small", small), ("first start", large), ("second start", large))
        }
        for name, ranks in starts.items():  # a cut run keeps what it had
            print(f"{name}: {[{key: round(value, 2) for key, value in rank.items()} for rank in ranks]}", flush=True)
        mapped = on_ranks(1, map_once, options.model, str(large), directory)
    rows = [["datasets.map", f"{mapped['processor']:.1f} s", f"{mapped['clock']:.1f} s", "", ""]]
    found: dict[str, Any] = {"records": options.records, "ranks": options.ranks, "datasets.map": mapped}
    for name, ranks in starts.items():
        found[name] = {
            "processor": sum(rank["processor"] for rank in ranks),
            "clock": max(rank["clock"] for rank in ranks),
            **{kind: max(rank[kind] for rank in ranks) for kind in ("own", "resident")},
        }
        row = found[name]
        rows.append(
            [
                f"{options.ranks} ranks, {SMALL if name == 'small' else options.records:,} records, {name}",
                f"{row['processor']:.1f} s",
                f"{row['clock']:.1f} s",
                *(f"{row[kind] / 1e6:.0f} MB" for kind in ("own", "resident")),
            ]
        )
    print(table(["", "processor", "clock", "memory of a rank, own", "all"], rows))
    first, second = found["first start"], found["second start"]
    found["bars"] = [
        bar("first start / datasets.map, processor", first["processor"] / mapped["processor"], MAP),
        bar("second start / first, processor", second["processor"] / first["processor"], AGAIN),
        bar("second start / first, clock", second["clock"] / first["clock"], AGAIN),
        bar("a rank's memory above a small run's, MB", (first["resident"] - found["small"]["resident"]) / 1e6, MEMORY / 1e6),
    ]
    print(f"\n{bar_table(found['bars'])}")
    write_json(options.json, found)
    return found


def write_records(source: str, count: int, path: Path) -> Path:
    """`count` chats from the instructions in `source`, no two of them equal."""
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
    with path.open("w") as file:
        for index in range(count):
            row = rows[index % len(rows)]
            question = {"role": "user", "content": f"{index}. {row['instruction']}"}
            file.write(json.dumps({"messages": [question, {"role": "assistant", "content": row["output"]}]}) + "\n")
    return path


def start(model: str, source: str, directory: str) -> list[dict[str, float]]:
    """Everyone's times and peaks of getting a data set ready, on every rank. Called by all ranks."""
    from transformers import AutoTokenizer

    from losia_dist.ranks.agreement import Agreement
    from losia_dist.recipe.options import add_training_arguments
    from losia_dist.recipe.run_data import load_data

    AutoTokenizer.from_pretrained(model)  # what is imported on the way is not counted
    words = ["--model", model, "--train_file", source, "--output_dir", "-", "--data_cache", f"{directory}/kept"]
    options = add_training_arguments(argparse.ArgumentParser()).parse_args(words)
    agreement = Agreement(dist.new_group(backend="gloo") if dist.is_initialized() else None, is_own=True)
    agreement.gather(None)
    before, clock, processor = held(), time.perf_counter(), time.process_time()
    data = load_data(options, agreement, "2026-01-01")
    mine = {"clock": time.perf_counter() - clock, "processor": time.process_time() - processor}
    for index in range(0, len(data.train), 7):  # touches most of its pages, as an epoch does
        data.train[index]
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return agreement.gather({**mine, "own": held()["own"] - before["own"], "resident": peak - before["resident"]})


def map_once(model: str, source: str, directory: str) -> dict[str, float]:
    """Times of one `datasets.map` over the records."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = datasets.load_dataset("json", data_files=source, split="train", cache_dir=f"{directory}/datasets")
    clock, processor = time.perf_counter(), time.process_time()
    rows.map(lambda row: dict(tokenizer.apply_chat_template(row["messages"], return_dict=True)), remove_columns=["messages"])
    return {"clock": time.perf_counter() - clock, "processor": time.process_time() - processor}


if __name__ == "__main__":
    main()
