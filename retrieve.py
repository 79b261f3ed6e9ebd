"""Stage 4 of LV-MAE: read reconstructed segments as captions (section 3.4, Figures 3 and 4).

A share of each video is masked, the model rebuilds the embeddings of the masked segments, and each
of them is read as the caption with the most similar text embedding.

    python retrieve.py --captions captions.csv             # reads out.npz and lvmae.pt
    python retrieve.py --captions captions.csv --figure retrieval.png --videos videos/

The captions are one of
    .txt  one caption a line
    .csv  video,start,caption: with the true caption of each segment
    .npz  captions (C,) str, embeddings (C, D): for encoders that open_clip does not have

The last lines tell how high the true caption ranks, over the masked segments of all videos (those
of the training included). Where it is unknown, the one that the true embedding retrieves stands in.

<measured>

Letters beside those of model.py: C captions without repeats, Q queries.
"""

import argparse
import contextlib
import csv
import difflib
import hashlib
import json
import os
import sys
import textwrap
import zipfile
from itertools import zip_longest
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import model as lvmae
from extract import decode, load_encoder

TITLES = "time", "", "true caption", "true embedding", "reconstruction"  # of the printed columns
COLOURS = "black", "#1a5fb4", "#c01c28"  # of the last three, in the figure


def get_args(argv=None):
    """Read the command line."""
    p = argparse.ArgumentParser(
        description="Read reconstructed segments as captions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--data", default="out.npz", help="segment embeddings, from extract.py")
    p.add_argument("--ckpt", default="lvmae.pt", help="checkpoint, from train.py")
    p.add_argument("--captions", default="captions.csv", help=".txt, .csv or .npz")
    # What is masked
    p.add_argument("--mask", choices=["random", "semantic"], default="random", help="strategy")
    p.add_argument("--mask-ratio", type=float, default=0.4, help="share of a video, 0 to 1")
    p.add_argument("--seed", type=int, default=0, help="of the random masks")
    # What is shown
    p.add_argument("--video", nargs="+", metavar="NAME", help="videos to show; none: the longest")
    p.add_argument("--show", type=int, default=12, help="segments to show, mid-video")
    p.add_argument("--top-k", type=int, default=1, help="captions to show of each embedding")
    p.add_argument("--figure", metavar="PNG", help="also draw them, with a frame of each segment")
    p.add_argument("--videos", metavar="FOLDER", help="folder given to extract.py, for --figure")
    p.add_argument("--json", metavar="FILE", help="also write the scores to this file")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return p.parse_args(argv)


def read_captions(path, data):
    """Read captions: C texts without repeats, embeddings (C, D) or None, truth (S,).

    `truth` is the number of each segment's true caption, -1 where it is unknown.
    """
    texts, keys, embeddings = [], [], None
    try:
        if path.endswith(".npz"):
            with np.load(path, allow_pickle=False) as file:
                texts, embeddings = file["captions"].tolist(), torch.from_numpy(file["embeddings"])
        elif path.endswith(".csv"):
            with open(path, encoding="utf-8-sig", newline="") as file:
                for row in csv.DictReader(file):
                    texts.append(row["caption"] or "")
                    keys.append((row["video"], round(10 * float(row["start"]))))
        else:
            texts = Path(path).read_text("utf-8-sig").split("\n")
    except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise SystemExit(f"{path}: {error!r}: expected .txt of a caption a line, .csv of video,start"
                         ",caption or .npz of captions, embeddings") from None
    texts = np.array(["", *(" ".join(text.split()) for text in texts)], object)
    captions, first, number = np.unique(texts, return_index=True, return_inverse=True)
    captions, first, number = captions[1:].tolist(), first[1:] - 1, number[1:] - 1  # without ""
    if not captions:
        raise SystemExit(f"{path}: found no caption, expected at least one")
    if embeddings is not None:
        found, expected = tuple(embeddings.shape), (len(number), data.embeddings.shape[1])
        if found != expected or not embeddings.isfinite().all():
            raise SystemExit(f"{path}: embeddings: found {found}, expected {expected}, all finite")
        embeddings = embeddings[first]

    truth = torch.full((len(data.starts),), -1)
    tenths = (data.starts * 10).round().tolist()  # starts agree if they do to a tenth of a second
    names = np.repeat(np.array(data.videos, object), data.lengths)
    segment = {key: s for s, key in enumerate(zip(names, tenths, strict=True))}
    for key, n in zip(keys, number, strict=False):
        truth[segment.get(key, [])] = n
    if keys and (truth < 0).all():
        raise SystemExit(f"{path}: found no segment of {data.path}: its first is {keys[0][0]} at "
                         f"{keys[0][1] / 10} s, expected as {names[0]} at {tenths[0] / 10} s")
    return captions, embeddings, truth


