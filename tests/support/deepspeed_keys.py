"""Every key of DeepSpeed's configuration that touches masters, partitions, precision, communication, offload or stepping, tried
on two ranks. Tests run every line; docs/support-matrix.md shows the table that this file renders
(`python -m tests.support.deepspeed_keys`)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

ZERO = "zero_optimization."
OPTIMIZER, PARAM = f"{ZERO}offload_optimizer", f"{ZERO}offload_param"
TITLES = {
    "zero0": "stage 0",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "zero2-offload": "ZeRO-2 offloaded",
    "zero3-offload": "ZeRO-3 offloaded",
}


@dataclass(frozen=True)
class Key:
    """One setting on one engine of tests.support.training.

    along: what it needs beside it. bf16: compared in bf16 with the run without it ("bits": equal to the last bit, "rounding":
    to 1e-3), not in fp32 with the dense reference. refused: the reason, for the table; the error must name the key.
    by_deepspeed: refused once the engine is made, which needs ranks. sampled: `make test` runs it.
    """

    name: str
    value: Any
    engine: str = "zero2"
    along: dict[str, Any] = field(default_factory=dict, hash=False)
    bf16: str = ""
    refused: str = ""
    by_deepspeed: bool = False
    sampled: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """The part of a DeepSpeed configuration."""
        whole: dict[str, Any] = {"bf16": {"enabled": True}} if self.bf16 else {}
        for path, value in {**self.along, self.name: self.value}.items():
            *sections, last = path.split(".")
            place = whole
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = value
        return whole

    @property
    def label(self) -> str:
        return f"{self.name}={json.dumps(self.value)}-{self.engine}{'-bf16' if self.bf16 else ''}"

    @property
    def result(self) -> str:
        if self.refused:
            return f"refused: {self.refused}"
        return {"": "same", "bits": "same, to the last bit (bf16)", "rounding": "same up to rounding (bf16)"}[self.bf16]


def _on(engines: str, name: str, value: Any, along: dict[str, Any] | None = None, sampled: str = "", **more: Any) -> list[Key]:
    """The same setting on several engines; `sampled` names the one of `make test`."""
    return [Key(name, value, engine, along or {}, sampled=engine == sampled, **more) for engine in engines.split()]


def _refused(name: str, value: Any, why: str, along: dict[str, Any] | None = None, **more: Any) -> list[Key]:
    return [Key(name, value, along=along or {}, refused=why, **more)]


CPU = {"device": "cpu"}
SAME = [
    *_on("zero1 zero2 zero3", f"{ZERO}contiguous_gradients", False),
    *_on("zero1 zero2 zero3", f"{ZERO}reduce_scatter", False),
    *_on("zero2 zero3", f"{ZERO}reduce_bucket_size", 500),
    *_on("zero1 zero2", f"{ZERO}use_multi_rank_bucket_allreduce", False),
    *_on("zero2", f"{ZERO}allgather_partitions", False),
    *_on("zero1 zero2", f"{ZERO}allgather_bucket_size", 100),
    *_on("zero1 zero2 zero3", f"{ZERO}overlap_comm", True),
    *_on("zero3", f"{ZERO}overlap_comm", False),
    *_on("zero1 zero2 zero2-offload", f"{ZERO}round_robin_gradients", True, sampled="zero2"),
    *_on("zero1 zero2 zero2-offload", f"{ZERO}parameter_alignment", True, sampled="zero1"),
    *_on("zero2", f"{ZERO}parameter_alignment", True, {f"{ZERO}round_robin_gradients": True}),
    *_on("zero2", f"{ZERO}compute_grad_norm", False, {"gradient_clipping": 0.0}),
    *_on("zero2", f"{ZERO}load_from_fp32_weights", False),
    *_on("zero1 zero2", f"{ZERO}elastic_checkpoint", True),
    *_on("zero2", f"{ZERO}ignore_unused_parameters", False),
    *_on("zero1 zero2 zero3", OPTIMIZER, CPU),
    *_on("zero2 zero3", f"{OPTIMIZER}.pin_memory", False, {f"{OPTIMIZER}.device": "cpu"}),
    *_on("zero3", f"{OPTIMIZER}.fast_init", True, {f"{OPTIMIZER}.device": "cpu"}),
    *_on("zero3", f"{OPTIMIZER}.pipeline_read", True, {f"{OPTIMIZER}.device": "cpu", f"{OPTIMIZER}.buffer_count": 8}),
    *_on("zero3", f"{OPTIMIZER}.pipeline_write", True, {f"{OPTIMIZER}.device": "cpu"}),
    *_on("zero3", f"{OPTIMIZER}.cpuadam_cores_perc", 0.5, {f"{OPTIMIZER}.device": "cpu"}),
    *_on("zero3", f"{PARAM}.pin_memory", False, {f"{PARAM}.device": "cpu", f"{PARAM}.buffer_count": 2}),
    *_on("zero3", f"{PARAM}.max_in_cpu", 1000, {f"{PARAM}.device": "cpu", f"{PARAM}.buffer_size": 1_000_000}),
    *_on("zero2", f"{ZERO}cpu_offload", True, {f"{ZERO}cpu_offload_use_pin_memory": True}),
    *_on("zero3", f"{ZERO}cpu_offload_param", True),
    *_on("zero3 zero3-offload", f"{ZERO}sub_group_size", 1000),
    *_on("zero3", f"{ZERO}stage3_prefetch_bucket_size", 1000),
    *_on("zero3", f"{ZERO}stage3_param_persistence_threshold", 3000),
    *_on("zero3", f"{ZERO}stage3_model_persistence_threshold", 1000, {f"{ZERO}stage3_param_persistence_threshold": 3000}),
    *_on("zero3", f"{ZERO}stage3_max_live_parameters", 1000),
    *_on("zero3", f"{ZERO}stage3_max_reuse_distance", 1000),
    *_on("zero3", f"{ZERO}stage3_gather_16bit_weights_on_model_save", True),
    *_on("zero3", f"{ZERO}stage3_use_all_reduce_for_fetch_params", True),
    *_on("zero3", f"{ZERO}stage3_allgather_sequential", True),
    *_on("zero3", f"{ZERO}leaf_module.classes", ["LlamaMLP"], sampled="zero3"),
    *_on("zero3", f"{ZERO}leaf_module.names", ["model.embed_tokens"]),
    *_on("zero3", f"{ZERO}memory_efficient_linear", False),
    *_on("zero3", f"{ZERO}pipeline_loading_checkpoint", True),
    *_on("zero3", f"{ZERO}override_module_apply", False),
    *_on("zero3", f"{ZERO}log_trace_cache_warnings", True),
    *_on("zero3", f"{ZERO}enable_sanity_checks", True),
    *_on("zero3", f"{ZERO}save_muon_momentum_buffer_in_memory", True),
    *_on("zero2 zero3", "communication_data_type", "fp32"),
    *_on("zero2", "communication_data_type", "bf16", bf16="bits"),
    *_on("zero2 zero3", "communication_data_type", "fp32", bf16="rounding"),
    *_on("zero2", "seq_parallel_communication_data_type", "fp32"),
    *_on("zero0 zero1", "prescale_gradients", True),
    *_on("zero2 zero3", "prescale_gradients", True, {f"{ZERO}reduce_scatter": False}),
    *_on("zero0", "gradient_predivide_factor", 2.0, {"prescale_gradients": True}),
    *_on("zero1 zero2", "gradient_predivide_factor", 2.0, {f"{ZERO}reduce_scatter": False}),
    *_on("zero2", "gradient_allreduce_op", "mean"),
    *_on("zero0 zero2", "disable_allgather", True),
    *_on("zero2", "managed_gradient_accumulation", False, sampled="zero2"),
    *_on("zero3", "managed_gradient_accumulation", False, {f"{ZERO}overlap_comm": False}),
    *_on("zero2 zero3", "data_types.grad_accum_dtype", "fp32"),
    *_on("zero1 zero2 zero3", "data_types.grad_accum_dtype", "fp32", bf16="rounding"),
    *_on("zero2", "data_types.grad_accum_dtype", "bf16", bf16="bits"),
    *_on("zero2", "data_types.buffer_dtype", "fp32"),
    *_on("zero2", "data_types.keep_in_fp32_modules", ["norm"]),
    *_on("zero1 zero2 zero3", "bf16.check_grad_overflow", False, bf16="bits"),
    *_on("zero1", "bf16.immediate_grad_update", True, {"data_types.grad_accum_dtype": "fp32"}, bf16="rounding"),
    *_on(
        "zero2",
        "optimizer.legacy_fusion",
        True,
        {"optimizer.type": "AdamW", "optimizer.params": {"eps": 1e-6, "torch_adam": True}},
    ),
    *_on("zero2", "zero_allow_untested_optimizer", False),
    *_on("zero2-offload", "zero_force_ds_cpu_optimizer", False),
    *_on("zero2", "activation_checkpointing.partition_activations", True),
    *_on("zero2", "checkpoint.tag_validation", "Fail"),
    *_on("zero2", "comms_logger.enabled", True),
    *_on("zero2 zero3", "flops_profiler.enabled", True, {"flops_profiler.profile_step": 2}),
    *_on("zero2", "wall_clock_breakdown", True),
    *_on("zero2", "memory_breakdown", True),
    *_on("zero2", "disable_python_gc", True),
    *_on("zero2", "aio.block_size", 1_048_576),
    *_on("zero2", "compile.offload_parameters", True),
    *_on("zero2", "pipeline.stages", 2),
    *_on("zero2", "use_data_before_expert_parallelism", True),
    *_on("zero2", "tensor_parallel.autotp_size", 1),
]
MASTERS = "masters must be fp32; with LoSiAAdamW there would be two"
QUANTIZED = "subnets cannot be written into quantized weights"
OWN_CHECKPOINTS = "LoSiA writes the engine's checkpoints"
GONE = "removed from DeepSpeed 0.19"
FEWER_BITS = "gradients of an fp32 model would be rounded"
REFUSED = [
    *_refused("fp16.enabled", True, "the loss scale would enter the importance"),
    *_refused("fp16.fp16_master_weights_and_grads", True, MASTERS),
    *_refused("bf16.bf16_master_weights_and_grads", True, MASTERS),
    *_refused("bf16.bf16_optimizer_states", True, MASTERS),
    *_refused("torch_autocast.enabled", True, "another rounding than bf16's; not tested"),
    *_refused("communication_data_type", "bf16", FEWER_BITS),
    *_refused("communication_data_type", "fp16", "too small a range without a loss scale"),
    *_refused("data_types.grad_accum_dtype", "bf16", FEWER_BITS),
    *_refused("data_types.param_dtype", "bf16", "contradicts the model's precision", by_deepspeed=True),
    *_refused("gradient_allreduce_op", "sum", "importance is taken from the mean over the ranks"),
    *_refused("prescale_gradients", True, "not with reduce_scatter (stages 2 and 3)"),
    *_refused("gradient_predivide_factor", 2.0, "not with reduce_scatter (stages 1 and 2)"),
    *_refused(
        "gradient_predivide_factor",
        2.0,
        "DeepSpeed scales gradients by it in stage 3",
        {f"{ZERO}reduce_scatter": False},
        engine="zero3",
    ),
    *_refused(f"{OPTIMIZER}.device", "nvme", "not tested"),
    *_refused(f"{PARAM}.device", "nvme", "not tested", engine="zero3"),
    *_refused(f"{OPTIMIZER}.ratio", 0.5, "a second optimizer steps the rest, out of reach", engine="zero3"),
    *_refused(f"{OPTIMIZER}.super_offload", True, "it steps in processes of its own", engine="zero3"),
    *_refused(f"{ZERO}zenflow", {}, "it steps parameters one by one"),
    *_refused(f"{ZERO}legacy_stage1", True, GONE, engine="zero1"),
    *_refused(f"{ZERO}zero_hpz_partition_size", 2, "a second copy would miss re-localized subnets", engine="zero3"),
    *_refused(f"{ZERO}zero_quantized_weights", True, QUANTIZED, engine="zero3"),
    *_refused(f"{ZERO}zero_quantized_nontrainable_weights", True, QUANTIZED, engine="zero3"),
    *_refused(f"{ZERO}zero_quantized_gradients", True, "not tested", engine="zero3"),
    *_refused(
        f"{ZERO}stage3_module_granularity_threshold",
        1_000_000,
        "where it makes a leaf of a module whose positional inputs need no gradient",
        engine="zero3",
        by_deepspeed=True,
    ),
    *_refused(
        f"{ZERO}leaf_module.classes",
        ["LlamaDecoderLayer"],
        "where no positional input needs a gradient",
        engine="zero3",
        by_deepspeed=True,
    ),
    *(
        key
        for name in ("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param")
        for key in _refused(ZERO + name, 1, GONE, engine="zero3")
    ),
    *(
        key
        for name in (
            "amp",
            "compression_training",
            "curriculum_learning",
            "eigenvalue",
            "elasticity",
            "graph_harvesting",
            "nebula",
            "progressive_layer_drop",
            "quantize_training",
            "sparse_attention",
            "sparse_gradients",
        )
        for key in _refused(name, {}, GONE)
    ),
    *_refused("optimizer.type", "Muon", "it takes whole matrices, in groups of its own"),
    *_refused("optimizer.type", "Lamb", "it scales by the norm of a whole layer"),
    *_refused("optimizer.type", "OneBitAdam", "DeepSpeed 0.19 has no such optimizer", by_deepspeed=True),
    *_refused("zero_force_ds_cpu_optimizer", True, "with LoSiAAdamW", engine="zero2-offload", by_deepspeed=True),
    *_refused("tensor_parallel.autotp_size", 2, "it cuts the weights"),
    *_refused("data_parallel_size", 2, "it makes a mesh without Ulysses' groups"),
    *_refused("expert_parallel.enabled", True, "AutoEP puts modules of its own in the experts' place"),
    *_refused("hybrid_engine.enabled", True, "not tested"),
    *_refused("compile.deepcompile", True, "not tested"),
    *_refused("weight_quantization", {"quantized_initialization": {"num_bits": 8}}, QUANTIZED),
    *_refused("data_efficiency.enabled", True, "not tested"),
    *_refused("autotuning.enabled", True, "it measures and ends the process"),
    *_refused("checkpoint.load_universal", True, OWN_CHECKPOINTS),
    *_refused("checkpoint.use_node_local_storage", True, OWN_CHECKPOINTS),
    *_refused("checkpoint.parallel_write", {"pipeline_stage": True}, OWN_CHECKPOINTS),
    *_refused("checkpoint.writer", {"type": "fast"}, OWN_CHECKPOINTS),
    *_refused("datastates_ckpt", {}, OWN_CHECKPOINTS),
]


def render() -> str:
    """The table of the documentation: one row a setting and result, with the engines it was tried on."""
    rows = [["key", "value", "tried on (2 ranks)", "result"], ["---"] * 4]
    for (name, value, result), keys in groupby([*SAME, *REFUSED], lambda k: (k.name, json.dumps(k.value), k.result)):
        engines = dict.fromkeys(TITLES[key.engine] for key in keys)
        rows.append([f"`{name}`", f"`{value}`", ", ".join(engines), result])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    print(render())
