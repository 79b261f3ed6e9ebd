"""Stage 4 of LV-MAE: read the reconstructions as captions (section 3.4, Eq. 4, Figure 3).

A share of each video's segments is masked, the model rebuilds their embeddings from the visible
ones, and a rebuilt embedding is read as the caption whose text embedding is the most similar.

    python retrieve.py --captions captions.csv             # reads out.npz and lvmae.pt
    python retrieve.py --captions captions.csv --figure retrieval.png --videos videos/

--captions is the caption database, in one of three forms:
    .txt  a caption a line
    .csv  video,start,caption: also says which caption is the true one of a segment
    .npz  captions (C,) str and embeddings (C, D): for encoders that open_clip does not have

Scores are over the masked segments of all videos of --data, those of the training included. They
count how high the true caption ranks; where no true caption is known, how high the caption ranks
that the true embedding retrieves. The last line gives the reconstruction's:

    <measured>

Shapes: S segments of all videos, D embedding size, C captions without repeats, Q queries.
"""

import argparse
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
from typing import NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from tqdm import tqdm

import model as lvmae
from extract import load_encoder


def get_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Read reconstructed segments as captions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", default="out.npz", help="segment embeddings, from extract.py")
    add("--ckpt", default="lvmae.pt", help="checkpoint, from train.py")
    add("--captions", default="captions.csv", help="caption database: .txt, .csv or .npz")
    # What is masked
    add("--mask", choices=["random", "semantic"], default="random", help="masking strategy")
    add("--mask-ratio", type=float, default=0.4, help="share of a video's segments to mask")
    add("--seed", type=int, default=0, help="of the random masks")
    # What is shown
    add("--video", nargs="+", metavar="NAME", help="videos to show; if not given, the longest")
    add("--show", type=int, default=12, help="segments to show of a video")
    add("--top-k", type=int, default=1, help="captions to show for an embedding")
    add("--figure", metavar="PNG", help="draw what is shown, with a frame of each segment")
    add("--videos", metavar="FOLDER", help="the folder given to extract.py, for --figure")
    add("--json", metavar="FILE", help="also write the scores to this file")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser.parse_args(argv)


def read_captions(path, data):
    """Read the caption database and drop repeats.

    Returns captions (list of C), embeddings ((C, D), or None if they must be computed) and truth
    ((S,) number of each segment's true caption, -1 where unknown).
    """
    rows, embeddings = [], None
    try:
        if path.endswith(".npz"):
            with np.load(path, allow_pickle=False) as file:
                texts, embeddings = file["captions"].tolist(), torch.from_numpy(file["embeddings"])
        else:
            with open(path, encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file)) if path.endswith(".csv") else []
                texts = [row["caption"] or "" for row in rows] or file.read().splitlines()
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}: give captions as .txt, .csv or .npz") from None
    except KeyError as error:
        expected = "captions, embeddings" if path.endswith(".npz") else "video,start,caption"
        raise SystemExit(f"{path}: found no {error}, expected {expected}") from None
    except (ValueError, zipfile.BadZipFile) as error:
        raise SystemExit(f"{path}: unreadable ({error}), expected UTF-8 text or an npz") from None

    texts = [" ".join(text.split()) for text in texts]
    first = {}  # caption -> its first row
    for row, text in enumerate(texts):
        if text:
            first.setdefault(text, row)
    if not first:
        raise SystemExit(f"{path}: found no caption, expected at least one")
    if embeddings is not None:
        expected = (len(texts), data.embeddings.shape[1])
        if embeddings.shape != expected or not embeddings.isfinite().all():
            found = f"{tuple(embeddings.shape)}"
            raise SystemExit(f"{path}: embeddings: found {found}, expected {expected}, all finite")
        embeddings = embeddings[list(first.values())]

    number = {caption: n for n, caption in enumerate(first)}
    video_number = {video: v for v, video in enumerate(data.videos)}
    truth = torch.full((len(data.starts),), -1)
    for row, text in zip(rows, texts, strict=True) if rows else ():
        if text and (v := video_number.get(row["video"])) is not None:
            here = slice(data.first[v], data.first[v] + data.lengths[v])
            distance = (data.starts[here] - float(row["start"])).abs()
            if distance.min() < 0.5:  # seconds
                truth[data.first[v] + distance.argmin()] = number[text]
    if rows and (truth < 0).all():
        raise SystemExit(f"{path}: no row fits: found video {rows[0]['video']} at {rows[0]['start']} "
                         f"s, expected names like {data.videos[0]} and starts as in {data.path}")
    return list(first), embeddings, truth


