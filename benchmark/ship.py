"""The weights of a checkpoint alone, in half precision: a sixth of its size or less, to give to others.

    python benchmark/ship.py RUN TO         writes TO/checkpoint.pt

It can be evaluated (--eval-only TO) and finetuned (--pretrained TO), but not resumed: the optimiser's state, the replay
and the rows of metrics.csv stay behind.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ppo_dt_continuous as ppo

LEFT_BEHIND = ("learner", "replay", "rolled", "rows")


def ship(run: str, folder: Path) -> None:
    """Write the checkpoint of `run` into `folder`, without what only resuming needs. The observations' mean and scale
    stay in full precision: they are few, and their range is the task's."""
    if (folder / "checkpoint.pt").exists():
        ppo.die(f"{folder} has a checkpoint: choose another folder.")
    content = {name: value for name, value in ppo.load_checkpoint(run).items() if name not in LEFT_BEHIND}
    for name, weight in content["weights"].items():
        if weight.dtype == torch.float32 and not name.startswith("obs_"):
            content["weights"][name] = weight.half()
    content["dataset"] = Path(content["dataset"]).name  # not the folders of a machine
    paths = {name: None for name in ("pretrained", "dataset", "data", "run_dir") if name in content["args"]}
    content["args"] |= paths | dict(threads=None)
    folder.mkdir(parents=True, exist_ok=True)
    ppo.save_checkpoint(folder / "checkpoint.pt", content)
    print(f"{folder / 'checkpoint.pt'}: {(folder / 'checkpoint.pt').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    ship(sys.argv[1], Path(sys.argv[2]))
