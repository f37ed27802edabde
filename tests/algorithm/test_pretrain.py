"""Optimiser, loss, schedule and rows of pretrain_dt.py, by hand."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

import pretrain_dt
from pretrain_dt import (
    Args,
    Dataset,
    DecisionTransformer,
    Lamb,
    Learner,
    Windows,
    draw_windows,
    fill_from_row,
    load_model,
    masked_mean,
    pretrain_loss,
    pretraining_facts,
    start_or_resume,
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


def test_masked_mean_is_the_mean_over_real_steps():
    values, real = torch.tensor([[99.0, 1.0, 2.0], [-99.0, -99.0, 6.0]]), torch.tensor([[0, 1, 1], [0, 0, 1]]).bool()
    assert masked_mean(values, real).item() == pytest.approx(3.0)


def some_windows(seed=0):
    """Three windows of up to four steps, left-padded with garbage; float64."""
    torch.manual_seed(seed)
    real = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    observations, returns = torch.randn(3, 4, 5).double(), 3 + 5 * torch.randn(3, 4).double()
    return Windows(observations, returns, torch.rand(3, 4, 2).double() * 1.8 - 0.9, real)


def draw_model(dropout=0.0):
    torch.manual_seed(1)
    model = DecisionTransformer(5, 2, embed_dim=16, n_layers=2, n_heads=2, dropout=dropout)
    model.return_scale.fill_(0.5)
    return model.double()


@pytest.fixture
def float64(monkeypatch):
    """The last block's output stays float64, for sums to compare."""
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)


def test_pretrain_loss_equals_the_sum_over_real_steps_written_out(float64):
    model, windows, kappa = draw_model(), some_windows(), 0.7
    dist = model(*windows, every_step=True)
    torch.manual_seed(5)
    sampled = dist.rsample()
    steps = [(b, k) for b in range(3) for k in range(4) if windows.real[b, k]]
    assert len(steps) == 8
    nll = entropy = mse = 0.0
    for b, k in steps:
        mean, std = dist.mean[b, k], dist.stddev[b, k]
        law = TransformedDistribution(Normal(mean, std), [TanhTransform()])
        nll -= law.log_prob(windows.actions[b, k]).sum().item() / 8
        entropy -= law.log_prob(torch.tanh(sampled[b, k])).sum().item() / 8
        mse += ((torch.tanh(mean) - windows.actions[b, k]) ** 2).sum().item() / 16
    torch.manual_seed(5)
    loss, values = pretrain_loss(model, windows, torch.tensor(kappa))
    ours = [values[name].item() for name in ("nll", "entropy", "action_mse")]
    assert ours == pytest.approx([nll, entropy, mse], rel=1e-6)
    assert loss.item() == pytest.approx(nll - kappa * entropy, rel=1e-6)


def test_the_gradient_is_the_slope_of_the_loss_also_through_the_sampled_entropy(float64):
    model, windows = draw_model(), some_windows()
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach()

    def loss(theta):
        torch.nn.utils.vector_to_parameters(theta, model.parameters())
        torch.manual_seed(5)
        return pretrain_loss(model, windows, torch.tensor(0.7))[0]

    loss(start).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    step = 1e-5 * torch.randn_like(start)
    slope = (loss(start + step) - loss(start - step)).item() / 2
    assert abs(slope) > 1e-6 and slope == pytest.approx((gradient @ step).item(), rel=1e-4)


def test_loss_and_gradients_do_not_hang_on_what_the_padding_holds(float64):
    results = []
    for garbage in (0.0, 0.9):
        model, windows = draw_model(), some_windows()
        for array in windows[:3]:
            array[~windows.real] = garbage
        torch.manual_seed(5)
        loss, values = pretrain_loss(model, windows, torch.tensor(0.5))
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append(torch.cat([torch.stack([loss, *values.values()]), gradients]).detach())
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_loss_reaches_every_weight_but_the_unread_last_action(float64):
    model, windows = draw_model(), some_windows()
    pretrain_loss(model, windows, torch.tensor(0.5))[0].backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    windows.actions.requires_grad_(True)
    model(*windows, every_step=True).mean.sum().backward()
    assert not windows.actions.grad[:, -1].any() and windows.actions.grad[:, :-1].any()


