"""Whole runs of pretrain_dt.py at toy size: the same seed, resuming, kills, evaluation, what a run folder holds."""

import csv
import dataclasses
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pretrain_dt
from pretrain_dt import (
    Args,
    Dataset,
    DecisionTransformer,
    Environments,
    eval_only,
    evaluate,
    load_checkpoint,
    load_dataset,
    load_model,
    main,
    make_env,
    parse_args,
    save_checkpoint,
    write_file,
)

LOSSES = ("nll", "entropy", "action_mse", "grad_norm", "kappa")
EVALUATION = ("eval/return_mean", "eval/return_std", "eval/length_mean", "eval/normalized_score")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def toy_args(**changes):
    """A run of a second on Hopper. The learning rate is high, so that a few updates leave a mark on every weight."""
    toy = dict(env_id="Hopper-v5", dataset_steps=300, embed_dim=16, n_layers=2, n_heads=2, batch_size=8, c_offline=5)
    toy |= dict(c_online=2, updates=12, warmup=4, lr=1e-2, log_every=5, eval_episodes=2, cuda=False, threads=1)
    return Args(**(toy | changes))


def learning_columns(run_dir):
    """metrics.csv as text, without the columns that measure time."""
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.reader(file))
    keep = [i for i, name in enumerate(rows[0]) if not name.startswith("time/")]
    return [[row[i] for i in keep] for row in rows]


def checkpoint(run_dir):
    """The whole content, but for the folder's own name and what measures time."""
    content = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert content["args"].pop("run_dir") is not None
    assert all(row.pop("time/iteration") > 0 for row in content["rows"])
    return content


def flat(value, path=""):
    """{path: leaf} of nested dictionaries and lists, tensors as (dtype, bytes)."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{path}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{path}/{i}").items()}
    return {path: (value.dtype, value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value}


def assert_same_run(one, other):
    """The same bytes in the learning columns, the weights, the optimisers and all else that a checkpoint holds."""
    assert learning_columns(one) == learning_columns(other)
    ours, theirs = flat(checkpoint(one)), flat(checkpoint(other))
    assert [key for key in ours | theirs if ours.get(key) != theirs.get(key)] == []


def progress(run_dir):
    path = run_dir / "checkpoint.pt"
    return torch.load(path, weights_only=True)["iteration"] if path.exists() else 0


def resume(run_dir, *flags):
    return main(parse_args(["--resume", str(run_dir), *map(str, flags)]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of 12 updates in one go."""
    torch.set_num_threads(1)
    return main(toy_args(run_dir=str(tmp_path_factory.mktemp("runs") / "dt")))


def test_same_seed_gives_the_same_run_bit_for_bit(whole, tmp_path):
    assert_same_run(main(toy_args(run_dir=str(tmp_path / "again"))), whole)


def test_other_seed_gives_other_weights_and_losses(whole, tmp_path):
    other = main(toy_args(seed=2, run_dir=str(tmp_path / "other")))
    ours, theirs = checkpoint(whole)["weights"], checkpoint(other)["weights"]
    assert not any(torch.equal(ours[name], theirs[name]) for name in ours if name != "return_scale")
    assert all(a[2] != b[2] for a, b in zip(learning_columns(other)[1:3], learning_columns(whole)[1:3]))


def test_each_update_sees_windows_of_its_own_with_dropout(tmp_path, monkeypatch):
    seen, whole = [], pretrain_dt.pretrain_loss

    def spy(model, windows, kappa):
        seen.append(windows)
        assert model.training and model.dropout == 0.3
        return whole(model, windows, kappa)

    monkeypatch.setattr(pretrain_dt, "pretrain_loss", spy)
    main(toy_args(updates=3, dropout=0.3, run_dir=str(tmp_path / "run")))
    data = load_dataset(toy_args(), make_env("Hopper-v5", {}))
    for step, windows in enumerate(seen, start=1):
        expected = pretrain_dt.draw_windows(data, 5, 8, np.random.default_rng([1, step]))
        assert all(map(torch.equal, windows, expected))
    assert len(seen) == 3


