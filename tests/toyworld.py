"""The toy world: long videos with a known structure, and a CLIP small enough to train right here.

A video shows one object after the other in front of a place that holds for the whole video:
"a red circle on the beach". Which object comes when is told by the video's recipe, a list of
six steps. Recipes come in pairs, 1a and 1b, 2a and 2b..: same steps, another order.
A bag of segments cannot tell 1a from 1b; the order of the segments can.

    python tests/toyworld.py toy/          # toy/videos/ toy/captions.csv toy/clip/
    python tests/toyworld.py toy/ --run    # and then every stage on it, and one table

The first ends with a line like "made in 45 s", the second with "the whole took 4.7 minutes".
"""

import argparse
import csv
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import open_clip
import safetensors.torch
import torch

SIZE, FPS, SEGMENT_SECONDS = 64, 2, 5  # pixels, frames per second, seconds
COLOURS = {
    "red": (220, 30, 30),
    "cyan": (40, 220, 220),
    "yellow": (250, 230, 60),
    "green": (30, 190, 70),
    "blue": (30, 60, 230),
    "purple": (140, 40, 170),
    "pink": (250, 150, 200),
    "white": (250, 250, 250),
}
BAR = np.array(
    [1.5 + 0.4j, -1.5 + 0.4j, -1.5 - 0.4j, 1.5 - 0.4j]
)  # an outline, points x + iy
SHAPES = {
    "circle": np.exp(2j * np.pi * np.arange(32) / 32),
    "bar": BAR,
    "post": 1j * BAR,
}
PLACES = {  # colours of the upper and the lower half
    "on the beach": ((120, 190, 240), (225, 200, 130)),
    "in the forest": ((30, 70, 30), (60, 110, 40)),
    "in the city": ((140, 140, 150), (70, 70, 75)),
    "on the moon": ((5, 5, 20), (170, 170, 165)),
}
OBJECTS = [f"a {colour} {shape}" for shape in SHAPES for colour in COLOURS]
CAPTIONS = [f"{thing} {place}" for place in PLACES for thing in OBJECTS]
CLIP_CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 128, "patch_size": 16},
    "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 1},
}
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def get_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, help="where to put videos/, captions.csv and clip/"
    )
    parser.add_argument("--run", action="store_true", help="then run every stage on it")
    parser.add_argument("--small", action="store_true", help="a tenth of it, for tests")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    return parser.parse_args(argv)


def make_recipes(rng):
    """Return {name: list of 6 objects}: four pairs, in each the same steps in another order."""
    recipes = {}
    for pair, steps in enumerate(
        rng.permutation(OBJECTS).reshape(4, 6).tolist(), start=1
    ):
        a, b, c, d, e, f = steps
        # Half of the steps keep their places. So what was hidden between two visible steps cannot
        # be told from these two: one must know, from elsewhere, which recipe is running.
        recipes[f"{pair}a"], recipes[f"{pair}b"] = (
            [a, b, c, d, e, f],
            [a, f, c, b, e, d],
        )
    return recipes


def make_story(rng, steps):
    """Return the object of each of the 12 to 40 segments of one video."""
    story = []
    while not 12 <= len(story) <= 40:
        slowest = rng.integers(2, 6)
        story = [step for step in steps for _ in range(rng.integers(1, slowest + 1))]
        story = (
            rng.choice(OBJECTS, rng.integers(4)).tolist() + story
        )  # begins late: noise
        for place in rng.integers(1, len(story), rng.binomial(len(story), 0.05)):
            story.insert(place, str(rng.choice(OBJECTS)))  # is interrupted: noise
    return story


def draw_segment(rng, thing, place, frames=FPS * SEGMENT_SECONDS):
    """Draw an object that drifts and tilts in front of a place: (frames, SIZE, SIZE, 3) RGB."""
    _, colour, shape = thing.split()
    x, y, radius, angle = rng.uniform([28, 28, 16, -0.2], [36, 36, 21, 0.2])
    dx, dy, turn = rng.uniform(-1, 1, 3) * [0.5, 0.5, 0.03]
    horizon = rng.integers(26, 38)
    video = np.empty((frames, SIZE, SIZE, 3), np.int16)
    video[:, :horizon], video[:, horizon:] = PLACES[place]
    for t in range(frames):
        points = radius * np.exp(1j * (angle + turn * t)) * SHAPES[shape]
        points = np.stack([points.real + x + dx * t, points.imag + y + dy * t], axis=1)
        cv2.fillPoly(video[t], [points.round().astype(np.int32)], COLOURS[colour])
    video += rng.integers(-25, 26, video.shape, dtype=np.int16)
    return video.clip(0, 255).astype(np.uint8)


def draw_captions(rng):
    """Draw one frame of every caption: (captions, 3, SIZE, SIZE), normalised for the CLIP."""
    frames = [
        draw_segment(rng, thing, place, 1) for place in PLACES for thing in OBJECTS
    ]
    frames = torch.from_numpy(np.concatenate(frames)).permute(0, 3, 1, 2)
    return (frames / 255 - MEAN[0]) / STD[0]


