r"""Stage 2 of LV-MAE: pre-train on segment embeddings (section 3.3, Table 5).

    out.npz --crop, mask--> batch (B, N, D) --model.py, Eq. (3)--> lvmae.pt, lvmae.jsonl

    python train.py --data out.npz --mask semantic

First it prints what trivial predictors reach on the validation videos, then a line an
epoch. On the 4,000 sequences of the toy world it takes 2.5 minutes on one CPU core and
ends with

    lvmae.pt: 20 epochs, validation cosine 0.7328, trivial 0.5223

The defaults suit a few hundred videos. The paper's setting, on 8 GPUs:

    torchrun --nproc-per-node 8 train.py --data part*.npz --depth 32 --heads 16 \
        --decoder-dim 512 --decoder-depth 8 --decoder-heads 16 --mask semantic \
        --epochs 150 --warmup-epochs 40 --base-lr 1.5e-4 --batch-size 16

Epochs, warm-up, rate and batch size are those of Table 5, masks and depth the best of
Tables 3 and 4. The paper is silent on the heads and on the decoder: here they are MAE's;
and on whether 16 videos are those of one GPU: here they are, and 8 GPUs take 128 a step.
On one GPU: `python train.py` with the same flags, but `--batch-size 128`.
"""

import argparse
import json
import math
import os
import sys
import time
import zlib
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import (
    LVMAE,
    MASKS,
    LVMAEConfig,
    check_outputs,
    collate,
    compare_encoders,
    index_names,
    load_data,
    masked_loss,
    number,
    pick_device,
    read_checkpoint,
    read_rank,
    replacing,
    require,
)

# ---- Batches ---------------------------------------------------------------------------


def seeded(seed, number, rank=0):
    """Make a generator from these numbers alone, so that anything can be drawn again.

    number: 0 for the split, an epoch for its crops and masks, and a video for its mask in
    validation.
    """
    return torch.Generator().manual_seed(seed * 1_000_003 + rank * 10_007 + number)


def crop(videos, max_segments, generator):
    """Section 3.3: cut a random stretch out of each video (n, D): lengths vary.

    Paper: "randomly sample a duration in seconds", "entire videos or portions of them".
    Here: uniform from 2 to max_segments segments, or the whole video if it is shorter.
    """
    u, v = torch.rand(2, len(videos), generator=generator, dtype=torch.double).tolist()
    crops = []
    for i, video in enumerate(videos):
        size = 2 + int(u[i] * (max_segments - 1))  # 2 to max_segments
        size = min(size, len(video))
        start = int(v[i] * (len(video) - size + 1))
        crops.append(video[start : start + size])
    return crops


def training_batches(videos, steps, args, generator):
    """Yield an epoch: embeddings (B, N, D), lengths (B,), is_masked (B, N)."""
    mask = MASKS[args.mask]
    order = torch.randperm(len(videos), generator=generator)
    # Of nearly the same size, about --batch-size: no small one comes last.
    for batch in order.tensor_split(steps):
        crops = crop([videos[i] for i in batch], args.max_segments, generator)
        embeddings, lengths = collate(crops)
        is_masked = mask(embeddings, lengths, args.mask_ratio, generator)
        yield embeddings, lengths, is_masked


def validation_batches(videos, args):
    """Yield the validation videos {number: (n, D)}, masked alike in every epoch.

    They are whole, up to max_segments. A mask depends on the seed and on the number of
    the video, but not on the batch, the epoch or the number of processes.
    """
    mask = MASKS[args.mask]
    numbers = sorted(videos, key=lambda i: len(videos[i]))  # alike: little padding
    for first in range(0, len(numbers), 16):
        clipped = []
        masks = []
        for i in numbers[first : first + 16]:
            video = videos[i][: args.max_segments]
            alone, length = collate([video])  # (1, n, D), (1,)
            is_masked = mask(alone, length, args.mask_ratio, seeded(args.seed, i))
            clipped.append(video)
            masks.append(is_masked[0])  # (n,)
        embeddings, lengths = collate(clipped)
        yield embeddings, lengths, pad_sequence(masks, batch_first=True)


# ---- What a model must beat ------------------------------------------------------------

# Named here too: a process without validation videos still adds its zeros.
TRIVIAL = ("visible mean", "interpolation", "average of both")


