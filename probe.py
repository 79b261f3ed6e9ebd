"""Judge the latents of LV-MAE on labelled videos (paper: sections 4.1 to 4.3 and 8, Tables 1 to 3).

    python probe.py --head attentive             # reads out.npz and lvmae.pt; labels: folder names
    python probe.py --compare                    # Table 1 in small: every head, both features
    python probe.py --labels lvu_1.0/director    # LVU, Breakfast and COIN: the files as published

Every head sees features (B, N+1, D) of whole videos without masks: [CLS], then the segments.
    linear       average of the segments -> linear layer (Table 6)
    attentive    one transformer layer over all tokens -> linear layer on [CLS] (Table 7)
    transformer  an LV-MAE encoder of two layers, from scratch on raw features (end to end, Table 1)
    mamba        a Mamba layer, from scratch on raw features (end to end, Table 1)
Raw features (the paper's "Baseline") are the embeddings and a blank [CLS], without positions: there
linear and attentive cannot see the order; transformer (by positions) and mamba (by itself) can.

A run is a seed: of the head, of the batches and, unless the labels name one, of the split (60/20/20
of each class). The epoch is chosen on validation, the test videos are scored once. The last line is
the head that was asked for, mean +- standard deviation over the runs:
    <measured>
"""

import argparse
import csv
import json
import math
import re
import time
from pathlib import Path, PurePosixPath

import torch
import torch.nn.functional as F
from torch import nn

from model import LVMAE, LVMAEConfig, find_tokens, load_checkpoint, load_data, pad, pick_device


