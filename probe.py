"""Stage 3 of LV-MAE: probe the frozen latents on labelled videos (sections 4.1 to 4.3 and 8).

    out.npz --frozen encoder--> features (B, N+1, D) --head--> classes (B, C), or numbers (B, 1)

    python probe.py --head attentive             # reads out.npz and lvmae.pt; labels: folder names
    python probe.py --compare                    # Table 1 in small: every head on its features
    python probe.py --labels lvu_1.0/director    # LVU, Breakfast and COIN: the files as published

A video's features are [CLS] and its segments, all visible. Raw features, the paper's "Baseline",
are a blank [CLS] and the embeddings without positions: linear and attentive cannot see their order.
Transformer and mamba, trained end to end, take raw features too; each head is a class below.
A run is a seed: of the head, of the batches and, unless the labels name one, of the split (60/20/20
of each class). Epoch and rate are chosen on validation, the test videos are scored once. The last
line is the head that was asked for: its name, mean +- standard deviation over the runs.
"""

import argparse
import csv
import json
import math
import re
import statistics
from pathlib import Path, PurePosixPath

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import model as lvmae
from model import find_tokens, require

SPLITS = ("train", "val", "test")


def get_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    # Files
    add("--data", default="out.npz", help="segment embeddings, from extract.py")
    add("--ckpt", default="lvmae.pt", help="checkpoint, from train.py")
    add("--labels", default="folders", help="'folders' or 'breakfast' (both read off the paths), "
        "an LVU or Breakfast folder, COIN.json or a CSV of video,label[,split]")
    add("--regression", action="store_true", help="labels are numbers (LVU's counts always are)")
    # Heads
    add("--head", default="attentive", help="what is trained",
        choices=["linear", "attentive", "transformer", "mamba"])
    add("--features", default="lvmae", choices=["lvmae", "raw"],
        help="what linear and attentive see; raw needs no checkpoint")
    add("--compare", action="store_true", help="every row of the table, whatever --head is")
    # Their training
    add("--runs", type=int, default=3, help="runs, with seeds --seed, --seed + 1, ...")
    add("--seed", type=int, default=0, help="seed of the first run")
    add("--epochs", type=int, help="None: 30 for linear (Table 6), 20 for the others (Table 7)")
    add("--lr", type=float, help="None: 1e-3, and for linear the best of 1e-4, 1e-3, 1e-2")
    add("--batch-size", type=int, default=16, help="videos per step")
    add("--json", help="also write the table to this file")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where")
    return parser.parse_args(argv)


def read_labels(source, data):
    """Read --labels: rows of (video, label, split), split '' where the source has none."""
    path, rows = Path(source), []
    if source == "folders":
        return [(v, label, "") for v, label in zip(data.videos, data.labels, strict=True) if label]
    if source == "breakfast":  # P03_cam01_P03_cereals.avi; persons 47 to 54 are the published test
        names = [(v, re.search(r"P(\d\d)_([a-z]+)(_ch0)?\.\w+$", v)) for v in data.videos]
        return [(v, m[2], "test" if int(m[1]) >= 47 else "train") for v, m in names if m]
    if path.suffix == ".json":  # COIN
        videos = json.loads(path.read_text("utf-8"))["database"].items()
        return [(video, v["class"], v["subset"].removesuffix("ing")) for video, v in videos]
    files = {path / f"{split}.csv": split for split in SPLITS}  # LVU and Breakfast: a folder
    files = {file: split for file, split in files.items() if file.exists()} or {path: ""}
    for file, split in files.items():
        lines = file.read_text("utf-8-sig").splitlines()
        for row in csv.DictReader(lines, delimiter="," if "," in lines[0] else " "):  # LVU: spaces
            video = row.get("video") or row.get("youtube_id") or row.get("file_name")
            label = row.get("label") or row.get("class_name") or row.get("action")
            if "view_count" in row:
                label = math.log(float(row["view_count"]))
            if "like_count" in row:
                likes, dislikes = float(row["like_count"]), float(row["dislike_count"])
                label = 10 * likes / (likes + dislikes)
            rows.append((video, label, row.get("split", split)))
    return rows


