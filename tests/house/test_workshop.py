"""The workshop: its notebook runs and shows what it says, its solutions apply to the script and do what they say, and
benchmark/compare.py sets a changed copy beside the original."""

import csv
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

import grpo_dt_continuous as grpo

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = json.loads((ROOT / "docs" / "workshop.ipynb").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "workshop.md").read_text(encoding="utf-8")
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def load(path: Path, name: str):
    """The module in a file."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


compare = load(ROOT / "benchmark" / "compare.py", "benchmark_compare")


# ---- The notebook ---------------------------------------------------------------------------------------------------


def run_notebook(monkeypatch, settings: str) -> dict:
    """The names that its cells leave behind, run from top to bottom; `settings` is run after the cell that has them."""
    from matplotlib import pyplot

    monkeypatch.setattr(sys, "path", [*sys.path])
    names = {"__name__": "__main__"}
    pyplot.switch_backend("agg")  # closes all figures
    with matplotlib.rc_context():
        for cell in CODE:
            source = "".join(cell["source"])
            exec(compile(source, cell["id"], "exec"), names)
            if "SETTINGS =" in source:
                exec(settings, names)
        names["figures"] = len(pyplot.get_fignums())
    pyplot.close("all")
    return names


def check_pictures(names: dict) -> None:
    """What the pictures show, against what it must be."""
    args, group_size = names["args"], names["args"].group_size
    assert names["figures"] == 6
    assert all(returns.shape == (9, names["EPISODES"]) for returns in names["reached"].values())
    assert names["probability"].sum() == pytest.approx(1.0, abs=1e-5)
    assert names["frequency"].sum() == pytest.approx(1.0)
    assert len(names["points"]) == args.n_points and max(names["points"]) < len(names["variance"])
    p = names["probability"].astype(float)  # of 5,000 draws: within six standard deviations and a draw
    assert (np.abs(names["frequency"] - p) < 6 * np.sqrt(p * (1 - p) / 5_000) + 1 / 5_000).all()

    groups = names["advantages"].reshape(-1, group_size)
    spread = names["spread"] > 1e-3
    assert spread.any() and names["keep"].any()
    assert groups[spread].mean(1) == pytest.approx(0.0, abs=1e-6)
    assert groups[spread].std(1) == pytest.approx(1.0, abs=1e-3)
    deviations = names["scores"].reshape(-1, group_size) - names["scores"].reshape(-1, group_size).mean(1)[:, None]
    assert names["mine"].reshape(-1, group_size) == pytest.approx(deviations)

    before, after = names["before"], names["after"]
    assert before["plain"] == pytest.approx(1.0, abs=1e-4)
    assert np.abs(np.log(before["hindsight"])).mean() > 0.02
    sub = names["learner"].buffer
    lengths = sub.real[:, -sub.u.shape[1] :].sum(1).numpy()
    assert len(after["token"]) == lengths.sum() and np.abs(np.log(after["sequence"])).max() > 1e-3
    totals = np.add.reduceat(np.log(after["token"]), np.cumsum(lengths) - lengths)
    assert np.log(after["sequence"]) == pytest.approx(totals, abs=1e-3)
    assert np.log(after["geometric"]) == pytest.approx(totals / lengths, abs=1e-3)


def test_the_notebook_runs_at_toy_size_and_shows_what_it_says(pretrained, monkeypatch, capsys):
    toy = dict(pretrained=pretrained(), n_sources=2, l_traj=4, l_eval=10, n_batch=16, delta_r=0.01, lr=1e-3, threads=1)
    names = run_notebook(monkeypatch, f"SETTINGS |= {toy}; EPISODES = 2")
    check_pictures(names)
    assert list(Path.cwd().iterdir()) == []  # it leaves no files
    assert "plain: mean 1.000" in capsys.readouterr().out


@pytest.mark.slow
def test_the_notebook_runs_as_it_is_in_a_quarter_of_an_hour(monkeypatch):
    begun = sum(os.times()[:4])  # processor seconds, of pretraining too: other work on the machine does not count
    names = run_notebook(monkeypatch, "")
    check_pictures(names)
    assert names["args"].l_traj == 15 and len(names["spread"]) == 64
    assert list(Path("runs/pretrained").glob("Hopper-v5__128__*/checkpoint.pt"))
    assert sum(os.times()[:4]) - begun < 900


def test_the_notebook_is_kept_with_its_pictures_and_small():
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert "error" not in {output["output_type"] for output in outputs}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 6
    assert (ROOT / "docs" / "workshop.ipynb").stat().st_size < 300_000
    text = "".join("".join(output.get("text", [])) for output in outputs)
    assert "plain: mean 1.000" in text and not re.search(r"(?<![\w.])/\w+/", text)  # no folder of a machine


# ---- The exercises' solutions ---------------------------------------------------------------------------------------


def solutions() -> dict[str, str]:
    """The script with the change of each exercise, by the name of the copy that the page gives it."""
    found = {}
    folded = r"<summary>Solution: <code>(\w+)\.py</code></summary>\n(.*?)</details>"
    for name, text in re.findall(folded, PAGE, re.DOTALL):
        changed = (ROOT / "grpo_dt_continuous.py").read_text(encoding="utf-8")
        blocks = re.findall(r"```diff\n(.*?)```", text, re.DOTALL)
        for part in filter(None, re.split(r"^@@.*\n", "".join(blocks), flags=re.MULTILINE)):
            lines = part.splitlines()
            old = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
            new = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
            assert changed.count(old) == 1, (name, old)
            changed = changed.replace(old, new)
        found[name] = changed
    return found


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """changed(name): the script with the change of that exercise, as a module."""
    folder = tmp_path_factory.mktemp("changed")

    def make(name):
        path = folder / f"{name}.py"
        path.write_text(solutions()[name], encoding="utf-8")
        return load(path, name)

    return make


def test_every_exercise_has_a_solution_of_a_few_lines():
    names = re.findall(r"^### \d\. .*`(\w+)\.py`", PAGE, re.MULTILINE)
    original = (ROOT / "grpo_dt_continuous.py").read_text(encoding="utf-8").splitlines()
    assert len(names) >= 6 and list(solutions()) == names
    for name, text in solutions().items():
        new = [line for line in text.splitlines() if line not in original]
        assert len(new) <= 5 and len(text.splitlines()) <= len(original) + 5, name


def test_solutions_of_advantages(changed):
    scores = np.array([1.0, 2.0, 3.0, 10.0, 101.0, 102.0, 104.0, 103.0])  # two groups of four
    advantages, keep = changed("mean_only").group_advantages(scores, 4, 1.0)
    assert advantages == pytest.approx([-3.0, -2.0, -1.0, 6.0, -1.5, -0.5, 1.5, 0.5])
    assert keep.tolist() == grpo.group_advantages(scores, 4, 1.0)[1].tolist()
    advantages, _ = changed("ranks").group_advantages(scores, 4, 1.0)
    steps = np.array([-1.5, -0.5, 0.5, 1.5, -1.5, -0.5, 1.5, 0.5])
    assert advantages == pytest.approx(steps / math.sqrt(1.25))
    advantages, keep = changed("batch_mean").group_advantages(scores, 4, 1.0)
    assert advantages == pytest.approx((scores - 53.25) / scores.std()) and keep.all()


@pytest.mark.parametrize("name, low, high", [("unsure_points", 0.8, 1.0), ("sure_points", 0.0, 0.2)])
def test_solutions_of_reset_points(changed, name, low, high):
    module = changed(name)
    variance = np.linspace(0.1, 0.9, 100)  # the last steps are those where the policy is unsure
    module.action_variance = lambda policy, trajectory, context: variance
    source = grpo.Trajectory(*[None] * 5, rewards=np.zeros(100), snapshots=None, terminated=None, last_observation=None)
    points = module.choose_points(None, [source], module.Args(n_sources=100, c_online=1), np.random.default_rng(0))
    assert len(points) == 100 * 4 * 8
    assert low < np.mean([h for _, h in points]) / 100 < high
    points = grpo.choose_points(None, [source], grpo.Args(n_sources=4, random_points=True), np.random.default_rng(0))
    assert 0.2 < np.mean([h for _, h in points]) / 100 < 0.8


def loss_and_gradient(module, log_ratio: float, advantage: float):
    """The loss of two sub-trajectories of three steps whose log-ratio is log_ratio a step; the gradient's norm, and
    that of advantage times the sub-trajectories' mean log-probability."""
    torch.manual_seed(0)
    model = module.DecisionTransformer(3, 2, embed_dim=8, n_layers=1, n_heads=1)
    fields = [torch.randn(2, 3, 3), torch.randn(2, 3), torch.zeros(2, 3, 2), torch.ones(2, 3, dtype=torch.bool)]
    sub = module.SubTrajectories(*fields, torch.randn(2, 3, 2), torch.full((2,), advantage), torch.zeros(2, 3))
    log_prob = module.log_prob(module.distribution(model, sub), sub.u)
    sub = sub._replace(old_log_prob=log_prob.detach() - log_ratio)
    args = module.Args(beta=0.0, epsilon=0.2)
    loss, values = module.grpo_loss(model, model, sub, torch.tensor(0.0), args)
    weights = [weight for name, weight in model.named_parameters() if "action" not in name]
    norms = []
    for goal in (loss, -(advantage * log_prob.sum(1)).mean()):
        gradient = torch.autograd.grad(goal, weights, retain_graph=True)
        norms.append(torch.cat([part.flatten() for part in gradient]).norm().item())
    return values, *norms


