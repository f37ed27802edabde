"""benchmark/agreement.py: its gradient is that of Eq. 3, and a planted score shows in its table."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import grpo_dt_continuous as grpo

PATH = Path(__file__).resolve().parents[2] / "benchmark" / "agreement.py"
spec = importlib.util.spec_from_file_location("agreement", PATH)
agreement = importlib.util.module_from_spec(spec)
spec.loader.exec_module(agreement)


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["agreement.py", "--threads", "1", "--workers", "0", *map(str, words)])
    agreement.main()


def table(text):
    """{(steps, gamma, scale): (std, agreement, along)} of what was printed."""
    row = re.compile(r"^ *(\d+) +([\d.]+) +([\d.]+)  (Eq. 2|between|one) +(-?[\d.]+) +(-?[\d.]+)$", re.MULTILINE)
    found = {}
    for steps, gamma, std, scale, agrees, along in row.findall(text):
        found[int(steps), float(gamma), scale] = float(std), float(agrees), float(along)
    return found


def test_a_group_counts_by_a_power_of_its_standard_deviation():
    scores = np.array([0.0, 2.0, 10.0, 16.0])  # two groups, of standard deviation 1 and 3
    rms = np.sqrt((1 + 9) / 2)
    for power, weight in {0.0: (1.0, 1.0), 1.0: (1 / rms, 3 / rms), 0.5: (rms**-0.5, (3 / rms) ** 0.5)}.items():
        expected = np.array([-1.0, 1.0, -1.0, 1.0]) * np.repeat(weight, 2)
        np.testing.assert_allclose(agreement.advantages_of(scores, 2, power), expected, rtol=1e-6)
    one = grpo.on_one_scale(grpo.group_advantages(scores, 2, 0.0)[0], scores, 2)
    np.testing.assert_allclose(agreement.advantages_of(scores, 2, 1.0), one, rtol=1e-6)


@pytest.fixture
def model(pretrained):
    return grpo.load_model(grpo.load_checkpoint(pretrained()), torch.device("cpu"), bf16=False).eval()


def sub_trajectories(model, n, steps=15):
    """n of the policy's own, from states drawn at random."""
    torch.manual_seed(2)
    real = torch.ones(n, steps, dtype=torch.bool)
    real[0, 4:] = False  # one that ended early
    observations, returns, nothing = torch.randn(n, steps, 11), torch.randn(n, steps), torch.zeros(n, steps, 3)
    sub = grpo.SubTrajectories(observations, returns, nothing, real, nothing, torch.randn(n), torch.zeros(n, steps))
    with torch.no_grad():
        return sub._replace(u=grpo.distribution(model, sub).sample())


def test_the_gradient_is_the_slope_of_advantage_times_log_probability(model):
    sub = sub_trajectories(model, 6)
    gradient = agreement.policy_gradient(model, sub)
    weights = [weight for weight in model.parameters() if weight.grad is not None]
    start = torch.nn.utils.parameters_to_vector(weights).detach()
    direction = torch.randn(len(start), generator=torch.Generator().manual_seed(3))

    def objective(step):
        torch.nn.utils.vector_to_parameters(start + step * direction, weights)
        with torch.no_grad():
            log_prob = grpo.log_prob(grpo.distribution(model, sub), sub.u).double()
        return (sub.advantage * (log_prob * sub.real).sum(1)).mean().item()

    slope = (objective(1e-3) - objective(-1e-3)) / 2e-3
    assert gradient @ direction.double().numpy() == pytest.approx(slope, rel=1e-2)
    assert gradient @ gradient > 0
    part = sub.take(slice(0, 3)), sub.take(slice(3, 6))
    torch.nn.utils.vector_to_parameters(start, weights)
    halves = [agreement.policy_gradient(model, each) for each in part]
    np.testing.assert_allclose(sum(halves) / 2, gradient, atol=1e-5 * np.abs(gradient).max())


def test_what_is_good_at_once_and_bad_later_has_opposite_gradients(monkeypatch, capsys, pretrained, model):
    sub, rng = sub_trajectories(model, 32 * 8), np.random.default_rng(4)
    with torch.no_grad():
        dist = grpo.distribution(model, sub)
    rewards = np.zeros((32 * 8, 200))
    rewards[:, 0] = ((sub.u - dist.mean) / dist.stddev)[..., 0].sum(1)  # a gain at once
    rewards[:, 150] = -3.0 * rewards[:, 0]  # that is paid for later
    rewards[:, 100] = 20.0 * rng.standard_normal(len(rewards))  # and noise on the way
    monkeypatch.setattr(agreement, "roll_out", lambda *_: (model, sub, rewards))
    run(monkeypatch, pretrained(), "--groups", 32, "--horizons", 200, 15, 120, "--gammas", 1.0)
    found = table(capsys.readouterr().out)
    assert len(found) == 9
    clear, noisy, longest = found[15, 1.0, "one"], found[120, 1.0, "one"], found[200, 1.0, "one"]
    assert clear[1] > 0.3 > 2 * abs(noisy[1])
    assert clear[2] < -0.1 < 0 < longest[2]
    std = np.median(rewards[:, :15].sum(1).reshape(-1, 8).std(1))
    assert clear[0] == pytest.approx(std, abs=0.006)


def test_groups_are_rolled_out_and_every_score_has_its_rows(monkeypatch, capsys, pretrained):
    run(monkeypatch, pretrained(), "--groups", 16, "--horizons", 15, 30)
    text = capsys.readouterr().out
    assert "128 sub-trajectories of up to 30 steps" in text
    found = table(text)
    assert set(found) == {(h, g, s) for h in (15, 30) for g in (0.995, 0.999) for s in agreement.SCALES}
    assert all(-1 <= value <= 1 for _, *cosines in found.values() for value in cosines)
    assert found[30, 0.999, "one"][0] > 0


def test_sizes_that_cannot_be_are_refused(monkeypatch, pretrained, refused):
    with refused("--groups", "16"):
        run(monkeypatch, pretrained(), "--groups", 20)
    with refused("--horizons", "15"):
        run(monkeypatch, pretrained(), "--horizons", 10, 30)
    with refused("--gammas"):
        run(monkeypatch, pretrained(), "--gammas", 1.5)
    with refused("--workers", "-1"):
        run(monkeypatch, pretrained(), "--workers", -1)
    with refused("nowhere", "not found"):
        run(monkeypatch, "nowhere")
