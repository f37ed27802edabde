"""How fast grpo_dt_continuous.py simulates, and how long its iteration takes.

    python benchmark/speed.py [--parts simulators] [--tasks Hopper-v5 Ant-v5] [--workers 0 1 2]
    python benchmark/speed.py --parts iteration --embed-dim 128 [--threads 1]

Part "simulators": environment steps per second of Simulators.step for 256 simulations, by number of worker processes,
and beside it, on one core, a loop over the environment's own `step`, and MuJoCo's mj_step alone. All start from the
same states, of one episode of small random actions, take turns for some rounds, and the medians are printed.

Part "iteration": seconds of one iteration with the settings of the task's row, a network of random weights and
sub-trajectories that all live through L_traj + L_eval steps (falls are switched off):
  ours    the script's own functions; one thread plays in this process (--workers 0), more with as many workers
  floor   the same environment steps by mj_step alone on all cores, and the floating-point operations of ours at the
          speed of a large matrix product, nothing else
Take them on a quiet machine: other load falls on their parts unevenly.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported, as the script does
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import mujoco
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grpo_dt_continuous as grpo

TASKS = ["Hopper-v5", "Walker2d-v5", "HalfCheetah-v5", "Ant-v4", "Ant-v5"]
TASKS += ["AdroitHandDoor-v1", "AdroitHandHammer-v1", "AdroitHandPen-v1", "AntMaze_UMaze-v4"]
ACTION = 0.3  # size of the random actions, of 1: the simulations stay calm


def timed(function, *args):
    """(seconds, result) of a call, the device's work included."""
    begun = time.perf_counter()
    result = function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun, result


# Simulators


