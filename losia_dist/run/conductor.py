"""`LoSiA`, the conductor: after every optimizer step it moves the slot clock, and at a slot's end the subnets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.config.removed import refuse_removed_variables, removed_variables
from losia_dist.config.selection import Located
from losia_dist.errors import ConfigError
from losia_dist.localization.accumulator import ImportanceAccumulator
from losia_dist.localization.backward import Batch
from losia_dist.localization.collectives import RowCollectives
from losia_dist.localization.modes import Localization
from losia_dist.localization.moves import Reason, SubnetMove, describe_moves
from losia_dist.localization.schedule import layers_per_slot, resolve_layers_per_slot
from losia_dist.localization.search import Choice
from losia_dist.localization.slots import SlotClock, SlotGroup
from losia_dist.optim.rewarming import Rewarming
from losia_dist.ranks.agreement import Agreement, own_group
from losia_dist.ranks.watch.liveness import join_watch
from losia_dist.ranks.watch.liveness import settings as liveness_settings
from losia_dist.run.checks import (
    check_choices,
    check_relocalized,
    check_same_subnets,
    refuse_unlocated,
    refuse_unusable,
    subnet_prints,
)
from losia_dist.run.expert_load import ExpertLoad
from losia_dist.run.finite import FiniteCheck
from losia_dist.run.first_steps import FirstSteps
from losia_dist.run.first_subnets import check_batches, find_outliers, locate_all
from losia_dist.run.masters import FirstMove, check_masters
from losia_dist.run.new_subnets import choose_group
from losia_dist.run.parts import RunParts, localization_of
from losia_dist.run.placement import Placement
from losia_dist.run.sequence_checks import SequenceChecks, refuse_layers
from losia_dist.run.when_made import WHEN_MADE
from losia_dist.sharding.clearing import check_clearing
from losia_dist.sharding.resolve import check_asked_sharding, resolve_parameters, resolve_state
from losia_dist.sharding.sequence_parallel import SequenceRanks
from losia_dist.subnet.convert import find_sites, group_names
from losia_dist.subnet.copied import copies_changed
from losia_dist.subnet.groups import ROUTERS
from losia_dist.subnet.input_readers import InputReaders
from losia_dist.subnet.intact import check_intact
from losia_dist.subnet.operator import make_findable
from losia_dist.subnet.shared_inputs import SharedInputs
from losia_dist.subnet.site import Site


class LoSiA:
    """Drives localization for a converted model and its optimizer, whatever engine holds them.

    Made on every rank, after the engine has wrapped the model (DDP, DeepSpeed) and before the first step. In a plain loop
    call `step()` after `optimizer.step()`; engines that `losia_dist.initialize` returns do it themselves.

    Args:
        model: a model that `get_losia_model` converted, wrapped or not.
        optimizer: built from `losia_parameter_groups(model, ...)`; a DeepSpeed wrapper is fine.
        config: the configuration the model was converted with.
        process_group: ranks that see different data; None: all ranks, if torch.distributed is initialized.
        total_steps: optimizer steps of the whole run, which layers_per_slot="auto" is chosen for.
        watch: whether ranks watch each other, so that one that is lost ends the others with its name (`liveness`): a thread, a
            port on the first rank, and `sys.excepthook`. The script, the Trainer and `initialize` turn it on.

    Raises:
        ConfigError: the model has no subnets, or lost some since it was converted; the optimizer does not hold them by decoder
            layer; ranks differ.
        UnsupportedError: an engine or a dtype that the support matrix refuses.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        config: LoSiAConfig,
        *,
        process_group: dist.ProcessGroup | None = None,
        total_steps: int | None = None,
        watch: bool = False,
    ) -> None:
        self.model, self.config = model, config
        self.sites = find_sites(model)
        if not self.sites:
            raise ConfigError("the model has no subnets: call get_losia_model(model, config) before LoSiA(...).")
        refuse_unusable(self.sites, config, process_group)
        group = own_group(process_group)
        agreement = Agreement(group, is_own=True)
        agreement.same("the LoSiA configuration", {**config.to_dict(), "total_steps": total_steps, "watch": watch})
        self.collectives = RowCollectives(group)
        # Those that compute each sequence together, under DeepSpeed's Ulysses; from here on their gradients are averaged.
        self.sequence = SequenceRanks.of(model, optimizer, agreement)
        refuse_layers(self.sites, config, self.sequence)
        groups, data_ranks = len(group_names(self.sites)), self.collectives.world_size // self.sequence.size
        self.config = config = resolve_layers_per_slot(config, total_steps, groups, data_ranks)
        agreement.same("the model", {site.name: list(site.subnet.shape) for site in self.sites})
        agreement.same("the environment", {**liveness_settings(), **removed_variables()})
        refuse_removed_variables()
        self._watch = join_watch(group) if watch else None
        # Before the engine's own hook, which may wait for other ranks already.
        if self._watch is not None:
            self._watch_hook = model.register_forward_pre_hook(self._watch.forward_started, prepend=True)
        self.parameters = resolve_parameters(model)
        check_intact(model, self.sites, self.parameters, trains=True)
        check_asked_sharding(model, self.collectives.world_size)
        self.state = resolve_state(model, optimizer)
        sharing = RowCollectives(self.sequence.group)
        self.parts = RunParts(self.sites, self.parameters, self.state, self.collectives, sharing)
        self.placement = Placement(self.parts)
        self.expert_load = ExpertLoad(self.parts)  # how evenly tokens fall on experts, for logs
        resident = self.parameters.weight_is_resident
        check_clearing(self.state, self.sites, config, is_cut=self.state.one_scalar_per_group or not resident)
        getattr(self.state.optimizer, "create_state", lambda: None)()
        for site in self.sites:
            site.copied = None  # a copy of another model that is driven by itself from here on
            site.weight_is_resident = resident
        make_findable(self.sites)
        self.localization: Localization = localization_of(self.parts, config, agreement)
        per_slot = self.localization.groups_per_slot(layers_per_slot(config))
        self.clock = SlotClock.of(config, group_names(self.sites), per_slot)
        self.rewarming = Rewarming(self.state.optimizer, self._lr_scale)
        self.rewarming.allow = self._check_located
        self._finite = FiniteCheck(self.state.optimizer, self.collectives, self.sites[0].row_index.device)
        self.located = not config.needs_calibration  # subnets stand where the configuration wants the first ones
        self.outliers: dict[str, list[int]] = {}  # layer -> input neurons that outlier_limit leaves out
        self.placement.cut_awaited(config, agreement)
        check_same_subnets(self.parts)
        check_masters(self.parts)
        self._first_move = FirstMove(self.parts)
        self._first_steps = FirstSteps(self.parts, self.sequence)
        self._shared = SequenceChecks(self.parts, self.sequence.engine) if self.sequence.size > 1 else None
        self._shared_inputs = SharedInputs(self.sites, config.share_columns)
        self._readers = InputReaders(self.sites, config.located is not None and config.share_columns, self.collectives.largest)
        self._accumulators: dict[Site, ImportanceAccumulator] = {}
        # Called, on all ranks, for a group that is about to be re-localized.
        self.on_relocalize: list[Callable[[SlotGroup], None]] = []
        # Called, on all ranks, for every layer whose subnet is about to move, with the values [r, c] it leaves in the weight.
        self.on_retire: list[Callable[[Site, Tensor], None]] = []
        # Called, on all ranks, for every layer that got another subnet, once the whole group has.
        self.on_move: list[Callable[[SubnetMove], None]] = []
        # Further objects (state_dict, load_state_dict; plain values) that checkpoints carry: an engine's own counters.
        self.carried: dict[str, Any] = {}
        self._open_slot()
        for prepare in WHEN_MADE:
            prepare()

    layers = property(lambda self: self.sites, doc="`sites`, by the older name.")

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return self.clock.step

    @property
    def accumulators(self) -> dict[Site, ImportanceAccumulator]:
        """What collects importance on this rank in this slot; between steps it may be read and filled."""
        return self._accumulators

    @property
    def in_mid_step(self) -> bool:
        """Whether micro-batches of an optimizer step were run that `step()` has not seen the end of, on this rank."""
        return self.rewarming.stepped or any(site.in_mid_step for site in self.sites)

    @property
    def localizing(self) -> list[str]:
        """Names of the groups that get new subnets at the end of the slot in progress, and collect importance until then."""
        return self.clock.localizing

    def learning_rates(self) -> dict[str, float]:
        """Learning rate that each group was really stepped with last, rewarming included."""
        return {name: self.rewarming.applied.get(name, 0.0) for name in self.clock.names}

    def step(self) -> bool:
        """Call on every rank after each `optimizer.step()`. Does nothing if the optimizer has not stepped since.

        Returns:
            whether subnets were re-localized.

        Raises:
            EngagementError: after the first step, if a subnet does not train.
            UnsupportedError: something was averaged into a deep copy of the model (`subnet.copied`), on any rank.
            DivergenceError: the step's gradients were not finite (on a GPU said one step later, or before anything is saved);
                after the first steps, if nothing reduces the ranks' gradients; at a slot's end, if ranks disagree or importance
                is not finite. Same on every rank.
        """
        if not self.rewarming.stepped:
            return False  # an accumulation step under a wrapper that holds the optimizer back
        self.rewarming.stepped = False
        self._note_changes()
        self.parameters.reshard()
        self._finite.end_step(self.steps + 1, copies_changed(self.sites, thoroughly=self.clock.in_last_step))
        self._first_steps.verify(self.rewarming.applied)
        self._first_move.verify()
        for accumulator in self._accumulators.values():
            accumulator.end_step()
        relocalized = self.clock.localizing if self.clock.in_last_step else []
        if relocalized:
            self.check_latest_step()
        moved: list[tuple[list[Site], list[Choice]]] = []
        for place, name in enumerate(relocalized):
            sites = [site for site in self.sites if site.group_name == name]
            moved.append((sites, self._relocalize(SlotGroup(name, place), sites)))
        self.clock.advance(relocalized)
        if relocalized or self.clock.importance_steps is not None:
            (self._open_slot if relocalized else self._set_sinks)()
        for sites, choices in moved:
            self._tell("relocalized", sites, choices)
        if self._watch is not None:
            self._watch.step_done()
        return bool(relocalized)

    def locate(self, batches: Sequence[Batch], compute_loss: Callable[[nn.Module, Batch], Tensor] | None = None) -> int:
        """Give every layer the subnet that importance in these batches asks for; before the first step, on every rank.

        With `Drawn` and an outlier_limit: a subnet drawn without the input neurons that stand out in these batches,
        as all later ones will be. One forward pass; n numbers a layer are kept and communicated (`localization.inputs`).

        The score is the mean of I over the micro-batches of all ranks. No optimizer step is made, no parameter changes, no
        gradient is communicated, and m + n numbers a layer are kept (`losia_dist.localization.calibration`). It takes
        one forward and backward of the batches, with the weights' gradients, for each query of the search: two, or one where
        all rows or all columns are kept; with `share_columns` a forward pass of one of them before. It waits for the device.

        Args:
            batches: this rank's micro-batches, keyword arguments of the model on its device (input_ids int64 [B, L], ...);
                equally many on every rank.
            compute_loss: (model, batch) -> mean loss [], with training's arguments (use_cache=False): ZeRO-3 wants one order
                of layers. None: `model(**batch).loss`. The model is unwrapped from DDP.

        Returns:
            passes over the batches.

        Raises:
            ConfigError: `Drawn` without outlier_limit, no batch, unequal counts, training has begun, a layer that no gradient
                (or forward) reaches, or an outlier_limit that leaves too few neurons. Same on every rank.
            DivergenceError: importance, or the inputs, are not finite.
        """
        located, limit = self.config.located, self.config.outlier_limit
        if located is None and limit is None:
            raise ConfigError("Drawn() draws subnets and locates none: leave losia.locate(...) out, or set its outlier_limit.")
        check_batches(batches, self.parts, self.steps, self.in_mid_step)
        if limit is None:
            importance = (located or Located()).importance
            choices, passes = locate_all(self.model, self.parts, importance, self._readers, batches, compute_loss)
        else:
            self.outliers = find_outliers(self.model, self.parts, limit, batches, compute_loss)
            everyone, passes = SlotGroup("", 0), 1  # all groups, at once
            wanted = [self.placement.wanted(site, 0, self.outliers) for site in self.sites]
            choices = self.localization.choose(everyone, [None] * len(wanted), wanted)
        check_choices(choices, self.sites, self.collectives)
        with torch.no_grad():
            for site, choice in zip(self.sites, choices, strict=True):
                self.placement.cut(site, choice.rows, choice.columns)
        self._note_changes()
        check_same_subnets(self.parts)
        self._first_steps = self._first_steps.anew()
        self._open_slot()
        self.located = True
        self._tell("located", self.sites, choices)
        return passes

    def discard_step(self) -> None:
        """Forget the gradients of a step that the engine skipped; slot and weights stay where they are."""
        self._first_steps.forget()
        for site in self.sites:
            site.in_mid_step = False
        for accumulator in self._accumulators.values():
            accumulator.discard_step()

    def progress(self) -> dict[str, Any]:
        """Where the run stands, in plain values and the same on every rank: for a checkpoint, between steps."""
        return {
            "clock": self.clock.state(),
            "applied": [[name, rate] for name, rate in self.rewarming.applied.items()],
            "engaged": self._first_steps.engaged,
            "located": self.located,
            "outliers": self.outliers,
        }

    def restore_progress(self, progress: dict[str, Any]) -> None:
        """Go on from what `progress` gave, after subnets and optimizer state were put back. Called by all ranks.

        The importance of the slot in progress starts empty: fill `accumulators` afterwards.
        """
        self._note_changes()
        self.clock.restore(progress["clock"])
        self.rewarming.restore(dict(progress["applied"]))
        self._finite.forget()
        self.located, self.outliers = progress["located"], dict(progress.get("outliers", {}))
        self._first_move = FirstMove(self.parts)
        self._first_steps = self._first_steps.anew(engaged=progress["engaged"])
        check_same_subnets(self.parts)
        self._open_slot()

    def check_latest_step(self) -> None:
        """Refuse to save what a step by infinite gradients, or NaN, has left; called by all ranks. Waits for the device.

        Raises:
            DivergenceError: the latest step was one, or one before it that was seen. Same on every rank.
        """
        if self.rewarming.stepped:  # `step` has not been called since
            self._finite.end_step(self.steps + 1)
        self._finite.read_latest()

    def consolidate(self) -> None:
        """Make every shard of every weight hold its subnet's present values. Called by all ranks, before saving.

        Raises:
            ConfigError: layers of the model were replaced since `LoSiA(...)` was made.
            DivergenceError: as `check_latest_step`.
        """
        self.check_latest_step()
        self.parameters.reshard()
        check_intact(self.model, self.sites, self.parameters, trains=False)
        self.placement.write_all_back()

    def detach(self) -> None:
        """Take the conductor off the model and the optimizer; the subnets' values stay where they are.

        This rank then counts as having left the training: another that goes on to a later step is ended with that message.
        """
        for part in (self.rewarming, self._finite, self._first_steps, self._shared, self._shared_inputs, self._readers):
            if part is not None:
                part.remove()
        if self._watch is not None:
            self._watch_hook.remove()
            self._watch.release()
            self._watch = None
        for site in self.sites:
            site.gradient_sink = None
        self._accumulators = {}

    def _lr_scale(self, group: str | None) -> float:
        """Factor on the scheduled learning rate of a group in the step in progress; None: what trains in full."""
        if group in (None, ROUTERS):
            return self.config.full_lr_scale if group is None else self.config.router_lr_scale or 0.0
        return self.clock.scale(group)

    def _note_changes(self) -> None:
        self._shared_inputs.forget()
        self._readers.forget()
        for site in self.sites:
            site.note_change()

    def _open_slot(self) -> None:
        """Let the groups of the slot in progress accumulate, and no other."""
        groups = {name: SlotGroup(name, place) for place, name in enumerate(self.clock.localizing)}
        self._accumulators = {}
        for site in self.sites:
            site.gradient_sink = None
            group = groups.get(site.group_name)
            accumulator = None if group is None else self.localization.accumulator(group, site)
            if accumulator is not None:
                self._accumulators[site] = accumulator
        self._set_sinks()
        self._shared_inputs.settle()

    def _set_sinks(self) -> None:
        """Let backward of the step in progress hand full gradients over, or not."""
        for site, accumulator in self._accumulators.items():
            site.gradient_sink = accumulator if self.clock.takes_importance else None

    @torch.no_grad()
    def _relocalize(self, group: SlotGroup, sites: list[Site]) -> list[Choice]:
        """Give the layers of one group new subnets; the old subnets' values stay in the weights."""
        for about_to_move in self.on_relocalize:
            about_to_move(group)
        wanted = {site: self.placement.wanted(site, self.steps + 1, self.outliers) for site in sites}
        choices = choose_group(self.localization, group, wanted, self._accumulators, self._readers.families(sites))
        check_choices(choices, sites, self.collectives)
        self._first_move.before(sites)
        prints: list[Tensor] = []
        for site, choice in zip(sites, choices, strict=True):
            left = self.placement.write_back(site)
            for listener in self.on_retire:
                listener(site, left)
            prints.append(subnet_prints(site, left, self.placement.cut(site, choice.rows, choice.columns)))
        check_relocalized(sites, torch.stack(prints), self.collectives)
        self.state.clear(sites[0].group_name, self.config.reset_bias_correction)
        self._first_steps.moved(sites)
        self._first_move.after(sites)
        return choices

    def _tell(self, reason: Reason, sites: list[Site], choices: list[Choice]) -> None:
        """Let listeners know of new subnets. Waits for the device, where there is anybody to tell."""
        for move in describe_moves(self.steps, reason, sites, choices) if self.on_move else ():
            for listener in self.on_move:
                listener(move)

    def _check_located(self) -> None:  # an optimizer step is about to be made
        if not self.located:
            refuse_unlocated(self.config)
