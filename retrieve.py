"""Stage 4 of LV-MAE: read the reconstructions as captions (section 3.4, Figures 3 and 4).

A share of each video's segments is masked, the model rebuilds their embeddings from the visible
ones, and a rebuilt embedding is read as the caption whose text embedding is the most similar.

    python retrieve.py --captions captions.csv             # reads out.npz and lvmae.pt
    python retrieve.py --captions captions.csv --figure retrieval.png --videos videos/

--captions is the caption database, in one of three forms:
    .txt  one caption a line
    .csv  video,start,caption: this says also which caption is the true one of a segment
    .npz  captions (C,) str and embeddings (C, D): for encoders that open_clip does not have

It ends with a table of how high the true caption ranks among all captions, over the masked segments
of all videos (those of the training included); where no true caption is known, how high the caption
ranks that the true embedding retrieves.

<measured>

Letters beside model.py's: C captions without repeats, Q queries.
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
from extract import frames_at, load_encoder


def get_args(argv=None):
    """Read the command line."""
    p = argparse.ArgumentParser(
        description="Read reconstructed segments as captions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--data", default="out.npz", help="segment embeddings, from extract.py")
    p.add_argument("--ckpt", default="lvmae.pt", help="checkpoint, from train.py")
    p.add_argument("--captions", default="captions.csv", help="database: .txt, .csv or .npz")
    # What is masked
    p.add_argument("--mask", choices=["random", "semantic"], default="random", help="strategy")
    p.add_argument("--mask-ratio", type=float, default=0.4, help="share of the segments, 0 to 1")
    p.add_argument("--seed", type=int, default=0, help="of the random masks")
    # What is shown
    p.add_argument("--video", nargs="+", metavar="NAME", help="videos to show; none: the longest")
    p.add_argument("--show", type=int, default=12, help="number of segments to show of a video")
    p.add_argument("--top-k", type=int, default=1, help="number of captions to show of a segment")
    p.add_argument("--figure", metavar="PNG", help="draw what is shown, with a frame of each segment")
    p.add_argument("--videos", metavar="FOLDER", help="folder given to extract.py, for --figure")
    p.add_argument("--json", metavar="FILE", help="also write the scores to this file")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return p.parse_args(argv)


def read_captions(path, data):
    """Read the database, dropping repeats: captions (C,), embeddings (C, D) or None, truth (S,).

    `truth` is the number of each segment's true caption, -1 where it is unknown.
    """
    rows, embeddings, truth = [], None, torch.full((len(data.starts),), -1)
    try:
        if path.endswith(".npz"):
            with np.load(path, allow_pickle=False) as file:
                texts, embeddings = file["captions"].tolist(), torch.from_numpy(file["embeddings"])
        elif path.endswith(".csv"):
            with open(path, encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file))
            texts = [row["caption"] or "" for row in rows]
            keys = [(row["video"], round(float(row["start"]) * 10)) for row in rows]
        else:
            texts = Path(path).read_text("utf-8-sig").split("\n")
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise SystemExit(f"{path}: {error!r}: expected .txt with a caption a line, .csv with video,"
                         "start,caption or .npz with captions, embeddings") from None
    texts = np.array([" ".join(text.split()) for text in texts] + [""], object)
    captions, first, number = np.unique(texts, return_index=True, return_inverse=True)
    captions, first, number = captions[1:], first[1:], number - 1  # without "", which sorts first
    if embeddings is not None:
        found, expected = tuple(embeddings.shape), (len(texts) - 1, data.embeddings.shape[1])
        if found != expected or not embeddings.isfinite().all():
            raise SystemExit(f"{path}: embeddings: found {found}, expected {expected}, all finite")
        embeddings = embeddings[first]
    if rows:  # a row is for the segment of the same video and, to a tenth of a second, start
        tenths = (data.starts * 10).round().long().tolist()
        videos = np.repeat(np.array(data.videos, object), data.lengths)
        segment = {key: s for s, key in enumerate(zip(videos, tenths, strict=True))}
        for key, n in zip(keys, number, strict=False):
            truth[segment.get(key, [])] = n
        if (truth < 0).all():
            raise SystemExit(f"{path}: no row fits {data.path}: found {rows[0]['video']}, start "
                             f"{rows[0]['start']}, expected as {data.videos[0]}, {tenths[0] / 10}")
    return captions.tolist(), embeddings, truth


@torch.no_grad()
def embed_captions(path, captions, data, device):
    """Embed captions with the text tower of the model that made `data`: (C, D) float16.

    The result is kept in a file beside the captions while captions and model stay the same.
    """
    way_out = "give --captions FILE.npz with the keys captions, embeddings"
    name = data.meta.get("model", "")
    if name not in open_clip.list_models() and not os.path.isdir(name):
        raise SystemExit(f"{data.path}: key 'meta': found model {name!r}, expected a name or folder "
                         f"of open_clip, for its text tower: {way_out}")
    digest = hashlib.sha256(json.dumps([captions, data.meta]).encode()).hexdigest()
    cache = f"{path}.cache.npz"
    if os.path.exists(cache) and str((cached := np.load(cache))["digest"]) == digest:
        return torch.from_numpy(cached["embeddings"])

    clip, tokenizer_name = load_encoder(name, data.meta.get("pretrained", ""), device)
    tokenize = open_clip.get_tokenizer(tokenizer_name)
    embeddings = []
    for i in tqdm(range(0, len(captions), 256), "captions", disable=len(captions) < 10_000):
        text = clip.encode_text(tokenize(captions[i : i + 256]).to(device))  # (256, D)
        embeddings.append(F.normalize(text.float(), dim=1).half().cpu())
    embeddings = torch.cat(embeddings)  # (C, D)
    if embeddings.shape[1] != data.embeddings.shape[1]:
        raise SystemExit(f"{data.path}: found embeddings of size {data.embeddings.shape[1]}, expected"
                         f" {embeddings.shape[1]} as {name} gives: {way_out}")
    with contextlib.suppress(OSError):  # a folder that is not ours to write to: no cache
        np.savez(f"{cache}.part.npz", digest=digest, embeddings=embeddings.numpy())
        os.replace(f"{cache}.part.npz", cache)
    return embeddings


@torch.no_grad()
def reconstruct(model, data, args, device):
    """Mask each video and rebuild it: is_masked (S,) and {name: embeddings (S, D)}."""
    strategy = lvmae.semantic_mask if args.mask == "semantic" else lvmae.random_mask
    generator = torch.Generator().manual_seed(args.seed)
    is_masked = torch.zeros(len(data.embeddings), dtype=torch.bool)
    names = "reconstructed", "interpolation", "visible mean"
    rebuilt = {"true": data.embeddings} | {n: torch.zeros_like(data.embeddings) for n in names}
    for batch in data.lengths.argsort(stable=True).split(16):  # alike lengths: little padding
        first, lengths = data.first[batch], data.lengths[batch]
        embeddings = lvmae.pad(data.embeddings, first, lengths)  # (B, N, D)
        place = strategy(embeddings, lengths, args.mask_ratio, generator)  # (B, N), True if masked
        guesses = lvmae.trivial_predictions(embeddings, lengths, place)
        guesses["reconstructed"] = model(embeddings.to(device), lengths, place)[1].cpu()
        rows = (first[:, None] + torch.arange(place.shape[1]))[place]
        is_masked[rows] = True
        for name in names:
            rebuilt[name][rows] = guesses[name][place].half()
    return is_masked, rebuilt


@torch.no_grad()
def search(queries, captions, truth, top_k, device):
    """Rank captions (C, D) by their similarity to queries (Q, D), a block of them at a time.

    Returns the highest similarities and the numbers of their captions, (Q, top_k) both, and the
    ranks (Q,), from 1, of the captions `truth` (Q,).
    """

    def unit(x):  # Eq. (4): the cosine is the product of vectors of length 1
        return F.normalize(x.to(device).float(), dim=1)

    queries = unit(queries)
    # A caption ranks below those more similar. The step keeps rounding from counting it itself.
    bar = (queries * unit(captions[truth])).sum(1, keepdim=True) + 1e-5  # (Q, 1)
    best = torch.full((len(queries), min(top_k, len(captions))), -2.0, device=device)
    number, rank = torch.zeros_like(best, dtype=torch.long), torch.ones_like(bar[:, 0])
    for c in range(0, len(captions), 4096):
        block = unit(captions[c : c + 4096]).T
        for q in range(0, len(queries), 512):
            q = slice(q, q + 512)
            similarity = queries[q] @ block  # (512, 4096)
            values, places = similarity.topk(min(top_k, block.shape[1]))
            best[q], order = torch.cat([best[q], values], 1).topk(best.shape[1])
            number[q] = torch.cat([number[q], places + c], 1).gather(1, order)
            rank[q] += similarity.gt_(bar[q]).sum(1)  # in place: not needed any more
    return best.cpu(), number.cpu(), rank.cpu()


def choose(is_masked, number):
    """Pick `number` segments of a video, (N,): fours in a row, each with a masked one, evenly."""
    fours = [four for four in torch.arange(len(is_masked)).split(4) if is_masked[four].any()]
    picks = np.linspace(0, len(fours) - 1, min(len(fours), -(-number // 4))).round().astype(int)
    return torch.cat([fours[i] for i in picks])


def print_table(segments):
    """Print segments, tuples of texts as main makes them, in at most 100 columns."""
    table = [("time", "", "true caption", "true embedding", "reconstruction"), *segments]
    widths = [max(len(x) for cell in c for x in cell.split("\n")) for c in zip(*table, strict=True)]
    while sum(widths) > 92:  # 4 gaps of 2
        widths[widths.index(max(widths))] -= 1
    for row in table:
        cells = [[part for line in cell.split("\n") for part in textwrap.wrap(line, width)]
                 for cell, width in zip(row, widths, strict=True)]
        for parts in zip_longest(*cells, fillvalue=""):
            print("  ".join(map(str.ljust, parts, widths)).rstrip())


COLOURS = {"true caption": "black", "true embedding": "#1a5fb4", "reconstruction": "#c01c28"}


def draw_row(segments, frames):
    """Draw up to four segments side by side: their captions, and under them a frame of each."""
    font, row = find_font(15), Image.new("RGB", (1000, 1000), "white")
    draw = ImageDraw.Draw(row)
    columns = [[] for _ in segments]
    for lines, (_, _, *texts) in zip(columns, segments, strict=True):
        for text, colour in zip(texts, COLOURS.values(), strict=True):
            for line in text.splitlines():
                width = int(len(line) * 225 / font.getlength(line))  # in letters of this line
                lines += [(part, colour) for part in textwrap.wrap(line, width)]
    y = 20 * max(map(len, columns)) + 10
    for i, (lines, (time, masked, *_), frame) in enumerate(zip(columns, segments, frames, strict=True)):
        x, colour = 10 + 248 * i, "#c01c28" if masked else "black"
        for j, (line, line_colour) in enumerate(lines, -len(lines)):
            draw.text((x, y + 20 * j - 8), line, line_colour, font)
        picture = ImageOps.contain(Image.fromarray(frame), (236, 176))
        row.paste(picture, (x, y))
        w, h = picture.size
        if masked:
            draw.rectangle((x, y, x + w, y + h), outline=colour, width=6)
        draw.text((x + 10, y + 8), time + " masked" * bool(masked), "white", font, stroke_width=2, stroke_fill=colour)
    return row.crop((0, 0, 1000, y + h + 20))


def find_font(size):
    """Find a font of many scripts (Linux, macOS, Windows), else the one that Pillow brings."""
    for name in ("DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf"):
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def main(args):
    """Print what masked segments are read as, and how well all of them are read."""
    sys.stdout.reconfigure(errors="replace")  # captions may hold what a terminal cannot show
    device = lvmae.pick_device(args.device)
    data = lvmae.load_data(args.data)
    shown = args.video or [data.videos[data.lengths.argmax()]]
    for name in shown:
        if name not in data.videos:
            near = ", ".join(difflib.get_close_matches(name, data.videos, 3, cutoff=0))
            raise SystemExit(f"--video {name}: not in {args.data}, nearest are: {near}")
        if args.figure and not os.path.isfile(path := os.path.join(args.videos or "", name)):
            raise SystemExit(f"{path}: no such file: give --videos, the folder given to extract.py")
    captions, embeddings, truth = read_captions(args.captions, data)
    if embeddings is None:
        embeddings = embed_captions(args.captions, captions, data, device)
    is_masked, rebuilt = reconstruct(lvmae.load_checkpoint(args.ckpt, data, device), data, args, device)
    if not is_masked.any():
        raise SystemExit(f"{args.data}: found videos of one segment only, expected longer ones")

    # Search for the masked segments, which count, and for the shown ones.
    is_searched, picked = is_masked.clone(), {}
    for name in shown:
        v = data.videos.index(name)
        rows = data.first[v] + torch.arange(data.lengths[v])
        picked[name] = rows[choose(is_masked[rows], args.show)].tolist()
        is_searched[picked[name]] = True
    rows = is_searched.nonzero()[:, 0]
    is_known = truth >= 0
    if not is_known.any():
        truth[rows] = search(rebuilt["true"][rows], embeddings, truth[rows], 1, device)[1][:, 0]
    found = {n: search(e[rows], embeddings, truth[rows], args.top_k, device) for n, e in rebuilt.items()}

    def read(name, row, caption=None):
        similarity, number = (x[is_searched[:row].sum()].tolist() for x in found[name][:2])
        texts = ["same" if captions[n] == caption else captions[n] for n in number]
        return "\n".join(f"{s:.2f} {text}" for s, text in zip(similarity, texts, strict=True))

    drawn = []
    for name, shown_rows in picked.items():
        segments = []
        for row in shown_rows:
            start, caption = int(data.starts[row]), captions[truth[row]] if is_known[row] else ""
            segments.append((f"{start // 60}:{start % 60:02}", "▒" * is_masked[row].item(), caption,
                             read("true", row, caption), read("reconstructed", row) * is_masked[row].item()))
        print(f"{name}\n")
        print_table(segments)
        if args.figure:
            seconds = data.meta.get("segment_seconds", 5.0)
            frames = frames_at(os.path.join(args.videos, name), [data.starts[row].item() + 0.4 * seconds for row in shown_rows])
            drawn += [draw_row(segments[i:i+4], frames[i:i+4]) for i in range(0, len(frames), 4)]
    if args.figure:
        figure = Image.new("RGB", (1000, sum(row.height for row in drawn)))
        y = 0
        for row in drawn:
            figure.paste(row, (0, y))
            y += row.height
        figure.save(args.figure)

    what = "true caption" if is_known.any() else "caption that the true embedding retrieves"
    is_counted = is_masked[rows] & (truth[rows] >= 0)
    ranks = {name: rank[is_counted] for name, (_, _, rank) in found.items()}
    ranks["chance"] = torch.arange(1.0, len(captions) + 1)
    scores = {"n": int(is_counted.sum()), "captions": len(captions)}
    print(f"\nrank of the {what} among {len(captions):,}, for {scores['n']:,} masked segments\n")
    print(f"{'':14}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'median rank':>14}")
    for name, rank in ranks.items():
        recall = {f"R@{k}": 100 * (rank <= k).float().mean().item() for k in (1, 5, 10)}
        scores[name] = recall | {"median rank": float(np.median(rank))}
        print(f"{name:14}" + "".join(f"{r:7.1f}%" for r in recall.values()) + f"{np.median(rank):14.1f}")
    if args.json:
        Path(args.json).write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main(get_args())