@torch.no_grad()
def embed_captions(path, captions, data, device):
    """Embed captions with the text tower of the model that made `data`: (C, D) float16.

    They are kept in a file beside the captions, and reused while captions and model are the same.
    """
    way_out = "give --captions FILE.npz with captions and embeddings"
    name, size = data.meta.get("model", ""), data.embeddings.shape[1]
    if name not in open_clip.list_models() and not os.path.isdir(name):
        raise SystemExit(f"{data.path}: key 'meta': found model {name!r}, expected one of open_clip "
                         f"(a name or folder) for its text tower: {way_out}")
    digest = hashlib.sha256(json.dumps([captions, data.meta]).encode()).hexdigest()
    cache, half = f"{path}.cache.npz", f"{path}.half.npz"
    if os.path.exists(cache) and np.load(cache)["digest"] == digest:
        return torch.from_numpy(np.load(cache)["embeddings"])

    clip, tokenizer_name = load_encoder(name, data.meta.get("pretrained", ""), device)
    tokenize, embeddings = open_clip.get_tokenizer(tokenizer_name), []
    for i in tqdm(range(0, len(captions), 256), "captions", disable=len(captions) < 10_000):
        text = clip.encode_text(tokenize(captions[i : i + 256]).to(device))  # (256, D)
        embeddings.append(F.normalize(text.float(), dim=1).half().cpu())
    embeddings = torch.cat(embeddings)  # (C, D)
    if embeddings.shape[1] != size:
        raise SystemExit(f"{data.path}: key 'embeddings': found size {size}, expected "
                         f"{embeddings.shape[1]} as the text tower of {name}: {way_out}")
    with contextlib.suppress(OSError):  # in a folder that is not ours there is no cache
        np.savez(half, digest=digest, embeddings=embeddings.numpy())
        os.replace(half, cache)
    return embeddings


@torch.no_grad()
def reconstruct(model, data, args, device):
    """Mask each video and rebuild what is masked: is_masked (S,), {name: embeddings (S, D)}."""
    strategy = lvmae.semantic_mask if args.mask == "semantic" else lvmae.random_mask
    generator = torch.Generator().manual_seed(args.seed)
    is_masked = torch.zeros(len(data.embeddings), dtype=torch.bool)
    rebuilt = {"true": data.embeddings}
    for batch in data.lengths.argsort(stable=True).split(16):  # alike lengths: little padding
        first, lengths = data.first[batch], data.lengths[batch]
        embeddings = lvmae.pad(data.embeddings, first, lengths)  # (B, N, D)
        place = strategy(embeddings, lengths, args.mask_ratio, generator)  # (B, N), True if masked
        guesses = {"reconstructed": model(embeddings.to(device), lengths, place)[1].cpu()}
        guesses |= lvmae.trivial_predictions(embeddings, lengths, place)
        rows = (first[:, None] + torch.arange(place.shape[1]))[place]
        is_masked[rows] = True
        for name, guess in guesses.items():
            rebuilt.setdefault(name, torch.zeros_like(data.embeddings))[rows] = guess[place].half()
    return is_masked, rebuilt


