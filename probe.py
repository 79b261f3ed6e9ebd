"""Stage 3 of LV-MAE: probe the frozen latents on labelled videos (sections 4, 8).

    out.npz --frozen encoder--> features, (n+1, D) a video: [CLS], then its n segments
                                   |
                x (B, N+1, D) <----+ a batch, padded
                   |
                   +--head--> classes (B, C), or numbers (B, 1)

    python probe.py                            # labels: the folders that hold the videos
    python probe.py --labels labels.csv        # video,label or video,label,split
    python probe.py --compare                  # every head: Table 1 in small

    LV-MAE attentive   99.17 +- 0.36

is its last line: accuracy in %, mean and standard deviation over the runs. A run is a
seed: of the head, of the batches and, unless the labels name one, of the split (60, 20
and 20 % of each class). Raw features, the "Baseline" of Tables 1 and 2, are a blank
[CLS] and the embeddings, without positions. With 240 videos of toyworld.py, --compare
takes a minute on two CPU cores.
"""

import argparse
import copy
import csv
import json
import math
import statistics
import sys
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from model import (
    MLP,
    Block,
    check_outputs,
    collate,
    find_seen,
    index_names,
    load_checkpoint,
    load_data,
    number,
    pick_device,
    replacing,
    require,
    sincos_positions,
    unpack,
)


@dataclass
class Setting:
    """How a head is trained."""

    epochs: int
    rates: list  # of learning; validation chooses one
    gamma: float  # the rate is multiplied by it after each epoch


# Paper: linear probing at a rate of 1e-4. Here: validation chooses among three, since
# with a few hundred videos 30 epochs at 1e-4 end too early.
TABLE_6 = Setting(epochs=30, rates=[1e-4, 1e-3, 1e-2], gamma=1.0)
TABLE_7 = Setting(epochs=20, rates=[1e-3], gamma=0.9)
BATCH_SIZE = 16  # of both

# ---- Heads: x (B, N+1, D), is_token (B, N+1), False at padding -> (B, outputs) ---------

# Each names the setting it is trained with. 8 attention heads, or as many as divide D.


class LinearProbe(nn.Module):
    """Section 8: the average of the segments -> linear layer."""

    setting = TABLE_6

    def __init__(self, dim, outputs):
        super().__init__()
        self.last = last_layer(dim, outputs)

    def forward(self, x, is_token):
        return self.last(average(x, is_token))


def average(x, is_token):
    """Mean of the segments, without [CLS]: (B, N+1, D) -> (B, D)."""
    is_segment = is_token[:, 1:, None]  # (B, N, 1)
    return (x[:, 1:] * is_segment).sum(1) / is_segment.sum(1)


def last_layer(dim, outputs):
    """Make the linear layer that ends a head."""
    # Paper: silent. Here: each dimension is normalised first, as in MAE's linear probing,
    # and the weights start at zero: few small steps would not wash out random ones.
    linear = nn.Linear(dim, outputs)
    nn.init.zeros_(linear.weight)
    return nn.Sequential(nn.BatchNorm1d(dim, affine=False), linear)


class AttentiveProbe(nn.Module):
    """Section 8: one pre-norm transformer layer -> [CLS] -> linear layer."""

    setting = TABLE_7

    def __init__(self, dim, outputs):
        super().__init__()
        heads = math.gcd(dim, 8)
        self.cls_token = nn.Parameter(torch.zeros(dim))  # the [CLS] of raw is blank
        self.norm1 = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim)
        self.last = last_layer(dim, outputs)

    def forward(self, x, is_token):
        cls = x[:, :1] + self.cls_token  # (B, 1, D)
        keys = self.norm1(torch.cat([cls, x[:, 1:]], dim=1))  # (B, N+1, D)

        # No output but that of [CLS] is read, so no other is computed.
        query = keys[:, :1]
        out, _ = self.attention(
            query, keys, keys, key_padding_mask=~is_token, need_weights=False
        )
        cls = (cls + out)[:, 0]  # (B, D)
        cls = cls + self.mlp(self.norm2(cls))
        return self.last(cls)