def match(rows, videos, source):
    """Find each row's video by path or file name, ending or not: -> {index: (label, split)}."""
    indices, found, absent = {}, {}, []
    for index, video in enumerate(videos):
        path = PurePosixPath(video)
        for name in {video, str(path.with_suffix("")), path.name, path.stem}:
            indices.setdefault(re.sub("[-/]", "_", name), []).append(index)
    for video, label, split in rows:
        require(video and label is not None and split in ("", *SPLITS), f"{source}: found "
                f"{(video, label, split)}, expected video, label[, train|val|test]")
        # Breakfast: P03-cam01-P03_cereals is P03_cam01_P03_cereals or P03/cam01/P03_cereals on disk
        hits = indices.get(re.sub("[-/]", "_", video), [])
        hits = [index for index in hits if videos[index] == video] or hits
        if not hits:
            absent.append(video)
            continue
        is_one = len(hits) == 1 and found.setdefault(hits[0], (label, split)) == (label, split)
        require(is_one, f"{source}: {video} means {' and '.join(videos[i] for i in hits)}: "
                "expected one video, labelled once")
    bare = [video for index, video in enumerate(videos) if index not in found]
    for what, names in {"videos have no label": bare, "labels have no video": absent}.items():
        if names:
            print(f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if names[3:] else ''}")
    return found


def make_split(found, named, seed, is_class, source):
    """Split as the labels say; a val or test that they do not name is 20 % of each class of train.

    `named`: the splits that they name. Returns {"train": indices of videos, "val": .., "test": ..}.
    """
    generator = torch.Generator().manual_seed(seed)
    classes = {}
    for index, (label, part) in found.items():
        group = classes.setdefault(label if is_class else "", {part: [] for part in SPLITS})
        group[part or "train"].append(index)
    for group in classes.values():
        order = torch.randperm(len(group["train"]), generator=generator)
        train = group["train"] = [group["train"][i] for i in order]
        for part in SPLITS[1:]:
            if part not in named:
                group[part] = [train.pop() for _ in range(round(0.2 * len(order)))]
    split = {part: sum((group[part] for group in classes.values()), []) for part in SPLITS}
    n = {part: len(indices) for part, indices in split.items()}
    poor = [label for label, group in classes.items()
            if not group["train"] or sum(map(len, group.values())) < 1 + is_class]
    is_right = not poor and min(n.values()) > 0 and n["train"] > 1 and len(classes) > is_class
    require(is_right, f"{source}: found {len(classes)} classes, {n} videos, too few in {poor[:3]}; "
            "expected two classes or more, two videos in each, one of them in train, and no split "
            "of 0: give each class a folder, or give --labels FILE.csv")
    return split


@torch.no_grad()
def compute_features(data, model, device):
    """Data whose rows are [CLS] and the segments of each video: (S + V, D). `model` None: raw.

    Its lengths count [CLS], too.
    """
    features = [None] * len(data.videos)
    batches = data.lengths.argsort(stable=True).split(32)  # of similar length: little padding
    for videos in tqdm(batches, "features", leave=False, disable=None):
        lengths = data.lengths[videos]
        x = lvmae.pad(data.embeddings, data.first[videos], lengths)  # (B, N, D)
        x = model.encode(x.to(device), lengths).cpu() if model else F.pad(x, (0, 0, 1, 0))
        for video, n, tokens in zip(videos, lengths, x.half(), strict=True):
            features[video] = tokens[: n + 1]
    return data._replace(embeddings=torch.cat(features), lengths=data.lengths + 1,
                         first=data.first + torch.arange(len(features)))


class Linear(nn.Module):
    """Table 6: the average of the segments -> linear layer. The other heads build on it."""

    def __init__(self, dim, outputs):
        super().__init__()
        # Paper: silent. Here: each dimension is normalised first, as in MAE's linear probing, and
        # the layer starts at zero: small rates and few steps would not wash out a random start.
        self.last = nn.Sequential(nn.BatchNorm1d(dim, affine=False), nn.Linear(dim, outputs))
        nn.init.zeros_(self.last[1].weight)
        self.heads = math.gcd(dim, 8)  # of attention and mamba: 8, or the power of 2 in dim

    def forward(self, x, lengths):  # (B, N+1, D), zero at padding, (B,) -> (B, outputs)
        return self.last(self.summary(x, lengths))

    def summary(self, x, lengths):  # -> (B, D)
        is_segment = find_tokens(x.shape[1] - 1, lengths)[:, 1:, None].to(x.device)  # (B, N, 1)
        return (x[:, 1:] * is_segment).sum(1) / is_segment.sum(1)


