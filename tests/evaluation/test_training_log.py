"""Curves and training time from small logs."""

import json

import pytest

from cllm4rec_dist.errors import DataError
from cllm4rec_dist.evaluation.training_log import read_curves, training_seconds


def test_curves_keep_the_later_value_of_a_step_and_drop_a_torn_line(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(
        '{"step": 1, "loss": 3.0}\n{"step": 2, "stage": "pretrain", "loss": 2.0}\n{"step": 3, "loss": NaN}\n'
        '{"step": 2, "loss": 1.5}\n{"step": 1, "valid/ndcg@10": 0.5}\n{"step": 4, "lo'
    )
    assert read_curves([path]) == {
        "run": {"loss": ([1], [3.0])},
        "pretrain": {"loss": ([2], [1.5]), "valid/ndcg@10": ([1], [0.5])},
    }


@pytest.mark.parametrize("line", ["nonsense", "[]", "{}", '{"step": null}'])
def test_a_damaged_log_is_named(tmp_path, line):
    path = tmp_path / "run.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(DataError, match=r"run\.jsonl line 2"):
        read_curves([path])


def test_an_absent_log_is_named(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_curves([tmp_path / "absent.jsonl"])


def test_training_time_leaves_out_the_pause_of_an_interrupted_run(tmp_path):
    first, second = tmp_path / "pretrain.jsonl", tmp_path / "finetune.jsonl"
    moments = [100.0, 110.0, 130.0, 130.0 + 3601, 130.0 + 3606]
    lines = [{"step": step, "stage": "pretrain", "time": moment} for step, moment in enumerate(moments)]
    first.write_text("".join(json.dumps(line) + "\n" for line in lines))
    second.write_text('{"step": 1, "stage": "finetune", "time": 5.0}\n{"step": 1, "time": 9.5}\n')
    assert training_seconds([first, second]) == {"pretrain": 35.0, "finetune": 4.5}


def test_a_log_without_times_has_no_training_time(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "time": 7.0}\n')
    assert training_seconds([path]) == {}