@torch.no_grad()
def embed_captions(path, captions, data, device):
    """Encode captions with the text tower of the model that made `data`; returns (C, D) float16.

    The result is kept in a file beside the captions, for as long as captions and model are the same.
    """
    way_out = "give --captions FILE.npz, with the keys captions and embeddings"
    name, pretrained = data.meta.get("model", ""), data.meta.get("pretrained")
    if name not in open_clip.list_models() and not os.path.isdir(name):
        raise SystemExit(f"{data.path}: meta: found model {name!r}, expected one of open_clip or a "
                         f"folder, to embed the captions: {way_out}")
    cache = Path(f"{path}.cache.npz")
    digest = hashlib.sha256(json.dumps([captions, data.meta], sort_keys=True).encode()).hexdigest()
    if cache.exists() and str((file := np.load(cache))["digest"]) == digest:
        return torch.from_numpy(file["embeddings"])

    clip, tokenizer_name = load_encoder(name, pretrained, device)
    tokenize = open_clip.get_tokenizer(tokenizer_name)
    embeddings = []
    for i in tqdm(range(0, len(captions), 256), "captions", disable=len(captions) < 10_000):
        text = clip.encode_text(tokenize(captions[i : i + 256]).to(device))
        embeddings.append(F.normalize(text.float(), dim=-1).half().cpu())
    embeddings = torch.cat(embeddings)  # (C, D)
    if embeddings.shape[1] != data.embeddings.shape[1]:
        raise SystemExit(f"{name}: found text embeddings of size {embeddings.shape[1]}, expected "
                         f"{data.embeddings.shape[1]} as in {data.path}: {way_out}")
    part = cache.with_suffix(".part.npz")  # moved into place, so that a reader sees a whole file
    np.savez(part, digest=digest, embeddings=embeddings.numpy())
    part.replace(cache)
    return embeddings


@torch.no_grad()
def reconstruct(model, data, args, device):
    """Mask each video and fill it: is_masked (S,), {name: embeddings (S, D)}."""
    masking = lvmae.semantic_mask if args.mask == "semantic" else lvmae.random_mask
    generator = torch.Generator().manual_seed(args.seed)
    is_masked = torch.zeros(len(data.embeddings), dtype=torch.bool)  # (S,)
    names = "reconstructed", "interpolation", "visible mean"
    filled = {"true": data.embeddings} | {n: torch.zeros_like(data.embeddings) for n in names}
    for batch in data.lengths.argsort(stable=True).split(16):  # alike lengths: little padding
        first, lengths = data.first[batch], data.lengths[batch]
        embeddings = lvmae.pad(data.embeddings, first, lengths)  # (B, N, D)
        hidden = masking(embeddings, lengths, args.mask_ratio, generator=generator)  # (B, N)
        guesses = lvmae.trivial_predictions(embeddings, lengths, hidden)
        guesses["reconstructed"] = model(embeddings.to(device), lengths, hidden)[1].cpu()
        index = torch.arange(hidden.shape[1])
        is_real = index < lengths[:, None]  # (B, N)
        rows = (first[:, None] + index)[is_real]
        is_masked[rows] = hidden[is_real]
        for name in names:
            filled[name][rows] = guesses[name][is_real].half()
    return is_masked, filled


@torch.no_grad()
def search(queries, captions, top_k, truth=None, device="cpu"):
    """Rank captions (C, D) by their cosine similarity to the queries (Q, D): Eq. (4).

    Returns the top_k similarities and caption numbers, both (Q, top_k), and the rank of the
    captions `truth` (Q,), where 1 is the best. Never more than a block of the (Q, C) similarities is held.
    """
    def unit(x):
        return F.normalize(x.to(device).float(), dim=-1)

    Q, C = len(queries), len(captions)
    queries = unit(queries)
    best = torch.full((Q, min(top_k, C)), -2.0, device=device)
    number = torch.zeros_like(best, dtype=torch.long)
    higher = torch.zeros(Q, device=device)
    if truth is not None:  # the small step: rounding must not put a caption above itself
        bar = (queries * unit(captions[truth])).sum(-1, keepdim=True) + 1e-5  # (Q, 1)
    for c in range(0, C, 4096):
        block = unit(captions[c : c + 4096])
        for q in range(0, Q, 512):
            q = slice(q, q + 512)
            similarity = queries[q] @ block.T  # (512, 4096)
            values, places = similarity.topk(min(top_k, len(block)))
            values, order = torch.cat([best[q], values], 1).topk(best.shape[1])
            number[q] = torch.cat([number[q], places + c], 1).gather(1, order)
            best[q] = values
            if truth is not None:
                higher[q] += similarity.gt_(bar[q]).sum(1)  # in place: nobody reads it any more
    return best.cpu(), number.cpu(), 1 + higher.cpu()


def score(rank, C):
    """Recall at 1, 5 and 10 in percent, and median rank; rank (Q,), or None for pure chance."""
    if rank is None:
        return {f"R@{k}": 100 * min(1, k / C) for k in (1, 5, 10)} | {"median rank": (C + 1) / 2}
    recall = {f"R@{k}": 100 * (rank <= k).float().mean().item() for k in (1, 5, 10)}
    return recall | {"median rank": float(np.median(rank))}


