"""Whole runs of q_guided_grpo_dt.py at toy size, and what it refuses."""

import csv
import functools
import math
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Normal

import pretrain_dt
import q_guided_grpo_dt as q_guided
from q_guided_grpo_dt import (
    Args,
    QGuidedLearner,
    load_checkpoint,
    main,
    parse_args,
    read_data,
)

SIZES = dict(embed_dim=16, n_layers=2, n_heads=2)


def toy_args(**changes):
    """The learning rates are high, so that a few updates leave a mark on every weight."""
    toy = dict(env_id="Hopper-v5", iterations=2, n_trajectories=2, replay_size=4, n_sources=3, n_points=2, gamma=0.9)
    toy |= dict(group_size=4, buffer_size=40, delta_r=0.0, g_online=3.0, c_online=1, n_batch=8, epsilon=0.2, lr=1e-2)
    toy |= dict(kappa_initial=0.1, critic_warmup=6, critic_updates=5, critic_batch=16, critic_dim=8, critic_norm=False)
    toy |= dict(lr_critic=1e-2, policy_delay=2, tau=0.1, reward_divisor=1.0, embed_dim=16, reference_every=3)
    toy |= dict(eval_episodes=1, eval_every=1, cuda=False, threads=1)
    return Args(**(toy | changes))


def refused(match):
    """The block ends with `error: ...` on one line, which Python prints on stderr with exit code 1."""
    return pytest.raises(SystemExit, match=rf"\Aerror: [^\n]*{match}[^\n]*\Z")


@torch.no_grad()
def law(model, window, seen):
    """The law of u (A,) at the last step of a window (K, ...), from the steps `seen` of it alone, without padding. The
    last action is not read, whatever it is."""
    observations, returns, actions = (torch.as_tensor(np.array(field))[seen] for field in window[:3])
    actions = torch.cat([actions[:-1], torch.full_like(actions[-1:], torch.nan)])
    window = [field[None].float() for field in (observations, returns, actions)]
    dist = model(*window, torch.ones(1, len(returns), dtype=torch.bool))
    return Normal(dist.mean[0].double(), dist.stddev[0].double())


def test_the_data_that_pretraining_kept_are_those_that_are_read(pretrained):
    folder = Path(pretrained())
    data, fingerprint = read_data(load_checkpoint(folder), toy_args(pretrained=str(folder)))
    kept = np.load(folder / "data.npz")
    assert data.usable.sum() == len(kept["rewards"]) - (~kept["terminated"]).sum()
    assert fingerprint == load_checkpoint(folder)["fingerprint"]
    again, _ = read_data({}, toy_args(pretrained=str(folder / "checkpoint.pt")))
    assert all(map(torch.equal, data, again))


# ---- Runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """pretrained(env_id): a run folder of pretrain_dt.py --save-data on a few random episodes, made once."""

    @functools.cache
    def make(env_id="Hopper-v5"):
        torch.set_num_threads(1)
        steps = {"AntMaze_UMaze-v4": 800, "AdroitHandHammer-v1": 450}.get(env_id, 300)
        toy = dict(dataset_steps=steps, batch_size=8, c_offline=5, updates=4, warmup=1, lr=1e-2, eval_episodes=1)
        run_dir = tmp_path_factory.mktemp("pretrained") / "run"
        toy |= dict(env_id=env_id, run_dir=str(run_dir), cuda=False, threads=1, save_data=True)
        return str(pretrain_dt.main(pretrain_dt.Args(**(toy | SIZES))))

    return make


