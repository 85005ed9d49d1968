"""Published rows are read as they stand, factors are found again, and what nobody measured has a wider interval."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from sprat.errors import ConfigError
from sprat.plan.calibration import fit, predict, score
from sprat.plan.published import ROWS_FILE, Row, estimate, read_row, read_rows


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return read_rows(ROWS_FILE, "25.09")


def table(**changes: str) -> dict[str, str]:
    facts = {
        "release": "25.09", "model": "LLAMA3_70B", "task": "pretrain", "system": "GB200", "gpus": "64", "precision": "",
        "global_batch": "128", "micro_batch": "2", "sequence_length": "8192", "fsdp": "64", "tp": "1", "pp": "1",
        "cp": "1", "vp": "1", "ep": "1", "etp": "", "extra": "granularity=first; precision_inferred=fp8-cs",
        "tokens_per_s_per_gpu": "3986", "model_tflops_per_gpu": "1791",
    }  # fmt: skip
    return facts | changes


def test_a_row_says_its_layout() -> None:
    row = read_row(table(), "a table")
    assert (row.plan.world_size, row.plan.zero, row.plan.data_shard, row.plan.micro_batches) == (64, 3, 64, 1)
    assert (row.precision, row.inferred, row.remarks) == ("fp8-cs", True, ())
    row = read_row(table(precision="BF16", fsdp="0", tp="2", pp="4", vp="5", extra="tokendrop"), "a table")
    assert (row.plan.tensor, row.plan.pipeline, row.plan.virtual_stages, row.plan.zero) == (2, 4, 5, 1)
    assert (row.plan.schedule, row.plan.data_shard, row.plan.micro_batches) == ("interleaved", 8, 8)
    assert (row.precision, row.inferred, row.options.deduplicates) == ("bf16", False, False)
    assert not read_row(table(task="lora"), "a table").options.trains_weights
    assert not read_row(table(extra="mtp=no; precision_inferred=fp8-mx"), "a table").options.mtp


def test_what_a_row_says_in_other_words_is_named() -> None:
    assert read_row(table(extra="precision_inferred=fp8-cs; offloading=on"), "t").remarks == (
        "not understood: offloading",
    )
    assert "does not divide" in read_row(table(ep="7", model="Qwen3_30B_a3B", fsdp="0"), "t").remarks[0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tp": "two"}, "tp is 'two'"),
        ({"precision": "int3"}, "unknown precision 'int3'"),
        ({"gpus": "-8"}, "gpus is '-8'"),
    ],
)
def test_rows_that_cannot_be_read_are_refused(changes: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_row(table(**changes), "a table")


def test_the_flops_of_a_row_are_those_that_its_source_counts(rows: list[Row]) -> None:
    for row in rows:  # the source counts causal FLOPs with the MTP module
        own = estimate(row).flops_trained * row.tokens_per_second / 1e12
        assert own == pytest.approx(row.tflops, rel=0.006)


def test_the_fitted_release_is_met(rows: list[Row]) -> None:
    calibration = fit(rows)
    result = score([predict(calibration, row) for row in rows])
    assert result.mape < 0.1 and result.rank_correlation > 0.95 and result.inside >= 0.9


def test_a_model_that_was_left_out_is_met_as_well(rows: list[Row]) -> None:
    predictions = []
    for model in {row.model for row in rows}:
        calibration = fit([row for row in rows if row.model != model])
        predictions += [predict(calibration, row) for row in rows if row.model == model]
    result = score(predictions)
    assert result.mape < 0.15 and result.rank_correlation > 0.9 and result.inside >= 0.9


def test_a_factor_that_was_put_in_is_found_again(rows: list[Row]) -> None:
    noise = np.random.default_rng(1)
    true = {"GB200": 0.7, "B200": 0.8, "H100": 0.95}
    made = [
        replace(
            row, tokens_per_second=estimate(row).tokens_per_second * true[row.system] * math.exp(0.03 * noise.normal())
        )
        for row in rows
    ]
    calibration = fit(made)
    assert calibration.residual <= 0.06
    for row in made:
        factor = calibration.factor(*row.group, row.model, release="25.09")
        assert 1 / factor.median == pytest.approx(true[row.system], rel=0.06)


def test_what_nobody_measured_has_a_wider_interval(rows: list[Row]) -> None:
    calibration = fit(rows)

    def wide(system: str, precision: str, model: str, release: str = "25.09") -> float:
        return calibration.factor(system, precision, model, release=release).deviation

    known = wide("GB200", "fp8-cs", "LLAMA3_8B")
    assert known < wide("GB200", "bf16", "LLAMA3_8B") < wide("MI300X", "bf16", "LLAMA3_8B")
    assert known < wide("GB300", "fp8-cs", "LLAMA3_8B") < wide("A100", "fp8-cs", "LLAMA3_8B")
    assert known < wide("GB200", "fp8-cs", "Kimi_K2") and known < wide("GB200", "fp8-cs", "LLAMA3_8B", "26.01")
    low, high = calibration.factor("MI300X", "bf16", "Kimi_K2").around(100.0)
    assert low < 70 and high > 140


def test_scores_are_what_they_are_called(rows: list[Row]) -> None:
    calibration = fit(rows)
    predictions = [predict(calibration, row) for row in rows[:3]]
    made = [
        replace(
            one,
            predicted=predicted,
            low=predicted * 0.9,
            high=predicted * 1.1,
            row=replace(one.row, tokens_per_second=t),
        )
        for one, predicted, t in zip(predictions, (110.0, 220.0, 300.0), (100.0, 200.0, 400.0), strict=True)
    ]
    result = score(made)
    assert result.mape == pytest.approx((0.1 + 0.1 + 0.25) / 3)
    assert result.rank_correlation == pytest.approx(1.0)
    assert result.inside == pytest.approx(2 / 3)
    with pytest.raises(ConfigError, match="at least two"):
        score(made[:1])
    with pytest.raises(ConfigError, match="no row"):
        fit([])