class Majority(nn.Module):
    """Always the mean of the targets: of classes the commonest one, else the mean number.

    It is not trained; it remembers what it needs of the training videos.
    """

    setting = None

    def __init__(self, dim, outputs):
        super().__init__()

    def remember(self, videos, targets):  # a list of (n+1, D), and (videos, outputs)
        self.answer = targets.mean(0)

    def forward(self, x, is_token):
        return self.answer.expand(len(x), -1)


class Transformer(nn.Module):
    """Table 1, trained end to end: a small LV-MAE encoder -> [CLS] -> linear layer."""

    setting = TABLE_7

    def __init__(self, dim, outputs, depth=2):
        super().__init__()
        heads = math.gcd(dim, 8)
        self.cls_token = nn.Parameter(0.02 * torch.randn(dim))
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.last = last_layer(dim, outputs)

    def forward(self, x, is_token):
        N = x.shape[1] - 1
        D = x.shape[2]
        cls = x[:, :1] + self.cls_token  # (B, 1, D)
        x = torch.cat([cls, x[:, 1:] * D**0.5], dim=1)  # (B, N+1, D)
        x = x + sincos_positions(N, D).to(x.device)

        counts = is_token.sum(1).tolist()
        x = x[is_token]  # (T, D), the tokens of all videos in a row
        for block in self.blocks:
            x = block(x, counts)
        x = unpack(self.norm(x), is_token)  # (B, N+1, D)
        return self.last(x[:, 0])


class Mamba(nn.Module):
    """Table 1, trained end to end: a Mamba layer -> average -> linear layer.

    Paper: Mamba. Here: one decay a head, as in Mamba-2, so that the scan is a product.
    """

    setting = TABLE_7

    def __init__(self, dim, outputs, state=16):
        super().__init__()
        self.heads = math.gcd(dim, 8)
        inner = 2 * dim
        self.sizes = [inner, inner, state, state, self.heads]
        self.norm = nn.LayerNorm(dim)
        self.proj_in = nn.Linear(dim, sum(self.sizes))
        self.conv = nn.Conv1d(inner, inner, kernel_size=4, padding=3, groups=inner)
        log_rate = torch.linspace(-4, 1, self.heads)  # from long memory to short
        self.log_rate = nn.Parameter(log_rate)
        self.skip = nn.Parameter(torch.ones(self.heads, 1))
        self.proj_out = nn.Linear(inner, dim)
        self.last = last_layer(dim, outputs)

    def forward(self, x, is_token):
        # All of it is causal: padding comes last, so it reaches no segment.
        u, gate, b, c, delta = self.proj_in(self.norm(x)).split(self.sizes, dim=-1)
        u = self.conv(u.mT)[..., : x.shape[1]].mT  # (B, N+1, 2D), of this and 3 before
        u = F.silu(u).unflatten(2, (self.heads, -1))  # (B, N+1, H, 2D/H)

        rate = self.log_rate.exp()  # (H,)
        y = selective_scan(u, F.softplus(delta), rate, b, c)  # (B, N+1, H, 2D/H)
        y = (y + self.skip * u).flatten(2)  # (B, N+1, 2D)
        x = x + self.proj_out(y * F.silu(gate))  # (B, N+1, D)
        return self.last(average(x, is_token))


def selective_scan(x, delta, rate, b, c):
    """Carry a state (K, P) along each video, and read it at each step t.

        state[t] = exp(-rate delta[t]) state[t-1] + delta[t] b[t] x[t]^T
        y[t]     = c[t]^T state[t]

    x (B, T, H, P), delta (B, T, H), rate (H,), b and c (B, T, K) -> y (B, T, H, P).
    """
    # Without the recurrence, y is one matrix product; its memory grows with T * T:
    # y[t] = sum over s <= t of  c[t].b[s] exp(-rate (time[t] - time[s])) delta[s] x[s]
    time = delta.cumsum(1).mT  # (B, H, T)
    elapsed = time[..., :, None] - time[..., None, :]  # (B, H, T, T), at [t, s]
    elapsed = elapsed.tril()  # s > t is the future, and exp of it would overflow
    decay = torch.exp(-rate[:, None, None] * elapsed).tril()  # (B, H, T, T)
    match = (c @ b.mT)[:, None]  # (B, 1, T, T)
    step = delta.mT[:, :, None, :]  # (B, H, 1, T)
    return torch.einsum("bhts,bshp->bthp", match * decay * step, x)