# An update


def draw_data(steps=10):
    """One trajectory of observations (steps, 4) and actions (steps, 2)."""
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(steps, 4)).astype(np.float32)
    actions = rng.uniform(-0.9, 0.9, size=(steps, 2)).astype(np.float32)
    rewards = rng.uniform(size=steps).astype(np.float32)
    returns = rewards[::-1].cumsum()[::-1].copy()
    return Dataset(observations, actions, rewards, returns, np.array([steps]), np.array([False]))


def new_model(args, data):
    base = start_or_resume(args, data, pretraining_facts(args, data, {}))
    return load_model(base, torch.device("cpu"), bf16=False, dropout=args.dropout)


def new_learner(data=None, **changes):
    """A learner, and what gives it another update."""
    args, data = toy_args(**(dict(dropout=0.0) | changes)), data or draw_data()
    learner = Learner(new_model(args, data), args)
    return learner, lambda: learner.update(data, np.random.default_rng(learner.updates))


def spied(monkeypatch):
    """The arguments of the calls of pretrain_loss."""
    calls = []
    monkeypatch.setattr(pretrain_dt, "pretrain_loss", lambda *given: calls.append(given) or pretrain_loss(*given))
    return calls


def test_an_update_draws_batch_size_windows_of_c_offline_steps_and_drops_out(monkeypatch):
    learner, update = new_learner(dropout=0.3, batch_size=7, c_offline=4, c_online=2)
    calls = spied(monkeypatch)
    update()
    ((model, windows, _),) = calls
    assert model is learner.model and model.training and windows.real.shape == (7, 4)
    assert not torch.equal(model(*windows).mean, model(*windows).mean)


@pytest.mark.parametrize(("log_std_bias", "direction"), [(-5.0, +1), (0.5, -1)])
def test_kappa_rises_below_the_target_entropy_and_falls_above_it_by_adams_first_step(log_std_bias, direction):
    learner, update = new_learner(kappa_initial=0.2, kappa_lr=1e-2)
    torch.nn.init.zeros_(learner.model.log_std_head.weight)
    torch.nn.init.constant_(learner.model.log_std_head.bias, log_std_bias)
    update()
    (losses,) = learner.logged
    assert np.sign(-2.0 - losses["entropy"].item()) == direction  # target: -dim A
    assert losses["kappa"].item() == pytest.approx(0.2)  # the one in the loss, before it moves
    assert learner.log_kappa.item() == pytest.approx(math.log(0.2) + direction * 1e-2, abs=1e-6)


def test_kappa_follows_the_gradient_kappa_times_entropy_minus_target(monkeypatch):
    learner, update = new_learner(kappa_initial=0.2, kappa_lr=0.5)
    log_kappa, m, v, calls = math.log(0.2), 0.0, 0.0, spied(monkeypatch)
    for t in (1, 2, 3):
        update()
        assert calls[-1][2].item() == pytest.approx(math.exp(log_kappa), rel=1e-4)  # in the loss, before it moves
        gradient = math.exp(log_kappa) * (learner.logged[-1]["entropy"].item() + 2.0)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        log_kappa -= 0.5 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
        assert learner.log_kappa.item() == pytest.approx(log_kappa, abs=1e-4)


def test_learning_rate_warms_up_linearly_and_then_stays():
    learner, update = new_learner(lr=0.02, warmup=4)
    rates = []
    for _ in range(6):
        update()
        rates.append(learner.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.005, 0.01, 0.015, 0.02, 0.02, 0.02])


def test_first_update_moves_each_tensor_by_the_warmed_up_rate_of_its_norm():
    learner, update = new_learner(lr=0.02, warmup=4)
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    update()
    for name, p in learner.model.named_parameters():
        moved, norm = (p - before[name]).norm().item(), before[name].norm().item()
        assert moved == pytest.approx(0.005 * norm, rel=1e-2) or norm == 0.0 < moved, name


