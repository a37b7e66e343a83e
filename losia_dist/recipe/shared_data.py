"""One data set of a run, tokenized by the ranks of a machine together and mapped by each; see `data.cache`."""

from __future__ import annotations

import multiprocessing
import os
import platform
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from losia_dist.data import cache
from losia_dist.data.dataset import Settings, TokenizedDataset, check_not_empty, tokenize
from losia_dist.data.records import Records
from losia_dist.data.streaming import Stream
from losia_dist.errors import ConfigError, DataError
from losia_dist.ranks.agreement import Agreement

OFF = "off"  # of --data_cache
_READS = "losia_dist.recipe.run_data"  # what such a process reads with
_WORTH_A_BAR = 5_000  # records that take long enough to watch


class Tokenizing(NamedTuple):
    """What is tokenized, with what, and how."""

    records: Records | Stream
    tokenizer: Any
    settings: Settings


@dataclass
class Shared:
    """A directory in which data sets are kept (None: nowhere), and the processes that each rank has for making one.

    read: reads again what is tokenized, in such a process; it is sent there.
    """

    agreement: Agreement
    directory: Path | None
    workers: int = 1

    def load(self, work: Tokenizing, read: Callable[[], Tokenizing]) -> tuple[TokenizedDataset, str]:
        """The data set, and in words where it comes from, with a place for {seconds}. Called by all ranks: each communicates
        the same, whatever it finds.

        Raises: LoSiAError; the same on all ranks.
        """
        agreement, name = self.agreement, work.records.name
        # Ranks on one machine that were given the same files share the work; one name in two directories is two files.
        alike = agreement.gather((platform.node(), str(self.directory), os.path.abspath("."), name))
        members = [rank for rank, theirs in enumerate(alike) if theirs == alike[agreement.rank]]
        is_first = members[0] == agreement.rank
        looked = agreement.attempt(None, lambda: self._look(work) if is_first else _Making(None, None))
        found = agreement.gather(looked)[members[0]]
        parts, first = len(members) * self.workers, members.index(agreement.rank) * self.workers
        mine = range(first, first + self.workers)

        def make() -> TokenizedDataset | None:
            if found.key is None:
                return _in_memory(work, found.reason)
            if found.making is not None:
                self._write(found.making, mine, parts, work, read)
            return None

        def finish() -> None:
            if found.making is not None and found.key is not None and is_first:
                cache.join(found.making, parts, found.key)

        def open_whole() -> TokenizedDataset:
            whole = dataset
            if self.directory is not None and found.key is not None:
                whole = cache.find(self.directory, found.key, work.settings.max_length)
            if whole is None:
                raise ConfigError(f"{self.directory}: the tokenized data that was there a moment ago is gone. Start again.")
            check_not_empty(whole.report(), name, work.settings.max_length)
            return whole

        try:
            dataset = agreement.attempt(None, make)
            agreement.attempt(None, finish)
        finally:
            if found.making is not None and is_first:
                shutil.rmtree(found.making, ignore_errors=True)
        whole = agreement.attempt(None, open_whole)
        if found.key is None or self.directory is None:
            return whole, f"tokenized by every rank for itself in {{seconds:.1f}} s{found.reason}"
        processes = f" of {self.workers} processes" if self.workers > 1 else ""
        made = "found" if found.making is None else f"made by {len(members)} rank(s){processes}"
        return whole, f"{made} in {{seconds:.1f}} s: {self.directory / found.key}"

    def _look(self, work: Tokenizing) -> _Making:
        if self.directory is None:
            return _Making(None, None)
        key = cache.key_of(work.records, work.tokenizer, work.settings)
        if key is None or cache.find(self.directory, key, work.settings.max_length) is not None:
            return _Making(key, None)
        try:
            return _Making(key, cache.begin(self.directory, key))
        except OSError as error:
            return _Making(None, None, f" ({self.directory} cannot be written: {error.strerror}; see --data_cache)")

    def _write(self, making: Path, mine: range, parts: int, work: Tokenizing, read: Callable[[], Tokenizing]) -> None:
        """This rank's parts, each in a process of its own if they are several. Raises: DataError."""
        count = len(work.records) // parts * len(mine) if isinstance(work.records, Records) else None
        hidden = self.agreement.rank != 0 or (count or _WORTH_A_BAR) < _WORTH_A_BAR
        with tqdm(total=count, desc="tokenizing", unit=" records", disable=hidden or None) as bar:  # None: no terminal, no bar
            if len(mine) == 1:
                cache.write_part(making, mine[0], parts, *work, bar.update)
                return
            # Not forked from this process, which has threads, but from one that has imported what all of them need, once.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([_READS])
            with ProcessPoolExecutor(len(mine), mp_context=context) as pool:
                running = [pool.submit(_write_alone, making, part, parts, read) for part in mine]
                for one in as_completed(running):
                    if one.exception() is None:
                        bar.update(one.result())
            for one in running:  # in the order of the records
                one.result()


class _Making(NamedTuple):
    """What the first rank of a machine found: the data set's key and where it is made; why not, where it cannot be kept."""

    key: str | None
    making: Path | None
    reason: str = ""


def _write_alone(making: Path, part: int, parts: int, read: Callable[[], Tokenizing]) -> int:
    """In a process of its own: one part, and how many records it has."""
    done: list[int] = []
    cache.write_part(making, part, parts, *read(), done.append)
    return sum(done)


def _in_memory(work: Tokenizing, reason: str) -> TokenizedDataset:
    if isinstance(work.records, Stream):
        why = reason.strip(" ()") or "the tokenizer is not a fast one, or --data_cache is off"
        raise DataError(f"{work.records.name}: --streaming keeps the tokens in the data cache, and there is none: {why}.")
    return tokenize(work.records, work.tokenizer, work.settings)
