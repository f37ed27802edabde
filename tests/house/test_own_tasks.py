"""Tasks of one's own through all four scripts: the faults that real ones have, and --env-kwargs."""

import json
import re
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import grpo_dt_continuous as grpo
import ppo_dt_continuous as ppo
import pretrain_dt
import q_guided_grpo_dt as q_guided

FINETUNING = pytest.mark.parametrize("script", [grpo, ppo, q_guided], ids=lambda script: script.__name__)
TOY = "--eval-episodes 1 --no-cuda --threads 1 "
PRETRAIN = TOY + "--dataset-steps 60 --embed-dim 16 --n-layers 1 --n-heads 1 --batch-size 8 --updates 2 --log-every 2 "
PRETRAIN += "--c-offline 2 --save-data "
FINETUNE = TOY + "--iterations 1 --n-batch 4 --n-minibatches 1 --eval-every 1 --n-trajectories 1 --g-online 3 "
GROUPS = "--n-sources 1 --n-points 2 --group-size 2 --delta-r 0 "
OWN = {
    grpo: GROUPS + "--l-traj 3 --l-eval 3 --workers 0",
    ppo: "--value-dim 8 --value-warmup 1",
    q_guided: GROUPS + "--critic-warmup 1 --critic-updates 1 --critic-batch 8 --critic-dim 8",
}
PLAYERS = {grpo: grpo.Simulators, ppo: ppo.Environments, q_guided: ppo.Environments}


def run(script, words, *more):
    """What the command line does, in this process."""
    args = script.parse_args([*words.split(), *map(str, more)])
    return script.eval_only(args, PLAYERS[script]) if args.eval_only else script.main(args)


def pretrain(folder, env_id, *more):
    return run(pretrain_dt, PRETRAIN, "--env-id", env_id, "--run-dir", folder, *more)


def finetune(script, pretrained, folder, env_id, *more):
    words = FINETUNE + OWN[script]
    return run(script, words, "--env-id", env_id, "--pretrained", pretrained, "--run-dir", folder, *more)


# ---- Faults ---------------------------------------------------------------------------------------------------------


class Faulty(gym.Env):
    """A point on a line with the faults of real tasks: no render_mode, a seed for a generator of 32 bits, whole numbers
    at reset, its own buffer as the observation, a reward (1,), a place among the info that is an array, an action that
    can't move; it insists on its action space, and writes into its action."""

    observation_space = gym.spaces.Box(-10.0, 10.0, (2,), np.float32)
    action_space = gym.spaces.Box(np.float32([-1.0, 0.5]), np.float32([1.0, 0.5]))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            np.random.seed(seed)
        self.place = np.zeros(2, np.float32)
        self.place[0] = np.random.randint(-3, 4)
        return self.place.astype(int), {}

    def step(self, action):
        assert self.action_space.contains(action), (action, action.dtype)
        self.place += 0.1 * action
        action[:] = 9.0
        return self.place, -np.abs(self.place).sum(keepdims=True), False, False, {"x_position": self.place[:1]}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """The id, and the folder of what was pretrained on it."""
    gym.register("Faulty-v0", Faulty, max_episode_steps=20)
    yield "Faulty-v0", pretrain(tmp_path_factory.mktemp("faulty") / "run", "Faulty-v0")
    del gym.registry["Faulty-v0"]


