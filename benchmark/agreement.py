"""How far do policy gradients of independent groups agree? Before a run of hours: which L_eval, gamma and scale?

    python benchmark/agreement.py RUN [--groups 128] [--horizons 30 115 415 1000] [--gammas 0.995 0.999] [--seed 1]

RUN is the folder of a checkpoint, or the checkpoint.pt in it, of any script here. One set of groups is rolled out and
scored over each horizon, in steps, L_traj included. Of each score it prints

  std        the median over groups of its standard deviation within a group
  agreement  the cosine between policy gradients of disjoint quarters of the groups: 0 is noise, 1 is without noise.
             Quarters have states of the same trajectories, which makes them more alike; there are no error bars
  along      the cosine with the gradient of the reward over the longest horizon, undiscounted and on one scale, from
             the other three quarters: below 0, what this score likes costs return. It says
             nothing where the longest horizon's own gradients do not agree

in the scale of Eq. 2 (each group's own standard deviation), on one scale for all groups, and in the geometric mean of
both. The policy gradient is that of Eq. 3 where the ratio is 1: the mean of A grad log pi(tau). Minutes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from itertools import combinations
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported, as the script does
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grpo_dt_continuous as grpo

FOLDS = 4
SCALES = {"Eq. 2": 0.0, "between": 0.5, "one": 1.0}  # the power of a group's standard deviation that it counts by


def advantages_of(scores: np.ndarray, group_size: int, power: float) -> np.ndarray:
    """Advantages (N,) of scores (N,): Eq. 2's, times a power of the group's standard deviation in units of the root
    mean square of all groups'."""
    advantages, _ = grpo.group_advantages(scores, group_size, delta_r=0.0)
    std = scores.reshape(-1, group_size).std(1).repeat(group_size)  # (N,)
    return advantages * (std / (np.sqrt((std**2).mean()) + 1e-8)) ** power


def policy_gradient(model, sub: grpo.SubTrajectories) -> np.ndarray:
    """The mean over sub-trajectories of A grad log pi(tau), all weights in one vector."""
    model.zero_grad()
    for part in torch.arange(len(sub.u)).split(256):
        some = sub.take(part)
        real = some.real[:, -some.u.shape[1] :]  # (B, L)
        log_prob = grpo.log_prob(grpo.distribution(model, some), some.u)  # (B, L)
        (some.advantage * (log_prob * real).sum(1)).sum().backward()
    gradients = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    return torch.cat(gradients).double().numpy() / len(sub.u)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-300))


def roll_out(base: dict, args: grpo.Args, groups: int, horizon: int):
    """Model, sub-trajectories with advantages yet to come, and their rewards (N, horizon), of groups drawn as a run
    draws them from 32 trajectories."""
    model = grpo.load_model(base, grpo.set_up_torch(args), bf16=False).eval()
    args.n_sources, args.l_eval = groups // args.n_points, horizon - args.l_traj
    rng = np.random.default_rng(args.seed)
    env = grpo.make_env(base["env_id"], base["env_kwargs"])
    with grpo.Simulators(env, max(groups * args.group_size, args.replay_size), args.workers) as sims:
        replay = grpo.collect(model, sims, args.replay_size, args, rng, snapshots=True)
        members = grpo.choose_points(model, replay, args, rng)
        steps, _ = grpo.rollout_groups(model, sims, members, args, rng)
    returns = [each.rewards.sum() for each in replay]
    print(f"{len(replay)} trajectories with sampled actions: return {np.mean(returns):,.0f} ± {np.std(returns):,.0f}")
    print(f"{len(members)} sub-trajectories of up to {horizon} steps: {100 * steps.terminated.mean():.0f} % fell")
    fields = [torch.from_numpy(field[:, : args.c_online - 1 + args.l_traj]) for field in steps[:4]]
    u = torch.from_numpy(steps.u[:, : args.l_traj])
    nothing = torch.zeros(len(u))
    return model, grpo.SubTrajectories(*fields, u, nothing, nothing), steps.rewards


def compare(model, sub: grpo.SubTrajectories, rewards: np.ndarray, given: argparse.Namespace, group_size: int) -> None:
    """Print a row for each horizon, discount and scale. rewards (N, longest horizon)."""
    order = np.random.default_rng(given.seed).permutation(given.groups)
    members = np.arange(len(rewards)).reshape(-1, group_size)  # (P, G) places of a group's members
    quarters = [members[part].ravel() for part in np.split(order, FOLDS)]

    def gradients(scores: np.ndarray, power: float) -> list[np.ndarray]:
        """Of each quarter of the groups."""
        advantages = torch.from_numpy(advantages_of(scores, group_size, power)).float()
        whole = sub._replace(advantage=advantages)
        return [policy_gradient(model, whole.take(quarter)) for quarter in quarters]

    target = gradients(rewards.sum(1), power=1.0)
    rest = [sum(target) - each for each in target]  # of the other three quarters
    print(f"\n{'steps':>6} {'gamma':>6} {'std':>8}  {'scale':8} {'agreement':>9} {'along':>6}")
    for horizon in sorted(given.horizons):
        for gamma in given.gammas:
            scores = rewards[:, :horizon] @ gamma ** np.arange(horizon)  # (N,)
            std = np.median(scores.reshape(-1, group_size).std(1))
            for name, power in SCALES.items():
                found = gradients(scores, power)
                agreement = np.mean([cosine(a, b) for a, b in combinations(found, 2)])
                along = np.mean([cosine(a, b) for a, b in zip(found, rest)])
                print(f"{horizon:6} {gamma:6} {std:8.2f}  {name:8} {agreement:9.2f} {along:6.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run, or a checkpoint")
    parser.add_argument("--groups", type=int, default=128, help="groups, a multiple of 16")
    parser.add_argument("--horizons", type=int, nargs="+", default=[30, 115, 415, 1000], help="steps that are scored")
    parser.add_argument("--gammas", type=float, nargs="+", default=[0.995, 0.999], help="discounts per step")
    parser.add_argument("--seed", type=int, default=1, help="seed of all that is drawn")
    parser.add_argument("--threads", type=int, default=None, help="torch's threads")
    parser.add_argument("--workers", type=int, default=None, help="processes that simulate")
    given = parser.parse_args()
    base = grpo.load_checkpoint(given.run)
    args = grpo.Args(env_id=base["env_id"], seed=given.seed, threads=given.threads, workers=given.workers, cuda=False)
    grpo.check_args(args)
    grpo.fill_from_table(args, base["dataset_kind"], base["dataset_best_return"])
    args.c_online = base["c_online"]
    if given.groups < 16 or given.groups % 16:
        grpo.die("--groups is a multiple of 16, for quarters and for four points of a trajectory: give such a number.")
    if min(given.horizons) < args.l_traj:
        grpo.die(f"--horizons begin at L_traj, {args.l_traj} steps here: give no shorter one.")
    if not all(0 < gamma <= 1 for gamma in given.gammas):
        grpo.die("--gammas are above 0, up to 1: give such numbers.")
    begun = time.time()
    model, sub, rewards = roll_out(base, args, given.groups, max(given.horizons))
    compare(model, sub, rewards, given, args.group_size)
    print(f"{time.time() - begun:.0f} s")


if __name__ == "__main__":
    main()
