"""DeepSpeed's configuration, key by key on two ranks: the run is the dense reference's, or the key is refused by its name."""

import pytest

from losia_dist import LoSiAConfig, initialize
from losia_dist.errors import ConfigError
from tests.support.compare import assert_same_run
from tests.support.deepspeed_keys import REFUSED, SAME, Key
from tests.support.models import tiny_llama
from tests.support.training import Run, reference, train, variant

# Half of the steps are clipped at this norm: gradients that are scaled wrongly, which Adam alone hardly sees, show.
CLIPPING = 0.6
PLAIN = Run(steps=8, accumulation=2, config={"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 2})


def run_with(key: Key, dtype: str = "fp32") -> Run:
    clipping = key.settings.get("gradient_clipping", CLIPPING)
    return variant(PLAIN, deepspeed=key.settings, max_grad_norm=clipping, dtype=dtype)


def marked(keys):
    return [pytest.param(key, id=key.label, marks=() if key.sampled else pytest.mark.slow) for key in keys]


@pytest.fixture(scope="module")
def expected():
    kept = {}

    def of(run: Run):
        if run.max_grad_norm not in kept:
            kept[run.max_grad_norm] = reference(variant(run, deepspeed={}))
        return kept[run.max_grad_norm]

    return of


@pytest.mark.parametrize("key", marked(key for key in SAME if not key.bf16))
def test_a_key_changes_nothing(ranks, expected, key):
    run = run_with(key)
    for result in ranks(2, train, key.engine, run):
        assert_same_run(result, expected(run))


@pytest.fixture(scope="module")
def without(ranks):
    kept = {}

    def of(key: Key):
        if key.engine not in kept:
            plain = Key("gradient_clipping", CLIPPING, key.engine, bf16="bits")
            kept[key.engine] = ranks(2, train, key.engine, run_with(plain, "bf16"))[0]
        return kept[key.engine]

    return of


@pytest.mark.parametrize("key", marked(key for key in SAME if key.bf16))
def test_a_key_changes_nothing_in_bf16(ranks, without, key):
    for result in ranks(2, train, key.engine, run_with(key, "bf16")):
        if key.bf16 == "bits":
            assert_same_run(result, without(key), tolerance=0.0)
        else:
            worst = max(abs(a - b) / b for a, b in zip(result["losses"], without(key)["losses"], strict=True))
            assert worst < 1e-3


@pytest.mark.parametrize("key", [pytest.param(key, id=key.label) for key in REFUSED if not key.by_deepspeed])
def test_a_key_is_refused_by_its_name_before_any_rank_is_spoken_to(key):
    stage = {"zero_optimization": {"stage": int(key.engine[4]), **key.settings.get("zero_optimization", {})}}
    settings = {"train_micro_batch_size_per_gpu": 1, **key.settings, **stage}
    with pytest.raises(ConfigError, match=f'"{key.name}"'):
        initialize(model=tiny_llama(num_hidden_layers=1), losia_config=LoSiAConfig(rank_factor=0.25), config=settings)


@pytest.mark.parametrize("key", marked(key for key in REFUSED if key.by_deepspeed))
def test_a_key_that_deepspeed_refuses_is_this_packages_error(ranks, key):
    words = {"leaf_module.classes": "leaf module", "optimizer.type": key.value}
    for kind, message in ranks.errors(2, train, key.engine, run_with(key)):
        assert kind == "UnsupportedError"
        assert next((word for end, word in words.items() if key.name.endswith(end)), key.name.rsplit(".", 1)[-1]) in message