@pytest.mark.parametrize("stops", [[7], [5], [10], [1, 4, 7, 11], [12]])
def test_resumed_run_equals_one_that_never_stopped(whole, stops, tmp_path):
    run_dir = main(toy_args(updates=stops[0], run_dir=str(tmp_path / "split")))
    for updates in [*stops[1:], 12]:
        resume(run_dir, "--updates", updates)
    assert_same_run(run_dir, whole)


def test_rates_given_with_resume_hold_from_there_on(tmp_path):
    run_dir = main(toy_args(updates=6, log_every=1, run_dir=str(tmp_path / "split")))
    resume(run_dir, "--updates", 8, "--lr", 0.5, "--weight-decay", 0.25, "--kappa-lr", 0.125)
    content = checkpoint(run_dir)
    assert [row["charts/learning_rate"] for row in content["rows"][-4:]] == [0.01, 0.01, 0.5, 0.5]
    group = content["learner"]["optimizer"]["param_groups"][0]
    assert (group["weight_decay"], content["learner"]["dual"]["param_groups"][0]["lr"]) == (0.25, 0.125)
    assert content["args"]["lr"] == 0.5


def half_written(path, content):
    """A write that stops in the middle: what a full disk or a kill leaves."""
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2])


@pytest.mark.parametrize("where", ["in the middle of the file", "at the renaming"])
@pytest.mark.parametrize(
    ("death", "outcome", "match"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (OSError(28, "No space left on device"), OSError, "No space left on device"),
    ],
)
def test_a_checkpoint_that_cannot_be_finished_leaves_the_one_before_whole(
    death, outcome, match, where, tmp_path, monkeypatch
):
    def fail(*arguments):
        if where == "in the middle of the file":
            half_written(*arguments)
        raise death

    save_checkpoint(tmp_path / "checkpoint.pt", {"iteration": 1})
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(*((Path, "write_bytes") if where == "in the middle of the file" else (os, "replace")), fail)
        with pytest.raises(outcome, match=match):
            save_checkpoint(tmp_path / "checkpoint.pt", {"iteration": 2})
    assert (tmp_path / "checkpoint.pt").read_bytes() == before and progress(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == [
        "checkpoint.pt"
    ]  # a full disk is not filled further by halves
    save_checkpoint(tmp_path / "checkpoint.pt", {"iteration": 3})
    assert progress(tmp_path) == 3 and [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_file_is_written_beside_the_old_one_and_then_renamed(tmp_path, monkeypatch):
    path, seen = tmp_path / "args.json", []
    path.write_bytes(b"old")
    rename = os.replace

    def watched(source, target):
        seen.append((Path(source).parent, Path(source).read_bytes(), Path(target), path.read_bytes()))
        rename(source, target)

    monkeypatch.setattr(os, "replace", watched)
    write_file(path, b"new")
    assert seen == [(tmp_path, b"new", path, b"old")]
    assert [each.name for each in tmp_path.iterdir()] == ["args.json"] and path.read_bytes() == b"new"


def test_a_half_written_checkpoint_beside_the_whole_one_does_no_harm(whole, tmp_path):
    run_dir = main(toy_args(updates=7, run_dir=str(tmp_path / "split")))
    content = (run_dir / "checkpoint.pt").read_bytes()
    (run_dir / "checkpoint.tmp").write_bytes(content[: len(content) // 2])
    (run_dir / "metrics.tmp").write_text("iteration,char")
    resume(run_dir, "--updates", 12)
    assert_same_run(run_dir, whole)
    assert not list(run_dir.glob("*.tmp"))


def test_rows_written_after_the_checkpoint_are_cut_off_on_resuming(whole, tmp_path):
    run_dir = main(toy_args(updates=7, run_dir=str(tmp_path / "split")))
    with open(run_dir / "metrics.csv", "a") as file:
        file.write("10,0.01,1.0,2.0\n15,0.0")
    resume(run_dir, "--updates", 12)
    assert_same_run(run_dir, whole)


def test_a_run_killed_at_any_moment_goes_on_as_if_it_had_not_been(tmp_path):
    run_dir, moments = tmp_path / "killed", np.random.default_rng(0).uniform(0.0, 0.3, size=3)
    sizes = "--embed-dim 16 --n-layers 2 --n-heads 2 --dataset-steps 300 --batch-size 8 --c-offline 5 --c-online 2"
    rates = "--warmup 4 --lr 1e-2 --log-every 2 --eval-episodes 2 --no-cuda --threads 1"
    begin = ["--env-id", "Hopper-v5", *sizes.split(), *rates.split(), "--run-dir", str(run_dir)]
    iteration = 0
    for moment in moments:
        flags = ["--resume", str(run_dir)] if iteration else begin
        command = [sys.executable, pretrain_dt.__file__, *flags, "--updates", "1000000"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=tmp_path)
        try:
            while process.poll() is None and progress(run_dir) <= iteration:
                time.sleep(0.02)
            time.sleep(moment)
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL
        reached = progress(run_dir)
        assert reached > iteration
        iteration = reached
    resume(run_dir, "--updates", iteration + 3)
    in_one_go = toy_args(updates=iteration + 3, log_every=2, run_dir=str(tmp_path / "whole"))
    assert_same_run(run_dir, main(in_one_go))


SHOWN = ("return_mean", "return_std", "length_mean", "normalized_score")


def test_a_saved_and_reloaded_checkpoint_scores_what_metrics_csv_says(whole, capsys):
    args, content = parse_args(["--eval-only", str(whole)]), load_checkpoint(whole)
    model = load_model(content, torch.device("cpu"), args.bf16)
    row = dict(zip(*[learning_columns(whole)[i] for i in (0, -1)]))
    with Environments(make_env("Hopper-v5", {}), 2) as sims:
        values = evaluate(model.eval(), sims, args, content["iteration"])
    assert row["iteration"] == "12" and float(row["eval/return_std"]) > 0
    assert set(values) == {*EVALUATION, "time/eval"}
    for name in EVALUATION:
        assert repr(values[name]) == row[name]
    before = sorted(whole.iterdir())
    eval_only(args, Environments)
    numbers = [f"{float(row[f'eval/{name}']):,.1f}" for name in SHOWN]
    shown = ", ".join(f"{name} {number}" for name, number in zip(SHOWN, numbers))
    assert capsys.readouterr().out == f"evaluation: {shown} (2 episodes, g = 3,600)\n"
    assert sorted(whole.iterdir()) == before


def test_eval_only_takes_the_checkpoints_arguments_but_for_those_of_the_evaluation(whole):
    path = str(whole / "checkpoint.pt")
    args = parse_args(["--eval-only", path, "--eval-episodes", "3", "--g-eval", "7", "--seed", "9"])
    assert (args.embed_dim, args.c_online, args.env_id) == (16, 2, "Hopper-v5")
    assert (args.eval_episodes, args.g_eval, args.seed) == (3, 7.0, 9)
    with pytest.raises(SystemExit, match="--env-id"):
        parse_args(["--eval-only", path, "--env-id", "Ant-v5"])


def test_resume_keeps_the_saved_arguments_but_for_flags_that_are_given(whole):
    flags = ["--resume", str(whole), "--updates", "20", "--cuda", "--track"]
    args, saved = vars(parse_args(flags)), checkpoint(whole)["args"]
    changed = {name for name in saved if args[name] != saved[name]}
    assert changed == {"updates", "cuda", "track", "resume"}
    kept = vars(parse_args(["--resume", str(whole)]))
    assert all(kept[name] == saved[name] for name in saved.keys() - {"resume"})


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--env-id", "Ant-v5"),
        ("--dataset-kind", "expert"),
        ("--embed-dim", "32"),
        ("--n-layers", "4"),
        ("--n-heads", "4"),
        ("--c-online", "3"),
        ("--kappa-initial", "0.2"),
        ("--run-dir", "elsewhere"),
    ],
)
def test_resume_refuses_what_the_saved_state_hangs_on(whole, flag, value):
    with pytest.raises(SystemExit, match=rf"was made with {flag} .* leave {flag} out"):
        parse_args(["--resume", str(whole), flag, value])


def test_resume_refuses_other_data(whole):
    before = {path: path.read_bytes() for path in whole.iterdir()}
    with pytest.raises(SystemExit, match=r"began with other data than random holds"):
        resume(whole, "--dataset-steps", 200)
    assert {path: path.read_bytes() for path in whole.iterdir()} == before


def test_resume_and_eval_only_exclude_each_other(whole):
    with pytest.raises(SystemExit, match="--eval-only"):
        parse_args(["--resume", str(whole), "--eval-only", str(whole / "checkpoint.pt")])


def test_a_run_of_an_older_version_is_not_resumed(whole, tmp_path):
    save_checkpoint(tmp_path / "checkpoint.pt", load_checkpoint(whole) | {"rows": 2})  # their number
    with pytest.raises(SystemExit, match="older version"):
        parse_args(["--resume", str(tmp_path)])
    assert parse_args(["--eval-only", str(tmp_path)]).embed_dim == 16


def test_data_are_kept_at_the_start_or_later_and_change_nothing(whole, tmp_path):
    run_dir = main(toy_args(save_data=True, updates=7, run_dir=str(tmp_path / "first")))
    early = (run_dir / "data.npz").read_bytes()
    data = load_dataset(toy_args(), make_env("Hopper-v5", {}))
    with np.load(run_dir / "data.npz") as saved:
        assert list(saved) == list(Dataset._fields)
        for name, array in data._asdict().items():
            assert saved[name].dtype == array.dtype and np.array_equal(saved[name], array)
    run_dir = main(toy_args(run_dir=str(tmp_path / "second")))
    assert not (run_dir / "data.npz").exists()
    weights = (run_dir / "checkpoint.pt").read_bytes()
    resume(run_dir, "--save-data")
    assert (run_dir / "data.npz").read_bytes()[:100] == early[:100]
    with np.load(run_dir / "data.npz") as saved:
        assert all(np.array_equal(saved[name], array) for name, array in data._asdict().items())
    assert (run_dir / "checkpoint.pt").read_bytes() == weights
    assert_same_run(run_dir, whole)


def test_resume_to_fewer_updates_than_were_made_is_refused_and_changes_nothing(whole):
    before = {path: path.read_bytes() for path in whole.iterdir()}
    with pytest.raises(SystemExit, match="at update 12: give --updates 12 or more"):
        resume(whole, "--updates", 11)
    assert {path: path.read_bytes() for path in whole.iterdir()} == before


def test_checkpoint_is_plain_and_holds_what_finetuning_needs(whole):
    content = torch.load(whole / "checkpoint.pt", weights_only=True)
    sizes = dict(obs_dim=11, act_dim=3, embed_dim=16, n_layers=2, n_heads=2, kind="dt")
    assert content["sizes"] == sizes
    DecisionTransformer(**sizes).load_state_dict(content["weights"])
    assert {"obs_mean", "obs_std", "return_scale"} <= set(content["weights"])
    assert content["weights"]["obs_std"].std() > 0 and content["weights"]["return_scale"].item() == pytest.approx(1e-3)
    assert (content["env_id"], content["env_kwargs"]) == ("Hopper-v5", {})
    assert (content["dataset"], content["dataset_kind"]) == ("random", "random")
    data = load_dataset(toy_args(), make_env("Hopper-v5", {}))
    best = max(rewards.sum() for rewards in np.split(data.rewards, np.cumsum(data.lengths)[:-1]))
    assert isinstance(content["dataset_best_return"], float) and content["dataset_best_return"] == pytest.approx(best)
    assert (content["g_eval"], content["c_online"], content["iteration"]) == (3600.0, 2, 12)
    assert content["args"]["lr"] == 1e-2 and set(content["args"]) == {field.name for field in dataclasses.fields(Args)}


def test_metrics_hold_a_row_per_log_every_and_one_of_the_evaluation(whole):
    header, *rows = learning_columns(whole)
    assert header == ["iteration", *(f"losses/{name}" for name in LOSSES), "charts/learning_rate", *EVALUATION]
    assert [row[0] for row in rows] == ["5", "10", "12"]
    scores = header.index("eval/return_mean")
    assert [row[scores - 1] for row in rows] == ["0.01", "0.01", ""]
    assert all("" not in row[:scores] and set(row[scores:]) == {""} for row in rows[:2])
    assert set(rows[2][1:scores]) == {""} and "" not in rows[2][scores:]


def test_a_row_is_the_mean_over_the_updates_since_the_row_before(whole, tmp_path):
    _, *singles, _ = learning_columns(main(toy_args(updates=10, log_every=1, run_dir=str(tmp_path / "single"))))
    for row, block in zip(learning_columns(whole)[1:3], (singles[:5], singles[5:])):
        for column in range(1, 1 + len(LOSSES)):
            assert float(row[column]) == pytest.approx(np.mean([float(one[column]) for one in block]), rel=1e-5)


def test_between_its_rows_the_console_has_a_line_after_5_seconds_then_every_30(tmp_path, monkeypatch, capsys):
    quick = main(toy_args(updates=40, log_every=25, run_dir=str(tmp_path / "quick")))
    clock, update = [0.0], pretrain_dt.Learner.update

    def takes_2_seconds(learner, *given):
        clock[0] += 2.0
        update(learner, *given)

    monkeypatch.setattr(pretrain_dt.Learner, "update", takes_2_seconds)
    monkeypatch.setattr(
        pretrain_dt, "time", types.SimpleNamespace(time=lambda: clock[0], perf_counter=time.perf_counter)
    )
    capsys.readouterr()
    slow = main(toy_args(updates=40, log_every=25, run_dir=str(tmp_path / "slow")))
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "/40 " in line]
    assert [line[0] for line in lines] == ["3/40", "19/40", "25/40", "40/40"]  # 25 is a row, 40 the evaluation
    assert [row[0] for row in learning_columns(slow)[1:]] == ["25", "40"]
    assert_same_run(slow, quick)  # lines are lines


def scalars(run_dir):
    """{name: [(step, value)]} of TensorBoard's event files."""
    events = EventAccumulator(str(run_dir)).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def table(run_dir):
    """The same of metrics.csv."""
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        name: [(int(row["iteration"]), pytest.approx(float(row[name]), rel=1e-6)) for row in rows if row[name]]
        for name in rows[0]
        if name != "iteration"
    }


