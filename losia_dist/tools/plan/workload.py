"""What is planned: a model, on a cluster, with an engine and a method. Checked here, before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.errors import ConfigError
from losia_dist.formulas import subnet_size
from losia_dist.subnet.expert_parts import parts_of
from losia_dist.tools.plan.model_shape import Layer, ModelShape, Weight

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "hsdp")
METHODS = ("losia", "full", "lora")
QUANTIZATIONS = ("nf4", "fp4", "int8", "fp8")
OFFLOADS = ("none", "optimizer", "all")
_POSSIBLE = {"ddp": ("none",), "zero1": ("none", "optimizer"), "zero2": ("none", "optimizer"), "zero3": OFFLOADS}  # of ENGINES
GB = 10**9  # as GPUs are sold, and as this package's reports count

# Peak dense bf16 TFLOP/s, and bytes per second and direction that one GPU exchanges inside its node: makers' data sheets.
GPUS = {"a100": (312e12, 300e9), "h100": (989e12, 450e9), "h200": (989e12, 450e9)}


@dataclass(frozen=True)
class Cluster:
    """nodes x gpus_per_node GPUs of `memory` bytes each.

    gpu: one of GPUS, for the rates. node_bandwidth: bytes per second and direction between nodes, for each GPU.
    compute_efficiency, link_efficiency: share of the peak rates that a run is taken to reach. reserve: bytes of each GPU that
    the driver, NCCL and fragments of the allocator are taken to use.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    memory: int = 80 * GB
    gpu: str = "h100"
    node_bandwidth: float = 50e9
    compute_efficiency: float = 0.4
    link_efficiency: float = 0.7
    reserve: int = 4 * GB

    def __post_init__(self) -> None:
        for option, value in (("--nodes", self.nodes), ("--gpus-per-node", self.gpus_per_node)):
            if value < 1:
                raise ConfigError(f"{option} {value}: at least 1 is needed.")
        if not self.memory > self.reserve >= 0:
            raise ConfigError(
                f"--gpu-memory {self.memory / GB:g} with --reserve {self.reserve / GB:g}: GB of one GPU, more than the "
                "reserve, which is at least 0."
            )
        if self.gpu not in GPUS:
            raise ConfigError(f"--gpu {self.gpu}: give one of {', '.join(GPUS)}.")
        if not 0 < self.node_bandwidth < float("inf"):
            raise ConfigError(f"--node-bandwidth {self.node_bandwidth / GB:g}: GB/s for each GPU, above 0.")
        for option, share in (("--efficiency", self.compute_efficiency), ("--link-efficiency", self.link_efficiency)):
            if not 0 < share <= 1:
                raise ConfigError(f"{option} {share:g}: a share of the peak rate in (0, 1] is needed.")

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def peak_flops(self) -> float:
        return GPUS[self.gpu][0]

    @property
    def gpu_bandwidth(self) -> float:
        return GPUS[self.gpu][1]