def test_solutions_of_the_loss(changed):
    no_clip, reinforce = changed("no_clip"), changed("reinforce")
    values, norm, plain = loss_and_gradient(grpo, 0.5, 1.0)
    assert norm == 0.0 < plain and values["clip_fraction"] == 1.0  # above 1 + epsilon with a positive advantage
    values, norm, plain = loss_and_gradient(no_clip, 0.5, 1.0)
    assert norm == pytest.approx(math.exp(1.5) * plain, rel=1e-4)
    values, norm, plain = loss_and_gradient(reinforce, 0.5, 1.0)
    assert values["ratio_max"] == 1.0 and values["clip_fraction"] == 0.0
    assert norm == pytest.approx(plain, rel=1e-4)  # the policy gradient


class TwoSims:
    """Two simulations that give a reward of 1 and never end."""

    states = np.zeros((2, 1))

    def step(self, rows, actions):
        n = len(rows)
        return np.zeros((n, 3)), np.ones(n), np.zeros(n, bool), np.zeros(n, bool)


def test_solution_of_the_return_to_go(changed):
    model = grpo.DecisionTransformer(3, 2, embed_dim=8, n_layers=1, n_heads=1)
    start = (model, TwoSims(), np.zeros((2, 3)), np.full(2, 7.0), np.zeros((2, 0, 2), np.float32), np.full(2, 4))
    assert grpo.rollout(*start).returns.tolist() == [[7.0, 6.0, 5.0, 4.0]] * 2
    assert changed("constant_g").rollout(*start).returns.tolist() == [[7.0] * 4] * 2


