"""Stage 4 of LV-MAE: read reconstructed segments as captions (section 3.4).

A video is masked in part, the model rebuilds the masked embeddings from the visible ones,
and each is read as the caption whose text embedding is the most similar (Figure 3):

    segments (n, D) --mask, LVMAE--> reconstructions (n, D)
                                          |  Eq. (4): cosine similarity
    captions (C,) --text encoder--> (C, D) --> the nearest, and the rank of the answer

    python retrieve.py --captions captions.csv             # reads out.npz and lvmae.pt
    python retrieve.py --captions captions.csv --figure retrieval.png --videos videos/

Captions come as .txt (one a line), .csv (video,start,caption: the true one of each
segment) or .npz (captions (C,) and embeddings (C, D) of another encoder; with videos (C,)
and starts (C,) also the true ones). At the end stands how high the true caption ranks,
over the videos that the model was not trained on. The last line is that of chance. It
takes 5 seconds for 240 short videos.

Shapes: C captions, each once; Q queries; n segments of a video; D as in model.py. The
answer of a segment is the number of its true caption, or -1 where that is not known.
"""

import argparse
import csv
import json
import os
import sys
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from extract import BadVideo, decode, encoder_name, load_encoder
from model import (
    MASKS,
    check_outputs,
    collate,
    compare_encoders,
    find_seen,
    load_checkpoint,
    load_data,
    number,
    pick_device,
    replacing,
    require,
)
from train import trivial_predictions

# ---- Retrieval (section 3.4) -----------------------------------------------------------

# Queries that are ranked at a time: half a GiB of similarities to a million captions
BLOCK = 128

RECALLS = (1, 5, 10)


@dataclass
class Captions:
    """C captions, each once, and which of them is true of each segment."""

    texts: list
    embeddings: torch.Tensor  # (C, D) of unit length
    answers: list  # (n,) of each video, number of the true caption; -1: not known
    has_answers: bool  # whether any is known


def compare(queries, captions):
    """Eq. (4): cosine similarities (Q, C) of queries (Q, D) and captions (C, D).

    All are of unit length.
    """
    return queries.to(captions.device) @ captions.T  # (Q, C)


def search(queries, captions, top_k):
    """Find the top_k captions (C, D) that are nearest to each query (Q, D).

    Returns their similarities and their numbers, both (Q, top_k), the nearest first.
    """
    similarity = compare(queries, captions)  # (Q, C)
    best = similarity.topk(min(top_k, len(captions)))
    return best.values.cpu(), best.indices.cpu()


def rank_captions(queries, captions, answers):
    """Rank caption answers[q] among captions (C, D) for each of queries (Q, D) -> (Q,).

    1 is the best. Another caption that is just as similar counts as better: captions that
    all look alike must not pass for a success.
    """
    similarity = compare(queries, captions)  # (Q, C)
    limit = similarity.gather(1, answers[:, None].to(captions.device))  # (Q, 1)
    return (similarity >= limit).sum(1, dtype=torch.int32).cpu()


def to_unit_length(embeddings, source):
    """Scale the rows of (n, D) to length 1, or stop where one has no direction.

    Comparisons with NaN are False: a rank would count nothing that is better.
    """
    embeddings = F.normalize(embeddings.float(), dim=1)
    error = (embeddings.norm(dim=1) - 1).abs()
    require((error < 1e-3).all(), f"{source}: an embedding is zero, too large or NaN")
    return embeddings


@torch.no_grad()
def reconstruct(model, data, v, args, device):
    """Mask video v and rebuild it -> is_masked (n,), {name: queries (n, D)}."""
    embeddings, lengths = collate([data.embeddings[v]])  # (1, n, D), (1,)
    mask = MASKS[args.mask]
    generator = torch.Generator().manual_seed(args.seed + v)  # whatever else is scored
    is_masked = mask(embeddings, lengths, args.mask_ratio, generator)  # (1, n)
    _, predictions = model(embeddings.to(device), lengths, is_masked)  # (1, n, D)

    guesses = {"true": embeddings, "reconstructed": predictions.cpu()}
    guesses |= trivial_predictions(embeddings, lengths, is_masked)
    queries = {}
    for name, guess in guesses.items():
        source = f"{args.ckpt}: {name} embeddings of {data.videos[v]}"
        queries[name] = to_unit_length(guess[0], source)  # (n, D)
    return is_masked[0], queries


