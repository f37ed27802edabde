"""benchmark/reinformer.py: the network against its formulas written out, and runs from its own command line."""

import csv
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import grpo_dt_continuous as grpo
import pretrain_dt

ROOT = Path(__file__).resolve().parents[2]
PATH = ROOT / "benchmark" / "reinformer.py"
spec = importlib.util.spec_from_file_location("benchmark_reinformer", PATH)
reinformer = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = reinformer
spec.loader.exec_module(reinformer)

S, A = 11, 3
TOY = "--n-sources 2 --n-points 2 --group-size 4 --l-traj 5 --l-eval 10 --delta-r 0 --n-batch 8 --n-minibatches 2 "
TOY += "--eval-episodes 1 --lr 1e-2 --no-cuda --no-bf16 --threads 1"
PRETRAIN = (
    "--dataset-steps 300 --embed-dim 16 --n-layers 2 --n-heads 2 --batch-size 8 --c-offline 5 --updates 4 --lr 1e-2 "
)
PRETRAIN += "--warmup 1 --log-every 2 --eval-episodes 1 --no-cuda --threads 1"


@pytest.fixture(autouse=True)
def own_model_again(monkeypatch):
    """The command line puts Reinformer in the scripts' place: not for the tests after."""
    torch.set_num_threads(1)
    monkeypatch.setattr(grpo, "DecisionTransformer", grpo.DecisionTransformer)
    monkeypatch.setattr(pretrain_dt, "DecisionTransformer", pretrain_dt.DecisionTransformer)
    monkeypatch.setattr(pretrain_dt, "pretrain_loss", pretrain_dt.pretrain_loss)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """{kind: folder of a toy run of pretraining}"""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.set_num_threads(1)
    pretrain_dt.main(pretrain_dt.parse_args([*PRETRAIN.split(), "--run-dir", str(folder / "dt")]))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DecisionTransformer", "pretrain_loss"):
            patch.setattr(pretrain_dt, name, getattr(pretrain_dt, name))
        patch.setattr(grpo, "DecisionTransformer", grpo.DecisionTransformer)
        reinformer.command_line(["pretrain", *PRETRAIN.split(), "--run-dir", str(folder / "reinformer")])
    return {kind: folder / kind for kind in ("dt", "reinformer")}


def rows_of(run_dir):
    with open(Path(run_dir) / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in csv.DictReader(file)]


