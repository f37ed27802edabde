"""Whole runs of the finetuning scripts at toy size: what they write, resuming, evaluation, pretraining where none is
given, and what is refused. At the end what only one of them has."""

import contextlib
import csv
import functools
import importlib.util
import json
import math
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch

import grpo_dt_continuous as grpo
import ppo_dt_continuous as ppo
import pretrain_dt

SCRIPTS = [grpo, ppo]
PLAYERS = {grpo: grpo.Simulators, ppo: ppo.Environments}
# The learning rate is high, so that a few updates leave a mark on every weight; the 8 updates of an iteration end
# between two references.
TOY = dict(env_id="Hopper-v5", iterations=2, embed_dim=16, gamma=0.9, g_online=3.0, c_online=1, n_batch=8, epsilon=0.2)
TOY |= dict(lr=1e-2, kappa_initial=0.1, reference_every=3, eval_every=1, eval_episodes=1, cuda=False, threads=1)
OWN = {
    grpo: dict(n_sources=2, n_points=2, group_size=4, buffer_size=40, l_traj=4, l_eval=8, delta_r=0.0)
    | dict(n_trajectories=1, workers=0),
    ppo: dict(n_trajectories=2, replay_iterations=2, c_train=4, gae_lambda=0.8, value_dim=8, value_norm=False)
    | dict(lr_value=1e-2, value_warmup=3),
}
STATISTICS = {"obs_mean", "obs_std", "return_scale"}


GRPO_ALONE = pytest.mark.parametrize("script", [grpo], ids=["grpo_dt_continuous"], indirect=True)
PPO_ALONE = pytest.mark.parametrize("script", [ppo], ids=["ppo_dt_continuous"], indirect=True)


def toy_args(script, **changes):
    return script.Args(**(TOY | OWN[script] | changes))


def words(args):
    """The command line that says `args`."""
    fields = {field.name: field.type for field in args.__dataclass_fields__.values()}
    given = [(f"--{name.replace('_', '-')}", fields[name], value) for name, value in vars(args).items()]
    switches = [flag if value else f"--no-{flag[2:]}" for flag, kind, value in given if kind == "bool"]
    values = [(flag, str(value)) for flag, kind, value in given if kind != "bool" and value is not None]
    return switches + [word for pair in values for word in pair]


@pytest.fixture(params=SCRIPTS, ids=lambda script: script.__name__)
def script(request):
    return request.param


@pytest.fixture(scope="session")
def wholes(pretrained, tmp_path_factory):
    @functools.cache
    def run(script):
        folder = tmp_path_factory.mktemp("whole") / "run"
        return script.main(toy_args(script, iterations=4, pretrained=pretrained(), run_dir=str(folder)))

    return run


@pytest.fixture
def whole(script, wholes):
    """The folder of a run of 4 iterations in one go; not to be changed."""
    return wholes(script)


@pytest.fixture
def split(script, pretrained, tmp_path):
    """split(iterations): the folder of a run like `whole` that stopped then."""

    def begin(iterations, **flags):
        settings = dict(iterations=iterations, pretrained=pretrained(), run_dir=str(tmp_path / "split"))
        return script.main(toy_args(script, **settings | flags))

    return begin


@pytest.fixture
def resume(script):
    return lambda run_dir, *flags: script.main(script.parse_args(["--resume", str(run_dir), *map(str, flags)]))


@pytest.fixture
def evaluate_only(script):
    def run(path, *flags):
        args = script.parse_args(["--eval-only", str(path), *map(str, flags)])
        script.eval_only(args, PLAYERS[script])

    return run


def load(run_dir):
    return grpo.load_checkpoint(run_dir)


def table(run_dir):
    with open(run_dir / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def numbers(row):
    """Of a line of metrics.csv, without the columns that measure time."""
    return {name: float(value) for name, value in row.items() if value != "" and not name.startswith("time/")}


def learning_columns(run_dir):
    """metrics.csv as text, without the columns that measure time."""
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in table(run_dir)]


def flat(value, path=""):
    """{path: leaf} of nested dictionaries and lists, tensors as (dtype, bytes)."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{path}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{path}/{i}").items()}
    return {path: (value.dtype, value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value}


def assert_same_run(one, other):
    """The same bytes in the learning columns and in all that a checkpoint holds but for times and the folder's name."""
    assert learning_columns(one) == learning_columns(other)
    ours, theirs = (flat(load(run_dir)) for run_dir in (one, other))
    different = [key for key in ours | theirs if ours.get(key) != theirs.get(key) and "/time/" not in key]
    assert different == ["/args/run_dir"]


def tensorboard(run_dir):
    """{name: {iteration: value}}; fails if there are two values for one iteration."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir)).Reload()
    found = {name: [(each.step, each.value) for each in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert all(len({step for step, _ in each}) == len(each) for each in found.values())
    return {name: dict(each) for name, each in found.items()}


def assert_same_in_tensorboard(run_dir):
    found = tensorboard(run_dir)
    rows = {int(row["iteration"]): numbers(row) for row in table(run_dir)}
    names = {name for row in rows.values() for name in row} - {"iteration"}  # that is the step of each
    assert {name for name in found if not name.startswith("time/")} == names
    for name in names:
        expected = {i: row[name] for i, row in rows.items() if name in row}
        assert found[name].keys() == expected.keys() and found[name] == pytest.approx(expected, rel=1e-5)


def content_of(folder):
    return {path: path.read_bytes() for path in folder.iterdir()}


def progress(run_dir):
    path = run_dir / "checkpoint.pt"
    return load(path)["iteration"] if path.exists() else 0


def changed_checkpoint(path, folder, **changes):
    """A copy of a checkpoint with other entries."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(load(path) | changes, folder / "checkpoint.pt")
    return folder