def test_tensorboard_holds_the_names_and_numbers_of_metrics_csv(whole):
    assert scalars(whole) == table(whole)


def test_tensorboard_of_a_resumed_run_forgets_the_closing_row_that_metrics_csv_dropped(tmp_path):
    run_dir = main(toy_args(updates=7, run_dir=str(tmp_path / "split")))
    time.sleep(1.0)  # TensorBoard sorts its files by name, and the name holds the second
    resume(run_dir, "--updates", 12)
    assert scalars(run_dir) == table(run_dir)


def test_environment_outside_the_table_is_evaluated_at_the_best_return_of_the_data(tmp_path):
    run_dir = main(toy_args(env_id="Pendulum-v1", dataset_steps=400, updates=2, run_dir=str(tmp_path / "pendulum")))
    content, (header, *_, last) = checkpoint(run_dir), learning_columns(run_dir)
    assert content["g_eval"] == content["dataset_best_return"] < 0
    row = dict(zip(header, last, strict=True))
    assert float(row["eval/return_mean"]) < 0 and float(row["eval/length_mean"]) == 200.0
    assert "eval/normalized_score" not in row  # no reference returns


def test_a_folder_that_holds_a_run_is_not_overwritten(whole):
    before = (whole / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit, match="holds a run or other files: go on with --resume"):
        main(toy_args(run_dir=str(whole)))
    assert (whole / "checkpoint.pt").read_bytes() == before
