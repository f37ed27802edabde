"""Optimiser, losses, schedule and whole runs of pretrain_dt.py at toy size."""

import csv
import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

import pretrain_dt
from pretrain_dt import (
    EVALUATION,
    LOSSES,
    METRICS,
    Args,
    DecisionTransformer,
    Lamb,
    Learner,
    Trajectories,
    Windows,
    WindowSampler,
    eval_only,
    expectile_loss,
    fill_from_row,
    load_checkpoint,
    load_model,
    load_trajectories,
    main,
    make_env,
    make_eval_envs,
    masked_mean,
    new_model,
    parse_args,
    pretrain_loss,
    run_evaluation,
    save_checkpoint,
    stream,
    write_file,
)

KINDS = pytest.mark.parametrize("kind", ["dt", "reinformer"])


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def toy_args(**changes):
    """A run of a second on Hopper. The learning rate is high, so that a few updates leave a mark on every weight."""
    toy = dict(env_id="Hopper-v5", dataset_steps=300, embed_dim=16, n_layers=2, n_heads=2, batch_size=8, c_offline=5)
    toy |= dict(c_online=2, updates=12, warmup=4, lr=1e-2, log_every=5, eval_episodes=2, device="cpu", threads=1)
    return Args(**(toy | changes))


# LAMB


def lamb_by_hand(p, gradients, rates, weight_decay):
    """You et al. 2019, algorithm 2, with Adam's bias corrections; in NumPy."""
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        r = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + weight_decay * p
        p_norm, r_norm = np.sqrt((p**2).sum()), np.sqrt((r**2).sum())
        p = p - lr * (p_norm / r_norm if p_norm > 0 and r_norm > 0 else 1.0) * r
    return p


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_lamb_equals_two_steps_by_hand(weight_decay):
    rng = np.random.default_rng(0)
    start = {"weight": rng.normal(size=(2, 3)), "zero": np.zeros(3), "still": rng.normal(size=2), "dead": np.zeros(2)}
    gradients = {name: [rng.normal(size=value.shape) for _ in range(2)] for name, value in start.items()}
    gradients["weight"][0][0, 0] = 1e-8  # where eps counts
    gradients["dead"] = [np.zeros(2)] * 2
    params = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in start.items()}
    optimizer, rates = Lamb(params.values(), lr=9.0, weight_decay=weight_decay), (0.2, 0.05)
    for t, lr in enumerate(rates):
        optimizer.param_groups[0]["lr"] = lr
        for name, p in params.items():
            p.grad = None if name == "still" else torch.from_numpy(gradients[name][t].copy())
        optimizer.step()
        if t == 0:  # bias-corrected, the first direction is the gradient's sign, and a zero tensor is not rescaled
            first = -rates[0] * np.sign(gradients["zero"][0])
            np.testing.assert_allclose(params["zero"].detach().numpy(), first, rtol=1e-6)
    for name in ("weight", "zero", "dead"):
        expected = lamb_by_hand(start[name], gradients[name], rates, weight_decay)
        np.testing.assert_allclose(params[name].detach().numpy(), expected, rtol=1e-12, atol=1e-15, err_msg=name)
    assert np.array_equal(params["still"].detach().numpy(), start["still"])


# Losses


def test_expectile_loss_weighs_low_and_high_errors_by_tau():
    loss = expectile_loss(torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0]), 0.9)
    torch.testing.assert_close(loss, torch.tensor([0.1 * 4, 0.1 * 0.25, 0.0, 0.9 * 0.25, 0.9 * 4]))


@pytest.mark.parametrize("tau", [0.5, 0.9, 0.99])
def test_minimiser_of_the_expectile_loss_goes_from_the_mean_to_the_maximum(tau):
    prediction = torch.linspace(0.0, 1.0, 1001)
    loss = sum(expectile_loss(target - prediction, tau) for target in (0.0, 1.0))
    assert prediction[loss.argmin()].item() == pytest.approx(tau, abs=2e-3)  # in closed form: of {0, 1} it is tau


