"""`losia-dist data`: what will be learned of a source, before a run: records, lengths, what is dropped, the shares of a mix."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import date
from itertools import groupby
from typing import Any

from losia_dist.errors import ConfigError

_BARS = 12  # lines of the histogram
_WIDTH = 40  # characters of its longest bar
_LEARNED, _READ = "\033[32m", "\033[0m"  # green


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `losia-dist data`."""
    from losia_dist.recipe.options import add_record_arguments

    parser.add_argument("source", nargs="+", metavar="SOURCE", help="as for --train_file of losia-dist train")
    parser.add_argument("--model", required=True, help="directory or hub name of the model, whose tokenizer is used")
    add_record_arguments(parser)
    parser.add_argument("--records", type=int, default=3, help="records to show (3)")
    parser.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto", help="learned text in green, or in [[ ]]"
    )


def run_data(options: argparse.Namespace) -> int:
    """Print what will be learned. Returns the exit code. Raises: LoSiAError for whatever a run would refuse."""
    from transformers import AutoTokenizer

    from losia_dist.data import build_dataset, load_records
    from losia_dist.recipe.options import parse_columns
    from losia_dist.recipe.run_data import chat_template_of

    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {options.model}: no tokenizer could be read: {error}") from error
    records = load_records(options.source, options.form, parse_columns(options.columns))
    template = chat_template_of(options, tokenizer)
    dataset: Any = build_dataset(
        records,
        tokenizer,
        options.max_length,
        overlong=options.overlong,
        chat_template=template,
        template_date=options.template_date and date.fromisoformat(options.template_date),
    )
    colored = options.color == "always" or (options.color == "auto" and sys.stdout.isatty())
    for index in range(min(options.records, len(dataset))):
        print(f"--- example {index}: {dataset.length(index)} tokens")
        print("".join(_marked(tokenizer, dataset[index], colored)))
    print(f"\n{len(records):,} records of the form '{records.form}': {dataset.report()}")
    if records.unused:
        print(f"not used: {', '.join(sorted(records.unused))}")
    if len(options.source) > 1:
        print("\n" + "\n".join(_shares(records)))
    print("\ntokens per example\n" + "\n".join(histogram([dataset.length(index) for index in range(len(dataset))])))
    return 0


def histogram(lengths: Sequence[int]) -> list[str]:
    """Lines with a bar for each range of lengths."""
    width = max(1, -(-max(lengths) // _BARS))
    counts = Counter((length - 1) // width for length in lengths)
    most = max(counts.values())
    return [
        f"{at * width + 1:>7,} to {(at + 1) * width:>7,} {counts[at]:>9,} {'#' * round(_WIDTH * counts[at] / most)}".rstrip()
        for at in range(max(counts) + 1)
    ]


def _marked(tokenizer: Any, example: Any, colored: bool) -> Iterator[str]:
    begin, end = (_LEARNED, _READ) if colored else ("[[", "]]")
    pairs = zip(example["input_ids"].tolist(), (example["labels"] != -100).tolist(), strict=True)
    for learned, run in groupby(pairs, key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in run])
        yield f"{begin}{text}{end}" if learned else text


def _shares(records: Any) -> Iterator[str]:
    """How many of the records come from each file."""
    counts = Counter(records.place(index).rpartition(", ")[0] for index in range(len(records)))
    for name, count in counts.items():
        yield f"{count:>9,} {count / len(records):>6.1%} {name}"