def rank_masked(model, data, videos, captions, args, device):
    """Rank the answers of all Q masked segments of videos -> {name: ranks (Q,)}.

    Segments without an answer do not count. Where no answer is known at all, the caption
    that the true embedding retrieves is the answer.
    """
    answers = []
    queries = defaultdict(list)
    for v in tqdm(videos, "videos", leave=False, disable=None):
        is_scored, of_video = reconstruct(model, data, v, args, device)
        if captions.has_answers:
            is_scored = is_scored & (captions.answers[v] >= 0)  # (n,)
        answers.append(captions.answers[v][is_scored])
        for name, embeddings in of_video.items():
            queries[name].append(embeddings[is_scored])

    answers = torch.cat(answers)  # (Q,)
    queries = {name: torch.cat(parts) for name, parts in queries.items()}  # (Q, D) each
    message = f"{args.captions}: no caption of what is masked in {len(videos)} videos"
    require(len(answers), message)

    ranks = {name: torch.zeros(len(answers), dtype=torch.int32) for name in queries}
    for block in torch.arange(len(answers)).split(BLOCK):  # (q,)
        answer = answers[block]
        if not captions.has_answers:
            _, nearest = search(queries["true"][block], captions.embeddings, 1)
            answer = nearest[:, 0]  # (q,)
        for name, embeddings in queries.items():
            rank = rank_captions(embeddings[block], captions.embeddings, answer)
            ranks[name][block] = rank
    # A guess has each rank equally often.
    ranks["chance"] = torch.arange(1, len(captions.texts) + 1)
    return ranks


def score(ranks):
    """Print recalls in percent, and the median, of ranks {name: (Q,)}, and return them."""
    heading = ""
    for k in RECALLS:
        heading += f"R@{k}".rjust(8)
    print(f"{'':16}{heading}   median rank")
    scores = {}
    for name, rank in ranks.items():
        row = {}
        for k in RECALLS:
            row[f"R@{k}"] = 100 * (rank <= k).double().mean().item()
        line = f"{name:16}"
        for recall in row.values():
            line += f"{recall:7.1f}%"
        row["median rank"] = float(np.median(rank))
        print(f"{line}{row['median rank']:14.1f}")
        scores[name] = row
    return scores


# ---- Table and figure ------------------------------------------------------------------

RED = "#c01c28"
GREY = "#e6e6e6"
# The texts of a segment, and the colours of these in the figure.
COLOURS = {"true caption": "black", "true embedding": "#1a5fb4", "reconstruction": RED}


@dataclass
class Segment:
    """What is shown of a segment."""

    start: float  # seconds
    is_masked: bool
    texts: dict  # for each of COLOURS, what is read there: lines, or '' for nothing

    def time(self):
        return f"{int(self.start) // 60}:{int(self.start) % 60:02}"


def nearest_captions(embedding, captions, top_k, known=""):
    """Read an embedding (D,) as its nearest captions, one a line, 'same' for a known one."""
    similarities, numbers = search(embedding[None], captions.embeddings, top_k)
    lines = []
    for similarity, c in zip(similarities[0], numbers[0].tolist(), strict=True):
        text = captions.texts[c]
        if text == known:
            text = "same"
        lines.append(f"{similarity:.2f} {text}")
    return "\n".join(lines)


def describe_video(model, data, v, captions, args, device):
    """Read the segments in the middle of video v -> list of Segment."""
    is_masked, queries = reconstruct(model, data, v, args, device)
    n = len(is_masked)
    first = max(0, n - args.show) // 2
    segments = []
    for i in range(first, min(n, first + args.show)):
        known = ""
        answer = captions.answers[v][i]
        if answer >= 0:
            known = captions.texts[answer]
        true = nearest_captions(queries["true"][i], captions, args.top_k, known)

        rebuilt = ""
        if is_masked[i]:
            query = queries["reconstructed"][i]
            rebuilt = nearest_captions(query, captions, args.top_k)

        texts = {
            "true caption": known,
            "true embedding": true,
            "reconstruction": rebuilt,
        }
        segment = Segment(data.starts[v][i].item(), is_masked[i].item(), texts)
        segments.append(segment)
    return segments


def wrap(text, width):
    """Wrap each line of a text -> list of lines."""
    lines = []
    for line in text.splitlines():
        lines += textwrap.wrap(line, width)
    return lines