def test_masked_mean_is_the_mean_over_real_tokens():
    values, real = torch.tensor([[99.0, 1.0, 2.0], [-99.0, -99.0, 6.0]]), torch.tensor([[0, 1, 1], [0, 0, 1]]).bool()
    assert masked_mean(values, real).item() == pytest.approx(3.0)


def draw_windows(seed=0):
    """Three windows of up to four steps, left-padded with garbage; float64."""
    torch.manual_seed(seed)
    real = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    observations, returns = torch.randn(3, 4, 5).double(), 3 + 5 * torch.randn(3, 4).double()
    return Windows(observations, returns, torch.rand(3, 4, 2).double() * 1.8 - 0.9, real)


def draw_model(kind, dropout=0.0):
    torch.manual_seed(1)
    model = DecisionTransformer(5, 2, embed_dim=16, n_layers=2, n_heads=2, kind=kind, dropout=dropout).double()
    model.return_scale.fill_(0.5)
    return model.use_precision(torch.float64)


@KINDS
def test_pretrain_loss_equals_the_sum_over_real_tokens_written_out(kind):
    model, windows, kappa = draw_model(kind), draw_windows(), 0.7
    args = Args(model=kind, return_loss_weight=0.3, expectile=0.9)
    dist, predicted = model(windows.observations, windows.returns, windows.actions[:, :-1], windows.real)
    torch.manual_seed(5)
    noise = torch.randn(3, 4, 2, dtype=torch.float64)
    tokens = [(b, k) for b in range(3) for k in range(4) if windows.real[b, k]]
    assert len(tokens) == 8
    nll = entropy = mse = return_loss = 0.0
    size = sum(abs(windows.returns[b, k].item()) for b, k in tokens) / 8
    for b, k in tokens:
        mean, std = dist.mean[b, k], dist.log_std[b, k].exp()
        law = TransformedDistribution(Normal(mean, std), [TanhTransform()])
        nll -= law.log_prob(windows.actions[b, k]).sum().item() / 8
        entropy -= law.log_prob(torch.tanh(mean + std * noise[b, k])).sum().item() / 8
        mse += ((torch.tanh(mean) - windows.actions[b, k]) ** 2).sum().item() / 16
        if kind == "reinformer":
            error = (windows.returns[b, k] - predicted[b, k]).item() / size
            return_loss += (0.9 if error > 0 else 0.1) * error**2 / 8
    assert (return_loss > 0) == (kind == "reinformer")
    torch.manual_seed(5)
    loss, values = pretrain_loss(model, windows, torch.tensor(kappa), args)
    ours = [values[name].item() for name in ("nll", "entropy", "action_mse", "return")]
    assert ours == pytest.approx([nll, entropy, mse, return_loss], rel=1e-6)
    assert loss.item() == pytest.approx(nll - kappa * entropy + 0.3 * return_loss, rel=1e-6)


@KINDS
def test_loss_and_gradients_do_not_hang_on_what_the_padding_holds(kind):
    results = []
    for garbage in (0.0, 0.9):
        model, windows = draw_model(kind), draw_windows()
        for array in windows[:3]:
            array[~windows.real] = garbage
        torch.manual_seed(5)
        loss, values = pretrain_loss(model, windows, torch.tensor(0.5), Args(model=kind))
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append(torch.cat([torch.stack([loss, *values.values()]), gradients]).detach())
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


@KINDS
def test_loss_reaches_every_weight_but_the_unread_last_action(kind):
    model = draw_model(kind)
    pretrain_loss(model, draw_windows(), torch.tensor(0.5), Args(model=kind))[0].backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


# An update


def draw_data(steps=10):
    """One trajectory of observations (steps, 4) and actions (steps, 2)."""
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(steps, 4)).astype(np.float32)
    actions = rng.uniform(-0.9, 0.9, size=(steps, 2)).astype(np.float32)
    return Trajectories(observations, actions, rng.uniform(size=steps), np.array([steps]))