def table(run_dir):
    with open(run_dir / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def learning_columns(run_dir):
    """metrics.csv as text, without the columns that measure time."""
    return [{name: value for name, value in row.items() if "time/" not in name} for row in table(run_dir)]


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
    ours, theirs = (flat(load_checkpoint(run_dir)) for run_dir in (one, other))
    differing = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
    assert [key for key in differing if not re.match(r"/rows/\d+/time/", key)] == ["/args/run_dir"]


def resume(run_dir, *flags):
    return main(parse_args(["--resume", str(run_dir), *map(str, flags)]))


@pytest.fixture(scope="session")
def whole(pretrained, tmp_path_factory):
    """The folder of a run of 4 iterations in one go, at a context of 3; not to be changed."""
    run_dir = str(tmp_path_factory.mktemp("whole") / "run")
    return main(toy_args(iterations=4, c_online=3, pretrained=pretrained(), run_dir=run_dir))


def test_a_run_writes_its_metrics_and_learns(whole, pretrained):
    rows = table(whole)
    assert [row["iteration"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert rows[0]["eval/return_mean"] != "" and rows[0]["rollout/return"] == ""
    assert all(value != "" and math.isfinite(float(value)) for row in rows[1:] for value in row.values())
    assert float(rows[1]["losses/ratio_first"]) == pytest.approx(1.0, abs=1e-4)
    counts = [3, 2, 2, 2]  # the first iteration rolls out as many as it draws
    for i, row in enumerate(rows[1:], 1):
        steps = sum(count * float(each["rollout/length"]) for count, each in zip(counts, rows[1 : i + 1]))
        assert float(row["charts/env_steps"]) == pytest.approx(steps)
        assert int(row["charts/gradient_updates"]) == 8 * i and int(row["charts/critic_updates"]) == 6 + 5 * i
        assert float(row["rollout/kept"]) == 1.0
        assert float(row["time/critic"]) < float(row["time/update"]) < float(row["time/iteration"])
    before, after = load_checkpoint(pretrained())["weights"], load_checkpoint(whole)["weights"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(before) - {"obs_mean", "obs_std", "return_scale"}


def test_a_checkpoint_holds_what_was_rolled_out_but_not_the_offline_data(whole):
    content = load_checkpoint(whole)
    learner, steps = content["learner"], content["env_steps"]
    rewards, usable = learner["online"][4], learner["online"][6]
    assert usable.sum() == steps and len(rewards) == steps + 3 * (3 + 2 + 2 + 2)  # a context of 3: K slots each
    assert len(content["replay"]) == 4 and len(learner["buffer"][0]) == 40
    assert learner["critic_updates"] == 6 + 4 * 5 and content["script"] == "q_guided_grpo_dt"


@pytest.mark.parametrize("env_id, context", [("Pendulum-v1", 1), ("AdroitHandHammer-v1", 5)])
def test_finetuning_runs_on_other_tasks(env_id, context, pretrained, tmp_path, capsys):
    flags = dict(env_id=env_id, iterations=1, pretrained=pretrained(env_id), run_dir=str(tmp_path / "run"))
    flags |= dict(c_online=None, gamma=None, critic_norm=None, reward_divisor=None, g_online=None)
    run_dir = main(toy_args(**flags, n_trajectories=1, n_sources=1))
    content, rows = load_checkpoint(run_dir), table(run_dir)
    hammer = env_id == "AdroitHandHammer-v1"
    assert content["c_online"] == context
    assert (content["args"]["critic_norm"], content["args"]["reward_divisor"]) == (hammer, 1000.0 if hammer else 1.0)
    assert float(rows[1]["losses/ratio_first"]) == pytest.approx(1.0, abs=1e-4)
    losses = ("critic_loss", "q_mean", "q_gap", "target_mean")
    assert all(math.isfinite(float(rows[1][f"losses/{name}"])) for name in losses)
    assert ("eval/normalized_score" in rows[1]) == hammer
    printed = capsys.readouterr().out
    assert " 1/1 " in printed and f"checkpoint: {run_dir}" in printed


class Aim(gym.Env):
    """One action per episode: the reward is minus its squared distance from a mark that the observation tells."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gym.spaces.Box(-2.0, 2.0, (1,), np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.seen = self.np_random.uniform(-0.5, 0.5, size=2).astype(np.float32)
        return self.seen, {}

    def step(self, action):
        return self.seen, -float((action[0] / 2 - self.seen[0]) ** 2), True, False, {}


def test_where_the_critic_can_be_exact_the_policy_learns_the_task(tmp_path):
    gym.register("Aim-v0", Aim, max_episode_steps=5)
    flags = dict(env_id="Aim-v0", dataset_steps=1000, updates=4, c_offline=1, eval_episodes=1, threads=1, **SIZES)
    start = pretrain_dt.main(pretrain_dt.Args(**flags, save_data=True, run_dir=str(tmp_path / "start")))
    flags = dict(env_id="Aim-v0", pretrained=str(start), iterations=8, eval_every=8, eval_episodes=20, g_online=0.0)
    flags |= dict(n_sources=8, replay_size=8, n_points=1, group_size=8, n_batch=64, buffer_size=256, lr=1e-2)
    flags |= dict(critic_warmup=200, critic_updates=10, critic_batch=64, critic_dim=32, n_trajectories=8)
    first, *_, last = table(main(toy_args(**flags, run_dir=str(tmp_path / "run"))))
    before, after = float(first["eval/return_mean"]), float(last["eval/return_mean"])
    assert before < -0.05 and after > 0.3 * before, (before, after)
    assert float(last["losses/critic_loss"]) < 0.05


@pytest.mark.slow
def test_on_pendulum_the_return_rises(tmp_path):
    flags = dict(env_id="Pendulum-v1", dataset_steps=4000, updates=100, batch_size=64, lr=3e-3, c_offline=1)
    flags |= dict(embed_dim=32, n_layers=2, n_heads=2, eval_episodes=1, threads=1, save_data=True)
    start = pretrain_dt.main(pretrain_dt.Args(**flags, run_dir=str(tmp_path / "start")))
    flags = dict(env_id="Pendulum-v1", pretrained=str(start), iterations=30, eval_every=30, eval_episodes=10, lr=3e-3)
    flags |= dict(n_minibatches=20, n_batch=128, buffer_size=512, gamma=0.95, threads=1)
    flags |= dict(critic_warmup=1000, critic_updates=200, critic_batch=128, critic_dim=64, tau=0.02)
    first, *_, last = table(main(Args(**flags, run_dir=str(tmp_path / "run"))))
    assert float(last["eval/return_mean"]) > float(first["eval/return_mean"]) + 500


def test_another_seed_gives_another_run(whole, pretrained, tmp_path):
    flags = dict(iterations=1, c_online=3, pretrained=pretrained(), run_dir=str(tmp_path / "other"), seed=2)
    other = main(toy_args(**flags))
    assert table(other)[1]["losses/loss"] != table(whole)[1]["losses/loss"]
    assert table(other)[1]["losses/critic_loss"] != table(whole)[1]["losses/critic_loss"]


def test_a_resumed_run_equals_one_that_never_stopped(whole, pretrained, tmp_path):
    """Which also says that the same seed gives the same run."""
    run_dir = main(toy_args(iterations=1, c_online=3, pretrained=pretrained(), run_dir=str(tmp_path / "split")))
    for iterations in (3, 4):
        resume(run_dir, "--iterations", iterations)
    assert_same_run(run_dir, whole)


def test_a_run_stopped_in_its_first_iteration_keeps_the_warmed_up_critic(whole, pretrained, tmp_path, monkeypatch):
    flags = dict(iterations=4, c_online=3, pretrained=pretrained(), run_dir=str(tmp_path / "run"))

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(q_guided, "collect", interrupt)
        main(toy_args(**flags))
    content = load_checkpoint(tmp_path / "run")
    assert (content["iteration"], content["learner"]["critic_updates"]) == (0, 6)
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_rates_given_with_resume_hold_from_there_on(pretrained, tmp_path, monkeypatch):
    run_dir = main(toy_args(iterations=1, pretrained=pretrained(), run_dir=str(tmp_path / "run")))
    learners = []
    load_state = QGuidedLearner.load_state
    monkeypatch.setattr(
        QGuidedLearner, "load_state", lambda self, state: learners.append(self) or load_state(self, state)
    )
    resume(run_dir, "--iterations", 2, "--lr", 1e-3, "--lr-critic", 1e-4, "--kappa-lr", 0.5)
    (learner,) = learners
    optimizers = (learner.optimizer, learner.critic_optimizer, learner.dual)
    assert [each.param_groups[0]["lr"] for each in optimizers] == [1e-3, 1e-4, 0.5]


def test_where_nothing_is_kept_no_update_is_made_and_the_run_goes_on(pretrained, tmp_path):
    flags = dict(iterations=1, pretrained=pretrained(), run_dir=str(tmp_path / "run"), delta_r=1e6)
    row = table(main(toy_args(**flags)))[1]
    assert float(row["rollout/kept"]) == 0.0 and row["charts/gradient_updates"] == "0" and "losses/loss" not in row
    (row,) = [row for row in table(resume(tmp_path / "run", "--iterations", 2)) if row["iteration"] == "2"]
    assert row["charts/gradient_updates"] == "0" and float(row["losses/critic_loss"]) > 0


@pytest.mark.parametrize("script", [pretrain_dt, q_guided], ids=lambda script: script.__name__)
def test_evaluating_a_saved_run_scores_what_its_last_row_says(script, whole, capsys):
    before = sorted(whole.iterdir())
    script.eval_only(script.parse_args(["--eval-only", str(whole)]), script.Environments)
    printed = re.search(r"evaluation: return_mean ([-\d.,]+), ", capsys.readouterr().out)[1]
    assert printed == f"{float(table(whole)[-1]['eval/return_mean']):,.1f}"
    assert sorted(whole.iterdir()) == before


def test_without_a_checkpoint_the_run_remembers_which_one_was_made(whole, pretrained, tmp_path, monkeypatch):
    """Its data are needed again when the run goes on."""
    monkeypatch.setattr(q_guided, "pretrained_on_random", lambda args: Path(pretrained()))
    run_dir = main(toy_args(iterations=1, c_online=3, run_dir=str(tmp_path / "run")))
    assert load_checkpoint(run_dir)["args"]["pretrained"] == pretrained()
    monkeypatch.setattr(q_guided, "pretrained_on_random", None)
    resume(run_dir, "--iterations", 4)
    assert_same_run(run_dir, whole)


def draw_data(lengths, terminated, seed=0, obs_dim=11, act_dim=3):
    """What pretrain_dt.py --save-data keeps, of trajectories of these lengths."""
    rng, total = np.random.default_rng(seed), sum(lengths)
    rewards = rng.normal(size=total)
    pieces = np.split(rewards, np.cumsum(lengths)[:-1])
    return dict(
        observations=rng.normal(size=(total, obs_dim)).astype(np.float32),
        actions=rng.uniform(-0.9, 0.9, size=(total, act_dim)).astype(np.float32),
        rewards=rewards.astype(np.float32),
        returns=np.concatenate([piece[::-1].cumsum()[::-1] for piece in pieces]).astype(np.float32),
        lengths=np.array(lengths),
        terminated=np.array(terminated),
    )


def read_back(folder, data, base=None, **changes):
    folder.mkdir(exist_ok=True)
    np.savez(folder / "data.npz", **data)
    return read_data(base or {}, toy_args(pretrained=str(folder), **changes))


# ---- Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, match",
    [
        ({"env_id": "Walker2d-v5"}, "was pretrained in Hopper-v5, not in Walker2d-v5"),
        ({"group_size": 1}, "--group-size is 1: an advantage is relative to a group"),
        ({"critic_updates": 0}, "--critic-updates is 0: give a finite number above 0"),
        ({"lr_critic": math.nan}, "--lr-critic is nan"),
        ({"tau": -0.1}, "--tau is -0.1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_in_a_line_before_anything_is_written(flags, match, pretrained, tmp_path):
    with refused(match):
        main(toy_args(pretrained=pretrained(), run_dir=str(tmp_path / "run"), **flags))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def start(pretrained, tmp_path):
    """A copy of a pretrained run, to be harmed."""
    folder = tmp_path / "start"
    folder.mkdir()
    for name in ("checkpoint.pt", "data.npz"):
        (folder / name).write_bytes((Path(pretrained()) / name).read_bytes())
    return folder


@pytest.mark.parametrize("given", ["start", "start/checkpoint.pt"])
def test_without_the_data_the_line_names_the_command_that_writes_them(given, start, tmp_path):
    (start / "data.npz").unlink()
    with refused(
        f"{re.escape(str(start))}/data.npz .*python pretrain_dt.py --resume {re.escape(str(start))} --save-data"
    ):
        main(toy_args(pretrained=str(tmp_path / given), run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_that_command_writes_the_data_without_an_update(start, pretrained, tmp_path):
    (start / "data.npz").unlink()
    pretrain_dt.main(pretrain_dt.parse_args(["--resume", str(start), "--save-data"]))
    assert read_data({}, toy_args(pretrained=str(start)))[1] == read_data({}, toy_args(pretrained=pretrained()))[1]


@pytest.mark.parametrize("harm", ["cut", "text", "lacks", "foreign"])
def test_damaged_data_are_refused(harm, start, tmp_path):
    path = start / "data.npz"
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif harm == "text":
        path.write_text("observations\n")
    else:
        data = dict(np.load(path))
        data.pop("lengths")
        np.savez(path, **data | ({} if harm == "lacks" else {"other": np.zeros(3)}))
    with refused("data.npz is damaged: write it again, python pretrain_dt.py --resume"):
        main(toy_args(pretrained=str(start), run_dir=str(tmp_path / "run")))


def test_data_of_another_run_are_refused(start, pretrained, tmp_path):
    np.savez(start / "data.npz", **draw_data([30, 20], [True, False]))
    with refused(f"{re.escape(str(start))}/data.npz is not what .* learned from"):
        main(toy_args(pretrained=str(start), run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_resuming_refuses_data_that_changed(start, tmp_path):
    run_dir = main(toy_args(iterations=1, pretrained=str(start), run_dir=str(tmp_path / "run")))
    np.savez(start / "data.npz", **draw_data([30, 20], [True, False]))
    with refused("data.npz is not what .*run learned from"):
        resume(run_dir, "--iterations", 2)


def test_data_without_a_transition_are_refused(tmp_path):
    with refused("has no transition whose next state is known"):
        read_back(tmp_path / "run", draw_data([1, 1], [False, False]))


@pytest.mark.parametrize(
    "flag", ["--critic-dim 9", "--critic-norm True", "--reward-divisor 5", "--pretrained elsewhere"]
)
def test_resuming_refuses_what_the_saved_state_hangs_on(flag, whole):
    with refused(f"was made with {flag.split()[0]} "):
        parse_args(["--resume", str(whole), *flag.split()])


def test_the_command_prints_one_line_on_stderr_and_exits_with_1(whole):
    command = [sys.executable, q_guided.__file__, "--resume", str(whole), "--critic-dim", "9"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"error: [^\n]*--critic-dim[^\n]*\n", done.stderr), done.stderr