def print_table(name, segments):
    """Print the segments of a video in columns, wrapped where wider than 34."""
    print(f"{name}, ▒ is masked\n")
    rows = [["time", "", *COLOURS]]
    for segment in segments:
        mark = ""
        if segment.is_masked:
            mark = "▒"
        texts = [segment.texts[heading] for heading in COLOURS]
        rows.append([segment.time(), mark, *texts])
    widths = []
    for column in zip(*rows, strict=True):
        lines = "\n".join(column).splitlines()
        widths.append(min(34, max(map(len, lines))))
    for row in rows:
        cells = map(wrap, row, widths)
        for parts in zip_longest(*cells, fillvalue=""):
            print("  ".join(map(str.ljust, parts, widths)).rstrip())
    print()


def draw_figure(name, segments, frames):
    """Draw segments as in Figure 3, four in a row -> uint8 (height, 1000, 3)."""
    try:
        font = ImageFont.truetype("DejaVuSans.ttf", 14)  # on most Linux machines
    except OSError:
        font = ImageFont.load_default(14)  # everywhere, but of Latin letters only
    captions = []
    for segment in segments:
        lines = []
        for heading, text in segment.texts.items():
            lines += [(COLOURS[heading], line) for line in wrap(text, 31)]
        captions.append(lines)

    above = 8 + 18 * max(map(len, captions))  # pixels above the top of a frame
    height = above + 168  # of a row
    n_rows = (len(segments) + 3) // 4
    figure = Image.new("RGB", (1000, 40 + n_rows * height), "white")
    draw = ImageDraw.Draw(figure)
    draw.text((8, 10), name, "black", font)
    x = 504
    for heading, colour in COLOURS.items():
        draw.text((x, 10), heading, colour, font)
        x += 28 + font.getlength(heading)

    for i, segment in enumerate(segments):
        x = 8 + 248 * (i % 4)
        y = 40 + height * (i // 4) + above
        y_line = y - 4 - 18 * len(captions[i])  # the last line ends above the frame
        for colour, line in captions[i]:
            draw.text((x, y_line), line, colour, font)
            y_line += 18

        figure.paste(frames[i], (x, y))
        label = segment.time()
        colour = "black"
        if segment.is_masked:
            label += " masked"
            colour = RED
            draw.rectangle((x, y, x + 239, y + 159), outline=RED, width=6)
        draw.rectangle((x, y, x + 14 + font.getlength(label), y + 22), colour)
        draw.text((x + 7, y + 3), label, "white", font)
    return np.asarray(figure)


def read_frames(path, data, segments):
    """Read the frame in the middle of each segment -> list of images, 240 x 160."""
    seconds = float(data.meta.get("segment_seconds", 5))
    places = [round(segment.start / seconds) for segment in segments]
    images = {}
    try:
        for place, slot, frame in decode(path, seconds, frames_per_segment=2):
            if place in places:
                image = Image.fromarray(frame)
                images[place, slot] = ImageOps.pad(image, (240, 160), color=GREY)
    except BadVideo as error:
        raise SystemExit(f"{path}: {error}") from None

    frames = []
    blank = Image.new("RGB", (240, 160), GREY)
    for place in places:
        first = images.get((place, 0), blank)  # of a short segment, it is the only one
        frames.append(images.get((place, 1), first))  # slot 1 begins in the middle
    return frames


# ---- Captions --------------------------------------------------------------------------


def read_captions(path, data, device):
    """Read captions, embed them, and find the segments of `data` that they are true of."""
    texts, segments, embeddings = read_file(path, data)

    # Number the captions, each once.
    number_of = {}  # {caption: its number}
    rows = []  # of each caption, the first in the file
    for row, text in enumerate(texts):
        if text and text not in number_of:
            number_of[text] = len(rows)
            rows.append(row)
    require(rows, f"{path}: found no caption, expected some")

    # Find the answer of each segment.
    answer_of = {}
    for row, segment in enumerate(segments):
        answer_of[segment] = number_of.get(texts[row], -1)
    require(len(answer_of) == len(segments), f"{path}: a segment is there twice")
    answers = []
    lost = set(answer_of)
    for video, starts in zip(data.videos, data.starts, strict=True):
        places = [(video, tenth(start)) for start in starts]
        message = f"{data.path}: two segments of {video} start in the same 0.1 s"
        require(len(set(places)) == len(places) or not segments, message)
        lost.difference_update(places)
        found = [answer_of.get(place, -1) for place in places]
        answers.append(torch.tensor(found))  # (n,)
    if lost:
        found = f"{len(lost)} of {len(segments)} captions"
        print(f"{found} are of no segment of {data.path}")
    has_answers = torch.cat(answers).max().item() >= 0
    example = f"{data.videos[0]} at {data.starts[0][0]:.1f} s"
    message = f"{path}: no caption of a segment of {data.path}, such as {example}"
    require(has_answers or not segments, message)

    # Embed them, unless the file did.
    captions = list(number_of)
    if embeddings is None:
        embeddings = embed_captions(captions, data, device)  # (C, D)
    else:
        embeddings = embeddings[rows].to(device)  # (C, D)
    embeddings = to_unit_length(embeddings, path)
    return Captions(captions, embeddings, answers, has_answers)


def read_file(path, data):
    """Read a file of R rows -> captions, their segments, embeddings (R, D) or None.

    A segment is (video, tenth of a second); a .txt knows none.
    """
    segments = []
    embeddings = None
    try:
        if path.endswith(".txt"):
            with open(path, encoding="utf-8-sig") as file:
                texts = list(file)

        elif path.endswith(".csv"):
            with open(path, encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file))
            if any(None in row for row in rows):
                raise ValueError("a row of too many cells: put quotes around commas")

            texts = [row["caption"] or "" for row in rows]
            segments = [(row["video"], tenth(row["start"])) for row in rows]

        elif path.endswith(".npz"):
            with np.load(path, allow_pickle=False) as file:
                if file.zip.testzip() is not None:
                    raise ValueError("damaged")
                texts = file["captions"].tolist()
                embeddings = torch.from_numpy(file["embeddings"])
                meta = dict(json.loads(str(file.get("meta", "{}"))))
                if "videos" in file:
                    tenths = map(tenth, file["starts"])
                    segments = list(zip(file["videos"].tolist(), tenths, strict=True))

        else:
            raise ValueError("another ending")
        texts = [" ".join(text.split()) for text in texts]
    except Exception as error:
        expected = ".txt lines, .csv video,start,caption or .npz captions, embeddings"
        raise SystemExit(f"{path}: found {error!r:.200}, expected {expected}") from None

    n = len(segments)
    require(n in (0, len(texts)), f"{path}: {n} videos, expected {len(texts)}")
    if embeddings is not None:
        is_right = embeddings.is_floating_point()
        require(is_right, f"{path}: embeddings of {embeddings.dtype}, expected floats")
        found = tuple(embeddings.shape)
        expected = (len(texts), data.embeddings[0].shape[1])
        require(found == expected, f"{path}: embeddings {found}, expected {expected}")
        compare_encoders(path, meta, data.path, data.meta)
    return texts, segments, embeddings