def new_learner(data=None, **changes):
    args, data = toy_args(dropout=0.0, **changes), data or draw_data()
    return Learner(new_model(args, data), args), WindowSampler(data, args.c_offline, torch.device("cpu"))


@pytest.mark.parametrize(("log_std_bias", "direction"), [(-5.0, +1), (0.5, -1)])
def test_kappa_rises_below_the_target_entropy_and_falls_above_it_by_adams_first_step(log_std_bias, direction):
    learner, sampler = new_learner(kappa_initial=0.2, kappa_lr=1e-2)
    torch.nn.init.zeros_(learner.model.log_std_head.weight)
    torch.nn.init.constant_(learner.model.log_std_head.bias, log_std_bias)
    learner.update(sampler)
    losses = dict(zip(LOSSES, learner.sums.tolist()))
    assert np.sign(-2.0 - losses["entropy"]) == direction  # target: -dim A
    assert losses["kappa"] == pytest.approx(0.2)  # the one in the loss, before it moves
    assert learner.log_kappa.item() == pytest.approx(math.log(0.2) + direction * 1e-2, abs=1e-6)


def test_kappa_follows_the_gradient_kappa_times_entropy_minus_target():
    learner, sampler = new_learner(kappa_initial=0.2, kappa_lr=0.5)
    log_kappa, m, v, entropy_sum = math.log(0.2), 0.0, 0.0, 0.0
    for t in (1, 2, 3):
        learner.update(sampler)
        total = learner.sums[LOSSES.index("entropy")].item()
        gradient, entropy_sum = math.exp(log_kappa) * (total - entropy_sum + 2.0), total
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        log_kappa -= 0.5 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
        assert learner.log_kappa.item() == pytest.approx(log_kappa, abs=1e-4)


def test_learning_rate_warms_up_linearly_and_then_stays():
    learner, sampler = new_learner(lr=0.02, warmup=4)
    rates = []
    for _ in range(6):
        learner.update(sampler)
        rates.append(learner.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.005, 0.01, 0.015, 0.02, 0.02, 0.02])


def test_first_update_moves_each_tensor_by_the_warmed_up_rate_of_its_norm():
    learner, sampler = new_learner(lr=0.02, warmup=4)
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    learner.update(sampler)
    for name, p in learner.model.named_parameters():
        moved, norm = (p - before[name]).norm().item(), before[name].norm().item()
        assert moved == pytest.approx(0.005 * norm, rel=1e-2) or norm == 0.0 < moved, name


def test_gradients_are_clipped_to_the_global_norm_and_logged_unclipped():
    learner, sampler = new_learner(max_grad_norm=0.25)
    norms, step = [], learner.optimizer.step

    def measured():  # before the step, which uses the gradients' memory
        norms.append(torch.cat([p.grad.flatten() for p in learner.model.parameters()]).norm().item())
        step()

    learner.optimizer.step = measured
    learner.update(sampler)
    assert norms == [pytest.approx(0.25, rel=1e-4)]
    assert learner.sums[LOSSES.index("grad_norm")].item() > 1.0


def test_a_loss_that_is_not_finite_ends_the_run_in_a_line():
    learner, sampler = new_learner()
    learner.update(sampler)
    learner.sums[0] = math.nan
    with pytest.raises(SystemExit, match="not finite at update 1 "):
        learner.mean_losses()


def test_logged_losses_are_means_over_the_updates_since_the_last_row():
    learner, sampler = new_learner(log_every=4)
    singles = []
    for _ in range(3):
        before = learner.sums.clone()
        learner.update(sampler)
        singles.append((learner.sums - before).tolist())
    expected = np.mean(singles, axis=0)
    assert list(learner.mean_losses().values()) == pytest.approx(expected, rel=1e-5)