class Reading(NamedTuple):
    """A segment to show: its captions, true and retrieved."""

    start: float
    is_masked: bool
    caption: str  # the true one, '' if unknown
    true: list  # (similarity, caption) for its embedding
    reconstructed: list  # the same for its reconstruction, [] if visible


def choose(is_masked, number):
    """Pick about `number` segments of a video, (N,): runs of three with a masked one among them."""
    runs = [i for i in range(0, len(is_masked), 3) if is_masked[i : i + 3].any()] or [0]
    picks = np.linspace(0, len(runs) - 1, min(len(runs), max(1, number // 3)))
    return [i for p in picks for i in range(runs[round(p)], min(runs[round(p)] + 3, len(is_masked)))]


def clock(seconds):
    """Write seconds as 1:02:03 or 2:03."""
    hours, minutes = divmod(int(seconds) // 60, 60)
    return (f"{hours}:{minutes:02}" if hours else f"{minutes}") + f":{int(seconds) % 60:02}"


def print_table(readings):
    """Print what is shown of a video, at most 100 columns wide."""
    table = [("time", "", "true caption", "true embedding", "reconstruction")]
    for r in readings:
        true = [f"{s:.2f} {'same' if c == r.caption else c}" for s, c in r.true]
        rebuilt = [f"{s:.2f} {c}" for s, c in r.reconstructed]
        table.append((clock(r.start), "▒" * r.is_masked, r.caption, "\n".join(true), "\n".join(rebuilt)))
    widths = [max(len(line) for cell in column for line in cell.split("\n")) for column in zip(*table)]
    while sum(widths) > 92:
        widths[widths.index(max(widths))] -= 1
    for row in table:
        cells = [
            [piece for line in cell.split("\n") for piece in textwrap.wrap(line, w, subsequent_indent=" ")]
            for cell, w in zip(row, widths)
        ]
        for pieces in zip_longest(*cells, fillvalue=""):
            print("  ".join(p.ljust(w) for p, w in zip(pieces, widths)).rstrip())


def main(args):
    """Print what the masked segments of a video are read as, and the scores over all videos."""
    sys.stdout.reconfigure(errors="replace")  # a caption may hold what the terminal cannot show
    device = lvmae.pick_device(args.device)
    data = lvmae.load_data(args.data)
    shown = args.video or [data.videos[data.lengths.argmax()]]
    for name in set(shown) - set(data.videos):
        near = difflib.get_close_matches(name, data.videos, 3, cutoff=0)
        raise SystemExit(f"--video {name}: not in {args.data}; the nearest are {', '.join(near)}")
    captions, embeddings, truth = read_captions(args.captions, data)
    if embeddings is None:
        embeddings = embed_captions(args.captions, captions, data, device)
    model = lvmae.load_checkpoint(args.ckpt, data, device)
    is_masked, filled = reconstruct(model, data, args, device)

    def retrieve(name, rows):
        values, numbers, _ = search(filled[name][rows], embeddings, args.top_k, device=device)
        pairs = zip(values.tolist(), numbers.tolist(), strict=True)
        return [[(s, captions[n]) for s, n in zip(*pair, strict=True)] for pair in pairs]

    for name in shown:
        v = data.videos.index(name)
        first, length = data.first[v].item(), data.lengths[v].item()
        rows = first + torch.tensor(choose(is_masked[first : first + length], args.show))
        hidden = is_masked[rows]
        rebuilt = iter(retrieve("reconstructed", rows[hidden]))
        readings = [
            Reading(data.starts[row].item(), is_masked[row].item(), captions[truth[row]] if truth[row] >= 0 else "", true, next(rebuilt) if is_masked[row] else [])
            for row, true in zip(rows, retrieve("true", rows), strict=True)
        ]
        print(f"{name}: {length} segments, {is_masked[first : first + length].sum()} masked (▒)\n")
        print_table(readings)

    rows = (is_masked & (truth >= 0)).nonzero()[:, 0] if (truth >= 0).any() else is_masked.nonzero()[:, 0]
    target = truth[rows]
    if (truth < 0).all():
        target = search(filled["true"][rows], embeddings, 1, device=device)[1][:, 0]
    scores = {
        name: score(search(filled[name][rows], embeddings, 1, target, device)[2], len(captions))
        for name in filled
    } | {"chance": score(None, len(captions))}
    print(f"\n{len(rows):,} masked segments of {len(data.videos)} videos, {len(captions):,} captions\n")
    print(f"{'':14}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'median rank':>14}")
    for name, s in scores.items():
        print(f"{name:14}{s['R@1']:7.1f}%{s['R@5']:7.1f}%{s['R@10']:7.1f}%{s['median rank']:14.1f}")
    if args.json:
        scores |= {"n": len(rows), "captions": len(captions)}
        Path(args.json).write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main(get_args())