HEADS = {  # of --head; their rows are below
    "linear": LinearProbe,
    "attentive": AttentiveProbe,
    "transformer": Transformer,
    "mamba": Mamba,
}


@dataclass
class Row:
    """A row of the table: a head, and the features that it sees."""

    name: str
    Head: type
    features: str


ROWS = [
    Row("majority", Majority, "raw"),
    Row("raw linear", LinearProbe, "raw"),
    Row("raw attentive", AttentiveProbe, "raw"),
    Row("transformer", Transformer, "raw"),
    Row("mamba", Mamba, "raw"),
    Row("LV-MAE linear", LinearProbe, "lvmae"),
    Row("LV-MAE attentive", AttentiveProbe, "lvmae"),
]

# ---- Training: targets (V, outputs), classes as one-hot rows or numbers (V, 1) ---------


def fit(Head, features, targets, train, val, args, device):
    """Train a head on the videos `train`, keep its best epoch on the videos `val`.

    features: {i: (n+1, D)}, of the videos i; train, val: tensors of some i. Without val,
    the last epoch at the first rate is kept.
    """
    dim = features[int(train[0])].shape[1]
    outputs = targets.shape[1]
    if Head.setting is None:
        videos = [features[i].to(device) for i in train.tolist()]
        head = Head(dim, outputs).to(device)
        head.remember(videos, targets[train].to(device))
        return head

    # The setting of Table 6 or 7, where the flags give none
    has_val = len(val) > 0
    epochs = args.epochs or Head.setting.epochs
    rates = Head.setting.rates
    if args.lr:
        rates = [args.lr]
    if not has_val:
        rates = rates[:1]  # nothing to choose by: the paper's rate

    best = (math.inf, math.inf)  # error, and loss where errors are equal
    for rate in rates:
        head = Head(dim, outputs).to(device)
        optimizer = torch.optim.Adam(head.parameters(), rate, betas=(0.9, 0.999))
        gamma = Head.setting.gamma
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)
        for _ in tqdm(range(epochs), Head.__name__, leave=False, disable=None):
            train_epoch(head, optimizer, features, targets, train, device)
            schedule.step()

            if has_val:
                found = evaluate(head, features, targets, val, device)
                if found < best:
                    best = found
                    best_head = copy.deepcopy(head)
            else:
                best_head = head
    return best_head