def command(*arguments, cwd=None):
    """The command line in a process of its own."""
    words = [sys.executable, str(PATH), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"})


# The network


def sharp_model():
    """Weights of order 1: at the usual 0.02, attention is too flat to show mistakes."""
    torch.manual_seed(0)
    model = reinformer.Reinformer(S, A, embed_dim=16, n_layers=3, n_heads=2).eval().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    model.obs_mean.normal_()
    model.obs_std.uniform_(0.5, 2.0)
    model.return_scale.fill_(0.125)
    return model


def draw_windows(context, seed=1):
    """Windows of 1 to K real steps behind padding that holds garbage."""
    torch.manual_seed(seed)
    n = 2 * context
    observations, returns = torch.randn(n, context, S), 20 * torch.randn(n, context)
    actions = torch.rand(n, context, A) * 2 - 1
    real = torch.arange(context) >= torch.arange(n)[:, None] % context
    return observations, returns, actions, real


def by_hand(model, observations, returns, actions):
    """Of one window without padding, in float64: mean, std (K, A) and predicted return (K,) of each step."""
    w = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    observations, returns, actions = (x.double().numpy() for x in (observations, returns, actions))

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    tokens = []
    for s, g, a in zip((observations - w["obs_mean"]) / w["obs_std"], returns * w["return_scale"], actions):
        tokens += [linear(s, "embed_observation"), linear(np.array([g]), "embed_return"), linear(a, "embed_action")]
    x = norm(np.stack(tokens[:-1]), "norm_in")  # s, g, a, ..., s, g
    for i in range(3):
        h = norm(x, f"blocks.{i}.norm1")
        q = linear(h, f"blocks.{i}.query")
        k, v = np.split(linear(h, f"blocks.{i}.key_value"), 2, axis=1)
        mixed = np.zeros_like(h)
        for part in (slice(0, 8), slice(8, 16)):  # heads
            for t in range(len(x)):
                weights = np.exp(k[: t + 1, part] @ q[t, part] / math.sqrt(8))
                mixed[t, part] = weights / weights.sum() @ v[: t + 1, part]
        x = x + linear(mixed, f"blocks.{i}.project")
        up = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.up")
        x = x + linear(up / (1 + np.exp(-up)), f"blocks.{i}.down")
    x = norm(x, "norm_out")
    log_std = -5 + 3.5 * (np.tanh(linear(x[1::3], "log_std_head")) + 1)
    return linear(x[1::3], "mean_head"), np.exp(log_std), linear(x[0::3], "return_head")[:, 0] / w["return_scale"]


@pytest.mark.parametrize("context", [1, 2, 5])
def test_the_network_is_that_of_its_formulas_written_out(context):
    model, windows = sharp_model(), draw_windows(context)
    last, every = model(*windows), model(*windows, every_step=True)
    conditioned = model.conditioned_on(*windows)
    for i, (observations, returns, actions, real) in enumerate(zip(*windows)):
        mean, std, predicted = by_hand(model, observations[real], returns[real], actions[real])
        np.testing.assert_allclose(every.mean[i, real].numpy(), mean, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(every.stddev[i, real].numpy(), std, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(last.mean[i].numpy(), mean[-1], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(last.stddev[i].numpy(), std[-1], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(conditioned[i, -1].item(), predicted[-1], rtol=1e-3, atol=1e-3)
        assert torch.equal(conditioned[i, :-1], returns[:-1])


@pytest.mark.parametrize("context", [1, 5])
def test_the_return_that_is_asked_for_is_not_read(context):
    model, (observations, returns, actions, real) = sharp_model(), draw_windows(context)
    other = returns.clone()
    other[:, -1] += 99.0
    one, two = (model.conditioned_on(observations, g, actions, real) for g in (returns, other))
    torch.testing.assert_close(one, two)
    assert not torch.allclose(
        model(observations, one, actions, real).mean, model(observations, other, actions, real).mean
    )


def test_law_and_returns_of_every_step_are_those_of_forward_and_of_the_formulas():
    model, windows = sharp_model(), draw_windows(5)
    dist, predicted = model.law_and_returns(*windows)
    every = model(*windows, every_step=True)
    torch.testing.assert_close(dist.mean, every.mean)
    torch.testing.assert_close(dist.stddev, every.stddev)
    for i, (observations, returns, actions, real) in enumerate(zip(*windows)):
        *_, expected = by_hand(model, observations[real], returns[real], actions[real])
        np.testing.assert_allclose(predicted[i, real].numpy(), expected, rtol=1e-3, atol=1e-3)


def test_dropout_works_in_pretraining_only():
    torch.manual_seed(0)
    model, windows = reinformer.Reinformer(S, A, embed_dim=16, n_layers=1, n_heads=2, dropout=0.5), draw_windows(5)
    assert not torch.equal(model(*windows).mean, model(*windows).mean)
    model.eval()
    assert torch.equal(model(*windows).mean, model(*windows).mean)


# The loss


def test_expectile_loss_weighs_low_and_high_errors_by_tau():
    loss = reinformer.expectile_loss(torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0]), 0.9)
    torch.testing.assert_close(loss, torch.tensor([0.1 * 4, 0.1 * 0.25, 0.0, 0.9 * 0.25, 0.9 * 4]))


@pytest.mark.parametrize("tau", [0.5, 0.9, 0.99])
def test_minimiser_of_the_expectile_loss_goes_from_the_mean_to_the_maximum(tau):
    prediction = torch.linspace(0.0, 1.0, 1001)
    loss = sum(reinformer.expectile_loss(target - prediction, tau) for target in (0.0, 1.0))
    assert prediction[loss.argmin()].item() == pytest.approx(tau, abs=2e-3)  # in closed form: of {0, 1} it is tau


def test_loss_is_pretrainings_plus_the_expectile_loss_over_real_steps_written_out():
    model, windows = sharp_model(), pretrain_dt.Windows(*draw_windows(4))
    torch.manual_seed(5)
    theirs, values = pretrain_dt.pretrain_loss(model, windows, torch.tensor(0.7))
    torch.manual_seed(5)
    loss, ours = reinformer.reinformer_loss(model, windows, torch.tensor(0.7))
    _, predicted = model.law_and_returns(*windows)
    steps = [(b, k) for b in range(len(windows.real)) for k in range(4) if windows.real[b, k]]
    size = sum(abs(windows.returns[step].item()) for step in steps) / len(steps)
    expected = 0.0
    for step in steps:
        error = (windows.returns[step] - predicted[step]).item() / size
        expected += (0.99 if error > 0 else 0.01) * error**2 / len(steps)
    assert ours["return"].item() == pytest.approx(expected, rel=1e-4) and expected > 0
    assert loss.item() == pytest.approx(theirs.item() + expected, rel=1e-4)
    for name, value in values.items():
        assert ours[name].item() == pytest.approx(value.item(), rel=1e-4)


@pytest.mark.parametrize(("expectile", "expected"), [(0.99, 2.98), (0.5, 2.0)])
def test_it_predicts_the_best_of_two_returns_from_the_same_state(expectile, expected, monkeypatch):
    monkeypatch.setattr(reinformer, "EXPECTILE", expectile)

    def return_loss(*given):  # the return is what is tested; the actions conflict
        _, values = reinformer.reinformer_loss(*given)
        return 1000.0 * values["return"], values

    monkeypatch.setattr(pretrain_dt, "pretrain_loss", return_loss)
    both = np.array([1.0, 3.0], np.float32)
    rng = np.random.default_rng(0)
    observations = np.repeat(rng.normal(size=(1, S)).astype(np.float32), 2, axis=0)
    actions = rng.uniform(-0.9, 0.9, (2, A)).astype(np.float32)
    data = pretrain_dt.Dataset(observations, actions, both, both, np.array([1, 1]), np.zeros(2, bool))
    torch.manual_seed(0)
    model = reinformer.Reinformer(S, A, embed_dim=16, n_layers=2, n_heads=2)
    args = pretrain_dt.Args(c_offline=1, lr=5e-3, warmup=10, batch_size=32)
    learner, predictions = pretrain_dt.Learner(model, args), []
    window = torch.from_numpy(observations[:1, None]), torch.zeros(1, 1), torch.zeros(1, 1, A), torch.ones(1, 1).bool()
    for i in range(200):
        learner.update(data, np.random.default_rng(i))
        predictions.append(model.conditioned_on(*window).item())
    assert np.mean(predictions[-50:]) == pytest.approx(expected, abs=0.25)  # LAMB keeps it moving


# Runs


def test_pretraining_logs_the_return_loss_resumes_bit_for_bit_and_names_its_kind(pretrained, tmp_path):
    content = torch.load(pretrained["reinformer"] / "checkpoint.pt", weights_only=True)
    assert (content["sizes"]["kind"], content["script"]) == ("reinformer", "pretrain_dt")
    assert [float(row["losses/return"]) > 0 for row in rows_of(pretrained["reinformer"])[:2]] == [True, True]
    words = ["pretrain", *PRETRAIN.split(), "--run-dir", str(tmp_path / "split")]
    reinformer.command_line([*words, "--updates", "3"])
    reinformer.command_line(["pretrain", "--resume", str(tmp_path / "split"), "--updates", "4"])
    assert rows_of(tmp_path / "split") == rows_of(pretrained["reinformer"])
    again = torch.load(tmp_path / "split" / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(again["weights"][name], value) for name, value in content["weights"].items())


def test_pretraining_moves_the_return_head_and_evaluates_what_it_saved(pretrained, capsys):
    reinformer.command_line(["pretrain", "--eval-only", str(pretrained["reinformer"])])
    score = float(rows_of(pretrained["reinformer"])[-1]["eval/return_mean"])
    assert f"return_mean {score:,.1f}" in capsys.readouterr().out
    weights = torch.load(pretrained["reinformer"] / "checkpoint.pt", weights_only=True)["weights"]
    torch.manual_seed(1)
    untrained = reinformer.Reinformer(S, A, embed_dim=16, n_layers=2, n_heads=2)
    assert not torch.equal(weights["return_head.weight"], untrained.return_head.weight)


@pytest.mark.parametrize("context", [1, 5])
def test_a_run_acts_on_the_predicted_returns_and_its_ratio_begins_at_1(context, pretrained, tmp_path):
    words = f"--pretrained {pretrained['reinformer']} --iterations 1 --c-online {context} --run-dir {tmp_path / 'run'}"
    reinformer.command_line(["finetune", *words.split(), *TOY.split()])
    _, row = rows_of(tmp_path / "run")
    assert float(row["losses/ratio_first"]) == pytest.approx(1.0, abs=1e-4)
    assert float(row["losses/ratio_max"]) > 1.001  # and then it moves
    content = torch.load(pretrained["reinformer"] / "checkpoint.pt", weights_only=True)
    model = reinformer.Reinformer(**content["sizes"]).eval().requires_grad_(False)
    model.load_state_dict(content["weights"])
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["sizes"] == content["sizes"] and saved["script"] == "grpo_dt_continuous"
    for trajectory in saved["replay"]:  # rolled out before the first update
        windows = [grpo.windows(field[None], context) for field in trajectory[:4]]
        predicted = model.conditioned_on(*windows)[:, -1]
        torch.testing.assert_close(trajectory[1][context - 1 :], predicted, rtol=1e-4, atol=1e-2)
    assert abs(predicted - 7200.0).min() > 1000.0  # not the return that was asked for
    head = "return_head.weight"
    assert torch.equal(saved["weights"][head], content["weights"][head])
    assert not torch.equal(saved["weights"]["mean_head.weight"], content["weights"]["mean_head.weight"])
    embedding = "embed_action.weight"  # no token at a context of 1
    assert torch.equal(saved["weights"][embedding], content["weights"][embedding]) == (context == 1)


def test_the_command_line_runs_resumes_and_evaluates(pretrained, tmp_path, capsys):
    words = ["finetune", *f"--pretrained {pretrained['reinformer']} --c-online 5".split(), *TOY.split()]
    done = command(*words, "--iterations", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("Hopper-v5__grpo_dt_continuous__random__1__")
    done = command("finetune", "--resume", run_dir, "--iterations", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((run_dir / "args.json").read_text())["command"][0] == str(PATH)
    reinformer.command_line([*words, "--iterations", "3", "--run-dir", str(tmp_path / "whole")])
    assert rows_of(run_dir) == rows_of(tmp_path / "whole") and len(rows_of(run_dir)) == 4
    reinformer.command_line(["finetune", "--eval-only", str(run_dir)])
    score = float(rows_of(run_dir)[-1]["eval/return_mean"])
    assert f"return_mean {score:,.1f}" in capsys.readouterr().out  # the saved model scores what it scored in memory


# Refusals


def refused(named):
    """The block ends with one line that names this, and so with exit code 1."""
    return pytest.raises(SystemExit, match=rf"\Aerror: [^\n]*{named}[^\n]*\Z")


def test_the_script_names_this_one_for_a_reinformer_and_this_one_takes_no_other(pretrained, tmp_path):
    runs = [f"--run-dir {tmp_path / 'run'} --pretrained {folder}".split() for folder in pretrained.values()]
    with refused("benchmark/reinformer.py"):
        grpo.main(grpo.parse_args(runs[1]))
    with refused("holds a dt"):
        reinformer.command_line(["finetune", *runs[0]])
    assert not (tmp_path / "run").exists()


def test_the_command_prints_one_line_and_exits_with_1():
    for words, named in (
        ([], "give pretrain or finetune"),
        (["--seed", 1], "finetune"),
        (["finetune"], "--pretrained"),
    ):
        done = command(*words)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1) and named in done.stderr