def test_new_model_takes_the_statistics_of_the_data_and_leaves_constant_columns_unscaled():
    data = draw_data()
    data.observations[:, 2] = 7.0
    data.observations[:, 3] = 7.0 + 1e-4 * data.observations[:, 0]  # below 1e-3: as good as constant
    model = new_model(toy_args(), data)
    np.testing.assert_allclose(model.obs_mean.numpy(), data.observations.mean(0), rtol=1e-5)
    np.testing.assert_allclose(model.obs_std.numpy()[:2], data.observations[:, :2].std(0), rtol=1e-4)
    assert model.obs_std[2:].tolist() == [1.0, 1.0]
    assert model.return_scale.item() == pytest.approx(1e-3)
    assert new_model(toy_args(env_id="AntMaze_UMaze-v4"), data).return_scale.item() == 1.0


def test_a_tiny_network_learns_one_trajectory_by_heart():
    angle = np.linspace(0.0, 2 * np.pi, 10, endpoint=False)
    data = draw_data()
    data.observations[:] = np.stack([np.sin(angle), np.cos(angle), np.sin(2 * angle), np.cos(2 * angle)], axis=1)
    data.actions[:] = 0.7 * np.stack([np.sin(angle + 0.5), np.cos(2 * angle)], axis=1)
    learner, sampler = new_learner(data, embed_dim=32, lr=1e-2, warmup=20, batch_size=16)

    def action_mse():
        windows = sampler.sample(np.random.default_rng(0), 64)
        with torch.no_grad():
            return pretrain_loss(learner.model, windows, torch.tensor(0.0), learner.args)[1]["action_mse"].item()

    before = action_mse()
    for _ in range(200):
        learner.update(sampler)
    assert before > 0.2 and action_mse() < 0.01


@pytest.mark.parametrize(("expectile", "expected"), [(0.99, 2.98), (0.5, 2.0)])
def test_reinformer_predicts_the_best_of_two_returns_from_the_same_state(expectile, expected):
    data = draw_data(2)
    data.observations[1] = data.observations[0]
    data.rewards[:], data.lengths = [1.0, 3.0], np.array([1, 1])
    changes = dict(model="reinformer", expectile=expectile, c_offline=1, lr=5e-3, warmup=10, batch_size=32)
    learner, sampler = new_learner(data, **changes)
    learner.model.return_scale.fill_(1.0)
    learner.args.return_loss_weight = 1000.0  # the return is what is tested; the actions conflict
    predictions = []
    for _ in range(200):
        learner.update(sampler)
        window = sampler.observations[:1, None], torch.zeros(1, 1), torch.zeros(1, 0, 2)
        predictions.append(learner.model(*window)[1].item())
    assert np.mean(predictions[-50:]) == pytest.approx(expected, abs=0.25)  # LAMB keeps it moving


# The table


def filled(**changes):
    args = Args(**changes)
    return args, fill_from_row(args)


@pytest.mark.parametrize(
    ("updates", "warmup"), [(None, 10_000), (5_000, 10_000), (9_000, 10_000), (4_999, 499), (500, 50), (3, 1)]
)
def test_warmup_is_10000_for_the_rows_updates_and_a_tenth_of_fewer(updates, warmup):
    args, line = filled(env_id="Hopper-v5", updates=updates)
    assert (args.updates, args.warmup) == (updates or 5_000, warmup)
    assert f"updates {args.updates:,}, " in line and f"warm-up {warmup:,}, " in line


def test_flags_override_the_row():
    args, _ = filled(env_id="Hopper-v5", updates=7, lr=0.5, warmup=3, c_offline=4, c_online=2, g_eval=1.0)
    assert (args.updates, args.lr, args.warmup, args.c_offline, args.c_online, args.g_eval) == (7, 0.5, 3, 4, 2, 1.0)


