"""One training run from its options: inputs, engine, loop, summary."""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.data import make_evaluation_loader, make_loader
from losia_dist.errors import ConfigError, LoSiAError
from losia_dist.export.hub import check_repository, push_model
from losia_dist.export.live import export_model, save_whole_model
from losia_dist.export.model_card import facts_of_run, write_card
from losia_dist.model import count_trainable
from losia_dist.optim.adamw import LoSiAAdamW
from losia_dist.optim.dense_groups import dense_parameter_groups
from losia_dist.ranks.agreement import Agreement
from losia_dist.ranks.compat import DDP_KEEPS_BUFFERS
from losia_dist.ranks.interruption import Interrupted
from losia_dist.recipe.calibrate import locate_first_subnets
from losia_dist.recipe.capacity import check_disk, check_memory
from losia_dist.recipe.checkpoints import Checkpoints
from losia_dist.recipe.choice import EngineChoice, choose_engine
from losia_dist.recipe.engines import DeepSpeedRun, Engine, PlainRun
from losia_dist.recipe.environment import Process
from losia_dist.recipe.fsdp import shard, take_from_rank_0
from losia_dist.recipe.load_inputs import check_writable, load
from losia_dist.recipe.logs import RunLog
from losia_dist.recipe.loop import Reporter, train_steps
from losia_dist.recipe.options import check
from losia_dist.recipe.output_directory import OutputDirectory
from losia_dist.recipe.preset import choose_preset, count_steps, learning_rate_for
from losia_dist.recipe.quantization import choose_export
from losia_dist.recipe.run_data import choose_template_date, load_data
from losia_dist.recipe.schedule import cosine_schedule
from losia_dist.recipe.trackers import Tracker, start_trackers
from losia_dist.recipe.trajectory import describe, warmup_steps
from losia_dist.recipe.weights.empty import Where, find_holders, give_memory
from losia_dist.recipe.weights.model_files import local_directory
from losia_dist.recipe.weights.streamed import StreamedWeights
from losia_dist.run.conductor import LoSiA
from losia_dist.run.run_facts import write_facts
from losia_dist.run.subnet_log import SubnetLog
from losia_dist.subnet.groups import losia_parameter_groups
from losia_dist.subnet.packed import packed_weights