class Attentive(Linear):
    """Table 7: a transformer layer -> [CLS]. No other output is read, so no other is computed."""

    def __init__(self, dim, outputs):
        super().__init__(dim, outputs)
        self.cls_token = nn.Parameter(torch.zeros(dim))  # on top of [CLS], which is blank if raw
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, self.heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def summary(self, x, lengths):
        is_padding = ~find_tokens(x.shape[1] - 1, lengths).to(x.device)  # (B, N+1)
        cls = x[:, :1] + self.cls_token  # (B, 1, D)
        keys = self.norm1(torch.cat([cls, x[:, 1:]], dim=1))  # (B, N+1, D)
        cls = cls + self.attention(keys[:, :1], keys, keys, is_padding, need_weights=False)[0]
        return (cls + self.mlp(self.norm2(cls)))[:, 0]


class Transformer(Linear):
    """A small LV-MAE encoder, not pre-trained -> [CLS]."""

    def __init__(self, dim, outputs):
        super().__init__(dim, outputs)
        sizes = dict(decoder_dim=2, decoder_depth=0, decoder_heads=1)  # there is no decoding
        self.encoder = lvmae.LVMAE(lvmae.LVMAEConfig(dim, 2, self.heads, **sizes))

    def summary(self, x, lengths):
        return self.encoder.encode(x[:, 1:], lengths)[:, 0]


def selective_scan(x, delta, rate, b, c):
    """State h_t = exp(-rate delta_t) h_t-1 + delta_t b_t x_t, output y_t = c_t h_t, for all t.

    x (B, N, H, P), delta (B, N, H), rate (H,), b and c (B, N, K) -> y (B, N, H, P). Unrolled, y_t
    sums over the steps s up to t, each shrunk by the decays since: one matrix product (Mamba-2), of
    which the memory grows with N * N.
    """
    log_decay = (-rate * delta).cumsum(1).mT  # (B, H, N)
    log_decay = log_decay[..., None] - log_decay[..., None, :]  # (B, H, N, N), at [t, s]
    decay = log_decay.tril().exp().tril()  # no future; the first tril keeps exp from overflowing
    matrix = (c @ b.mT)[:, None] * decay * delta.mT[:, :, None]  # (B, H, N, N), what s adds to y_t
    return torch.einsum("bhts,bshp->bthp", matrix, x)


class Mamba(Linear):
    """A Mamba layer -> average. All of it is causal: padding, at the end, reaches no segment.

    Paper: Mamba. Here: with one decay per head, as in Mamba-2, so that the scan is a product.
    """

    def __init__(self, dim, outputs, state=16):
        super().__init__(dim, outputs)
        self.sizes = [2 * dim, 2 * dim, state, state, self.heads]
        self.norm = nn.LayerNorm(dim)
        self.proj_in, self.proj_out = nn.Linear(dim, sum(self.sizes)), nn.Linear(2 * dim, dim)
        self.conv = nn.Conv1d(2 * dim, 2 * dim, 4, padding=3, groups=2 * dim)
        self.log_rate = nn.Parameter(torch.linspace(-4, 1, self.heads))  # from long memory to short
        self.skip = nn.Parameter(torch.ones(self.heads, 1))

    def summary(self, x, lengths):
        u, gate, b, c, delta = self.proj_in(self.norm(x)).split(self.sizes, dim=-1)
        u = F.silu(self.conv(u.mT)[..., : x.shape[1]].mT).unflatten(2, (self.heads, -1))
        y = selective_scan(u, F.softplus(delta), self.log_rate.exp(), b, c) + self.skip * u
        return super().summary(x + self.proj_out(y.flatten(2) * F.silu(gate)), lengths)


ROWS = {  # of the table, and their heads: on latents where it says LV-MAE, else on raw features
    "majority": None, "raw linear": Linear, "raw attentive": Attentive,
    "transformer": Transformer, "mamba": Mamba,
    "LV-MAE linear": Linear, "LV-MAE attentive": Attentive,
}


