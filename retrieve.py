"""Stage 4 of LV-MAE: read reconstructed segments as captions (section 3.4, Figures 3 and 4).

Each video is masked in part, the model rebuilds the masked embeddings from the visible ones, and
each is read as the caption whose text embedding is the most similar.

    python retrieve.py --captions captions.csv             # reads out.npz and lvmae.pt
    python retrieve.py --captions captions.csv --figure retrieval.png --videos videos/

Captions come as .txt (one a line), .csv (video,start,caption: the true one of each segment) or .npz
(captions (C,) str, embeddings (C, D): for encoders that open_clip does not have). At the end stands
how high the true caption ranks, for the masked segments of all videos, those of the training
included; where none is known, the caption that the true embedding retrieves takes its place. The
240 videos of the toy world take 7 CPU seconds, half of them to import open_clip.

C captions without repeats, Q queries; the other letters are those of model.py.
"""

import argparse
import csv
import difflib
import hashlib
import json
import os
import sys
import textwrap
from itertools import zip_longest
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import model as lvmae
from extract import decode, load_encoder, save
from model import explain, require

TITLES = "time", "", "true caption", "true embedding", "reconstruction"
COLOURS = "black", "#1a5fb4", "#c01c28"  # of the last three
TILE = {"size": (160, 240), "resize_mode": "longest", "fill_color": 230}  # how a frame is drawn
BLANK = np.full((160, 240, 3), 230, np.uint8)  # where the video has no frame


def get_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", default="out.npz", help="segment embeddings, from extract.py")
    add("--ckpt", default="lvmae.pt", help="checkpoint, from train.py")
    add("--captions", default="captions.csv", help=".txt, .csv or .npz")
    # What is masked
    add("--mask", choices=lvmae.MASKS, default="random", help="strategy")
    add("--mask-ratio", type=float, default=0.4, help="share of a video, 0 to 1")
    add("--seed", type=int, default=0, help="of the random masks")
    # What is shown
    add("--video", nargs="+", metavar="NAME", help="videos to show; none: the longest")
    add("--show", type=int, default=12, help="segments to show, from mid-video")
    add("--top-k", type=int, default=1, help="captions to show of each embedding")
    add("--figure", metavar="PNG", help="also draw them, with a frame of each segment")
    add("--videos", metavar="FOLDER", default="", help="folder given to extract.py, for --figure")
    add("--json", metavar="FILE", help="also write the scores to this file")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where")
    return parser.parse_args(argv)


def read_captions(path, data):
    """Read C captions, their embeddings (C, D) or None, and each segment's true caption or -1."""
    keys, embeddings = [], None
    with explain(path, "lines (.txt), video,start,caption (.csv) or captions, embeddings (.npz)"):
        if path.endswith(".npz"):
            with np.load(path, allow_pickle=False) as file:
                texts, embeddings = file["captions"].tolist(), torch.from_numpy(file["embeddings"])
        else:
            with open(path, encoding="utf-8-sig", newline="") as file:
                texts = list(file)
        if path.endswith(".csv"):
            rows = list(csv.DictReader(texts))
            texts = [row["caption"] or "" for row in rows]
            keys = [(row["video"], round(10 * float(row["start"]))) for row in rows]
        texts = [" ".join(text.split()) for text in texts]
    place = {text: i for i, text in enumerate(texts) if text}  # each caption once
    number = {text: c for c, text in enumerate(place)}
    if embeddings is not None:
        found, expected = tuple(embeddings.shape), (len(texts), data.embeddings.shape[1])
        require(found == expected and embeddings.isfinite().all(),
                f"{path}: embeddings: found {found}, expected {expected}, all finite")
        embeddings = F.normalize(embeddings[list(place.values())].float(), dim=1)
    tenths = (data.starts * 10).round().tolist()  # starts agree if they do to a tenth of a second
    names = np.repeat(np.array(data.videos, object), data.lengths)
    caption = dict(zip(keys, texts, strict=False))  # of segments; only a .csv has keys
    truth = [number.get(caption.get(key), -1) for key in zip(names, tenths, strict=True)]
    truth = torch.tensor(truth)  # (S,)
    require(number and (not keys or (truth >= 0).any()),
            f"{path}: found no caption{' of a segment' if keys else ''}, expected some (videos as "
            f"{names[0]}, starts as {tenths[0] / 10} in {data.path})")
    return list(number), embeddings, truth