def test_the_data_of_a_faulty_task_are_what_it_showed(faulty):
    data = np.load(faulty[1] / "data.npz")
    observations, actions = (data[name].reshape(3, 20, 2) for name in ("observations", "actions"))
    assert (observations[:, 0] == observations[:, 0].round()).all()
    moved = 0.1 * np.stack([actions[..., 0], np.full((3, 20), 0.5)], axis=2)
    following = observations + moved
    np.testing.assert_allclose(observations[:, 1:], following[:, :-1], rtol=0, atol=1e-5)
    np.testing.assert_allclose(data["rewards"].reshape(3, 20), -np.abs(following).sum(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("script", [ppo, q_guided], ids=lambda script: script.__name__)
def test_a_faulty_task_is_learned_on(script, faulty, tmp_path):
    env_id, pretrained = faulty
    content = script.load_checkpoint(finetune(script, pretrained, tmp_path / "run", env_id))
    replay = [[field.numpy() for field in each] for each in content.get("replay", content["learner"].get("replay"))]
    trajectory = script.Trajectory(*replay[0][:9])
    states = np.vstack([trajectory.observations, trajectory.last_observation])
    np.testing.assert_allclose(trajectory.rewards, -np.abs(states[1:]).sum(1), rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.diff(states[:, 0]), 0.1 * trajectory.actions[:, 0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.diff(states[:, 1]), 0.05, rtol=0, atol=1e-5)


def test_a_faulty_task_without_a_simulator_is_one_line_in_grpo(faulty, tmp_path, refused):
    with refused("Faulty-v0", "ppo_dt_continuous.py"):
        finetune(grpo, faulty[1], tmp_path / "run", "Faulty-v0")
    assert not (tmp_path / "run").exists()


# ---- --env-kwargs ---------------------------------------------------------------------------------------------------

KWARGS = {"exclude_current_positions_from_observation": False, "healthy_reward": 2.0, "max_episode_steps": 20}


@pytest.fixture(scope="module")
def positions(tmp_path_factory):
    """Pretrained on a Hopper that sees where it is."""
    return pretrain(tmp_path_factory.mktemp("positions") / "run", "Hopper-v5", "--env-kwargs", json.dumps(KWARGS))


def test_pretraining_plays_with_the_arguments_and_keeps_them(positions, refused):
    content = pretrain_dt.load_checkpoint(positions)
    assert content["env_kwargs"] == KWARGS and content["sizes"]["obs_dim"] == 12
    data = np.load(positions / "data.npz")
    assert max(data["lengths"]) <= 20 and 1.5 < data["rewards"].mean() < 2.5
    with refused("--env-kwargs", "healthy_reward"):
        run(pretrain_dt, "", "--env-kwargs", '{"healthy_reward": 1.0}', "--resume", positions)


@FINETUNING
def test_finetuning_takes_the_checkpoints_arguments_and_refuses_others(script, positions, tmp_path, refused, capsys):
    folder = finetune(script, positions, tmp_path / "run", "Hopper-v5")
    content = script.load_checkpoint(folder)
    assert content["env_kwargs"] == KWARGS and content["sizes"]["obs_dim"] == 12
    assert content["rows"][0]["eval/length_mean"] <= 20
    assert content["rows"][0]["eval/return_mean"] > 1.5 * content["rows"][0]["eval/length_mean"]
    other = ["--env-kwargs", '{"healthy_reward": 1.0}']
    with refused("--env-kwargs", "healthy_reward"):
        finetune(script, positions, tmp_path / "other", "Hopper-v5", *other)
    for how in ("--resume", "--eval-only"):
        with refused("--env-kwargs", "healthy_reward"):
            run(script, "", how, folder, *other)
    assert not (tmp_path / "other").exists()
    capsys.readouterr()
    run(script, "", "--eval-only", folder, "--env-kwargs", '{"healthy_reward": 2}')
    mean = content["rows"][-1]["eval/return_mean"]
    assert f"return_mean {mean:,.1f}," in capsys.readouterr().out


@FINETUNING
def test_pretraining_on_random_data_gets_the_arguments_and_a_folder_of_their_own(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stand_in = "import json, sys\nopen('words.json', 'w').write(json.dumps(sys.argv))\nraise SystemExit(1)\n"
    (tmp_path / "pretrain_dt.py").write_text(stand_in)
    monkeypatch.setattr(script, "__file__", str(tmp_path / Path(script.__file__).name))
    folders = set()
    for text in (None, '{"healthy_reward": 2.0}', '{"healthy_reward": -2.0}'):
        with pytest.raises(SystemExit):
            script.pretrained_on_random(script.Args(embed_dim=16, env_kwargs=text))
        words = json.loads((tmp_path / "words.json").read_text())
        assert (words[words.index("--env-kwargs") + 1] if "--env-kwargs" in words else None) == text
        folders.add(words[words.index("--run-dir") + 1])
    assert len(folders) == 3


# ---- The examples of the docs ---------------------------------------------------------------------------------------


def test_the_docs_examples_are_played(tmp_path, monkeypatch):
    page = (Path(grpo.__file__).parent / "docs" / "environments.md").read_text(encoding="utf-8")
    task, wrapper, *_ = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "my_module.py").write_text(task)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with ppo.Environments(ppo.make_env("my_module:MyEnv-v0", {"speed": 0.5}), 2) as sims:
        first = sims.reset(np.array([1, 2]))
        observations, rewards, *_ = sims.step(np.arange(2), np.array([[1.0], [-0.5]]))
        np.testing.assert_allclose(observations, first + np.array([[0.5], [-0.25]]))
        np.testing.assert_allclose(rewards, -np.abs(observations[:, 0]))
    exec(wrapper, {})
    with grpo.Simulators(grpo.make_env("Tenfold-v0", {}), 2) as sims:
        rewards = []
        for env in (sims.env, gym.make("Hopper-v5")):
            env.reset(seed=3)
            rewards.append(env.step(np.full(3, 0.5, np.float32))[1])
    assert rewards[0] == pytest.approx(10.0 * rewards[1])
    for name in ("MyEnv-v0", "Tenfold-v0"):
        del gym.registry[name]