def train_epoch(head, optimizer, features, targets, train, device):
    """Train on each video once."""
    head.train()
    order = train[torch.randperm(len(train))]
    # Of equal size: BatchNorm cannot train on a last batch of one video.
    n_batches = max(1, len(train) // BATCH_SIZE)
    for batch in order.tensor_split(n_batches):
        x, is_token = make_batch(features, batch, device)
        loss = loss_of(head(x, is_token), targets[batch].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def evaluate(head, features, targets, videos, device):
    """Return the error on some videos, and the loss: of numbers they are the same.

    The error of classes is the share of wrong ones.
    """
    head.eval()
    predictions = []
    for batch in videos.split(BATCH_SIZE):
        x, is_token = make_batch(features, batch, device)
        predictions.append(head(x, is_token).cpu())
    predictions = torch.cat(predictions)  # (videos, outputs)
    targets = targets[videos]  # (videos, outputs)
    loss = loss_of(predictions, targets).item()
    is_finite = predictions.isfinite().all() and math.isfinite(loss)
    require(is_finite, f"{type(head).__name__}: its predictions are not finite")

    if are_numbers(targets):
        return loss, loss
    is_wrong = predictions.argmax(1) != targets.argmax(1)
    return is_wrong.double().mean().item(), loss


def are_numbers(targets):
    """Tell numbers (V, 1) from classes, which are two or more."""
    return targets.shape[1] == 1


def loss_of(predictions, targets):
    """Cross-entropy of classes, or mean squared error of numbers."""
    if are_numbers(targets):
        return F.mse_loss(predictions, targets)
    return F.cross_entropy(predictions, targets)


def make_batch(features, videos, device):
    """Pad the features of some videos -> x (B, N+1, D), is_token (B, N+1)."""
    x, counts = collate([features[i] for i in videos.tolist()])
    is_token = torch.arange(x.shape[1]) < counts[:, None]
    return x.to(device), is_token.to(device)


def run(Head, features, targets, split, args, device):
    """Train a head, score it once on test -> accuracy in %, or mean squared error."""
    train = split["train"]
    scale = 1.0
    if are_numbers(targets):
        # Numbers are learned with mean 0 and deviation 1, and scored in their own unit.
        numbers = targets[train]
        message = f"{args.labels}: all numbers to train on are the same"
        require(numbers.min() < numbers.max(), message)
        scale = numbers.std().item()
        targets = (targets - numbers.mean()) / scale
        largest = targets[torch.cat(list(split.values()))].abs().max()
        require(largest < 1e18, f"{args.labels}: too large numbers")  # not where NaN
        targets = targets.float()

    head = fit(Head, features, targets, train, split["val"], args, device)
    error, _ = evaluate(head, features, targets, split["test"], device)
    if are_numbers(targets):
        require(math.isfinite(scale**2), f"{args.labels}: too large numbers")
        return error * scale**2
    return 100 * (1 - error)


# ---- Features, labels, splits ----------------------------------------------------------


@torch.no_grad()
def encode(model, embeddings, videos, device):
    """Latents of some videos, whole, all segments visible -> {i: (n+1, D)}.

    embeddings: (n, D) of each video i; videos: a list of some i.
    """
    features = {}
    starts = range(0, len(videos), BATCH_SIZE)
    for start in tqdm(starts, "features", leave=False, disable=None):
        batch = videos[start : start + BATCH_SIZE]
        x, lengths = collate([embeddings[i] for i in batch])
        latents = model.encode(x.to(device), lengths).half().cpu()  # (B, N+1, D)
        for i, n, tokens in zip(batch, lengths, latents, strict=True):
            features[i] = tokens[: n + 1].clone()  # without padding
    return features


def count_seen(tested, checkpoint):
    """Say how many of the test videos were in the pre-training, where that is known."""
    seen = "unknown"
    if "videos" in checkpoint:
        seen = len(find_seen(tested, checkpoint["videos"]))
    print(f"{seen} of {len(tested)} test videos were in the pre-training")
    return seen


def read_labels(path, data):
    """Read a CSV, or 'folders' -> rows of (video, label, part); no part means train."""
    rows = []
    if path == "folders":
        for video, label in zip(data.videos, data.labels, strict=True):
            if label:
                rows.append((video, label, "train"))
        return rows

    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            is_right = sorted(columns) in (
                ["label", "video"],
                ["label", "split", "video"],
            )
            require(is_right, f"{path}: columns {columns}, not video,label[,split]")
            for row in reader:
                is_right = None not in row and None not in row.values()
                require(is_right, f"{path}: found {row}, expected {len(columns)} cells")
                part = row.get("split") or "train"
                rows.append((row["video"], row["label"], part))
    except Exception as error:
        expected = "expected a CSV with the header video,label or video,label,split"
        raise SystemExit(f"{path}: found {error!r:.200}, {expected}") from None

    for video, label, part in rows:
        is_right = video and label and part in ("train", "val", "test")
        found = f"{path}: found {video},{label},{part}"
        require(is_right, f"{found}, expected video,label[,train or val or test]")
    return rows


def find_videos(rows, data, path):
    """Match labels with videos -> {index of a video: (label, part)}."""
    full_names = {video: i for i, video in enumerate(data.videos)}
    index = index_names(data.videos)
    labelled = {}
    absent = []
    for video, label, part in rows:
        matches = index.get(video, [])
        if video in full_names:  # a full name comes before a part of another one
            matches = [full_names[video]]
        if not matches:
            absent.append(video)
            continue

        names = " and ".join(data.videos[i] for i in matches[:3])
        found = f"{path}: found {video},{label},{part}"
        require(len(matches) == 1, f"{found}, which may be {names}: give the full name")
        i = matches[0]
        if i in labelled:
            is_same = labelled[i] == (label, part)
            require(is_same, f"{found}, but {names} has {labelled[i]} already")
        labelled[i] = (label, part)

    bare = [video for i, video in enumerate(data.videos) if i not in labelled]
    if bare:
        print(f"{len(bare)} videos have no label: {', '.join(bare[:3])}")
    if absent:
        print(f"{len(absent)} labels have no video: {', '.join(absent[:3])}")
    return labelled


def drop_untrained(labelled):
    """Leave out the classes that have no training video, and name them."""
    trained = {label for label, part in labelled.values() if part == "train"}
    kept = {}
    lost = Counter()
    for i, (label, part) in labelled.items():
        if label in trained:
            kept[i] = (label, part)
        else:
            lost[label] += 1
    for label, n in lost.items():
        print(f"left out: class {label}, {n} videos, none of them to train on")
    return kept


def make_targets(labelled, n_videos, args):
    """Turn labels into a tensor: numbers (V, 1), or classes as one-hot rows (V, C)."""
    if args.regression:
        targets = torch.zeros(n_videos, 1, dtype=torch.double)  # views may be billions
        for i, (label, _) in labelled.items():
            try:
                targets[i] = float(label)
            except ValueError:
                raise SystemExit(f"{args.labels}: {label}, expected a number") from None
        require(targets.isfinite().all(), f"{args.labels}: a number is not finite")
        return targets

    classes = sorted({label for label, _ in labelled.values()})
    advice = "a folder for each class, or --labels FILE.csv"
    require(
        len(classes) > 1, f"{args.labels}: classes {classes}, expected two: {advice}"
    )
    targets = torch.zeros(n_videos, len(classes))
    for i, (label, _) in labelled.items():
        targets[i, classes.index(label)] = 1
    return targets


def make_split(labelled, named, args, seed):
    """Split as the labels say -> {"train": indices of videos, "val": ..., "test": ...}.

    named: the parts that the labels name, also those whose videos are not there. A val or
    test that they do not name is cut off train, of each class the same share.
    """
    # Paper: silent on how an epoch is chosen. Here: on val, if need be a share of train.
    shares = {}
    if "val" not in named:
        shares["val"] = args.val_share
    if "test" not in named:
        shares["test"] = 0.2

    split = {"train": [], "val": [], "test": []}
    groups = {}  # of videos to train on: a class each, or all numbers
    for i, (label, part) in labelled.items():
        if part != "train":
            split[part].append(i)
        elif args.regression:
            groups.setdefault("numbers", []).append(i)
        else:
            groups.setdefault(label, []).append(i)

    generator = torch.Generator().manual_seed(seed)
    for group in groups.values():
        order = torch.randperm(len(group), generator=generator)
        rest = [group[i] for i in order]
        for part, share in shares.items():
            n = round(share * len(group))
            n = min(n, len(rest) - 1)  # one is left to train on
            split[part] += rest[len(rest) - n :]
            rest = rest[: len(rest) - n]
        split["train"] += rest

    for part, videos in split.items():
        is_right = videos or (part == "val" and args.val_share == 0)
        require(is_right, f"{args.labels}: found no video to {part}, expected some")
        split[part] = torch.tensor(videos, dtype=torch.long)
    return split


def write_json(path, found):
    """Write what was found to a file."""
    with replacing(path) as file:
        file.write(json.dumps(found, indent=2).encode())


def get_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    # Files
    add("--data", default="out.npz", help="segment embeddings")
    add("--ckpt", default="lvmae.pt", help="checkpoint of train.py")
    csv_help = "'folders': their names; or a CSV: video,label[,train, val or test]"
    add("--labels", default="folders", help=csv_help)
    add("--regression", action="store_true", help="labels are numbers")
    add("--json", help="also write the table to this file, .json")

    # Heads
    head_help = "None: attentive, and linear for numbers (section 4.2)"
    add("--head", choices=HEADS, help=head_help)
    add("--compare", action="store_true", help="every row of the table")

    # Training
    add("--runs", type=number(int, 1), default=3, help="each a seed")
    seed = number(int, 0, 2**31)
    add("--seed", type=seed, default=0, help="the first seed")
    add("--epochs", type=number(int, 1), help="None: of Table 6 or 7")
    rate = number(float, 1e-9, 100)
    add("--lr", type=rate, help="None: of Table 6 or 7")
    share = number(float, 0, 0.5)
    share_help = "cut off train if labels name no val; 0: none, keep the last epoch"
    add("--val-share", type=share, default=0.2, help=share_help)
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    if args.head is None:
        args.head = "linear" if args.regression else "attentive"
    return args


def main(args):
    """Read the labels, compute the features, fill the table row by row."""
    sys.stdout.reconfigure(errors="backslashreplace")  # names of videos hold anything
    if args.json:
        check_outputs({args.json: ".json"}, [args.data, args.ckpt, args.labels])
    device = pick_device(args.device)
    data = load_data(args.data)

    # Labels
    labels = read_labels(args.labels, data)
    named = {part for _, _, part in labels}
    labelled = find_videos(labels, data, args.labels)
    n_classes = 0
    metric = "mean squared error"
    if not args.regression:
        labelled = drop_untrained(labelled)
        n_classes = len({label for label, _ in labelled.values()})
        metric = f"{n_classes} classes; accuracy in %"
    targets = make_targets(labelled, len(data.videos), args)  # (V, outputs)

    # Splits
    splits = {}
    tested = set()
    for seed in range(args.seed, args.seed + args.runs):
        splits[seed] = make_split(labelled, named, args, seed)
        tested.update(data.videos[i] for i in splits[seed]["test"])
    n = {part: len(videos) for part, videos in splits[args.seed].items()}
    sizes = f"train {n['train']}, val {n['val']}, test {n['test']}"
    print(f"{args.runs} runs; {sizes} videos; {metric}")

    # Rows
    rows = []
    for row in ROWS:
        if args.compare or row.Head in (Majority, HEADS[args.head]):
            rows.append(row)

    # Features
    features = {"raw": {}}
    for i in labelled:
        features["raw"][i] = F.pad(data.embeddings[i], (0, 0, 1, 0))  # a blank [CLS]
    seen = "unknown"
    if any(row.features == "lvmae" for row in rows):
        model, checkpoint = load_checkpoint(args.ckpt, data, device)
        features["lvmae"] = encode(model, data.embeddings, list(labelled), device)
        seen = count_seen(tested, checkpoint)

    # Table
    table = {}
    for row in rows:
        scores = []
        for seed, split in splits.items():
            torch.manual_seed(seed)
            score = run(row.Head, features[row.features], targets, split, args, device)
            scores.append(score)
        mean = statistics.mean(scores)
        std = statistics.stdev(scores) if args.runs > 1 else 0.0
        print(f"{row.name:16} {mean:7.2f} +- {std:.2f}", flush=True)
        table[row.name] = {"mean": mean, "std": std, "runs": scores}
    if args.json:
        found = {"rows": table, "n": n, "classes": n_classes, "seen": seen}
        found["tested"] = len(tested)
        write_json(args.json, found)


if __name__ == "__main__":
    try:
        main(get_args())
    except KeyboardInterrupt:
        sys.exit("\nstopped")