def fit(row, features, targets, split, seed, args, device):
    """Train a head, keep its best epoch on validation, score it once on test.

    targets (V,): class indices -> accuracy in %; numbers (regression) -> mean squared error.
    """
    torch.manual_seed(seed)
    train, val, test = map(torch.tensor, split.values())
    is_class = not targets.is_floating_point()
    # Numbers are learned with mean 0 and deviation 1, and scored in their own unit.
    center, scale = (0, 1) if is_class else (targets[train].mean(), targets[train].std())
    if row == "majority":  # always the commonest class of train, or its mean
        error = targets[test] - (targets[train].mode().values if is_class else center)
        return (100 * (error == 0).double().mean() if is_class else error.square().mean()).item()
    Head, outputs = ROWS[row], int(targets.max()) + 1 if is_class else 1
    # Tables 6 and 7. Paper: linear at 1e-4. Here: validation chooses among three rates, since on a
    # few hundred videos 30 epochs at 1e-4 end too early. Heads trained end to end use Table 7, too.
    epochs, rates, gamma = (30, (1e-4, 1e-3, 1e-2), 1.0) if Head is Linear else (20, (1e-3,), 0.9)
    loss_of = F.cross_entropy if is_class else F.mse_loss

    def predict(head, videos):
        lengths = features.lengths[videos]  # (B,), with [CLS]
        x = lvmae.pad(features.embeddings, features.first[videos], lengths)  # (B, N+1, D)
        y = head(x.to(device), lengths - 1).cpu()  # (B, outputs)
        return y if is_class else center + scale * y[:, 0]

    @torch.no_grad()
    def score(head, videos):  # accuracy (0 for numbers), then minus the loss: more is better
        y = torch.cat([predict(head.eval(), batch) for batch in videos.split(args.batch_size)])
        accuracy = (y.argmax(-1) == targets[videos]).double().mean().item() if is_class else 0
        return 100 * accuracy, -loss_of(y, targets[videos]).item()

    best = (-1, 0)  # below any score
    for lr in (args.lr,) if args.lr else rates:
        head = Head(features.embeddings.shape[1], outputs).to(device)
        optimizer = torch.optim.Adam(head.parameters(), lr, betas=(0.9, 0.999))
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)
        for _ in tqdm(range(args.epochs or epochs), f"{row}, epochs", leave=False, disable=None):
            head.train()
            order = train[torch.randperm(len(train))]
            # Batches of equal size: BatchNorm cannot train on a last one of one video.
            for videos in order.tensor_split(max(1, len(train) // args.batch_size)):
                loss = loss_of(predict(head, videos), targets[videos])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
            result = score(head, val)
            if result > best:
                best, state = result, {k: v.clone() for k, v in head.state_dict().items()}
    head.load_state_dict(state)
    accuracy, minus_loss = score(head, test)
    return accuracy if is_class else -minus_loss


def main(args):
    """Read the labels, compute the features, fill the table row by row."""
    require(args.runs > 0 and args.batch_size > 1, "expected --runs above 0, --batch-size above 1")
    data, device = lvmae.load_data(args.data), lvmae.pick_device(args.device)
    with lvmae.explain(args.labels, "labels (see --help)", ZeroDivisionError):
        rows = [(video, float(label) if args.regression else label, split)
                for video, label, split in read_labels(args.labels, data)]
    found, named = match(rows, data.videos, args.labels), {split for _, _, split in rows}
    is_class = not any(isinstance(label, float) for label, _ in found.values())
    splits = {seed: make_split(found, named, seed, is_class, args.labels)
              for seed in range(args.seed, args.seed + args.runs)}
    classes = sorted({label for label, _ in found.values()})  # one map for all splits
    label_of = {i: classes.index(x) if is_class else x for i, (x, _) in found.items()}
    targets = torch.tensor([label_of.get(i, 0) for i in range(len(data.videos))])  # (V,)

    wanted = [row for row in ROWS if args.compare or row.endswith(("majority", args.head))]
    if args.features == "raw":
        wanted = [row for row in wanted if "LV-MAE" not in row]
    raw, latents = compute_features(data, None, device), None
    if any("LV-MAE" in row for row in wanted):
        latents = compute_features(data, lvmae.load_checkpoint(args.ckpt, data, device), device)

    n = {part: len(indices) for part, indices in splits[args.seed].items()}
    metric = f"{len(classes)} classes; accuracy in %" if is_class else "mean squared error"
    print(f"{args.runs} runs; {', '.join(f'{part} {n[part]}' for part in n)} videos; {metric}")
    table = {}
    for row in wanted:
        x = latents if "LV-MAE" in row else raw
        runs = [fit(row, x, targets, splits[seed], seed, args, device) for seed in splits]
        mean, std = statistics.mean(runs), statistics.stdev(runs) if args.runs > 1 else 0.0
        table[row] = {"mean": mean, "std": std, "runs": runs}
        print(f"{row:16} {mean:7.2f} +- {std:.2f}", flush=True)
    if args.json:
        table = {"rows": table, "n": n, "classes": len(classes) if is_class else 0}
        Path(args.json).write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main(get_args())