# ---- A changed copy beside the original -----------------------------------------------------------------------------


def command() -> str:
    """The page's one command that copies the script, changes it and compares both."""
    (found,) = re.findall(r"^(sed .*compare\.py.*)$", PAGE, re.MULTILINE)
    return found


def test_the_command_of_page_and_notebook_makes_the_copy_of_the_first_exercise():
    change, _, rest = command().partition(" > mean_only.py && ")
    assert rest == "python benchmark/compare.py mean_only.py"
    assert command() in "".join("".join(cell["source"]) for cell in NOTEBOOK["cells"])
    copy = subprocess.run(change, shell=True, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    original = (ROOT / "grpo_dt_continuous.py").read_text(encoding="utf-8")
    added = [line for line in copy.splitlines() if line not in original.splitlines()]
    assert added == ["    advantages = groups - mean  # Eq. 2"]


def write_run(folder: Path, evaluations: dict[int, float], entropies: list[float]) -> None:
    """A run's metrics.csv: evaluations by iteration, an entropy in each iteration after 0."""
    folder.mkdir(parents=True)
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["iteration", "eval/return_mean", "losses/entropy"])
        for iteration, entropy in enumerate(["", *entropies]):
            writer.writerow([iteration, evaluations.get(iteration, ""), entropy])