@pytest.mark.parametrize(
    ("env_id", "dataset", "kind", "row"),
    [
        ("Hopper-v5", "random", "random", (5_000, 1e-4, 20, 1, 3600.0)),
        ("Hopper-v5", "mujoco/hopper/medium-v0", "medium", (5_000, 1e-4, 20, 1, 3600.0)),
        ("Hopper-v5", "/random/hopper_medium-replay-v2.hdf5", "medium-replay", (5_000, 1e-4, 20, 1, 3600.0)),
        ("Walker2d-v5", "random", "random", (10_000, 1e-3, 20, 1, 5000.0)),
        ("AdroitHandDoor-v1", "door-human.hdf5", "human", (40_000, 1e-4, 5, 1, 3000.0)),
        ("AdroitHandHammer-v1", "mine.hdf5", "cloned", (40_000, 1e-4, 5, 5, 4000.0)),
        ("AntMaze_UMaze-v4", "D4RL/antmaze/umaze-v1", "umaze", (200_000, 1e-4, 5, 1, 1.0)),
        ("AntMaze_UMaze-v4", "D4RL/antmaze/umaze-diverse-v1", "diverse", (200_000, 1e-4, 1, 5, 1.0)),
    ],
)
def test_row_is_picked_by_environment_and_kind_of_data(env_id, dataset, kind, row):
    args, line = filled(env_id=env_id, dataset=dataset)
    assert args.dataset_kind == kind
    assert (args.updates, args.lr, args.c_offline, args.c_online, args.g_eval) == row
    assert args.warmup == 10_000
    assert line.startswith("row ") and f"{kind} data" in line


def test_given_kind_of_data_beats_the_name_of_the_dataset():
    args, _ = filled(env_id="AntMaze_UMaze-v4", dataset="umaze-v1.hdf5", dataset_kind="diverse")
    assert (args.dataset_kind, args.c_offline, args.c_online) == ("diverse", 1, 5)


def test_environment_outside_the_table_takes_hoppers_row_and_leaves_the_return_to_the_data():
    args, line = filled(env_id="Pendulum-v1")
    assert (args.updates, args.lr, args.c_offline, args.c_online, args.warmup) == (5_000, 1e-4, 20, 1, 10_000)
    assert args.g_eval is None and "no row for Pendulum" in line


# Random streams


def test_streams_differ_by_seed_iteration_and_purpose_and_never_change():
    assert stream(1, 2, "windows") == 2361203437338402168
    names = ("windows", "dropout and entropy", "evaluation 0", "evaluation 1")
    drawn = {stream(seed, step, name) for seed in range(5) for step in range(20) for name in names}
    assert len(drawn) == 5 * 20 * len(names)
    assert all(0 <= value < 2**63 for value in drawn)
    torch.manual_seed(max(drawn))  # the widest that torch takes


# Whole runs


def learning_columns(run_dir):
    """metrics.csv as text, without the columns that measure time."""
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.reader(file))
    keep = [i for i, name in enumerate(rows[0]) if not name.startswith("time/")]
    return [[row[i] for i in keep] for row in rows]


def checkpoint(run_dir):
    """The whole content, but for the folder's own name."""
    content = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert content["args"].pop("run_dir") is not None
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
def runs(tmp_path_factory):
    """{kind: folder of 12 updates in one go}"""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    return {kind: main(toy_args(model=kind, run_dir=str(folder / kind))) for kind in ("dt", "reinformer")}


@KINDS
def test_same_seed_gives_the_same_run_bit_for_bit(runs, kind, tmp_path):
    assert_same_run(main(toy_args(model=kind, run_dir=str(tmp_path / "again"))), runs[kind])


def test_initial_weights_hang_on_the_seed_alone():
    first, again, other = (new_model(toy_args(seed=seed), draw_data()).mean_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_other_seed_gives_other_weights_and_losses(runs, tmp_path):
    other = main(toy_args(seed=2, run_dir=str(tmp_path / "other")))
    ours, theirs = checkpoint(runs["dt"])["weights"], checkpoint(other)["weights"]
    assert not any(torch.equal(ours[name], theirs[name]) for name in ours if name != "return_scale")
    assert all(a[2] != b[2] for a, b in zip(learning_columns(other)[1:3], learning_columns(runs["dt"])[1:3]))


@pytest.mark.parametrize(
    ("kind", "stops"),
    [("dt", [7]), ("dt", [5]), ("dt", [10]), ("dt", [1, 4, 7, 11]), ("dt", [12]), ("reinformer", [5, 8])],
)
def test_resumed_run_equals_one_that_never_stopped(runs, kind, stops, tmp_path):
    run_dir = main(toy_args(model=kind, updates=stops[0], run_dir=str(tmp_path / "split")))
    for updates in [*stops[1:], 12]:
        resume(run_dir, "--updates", updates)
    assert_same_run(run_dir, runs[kind])


def half_written(path, content):
    """A write that stops in the middle: what a full disk or a kill leaves."""
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2])


