"""How fast the simulator pool of grpo_dt_continuous.py steps, beside raw MuJoCo and beside a loop over env.step.

    python benchmark/speed.py [--threads 1] [--tasks Hopper-v5 Ant-v5]

For each task three things do the same work, from the same snapshots of an episode of random actions:
  pool   make_pool(...).step: observations, rewards and terminations of all simulations
  raw    mujoco.mj_step alone, on the MjData of that pool, in its threads
  loop   env.step of one gymnasium environment, for some of the simulations, one after the other
They take turns for several rounds. The Markdown table gives environment steps per second, each frame_skip steps of
MuJoCo, and ratios, all medians over the rounds. Take it on a quiet machine: other load falls on all three, unevenly.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import mujoco
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grpo_dt_continuous as grpo

TASKS = ["Hopper-v5", "Walker2d-v4", "HalfCheetah-v5", "Ant-v4", "Ant-v5"]
TASKS += ["AdroitHandDoor-v1", "AdroitHandHammer-v1", "AdroitHandPen-v1", "AntMaze_UMaze-v4"]
ACTION = 0.3  # size of the random actions, of 1: the simulations stay calm


def record_episode(env, rng: np.random.Generator) -> np.ndarray:
    """A snapshot before every step of one episode of random actions: (T, D). `env` stays as the episode left it."""
    env.reset(seed=0)
    snapshots, ended = [], False
    while not ended:
        snapshots.append(grpo.take_snapshot(env))
        action = grpo.scale_action(rng.uniform(-ACTION, ACTION, env.action_space.shape), env)
        ended = any(env.step(action)[2:4])
    return np.array(snapshots)


def raw_step(pool: grpo.SimulatorPool):
    """step(rows, controls) by mj_step alone, on the data and in the threads of `pool`."""
    views = [(grpo.simulator_of(sim).data, grpo.simulator_of(sim).data.ctrl) for sim in pool.sims]
    skip = grpo.simulator_of(pool.env).frame_skip

    def step(rows: np.ndarray, controls: np.ndarray) -> None:
        def work(chunk: np.ndarray, thread: int) -> None:
            model = pool.models[thread]
            for j in chunk:
                data, ctrl = views[rows[j]]
                ctrl[:] = controls[j]
                mujoco.mj_step(model, data, skip)

        pool.in_threads(work, rows)

    return step


def time_pool(pool: grpo.SimulatorPool, step, snapshots: np.ndarray, actions: np.ndarray) -> float:
    """Environment steps per second of step(rows, actions) for all simulations; actions (steps, N, A)."""
    rows = np.arange(pool.size)
    pool.restore(rows, snapshots)
    begun = time.perf_counter()
    for action in actions:
        step(rows, action)
    return len(actions) * pool.size / (time.perf_counter() - begun)


def positions(pool: grpo.SimulatorPool) -> np.ndarray:
    """Where all simulations are: (N, nq)."""
    return np.array([grpo.simulator_of(sim).data.qpos for sim in pool.sims])


def time_loop(env, snapshots: np.ndarray, actions: np.ndarray) -> float:
    """The same by env.step of one environment, for 16 of the simulations; `env` recorded the snapshots."""
    simulator, seconds = grpo.simulator_of(env), 0.0
    chosen = range(0, len(snapshots), max(1, len(snapshots) // 16))
    size = mujoco.mj_stateSize(simulator.model, grpo.INTEGRATION_STATE)
    for j in chosen:
        mujoco.mj_setState(simulator.model, simulator.data, snapshots[j, :size], grpo.INTEGRATION_STATE)
        begun = time.perf_counter()
        for action in actions[:, j]:
            env.step(action)
        seconds += time.perf_counter() - begun
    return len(actions) * len(chosen) / seconds


def measure(task: str, args) -> str:
    """A row of the table."""
    rng, env = np.random.default_rng(0), grpo.make_env(task)
    episode = record_episode(env, rng)
    snapshots = episode[np.linspace(0, len(episode) - 1, args.simulations).astype(int)]
    pool = grpo.make_pool(grpo.make_env(task), args.simulations, args.threads)
    actions = rng.uniform(-ACTION, ACTION, (args.steps, args.simulations, *env.action_space.shape))
    actions = grpo.scale_action(actions, env)
    rules, speeds = env.unwrapped, []  # Adroit scales actions to the range of its actuators inside its step
    controls = rules.act_mean + actions * rules.act_rng if hasattr(rules, "act_rng") else actions
    for n in range(args.rounds + 1):
        pooled, reached = time_pool(pool, pool.step, snapshots, actions), positions(pool)
        raw = time_pool(pool, raw_step(pool), snapshots, controls)
        assert np.allclose(positions(pool), reached, atol=1e-6), f"{task}: pool and raw mj_step did not do the same"
        speeds += [(pooled, raw, time_loop(env.env, snapshots, actions))] if n else []  # round 0 warms up
    a, b, c = np.array(speeds).T
    values = [f"{np.median(each):,.0f}" for each in (a, b, c)] + [f"{np.median(each):.2f}" for each in (a / b, a / c)]
    return f"| {task} | {type(pool).__name__} | {' | '.join(values)} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="environment ids")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of the pool [all cores]")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count, after one that warms up")
    parser.add_argument("--steps", type=int, default=20, help="environment steps of each simulation in a round")
    parser.add_argument("--simulations", type=int, default=256, help="simulations side by side")
    arguments = parser.parse_args()
    print(f"{arguments.simulations} simulations, {arguments.threads} threads, environment steps per second:\n")
    print("| environment | class of the pool | pool | raw | loop | pool / raw | pool / loop |\n" + "|---" * 7 + "|")
    for task in arguments.tasks:
        print(measure(task, arguments), flush=True)