def train_clip(folder, steps, seed):
    """Train a tiny open_clip model on drawn frames and their captions and save it."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    clip = open_clip.CLIP(**CLIP_CONFIG, output_dict=True)
    texts = open_clip.SimpleTokenizer(context_length=16)(CAPTIONS)
    loss_of = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(clip.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for _ in range(
        steps
    ):  # every batch holds each caption once: no pair is wrongly a negative
        loss = loss_of(**clip(draw_captions(rng), texts))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(
        clip.state_dict(), folder / "open_clip_model.safetensors"
    )
    preprocess = {
        "mean": MEAN,
        "std": STD,
        "interpolation": "bilinear",
        "resize_mode": "shortest",
    }
    config = {"model_cfg": CLIP_CONFIG, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2))


@torch.no_grad()
def clip_accuracy(folder, seed, draws=5):
    """Return how many unseen frames have their own caption as the nearest of all captions."""
    clip, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    clip.eval()
    texts = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    texts = clip.encode_text(texts, normalize=True)
    rng = np.random.default_rng(seed)
    images = [
        clip.encode_image(draw_captions(rng), normalize=True) for _ in range(draws)
    ]
    best = (torch.stack(images) @ texts.T).argmax(-1)  # (draws, captions)
    return (best == torch.arange(len(CAPTIONS))).float().mean().item()


def make_videos(folder, count, seed):
    """Write the videos, an equal number of each recipe, and captions.csv."""
    rng = np.random.default_rng(seed)
    recipes = make_recipes(rng)
    with open(folder / "captions.csv", "w", newline="") as file:
        captions = csv.writer(file)
        captions.writerow(["video", "start", "caption"])
        for i in range(count):
            recipe = list(recipes)[i % len(recipes)]
            story, place = make_story(rng, recipes[recipe]), rng.choice(list(PLACES))
            path = folder / "videos" / recipe / f"{i:03d}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            writer = cv2.VideoWriter(
                str(path), cv2.VideoWriter_fourcc(*"mp4v"), FPS, (SIZE, SIZE)
            )
            for n, thing in enumerate(story):
                for frame in draw_segment(rng, thing, place):
                    writer.write(frame[..., ::-1])  # RGB to OpenCV's BGR
                caption = f"{thing} {place}"
                captions.writerow(
                    [f"{recipe}/{path.name}", n * SEGMENT_SECONDS, caption]
                )
            writer.release()


def run_scripts(folder, epochs, seed):
    """Run every stage on the world as a user would, and print one table of what they found."""
    root = Path(__file__).resolve().parent.parent
    videos, data, ckpt = folder / "videos", folder / "out.npz", folder / "lvmae.pt"
    found = {stage: folder / f"{stage}.json" for stage in ("retrieve", "probe")}
    for command in (
        f"extract.py {videos} {data} --model {folder / 'clip'} --batch-size 128",
        f"train.py --data {data} --out {ckpt} --mask semantic --epochs {epochs} --seed {seed}",
        f"probe.py --data {data} --ckpt {ckpt} --compare --json {found['probe']} --seed {seed}",
        f"retrieve.py --data {data} --ckpt {ckpt} --captions {folder / 'captions.csv'}"
        f" --mask semantic --mask-ratio 0.5 --json {found['retrieve']} --seed {seed}",
    ):
        print(f"\n$ python {command}", flush=True)
        script, *flags = shlex.split(command)
        # One thread trains on matrices as small as these faster than two.
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, root / script, *flags], check=True, env=env)

    ranks, probes = (
        json.loads(found[stage].read_text()) for stage in ("retrieve", "probe")
    )
    print("\ncaption of a masked segment   R@1    R@5")
    for name in ("true", "reconstructed", "interpolation", "chance"):
        print(f"{name:26} {ranks[name]['R@1']:5.1f}% {ranks[name]['R@5']:5.1f}%")
    print("\nrecipe of a video        accuracy")
    for name in (
        "majority",
        "raw linear",
        "LV-MAE linear",
        "raw attentive",
        "LV-MAE attentive",
    ):
        row = probes["rows"][name]
        print(f"{name:26} {row['mean']:5.1f}% +- {row['std']:.1f}")


def main(args):
    """Make the world, and run every stage on it if asked to."""
    start, videos = time.time(), 24 if args.small else 240
    train_clip(args.folder / "clip", 25 if args.small else 250, args.seed)
    accuracy = clip_accuracy(args.folder / "clip", args.seed + 1)
    print(
        f"{args.folder}/clip: {accuracy:.1%} of unseen frames have their own caption nearest"
    )
    make_videos(args.folder, videos, args.seed + 2)
    segments = (args.folder / "captions.csv").read_text().count("\n") - 1
    print(
        f"{args.folder}: {videos} videos, {segments:,} segments, {len(CAPTIONS)} captions"
    )
    print(f"made in {time.time() - start:.0f} s", flush=True)
    if args.run:
        run_scripts(args.folder, 2 if args.small else 120, args.seed)
        print(f"\nthe whole took {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main(get_args())
