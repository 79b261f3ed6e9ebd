"""The toy world: long videos with a known structure, and a CLIP small enough to train right here.

A video shows one object after the other in front of a place that holds for the whole video:
"a red circle on the beach". Which object comes when is told by the video's recipe, a list of
six steps. Recipes come in pairs, 1a and 1b, 2a and 2b..: same steps, another order.
A bag of segments cannot tell 1a from 1b; the order of the segments can.

    python tests/toyworld.py toy/          # toy/videos/ toy/captions.csv toy/labels.csv toy/clip/
    python tests/toyworld.py toy/ --run    # and then every stage on it, and one table

The first ends with a line like "made in 23 s", the second with "the whole took 3.7 minutes".

As in the paper, there are many videos without a label and few with one. Of each recipe, 5 videos
are labelled to train a head on, 5 to choose its best epoch, and 20 to test it. The videos without
a label are spliced, not filmed: each is a new story, and each of its segments is one of the
extracted segments that show what the story says, drawn by lot from any video that is not a test
video. So thousands of sequences cost no more than one, and nothing of a test video is in them.

    videos/ --extract.py--> out.npz --+--splice--> unlabelled.npz --train.py--> lvmae.pt
                                      +--labels.csv--> probe.py: the recipe of a video
                                      +--test videos--> test.npz --> retrieve.py: captions
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import open_clip
import safetensors.torch
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import number

SIZE = 64  # pixels
FPS = 2  # frames per second
SEGMENT_SECONDS = 5
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
BAR = np.array([1.5 + 0.4j, -1.5 + 0.4j, -1.5 - 0.4j, 1.5 - 0.4j])  # points x + iy
SHAPES = {  # outlines
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
MEAN = (0.5, 0.5, 0.5)
STD = (0.5, 0.5, 0.5)

SEQUENCES = 4000  # spliced
EPOCHS = 20  # of the pre-training
FLAGS = "--mask-ratio 0.75 --depth 4 --decoder-dim 128 --batch-size 32"
FLAGS += f" --epochs {EPOCHS} --warmup-epochs 1"

WRITTEN = (  # all that is written into the folder
    *("clip", "videos", "captions.csv", "labels.csv"),
    *("out.npz", "out.npz.parts", "unlabelled.npz", "test.npz"),
    *("lvmae.pt", "lvmae.jsonl", "probe.json", "retrieve.json"),
    *("experiments", "unlabelled-[0-9]*.npz", "labels-[0-9]*.csv"),  # of experiments.py
)


def get_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add(
        "folder", type=Path, help="where to put it; what an earlier run left is removed"
    )
    add("--run", action="store_true", help="then run every stage on it")
    add("--small", action="store_true", help="a tenth of it, for tests")
    add(
        "--labelled",
        type=number(int, 1),
        default=5,
        help="videos of each recipe to train a head on",
    )
    add("--seed", type=number(int, 0), default=0, help="seed of everything random")
    return parser.parse_args(argv)


def make_recipes(rng):
    """Return {name: list of 6 objects}: four pairs, each the same steps in two orders."""
    recipes = {}
    for pair, steps in enumerate(rng.permutation(OBJECTS).reshape(4, 6).tolist(), 1):
        a, b, c, d, e, f = steps
        # Half of the steps keep their places. So what was hidden between two visible
        # steps cannot be told from these two: one must know, from elsewhere, which
        # recipe is running.
        recipes[f"{pair}a"] = [a, b, c, d, e, f]
        recipes[f"{pair}b"] = [a, f, c, b, e, d]
    return recipes


def make_story(rng, steps):
    """Return the object of each of the 12 to 40 segments of one video."""
    story = []
    while not 12 <= len(story) <= 40:
        slowest = rng.integers(2, 6)
        story = rng.choice(OBJECTS, rng.integers(4)).tolist()  # begins late: noise
        for step in steps:
            story += [step] * rng.integers(1, slowest + 1)
        for place in rng.integers(1, len(story), rng.binomial(len(story), 0.05)):
            story.insert(place, str(rng.choice(OBJECTS)))  # is interrupted: noise
    return story


def draw_segment(rng, thing, place, frames=FPS * SEGMENT_SECONDS):
    """Draw an object that drifts and tilts in front of a place.

    Returns (frames, SIZE, SIZE, 3) RGB.
    """
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
    """Draw one frame of every caption, normalised: (captions, 3, SIZE, SIZE)."""
    frames = []
    for place in PLACES:
        for thing in OBJECTS:
            frames.append(draw_segment(rng, thing, place, frames=1))
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
    for _ in range(steps):
        # Every batch holds each caption once: no pair is wrongly a negative.
        loss = loss_of(**clip(draw_captions(rng), texts))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    folder.mkdir(parents=True)
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
    """Return how many unseen frames have their own caption nearest of all captions."""
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


def write_csv(path, header, rows):
    """Write a table with a line of names above it."""
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def make_videos(folder, recipes, labelled, val, test, seed):
    """Write the videos, captions.csv and labels.csv.

    Of each recipe: `labelled` videos train a head, `val` choose its best epoch, and
    `test` test it.
    """
    rng = np.random.default_rng(seed)
    captions = []
    labels = []
    for i in range(labelled + val + test):
        for recipe, steps in recipes.items():
            name = f"{recipe}/{i:03d}.mp4"
            story = make_story(rng, steps)
            place = rng.choice(list(PLACES))

            path = folder / "videos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            codec = cv2.VideoWriter_fourcc(*"mp4v")
            writer = cv2.VideoWriter(str(path), codec, FPS, (SIZE, SIZE))
            for segment, thing in enumerate(story):
                for frame in draw_segment(rng, thing, place):
                    writer.write(frame[..., ::-1])  # RGB to OpenCV's BGR
                captions.append((name, segment * SEGMENT_SECONDS, f"{thing} {place}"))
            writer.release()

            if i < labelled:
                split = "train"
            elif i < labelled + val:
                split = "val"
            else:
                split = "test"
            labels.append((name, recipe, split))
    write_csv(folder / "captions.csv", ("video", "start", "caption"), captions)
    write_csv(folder / "labels.csv", ("video", "label", "split"), labels)


def read_world(folder):
    """Return the arrays of out.npz, the caption of each segment, the test videos."""
    with np.load(folder / "out.npz") as file:
        data = dict(file)

    with open(folder / "captions.csv", newline="") as file:
        caption_of = {}
        for row in csv.DictReader(file):
            caption_of[row["video"], float(row["start"])] = row["caption"]
    names = np.repeat(data["videos"], data["lengths"])  # (S,)
    captions = []
    for name, start in zip(names.tolist(), data["starts"].tolist(), strict=True):
        captions.append(caption_of[name, start])

    with open(folder / "labels.csv", newline="") as file:
        tested = [
            row["video"] for row in csv.DictReader(file) if row["split"] == "test"
        ]
    return data, captions, np.isin(data["videos"], tested)


def write_test_videos(folder):
    """Write test.npz: what out.npz holds of the test videos."""
    data, _, is_test = read_world(folder)
    of_segment = np.repeat(is_test, data["lengths"])  # (S,)
    for name in ("embeddings", "starts"):
        data[name] = data[name][of_segment]
    for name in ("lengths", "videos", "labels"):
        data[name] = data[name][is_test]
    np.savez(folder / "test.npz", **data)


def recipes_of(seed):
    """Return the recipes of the world that this seed makes."""
    return make_recipes(np.random.default_rng(seed + 2))


def splice(folder, count, seed, name="unlabelled.npz"):
    """Write an npz of new stories, told with segments that have been extracted.

    Each sequence follows one recipe at one place, as a video does. Each of its segments
    is drawn by lot among those that show what the story says there, in whatever video;
    those of the test videos are left out.
    """
    recipes = recipes_of(seed)
    data, captions, is_test = read_world(folder)
    of_segment = np.repeat(is_test, data["lengths"])  # (S,)
    rows_of = {}  # of each caption: where it is to be seen
    for row in np.flatnonzero(~of_segment):
        rows_of.setdefault(captions[row], []).append(row)

    rng = np.random.default_rng(seed)
    rows = []
    lengths = []
    while len(lengths) < count:
        recipe = rng.choice(list(recipes))
        place = rng.choice(list(PLACES))
        story = [f"{thing} {place}" for thing in make_story(rng, recipes[recipe])]
        if not rows_of.keys() >= set(story):
            continue  # something in it is to be seen in the test videos alone
        rows += [rng.choice(rows_of[caption]) for caption in story]
        lengths.append(len(story))

    np.savez(
        folder / name,
        embeddings=data["embeddings"][rows],
        lengths=np.array(lengths),
        videos=np.array([f"spliced/{i:05d}" for i in range(count)]),
        meta=data["meta"],
    )
    n = (~of_segment).sum()
    print(f"{folder / name}: {count:,} sequences, {len(rows):,} segments", end="")
    print(f", spliced from {n:,} of the videos that are no test", flush=True)


def run(command, folder):
    """Run one stage as a user would who stands in the folder of the world."""
    print(f"\n$ python {command}", flush=True)
    script, *flags = command.split()
    # One thread trains on matrices as small as these faster than two.
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / script, *flags]
    subprocess.run(command, cwd=folder, env=env, check=True)


def run_stages(folder, sequences, flags, seed):
    """Run every stage on the world, and print one table of what they found."""
    run("extract.py videos out.npz --model clip", folder)
    write_test_videos(folder)
    splice(folder, sequences, seed)
    run(f"train.py --data unlabelled.npz {flags} --seed {seed}", folder)
    flags = f"--labels labels.csv --json probe.json --seed {seed}"
    run(f"probe.py --compare {flags}", folder)
    run(f"retrieve.py --data test.npz --json retrieve.json --seed {seed}", folder)

    ranks = json.loads((folder / "retrieve.json").read_text())
    print("\ncaption of a masked segment, unseen videos   R@1    R@5")
    for name in ("true", "reconstructed", "interpolation", "chance"):
        print(f"{name:42} {ranks[name]['R@1']:5.1f}% {ranks[name]['R@5']:5.1f}%")

    probes = json.loads((folder / "probe.json").read_text())
    print("\nrecipe of an unseen video, few labels    accuracy")
    for name, row in probes["rows"].items():
        print(f"{name:42} {row['mean']:5.1f}% +- {row['std']:.1f}")


def clear(folder, seed):
    """Make the folder, or remove the world that an earlier run left in it."""
    mark = folder / "toyworld.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"{folder}: found {error}, expected a new folder") from None
    if any(folder.iterdir()) and not mark.exists():
        raise SystemExit(f"{folder}: found files, expected a new folder or a toy world")
    for pattern in WRITTEN:
        for path in folder.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    # Last: the files of an old world must not pass for those of this seed.
    text = "Made by tests/toyworld.py, which removes it when it makes another"
    mark.write_text(f"{text}, with --seed {seed}\n")


def read_seed(folder):
    """Read the seed that a world was made with."""
    return int((folder / "toyworld.txt").read_text().split()[-1])


def main(args):
    """Make the world, and run every stage on it if asked to."""
    start = time.time()
    folder = args.folder
    steps = 250  # of the training of the CLIP
    val = 5  # videos of each recipe
    test = 20
    sequences = SEQUENCES
    flags = FLAGS
    if args.small:
        steps = 25
        args.labelled = val = test = 1
        sequences = 64
        flags = "--epochs 2 --warmup-epochs 1"

    clear(folder, args.seed)
    print("training a tiny CLIP: half a minute", flush=True)
    train_clip(folder / "clip", steps, args.seed)
    accuracy = clip_accuracy(folder / "clip", args.seed + 1)
    print(f"{folder}/clip: {accuracy:.1%} of unseen frames have their caption nearest")
    make_videos(folder, recipes_of(args.seed), args.labelled, val, test, args.seed + 3)
    videos = 8 * (args.labelled + val + test)
    segments = (folder / "captions.csv").read_text().count("\n") - 1
    print(f"{folder}: {videos} videos, {segments:,} segments", end="")
    print(f", {len(CAPTIONS)} captions")
    print(f"made in {time.time() - start:.0f} s", flush=True)
    if args.run:
        run_stages(folder, sequences, flags, args.seed)
        print(f"\nthe whole took {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main(get_args())