@pytest.mark.parametrize("where", ["in the middle of the file", "at the renaming"])
@pytest.mark.parametrize(
    ("death", "outcome", "match"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (OSError(28, "No space left on device"), SystemExit, "cannot write .*checkpoint.pt: No space left on device"),
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
    if outcome is SystemExit:  # a full disk is not filled further by halves
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
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


def test_a_half_written_checkpoint_beside_the_whole_one_does_no_harm(runs, tmp_path):
    run_dir = main(toy_args(updates=7, run_dir=str(tmp_path / "split")))
    whole = (run_dir / "checkpoint.pt").read_bytes()
    (run_dir / "checkpoint.tmp").write_bytes(whole[: len(whole) // 2])
    (run_dir / "metrics.tmp").write_text("iteration,char")
    resume(run_dir, "--updates", 12)
    assert_same_run(run_dir, runs["dt"])
    assert not list(run_dir.glob("*.tmp"))


def test_rows_written_after_the_checkpoint_are_cut_off_on_resuming(runs, tmp_path):
    run_dir = main(toy_args(updates=7, run_dir=str(tmp_path / "split")))
    with open(run_dir / "metrics.csv", "a") as file:
        file.write("10,0.01,1.0,2.0\n15,0.0")
    resume(run_dir, "--updates", 12)
    assert_same_run(run_dir, runs["dt"])


def test_a_run_killed_at_any_moment_goes_on_as_if_it_had_not_been(tmp_path):
    run_dir, moments = tmp_path / "killed", np.random.default_rng(0).uniform(0.0, 0.3, size=3)
    sizes = "--embed-dim 16 --n-layers 2 --n-heads 2 --dataset-steps 300 --batch-size 8 --c-offline 5 --c-online 2"
    rates = "--warmup 4 --lr 1e-2 --log-every 2 --eval-episodes 2 --device cpu --threads 1"
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
    whole = toy_args(updates=iteration + 3, log_every=2, run_dir=str(tmp_path / "whole"))
    assert_same_run(run_dir, main(whole))


SHOWN = ("return_mean", "return_std", "length_mean", "distance_mean", "normalized_score")


@KINDS
def test_a_saved_and_reloaded_checkpoint_scores_what_metrics_csv_says(runs, kind, tmp_path, capsys):
    path = str(runs[kind] / "checkpoint.pt")
    args, content = parse_args(["--eval-only", path]), load_checkpoint(Path(path))
    dtype = {"torch.float32": torch.float32, "torch.bfloat16": torch.bfloat16}[content["precision"]]
    model = load_model(content).use_precision(dtype)
    row = dict(zip(*[learning_columns(runs[kind])[i] for i in (0, -1)]))
    envs = make_eval_envs(args, content["env_kwargs"], tmp_path)
    values = run_evaluation(args, model, envs, content["iteration"])
    assert row["iteration"] == "12" and float(row["eval/return_std"]) > 0
    assert set(values) == {*EVALUATION, "time/eval"}
    for name in EVALUATION:
        assert repr(values[name]) == row[name]
    before, printed = sorted(runs[kind].iterdir()), capsys.readouterr().out
    eval_only(args)
    numbers = [f"{float(row[f'eval/{name}']):,.1f}" for name in SHOWN]
    shown = ", ".join(f"{name} {number}" for name, number in zip(SHOWN, numbers))
    assert capsys.readouterr().out == printed == f"evaluation: {shown} (2 episodes, g = 3,600)\n"
    assert sorted(runs[kind].iterdir()) == before


@pytest.mark.parametrize(
    ("env_id", "distances", "row", "line"),
    [
        (
            "Hopper-v5",
            [0.5, 7.75],
            [1416.6, 183.4, 250.0, 4.125, 100 * (1416.6 + 20.272305) / 3254.572305],
            "return_mean 1,416.6, return_std 183.4, length_mean 250.0, distance_mean 4.1, normalized_score 44.1",
        ),
        (
            "Pendulum-v1",
            [math.nan, math.nan],
            [1416.6, 183.4, 250.0, math.nan, math.nan],
            "return_mean 1,416.6, return_std 183.4, length_mean 250.0",
        ),
        (
            "AdroitHandDoor-v1",
            [math.nan, 3.0],  # one that is not known leaves the mean unknown
            [1416.6, 183.4, 250.0, math.nan, 100 * (1416.6 + 56.512833) / 2937.0821417298737],
            "return_mean 1,416.6, return_std 183.4, length_mean 250.0, normalized_score 50.2",
        ),
    ],
    ids=["all", "no position, no score", "no position"],
)
def test_evaluation_gives_means_over_episodes_and_prints_those_that_are_known(
    env_id, distances, row, line, monkeypatch, capsys
):
    played = []

    def outcome(*arguments):
        played.append(arguments)
        return np.array([1233.2, 1600.0]), np.array([100, 400]), np.array(distances)

    monkeypatch.setattr(pretrain_dt, "evaluate", outcome)
    args = toy_args(env_id=env_id, g_eval=7200.0, seed=4)
    values = run_evaluation(args, "model", ["env", "env"], 30)
    assert [values.pop(name) for name in EVALUATION] == pytest.approx(row, rel=1e-12, nan_ok=True)
    assert list(values) == ["time/eval"] and 0.0 <= values["time/eval"] < 5.0
    assert capsys.readouterr().out == f"evaluation: {line} (2 episodes, g = 7,200)\n"
    seeds = [stream(4, 30, f"evaluation {i}") for i in range(2)]
    assert played == [("model", ["env", "env"], 7200.0, 2, seeds)]


def test_eval_only_takes_the_checkpoints_arguments_but_for_those_of_the_evaluation(runs):
    path = str(runs["dt"] / "checkpoint.pt")
    args = parse_args(["--eval-only", path, "--eval-episodes", "3", "--g-eval", "7", "--seed", "9"])
    assert (args.embed_dim, args.c_online, args.env_id) == (16, 2, "Hopper-v5")
    assert (args.eval_episodes, args.g_eval, args.seed) == (3, 7.0, 9)
    with pytest.raises(SystemExit, match="--env-id"):
        parse_args(["--eval-only", path, "--env-id", "Ant-v5"])


MAY_CHANGE = {"updates", "device", "track", "resume"}
FIXED = sorted({field.name for field in dataclasses.fields(Args)} - MAY_CHANGE - {"eval_only"})


def test_resume_keeps_the_saved_arguments_and_takes_the_three_that_may_change(runs):
    flags = ["--resume", str(runs["dt"]), "--updates", "20", "--device", "auto", "--track"]
    args, saved = vars(parse_args(flags)), torch.load(runs["dt"] / "checkpoint.pt", weights_only=True)["args"]
    assert {name for name in args if args[name] != saved[name]} == MAY_CHANGE
    assert (args["updates"], args["device"], args["track"]) == (20, "auto", True)
    assert vars(parse_args(["--resume", str(runs["dt"])])) == saved | {"resume": str(runs["dt"])}


@pytest.mark.parametrize("name", FIXED)
def test_resume_refuses_any_other_argument_by_its_name(runs, name):
    other = dict(env_id="Ant-v5", dataset="mine.hdf5", dataset_kind="expert", model="reinformer", run_dir="elsewhere")
    saved = torch.load(runs["dt"] / "checkpoint.pt", weights_only=True)["args"][name]
    flag = "--" + name.replace("_", "-")
    if isinstance(saved, bool):
        changed = ["--no-" + flag[2:] if saved else flag]
    else:
        changed = [flag, other[name] if name in other else str(type(saved)(2 * saved))]
    with pytest.raises(SystemExit, match=rf"was made with {flag} .* leave {flag} out"):
        parse_args(["--resume", str(runs["dt"]), *changed])


def test_resume_and_eval_only_exclude_each_other(runs):
    with pytest.raises(SystemExit, match="--eval-only"):
        parse_args(["--resume", str(runs["dt"]), "--eval-only", str(runs["reinformer"] / "checkpoint.pt")])


def test_resume_to_fewer_updates_than_were_made_is_refused_and_changes_nothing(runs):
    before = {path: path.read_bytes() for path in runs["dt"].iterdir()}
    with pytest.raises(SystemExit, match="at update 12 already: give --updates 12 or more"):
        resume(runs["dt"], "--updates", 11)
    assert {path: path.read_bytes() for path in runs["dt"].iterdir()} == before


@KINDS
def test_checkpoint_is_plain_and_holds_what_finetuning_needs(runs, kind):
    content = torch.load(runs[kind] / "checkpoint.pt", weights_only=True)
    sizes = dict(obs_dim=11, act_dim=3, embed_dim=16, n_layers=2, n_heads=2, kind=kind)
    assert content["sizes"] == sizes
    DecisionTransformer(**sizes).load_state_dict(content["weights"])
    assert {"obs_mean", "obs_std", "return_scale"} <= set(content["weights"])
    assert content["weights"]["obs_std"].std() > 0 and content["weights"]["return_scale"].item() == pytest.approx(1e-3)
    assert (content["env_id"], content["env_kwargs"]) == ("Hopper-v5", {})
    assert (content["dataset"], content["dataset_kind"]) == ("random", "random")
    data = load_trajectories(toy_args(), make_env("Hopper-v5"))
    best = max(rewards.sum() for rewards in np.split(data.rewards, np.cumsum(data.lengths)[:-1]))
    assert isinstance(content["dataset_best_return"], float) and content["dataset_best_return"] == pytest.approx(best)
    assert (content["g_eval"], content["c_online"], content["iteration"]) == (3600.0, 2, 12)
    assert content["args"]["lr"] == 1e-2 and set(content["args"]) == {field.name for field in dataclasses.fields(Args)}


def test_metrics_hold_a_row_per_log_every_and_one_of_the_evaluation(runs):
    header, *rows = learning_columns(runs["dt"])
    assert header == [name for name in METRICS if not name.startswith("time/")]
    assert [row[0] for row in rows] == ["5", "10", "12"]
    assert [row[1] for row in rows] == ["0.01", "0.01", ""]
    losses, scores = header.index("losses/nll"), header.index("eval/return_mean")
    assert all("" not in row[losses:scores] and set(row[scores:]) == {""} for row in rows[:2])
    assert set(rows[2][1:scores]) == {""} and "" not in rows[2][scores:]


def test_a_row_is_the_mean_over_the_updates_since_the_row_before(runs, tmp_path):
    _, *singles, _ = learning_columns(main(toy_args(updates=10, log_every=1, run_dir=str(tmp_path / "single"))))
    for row, block in zip(learning_columns(runs["dt"])[1:3], (singles[:5], singles[5:])):
        for column in range(2, 2 + len(LOSSES)):
            assert float(row[column]) == pytest.approx(np.mean([float(one[column]) for one in block]), rel=1e-5)


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


@KINDS
def test_tensorboard_holds_the_names_and_numbers_of_metrics_csv(runs, kind):
    assert set(scalars(runs[kind])) == set(METRICS) - {"iteration"}
    assert scalars(runs[kind]) == table(runs[kind])


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
    assert row["eval/normalized_score"] == row["eval/distance_mean"] == ""  # no reference returns, no position


def test_a_folder_that_holds_a_run_is_not_overwritten(runs):
    before = (runs["dt"] / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit, match="holds a run already: go on with --resume"):
        main(toy_args(run_dir=str(runs["dt"])))
    assert (runs["dt"] / "checkpoint.pt").read_bytes() == before