# ---- What a run writes ----------------------------------------------------------------------------------------------


def test_a_run_writes_its_metrics_and_learns(script, whole, pretrained):
    rows, content = table(whole), load(whole)
    assert [row["iteration"] for row in rows] == ["0", "1", "2", "3", "4"]
    evaluated = {"eval/return_mean", "eval/return_std", "eval/length_mean", "eval/normalized_score"}
    assert numbers(rows[0]).keys() == evaluated | {"iteration"}
    assert all(value != "" and math.isfinite(float(value)) for row in rows[1:] for value in row.values())
    assert float(rows[1]["losses/ratio_first"]) == pytest.approx(1.0, abs=1e-4)
    assert float(rows[1]["losses/ratio_max"]) > 1.0 and float(rows[1]["rollout/terminated"]) == 1.0  # Hopper falls
    assert [int(row["charts/gradient_updates"]) for row in rows[1:]] == [8, 16, 24, 32]
    steps = [float(row["charts/env_steps"]) for row in rows[1:]]
    assert np.diff(steps).min() > 0 and content["env_steps"] == steps[-1]
    for row in rows[1:]:
        times = [float(row[f"time/{name}"]) for name in ("simulate", "infer", "update")]
        assert min(times) > 0.0 and sum(times) == pytest.approx(float(row["time/iteration"]), rel=1e-6)
    before, after = load(pretrained())["weights"], content["weights"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    unused = {"embed_action.weight", "embed_action.bias"}  # at context 1: not even weight decay moves them
    assert moved == set(before) - STATISTICS - unused
    facts = json.loads((whole / "args.json").read_text())
    assert facts["script"] == f"{script.__name__}.py" and "torch" in facts["versions"]
    assert facts["args"]["kappa_initial"] == 0.1 and facts["args"]["pretrained"] == pretrained()
    assert_same_in_tensorboard(whole)


@pytest.mark.parametrize("env_id, context", [("AdroitHandHammer-v1", 5), ("AntMaze_UMaze-v4", 1)])
def test_finetuning_runs_on_a_task_of_each_family(env_id, context, script, split, pretrained, monkeypatch):
    start = pretrained(env_id)
    monkeypatch.setattr(gym.spec(env_id), "max_episode_steps", 40)
    table_row = dict(c_online=None, g_online=None, gamma=None, epsilon=None, kappa_initial=None)
    run_dir = split(1, env_id=env_id, pretrained=start, **table_row)
    content, rows = load(run_dir), table(run_dir)
    assert (content["c_online"], content["script"]) == (context, script.__name__)
    assert content["args"]["g_online"] == {"AdroitHandHammer-v1": 4000, "AntMaze_UMaze-v4": 2}[env_id]
    assert content["g_eval"] == load(start)["g_eval"] == 20
    assert [row["iteration"] for row in rows] == ["0", "1"] and rows[1]["eval/normalized_score"] != ""
    assert rows[1]["rollout/terminated"] == "0.0"
    if env_id.startswith("AntMaze"):
        assert content["env_kwargs"] == {"maze_map": pretrain_dt.UMAZE}
    else:
        assert math.isfinite(float(rows[1]["losses/loss"])) and rows[1]["charts/gradient_updates"] == "8"
        assert float(rows[1]["losses/ratio_first"]) == pytest.approx(1.0, abs=1e-4)


def test_a_line_on_the_console_shows_values_of_the_row_and_the_time_left(script):
    row = {"iteration": 3, "eval/return_mean": 1234.4, "losses/entropy": -2.5, "losses/ratio_first": 0.999}
    line = script.console_line(row, list(script.CONSOLE), 20, 3660.0)
    assert line.split()[:5] == ["3/20", "1,234", "1.00", "-2.50", "1:01"]


@pytest.mark.parametrize(
    "value", [0.0, 2.0794, -1e-5, 10_020.0, -10_020.0, 4_680.0, -123_456.7, 1e9, -2e300, math.inf, -math.inf]
)
def test_columns_on_the_console_never_touch_and_a_line_stays_under_100_characters(value, script):
    names = list(script.CONSOLE)[:9]  # as many as the widest script has
    line = script.console_line({"iteration": 199_999} | dict.fromkeys(names, value), names, 200_000, 3.6e6)
    assert len(line) < 100
    first, *shown, hours, left = line.split()
    assert (first, hours, left) == ("199999/200000", "1000:00", "left")
    assert [float(word.replace(",", "")) for word in shown] == [pytest.approx(value, rel=0.2, abs=0.5)] * len(names)
    assert all(line[: 13 + 8 * k].split()[-1] == shown[k - 1] for k in range(1, 10))  # under the heading's last letter


@pytest.fixture
def moviepy(monkeypatch):
    """As if it were installed."""
    real, found = importlib.util.find_spec, types.SimpleNamespace(origin="moviepy.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: found if name == "moviepy" else real(name))


def test_a_film_shows_the_first_episode_of_an_evaluation(script, split, moviepy, monkeypatch):
    seen = []

    class Camera(gym.Wrapper):
        """In place of gymnasium's, which needs a GL library and moviepy."""

        def __init__(self, env, *args, **kwargs):
            super().__init__(env)
            assert env.render_mode == "rgb_array"

        def reset(self, **kwargs):
            seen.append(0.0)
            return super().reset(**kwargs)

        def step(self, action):
            outcome = super().step(action)
            seen[-1] += outcome[1]
            return outcome

    monkeypatch.setattr(gym.wrappers, "RecordVideo", Camera)
    rows = table(split(1, capture_video=True))
    assert seen == pytest.approx([float(row["eval/return_mean"]) for row in rows])


def test_a_film_that_cannot_be_made_is_one_line_and_the_run_goes_on(split, moviepy, monkeypatch, capsys):
    def fails(*given, **named):
        raise gym.error.DependencyNotInstalled("no camera")

    monkeypatch.setattr(gym.wrappers, "RecordVideo", fails)
    run_dir = split(1, capture_video=True)
    (line, *_) = capsys.readouterr().err.splitlines()
    assert "Hopper-v5" in line and "no camera" in line
    assert load(run_dir)["iteration"] == 1


def test_filming_without_moviepy_is_refused_before_anything_is_written(script, split, monkeypatch, refused, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with refused("--capture-video", "moviepy"):
        split(1, capture_video=True)
    assert not (tmp_path / "split").exists()


# ---- Same run, resumed run ------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run_bit_for_bit_and_another_does_not(script, whole, pretrained, tmp_path):
    flags = dict(iterations=4, pretrained=pretrained())
    assert_same_run(script.main(toy_args(script, **flags, run_dir=str(tmp_path / "again"))), whole)
    other = script.main(toy_args(script, **flags | {"iterations": 1, "seed": 2}, run_dir=str(tmp_path / "other")))
    ours, theirs = table(other), table(whole)
    assert ours[0]["eval/return_mean"] != theirs[0]["eval/return_mean"]
    for name in ("losses/loss", "rollout/return"):
        assert ours[1][name] != theirs[1][name]


@pytest.mark.parametrize("stops", [[2], [1, 3]])
def test_a_resumed_run_equals_one_that_never_stopped(stops, whole, split, resume):
    run_dir = split(stops[0])
    for iterations in [*stops[1:], 4]:
        resume(run_dir, "--iterations", iterations)
    assert_same_run(run_dir, whole)
    assert_same_in_tensorboard(run_dir)


@pytest.mark.parametrize("harm", ["later rows", "nothing but the checkpoint"])
def test_resuming_needs_the_checkpoint_alone(harm, whole, split, resume, pretrained, tmp_path):
    start = tmp_path / "start.pt"
    start.write_bytes(Path(pretrained()).read_bytes())
    run_dir = split(2, pretrained=str(start))
    if harm == "later rows":
        with open(run_dir / "metrics.csv", "a") as file:
            file.write("".join(f"{i},0.01,1.0,2.0\n" for i in range(3, 8)) + "8,0.0")
    else:
        for path in [start, *run_dir.iterdir()]:
            if path.name != "checkpoint.pt":
                path.unlink()
    resume(run_dir / "checkpoint.pt", "--iterations", 4)
    assert learning_columns(run_dir) == learning_columns(whole)


def test_a_finished_run_that_is_resumed_has_the_rows_of_its_checkpoint(split, resume):
    run_dir = split(1)
    text = (run_dir / "metrics.csv").read_text()
    for harm in ("", text + "2,0.01,1.0,2.0\n"):
        (run_dir / "metrics.csv").write_text(harm)
        resume(run_dir)
        assert (run_dir / "metrics.csv").read_text() == text


def test_evaluations_and_their_number_do_not_touch_what_is_learned(whole, split, resume):
    run_dir = split(3, eval_every=2, eval_episodes=2)
    rows = [numbers(row) for row in table(run_dir)]
    assert ["eval/return_mean" in row for row in rows] == [True, False, True, True]
    for ours, theirs in zip(rows[1:], map(numbers, table(whole)[1:])):
        assert all(theirs[name] == value for name, value in ours.items() if not name.startswith("eval/"))
    resume(run_dir, "--iterations", 4)
    ours, theirs = (load(each)["weights"] for each in (run_dir, whole))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_rates_given_with_resume_hold_from_there_on(script, split, resume):
    run_dir = split(1)
    before = load(run_dir)
    args = script.parse_args(["--resume", str(run_dir), "--lr", "1e-9", "--weight-decay", "0", "--kappa-lr", "0.5"])
    assert (args.lr, args.weight_decay, args.kappa_lr, args.iterations, args.gamma) == (1e-9, 0, 0.5, 1, 0.9)
    resume(run_dir, "--iterations", 2, "--lr", 1e-9, "--weight-decay", 0, "--kappa-lr", 0.5)
    after = load(run_dir)
    for each in (after["args"], json.loads((run_dir / "args.json").read_text())["args"]):
        assert (each["lr"], each["weight_decay"], each["kappa_lr"], each["iterations"]) == (1e-9, 0, 0.5, 2)
    group, dual = (after["learner"][name]["param_groups"][0] for name in ("optimizer", "dual"))
    assert (group["lr"], group["weight_decay"], dual["lr"]) == (1e-9, 0, 0.5)
    for name, value in after["weights"].items():  # before, an update moved each tensor by a hundredth of its norm
        torch.testing.assert_close(value, before["weights"][name], rtol=1e-5, atol=1e-7)
    assert (after["learner"]["log_kappa"] - before["learner"]["log_kappa"]).abs() > 0.1  # 1e-3 before
    assert after["learner"]["updates"] == 16


@PPO_ALONE
def test_the_rate_of_the_value_network_given_with_resume_holds(split, resume):
    run_dir = split(1)
    resume(run_dir, "--iterations", 2, "--lr-value", 3e-5)
    assert load(run_dir)["learner"]["value_optimizer"]["param_groups"][0]["lr"] == 3e-5


def test_outside_the_table_a_run_asks_for_twice_the_best_of_the_data(script, pretrained):
    """The checkpoint's best return is 30, its g_eval 20."""
    args = toy_args(script, env_id="HalfCheetah-v5", pretrained=pretrained("HalfCheetah-v5"), g_online=None)
    script.start(args)
    assert (args.g_online, args.g_eval) == (60.0, 20.0)


def test_a_checkpoint_whose_arguments_have_no_g_eval_goes_on_at_its_own(script, whole, tmp_path):
    content = load(whole)
    del content["args"]["g_eval"]
    (tmp_path / "run").mkdir()
    script.save_checkpoint(tmp_path / "run/checkpoint.pt", content | {"g_eval": 9.0})
    assert script.parse_args(["--resume", str(tmp_path / "run")]).g_eval == 9.0


@GRPO_ALONE
def test_the_rate_falls_linearly_over_the_iterations_asked_for(split, resume, monkeypatch):
    rates, step = [], grpo.Lamb.step
    monkeypatch.setattr(
        grpo.Lamb, "step", lambda self, *given: rates.append(self.param_groups[0]["lr"]) or step(self, *given)
    )
    run_dir = split(4, anneal_lr=True)
    assert rates == [rate for rate in (0.01, 0.0075, 0.005, 0.0025) for _ in range(8)]
    assert [float(row["charts/learning_rate"]) for row in table(run_dir)[1:]] == rates[::8]
    rates.clear()
    resume(run_dir, "--iterations", 5)
    assert rates == pytest.approx([0.002] * 8)


@GRPO_ALONE
def test_in_the_iterations_of_one_scale_groups_of_different_spread_have_advantages_of_different_size(split, resume):
    def sizes():
        buffer = grpo.SubTrajectories(*load(run_dir)["learner"]["buffer"])
        return (buffer.advantage[-16:].reshape(4, 4) ** 2).mean(1)  # the last iteration's four groups

    run_dir = split(1)
    torch.testing.assert_close(sizes(), torch.ones(4), rtol=1e-4, atol=0)
    resume(run_dir, "--one-scale", 2, "--iterations", 2)
    assert sizes().mean().item() == pytest.approx(1.0, rel=1e-4) and sizes().max() / sizes().min() > 1.5
    resume(run_dir, "--iterations", 3)  # beyond the iterations of --one-scale: Eq. 2's scales again
    torch.testing.assert_close(sizes(), torch.ones(4), rtol=1e-4, atol=0)


def test_other_flags_given_with_resume_hold_from_there_on(whole, split, resume):
    run_dir = split(1)
    flags = ("--gamma", 1.0, "--n-minibatches", 3, "--g-online", 50, "--g-eval", 60, "--seed", 7)
    resume(run_dir, "--iterations", 2, *flags)
    rows, theirs = table(run_dir), table(whole)
    assert learning_columns(run_dir)[1] == learning_columns(whole)[1]
    assert rows[2]["charts/gradient_updates"] == "11"
    assert rows[2]["rollout/return"] != theirs[2]["rollout/return"]
    assert load(run_dir)["g_eval"] == 60


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_goes_on_as_if_it_had_not_been(kills, script, resume, pretrained, tmp_path):
    run_dir, moments = tmp_path / "killed", np.random.default_rng(kills).uniform(0.0, 0.5, size=kills)
    begin = words(toy_args(script, pretrained=pretrained(), run_dir=str(run_dir), iterations=100_000))
    iteration = 0
    for moment in moments:
        flags = ["--resume", str(run_dir), "--iterations", "100000"] if iteration else begin
        process = subprocess.Popen([sys.executable, script.__file__, *flags], stdout=subprocess.DEVNULL)
        try:
            while process.poll() is None and progress(run_dir) <= iteration:
                time.sleep(0.05)
            time.sleep(moment)
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL
        reached = progress(run_dir)
        assert reached > iteration
        iteration = reached
    resume(run_dir, "--iterations", iteration + 1)
    settings = dict(iterations=iteration + 1, pretrained=pretrained(), run_dir=str(tmp_path / "whole"))
    assert_same_run(run_dir, script.main(toy_args(script, **settings)))


# ---- Evaluation alone -----------------------------------------------------------------------------------------------


def test_evaluating_a_saved_run_scores_what_its_last_row_says(script, whole, evaluate_only, monkeypatch):
    rows, scored, before = table(whole), [], content_of(whole)
    args, evaluate = script.parse_args(["--eval-only", str(whole)]), script.evaluate
    assert (args.g_eval, args.c_online, args.eval_episodes, args.threads) == (20.0, 1, 1, None)
    monkeypatch.setattr(script, "evaluate", lambda *given: scored.append(evaluate(*given)) or scored[-1])
    evaluate_only(whole, "--threads", 1)
    evaluate_only(whole / "checkpoint.pt", "--threads", 1, "--g-eval", 400)
    for name in ("return_mean", "return_std", "length_mean", "normalized_score"):
        assert repr(scored[0][f"eval/{name}"]) == rows[-1][f"eval/{name}"]
    assert scored[1]["eval/return_mean"] != scored[0]["eval/return_mean"]
    assert before == content_of(whole)


def test_a_checkpoint_of_any_script_is_evaluated_at_its_own_return(script, wholes, pretrained, evaluate_only, capsys):
    for path in (pretrained(), *map(wholes, SCRIPTS)):
        content, args = load(path), script.parse_args(["--eval-only", str(path)])
        assert (args.g_eval, args.c_online) == (content["g_eval"], content["c_online"])
        capsys.readouterr()
        evaluate_only(path, "--threads", 1, "--eval-episodes", 1)
        assert re.search(r"return_mean -?[\d,.]+", capsys.readouterr().out)


# ---- Pretraining on random data where --pretrained is left out ------------------------------------------------------


@pytest.fixture
def pretraining(monkeypatch, script, pretrained):
    """Stands in for the process that pretrains: parses its flags, writes a checkpoint, keeps count."""
    calls, real = [], subprocess.run

    def run(command, **kwargs):
        if command[0] == "git":
            return real(command, **kwargs)
        assert command[0] == sys.executable and Path(command[1]) == Path(pretrain_dt.__file__)
        calls.append(pretrain_dt.parse_args(command[2:]))  # ends the test with exit code 1 on a flag it does not know
        changed_checkpoint(pretrained(), Path(calls[-1].run_dir), iteration=calls[-1].updates)
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(script.subprocess, "run", run)
    return calls


def test_without_a_checkpoint_one_is_made_on_random_data_once_and_kept(script, pretraining):
    args = toy_args(script, c_online=None, seed=7, threads=2)
    path = script.pretrained_on_random(args)
    assert load(path)["script"] == "pretrain_dt" and len(pretraining) == 1
    made = pretraining[0]
    assert (made.env_id, made.dataset, made.seed, made.threads) == ("Hopper-v5", "random", 7, 2)
    assert (made.embed_dim, made.n_layers, made.n_heads, made.cuda) == (16, 4, 4, False)
    assert made.c_offline == made.c_online == 1 and made.bf16
    assert (made.updates, made.batch_size, made.lr, made.dataset_steps) == (900, 64, 1e-3, 30_000)
    assert script.pretrained_on_random(args) == path and len(pretraining) == 1
    assert [each.name for each in path.parent.iterdir() if each.is_dir()] == [path.name]
    script.pretrained_on_random(toy_args(script, seed=8, bf16=False, cuda=True))
    assert len(pretraining) == 2 and not pretraining[1].bf16 and pretraining[1].cuda


def test_a_run_without_a_checkpoint_takes_it_and_goes_on(script, whole, pretraining, resume, tmp_path):
    run_dir = script.main(toy_args(script, iterations=1, run_dir=str(tmp_path / "run")))
    assert len(pretraining) == 1
    resume(run_dir, "--iterations", 4)
    assert len(pretraining) == 1 and learning_columns(run_dir) == learning_columns(whole)


def test_other_seeds_sizes_and_contexts_have_checkpoints_of_their_own(script, pretraining):
    changes = [{}, {"seed": 2}, {"embed_dim": 32}, {"c_online": 5}, {"env_id": "Ant-v4"}]
    changes += [{"env_id": "AdroitHandHammer-v1", "c_online": None}]
    changes += [{"env_id": "AntMaze_UMaze-v4", "c_online": None, "dataset_kind": kind} for kind in ("umaze", "diverse")]
    paths = {script.pretrained_on_random(toy_args(script, **each)) for each in changes}
    assert len(paths) == len(pretraining) == len(changes)
    assert [made.c_online for made in pretraining] == [1, 1, 1, 5, 1, 5, 1, 5]
    assert [made.batch_size for made in pretraining] == [64, 64, 64, 9, 64, 9, 64, 9]  # about as many tokens


@pytest.mark.slow
def test_a_command_without_a_checkpoint_pretrains_and_finetunes(script, tmp_path):
    flags = words(toy_args(script, iterations=1, run_dir=str(tmp_path / "run")))
    done = subprocess.run([sys.executable, script.__file__, *flags], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert progress(tmp_path / "run") == 1
    assert len(list((tmp_path / "runs" / "pretrained").glob("*/checkpoint.pt"))) == 1


# ---- Errors ---------------------------------------------------------------------------------------------------------

REFUSED = [
    ({"env_id": "Walker2d-v5"}, ["Hopper-v5", "Walker2d-v5"]),
    ({"iterations": -1}, ["--iterations"]),
    ({"n_batch": 0}, ["--n-batch"]),
    ({"epsilon": math.nan}, ["--epsilon"]),
    ({"g_online": math.inf}, ["--g-online"]),
    ({"lr": 0.0}, ["--lr"]),
    ({"kappa_lr": -1.0}, ["--kappa-lr"]),
    ({"seed": -1}, ["--seed"]),
    ({"pretrained": "nowhere"}, ["nowhere"]),
]
REFUSED_BY_ONE = [
    (grpo, {"group_size": 1}, ["--group-size"]),
    (grpo, {"n_sources": 0}, ["--n-sources"]),
    (grpo, {"delta_r": -1.0}, ["--delta-r"]),
    (grpo, {"workers": -1}, ["--workers"]),
    (grpo, {"full_trajectories": True, "mixed_groups": True}, ["--full-trajectories", "--mixed-groups"]),
    (grpo, {"full_trajectories": True, "random_points": True}, ["--full-trajectories", "--random-points"]),
    (ppo, {"c_train": 0}, ["--c-train"]),
    (ppo, {"lr_value": math.nan}, ["--lr-value"]),
    (ppo, {"gae_lambda": 1.1}, ["--gae-lambda"]),
    (ppo, {"gae_lambda": -0.1}, ["--gae-lambda"]),
    (ppo, {"value_warmup": -1}, ["--value-warmup"]),
]
REFUSED = [(script, *each) for each in REFUSED for script in SCRIPTS] + REFUSED_BY_ONE


@pytest.mark.parametrize("script, flags, named", REFUSED, indirect=["script"])
def test_what_cannot_work_is_refused_in_a_line_before_anything_is_written(script, flags, named, split, refused):
    with refused(*named):
        split(**{"iterations": 2} | flags)
    assert not list(Path().iterdir())


def test_tracking_without_wandb_is_refused(script, split, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    with refused("--track", "wandb"):
        split(1, track=True)
    assert not (tmp_path / "split").exists()


def test_zeros_that_have_a_meaning_are_taken(split):
    rows = table(split(1, beta=0.0, weight_decay=0.0, kappa_lr=0.0, g_online=-5.0, seed=0))
    assert math.isfinite(float(rows[1]["losses/loss"])) and float(rows[1]["losses/kappa"]) == pytest.approx(0.1)


def test_a_folder_that_holds_a_run_is_refused(script, whole, pretrained, pretraining, refused):
    before = content_of(whole)
    for start in (pretrained(), None):
        with refused(str(whole), "--resume"):
            script.main(toy_args(script, pretrained=start, run_dir=str(whole)))
    assert before == content_of(whole) and not pretraining


def test_the_rows_of_a_run_whose_checkpoint_was_deleted_are_not_overwritten(script, split, refused, tmp_path):
    run_dir = split(3)
    (run_dir / "checkpoint.pt").unlink()
    before = content_of(run_dir)
    with refused(str(run_dir)):
        split(1)
    assert before == content_of(run_dir)


def test_a_folder_is_one_runs_alone_while_that_is_at_work(script, split, resume, pretrained, refused, tmp_path):
    run_dir, other = split(1), tmp_path / "new"
    begin = functools.partial(script.main, toy_args(script, pretrained=pretrained(), run_dir=str(other)))
    go_on = functools.partial(resume, run_dir, "--iterations", 2)
    for folder, start in ((run_dir, go_on), (other, begin)):
        with script.claim(folder, toy_args(script, resume=str(folder))):
            before = content_of(folder)
            with refused(str(folder)):
                start()
            assert before == content_of(folder)
    assert progress(resume(run_dir, "--iterations", 2)) == 2  # the lock went with its holder


def test_two_runs_that_were_started_at_once_do_not_share_a_folder(script, whole, refused, tmp_path):
    """The second one looked before the first one's checkpoint was there, and claims the folder after its end."""
    run_dir = tmp_path / "run"
    args = toy_args(script, run_dir=str(run_dir))
    script.choose_run_dir(args)
    run_dir.mkdir()
    (run_dir / "checkpoint.pt").write_bytes((whole / "checkpoint.pt").read_bytes())
    with refused(str(run_dir)):
        script.claim(run_dir, args)


def test_a_run_of_another_script_is_not_resumed(script, wholes, pretrained, refused):
    with refused("pretrain_dt.py"):
        script.parse_args(["--resume", pretrained()])
    for other in SCRIPTS:
        if other is not script:
            with refused(f"{other.__name__}.py"):
                script.parse_args(["--resume", str(wholes(other))])


# A value other than the toy's for each flag that the saved state hangs on.
CHANGED = {"env_id": "Ant-v4", "pretrained": "other", "dataset_kind": "expert", "embed_dim": "32", "c_online": "5"}
CHANGED |= {"l_traj": "9", "kappa_initial": "0.5", "run_dir": "other", "hindsight": "", "full_trajectories": ""}
CHANGED |= {
    "mixed_groups": "",
    "ratio": "token",
    "random_points": "",
    "value_dim": "9",
    "value_norm": "True",
    "small": "",
}


def test_resuming_refuses_what_the_saved_state_hangs_on(script, whole, resume, refused):
    for name in CHANGED.keys() & vars(script.Args()).keys():
        flag = "--" + name.replace("_", "-")
        with refused(flag, str(whole)):
            script.parse_args(["--resume", str(whole), flag, *CHANGED[name].split()])
    for flag in ("--env-id Ant-v4", "--c-online 5"):
        with refused(flag.split()[0], str(whole)):
            script.parse_args(["--eval-only", str(whole), *flag.split()])
    with refused("--eval-only"):
        script.parse_args(["--resume", str(whole), "--eval-only", str(whole)])
    with refused("--iterations", str(whole)):
        resume(whole, "--iterations", 3)
    assert progress(whole) == len(table(whole)) - 1 == 4


def test_every_flag_that_may_not_change_is_tried_above():
    fields = {name for script in SCRIPTS for name in vars(script.Args())}
    fixed = {name for script in SCRIPTS for name in script.FIXED}
    assert fixed & fields <= CHANGED.keys()


def test_a_damaged_checkpoint_is_refused(script, whole, refused, tmp_path):
    good, path = (whole / "checkpoint.pt").read_bytes(), tmp_path / "damaged.pt"
    weights = load(whole)["weights"]["mean_head.weight"].numpy().tobytes()
    flipped = bytearray(good)
    flipped[good.index(weights) + 5] ^= 1  # torch would read it without a word
    for content in (bytes(flipped), good[: len(good) // 2], good[:-1], b"", b"# no checkpoint"):
        path.write_bytes(content)
        with refused(str(path)):
            script.load_checkpoint(path)
    for content in ({"weights": 3}, [1, 2], torch.zeros(3), load(whole)["weights"]):
        torch.save(content, path)
        with refused(str(path)):
            script.load_checkpoint(path)
    path.write_bytes(good)
    assert script.load_checkpoint(path)["iteration"] == 4


def test_a_run_of_an_older_version_is_not_resumed(script, whole, refused, tmp_path):
    content = load(whole)
    del content["rows"]
    torch.save(content, tmp_path / "checkpoint.pt")
    with refused(str(tmp_path)):
        script.parse_args(["--resume", str(tmp_path)])


@pytest.mark.parametrize("changed", [{"kind": "reinformer"}, {"embed_dim": 32}, {"width": 3}], ids=str)
def test_a_network_of_another_kind_or_size_is_refused(changed, split, pretrained, refused, tmp_path):
    sizes = load(pretrained())["sizes"] | changed
    path = changed_checkpoint(pretrained(), tmp_path / "other", sizes=sizes)
    with refused(*map(str, changed.values())):
        split(1, pretrained=str(path))
    assert not (tmp_path / "split").exists()


@pytest.mark.parametrize("flag", ["--resume", "--eval-only"])
def test_a_module_that_a_checkpoint_names_is_imported_only_if_the_command_names_it_too(
    flag, script, whole, evaluate_only, refused, tmp_path, monkeypatch
):
    (tmp_path / "own_task.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    name, saved = "own_task:Cart-v0", load(whole)["args"]
    path = str(changed_checkpoint(whole, tmp_path / "run", env_id=name, args=saved | {"env_id": name}))
    for given in ([], ["--env-id", "Hopper-v5"], ["--env-id", "own_task:Other-v0"]):
        with refused("--env-id", name):
            script.parse_args([flag, path, *given])
    args = script.parse_args([flag, path, "--env-id", name])
    assert args.env_id == name
    with refused(name):  # it cannot be imported
        script.main(args) if flag == "--resume" else evaluate_only(path, "--env-id", name)


def test_no_module_that_the_checkpoints_arguments_name_is_imported_unasked(whole, evaluate_only, tmp_path, monkeypatch):
    (tmp_path / "own_task.py").write_text("from pathlib import Path\nPath('imported').touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    saved = load(whole)["args"] | {"env_id": "own_task:Hopper-v5"}
    path = changed_checkpoint(whole, tmp_path / "run", args=saved)
    with contextlib.suppress(SystemExit):
        evaluate_only(path, "--threads", 1)
    assert not Path("imported").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(script, split, resume, refused):
    run_dir, real = split(1), torch.nn.utils.clip_grad_norm_
    with mock.patch.object(torch.nn.utils, "clip_grad_norm_", lambda *given: real(*given) * math.nan), refused():
        resume(run_dir, "--iterations", 2)
    assert progress(run_dir) == 1 and len(table(run_dir)) == 2


def test_the_command_prints_one_line_on_stderr_and_exits_with_1(script, whole):
    command = [sys.executable, script.__file__, "--resume", str(whole), "--c-online", "9"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"error: [^\n]*--c-online[^\n]*\n", done.stderr), done.stderr


# ---- What only one script has ---------------------------------------------------------------------------------------


@GRPO_ALONE
def test_environment_steps_are_those_of_full_trajectories_and_sub_trajectories(whole):
    rows, content = table(whole), load(whole)
    lengths = [len(each[5]) for each in content["replay"]]
    assert len(lengths) == 2 + 1 + 1 + 1  # departure (8)
    before = 0.0
    for i, row in enumerate(rows[1:], 1):
        own = lengths[:2] if i == 1 else lengths[i : i + 1]
        assert float(row["rollout/length"]) == np.mean(own)
        steps = float(row["charts/env_steps"]) - before - sum(own)
        assert 16 * 4 < steps <= 16 * 12  # L_traj and L_eval
        before = float(row["charts/env_steps"])
    kept = sum(round(16 * float(row["rollout/kept"])) for row in rows[1:])
    assert len(content["learner"]["buffer"][0]) == min(40, kept)


@PPO_ALONE
def test_environment_steps_are_those_of_full_trajectories(whole):
    rows = table(whole)[1:]
    steps = np.cumsum([2 * float(row["rollout/length"]) for row in rows])
    assert [float(row["charts/env_steps"]) for row in rows] == steps.tolist()
    lengths = [len(each[5]) for each in load(whole)["learner"]["replay"]]  # of the last two iterations
    assert [np.mean(lengths[:2]), np.mean(lengths[2:])] == [float(row["rollout/length"]) for row in rows[2:]]


ABLATIONS = [{name: True} for name in ("hindsight", "full_trajectories", "mixed_groups", "random_points")]
ABLATIONS += [{"ratio": kind} for kind in ("token", "geometric")]


@GRPO_ALONE
@pytest.mark.parametrize("flag", ABLATIONS, ids=lambda flag: "-".join(map(str, *flag.items())))
def test_every_ablation_runs_and_changes_what_is_learned(flag, whole, split, resume):
    full = "full_trajectories" in flag
    sizes = dict(n_sources=1, n_batch=2, n_minibatches=2, l_traj=None, l_eval=None) if full else {}
    run_dir = split(1, **sizes, **flag)
    (first, row), (first_plain, plain, *_) = table(run_dir), table(whole)
    assert all(math.isfinite(float(value)) for name, value in row.items() if name.startswith("losses/"))
    assert row["losses/loss"] != plain["losses/loss"] and first["eval/return_mean"] == first_plain["eval/return_mean"]
    assert (abs(float(row["losses/ratio_first"]) - 1.0) > 1e-4) == ("hindsight" in flag)
    assert (row["rollout/return"] == plain["rollout/return"]) == (not full)
    other_points = full or "mixed_groups" in flag or "random_points" in flag
    assert (row["rollout/sub_score"] != plain["rollout/sub_score"]) == other_points
    if "hindsight" in flag:  # on to the time limit
        assert float(row["charts/env_steps"]) > float(plain["charts/env_steps"])
    if full:
        args = load(run_dir)["args"]
        assert (args["l_traj"], args["l_eval"], row["rollout/ended_early"]) == (1000, 0, "1.0")
        resume(run_dir, "--iterations", 2)


@PPO_ALONE
def test_hindsight_runs_and_its_first_ratio_is_off(whole, split):
    row, plain = table(split(1, hindsight=True))[1], table(whole)[1]
    assert abs(float(row["losses/ratio_first"]) - 1.0) > 1e-4
    assert row["losses/loss"] != plain["losses/loss"] and row["rollout/return"] == plain["rollout/return"]


@GRPO_ALONE
def test_a_run_of_full_trajectories_is_evaluated_as_well(split, evaluate_only, capsys):
    flags = dict(n_sources=1, n_batch=2, n_minibatches=2, l_traj=None, l_eval=None)
    run_dir = split(1, full_trajectories=True, **flags)
    evaluate_only(run_dir, "--threads", 1)
    assert f"return_mean {float(table(run_dir)[1]['eval/return_mean']):,.1f}" in capsys.readouterr().out


@GRPO_ALONE
def test_no_workers_and_two_give_the_same_run(whole, split):
    assert learning_columns(split(2, workers=2)) == learning_columns(whole)[:3]


@GRPO_ALONE
def test_the_replay_keeps_the_last_full_trajectories(whole, split):
    replays = [load(run_dir)["replay"] for run_dir in (whole, split(2, replay_size=2))]
    ours, theirs = flat(replays[1]), flat(replays[0][1:3])
    assert len(replays[1]) == 2 and ours == theirs


@GRPO_ALONE
def test_an_evaluation_length_of_zero_and_another_group_size_are_taken(split, resume):
    run_dir = split(1, l_eval=0)
    resume(run_dir, "--iterations", 2, "--group-size", 8)
    rows = table(run_dir)
    assert all(math.isfinite(float(row["losses/loss"])) for row in rows[1:])
    sub_steps = (
        float(rows[2]["charts/env_steps"]) - float(rows[1]["charts/env_steps"]) - float(rows[2]["rollout/length"])
    )
    assert 16 * 4 < sub_steps <= 32 * 4


@GRPO_ALONE
def test_where_nothing_is_kept_no_update_is_made_and_the_run_goes_on(script, split, resume, pretrained, tmp_path):
    run_dir = split(1, delta_r=1e9)
    resume(run_dir, "--iterations", 2)
    rows = table(run_dir)
    assert all(row["charts/gradient_updates"] == "0" and row["rollout/kept"] == "0.0" for row in rows[1:])
    assert not any(name.startswith("losses/") for name in rows[0])
    before, after = load(pretrained())["weights"], load(run_dir)["weights"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    flags = dict(pretrained=pretrained(), delta_r=1e9, iterations=2, run_dir=str(tmp_path / "whole"))
    assert_same_run(run_dir, script.main(toy_args(script, **flags)))
    resume(run_dir, "--iterations", 3, "--delta-r", 0)
    assert math.isfinite(float(table(run_dir)[3]["losses/loss"])) and table(run_dir)[2]["losses/loss"] == ""


@GRPO_ALONE
def test_a_simulation_that_becomes_unstable_stops_the_run_and_keeps_the_checkpoint(
    whole, split, resume, refused, monkeypatch
):
    def thrown(policy, sims, members, args, rng):
        source, h = members[0]
        return groups(policy, sims, [(source._replace(snapshots=source.snapshots + 1e12), h), *members[1:]], args, rng)

    groups, run_dir = grpo.rollout_groups, split(1)
    monkeypatch.setattr(grpo, "rollout_groups", thrown)
    with refused("--seed"):
        resume(run_dir, "--iterations", 4)
    assert progress(run_dir) == 1
    monkeypatch.setattr(grpo, "rollout_groups", groups)
    resume(run_dir, "--iterations", 4)
    assert_same_run(run_dir, whole)


@PPO_ALONE
def test_a_reward_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(whole, split, resume, refused, monkeypatch):
    def nan(env, action):
        observation, _, *rest = step(env, action)
        return observation, math.nan, *rest

    step, run_dir = ppo.D4RLRules.step, split(1)
    monkeypatch.setattr(ppo.D4RLRules, "step", nan)
    with refused("--seed"):
        resume(run_dir, "--iterations", 4)
    assert progress(run_dir) == 1
    monkeypatch.setattr(ppo.D4RLRules, "step", step)
    resume(run_dir, "--iterations", 4)
    assert_same_run(run_dir, whole)


@GRPO_ALONE
@pytest.mark.parametrize("env_id", ["Pendulum-v1", "PointMaze_UMaze-v3", "CartPole-v1", "Nothing-v0"])
def test_what_cannot_be_reset_to_a_state_is_refused_before_pretraining(env_id, script, pretraining, refused):
    with refused(env_id):
        script.main(toy_args(script, env_id=env_id))
    assert not pretraining and not list(Path().iterdir())
