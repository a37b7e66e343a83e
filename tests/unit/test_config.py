"""What a user can set, and what each wrong value is answered with."""

import json
import warnings

import pytest

from losia_dist import Drawn, Located, LoSiAConfig
from losia_dist.errors import ConfigError


@pytest.mark.parametrize("factor", [0, -0.1, 1.5, "half", True, float("nan"), (0.5, 0), (0.1, 0.1, 0.1)])
def test_a_rank_factor_outside_0_to_1_is_refused_with_the_value_and_the_rule(factor):
    with pytest.raises(ConfigError, match="rank_factor") as caught:
        LoSiAConfig(rank_factor=factor)
    assert "(0, 1]" in str(caught.value) or "pair" in str(caught.value)


@pytest.mark.parametrize(
    "field, value",
    [
        ("period", 0),
        ("period", 2.5),
        ("layers_per_slot", 0),
        ("layers_per_slot", "all"),
        ("cycles", 0),
        ("rank_pattern", {}),
        ("rewarm_steps", -1),
        ("output_rank_factor", 0),
        ("output_rank_factor", 2),
        ("selection", "exhaustive"),
        ("selection", {"located": {}, "drawn": {}}),
        ("selection", {"chosen": {}}),
        ("target_modules", []),
        ("target_modules", ""),
        ("modules_to_save", "norm"),
        ("seed", -1),
        ("train_norms", "yes"),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(field, value):
    with pytest.raises(ConfigError) as caught:
        LoSiAConfig(**{field: value})
    assert field in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    "kind, field, value",
    [
        (Located, "calibration_batches", 0),
        (Located, "importance", "magnitude"),
        (Located, "betas", (0.85, 1.0)),
        (Located, "betas", 0.85),
        (Located, "betas", (0.0, 0.85)),
        (Located, "start", "located"),
        (Located, "reduction", "layerwise"),
        (Drawn, "calibration_batches", 0),
        (Drawn, "outlier_limit", 1),
    ],
)
def test_a_value_of_a_selection_that_cannot_work_is_refused_by_name(kind, field, value):
    for make in (lambda: kind(**{field: value}), lambda: LoSiAConfig(selection={kind.__name__.lower(): {field: value}})):
        with pytest.raises(ConfigError) as caught:
            make()
        assert f"{field}={value!r}" in str(caught.value)


def test_a_selection_has_short_forms_and_nests_in_files(tmp_path):
    assert LoSiAConfig().selection == LoSiAConfig(selection="greedy").selection == Located()
    assert LoSiAConfig(selection="random").selection == Drawn()
    file = tmp_path / "losia.yaml"
    for text, selection in {
        "selection: random": Drawn(),
        "selection: {drawn: }": Drawn(),
        "selection:\n  located: {start: importance, betas: [0.8, 0.9]}": Located(start="importance", betas=(0.8, 0.9)),
    }.items():
        file.write_text(text)
        config = LoSiAConfig.from_file(file)
        assert config.selection == selection
        config.save_pretrained(tmp_path)
        assert LoSiAConfig.from_pretrained(tmp_path) == config
    file.write_text("selection: {located: {start_: importance}}")
    with pytest.raises(ConfigError, match="selection: located: unknown option 'start_'. Did you mean start"):
        LoSiAConfig.from_file(file)


@pytest.mark.parametrize(
    "text, selection, line",
    [
        ("init: importance", Located(start="importance"), "selection: {located: {start: importance}}"),
        (
            "selection: random\noutlier_limit: 4\ncalibration_batches: 2",
            Drawn(outlier_limit=4, calibration_batches=2),
            "selection: {drawn: {outlier_limit: 4, calibration_batches: 2}}",
        ),
        (
            "localization: rank_parallel\nimportance: first_order\nimportance_betas: [0.5, 0.85]\noutlier_limit:",
            Located("first_order", (0.5, 0.85), reduction="by_rank"),
            "selection: {located: {reduction: by_rank, importance: first_order, betas: [0.5, 0.85]}}",
        ),
    ],
)
def test_a_file_of_the_flat_form_loads_with_one_warning_that_names_the_line(tmp_path, text, selection, line):
    file = tmp_path / "old.yaml"
    file.write_text(text)
    with pytest.warns(FutureWarning) as told:
        config = LoSiAConfig.from_file(file)
    assert len(told) == 1 and f"Write: {line}" in str(told[0].message) and "old.yaml" in str(told[0].message)
    assert config.selection == selection
    file.write_text(line)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LoSiAConfig.from_file(file) == config


def test_the_flat_form_is_refused_where_it_contradicts_itself_and_in_programs(tmp_path):
    file = tmp_path / "old.yaml"
    for text, said in {
        "selection: random\ninit: importance": "init='importance' has no meaning with selection='random'.*take 'greedy'",
        "outlier_limit: 4": "outlier_limit=4 has no meaning with selection='greedy'.*take 'random'",
        "selection: {drawn: {}}\noutlier_limit: 4": "outlier_limit stand beside selection=.*move them into it",
    }.items():
        file.write_text(text)
        with pytest.raises(ConfigError, match=f"old.yaml: {said}"):
            LoSiAConfig.from_file(file)
    with pytest.raises(ConfigError, match=r"no init any more: give selection=Located\(start=...\)"):
        LoSiAConfig(init="importance")
    with pytest.raises(ConfigError, match=r"no outlier_limit any more: give selection=Drawn\(outlier_limit=...\)"):
        LoSiAConfig(selection="random", outlier_limit=4)


def test_presets_go_by_name_and_files_by_path(tmp_path, monkeypatch):
    assert LoSiAConfig.preset("published") == LoSiAConfig()
    assert LoSiAConfig.preset("short").selection == Drawn(outlier_limit=4, calibration_batches=2)
    monkeypatch.chdir(tmp_path)
    assert LoSiAConfig.read("7b") == LoSiAConfig.preset("7b")
    (tmp_path / "7b").write_text("period: 3")  # a file of that name is meant
    assert LoSiAConfig.read("7b").period == 3
    with pytest.raises(ConfigError, match="no preset 'tiny'; there are 13b, 70b, 7b, .*published, .*short"):
        LoSiAConfig.preset("tiny")
    with pytest.raises(ConfigError, match="absent.yaml cannot be read"):
        LoSiAConfig.read("absent.yaml")


@pytest.mark.parametrize("factor", [2.0, [1, 0.5, 0.25], [1, 0]])
def test_a_factor_of_a_single_module_is_checked_alike(factor):
    with pytest.raises(ConfigError, match=r"rank_pattern\['down_proj'\].*(share in|pair)"):
        LoSiAConfig(rank_pattern={"down_proj": factor})


def test_a_pair_sets_rows_and_columns_apart():
    config = LoSiAConfig(rank_factor=[0.25, 1])
    assert (config.row_factor, config.column_factor) == (0.25, 1)


def test_a_saved_configuration_comes_back_equal(tmp_path):
    config = LoSiAConfig(rank_factor=(0.5, 0.25), period=7, target_modules=["q_proj"], modules_to_save=["norm"], seed=3)
    config.rank_pattern = {"down_proj": (1, 0.125), "layers.0.q_proj": 0.5}
    config.save_pretrained(tmp_path)
    assert LoSiAConfig.from_pretrained(tmp_path) == config
    assert json.loads((tmp_path / "losia_config.json").read_text())["period"] == 7


def test_an_unknown_option_in_a_file_is_answered_with_the_nearest_name(tmp_path):
    path = tmp_path / "losia.yaml"
    path.write_text("rank_factr: 0.125\n")
    with pytest.raises(ConfigError, match=r"losia.yaml: unknown option 'rank_factr'. Did you mean rank_factor"):
        LoSiAConfig.from_file(path)


@pytest.mark.parametrize("text", ["- a list\n", "period: [1\n"])
def test_a_file_that_holds_no_options_is_refused_with_its_name(tmp_path, text):
    path = tmp_path / "losia.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="losia.yaml"):
        LoSiAConfig.from_file(path)


def test_a_missing_file_is_refused_with_its_name(tmp_path):
    with pytest.raises(ConfigError, match="absent.yaml cannot be read"):
        LoSiAConfig.from_file(tmp_path / "absent.yaml")


def test_rewarming_lasts_one_period_unless_set():
    assert LoSiAConfig(period=9).effective_rewarm_steps == 9
    assert LoSiAConfig(period=9, rewarm_steps=0).effective_rewarm_steps == 0


@pytest.mark.parametrize("scale", [0, -1.0, "half", float("inf"), True])
def test_a_scale_of_the_learning_rate_must_be_above_0(scale):
    with pytest.raises(ConfigError, match="full_lr_scale=.*above 0"):
        LoSiAConfig(full_lr_scale=scale, train_norms=True)


def test_a_scale_of_the_learning_rate_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="full_lr_scale=0.1, but nothing trains in full"):
        LoSiAConfig(full_lr_scale=0.1)
    assert LoSiAConfig(full_lr_scale=0.1, modules_to_save=["norm"]).full_lr_scale == 0.1