def states_of_an_episode(env, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` states, evenly along an episode of random actions: (count, D)."""
    simulation, states, ended = grpo.Simulation(env), [], False
    while not ended:
        states.append(np.empty(simulation.ends[-1]))
        simulation.take(states[-1])
        action = rng.uniform(-ACTION, ACTION, env.action_space.shape)
        ended = any(env.step(grpo.scale_action(action, env.action_space))[2:4])
    return np.array(states)[np.linspace(0, len(states) - 1, count).astype(int)]


def time_simulators(sims: grpo.Simulators, states: np.ndarray, actions: np.ndarray) -> float:
    """Environment steps per second of all simulations; actions (steps, N, A)."""
    rows = np.arange(len(states))
    sims.states[rows] = states
    seconds, _ = timed(lambda: [sims.step(rows, action) for action in actions])
    return len(actions) * len(rows) / seconds


def time_loop(simulation: grpo.Simulation, states: np.ndarray, actions: np.ndarray) -> float:
    """The same by `step` of one environment, for some of the simulations, one after the other."""
    seconds, space = 0.0, simulation.env.action_space
    chosen = range(0, len(states), max(1, len(states) // 16))
    for i in chosen:
        simulation.put(states[i])
        controls = grpo.scale_action(actions[:, i], space)
        seconds += timed(lambda controls=controls: [simulation.env.step(control) for control in controls])[0]
    return len(actions) * len(chosen) / seconds


def time_raw(simulation: grpo.Simulation, states: np.ndarray, actions: np.ndarray) -> float:
    """The same by mj_step alone."""
    model, data, seconds = simulation.model, simulation.data, 0.0
    skip = grpo.simulator_of(simulation.env).frame_skip
    chosen = range(0, len(states), max(1, len(states) // 16))
    for i in chosen:
        simulation.put(states[i])
        low, high = model.actuator_ctrlrange.T
        controls = low + (actions[:, i] + 1.0) * 0.5 * (high - low)
        begun = time.perf_counter()
        for control in controls:
            data.ctrl[:] = control
            mujoco.mj_step(model, data, skip)
        seconds += time.perf_counter() - begun
    return len(actions) * len(chosen) / seconds


def measure_simulators(task: str, options) -> str:
    """A row of the first table."""
    rng, env = np.random.default_rng(0), grpo.make_env(task, {})
    states = states_of_an_episode(env, options.simulations, rng)
    actions = rng.uniform(-ACTION, ACTION, (options.steps, options.simulations, *env.action_space.shape))
    pools = [grpo.Simulators(grpo.make_env(task, {}), options.simulations, n) for n in options.workers]
    speeds = []
    for n in range(options.rounds + 1):
        row = [time_raw(pools[0].local, states, actions), time_loop(pools[0].local, states, actions)]
        row += [time_simulators(sims, states, actions) for sims in pools]
        speeds += [row] if n else []  # round 0 warms up
    for sims in pools:
        sims.__exit__()
    return f"| {task} | {' | '.join(f'{speed:,.0f}' for speed in np.median(speeds, axis=0))} |"


# An iteration


def peak_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a large matrix product: best of ten."""
    a, b = torch.randn(4096, 512, device=device).to(dtype), torch.randn(512, 2048, device=device).to(dtype)
    seconds = min(timed(torch.mm, a, b)[0] for _ in range(10))
    return 2 * 4096 * 512 * 2048 / seconds


def flops_of(model: grpo.DecisionTransformer, args: grpo.Args) -> float:
    """Floating-point operations of the network's matrix products for one window."""
    shapes = ((args.c_online, len(model.obs_mean)), (args.c_online,), (args.c_online, model.act_dim))
    device = model.obs_mean.device
    windows = [torch.zeros(64, *shape, device=device) for shape in shapes]
    windows.append(torch.ones(64, args.c_online, dtype=torch.bool, device=device))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*windows)
    return counter.get_total_flops() / 64


def measure_iteration(task: str, options) -> tuple[str, str]:
    """Rows of the second table, and a line of notes. The first, shorter iteration warms up."""
    kwargs = {"terminate_when_unhealthy": False} if task.startswith(("Hopper", "Walker2d", "Ant-")) else {}
    args = grpo.Args(env_id=task, embed_dim=options.embed_dim, threads=options.threads, delta_r=0.0, g_eval=3600.0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads)
    args.workers = args.threads if args.threads > 1 else 0
    grpo.fill_from_table(args, "medium", 0.0)
    env, rng = grpo.make_env(task, kwargs), np.random.default_rng(0)
    torch.manual_seed(0)
    model = grpo.DecisionTransformer(*env.observation_space.shape, *env.action_space.shape, args.embed_dim)
    model.return_scale.fill_(1e-3)
    model.bf16 = grpo.has_bf16(device)
    learner = grpo.GRPOLearner(model.to(device), args)
    n = args.n_sources * args.n_points * args.group_size
    with grpo.Simulators(env, n, args.workers) as sims:
        replay = grpo.collect(model, sims, 1, args, rng, True)
        collected, replay = timed(grpo.collect, model, sims, 1, args, rng, True)
        for l_eval in (1, args.l_eval):
            args.l_eval = l_eval
            sims.seconds = 0.0
            rolled, members = timed(grpo.choose_points, model, replay, args, rng)
            seconds, (steps, _) = timed(grpo.rollout_groups, model, sims, members, args, rng)
            ours = (sims.seconds, rolled + seconds - sims.seconds)
            keep = np.ones(n, bool)
            remembered, _ = timed(learner.remember, steps, np.linspace(-1, 1, n), keep)
            updated, _ = timed(learner.update, rng)
        ours += (remembered + updated,)
        evaluated = grpo.evaluate(model, sims, args, 0)["time/eval"]
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        memory += args.workers * max(resident(process.pid) for process in sims.processes) if args.workers else 0.0
        states, actions = sims.states[:n].copy(), np.zeros((options.steps, n, model.act_dim))
        raw = time_raw(sims.local, states, actions) * args.threads
    apart = f"collection {collected:.1f} s, evaluation {evaluated:.1f} s"
    lived, flops = int(steps.real.sum()), flops_of(model, args)
    dtype = torch.bfloat16 if model.bf16 else torch.float32
    peak = peak_flops(dtype, device)
    trained = args.n_minibatches * args.n_batch * args.l_traj
    # an update goes forward, backward (twice the work) and forward through the reference
    floor = (lived / raw, lived * flops / peak, (4 * trained + n * args.l_traj) * flops / peak)
    rows = []
    for name, parts in (("ours", ours), ("floor", floor)):
        columns = " | ".join(f"{part:.1f}" for part in (sum(parts), *parts))
        rows.append(f"| {task} | {name} | {columns} | {sum(parts) / sum(ours):.2f} |")
    note = f"{task}: {lived:,} environment steps, {dtype}, {peak / 1e9:,.0f} GFLOP/s at the peak, "
    note += f"{flops / 1e6:.1f} MFLOP a window; apart: {apart}; peak memory of ours {memory:.2f} GiB, workers included"
    return "\n".join(rows), note


def resident(pid: int) -> float:
    """GiB of a process, its share of shared pages included."""
    status = Path(f"/proc/{pid}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["simulators", "iteration"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument(
        "--tasks", nargs="+", help=f"environments [simulators: {' '.join(TASKS)}; iteration: Hopper-v5]"
    )
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2], help="simulators: numbers of processes")
    parser.add_argument(
        "--threads", type=int, default=cores, help="iteration: threads of torch, and workers if above 1"
    )
    parser.add_argument("--rounds", type=int, default=5, help="simulators: rounds that count, after one")
    parser.add_argument("--steps", type=int, default=20, help="environment steps of each simulation in a round")
    parser.add_argument("--simulations", type=int, default=256, help="simulators: simulations side by side")
    parser.add_argument("--embed-dim", type=int, default=512, help="iteration: width of the network")
    options = parser.parse_args()
    if "simulators" in options.parts:
        print(f"{options.simulations} simulations, environment steps per second:\n")
        columns = ["mj_step", "loop", *(f"{n} workers" for n in options.workers)]
        print(f"| environment | {' | '.join(columns)} |\n" + "|---" * (len(columns) + 1) + "|")
        for task in options.tasks or TASKS:
            print(measure_simulators(task, options), flush=True)
    if "iteration" in options.parts:
        print(f"\nwidth {options.embed_dim}, {options.threads} threads, seconds of an iteration:\n")
        print("| environment | | total | simulate | infer | update | total / ours |\n" + "|---" * 7 + "|")
        notes = []
        for task in options.tasks or ["Hopper-v5"]:  # a row as soon as it is there: they take minutes
            row, note = measure_iteration(task, options)
            print(row, flush=True)
            notes.append(note)
        print("\n" + "\n".join(notes))
