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

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "benchmark" / "reinformer.py"
spec = importlib.util.spec_from_file_location("benchmark_reinformer", PATH)
reinformer = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = reinformer
spec.loader.exec_module(reinformer)

S, A = 11, 3
TOY = "--n-sources 2 --n-points 2 --group-size 4 --l-traj 5 --l-eval 10 --delta-r 0 --n-batch 8 --n-minibatches 2 "
TOY += "--eval-episodes 1 --lr 1e-2 --no-cuda --no-bf16 --threads 1"


@pytest.fixture(autouse=True)
def own_model_again(monkeypatch):
    """The command line puts Reinformer in the script's place: not for the tests after."""
    torch.set_num_threads(1)
    monkeypatch.setattr(grpo, "DecisionTransformer", grpo.DecisionTransformer)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """{kind: folder of a toy run of pretrain_dt.py}"""
    folder = tmp_path_factory.mktemp("pretrained")
    toy = dict(dataset_steps=300, embed_dim=16, n_layers=2, n_heads=2, batch_size=8, c_offline=5, updates=4)
    toy |= dict(lr=1e-2, warmup=1, eval_episodes=1, device="cpu", threads=1)
    torch.set_num_threads(1)
    kinds = ("dt", "reinformer")
    return {kind: pretrain_dt.main(pretrain_dt.Args(model=kind, run_dir=str(folder / kind), **toy)) for kind in kinds}


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


# Runs


@pytest.mark.parametrize("context", [1, 5])
def test_a_run_acts_on_the_predicted_returns_and_its_ratio_begins_at_1(context, pretrained, tmp_path):
    words = f"--pretrained {pretrained['reinformer']} --iterations 1 --c-online {context} --run-dir {tmp_path / 'run'}"
    reinformer.command_line([*words.split(), *TOY.split()])
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
    words = [*f"--pretrained {pretrained['reinformer']} --c-online 5".split(), *TOY.split()]
    done = command(*words, "--iterations", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("Hopper-v5__grpo_dt_continuous__random__1__")
    done = command("--resume", run_dir, "--iterations", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((run_dir / "args.json").read_text())["command"][0] == str(PATH)
    reinformer.command_line([*words, "--iterations", "3", "--run-dir", str(tmp_path / "whole")])
    assert rows_of(run_dir) == rows_of(tmp_path / "whole") and len(rows_of(run_dir)) == 4
    reinformer.command_line(["--eval-only", str(run_dir)])
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
        reinformer.command_line(runs[0])
    assert not (tmp_path / "run").exists()


def test_the_command_prints_one_line_and_exits_with_1():
    done = command()
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1) and "--pretrained" in done.stderr
