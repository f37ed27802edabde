"""The policies under benchmark/checkpoints, and what makes and films them."""

import csv
import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ppo_dt_continuous as ppo
import pretrain_dt

ROOT = Path(__file__).resolve().parents[2]


def load(name: str):
    """benchmark/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmark" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


film, ship = load("film"), load("ship")
CHECKPOINTS = sorted(path.parent for path in (ROOT / "benchmark" / "checkpoints").glob("*/checkpoint.pt"))
each_checkpoint = pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda path: path.name)


def card_of(folder: Path) -> str:
    return (folder / "card.md").read_text(encoding="utf-8")


def test_there_are_four():
    assert len(CHECKPOINTS) == 4


def evaluation(folder: Path, episodes: int) -> dict[str, float]:
    """In fp32, as --eval-only does it."""
    args = ppo.parse_args(["--eval-only", str(folder), "--eval-episodes", str(episodes)])
    content = ppo.load_checkpoint(folder)
    model = ppo.load_model(content, torch.device("cpu"), bf16=False).eval()
    with ppo.Environments(ppo.make_env(content["env_id"], content["env_kwargs"]), episodes) as envs:
        return ppo.evaluate(model, envs, args, content["iteration"])


def score_of(folder: Path) -> float:
    return float(re.search(r"\| score \| ([\d.]+) \|", card_of(folder)).group(1))


@pytest.mark.slow
@each_checkpoint
def test_it_scores_what_its_card_says(folder):
    assert abs(evaluation(folder, 10)["eval/normalized_score"] - score_of(folder)) < 10


@pytest.mark.parametrize("folder", [each for each in CHECKPOINTS if "hopper" in each.name], ids=lambda path: path.name)
def test_hoppers_episodes_are_alike_so_one_will_do(folder):
    assert abs(evaluation(folder, 1)["eval/normalized_score"] - score_of(folder)) < 10


@each_checkpoint
def test_it_is_small_and_names_no_folder_of_a_machine(folder):
    assert (folder / "checkpoint.pt").stat().st_size < 1.8e6
    content = ppo.load_checkpoint(folder)
    assert {weight.dtype for name, weight in content["weights"].items() if "weight" in name} == {torch.float16}
    texts = [content["dataset"], *content["args"].values()]
    assert not [text for text in texts if isinstance(text, str) and "/" in text]


def test_shipping_keeps_the_weights_in_half_precision_and_overwrites_nothing(tmp_path, refused):
    torch.manual_seed(0)
    model = pretrain_dt.DecisionTransformer(obs_dim=3, act_dim=1, embed_dim=16, n_layers=1, n_heads=1)
    facts = dict(script="pretrain_dt", iteration=3, sizes=dict(obs_dim=3), env_id="Pendulum-v1", env_kwargs={})
    args = {"dataset": "folder/data.hdf5", "run_dir": "folder/run", "lr": 0.1}
    state = dict(learner={"step": 1}, rows=[{"iteration": 3}], replay=[torch.zeros(5)])
    content = facts | state | dict(weights=model.state_dict(), args=args, g_eval=1.0, dataset="folder/data.hdf5")
    (tmp_path / "run").mkdir()
    ppo.save_checkpoint(tmp_path / "run" / "checkpoint.pt", content)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    ship.ship(str(tmp_path / "run"), tmp_path / "out")
    shipped = ppo.load_checkpoint(tmp_path / "out")
    assert not {"learner", "rows", "replay"} & shipped.keys()
    assert shipped["dataset"] == "data.hdf5"
    assert shipped["args"] == {"dataset": None, "run_dir": None, "lr": 0.1, "threads": None}
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(shipped["weights"][name].float(), weight, rtol=1e-3, atol=1e-6)
    with refused("run", "another folder"):
        ship.ship(str(tmp_path / "run"), tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_a_film_begins_at_start_and_ends_with_the_episode(tmp_path, monkeypatch):
    """Episodes of 7 and 5 steps, every second step from step 3 on: pictures of 3, 5; the shorter one's last stays."""
    lengths = {"a": 7, "b": 5}

    def play(path, seed, length):
        assert (seed, length) == (4, 3 + 3 * 2)
        rewards = np.ones((1, lengths[path]))
        return path, ppo.Steps(*[rewards.astype(bool)] * 5, rewards, *[rewards] * 3)

    def draw(path, steps, args):
        return [Image.new("RGB", (20, 20), (t * 30, 0, 0)) for t in range(args.start, lengths[path], args.every)]

    monkeypatch.setattr(film, "play", play)
    monkeypatch.setattr(film, "draw", draw)
    words = "film.py a b --seed 4 --start 3 --every 2 --frames 3 --size 20 --out"
    monkeypatch.setattr(sys, "argv", [*words.split(), str(tmp_path / "film.gif")])
    film.main()
    picture = Image.open(tmp_path / "film.gif")
    assert (picture.n_frames, picture.size) == (2, (40, 20))
    picture.seek(1)
    left, right = (picture.convert("RGB").getpixel((x, 10))[0] for x in (10, 30))
    assert (left, right) == (150, 90)  # step 5; step 3, the last one of b


@pytest.mark.parametrize(
    ("words", "named"),
    [("--frames 0", "--frames"), ("--start 99", "--start"), ("--out no/film.gif", "--out"), ("", "MUJOCO_GL")],
)
def test_a_film_that_cannot_be_made_is_one_line_and_leaves_nothing(words, named, tmp_path, monkeypatch, refused):
    def draw(content, steps, args):
        if not words:
            raise AttributeError("'NoneType' object has no attribute 'glGetError'")
        return [Image.new("RGB", (20, 20))] * (args.start < 9)

    ones = np.ones((1, 9))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(film, "play", lambda *given: ({}, ppo.Steps(*[ones.astype(bool)] * 5, ones, *[ones] * 3)))
    monkeypatch.setattr(film, "draw", draw)
    monkeypatch.setattr(sys, "argv", f"film.py a --size 20 {words}".split())
    with refused(named):
        film.main()
    assert not list(tmp_path.iterdir())


@each_checkpoint
def test_what_is_filmed_is_what_is_evaluated(folder):
    _, steps = film.play(str(folder), seed=0, length=30)
    assert steps.real.sum() == 30
    assert steps.rewards.shape == (1, 30)
    assert np.abs(steps.actions).max() <= 1.0


def test_results_say_what_the_cards_say():
    """The commands' runs are in benchmark/results, and end where the checkpoint scores, within 10 points."""
    for folder in CHECKPOINTS:
        run = re.search(r"benchmark/results/([\w.-]+)", card_of(folder)).group(1)
        with open(ROOT / "benchmark" / "results" / run / "metrics.csv", newline="") as file:
            scores = [row["eval/normalized_score"] for row in csv.DictReader(file) if row["eval/normalized_score"]]
        assert abs(float(scores[-1]) - score_of(folder)) < 10