def test_a_name_given_twice_is_refused_where_yaml_would_take_the_last(tmp_path):
    for name, text in (("a.yaml", "period: 5\nperiod: 50\n"), ("a.json", '{"period": 5, "rank_factor": 0.5, "period": 50}')):
        file = tmp_path / name
        file.write_text(text)
        with pytest.raises(ConfigError, match=rf"{name}.*'period' is given twice"):
            LoSiAConfig.from_file(file)


def test_a_power_of_ten_is_a_number_with_and_without_a_point(tmp_path):
    file = tmp_path / "losia.yaml"
    file.write_text("rank_factor: 1e-1\noutput_rank_factor: 5.0e-2\n")
    config = LoSiAConfig.from_file(file)
    assert (config.rank_factor, config.output_rank_factor) == (0.1, 0.05)


def test_a_file_that_is_no_text_is_refused_with_its_name(tmp_path):
    file = tmp_path / "losia.yaml"
    file.write_bytes(b"\xff\xfe\x00period")
    with pytest.raises(ConfigError, match="losia.yaml is not valid YAML or JSON"):
        LoSiAConfig.from_file(file)


@pytest.mark.parametrize(
    "steps, message", [(0, "importance_steps=0: a whole number"), (5, "importance_steps=5: at most the period, 4")]
)
def test_steps_of_a_slot_that_importance_is_taken_from(steps, message):
    with pytest.raises(ConfigError, match=message):
        LoSiAConfig(period=4, selection=Located(importance_steps=steps))
    assert LoSiAConfig(period=4, selection=Located(importance_steps=4)).located.importance_steps == 4
