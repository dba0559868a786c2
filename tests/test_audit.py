"""The audit passes for runs with crashes, and names each lost, repeated or invalid example."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cllm4rec_dist import cli
from cllm4rec_dist.audit.check import Audit, check
from cllm4rec_dist.audit.log import AuditLog
from cllm4rec_dist.audit.sessions import AuditError
from cllm4rec_dist.corpus.loader import StepBatch
from cllm4rec_dist.corpus.stream import EpochSampler, batch_range, steps_per_epoch
from cllm4rec_dist.distributed.topology import World
from tests.harness import make_backbone, make_catalog, make_corpus, run_ranks
from tests.training import Made, make_config, run

NUM_USERS, BATCH_USERS, BATCH_TEXTS = 23, 9, 7
TEXT_SIZES = [4, 4, 4, 4, 1]
STEPS = 3  # of an epoch

Edit = Callable[[list[dict[str, Any]]], object]


def session(run: Path, start: int, size: int, first: int, stop: int, *, behind: int = 0) -> None:
    """Append what `size` ranks write that start at step `first` and stop before `stop`.

    `behind` ranks, the last ones, were killed before they wrote their last line.
    """
    users = EpochSampler(np.array([4, 4, 4, 4, 4, 3]), 0, 2)
    texts = EpochSampler(np.array(TEXT_SIZES), 0, 2)
    (run / "audit").mkdir(parents=True, exist_ok=True)
    for rank in range(size):
        lines: list[dict[str, Any]] = [
            {
                "session": start,
                "world_size": size,
                "first_step": first,
                "num_users": NUM_USERS,
                "batch_users": BATCH_USERS,
                "text_record_sizes": [[4, 4], [1, 1]],
                "batch_texts": BATCH_TEXTS,
            }
        ]
        for step in range(first, stop - (rank >= size - behind)):
            # Every rank's part is scattered over the batch, as it is where ranks are balanced by tokens.
            read = users.range(*batch_range(step, NUM_USERS, BATCH_USERS)).take(slice(rank, None, size))
            words = texts.range(step * BATCH_TEXTS, (step + 1) * BATCH_TEXTS).take(slice(rank, None, size))
            lines.append(
                {
                    "session": start,
                    "step": step,
                    "epoch": step // steps_per_epoch(NUM_USERS, BATCH_USERS),
                    "accepted": True,
                    "users": (4 * read["records"] + read["indexes"]).tolist(),
                    "texts": np.stack([words["epochs"], words["records"], words["indexes"]], 1).tolist(),
                }
            )
        with file(run, rank, size).open("a") as out:
            out.writelines(json.dumps(line) + "\n" for line in lines)


def file(run: Path, rank: int, size: int) -> Path:
    return run / "audit" / f"rank-{rank:05d}-of-{size:05d}.jsonl"


def edit(run: Path, rank: int, size: int, change: Edit) -> None:
    path = file(run, rank, size)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def refusal(run: Path, saved_step: int = 0) -> str:
    with pytest.raises(AuditError) as caught:
        check(run, saved_step)
    return str(caught.value)


def test_an_uninterrupted_run_passes(tmp_path: Path) -> None:
    session(tmp_path, 100, 2, 0, 10)
    result = check(tmp_path, 10)
    assert result == Audit(
        first_step=0,
        steps=10,
        steps_per_epoch=3,
        users=3 * 23 + 9,
        texts=70,
        num_users=23,
        num_texts=17,
        sessions=1,
        world_sizes=(2,),
        replayed_steps=0,
        left_out_steps=0,
        torn_lines=0,
    )
    assert "3 and 1 of 3 steps" in result.table()


def test_killed_and_gone_on_with_other_numbers_of_ranks_passes(tmp_path: Path) -> None:
    session(tmp_path, 100, 2, 0, 8, behind=1)  # step 7 is only rank 0's
    with file(tmp_path, 1, 2).open("a") as torn:
        torn.write('{"session":100,"step":7,"epo\n')
    session(tmp_path, 200, 3, 6, 11)
    session(tmp_path, 300, 1, 9, 9)  # killed before its first step
    session(tmp_path, 400, 1, 9, 13)
    session(tmp_path, 500, 4, 13, 18)
    result = check(tmp_path, 18)
    assert (result.steps, result.sessions, result.world_sizes) == (18, 5, (2, 3, 1, 1, 4))
    assert (result.replayed_steps, result.torn_lines) == (4, 1)  # 6, 7, 9, 10
    assert (result.users, result.texts) == (6 * 23, 18 * 7)
    assert "2, 3, 1, 4" in result.table()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_history_of_deaths_passes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    run = tmp_path_factory.mktemp("run")
    saved, stop = 0, 0
    for index in range(data.draw(st.integers(1, 6))):
        size = data.draw(st.integers(1, 4))
        stop = saved + data.draw(st.integers(0, 5))
        behind = data.draw(st.integers(0, size - 1)) if stop > saved else 0
        session(run, 10 * index, size, saved, stop, behind=behind)
        first = saved
        saved = data.draw(st.integers(first, stop - (behind > 0)))
    assert check(run, saved).steps in (stop, stop - 1)


def change_users(step: int, change: Callable[[list[int]], object]) -> Edit:
    return lambda lines: change(lines[1 + step]["users"])


def test_a_repeated_example_is_named(tmp_path: Path) -> None:
    session(tmp_path, 100, 2, 0, 9)
    twice = json.loads(file(tmp_path, 0, 2).read_text().splitlines()[4])["users"][2]  # of step 3

    def repeat(users: list[int]) -> None:
        users[0] = twice

    edit(tmp_path, 1, 2, change_users(5, repeat))
    message = refusal(tmp_path)
    assert message.startswith("step 5, epoch 1: ")
    assert f"'user {twice}' was read more than once: at steps [3, 5]" in message


def test_the_same_example_on_two_ranks_of_a_step_is_named(tmp_path: Path) -> None:
    session(tmp_path, 100, 2, 0, 2)
    twice = json.loads(file(tmp_path, 0, 2).read_text().splitlines()[2])["texts"][0]
    edit(tmp_path, 1, 2, lambda lines: lines[2]["texts"].__setitem__(1, twice))
    assert f"step 1, epoch 0: 'text {tuple(twice[1:])}' was read more than once: at steps [1, 1]" in refusal(tmp_path)


def test_a_missing_example_is_named(tmp_path: Path) -> None:
    session(tmp_path, 100, 2, 0, 9)
    gone = json.loads(file(tmp_path, 1, 2).read_text().splitlines()[5])["users"][1]  # of step 4
    edit(tmp_path, 1, 2, change_users(4, lambda users: users.pop(1)))
    message = refusal(tmp_path)
    assert message.startswith(f"step 4, epoch 1: 'user {gone}' was not read in pass 1 over the users")


def test_a_missing_example_of_a_partial_epoch_shows_in_the_size_of_its_batch(tmp_path: Path) -> None:
    session(tmp_path, 100, 2, 0, 2)
    edit(tmp_path, 0, 2, change_users(1, lambda users: users.pop()))
    assert "step 1, epoch 0: '8 users' were read of pass 0 instead of 9" in refusal(tmp_path)


@pytest.mark.parametrize("example", [[9, 0], [0, 4], [0, -1], [-1, 0], [4, 1]])
def test_a_foreign_text_is_named(tmp_path: Path, example: list[int]) -> None:
    session(tmp_path, 100, 2, 0, 9)
    edit(tmp_path, 0, 2, lambda lines: lines[7]["texts"].__setitem__(1, [2, *example]))
    assert f"step 6, epoch 2: 'text {tuple(example)}' is not in the corpus" in refusal(tmp_path)


@pytest.mark.parametrize("visit", [1, 7])
def test_a_text_of_another_pass_is_named(tmp_path: Path, visit: int) -> None:
    session(tmp_path, 100, 2, 0, 2)  # 14 of the 17 texts of pass 0
    edit(tmp_path, 0, 2, lambda lines: lines[2]["texts"][1].__setitem__(0, visit))
    assert "step 1, epoch 0: '6 texts' were read of pass 0 instead of 7" in refusal(tmp_path)


def test_a_foreign_user_is_named(tmp_path: Path) -> None:
    session(tmp_path, 100, 2, 0, 9)
    edit(tmp_path, 0, 2, change_users(2, lambda users: users.__setitem__(0, 23)))
    assert "step 2, epoch 0: 'user 23' is not in the corpus" in refusal(tmp_path)


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    session(tmp_path, 100, 3, 0, 9)
    file(tmp_path, 1, 3).unlink()
    assert "step 0, epoch 0: 'no line of ranks [1]'" in refusal(tmp_path)


def test_a_missing_line_is_named_and_a_torn_one_counts_as_missing(tmp_path: Path) -> None:
    session(tmp_path, 100, 2, 0, 9)
    path = file(tmp_path, 1, 2)
    lines = path.read_text().splitlines(keepends=True)
    for instead in ([], [lines[5][:30] + "\n"], ["\x00" * 20 + "\n"]):
        path.write_text("".join([*lines[:5], *instead, *lines[6:]]))
        assert "step 4, epoch 1: 'no line of ranks [1]'" in refusal(tmp_path)


def test_steps_between_two_sessions_that_nobody_recorded_are_missing(tmp_path: Path) -> None:
    session(tmp_path, 100, 2, 0, 5)
    session(tmp_path, 200, 2, 6, 9)
    assert "step 5, epoch 1: 'no line' although the run continued" in refusal(tmp_path)


def test_the_log_must_reach_the_newest_checkpoint(tmp_path: Path) -> None:
    session(tmp_path, 100, 2, 0, 9, behind=1)
    assert check(tmp_path, 8).steps == 8
    assert "steps 8 to 8: 'missing' are in a checkpoint" in refusal(tmp_path, saved_step=9)


def test_a_replay_that_read_something_else_is_named(tmp_path: Path) -> None:
    session(tmp_path, 100, 2, 0, 8)
    session(tmp_path, 200, 3, 5, 9)
    assert check(tmp_path).replayed_steps == 3
    edit(tmp_path, 0, 2, change_users(6, lambda users: users.__setitem__(0, (users[0] + 1) % 23)))
    message = refusal(tmp_path)
    assert message.startswith("step 6, epoch 2: ")
    assert "was read by only one of the sessions 100 and 200" in message


def test_a_run_that_goes_on_from_another_one_is_checked_from_there(tmp_path: Path) -> None:
    session(tmp_path, 100, 2, 4, 9)
    result = check(tmp_path, 9)
    assert (result.first_step, result.steps) == (4, 9)
    edit(tmp_path, 0, 2, lambda lines: lines[5]["users"].pop())  # the epoch from step 6 is whole
    assert "was not read in pass 2 over the users" in refusal(tmp_path)


def test_two_headers_of_a_session_must_agree_and_a_step_is_recorded_once(tmp_path: Path) -> None:
    session(tmp_path, 100, 2, 0, 3)
    lines = file(tmp_path, 0, 2).read_text()
    file(tmp_path, 0, 2).write_text(lines + lines.splitlines()[2] + "\n")
    assert "'step 1, epoch 0' is recorded twice in one session" in refusal(tmp_path)
    file(tmp_path, 0, 2).write_text(lines)
    edit(tmp_path, 1, 2, lambda lines: lines[0].update(num_users=24))
    assert "differs from other ranks' files" in refusal(tmp_path)
    assert "does not exist or has no session" in refusal(tmp_path / "elsewhere")


def test_the_command_says_yes_or_ends_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session(tmp_path, 100, 2, 0, 9)
    with pytest.raises(SystemExit) as ended:
        cli.main(["audit", str(tmp_path)])
    assert not ended.value.code
    assert capsys.readouterr().out.endswith("exactly once: yes\n")
    edit(tmp_path, 0, 2, change_users(2, lambda users: users.pop()))
    with pytest.raises(SystemExit) as ended:
        cli.main(["audit", str(tmp_path)])
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert "step 2, epoch 0" in shown.err
    assert "yes" not in shown.out


def test_the_command_checks_both_runs_of_a_project(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("recipe.yaml", "finetune.yaml"):
        (tmp_path / name).touch()
    session(tmp_path / "runs/pretrain", 100, 2, 0, 9)
    with pytest.raises(SystemExit) as ended:
        cli.main(["audit", str(tmp_path)])
    assert ended.value.code == 2
    assert f"'{tmp_path}/runs/finetune/audit' does not exist" in capsys.readouterr().err
    session(tmp_path / "runs/finetune", 100, 2, 0, 9)
    with pytest.raises(SystemExit) as ended:
        cli.main(["audit", str(tmp_path)])
    assert not ended.value.code
    assert capsys.readouterr().out.count("exactly once: yes\n") == 2


def test_a_log_goes_on_on_a_fresh_line_after_a_torn_one(tmp_path: Path) -> None:
    config: Any = SimpleNamespace(audit=True, batch=SimpleNamespace(users=2, texts=1))
    source: Any = SimpleNamespace(num_users=2, has_texts=True, text_record_sizes=np.array([2, 2, 1]))
    alone = World(0, 1, 0, torch.device("cpu"))
    batches = [StepBatch([], step, [1, 0], [(0, step // 2, step % 2)]) for step in range(3)]
    with closing(AuditLog(tmp_path, alone, config, source, 0)) as log:
        for step in (0, 1):
            log.record(step, batches[step], accepted=True)
    path = file(tmp_path, 0, 1)
    path.write_bytes(path.read_bytes()[:-9])
    with closing(AuditLog(tmp_path, alone, config, source, 1)) as log:
        log.record(1, batches[1], accepted=False)
        log.record(2, batches[2], accepted=True)
        log.sync()
    result = check(tmp_path)
    assert (result.steps, result.torn_lines, result.left_out_steps, result.num_texts) == (3, 1, 1, 5)


@pytest.mark.slow
def test_a_real_run_at_2_and_then_3_ranks_passes_and_without_audit_writes_nothing(tmp_path: Path) -> None:
    catalog = make_catalog()
    backbone = make_backbone(tmp_path / "backbone", catalog)
    made: Made = (tmp_path, make_corpus(tmp_path / "corpus", catalog, backbone), str(backbone))
    run_ranks(2, run, make_config(made, tmp_path / "run", audit=True, max_steps=4))
    run_ranks(3, run, make_config(made, tmp_path / "run", audit=True, max_steps=8))
    result = check(tmp_path / "run", 8)
    assert (result.steps, result.world_sizes, result.num_users) == (8, (2, 3), 23)
    run_ranks(1, run, make_config(made, tmp_path / "silent", max_steps=1))
    assert not (tmp_path / "silent" / "audit").exists()