def train(options: argparse.Namespace, process: Process, agreement_group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Run training as the options say; returns the summary that rank 0 also writes to summary.json. Called by all ranks.

    Args:
        agreement_group: the group for agreement that `start_process_group` gave.

    Raises:
        LoSiAError: for every bad input, the same on all ranks, before any other collective.
        Interrupted: SIGTERM came, and a checkpoint has been saved (on all ranks).
    """

    def prepare() -> tuple[LoSiAConfig | None, EngineChoice]:
        return check(options), choose_engine(options, process)

    agreement = Agreement(agreement_group, is_own=True)
    config, choice = agreement.attempt(None, prepare)
    agreement.same("the options", _comparable(options))
    agreement.same("the LoSiA configuration", config.to_dict() if config else {})
    agreement.same("the engine's settings", asdict(choice))
    # Those of one sequence read the same data.
    data_ranks = process.world_size // choice.sequence_ranks
    ranks: dict[str, Any] = {"rank": process.rank // choice.sequence_ranks, "world_size": data_ranks}
    output = OutputDirectory(options)
    checkpoints = Checkpoints(options, output, agreement)
    checkpoints.choose()
    saved = checkpoints.source.extra["trajectory"] if checkpoints.source is not None else None
    day = agreement.on_first(None, lambda: choose_template_date(options, saved))  # ranks may start on two sides of midnight
    agreement.attempt(None, lambda: check_memory(options, choice, process))
    agreement.on_first(None, lambda: check_writable(Path(options.output_dir)))
    agreement.on_first(None, lambda: check_disk(options, choice))
    if options.push_to_hub:
        agreement.on_first(None, lambda: check_repository(options.push_to_hub))
    data = load_data(options, agreement, day)

    def decide() -> tuple[LoSiAConfig | None, EngineChoice, int]:
        steps, chosen = count_steps(options, data, **ranks), config
        if options.losia and chosen is None:
            chosen, said = choose_preset(options, steps)
            data.notes.append(said)
        options.learning_rate, said = learning_rate_for(options, chosen)
        data.notes += [said] if said else []
        return chosen, choose_engine(options, process), steps

    config, choice, steps = agreement.attempt(None, decide)
    agreement.same("the LoSiA configuration", config.to_dict() if config else {})
    loaded = agreement.attempt(None, lambda: load(options, config, choice, process))
    agreement.same("the data", data.fingerprint())
    prints = agreement.attempt(None, loaded.fingerprint)
    agreement.same("the model's files", prints)

    where = {**ranks, "flatten": loaded.flatten}
    loader = make_loader(data.train, data.tokenizer, options.micro_batch, seed=options.seed, **where)
    followed = {"template_date": data.template_date, **data.fingerprint()}
    checkpoints.check(describe(options, choice.precision, followed, len(data.train), steps, data_ranks))
    run = _start(loaded.model, config, choice, options, process, steps, loaded.weights, agreement)
    subnets = SubnetLog(run.losia) if run.losia is not None and process.rank == 0 else None
    begun, source = checkpoints.load(run), checkpoints.source
    continues = source is not None and source.is_own
    agreement.on_first(None, output.hold)  # the first change on the disk: everything that can be refused has been
    if not continues:
        agreement.on_first(None, output.clear)
    summary: dict[str, Any] = {
        "method": "losia" if run.losia is not None else "full",
        "engine": run.name,
        "precision": choice.precision,
        "ranks": process.world_size,
        **({"ranks_per_sequence": choice.sequence_ranks} if choice.sequence_ranks > 1 else {}),
        "steps": steps,
        "trainable_parameters": count_trainable(run.model),
        "data": str(data.train.report()),
        "data_from": data.origin,
    }
    agreement.on_first(None, lambda: _describe(run, config, options, process, summary))
    trackers: list[Tracker] = []
    about = {**_comparable(options), "losia_config": config.to_dict() if config else None, **summary}
    begun_at = begun.step if continues else None
    agreement.on_first(None, lambda: trackers.extend(start_trackers(options.report_to, output.path, about, begun_at)))
    log = RunLog(output.path, steps, process.rank == 0, begun, continues, trackers)
    log.say(
        f"{summary['method']}, {run.name}, {choice.precision}, {process.world_size} rank(s): "
        f"{summary['trainable_parameters']:,} trainable parameters, {steps} steps; {summary['data']}"
    )
    log.say(f"data {data.origin}")
    log.follow(subnets, continues)
    if source is None and run.losia is not None and not run.losia.located:
        log.say(locate_first_subnets(run, loader))
    if notes := data.notes + loaded.notes:
        summary["notes"] = notes
        log.say("\n".join(notes))
    reporter = Reporter(run, log, summary, options)
    if data.held_out is not None:
        evaluation = make_evaluation_loader(data.held_out, data.tokenizer, options.micro_batch, **where)
        reporter.hold_out(evaluation, data.held_out, data.tokenizer)
    if source is None:
        reporter.loss(0, "held_out_loss_before")
        reporter.samples("samples_before")
    else:
        summary |= {"resumed_from_step": begun.step, **source.extra["summary"]}
        log.say(f"going on from {source.path}, after step {begun.step} of {steps}")
    try:
        train_steps(run, options, steps, loader, reporter, checkpoints, begun)
    except (LoSiAError, Interrupted):
        log.close()
        with contextlib.suppress(LoSiAError):  # the first error counts; a save under way must end before the ranks part
            checkpoints.wait(run)
        output.release()
        raise
    reporter.loss(steps, "held_out_loss_after")
    reporter.samples("samples_after")
    if data.held_out is not None:
        before, after = summary["held_out_loss_before"], summary["held_out_loss_after"]
        log.say(f"held-out loss: {before:.4f} before training, {after:.4f} after")
    is_onto = choose_export(run, reporter, options)
    log.finish(summary)
    if not options.no_save:
        target = output.model
        agreement.on_first(None, output.note_others)
        run.model.config.use_cache = run.model.config.get_text_config().use_cache = loaded.use_cache  # packing turned it off
        beside: dict[str, Any] = {"base_model": local_directory(options.model), "tokenizer": data.tokenizer}
        if run.losia is not None:
            export_model(run.losia, target, **beside, onto=is_onto)
        else:
            save_whole_model(run.model, target, **beside, agreement=agreement)
        agreement.on_first(None, lambda: write_card(target, facts_of_run(output.path)))
        agreement.on_first(f"writing to {output.path}", output.record_model)
        if options.push_to_hub:
            log.say(f"pushed: {agreement.on_first(None, lambda: push_model(target, options.push_to_hub))}")
    checkpoints.wait(run)
    output.release()
    if run.losia is not None:
        run.losia.detach()
    return summary


def _start(
    model: Any,
    config: LoSiAConfig | None,
    choice: EngineChoice,
    options: argparse.Namespace,
    process: Process,
    steps: int,
    weights: StreamedWeights | None,
    agreement: Agreement,
) -> Engine:
    """The chosen engine around the model, with the weights that its files hold."""
    rate, decay = options.learning_rate, options.weight_decay

    def schedule(optimizer: Any) -> Any:
        warmup = warmup_steps(options, steps)
        return cosine_schedule(optimizer, warmup, max(steps, warmup + 1), options.min_lr_ratio)

    def make_optimizer(wrapped: nn.Module) -> LoSiAAdamW:
        if config is not None:
            groups: Any = losia_parameter_groups(wrapped, lr=rate, weight_decay=decay)
        else:
            groups = dense_parameter_groups(wrapped, lr=rate, weight_decay=decay)
        return LoSiAAdamW(groups, lr=rate, weight_decay=decay)

    if choice.deepspeed is not None:
        from losia_dist.integrations.deepspeed import initialize as integration

        # DeepSpeed calls collectives by names that torch 2.13 renamed; it is not for the user to mend.
        warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
        if weights is not None or (choice.is_zero3 and process.world_size > 1 and packed_weights(model)):
            _partition(model, choice.deepspeed, process, weights, agreement)
        if config is not None:
            engine, *_ = integration.initialize(
                model=model,
                losia_config=config,
                config=choice.deepspeed,
                optimizer=None if "optimizer" in choice.deepspeed else make_optimizer(model),
                lr=rate,
                lr_scheduler=schedule,
                total_steps=steps,
            )
            if choice.sequence_ranks > 1:
                from losia_dist.integrations.deepspeed.ulysses import keep_records_apart

                keep_records_apart(model, options.packing)
            return DeepSpeedRun(engine, engine.losia)
        engine, *_ = integration.initialize_dense(model, choice.deepspeed, make_optimizer(model), schedule)
        return DeepSpeedRun(engine, None)
    name = "one process"
    if choice.sharding is not None:
        name = "fsdp2" if choice.sharding.ranks is None else f"hsdp:{choice.sharding.ranks}"
        model = shard(
            model,
            choice.sharding,
            process,
            precision=choice.precision,
            offload=choice.offload,
            layer_classes=choice.layer_classes,
            weights=weights,
            agreement=agreement,
        )
    else:
        model.to(process.device)
        if process.world_size > 1:
            name = "ddp"
            devices = [process.device.index] if process.device.type == "cuda" else None
            model = DistributedDataParallel(model, device_ids=devices, **DDP_KEEPS_BUFFERS)
    optimizer = make_optimizer(model)
    losia = LoSiA(model, optimizer, config, total_steps=steps, watch=True) if config is not None else None
    return PlainRun(
        name, model, optimizer, schedule(optimizer), losia, max_grad_norm=options.max_grad_norm, device=process.device
    )


def _partition(
    model: Any, settings: dict[str, Any], process: Process, weights: StreamedWeights | None, agreement: Agreement
) -> None:
    """ZeRO-3's partitions of a model on the meta device, each filled by the rank that keeps it; where there are no `weights`
    to read, of rank 0's values, each sent whole before it is cut."""
    from losia_dist.integrations.deepspeed.partition import partition_without_values
    from losia_dist.sharding.zero3 import own_range

    if weights is None:
        filled = give_memory(model, process.device, find_holders(model), fill=take_from_rank_0)
        held = (place.kept[place.name] for place in filled)
        partition_without_values(settings, (tensor for tensor in held if isinstance(tensor, nn.Parameter)))
        return
    # Each parameter is cut at once, so that all may have the same memory; as it is never written to, a CPU does not give it.
    lent = torch.empty(max(p.nbytes for p in model.parameters()), dtype=torch.uint8, device=process.device)
    places: list[Where] = []

    def allocate(parameter: Tensor) -> Tensor:
        return lent[: parameter.nbytes].view(parameter.dtype).view(parameter.shape)

    def made() -> Iterator[nn.Parameter]:
        for place in give_memory(model, process.device, find_holders(model), allocate=allocate):
            places.append(place)
            tensor = place.kept[place.name]
            if isinstance(tensor, nn.Parameter):  # buffers are left whole
                yield tensor

    partition_without_values(settings, made())
    agreement.attempt(None, lambda: weights.fill(places, own_range))


def _describe(
    run: Engine, config: LoSiAConfig | None, options: argparse.Namespace, process: Process, summary: dict[str, Any]
) -> None:
    """Write what the run is. Rank 0 calls it."""
    clock = run.losia.clock if run.losia is not None else None
    facts = {**summary, "groups_per_slot": clock.per_slot} if clock is not None else summary
    try:
        write_facts(
            Path(options.output_dir),
            config,
            clock.names if clock is not None else [],
            process.device,
            **facts,
            options=_comparable(options),
        )
    except OSError as error:
        raise ConfigError(f"--output_dir {options.output_dir} cannot be written: {error}.") from error


def _comparable(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name != "local_rank" and not callable(value)}