def tenth(start):
    """Start of a segment in tenths of a second: two files must agree to these."""
    return round(10 * float(np.float32(start)))


@torch.no_grad()
def embed_captions(texts, data, device):
    """Embed captions with the text tower of the encoder of `data` -> (C, D)."""
    name = str(data.meta.get("model", ""))
    advice = "or give --captions FILE.npz, with captions and embeddings"
    is_known = os.path.isdir(name) or ":" in name or name in open_clip.list_models()
    message = f"{data.path}: model '{name}' is none of open_clip: no text tower"
    require(is_known, f"{message}; {advice}")
    try:
        clip, _ = load_encoder(name, data.meta.get("pretrained", ""), device)
        tokenize = open_clip.get_tokenizer(encoder_name(name))
    except (SystemExit, Exception) as error:
        raise SystemExit(f"{data.path}: its text tower: {error}; {advice}") from None

    D = data.embeddings[0].shape[1]
    embeddings = []
    for i in tqdm(range(0, len(texts), 256), "captions", leave=False, disable=None):
        tokens = tokenize(texts[i : i + 256]).to(device)
        embedding = clip.encode_text(tokens).float()  # (b, D)
        found = embedding.shape[1]
        message = f"{data.path}: its text tower: found size {found}, expected {D}"
        require(found == D, f"{message}; {advice}")
        embeddings.append(embedding)
    return torch.cat(embeddings)


# ---- Command line ----------------------------------------------------------------------


