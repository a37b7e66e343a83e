"""`load_checkpoint`: everything is checked on every rank before anything of the live run is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from losia_dist.checkpoint import content, layout, random_state
from losia_dist.checkpoint.base import Chain
from losia_dist.checkpoint.description import check_fits, check_scheduler
from losia_dist.checkpoint.quantized import check_quantized, describe_quantized
from losia_dist.checkpoint.reader import Reader
from losia_dist.checkpoint.session import check_parts, session_of
from losia_dist.checkpoint.tensor_names import contents_of
from losia_dist.errors import CheckpointError
from losia_dist.run.conductor import LoSiA


def load_checkpoint(
    directory: str | Path,
    *,
    model: Any,
    optimizer: Any,
    losia: LoSiA,
    scheduler: Any = None,
    step: int | None = None,
) -> Any:
    """Put a run back to where it was saved, on the same or another engine and number of ranks. Called by all ranks.

    On the engine and ranks that saved it the run goes on bit for bit; on others to rounding. A rank that the saved run did
    not have gets random numbers from a seed made of rank 0's state. Later saves into `directory` continue its base.

    Args:
        directory: what `save_checkpoint` was given.
        model, optimizer: as given to `LoSiA(...)`; built as for the saved run.
        losia: the conductor.
        scheduler: as when saving.
        step: which checkpoint; None: the newest complete one.

    Returns:
        `extra`, as it was saved.

    Raises:
        CheckpointError: on every rank: none is complete, files are missing, damaged or foreign, a newer format, or another
            model, configuration or optimizer. Nothing has been changed then.
        CheckpointError: in mid accumulation, whose gradients would go into the first step after.
        ConfigError: arguments that do not belong together.
    """
    check_parts(losia, model, optimizer)
    return load_from(directory, losia, scheduler=scheduler, name=None if step is None else layout.step_name(step))[1]


def load_from(
    directory: str | Path,
    losia: LoSiA,
    *,
    scheduler: Any = None,
    name: str | None = None,
    skip_scheduler: bool = False,
    saves_on: bool = True,
) -> tuple[Path, Any]:
    """`load_checkpoint`, of a name of the caller's choice; also says which was loaded.

    Args:
        skip_scheduler: leave the scheduler as it is.
        saves_on: whether later saves continue the directory's base; if not, nothing is collected for them.
    """
    directory = Path(directory).absolute()
    session = session_of(losia)
    session.wait()
    agreement = session.agreement
    what = f"loading from {directory}"
    agreement.same("what load_checkpoint was asked for", [str(directory), name])
    agreement.attempt(what, lambda: _check_between_steps(losia))
    chosen = agreement.on_first(what, lambda: layout.find(directory, name))
    losia.parameters.reshard()
    contents = contents_of(losia)
    quantized = describe_quantized(losia.parameters, contents.quantized)

    def check() -> tuple[Reader, dict[str, Any], dict[str, Any]]:
        reader = Reader(chosen)
        reader.check_files(agreement.rank, agreement.world_size)
        check_quantized(quantized, reader.manifest.get("quantized", {}), reader.path)
        check_fits(losia, contents, reader, agreement.world_size)
        if not skip_scheduler:
            check_scheduler(scheduler, reader)
        known = agreement.rank < reader.manifest["world_size"]
        return reader, reader.values(), reader.random_state(agreement.rank if known else 0)

    reader, saved, random = agreement.attempt(what, check)
    content.write_weights(losia, contents, reader)
    content.write_state(losia, contents, reader)
    content.write_values(losia, saved, None if skip_scheduler else scheduler)
    content.write_importance(losia, reader)
    if agreement.rank < reader.manifest["world_size"]:
        random_state.restore(random)
    else:
        random_state.seed_new_rank(random, agreement.rank)
    # Later saves here continue this base; chains of other directories ended with the weights they knew.
    run, crc32, journal = (reader.manifest[key] for key in ("run", "base_crc32", "journal"))
    session.chains.clear()
    if saves_on:
        session.chains[directory] = Chain(directory, run, crc32, dict(journal))
    agreement.gather(None)  # no rank saves over files that another still reads
    return chosen.path, saved["extra"]


def _check_between_steps(losia: LoSiA) -> None:
    if losia.in_mid_step:
        raise CheckpointError(
            "a checkpoint was to be loaded in the middle of an optimizer step: gradients of micro-batches that were run would "
            "go into the first step after. Load before the first one, or call optimizer.zero_grad() and losia.discard_step()."
        )