@torch.no_grad()
def embed_captions(path, captions, data, device):
    """Embed captions with the text tower of the model that made `data`, or recall it: (C, D)."""
    name, weights = data.meta.get("model", ""), data.meta.get("pretrained", "")
    files = [file for file in (Path(weights), *sorted(Path(name).glob("*"))) if file.is_file()]
    source = json.dumps([captions, data.meta, [file.stat().st_mtime for file in files]])
    digest, cache = hashlib.sha256(source.encode()).hexdigest(), Path(f"{path}.cache.npz")
    if cache.exists() and np.load(cache)["digest"] == digest:
        return torch.from_numpy(np.load(cache)["embeddings"])
    embeddings, size = [], data.embeddings.shape[1]
    try:
        is_known = name in open_clip.list_models() or os.path.isdir(name) or ":" in name
        require(is_known, f"found model {name!r}, expected a name or folder of open_clip")
        clip, tokenizer_name = load_encoder(name, weights, device)
        tokenize = open_clip.get_tokenizer(tokenizer_name)
        for i in tqdm(range(0, len(captions), 256), "captions", disable=len(captions) < 10_000):
            text = clip.encode_text(tokenize(captions[i : i + 256]).to(device)).float()  # (256, D)
            embeddings.append(F.normalize(text, dim=1).half().cpu())
        found = text.shape[1]
        require(found == size, f"found embeddings of size {found}, expected {size}")
    except (SystemExit, ImportError) as error:  # the lines of load_encoder, and those above
        raise SystemExit(f"{data.path}: its text tower: {error}; or give --captions"
                         " FILE.npz (captions, embeddings)") from None
    embeddings = torch.cat(embeddings)  # (C, D)
    if os.access(cache.parent, os.W_OK):
        save(cache, digest=digest, embeddings=embeddings.numpy())
    return embeddings


@torch.no_grad()
def reconstruct(model, data, args, device):
    """Mask each video and rebuild what is masked: is_masked (S,), {name: embeddings (S, D)}."""
    generator = torch.Generator().manual_seed(args.seed)
    is_masked = torch.zeros(len(data.embeddings), dtype=torch.bool)
    rebuilt = {"true": data.embeddings}
    for batch in data.lengths.argsort(stable=True).split(16):  # alike lengths: little padding
        first, lengths = data.first[batch], data.lengths[batch]
        embeddings = lvmae.pad(data.embeddings, first, lengths)  # (B, N, D)
        masked = lvmae.MASKS[args.mask](embeddings, lengths, args.mask_ratio, generator)  # (B, N)
        guesses = {"reconstructed": model(embeddings.to(device), lengths, masked)[1].cpu()}
        guesses |= lvmae.trivial_predictions(embeddings, lengths, masked)
        rows = (first[:, None] + torch.arange(masked.shape[1]))[masked]  # of the masked segments
        is_masked[rows] = True
        for name, guess in guesses.items():
            rebuilt.setdefault(name, torch.zeros_like(data.embeddings))[rows] = guess[masked].half()
    return is_masked, rebuilt


