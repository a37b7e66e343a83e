"""Data for causal-LM fine-tuning: from a file or a hub name to batches with loss on the answers.

    records = load_records("train.jsonl")
    train, validation = train_validation_split(records, 0.05, seed=0)
    dataset = build_dataset(train, tokenizer, max_length=1024, context_length=model.config.max_position_embeddings)
    loader = make_loader(dataset, tokenizer, micro_batch=4, seed=0, rank=rank, world_size=world_size)
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for batch in loader: ...

With `build_dataset(..., packing=True)` the model has to take part: `flatten = prepare_for_packing(model)`, then
`make_loader(..., flatten=flatten)`.
"""

from losia_dist.data.build import build_dataset
from losia_dist.data.dataset import Report, TokenizedDataset
from losia_dist.data.loader import count_targets, make_evaluation_loader, make_loader
from losia_dist.data.packing import PackedDataset, prepare_for_packing
from losia_dist.data.records import Records, load_records, train_validation_split
from losia_dist.data.sources import places_of
from losia_dist.data.template import template_reads_date, training_template

__all__ = [
    "PackedDataset",
    "Records",
    "Report",
    "TokenizedDataset",
    "build_dataset",
    "count_targets",
    "load_records",
    "make_evaluation_loader",
    "make_loader",
    "places_of",
    "prepare_for_packing",
    "template_reads_date",
    "train_validation_split",
    "training_template",
]