def get_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    count = number(int, 1)
    share = number(float, 0.001, 0.999)
    # Files
    add("--data", default="out.npz", help="segment embeddings, from extract.py")
    add("--ckpt", default="lvmae.pt", help="checkpoint, from train.py")
    add("--captions", default="captions.csv", help=".txt, .csv or .npz")
    add("--json", metavar="FILE", help="also write the scores to this .json")
    # What is masked
    add("--mask", choices=MASKS, help="strategy; None: as in training")
    add("--mask-ratio", type=share, help="share of a video; None: as in training")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of random masks")
    # What is shown
    add("--video", nargs="+", metavar="NAME", help="videos; None: the longest scored")
    add("--show", type=count, default=12, help="segments to show, from mid-video")
    add("--top-k", type=count, default=1, help="captions to show of each embedding")
    add("--figure", metavar="PNG", help="also draw them, with a frame of each segment")
    add("--videos", metavar="FOLDER", default=".", help="their folder, for --figure")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser.parse_args(argv)


def choose_masks(checkpoint, args):
    """Take mask and ratio from the training, unless they are given."""
    training = checkpoint.get("args", {})
    args.mask = args.mask or training.get("mask")
    args.mask_ratio = args.mask_ratio or training.get("mask_ratio")
    is_known = args.mask in MASKS and args.mask_ratio is not None
    require(is_known, f"{args.ckpt}: masks not known: give --mask and --mask-ratio")


def choose_videos(data, checkpoint, args):
    """Choose videos to score: unseen ones, if there are -> their numbers, and a note.

    A checkpoint that names no videos may have seen all. One segment alone is not masked.
    """
    seen = find_seen(data.videos, checkpoint.get("videos", data.videos))
    videos = [v for v, video in enumerate(data.embeddings) if len(video) > 1]
    require(videos, f"{args.data}: found no video of 2 or more segments")
    unseen = [v for v in videos if data.videos[v] not in seen]
    if unseen:
        return unseen, f"those that {args.ckpt} was not trained on"
    return videos, f"since none is known to be new to {args.ckpt}"


def main(args):
    """Print what masked segments are read as, and how well it goes over many videos."""
    sys.stdout.reconfigure(errors="replace")  # captions the terminal cannot show

    # Files
    inputs = [args.data, args.ckpt, args.captions]
    if args.json:
        check_outputs({args.json: ".json"}, inputs)
    if args.figure:
        check_outputs({args.figure: ".png"}, inputs)
    device = pick_device(args.device)
    data = load_data(args.data)
    model, checkpoint = load_checkpoint(args.ckpt, data, device)

    # Masks and videos
    choose_masks(checkpoint, args)
    scored, note = choose_videos(data, checkpoint, args)
    longest = max(scored, key=lambda v: len(data.embeddings[v]))
    shown = args.video or [data.videos[longest]]
    for name in shown:
        require(name in data.videos, f"--video {name}: not in {args.data}")
        path = os.path.join(args.videos, name)
        is_there = os.path.isfile(path) or not args.figure
        require(is_there, f"{path}: no such file: --videos must be their folder")

    # What to read segments as
    captions = read_captions(args.captions, data, device)
    if captions.has_answers:
        scored = [v for v in scored if captions.answers[v].max() >= 0]
        require(scored, f"{args.captions}: no caption of what is masked")

    # Show
    figures = []
    for name in shown:
        v = data.videos.index(name)
        segments = describe_video(model, data, v, captions, args, device)
        print_table(name, segments)
        if args.figure:
            frames = read_frames(os.path.join(args.videos, name), data, segments)
            figures.append(draw_figure(name, segments, frames))
    if args.figure:
        figure = Image.fromarray(np.concatenate(figures))
        with replacing(args.figure) as file:
            figure.quantize().save(file, "PNG")  # 256 colours: a third of the file

    # Score
    ranks = rank_masked(model, data, scored, captions, args, device)
    n = len(ranks["true"])
    C = len(captions.texts)
    what = "caption that the true embedding retrieves"
    if captions.has_answers:
        what = "true caption"
    masks = f"{n:,} masked segments ({args.mask}, {args.mask_ratio:.0%})"
    print(f"scored: {len(scored):,} of {len(data.videos):,} videos, {note}")
    print(f"rank of the {what} among {C:,} captions, {masks}\n")
    about = {"n": n, "captions": C, "videos": len(scored)}
    about |= {"mask": args.mask, "mask_ratio": args.mask_ratio}
    scores = about | score(ranks)
    if args.json:
        with replacing(args.json) as file:
            file.write(json.dumps(scores, indent=1).encode())


if __name__ == "__main__":
    try:
        main(get_args())
    except KeyboardInterrupt:
        sys.exit("\nstopped")