def get_args(argv=None):
    """Read the command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description="Probe frozen features.", formatter_class=formatter)
    add = parser.add_argument
    add("--data", default="out.npz", help="segment embeddings, from extract.py")
    add("--ckpt", default="lvmae.pt", help="checkpoint, from train.py")
    add("--labels", default="folders", help="'folders' or 'breakfast' (read off the videos' paths), "
        "an LVU or Breakfast folder, COIN.json, or a CSV of video,label[,split]")
    add("--regression", action="store_true", help="labels are numbers (LVU's counts always are)")
    add("--head", default="attentive", choices=HEADS, help="what is trained on the features")
    add("--features", default="lvmae", choices=["lvmae", "raw"], help="for linear and attentive")
    add("--compare", action="store_true", help="all heads, both features")
    add("--runs", type=int, default=3, help="runs, with seeds --seed, --seed + 1, ...")
    add("--seed", type=int, default=0, help="seed of the first run")
    add("--epochs", type=int, help="30 for linear (Table 6), 20 for the others (Table 7)")
    add("--lr", type=float, help="learning rate; 1e-4 for linear, 1e-3 for the others")
    add("--gamma", type=float, help="its factor per epoch; 1 for linear, 0.9 for the others")
    add("--batch-size", type=int, default=16, help="videos")
    add("--json", help="write the table to this file, too")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser.parse_args(argv)


# ---- Labels -------------------------------------------------------------------------------------


def read_csv(path, split=""):
    """Read (video, label, split) rows of one CSV: LVU's, Breakfast's or video,label[,split]."""
    lines = Path(path).read_text("utf-8-sig").splitlines() or [""]
    rows = []
    for row in csv.DictReader(lines, delimiter="," if "," in lines[0] else " "):  # LVU: spaces
        video = row.get("video") or row.get("youtube_id") or row.get("file_name")
        label = row.get("label") or row.get("class_name") or row.get("action")
        if "view_count" in row:
            label = math.log(float(row["view_count"]))
        if "like_count" in row:
            likes, dislikes = float(row["like_count"]), float(row["dislike_count"])
            label = 10 * likes / (likes + dislikes)
        if not video or label is None or row.get("split", "train") not in ("train", "val", "test"):
            raise SystemExit(f"{path}: found {row}, expected video, label[, train|val|test]")
        rows.append((video, label, row.get("split", split)))
    return rows


def read_labels(source, data):
    """Read (video, label, split) rows from --labels; split is '' where the source has none."""
    path = Path(source)
    if source == "folders":
        return [(video, label, "") for video, label in zip(data.videos, data.labels) if label]
    if source == "breakfast":  # P03_cam01_P03_cereals.avi; persons 47 to 54 are the published test
        names = [(v, re.search(r"P(\d\d)_([a-z]+)(_ch0)?\.\w+$", v)) for v in data.videos]
        return [(v, m[2], "test" if int(m[1]) >= 47 else "train") for v, m in names if m]
    if path.is_dir():  # LVU and Breakfast: train.csv, test.csv and perhaps val.csv
        files = [(path / f"{split}.csv", split) for split in ("train", "val", "test")]
        return [row for file, split in files if file.exists() for row in read_csv(file, split)]
    if not path.exists():
        raise SystemExit(f"{source}: no such file or folder, expected labels (see --help)")
    if path.suffix == ".json":  # COIN
        videos = json.loads(path.read_text("utf-8"))["database"].items()
        return [(video, v["class"], v["subset"].removesuffix("ing")) for video, v in videos]
    return read_csv(path)


def match(rows, videos, source):
    """Find the video of each row by path or file name, ending or not: -> {index: (label, split)}."""

    def alike(name):  # one name for P03-cam01-P03_cereals, P03_cam01_P03_cereals, P03/cam01/P03_..
        return re.sub("[-/]", "_", name)

    indices, found, absent = {}, {}, []
    for index, video in enumerate(videos):
        path = PurePosixPath(video)
        for name in {video, str(path.with_suffix("")), path.name, path.stem}:
            indices.setdefault(alike(name), []).append(index)
    for video, label, split in rows:
        hits = indices.get(alike(video), [])
        hits = [index for index in hits if videos[index] == video] or hits
        if len(hits) > 1:
            raise SystemExit(f"{source}: found {[videos[index] for index in hits]} for {video}, "
                             "expected one: write its whole path")
        if hits and found.setdefault(hits[0], (label, split)) != (label, split):
            raise SystemExit(f"{source}: found two labels for {video}, expected one")
        absent += [] if hits else [video]
    bare = [video for index, video in enumerate(videos) if index not in found]
    for names, what in ((bare, "videos have no label"), (absent, "labels have no video")):
        if names:
            print(f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if names[3:] else ''}")
    return found


def make_split(found, named, seed, is_class, source):
    """Split as the labels say: -> {"train": indices, "val": indices, "test": indices}.

    A split that they do not name is cut from train, 20 % of each class.
    """
    generator = torch.Generator().manual_seed(seed)
    split, groups = {"train": [], "val": [], "test": []}, {}
    for index, (label, part) in found.items():
        groups.setdefault((label if is_class else "", part or "train"), []).append(index)
    for (_, part), group in groups.items():
        group = [group[i] for i in torch.randperm(len(group), generator=generator)]
        share = round(0.2 * len(group)) if part == "train" else 0
        for absent in {"val", "test"} - named if part == "train" else ():
            split[absent] += group[:share]
            group = group[share:]
        split[part] += group
    trained = {found[index][0] for index in split["train"]}
    for part in split:
        if not split[part]:
            raise SystemExit(f"{source}: found no {part} video, expected some in each split")
    labels = [label for label, _ in found.values()]
    for label in set(labels) if is_class else ():
        if labels.count(label) == 1:
            raise SystemExit(f"{source}: found one video of {label!r}, expected two or more")
        if label not in trained:
            raise SystemExit(f"{source}: found no {label!r} in train, expected every class there")
    if is_class and len(trained) < 2:
        raise SystemExit(f"{source}: found one class, {labels[0]!r}, expected two or more")
    return split


# ---- Features -----------------------------------------------------------------------------------


@torch.no_grad()
def compute_features(data, model, device):
    """[CLS] and segments of every video, packed: -> (S + V, D) float16. `model` None: raw."""
    first = data.first + torch.arange(len(data.videos))  # row of each [CLS]
    features = torch.empty(int(data.lengths.sum()) + len(first), data.embeddings.shape[1]).half()
    order = data.lengths.argsort(descending=True)  # a batch holds videos of similar length
    while len(order):
        N = int(data.lengths[order[0]])
        videos, order = order.tensor_split([max(1, 8192 // N)])
        latents = pad(data.embeddings, data.first[videos], data.lengths[videos])  # (B, N, D)
        if model:
            latents = model.encode(latents.to(device), data.lengths[videos]).cpu()  # (B, N+1, D)
        else:
            latents = F.pad(latents, (0, 0, 1, 0))  # (B, N+1, D)
        is_token = find_tokens(N, data.lengths[videos])  # (B, N+1)
        features[(first[videos, None] + torch.arange(N + 1))[is_token]] = latents[is_token].half()
    return features


# ---- Heads: features (B, N+1, D), zero at padding, and lengths (B,) -> summary (B, D) ------------


class Linear(nn.Module):
    """The average of the segments."""

    def __init__(self, dim):
        super().__init__()
        # Paper: silent. Here: each dimension is normalised first, as in MAE's linear probing.
        self.norm = nn.BatchNorm1d(dim, affine=False)

    def forward(self, x, lengths):
        return self.norm(x[:, 1:].sum(1) / lengths[:, None].to(x.device))


class Attentive(nn.Module):
    """A transformer layer. Of its outputs only [CLS] is read, so only [CLS] is computed."""

    def __init__(self, dim):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(dim))  # on top of [CLS], which is blank if raw
        self.norm1, self.norm2, self.norm = (nn.LayerNorm(dim) for _ in range(3))
        self.attention = nn.MultiheadAttention(dim, math.gcd(dim, 8), batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, lengths):
        is_padding = ~find_tokens(x.shape[1] - 1, lengths).to(x.device)  # (B, N+1)
        cls = x[:, :1] + self.cls_token  # (B, 1, D)
        keys = self.norm1(torch.cat([cls, x[:, 1:]], dim=1))  # (B, N+1, D)
        cls = cls + self.attention(keys[:, :1], keys, keys, is_padding, need_weights=False)[0]
        cls = cls + self.mlp(self.norm2(cls))
        return self.norm(cls[:, 0])


class Transformer(nn.Module):
    """The encoder of LV-MAE with two layers, not pre-trained; [CLS] is read."""

    def __init__(self, dim):
        super().__init__()
        self.encoder = LVMAE(LVMAEConfig(dim, 2, math.gcd(dim, 8), 2, 0, 1))  # no decoder layers

    def forward(self, x, lengths):
        return self.encoder.encode(x[:, 1:], lengths)[:, 0]


def selective_scan(x, delta, rate, b, c):
    """State h_t = exp(-rate delta_t) h_t-1 + delta_t b_t x_t, output y_t = c_t h_t, for all t.

    x (B, N, H, P), delta (B, N, H), rate (H,), b and c (B, N, K) -> y (B, N, H, P). Unrolled, y_t
    sums over the steps s up to t, each shrunk by the decays since: one matrix product (Mamba-2).
    """
    log_decay = (-rate * delta).cumsum(1)  # (B, N, H)
    log_decay = log_decay[:, :, None] - log_decay[:, None]  # (B, N, N, H), at [t, s]
    is_future = torch.ones(log_decay.shape[1:3], device=x.device).triu(1).bool()  # (N, N)
    decay = log_decay.masked_fill(is_future[..., None], -math.inf).exp()
    matrix = (c @ b.mT)[..., None] * decay * delta[:, None]  # (B, N, N, H)
    return torch.einsum("btsh,bshp->bthp", matrix, x)


class Mamba(nn.Module):
    """Short convolution, scan with steps, inputs and outputs set by the tokens, gate; average."""

    def __init__(self, dim, state=16):
        super().__init__()
        heads = math.gcd(dim, 8)
        self.sizes = [2 * dim, 2 * dim, state, state, heads]
        self.norm1, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.proj_in, self.proj_out = nn.Linear(dim, sum(self.sizes)), nn.Linear(2 * dim, dim)
        self.conv = nn.Conv1d(2 * dim, 2 * dim, 4, padding=3, groups=2 * dim)
        self.log_rate = nn.Parameter(torch.linspace(-4, 1, heads))  # from long memory to short
        self.skip = nn.Parameter(torch.ones(heads, 1))

    def forward(self, x, lengths):
        x = x[:, 1:]  # (B, N, D); padding is at the end, so nothing causal carries it to a segment
        u, gate, b, c, delta = self.proj_in(self.norm1(x)).split(self.sizes, dim=-1)
        u = F.silu(self.conv(u.mT)[..., : x.shape[1]].mT).unflatten(2, (len(self.log_rate), -1))
        y = selective_scan(u, F.softplus(delta), self.log_rate.exp(), b, c) + self.skip * u
        x = self.norm(x + self.proj_out(y.flatten(2) * F.silu(gate)))  # (B, N, D)
        is_segment = find_tokens(x.shape[1], lengths)[:, 1:, None].to(x.device)  # (B, N, 1)
        return (x * is_segment).sum(1) / is_segment.sum(1)


HEADS = {  # with epochs, learning rate and its factor per epoch; Paper: silent on the last two
    "linear": (Linear, 30, 1e-4, 1.0),  # Table 6
    "attentive": (Attentive, 20, 1e-3, 0.9),  # Table 7
    "transformer": (Transformer, 20, 1e-3, 0.9),
    "mamba": (Mamba, 20, 1e-3, 0.9),
}


# ---- Training -----------------------------------------------------------------------------------


def fit(name, features, data, targets, split, seed, args, device):
    """Train a head, keep the epoch that is best on validation, score it once on test.

    targets (V,): class indices -> accuracy in %, or numbers (regression) -> mean squared error.
    """
    torch.manual_seed(seed)
    train, val, test = (torch.tensor(split[part]) for part in ("train", "val", "test"))
    first = data.first + torch.arange(len(data.first))  # row of each [CLS]
    is_class = not targets.is_floating_point()
    if not is_class:  # numbers are learned at mean 0 and deviation 1, and scored in their own unit
        deviation, mean = torch.std_mean(targets[train])
        targets = (targets - mean) / deviation
    Body, epochs, lr, gamma = HEADS[name]
    D, outputs = features.shape[1], int(targets.max()) + 1 if is_class else 1
    body, last = head = nn.ModuleList([Body(D), nn.Linear(D, outputs)]).to(device)
    optimizer = torch.optim.Adam(head.parameters(), lr=args.lr or lr, betas=(0.9, 0.999))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, args.gamma or gamma)

    def predict(videos):
        x = pad(features, first[videos], data.lengths[videos] + 1).to(device)  # (B, N+1, D)
        y = last(body(x, data.lengths[videos]))  # (B, outputs)
        return y if is_class else y[:, 0]

    loss_of = F.cross_entropy if is_class else F.mse_loss

    @torch.no_grad()
    def score(videos):  # the higher, the better; of two equal accuracies the lower loss
        head.eval()
        y = torch.cat([predict(batch) for batch in videos.split(args.batch_size)]).cpu()
        accuracy = (y.argmax(1) == targets[videos]).double().mean().item() if is_class else 0
        return 100 * accuracy, -loss_of(y, targets[videos]).item()

    best = (-1, 0)
    batches = math.ceil(len(train) / args.batch_size)
    for _ in range(args.epochs or epochs):
        head.train()
        for batch in train[torch.randperm(len(train))].tensor_split(batches):  # of nearly one size
            loss = loss_of(predict(batch), targets[batch].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        if score(val) > best:
            best, state = score(val), {k: v.clone() for k, v in head.state_dict().items()}
    head.load_state_dict(state)
    accuracy, loss = score(test)
    return accuracy if is_class else -loss * deviation.item() ** 2


def main(args):
    """Probe and print the table."""
    device = pick_device(args.device)
    data = load_data(args.data)
    rows = read_labels(args.labels, data)
    found = match(rows, data.videos, args.labels)
    is_class = not args.regression and not any(isinstance(label, float) for _, label, _ in rows)
    seeds = range(args.seed, args.seed + args.runs)
    named = {split for _, _, split in rows}
    splits = [make_split(found, named, seed, is_class, args.labels) for seed in seeds]
    classes = sorted({label for label, _ in found.values()})  # one map for all splits
    targets = torch.zeros(len(data.videos), dtype=torch.long if is_class else torch.float)
    for index, (label, _) in found.items():
        targets[index] = classes.index(label) if is_class else float(label)

    pairs = [("raw", args.head), (args.features, args.head)]
    if args.compare:
        pairs = [("raw", head) for head in HEADS] + [("lvmae", "linear"), ("lvmae", "attentive")]
    if args.head in ("transformer", "mamba") or args.features == "raw" and not args.compare:
        pairs = pairs[:1]
    features = {"raw": compute_features(data, None, device)}
    if ("lvmae", args.head) in pairs or args.compare:
        model = load_checkpoint(args.ckpt, data, device)
        features["lvmae"] = compute_features(data, model, device)

    n = {part: len(members) for part, members in splits[0].items()}
    print(f"{args.data}: train {n['train']}, val {n['val']}, test {n['test']} videos; "
          + (f"{len(classes)} classes; test accuracy in %" if is_class else "test error (MSE)"))
    table = {}
    for kind, head in [("", "majority" if is_class else "train mean"), *pairs]:
        name = head if head in ("transformer", "mamba") else f"{kind} {head}".strip()
        name = name.replace("lvmae", "LV-MAE")
        scores = []
        for seed, split in zip(seeds, splits):
            if kind:
                scores.append(fit(head, features[kind], data, targets, split, seed, args, device))
            elif is_class:
                scores.append(100 * (targets[split["test"]] == targets[split["train"]].mode()[0]).float().mean().item())
            else:
                scores.append((targets[split["test"]] - targets[split["train"]].mean()).square().mean().item())
        mean, deviation = sum(scores) / len(scores), torch.tensor(scores).std().item() if args.runs > 1 else 0
        table[name] = {"mean": mean, "std": deviation, "runs": scores}
        print(f"{name:20} {mean:7.2f} +- {deviation:5.2f}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"rows": table, "n": n, "classes": len(classes)}, indent=1))


if __name__ == "__main__":
    main(get_args())