def trivial_predictions(embeddings, lengths, is_masked):
    """Guess the masked embeddings without training -> {name: (B, N, D)}.

    Arguments as of LVMAE.forward, all on the CPU. Only the masked places count.
    """
    mean = torch.zeros_like(embeddings)  # (B, N, D)
    between = torch.zeros_like(embeddings)  # (B, N, D)
    for b, n in enumerate(lengths.tolist()):
        places = (~is_masked[b, :n]).nonzero()[:, 0]  # (n_visible,)
        visible = embeddings[b, places]  # (n_visible, D)
        mean[b, :n] = visible.mean(0)

        # Between the visible neighbours; beyond the first or last one, that one.
        columns = []
        for column in visible.T.numpy():  # (n_visible,), one of the D
            columns.append(np.interp(np.arange(n), places, column))  # (n,)
        between[b, :n] = torch.from_numpy(np.stack(columns, axis=1))  # (n, D)
    both = (mean + between) / 2
    return {"visible mean": mean, "interpolation": between, "average of both": both}


# ---- Training (Table 5) ----------------------------------------------------------------


def make_optimizer(model, args):
    """AdamW of Table 5. Paper: weight decay 0.05. Here: not on biases and norms."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def learning_rate(epoch, args, world):
    """Table 5: linear warm-up, then cosine decay to zero; `epoch` has a fraction."""
    # Paper: "base learning rate". Here, as in MAE: the rate for 256 videos a step.
    peak = args.base_lr * args.batch_size * world / 256
    if epoch < args.warmup_epochs:
        return peak * epoch / args.warmup_epochs
    progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return peak * (1 + math.cos(math.pi * progress)) / 2


def set_up_torch(world, device):
    """Let the processes of torchrun find each other, and GPUs use TF32."""
    torch.set_float32_matmul_precision("high")
    if world > 1:
        is_torchrun = "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ
        require(is_torchrun, "several processes: start them with torchrun")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def average_gradients(model, world):
    """Wrap a model so that gradients are averaged over the processes, if several."""
    if world == 1:
        return model
    # Without device_ids: with them, lengths and masks would be moved to the GPU.
    return DistributedDataParallel(model)


def sum_all(x):
    """Sum a tensor over all processes."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def train_epoch(net, optimizer, batches, epoch, steps, args, world):
    """Take the steps of an epoch -> mean loss of a masked segment, last learning rate.

    Epochs count from 1.
    """
    net.train()
    device = next(net.parameters()).device
    sums = torch.zeros(2, device=device)  # loss, masked segments
    for step, (embeddings, lengths, is_masked) in enumerate(batches):
        middle = epoch - 1 + (step + 0.5) / steps  # of the step, in epochs
        lr = learning_rate(middle, args, world)
        for group in optimizer.param_groups:
            group["lr"] = lr

        embeddings = embeddings.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, _ = net(embeddings, lengths, is_masked)

        # DDP averages gradients over processes, but the loss is a mean over the masked
        # segments of them all: each process counts by its share of these.
        n_masked = is_masked.sum().to(device)
        n_masked_of_all = sum_all(n_masked.clone())  # in place, hence the clone
        weight = world * n_masked / n_masked_of_all  # 1 if there is one process
        (loss * weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        sums += torch.stack([loss.detach() * n_masked, n_masked])
    total, n = sum_all(sums).tolist()
    return {"loss": total / n, "lr": lr}


def score(predictions, embeddings, is_masked):
    """Sums over the masked segments -> (3,): loss of Eq. (3), cosine, their number."""
    n = is_masked.sum().to(embeddings.device)
    loss = masked_loss(predictions, embeddings, is_masked)
    cosine = F.cosine_similarity(predictions, embeddings, dim=2)[is_masked]  # (masked,)
    return torch.stack([loss * n, cosine.sum(), n])


def mean_score(sums):
    """Turn the sums of all processes into means, as they stand in the log."""
    loss, cosine, n = sum_all(sums).tolist()
    return {"val_loss": loss / n, "cosine": cosine / n}


@torch.no_grad()
def evaluate(model, batches, device):
    """Score the model on the masked segments of all batches.

    The model, not its DDP: the processes may have unequal numbers of batches.
    """
    model.eval()
    sums = torch.zeros(3, device=device)
    for embeddings, lengths, is_masked in batches:
        embeddings = embeddings.to(device)
        _, predictions = model(embeddings, lengths, is_masked)  # (B, N, D)
        sums += score(predictions, embeddings, is_masked)
    return mean_score(sums)


def evaluate_trivial(batches, device):
    """Score each trivial predictor on the same segments -> a list, one line each."""
    sums = torch.zeros(len(TRIVIAL), 3)
    for embeddings, lengths, is_masked in batches:
        guesses = trivial_predictions(embeddings, lengths, is_masked)
        for row, name in enumerate(TRIVIAL):
            sums[row] += score(guesses[name], embeddings, is_masked)
    lines = []
    for name, row in zip(TRIVIAL, sums.to(device), strict=True):
        lines.append({"predictor": name, **mean_score(row)})
    return lines


# ---- Files and flags -------------------------------------------------------------------


def read_names(path):
    """Read a file of names, one a line -> set."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            names = {line.strip() for line in file}
    except (OSError, UnicodeError) as error:
        raise SystemExit(f"{path}: found {error}, expected names, one a line") from None
    return names - {""}


def read_videos(args, rank, world):
    """Read this process's share: every world-th of the videos to train or validate on.

    -> {number of the video among all: (n, D)}, names of all, meta of the first file,
    checksum of all embeddings. Memory falls with the processes: only the share of a file is kept.
    """
    excluded = set()
    if args.exclude:
        excluded = read_names(args.exclude)
    known = set()  # those of the excluded names that are found
    mine = {}
    names = []
    metas = []
    checksum = 0
    for path in args.data:
        data = load_data(path)
        metas.append(data.meta)
        compare_encoders(path, data.meta, args.data[0], metas[0])

        index = index_names(data.videos)
        left_out = set()
        for name in excluded.intersection(index):
            known.add(name)
            left_out.update(index[name])

        for i, video in enumerate(data.embeddings):
            # A video of one segment: there is nothing to predict it from.
            if i in left_out or len(video) < 2:
                continue
            checksum = zlib.crc32(video.numpy(), checksum)
            if len(names) % world == rank:
                mine[len(names)] = video.clone()  # a view would keep the whole file
            names.append(data.videos[i])
        del data, video  # so that only one file is in memory at a time

    sizes = {video.shape[1] for video in mine.values()}
    require(mine, f"{args.data}: {len(names)} videos of 2 or more segments: too few")
    require(len(sizes) == 1, f"{args.data}: embeddings of different sizes: {sizes}")
    require(len(set(names)) == len(names), f"{args.data}: a video is there twice")
    if args.exclude:
        n_unknown = len(excluded - known)
        found = f"--exclude: {len(excluded)} names, {n_unknown} of them match no video"
        require(known, found)
        if rank == 0:
            print(found)
    return mine, names, metas[0], checksum


def split(n, val_share, seed):
    """Split the numbers of n videos -> those to train on, those to validate on.

    It depends on the seed, not on the processes.
    """
    order = torch.randperm(n, generator=seeded(seed, 0)).tolist()
    n_val = round(val_share * n)
    if val_share > 0:
        n_val = max(n_val, 1)
    return order[n_val:], order[:n_val]


def log_of(path):
    """Name of the log of a checkpoint: lvmae.jsonl for lvmae.pt."""
    return path.removesuffix(".pt") + ".jsonl"


def save(path, checkpoint):
    """Write a checkpoint and, beside it, its log: one JSON object a line."""
    with replacing(path) as file:
        torch.save(checkpoint, file)
    with replacing(log_of(path)) as file:
        for line in checkpoint["log"]:
            file.write(json.dumps(line).encode() + b"\n")


def resume(path, model, optimizer, about):
    """Load a checkpoint into model and optimizer -> epochs done, log.

    Raises SystemExit where it was made from other videos or with other flags than
    `about` says. Flags that only one of the two knows do not count.
    """
    loaded, checkpoint = read_checkpoint(path)
    is_whole = isinstance(checkpoint.get("args"), dict) and checkpoint.get("log")
    require(is_whole, f"{path}: no args or no log in it: made by other code")
    checksum = checkpoint["args"].pop("data checksum", None)  # None: of older code
    for name, then in checkpoint["args"].items():
        now = about["args"].get(name, then)
        flag = "--" + name.replace("_", "-")
        require(now == then, f"{path}: made with {flag} {then}, found {now}")
    is_same = loaded.config == model.config
    require(is_same, f"{path}: config: not that of the flags and the data")
    for key in ("encoder", "videos"):
        is_same = checkpoint.get(key) == about[key]
        require(is_same, f"{path}: {key}: not those of the data that is given")
    is_same = checksum in (None, about["args"]["data checksum"])
    require(is_same, f"{path}: embeddings: not those of the data that is given")
    model.load_state_dict(loaded.state_dict())

    # AdamW does not look at its state: with wrong shapes it would crash the process.
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
        for name, p in model.named_parameters():
            for key in ("exp_avg", "exp_avg_sq"):
                moment = optimizer.state[p][key]
                if moment.shape != p.shape or moment.stride() != p.stride():
                    raise ValueError(f"{key} of {name} is not like the weights")
        return checkpoint["epoch"], checkpoint["log"]
    except Exception as error:
        raise SystemExit(f"{path}: optimizer: found {error!r:.200}") from None


def build_model(args, dim):
    """Make the model for embeddings of size dim, with the sizes of the flags."""
    torch.manual_seed(args.seed)
    try:
        config = LVMAEConfig(
            dim=dim,
            depth=args.depth,
            heads=args.heads,
            decoder_dim=args.decoder_dim,
            decoder_depth=args.decoder_depth,
            decoder_heads=args.decoder_heads,
            max_segments=args.max_segments,
            input_scale=args.input_scale,
        )
    except ValueError as error:
        raise SystemExit(f"--heads, --decoder-heads: {error}") from None
    return LVMAE(config)


def get_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    whole = number(int, 1)
    positive = number(float, 0)
    share = number(float, 0, 0.9)
    # Files
    add("--data", nargs="+", default=["out.npz"], metavar="FILE", help="npz files")
    add("--exclude", metavar="FILE", help="names of videos to leave out, one a line")
    add("--out", default="lvmae.pt", help="checkpoint; the log is beside it, as .jsonl")
    add("--resume", action="store_true", help="go on from --out, same flags")
    add("--val-share", type=share, default=0.1, help="of the videos; 0: no validation")
    # Masking
    add("--mask", choices=MASKS, default="random", help="what to mask")
    add(
        "--mask-ratio",
        type=number(float, 0.001, 0.999),
        default=0.5,
        help="share of a video; paper: best 0.4 for random, 0.5 for semantic masks",
    )
    # Sizes; the encoder is as wide as the embeddings
    add("--depth", type=whole, default=2, help="layers of the encoder")
    add("--heads", type=whole, default=8, help="attention heads of the encoder")
    add("--decoder-dim", type=whole, default=256, help="width of the decoder")
    add("--decoder-depth", type=whole, default=2, help="layers of the decoder")
    add("--decoder-heads", type=whole, default=8, help="attention heads of the decoder")
    add(
        "--max-segments",
        type=number(int, 2),
        default=256,
        help="longest stretch to train on, in segments",
    )
    add(
        "--input-scale",
        type=number(float, 1e-3, 1e6),
        help="factor on the embeddings; None: sqrt(D), as positions have that length",
    )
    # Optimisation
    add("--epochs", type=whole, default=120, help="passes over the training videos")
    add("--warmup-epochs", type=positive, default=5, help="epochs of linear warm-up")
    add("--batch-size", type=whole, default=16, help="videos a step and process, about")
    add(
        "--base-lr", type=positive, default=8e-3, help="peak rate for 256 videos a step"
    )
    add("--weight-decay", type=positive, default=0.05, help="not on biases and norms")
    # The run
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of all that is random")
    return parser.parse_args(argv)


def check_files(args):
    """Refuse, before any work, files that are missing or must not be written."""
    inputs = list(args.data)
    if args.exclude:
        inputs.append(args.exclude)
    log = log_of(args.out)
    check_outputs({args.out: ".pt", log: ".jsonl"}, inputs)
    is_ours = os.path.exists(args.out) or not os.path.exists(log)
    require(is_ours, f"{log}: there, but not {args.out}, so not its log: rename one")


def describe(args, world, model, encoder, trained_on, checksum):
    """What a checkpoint tells of its run; one that goes on must tell the same."""
    flags = vars(args) | {"batch_size x processes": args.batch_size * world}
    for name in ("data", "exclude", "out", "resume", "device", "batch_size"):
        del flags[name]  # these may differ
    flags["data checksum"] = checksum  # names alone do not tell other embeddings
    return {
        "config": asdict(model.config),
        "args": flags,
        "encoder": encoder,
        "videos": trained_on,
    }


def is_finite(model, line):
    """Say whether all weights and all numbers of a line of the log are finite."""
    weights = all(p.isfinite().all() for p in model.parameters())
    return weights and all(map(math.isfinite, line.values()))


def print_line(line):
    """Print a line of the log."""
    texts = []
    for key, value in line.items():
        if isinstance(value, float):
            value = f"{value:<8.4g}"
        texts.append(f"{key} {value}")
    print("  ".join(texts), flush=True)


def print_beginning(args, model, n_train, n_val, steps, log):
    """Print what may be a mistake, the size of the work, and the log up to here."""
    if os.path.exists(args.out) and not args.resume:
        print(f"{args.out}: there already, and will be replaced: --resume goes on")
    if args.epochs <= args.warmup_epochs:
        print(f"warning: {args.epochs} epochs, all of them in --warmup-epochs")
    size = sum(p.numel() for p in model.parameters())
    print(f"{n_train} videos to train on, {n_val} to validate on")
    print(f"{size:,} parameters, {steps} steps an epoch")
    for line in log:
        print_line(line)


def print_end(path, log):
    """Print what the training has reached, and what it had to beat."""
    text = f"{path}: {log[-1]['epoch']} epochs"
    if "cosine" in log[-1]:
        trivial = max(line["cosine"] for line in log if "predictor" in line)
        text += f", validation cosine {log[-1]['cosine']:.4f}, trivial {trivial:.4f}"
    print(text)


def main(args):
    """Train; after each epoch write a checkpoint and a line of the log."""
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files hold anything
    check_files(args)
    rank, world = read_rank()
    device = pick_device(args.device)
    set_up_torch(world, device)

    # Videos: those of this process; the split is that of all
    mine, names, encoder, checksum = read_videos(args, rank, world)
    train_numbers, val_numbers = split(len(names), args.val_share, args.seed)
    train = [mine[i] for i in train_numbers if i in mine]
    val = {i: mine[i] for i in val_numbers if i in mine}
    steps = max(1, round(len(train_numbers) / (args.batch_size * world)))  # an epoch
    message = f"{args.data}: {len(names)} videos: too few for {steps} steps an epoch"
    require(len(train) >= steps, message)

    # Model
    model = build_model(args, dim=train[0].shape[1]).to(device)
    optimizer = make_optimizer(model, args)
    trained_on = [names[i] for i in train_numbers]
    about = describe(args, world, model, encoder, trained_on, checksum)

    # Where to begin
    done = 0
    log = []
    if args.resume and os.path.exists(args.out):
        done, log = resume(args.out, model, optimizer, about)
    mean_done = sum_all(torch.tensor(done, device=device)).item() / world
    require(mean_done == done, f"{args.out}: not on a disk of all processes?")
    if val_numbers and not log:
        log = evaluate_trivial(validation_batches(val, args), device)
    net = average_gradients(model, world)
    if rank == 0:
        print_beginning(args, model, len(trained_on), len(val_numbers), steps, log)

    # Epochs
    begin = time.time()
    for epoch in range(done + 1, args.epochs + 1):
        generator = seeded(args.seed, epoch, rank)
        batches = training_batches(train, steps, args, generator)
        if rank == 0:
            batches = tqdm(batches, f"epoch {epoch}", steps, leave=False, disable=None)
        line = {"epoch": epoch}
        line |= train_epoch(net, optimizer, batches, epoch, steps, args, world)
        if val_numbers:
            line |= evaluate(model, validation_batches(val, args), device)
        require(is_finite(model, line), f"{line}: not saved, lower --base-lr")
        log.append(line)

        if rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save(args.out, {**about, **state, "epoch": epoch, "log": log})
            left = (time.time() - begin) / (epoch - done) * (args.epochs - epoch)
            print_line({**line, "minutes left": left / 60})

    if rank == 0:
        print_end(args.out, log)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(get_args())
    except KeyboardInterrupt:
        sys.exit("\nstopped: the same command with --resume goes on")