def test_gradients_are_clipped_to_the_global_norm_and_logged_unclipped():
    learner, update = new_learner(max_grad_norm=0.25)
    norms, step = [], learner.optimizer.step

    def measured():
        norms.append(torch.cat([p.grad.flatten() for p in learner.model.parameters()]).norm().item())
        step()

    learner.optimizer.step = measured
    update()
    assert norms == [pytest.approx(0.25, rel=1e-4)]
    assert learner.logged[0]["grad_norm"].item() > 1.0


def test_a_loss_that_is_not_finite_ends_the_run_in_a_line():
    learner, update = new_learner()
    update()
    update()
    learner.logged[0]["nll"] = torch.tensor(math.nan)
    with pytest.raises(SystemExit, match=r"\Aerror: [^\n]*loss[^\n]*\Z"):
        learner.metrics()


def test_logged_losses_are_means_over_the_updates_since_the_last_row():
    learner, update = new_learner(lr=0.02, warmup=4)
    for _ in range(3):
        update()
    metrics = learner.metrics()
    assert list(metrics) == [*(f"losses/{name}" for name in LOSSES), "charts/learning_rate"]
    for name in LOSSES:
        expected = np.mean([values[name].item() for values in learner.logged])
        assert metrics[f"losses/{name}"] == pytest.approx(expected, rel=1e-5)
    assert metrics["charts/learning_rate"] == pytest.approx(0.015)


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
    learner, update = new_learner(data, embed_dim=32, lr=1e-2, warmup=20, batch_size=16)

    def action_mse():
        windows = draw_windows(data, 5, 64, np.random.default_rng(0))
        with torch.no_grad():
            return pretrain_loss(learner.model, windows, torch.tensor(0.0))[1]["action_mse"].item()

    before = action_mse()
    for _ in range(200):
        update()
    assert before > 0.2 and action_mse() < 0.01


# The table


def filled(capsys, best_return=-7.5, **changes):
    args = Args(**changes)
    fill_from_row(args, best_return)
    return args, capsys.readouterr().out


@pytest.mark.parametrize(
    ("updates", "warmup"), [(None, 10_000), (5_000, 10_000), (9_000, 10_000), (4_999, 499), (500, 50), (3, 1)]
)
def test_warmup_is_10000_for_the_rows_updates_and_a_tenth_of_fewer(updates, warmup, capsys):
    args, line = filled(capsys, env_id="Hopper-v5", updates=updates)
    assert (args.updates, args.warmup) == (updates or 5_000, warmup)
    assert f"updates {args.updates}, " in line and f"warmup {warmup}\n" in line


def test_flags_override_the_row(capsys):
    args, _ = filled(capsys, env_id="Hopper-v5", updates=7, lr=0.5, warmup=3, c_offline=4, c_online=2, g_eval=1.0)
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
def test_row_is_picked_by_environment_and_kind_of_data(env_id, dataset, kind, row, capsys):
    args, line = filled(capsys, env_id=env_id, dataset=dataset)
    assert args.dataset_kind == kind
    assert (args.updates, args.lr, args.c_offline, args.c_online, args.g_eval) == row
    assert args.warmup == 10_000
    assert line.startswith("row ") and f"{kind} data" in line


def test_given_kind_of_data_beats_the_name_of_the_dataset(capsys):
    args, _ = filled(capsys, env_id="AntMaze_UMaze-v4", dataset="umaze-v1.hdf5", dataset_kind="diverse")
    assert (args.dataset_kind, args.c_offline, args.c_online) == ("diverse", 1, 5)


def test_environment_outside_the_table_takes_hoppers_row_and_the_best_return_of_the_data(capsys):
    args, line = filled(capsys, env_id="Pendulum-v1")
    assert (args.updates, args.lr, args.c_offline, args.c_online, args.warmup) == (5_000, 1e-4, 20, 1, 10_000)
    assert args.g_eval == -7.5 and "row outside the table (random data)" in line and "g_eval -7.5" in line


def test_initial_weights_hang_on_the_seed_alone():
    first, again, other = (new_model(toy_args(seed=seed), draw_data()).mean_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