@torch.no_grad()
def search(queries, captions, truth, top_k, device):
    """Rank captions (C, D), of length 1, by similarity to queries (Q, D), block by block: Eq. (4).

    Returns the top_k similarities, the numbers of these captions, both (Q, top_k), and the rank of
    caption truth[q] for query q, (Q,), from 1; it means nothing where truth is -1, unknown. All
    similarities (Q, C) would not fit in memory.
    """
    queries = F.normalize(queries.to(device).float(), dim=1)
    # Only what is more similar than this ranks higher; 1e-6, since rounding must not count as more.
    threshold = (queries * captions[truth].to(queries)).sum(1, keepdim=True) + 1e-6  # (Q, 1)
    best = torch.full((len(queries), min(top_k, len(captions))), -2.0, device=device)
    number, rank = torch.zeros_like(best, dtype=torch.long), torch.ones_like(threshold[:, 0])
    blocks = range(0, len(captions), 2048)
    for c in tqdm(blocks, "search", leave=False, disable=len(captions) < 100_000 or None):
        block = captions[c : c + 2048].to(queries).T  # (D, 2048)
        for q in range(0, len(queries), 1024):
            similarity = queries[q : q + 1024] @ block  # (1024, 2048)
            # topk is slow: only for the few rows that find something better than before.
            rows = q + (similarity.amax(1) > best[q : q + 1024, -1]).nonzero()[:, 0]
            values, places = similarity[rows - q].topk(min(top_k, block.shape[1]))
            best[rows], order = torch.cat([best[rows], values], 1).topk(best.shape[1])
            number[rows] = torch.cat([number[rows], places + c], 1).gather(1, order)
            rank[q : q + 1024] += (similarity > threshold[q : q + 1024]).sum(1)
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
    """Draw segments as in Figure 3, four in a row: captions above a frame -> (height, 1000, 3)."""
    try:
        font = ImageFont.truetype("DejaVuSans.ttf", 15)  # many scripts; on most Linux machines
    except OSError:
        font = ImageFont.load_default(15)  # Latin letters; everywhere
    columns = [[(colour, part) for colour, text in zip(COLOURS, texts, strict=True)
                for line in text.splitlines()  # wrapped at as many letters as take 225 pixels
                for part in textwrap.wrap(line, int(len(line) * 225 / font.getlength(line)))]
               for _, _, *texts in segments]
    above, below = 20 * max(map(len, columns)) + 6, 178  # pixels above and below a frame's top
    figure = Image.new("RGB", (1000, 40 + -(-len(frames) // 4) * (above + below)), "white")
    draw = ImageDraw.Draw(figure)
    draw.text((8, 8), name, "black", font)
    for i, x in enumerate((504, 629, 776), 2):  # a legend of the captions that are there
        if any(segment[i] for segment in segments):
            draw.text((x, 8), TITLES[i], COLOURS[i - 2], font)
    cells = zip(segments, columns, frames, strict=True)
    for i, ((time, masked, *_), lines, frame) in enumerate(cells):
        x, y = 8 + i % 4 * 248, 40 + i // 4 * (above + below) + above
        for j, (colour, line) in enumerate(lines, -len(lines)):
            draw.text((x, y + 20 * j - 4), line, colour, font)
        figure.paste(Image.fromarray(frame), (x, y))
        colour, time = (COLOURS[2], time + " masked") if masked else ("black", time)
        draw.rectangle((x, y, x + 239, y + 159), None, colour, width=6 if masked else 0)
        draw.rectangle((x, y, x + 14 + font.getlength(time), y + 23), fill=colour)
        draw.text((x + 7, y + 3), time, "white", font)
    return np.asarray(figure)


def main(args):
    """Print what the masked segments of a video are read as, and how well it goes over all."""
    sys.stdout.reconfigure(errors="replace")  # captions may hold what the terminal cannot show
    require(0 < args.mask_ratio < 1 and args.top_k > 0,
            "--mask-ratio, --top-k: expected between 0 and 1, at least 1")
    device, data = lvmae.pick_device(args.device), lvmae.load_data(args.data)
    shown = args.video or [data.videos[data.lengths.argmax()]]
    for name in shown:
        if name not in data.videos:
            near = ", ".join(difflib.get_close_matches(name, data.videos, 3, cutoff=0))
            raise SystemExit(f"--video {name}: not in {args.data}, the nearest are {near}")
        path = os.path.join(args.videos, name)
        require(not args.figure or os.path.isfile(path),
                f"{path}: no such file: give --videos, the folder of {args.data}")
    captions, embeddings, truth = read_captions(args.captions, data)
    if embeddings is None:
        embeddings = embed_captions(args.captions, captions, data, device)
    model = lvmae.load_checkpoint(args.ckpt, data, device)
    is_masked, rebuilt = reconstruct(model, data, args, device)

    figures, seconds = [], data.meta.get("segment_seconds", 5.0)
    for name in shown:
        v = data.videos.index(name)
        rows = (data.first[v] + torch.arange(data.lengths[v])).tolist()
        rows = rows[max(0, len(rows) - args.show) // 2 :][: args.show]
        queries = torch.cat([rebuilt["true"][rows], rebuilt["reconstructed"][rows]])
        best = search(queries, embeddings, truth[rows].repeat(2), args.top_k, device)
        segments = []
        for i, row in enumerate(rows):
            start, true, masked = int(data.starts[row]), truth[row].item(), is_masked[row].item()
            caption, read = captions[true] if true >= 0 else "", []
            for q, known in ((i, true), (i + len(rows), None)):
                pairs = zip(best[0][q].tolist(), best[1][q].tolist(), strict=True)
                pairs = [f"{s:.2f} {'same' if n == known else captions[n]}" for s, n in pairs]
                read.append("\n".join(pairs))
            time, mark = f"{start // 60}:{start % 60:02}", "▒" if masked else ""
            segments.append((time, mark, caption, read[0], read[1] if masked else ""))
        print(f"{name}, ▒ is masked\n")
        print_table(segments)
        if args.figure:  # decode gives two a segment, and dict keeps the second: its middle
            frames = dict(decode(os.path.join(args.videos, name), seconds, 2, TILE))
            places = (data.starts[rows] / seconds).round().tolist()
            figures.append(draw_figure(name, segments, [frames.get(i, BLANK) for i in places]))
    if args.figure:  # in 256 colours: a third of the file
        Image.fromarray(np.concatenate(figures)).quantize().save(args.figure, optimize=True)

    rows, what = (is_masked & (truth >= 0)).nonzero()[:, 0], "true caption"
    if (truth < 0).all():
        rows, what = is_masked.nonzero()[:, 0], "caption that the true embedding retrieves"
        truth[rows] = search(rebuilt["true"][rows], embeddings, truth[rows], 1, device)[1][:, 0]
    require(len(rows), f"{args.data}: found no masked segment to score, expected longer videos")
    print(f"\nrank of the {what} among {len(captions):,} captions, {len(rows):,} masked segments "
          f"({args.mask}, {args.mask_ratio:.0%})\n")
    print(f"{'':16}     R@1     R@5    R@10   median rank")
    scores = {"n": len(rows), "captions": len(captions)}
    for name in [*rebuilt, "chance"]:
        rank = (torch.arange(1.0, len(captions) + 1) if name == "chance" else
                search(rebuilt[name][rows], embeddings, truth[rows], 1, device)[2])
        recall = {f"R@{k}": 100 * (rank <= k).float().mean().item() for k in (1, 5, 10)}
        scores[name] = recall | {"median rank": float(np.median(rank))}
        print("{:16}{:7.1f}%{:7.1f}%{:7.1f}%{:14.1f}".format(name, *scores[name].values()))
    if args.json:
        Path(args.json).write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main(get_args())
