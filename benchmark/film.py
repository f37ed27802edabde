"""A GIF of what checkpoints do, side by side: an episode each with the mean action, from the same first state.

    MUJOCO_GL=egl python benchmark/film.py RUN [RUN ...] [--out film.gif] [--seed 0] [--start 0] [--every 12] ...

RUN is the folder of a run of any script here, or the checkpoint.pt in it; its environment is one of MuJoCo's. It needs
a GL library: MUJOCO_GL=egl with a GPU, MUJOCO_GL=osmesa (package libosmesa6) without; neither where there is a display.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ppo_dt_continuous as ppo

COLOURS = 10


def play(path: str, seed: int, length: int) -> tuple[dict, ppo.Steps]:
    """The checkpoint in `path`, and the first `length` steps of its episode of `seed`, as rollout returns them."""
    content = ppo.load_checkpoint(path)
    if ":" in content["env_id"]:
        ppo.die(f"{path} imports a module, {content['env_id']}: this films tasks of gymnasium's alone.")
    model = ppo.load_model(content, ppo.set_up_torch(ppo.Args(cuda=False)), bf16=False).eval()
    g, noise = np.array([content["g_eval"]]), np.zeros((1, 0, model.act_dim), np.float32)
    with ppo.Environments(ppo.make_env(content["env_id"], content["env_kwargs"]), 1) as envs:
        last = np.array([min(envs.limit, length)])
        steps = ppo.rollout(model, envs, envs.reset([seed]), g, noise, last, context=content["c_online"])
    return content, steps


def paint(model) -> None:
    """Large pale tiles under a pale sky, and an orange robot: seen well when small, and few bytes."""
    model.mat_texrepeat /= 12.0
    model.mat_reflectance[:] = 0.0
    model.tex_data[:] = 215 + model.tex_data // 10
    robot = model.geom_bodyid > 0
    model.geom_matid[robot] = -1
    model.geom_rgba[robot] = (0.85, 0.35, 0.1, 1.0)


def draw(content: dict, steps: ppo.Steps, args: argparse.Namespace) -> list[Image.Image]:
    """Pictures (size, size), one every so many steps from --start on: return so far, place on x [m]."""
    kwargs = content["env_kwargs"] | dict(width=args.size, height=args.size, camera_name="track")
    camera = ppo.make_env(content["env_id"], kwargs, "rgb_array")
    paint(camera.unwrapped.model)
    camera.reset(seed=args.seed)
    pictures = []
    for t, action in enumerate(steps.actions[0][steps.real[0]]):
        camera.step(ppo.scale_action(action, camera.action_space))
        if t >= args.start and (t - args.start) % args.every == 0:
            picture = Image.fromarray(camera.render())
            text = f"return {steps.rewards[0, : t + 1].sum():,.0f}   {camera.unwrapped.data.qpos[0]:.1f} m"
            ImageDraw.Draw(picture).text((6, 4), text, fill="black")
            pictures.append(picture)
    camera.close()
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of runs, or checkpoints, from left to right")
    parser.add_argument("--out", default="film.gif", help="where the GIF goes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the episode")
    parser.add_argument("--start", type=int, default=0, help="environment steps before the first picture")
    parser.add_argument("--frames", type=int, default=40, help="pictures at most")
    parser.add_argument("--every", type=int, default=12, help="environment steps between two pictures")
    parser.add_argument("--size", type=int, default=200, help="width and height of a run's picture [pixels]")
    args = parser.parse_args()
    if min(args.frames, args.every, args.size) < 1 or args.start < 0:
        ppo.die("--frames, --every and --size are 1 or more, --start is 0 or more: give such numbers.")
    films = []  # of a run each
    for path in args.runs:
        content, steps = play(path, args.seed, args.start + args.frames * args.every)
        try:
            films.append(draw(content, steps, args))
        except Exception as error:  # without a GL library or a camera "track" each platform raises its own
            ppo.die(f"cannot film {path}: {error}. It needs a GL library: MUJOCO_GL=egl with a GPU, osmesa without.")
        print(f"{path}: {steps.real.sum()} steps, return {steps.rewards.sum():,.0f}, {len(films[-1])} pictures")
        if not films[-1]:
            ppo.die(f"{path} has no step {args.start}: give a smaller --start.")
    frames = []
    for i in range(max(map(len, films))):
        frame = Image.new("RGB", (args.size * len(films), args.size))
        for column, film in enumerate(films):
            frame.paste(film[min(i, len(film) - 1)], (column * args.size, 0))  # an episode's last picture stays
        frames.append(frame.quantize(COLOURS, dither=Image.Dither.NONE))
    gif = io.BytesIO()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:], duration=100, loop=0, optimize=True)
    try:
        ppo.write_file(Path(args.out), gif.getvalue())  # whole or not at all
    except OSError as error:
        ppo.die(f"--out: {error}. Give another place.")
    print(f"{args.out}: {len(frames)} pictures, {len(gif.getvalue()) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