@torch.no_grad()
def search(queries, captions, truth, top_k, device):
    """Rank captions (C, D) by similarity to queries (Q, D), in blocks: never all of (Q, C).

    Returns the top_k similarities and caption numbers, both (Q, top_k), and the rank, from 1, of
    the captions numbered `truth` (Q,).
    """

    def unit(x):  # Eq. (4): cosine similarity is the product of vectors of length 1
        return F.normalize(x.to(device).float(), dim=1)

    queries = unit(queries)
    # More similar than this ranks higher. The step: rounding must not put a caption above itself.
    bar = (queries * unit(captions[truth])).sum(1, keepdim=True) + 1e-5  # (Q, 1)
    best = torch.full((len(queries), min(top_k, len(captions))), -2.0, device=device)
    number, rank = torch.zeros_like(best, dtype=torch.long), torch.ones_like(bar[:, 0])
    for c in range(0, len(captions), 4096):
        block = unit(captions[c : c + 4096]).T  # (D, 4096)
        for q in range(0, len(queries), 512):
            q = slice(q, q + 512)
            similarity = queries[q] @ block  # (512, 4096)
            values, places = similarity.topk(min(top_k, block.shape[1]))
            best[q], order = torch.cat([best[q], values], 1).topk(best.shape[1])
            number[q] = torch.cat([number[q], places + c], 1).gather(1, order)
            rank[q] += similarity.gt_(bar[q]).sum(1)  # in place: not needed any more
    return best.cpu(), number.cpu(), rank.cpu()


def print_table(segments):
    """Print segments, tuples of texts as TITLES, in at most 100 columns."""
    columns = [c for c in zip(TITLES, *segments, strict=True) if any(c[1:])]
    widths = [max(len(line) for cell in c for line in cell.split("\n")) for c in columns]
    while sum(widths) > 92:  # and four gaps of 2
        widths[widths.index(max(widths))] -= 1
    for row in zip(*columns, strict=True):
        cells = [[part for line in cell.split("\n") for part in textwrap.wrap(line, width)]
                 for cell, width in zip(row, widths, strict=True)]
        for parts in zip_longest(*cells, fillvalue=""):
            print("  ".join(map(str.ljust, parts, widths)).rstrip())