@dataclass(frozen=True)
class Workload:
    """One way to train one model on one cluster, in bf16.

    engine: one of ENGINES; hsdp shares one copy of the model among `shard_ranks` ranks (None: the GPUs of a node).
    offload: what is kept in host memory: "optimizer" (masters and moments; ZeRO), "all" (shards of the weights too).
    sequence, micro_batch: tokens of a row, and rows of one forward pass of one GPU. accumulation: passes per optimizer step.
    checkpointing: activations inside decoder layers are recomputed in backward. config: LoSiA's settings.
    lora_rank: of LoRA on all linear layers. quantization: of frozen linear layers' weights, one of QUANTIZATIONS; None: bf16.
    sequence_ranks: GPUs that compute each sequence together (DeepSpeed's Ulysses).
    activation_offload: what recomputation begins from is kept in host memory. chunked_loss: logits of some tokens at a time.
    """

    shape: ModelShape
    cluster: Cluster
    engine: str = "fsdp2"
    method: str = "losia"
    sequence: int = 2048
    micro_batch: int = 1
    accumulation: int = 1
    checkpointing: bool = True
    offload: str = "none"
    shard_ranks: int | None = None
    config: LoSiAConfig = field(default_factory=LoSiAConfig)
    lora_rank: int = 64
    quantization: str | None = None
    sequence_ranks: int = 1
    activation_offload: bool = False
    chunked_loss: bool = False

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--engine", self.engine, ENGINES),
            ("--method", self.method, METHODS),
            ("--offload", self.offload, OFFLOADS),
        ):
            if value not in known:
                raise ConfigError(f"{option} {value}: give one of {', '.join(known)}.")
        for option, count in (
            ("--micro-batch", self.micro_batch),
            ("--gradient-accumulation", self.accumulation),
            ("--lora-rank", self.lora_rank),
        ):
            if count < 1:
                raise ConfigError(f"{option} {count}: at least 1 is needed.")
        if not 1 < self.sequence <= self.shape.context:
            raise ConfigError(
                f"--sequence-length {self.sequence}: {self.shape.name} was made for 2 to {self.shape.context} tokens."
            )
        self._check_engine()
        self._check_quantization()
        self._check_sequences()
        if self.method == "losia":
            self._check_losia()
        if self.method == "lora" and self.lora_rank > self.shape.narrowest:
            raise ConfigError(
                f"--lora-rank {self.lora_rank}: at most {self.shape.narrowest}, the smallest side of a linear layer of "
                f"{self.shape.name}."
            )

    def _check_engine(self) -> None:
        gpus = self.cluster.gpus
        if self.engine != "ddp" and gpus < 2:
            raise ConfigError(f"--engine {self.engine} needs at least 2 GPUs, and the cluster has {gpus}; use ddp.")
        if self.shard_ranks is not None and self.engine != "hsdp":
            raise ConfigError(f"--shard-ranks {self.shard_ranks} belongs to --engine hsdp; {self.engine} does not take it.")
        if self.engine == "hsdp" and not (1 < self.shards < gpus and gpus % self.shards == 0):
            raise ConfigError(
                f"--engine hsdp with {self.shards} ranks sharing one copy of the model on {gpus} GPUs: --shard-ranks must be "
                "at least 2, less than the number of GPUs, and divide it. With one copy over all GPUs, use fsdp2."
            )
        possible = _POSSIBLE.get(self.engine, ("none", "all"))
        if self.offload not in possible:
            raise ConfigError(f"--offload {self.offload} with --engine {self.engine}: possible are {', '.join(possible)}.")

    def _check_quantization(self) -> None:
        if self.quantization is None:
            return
        if self.quantization not in QUANTIZATIONS:
            raise ConfigError(f"--quantization {self.quantization}: give one of {', '.join(QUANTIZATIONS)}.")
        if self.method == "full":
            raise ConfigError(f"--quantization {self.quantization} with --method full: codes cannot train in full.")
        if self.shape.has_experts and self.quantization == "int8":
            raise ConfigError(
                f"--quantization int8: {self.shape.name} has experts in fused weights, which bitsandbytes does not quantize in "
                "8 bits: use nf4, fp4 or fp8."
            )
        if self.offload == "all":
            raise ConfigError(f"--quantization {self.quantization} with --offload all was not tried: use none or optimizer.")

    def _check_sequences(self) -> None:
        ranks, shape = self.sequence_ranks, self.shape
        if self.activation_offload and not self.checkpointing:
            raise ConfigError("--activation-offload keeps what recomputation begins from: it needs --checkpointing on.")
        if ranks == 1:
            return
        if not self.engine.startswith("zero"):
            raise ConfigError(f"--sequence-parallel {ranks} is DeepSpeed's: give --engine zero1, zero2 or zero3.")
        if ranks < 1 or self.cluster.gpus % ranks or shape.heads % ranks or (shape.kv_heads % ranks and ranks % shape.kv_heads):
            raise ConfigError(
                f"--sequence-parallel {ranks}: {shape.name} has {shape.heads} heads of queries and {shape.kv_heads} of keys, "
                f"and the cluster {self.cluster.gpus} GPUs: give a number that divides all three, or that the keys' divides."
            )
        if self.sequence % ranks:
            raise ConfigError(f"--sequence-length {self.sequence} is not divided by --sequence-parallel {ranks}.")

    def _check_losia(self) -> None:
        config = self.config
        if config.target_modules != "all-linear" or config.modules_to_save or config.train_norms or config.train_embeddings:
            raise ConfigError(
                "a plan covers target_modules='all-linear' (and output_rank_factor) with nothing trained in full; take "
                "target_modules, modules_to_save, train_norms and train_embeddings out of the configuration to plan it."
            )
        if config.rank_pattern:
            raise ConfigError(
                "a plan takes one rank factor for all layers: take rank_pattern out of the configuration, and set "
                "rank_factor to the largest in it."
            )
        if config.retired is not None and self.quantization is None:
            raise ConfigError(f"retired: {config.retired} is of a quantized base: give --quantization, or leave it out.")
        if config.layers_per_slot == "auto":
            raise ConfigError(
                "layers_per_slot='auto' follows from the length of the run: give --steps, or a number (--layers-per-slot)."
            )
        for m, n, *_, name in self.shape.fullest.weights:
            if not all(self.subnet(m, n)):
                raise ConfigError(
                    f"--rank-factor {config.rank_factor} leaves {name} ({m} x {n}) of {self.shape.name} no row or column: at "
                    f"least 1/{min(m, n)} is needed."
                )

    def subnet(self, m: int, n: int) -> tuple[int, int]:
        """Rows and columns of the subnet of an m x n matrix."""
        return subnet_size(m, self.config.row_factor), subnet_size(n, self.config.column_factor)

    @property
    def shards(self) -> int:
        """Ranks that share one copy of whatever the engine shards."""
        if self.engine == "ddp":
            return 1
        if self.engine == "hsdp":
            return self.shard_ranks or self.cluster.gpus_per_node
        return self.cluster.gpus

    @property
    def shards_weights(self) -> bool:
        return self.engine in ("zero3", "fsdp2", "hsdp")

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass of one GPU."""
        return self.micro_batch * self.sequence // self.sequence_ranks

    @property
    def data_ranks(self) -> int:
        """Batches that are computed at a time."""
        return self.cluster.gpus // self.sequence_ranks

    @property
    def localizing_groups(self) -> int:
        """Groups whose importance one rank works at in a slot (the output layer takes its turn like a layer)."""
        collects = self.method == "losia" and self.config.located is not None
        return min(self.layers_per_slot, self.groups) if collects else 0

    @property
    def importance_share(self) -> float:
        """Share of the steps in which the layers that localize form full gradients (`Located.importance_steps`)."""
        located = self.config.located
        steps = None if located is None else located.importance_steps
        return 1.0 if steps is None else steps / self.config.period

    @cached_property
    def localizing(self) -> list[list[Weight]]:
        """The weights of which a slot forms full gradients: a list for each decoder layer in which a group localizes.

        The model's last groups, whose backward comes first, are taken: the fullest slot there is. Their last layer stands
        first; weights of a layer stand in the model's order.
        """
        left, found = self.localizing_groups, []
        for count, layer in reversed(self.shape.kinds):
            groups = self.groups_of(layer)
            for _ in range(count):
                if left > 0:
                    found.append([weight for group in groups[-left:] for weight in group])
                    left -= len(groups)
        return found

    def groups_of(self, layer: Layer) -> list[list[Weight]]:
        """Weights of each group of a decoder layer, in their order. Parts of its experts come last."""
        parts = self.parts_of(layer)
        if len(parts) < 2:
            return [list(layer.weights)]
        alone = [weight for weight in layer.weights if weight.experts == 1]
        experts = [weight for weight in layer.weights if weight.experts > 1]
        return [alone] + [[w._replace(experts=part, taken=w.taken * part / w.experts) for w in experts] for part in parts]

    def parts_of(self, layer: Layer) -> list[int]:
        """How many experts of a decoder layer localize together, part by part; of a layer without experts none."""
        experts = [weight for weight in layer.weights if weight.experts > 1]
        asked = None if self.config.located is None else self.config.experts_per_slot
        count = max((weight.experts for weight in experts), default=0)
        return [b - a for a, b in parts_of(count, sum(w.m * w.n for w in experts), asked)] if experts else []

    @property
    def layers_per_slot(self) -> int:
        """Groups that localize in a slot; "auto" was refused."""
        assert isinstance(self.config.layers_per_slot, int)
        return self.config.layers_per_slot

    @property
    def groups(self) -> int:
        """L: groups that localize in turn."""
        layers = sum(count * len(self.groups_of(layer)) for count, layer in self.shape.kinds)
        return layers + (self.config.output_rank_factor is not None)