def test_the_table_has_late_means_over_seeds_and_the_figure_a_line_for_each(tmp_path):
    write_run(tmp_path / "a1", {0: 10.0, 2: 20.0, 4: 30.0}, [5.0, 4.0, 3.0, 1.0])
    write_run(tmp_path / "a2", {0: 10.0, 2: 20.0, 4: 50.0}, [5.0, 4.0, 4.0, 2.0])
    found = {"a": [compare.read_columns(tmp_path / name) for name in ("a1", "a2")]}
    lines = compare.table(found).splitlines()
    assert lines[:2] == ["|  | a |", "| --- | --- |"]
    assert "| `eval/return_mean` | 40 (30, 50) |" in lines  # the last evaluation
    assert "| `losses/entropy` | 2.5 (2, 3) |" in lines  # of iterations 3 and 4
    assert "| `losses/kl` | nan (nan, nan) |" in lines
    compare.draw(found, tmp_path / "x.png")
    assert matplotlib.image.imread(tmp_path / "x.png").std() > 0


def test_another_text_or_other_flags_give_another_run(tmp_path):
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text("a = 1\n")
    other.write_text("a = 2\n")
    names = {compare.run_name(path, flags) for path in (one, other) for flags in (["--lr", "1"], ["--lr", "2"])}
    assert len(names) == 4 and compare.run_name(one, ["--lr", "1"]) in names


def test_a_copy_that_is_missing_or_unchanged_is_refused(tmp_path, monkeypatch, refused):
    copy = tmp_path / "copy.py"
    monkeypatch.setattr(sys, "argv", ["compare.py", str(copy)])
    with refused("copy.py"):
        compare.main()
    copy.write_bytes((ROOT / "grpo_dt_continuous.py").read_bytes())
    with refused("copy.py"):
        compare.main()
    assert [path.name for path in tmp_path.iterdir()] == ["copy.py"] and not Path("runs").exists()


@pytest.mark.slow
def test_compare_runs_both_and_does_not_repeat_what_is_there(pretrained, tmp_path):
    copy = tmp_path / "mean_only.py"
    copy.write_text(solutions()["mean_only"], encoding="utf-8")
    words = f"mean_only.py --seeds 1 2 -- --pretrained {pretrained()} --n-sources 1 --l-eval 10 --n-batch 4 --delta-r 0"
    words += " --iterations 2 --eval-every 2 --eval-episodes 1 --threads 1 --no-cuda"
    script = [sys.executable, str(ROOT / "benchmark" / "compare.py"), *words.split()]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "+    advantages = groups - mean" in done.stdout and "4 of 4 runs done" in done.stdout
    runs = {path.name.split("-")[1]: path for path in sorted(tmp_path.glob("runs/compare-*__2"))}
    entropies = [compare.read_columns(path)["losses/grad_norm"][-1] for path in runs.values()]
    assert list(runs) == ["grpo_dt_continuous", "mean_only"] and entropies[0] != entropies[1]
    assert (tmp_path / "runs" / "mean_only.png").stat().st_size > 10_000
    written = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("runs/compare-*/checkpoint.pt"))]
    again = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert again.stdout.splitlines()[-12:] == done.stdout.splitlines()[-12:]
    assert written == [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("runs/compare-*/checkpoint.pt"))]
    assert len(written) == 4