def draw_figure(name, segments, frames):
    """Draw segments as in Figure 3, four in a row: their captions, below them a frame of each."""
    try:
        font = ImageFont.truetype("DejaVuSans.ttf", 15)  # many scripts, on most Linux machines
    except OSError:
        font = ImageFont.load_default(15)  # Latin letters, everywhere
    columns = [[] for _ in segments]
    for lines, (_, _, *texts) in zip(columns, segments, strict=True):
        for colour, text in zip(COLOURS, texts, strict=True):
            for line in text.splitlines():
                width = int(len(line) * 225 / font.getlength(line))  # in letters as in this line
                lines += [(colour, part) for part in textwrap.wrap(line, width)]
    above, below = 20 * max(map(len, columns)) + 6, 160 + 18
    figure = Image.new("RGB", (1000, 40 + -(-len(frames) // 4) * (above + below)), "white")
    draw = ImageDraw.Draw(figure)
    for x, colour, text in zip((8, 504, 629, 776), ("black", *COLOURS), (name, *TITLES[2:])):
        draw.text((x, 8), text, colour, font)
    for i, (lines, (time, masked, *_), frame) in enumerate(zip(columns, segments, frames)):
        x, y = 8 + i % 4 * 248, 40 + i // 4 * (above + below) + above
        for j, (colour, line) in enumerate(lines, -len(lines)):
            draw.text((x, y + 20 * j - 4), line, colour, font)
        figure.paste(Image.fromarray(frame), (x, y))
        colour = COLOURS[2] if masked else "black"
        if masked:
            draw.rectangle((x, y, x + 239, y + 159), outline=colour, width=6)
        text = time + " masked" * len(masked)
        draw.text((x + 10, y + 9), text, "white", font, stroke_width=3, stroke_fill=colour)
    return np.asarray(figure)


def main(args):
    """Print what the masked segments are read as, then how well all of them are read."""
    sys.stdout.reconfigure(errors="replace")  # captions may hold what the terminal cannot show
    device, data = lvmae.pick_device(args.device), lvmae.load_data(args.data)
    shown = args.video or [data.videos[data.lengths.argmax()]]
    for name in shown:
        if name not in data.videos:
            near = ", ".join(difflib.get_close_matches(name, data.videos, 3, cutoff=0))
            raise SystemExit(f"--video {name}: not in {args.data}, the nearest are {near}")
        if args.figure and not os.path.isfile(path := os.path.join(args.videos or "", name)):
            raise SystemExit(f"{path}: no such file: give --videos, the folder given to extract.py")
    captions, embeddings, truth = read_captions(args.captions, data)
    if embeddings is None:
        embeddings = embed_captions(args.captions, captions, data, device)
    model = lvmae.load_checkpoint(args.ckpt, data, device)
    is_masked, rebuilt = reconstruct(model, data, args, device)

    def read(name, rows, truth):
        similarity, number, _ = search(rebuilt[name][rows], embeddings, truth, args.top_k, device)
        texts = [["same" if n == t else captions[n] for n in ns] for ns, t in zip(number, truth)]
        return ["\n".join(map("{:.2f} {}".format, *pair)) for pair in zip(similarity.tolist(), texts)]

    figures = []
    for name in shown:
        v = data.videos.index(name)
        middle = (data.lengths[v] - args.show).clamp(min=0) // 2
        rows = data.first[v] + torch.arange(data.lengths[v])[middle : middle + args.show]
        segments = []
        for row, true, guess in zip(rows, read("true", rows, truth[rows]), read("reconstructed", rows, -1 + 0 * rows)):
            start, t, masked = int(data.starts[row]), truth[row], is_masked[row].item()
            segments.append((f"{start // 60}:{start % 60:02}", "▒" * masked, captions[t] if t >= 0 else "", true, guess * masked))
        print(f"{name}, ▒ is masked\n")
        print_table(segments)
        if args.figure:
            seconds, tile = data.meta.get("segment_seconds", 5.0), {"size": (160, 240), "resize_mode": "longest", "fill_color": 230}
            # Two frames a segment, of which dict keeps the later one: from the middle.
            frames = dict(decode(os.path.join(args.videos, name), seconds, 2, tile))
            frames = [frames[int(start / seconds)] for start in data.starts[rows].tolist()]
            figures.append(draw_figure(name, segments, frames))
    if args.figure:
        Image.fromarray(np.concatenate(figures)).save(args.figure)

    rows, what = is_masked.nonzero()[:, 0], "the caption that the true embedding retrieves"
    if (truth >= 0).any():
        rows, what = rows[truth[rows] >= 0], "the true caption"
    else:
        truth[rows] = search(rebuilt["true"][rows], embeddings, truth[rows], 1, device)[1][:, 0]
    scores = {"n": len(rows), "captions": len(captions)}
    print(f"\nrank of {what} among {len(captions):,}, for {len(rows):,} masked segments\n")
    print(f"{'':16}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'median rank':>14}")
    for name in [*rebuilt, "chance"]:
        rank = torch.arange(1.0, len(captions) + 1)
        if name != "chance":
            rank = search(rebuilt[name][rows], embeddings, truth[rows], 1, device)[2]
        scores[name] = {f"R@{k}": 100 * (rank <= k).float().mean().item() for k in (1, 5, 10)}
        print(f"{name:16}" + "".join(f"{r:7.1f}%" for r in scores[name].values()), end="")
        scores[name]["median rank"] = float(np.median(rank))
        print(f"{scores[name]['median rank']:14.1f}")
    if args.json:
        Path(args.json).write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main(get_args())
