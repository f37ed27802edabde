"""What `main` of a finetuning script hands to whom, and in which order: policies, replay, critic, signs."""

import csv
import operator

import numpy as np
import pytest
import torch

import grpo_dt_continuous as grpo
import ppo_dt_continuous as ppo
import pretrain_dt
import q_guided_grpo_dt as q_guided

TOY = dict(env_id="Hopper-v5", iterations=3, gamma=0.9, g_online=3.0, c_online=2, n_batch=8, epsilon=0.2, lr=1e-2)
TOY |= dict(kappa_initial=0.1, reference_every=3, eval_every=1, eval_episodes=1, cuda=False, threads=1)
TOY |= dict(n_trajectories=2)
GROUPS = dict(n_sources=2, n_points=2, group_size=4, delta_r=0.0, buffer_size=40)
PPO = dict(replay_iterations=2, c_train=4, gae_lambda=0.8, value_dim=8, value_norm=False, lr_value=1e-2, value_warmup=3)
CRITIC = dict(critic_warmup=6, critic_updates=5, critic_batch=16, critic_dim=8, critic_norm=False, lr_critic=1e-2)
CRITIC |= dict(policy_delay=2, tau=0.1, reward_divisor=1.0, replay_size=4)
OWN = {
    grpo: GROUPS | dict(l_traj=4, l_eval=8, workers=0, replay_size=4),
    ppo: PPO,
    q_guided: GROUPS | CRITIC,
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A run folder of pretraining with its data, at toy size."""
    torch.set_num_threads(1)
    toy = dict(dataset_steps=300, batch_size=8, c_offline=3, updates=4, warmup=1, lr=1e-2, eval_episodes=1, threads=1)
    toy |= dict(embed_dim=16, n_layers=2, n_heads=2, cuda=False, save_data=True)
    return str(pretrain_dt.main(pretrain_dt.Args(run_dir=str(tmp_path_factory.mktemp("start") / "run"), **toy)))


class Watched:
    """A run of a script in which calls are recorded: `order` holds their names, `of(name)` the arguments and the result
    of each call of that name."""

    def __init__(self, script, start, folder, patch, functions, methods, **changes):
        self.order, self.calls = [], {}
        (self.kind,) = {each for each in vars(script).values() if str(each).endswith("Learner'>")}
        for owner, names in ((script, functions), (self.kind, methods)):
            for name in names:
                patch.setattr(owner, name, self.spy(name, getattr(owner, name)))
        args = script.Args(pretrained=start, run_dir=str(folder / "run"), **(TOY | OWN[script] | changes))
        run_dir = script.main(args)
        with open(run_dir / "metrics.csv", newline="") as file:
            self.rows = list(csv.DictReader(file))[1:]
        self.content = script.load_checkpoint(run_dir)

    def spy(self, name, function):
        def called(*given, **named):
            result = function(*given, **named)
            self.order.append(name)
            self.calls.setdefault(name, []).append((given, result))
            return result

        return called

    def of(self, name):
        return self.calls[name]

    def policies(self, *names):
        return [given[0] for name in names for given, _ in self.of(name)]


def all_are(one, others):
    return all(one is other for other in others)


def same(ours, theirs):
    """Whether both hold the same objects, in one order."""
    return len(ours) == len(theirs) and all(map(operator.is_, ours, theirs))


def differ_from_iteration_to_iteration(trajectories):
    """Whether no two iterations began with the same state."""
    firsts = [each[0].observations[-len(each[0].rewards)].tolist() for each in trajectories]
    return len({tuple(first) for first in firsts}) == len(firsts)


def test_an_iteration_of_grpo_dt(start, tmp_path, monkeypatch):
    functions = ["collect", "choose_points", "rollout_groups", "group_advantages", "hindsight_returns", "evaluate"]
    run = Watched(grpo, start, tmp_path, monkeypatch, functions, ["remember", "update"], hindsight=True)
    iteration = "collect choose_points rollout_groups group_advantages hindsight_returns remember update evaluate"
    assert run.order == ["evaluate", *iteration.split() * 3]
    learner = run.of("update")[0][0][0]
    assert all_are(learner.model, run.policies("collect", "choose_points", "rollout_groups", "evaluate"))
    collected = [result for _, result in run.of("collect")]
    assert [len(each) for each in collected] == [2, 2, 2] and differ_from_iteration_to_iteration(collected)
    rolled, env_steps = [], 0
    for i, row in enumerate(run.rows):
        rolled += collected[i]
        (_, replay, *_), members = run.of("choose_points")[i]
        assert same(replay, rolled[-4:])
        (_, _, given, *_), (steps, scores) = run.of("rollout_groups")[i]
        assert given is members
        (given, group_size, delta_r), (advantages, keep) = run.of("group_advantages")[i]
        assert given is scores and (group_size, delta_r) == (4, 0.0)
        given, reached = run.of("hindsight_returns")[i]
        assert given[0] is steps and given[1] is members and given[2] == 1000
        assert same(run.of("remember")[i][0][1:], (steps, advantages, keep, reached))
        env_steps += sum(len(each.rewards) for each in collected[i])
        env_steps += steps.real[:, 1:].sum()  # the first column lies before the reset point
        assert float(row["charts/env_steps"]) == env_steps
        assert float(row["rollout/return"]) == pytest.approx(np.mean([each.rewards.sum() for each in collected[i]]))


def test_an_iteration_of_ppo_dt(start, tmp_path, monkeypatch):
    methods = ["remember", "warm_up_value", "update"]
    run = Watched(ppo, start, tmp_path, monkeypatch, ["collect", "evaluate"], methods)
    iteration = ["collect", "remember", "update", "evaluate"]
    assert run.order == ["evaluate", "collect", "remember", "warm_up_value", "update", "evaluate", *iteration * 2]
    learner = run.of("update")[0][0][0]
    assert all_are(learner.model, run.policies("collect", "evaluate"))
    collected = [result for _, result in run.of("collect")]
    assert differ_from_iteration_to_iteration(collected)
    assert same([given[1] for given, _ in run.of("remember")], collected)
    for row, rolled in zip(run.rows, collected):
        assert float(row["rollout/return"]) == pytest.approx(np.mean([each.rewards.sum() for each in rolled]))


def test_an_iteration_of_q_guided_grpo_dt(start, tmp_path, monkeypatch):
    functions = ["collect", "choose_states", "draw_candidates", "group_advantages", "evaluate"]
    methods = ["add_transitions", "train_critic", "remember", "update"]
    run = Watched(q_guided, start, tmp_path, monkeypatch, functions, methods)
    iteration = "collect add_transitions train_critic choose_states draw_candidates group_advantages remember update"
    assert run.order == ["evaluate", "train_critic", *[*iteration.split(), "evaluate"] * 3]
    learner = run.of("update")[0][0][0]
    assert all_are(learner.model, run.policies("collect", "choose_states", "draw_candidates", "evaluate"))
    assert all_are(learner.critic, [given[1] for given, _ in run.of("draw_candidates")])
    collected = [result for _, result in run.of("collect")]
    assert differ_from_iteration_to_iteration(collected)
    rolled = []
    for i, row in enumerate(run.rows):
        rolled += collected[i]
        (_, replay, *_), states = run.of("choose_states")[i]
        assert same(replay, rolled[-4:])
        (_, _, given, *_), (drawn, scores) = run.of("draw_candidates")[i]
        assert given is states
        (given, group_size, delta_r), (advantages, keep) = run.of("group_advantages")[i]
        assert given is scores and (group_size, delta_r) == (4, 0.0)
        assert same(run.of("remember")[i][0][1:], (drawn, advantages, keep))
        assert float(row["rollout/return"]) == pytest.approx(np.mean([each.rewards.sum() for each in collected[i]]))
    kept = [each[5].sum().item() for each in run.content["replay"]]
    assert kept == pytest.approx([each.rewards.sum() for each in rolled[-4:]])
    rewards = [reward for given, _ in run.of("add_transitions") for reward in given[1].rewards.tolist()]
    assert rewards == run.content["learner"]["online"][4].tolist()[-len(rewards) :]
