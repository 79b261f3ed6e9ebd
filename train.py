"""Stage 2 of LV-MAE: pre-train the masked autoencoder on segment embeddings (section 3.3, Table 5).

    out.npz --crop, mask--> batch (B, N, D) --model.py, Eq. (3)--> lvmae.pt and lvmae.jsonl

    python train.py --data out.npz --mask semantic
    torchrun --nproc-per-node 8 train.py --data part*.npz --preset paper

First it prints what trivial predictors score on the validation masks, then a line an epoch. On the
240 videos of the toy world it takes 2 minutes on one CPU core, and its last line is like
    lvmae.pt: 120 epochs, validation cosine 0.7740, trivial 0.5976
"""

import argparse
import json
import math
import os
import time
import zipfile
from dataclasses import asdict
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import model as lvmae
from model import require

PRESETS = {
    # Table 5 and section 7; 16 videos per process, on 8 GPUs.
    "paper": dict(depth=32, heads=16, decoder_dim=512, decoder_depth=8, decoder_heads=16,
                  epochs=150, warmup_epochs=40, base_lr=1.5e-4),
    # For a few hundred videos on a CPU. On so few, two layers reconstruct better than four or six.
    "compact": dict(depth=2, heads=8, decoder_dim=256, decoder_depth=2, decoder_heads=8,
                    epochs=120, warmup_epochs=5, base_lr=8e-3),
}


def get_args(argv=None):
    """Read the command line."""
    first = argparse.ArgumentParser(add_help=False)  # the preset: other defaults depend on it
    first.add_argument("--preset", choices=PRESETS, default="compact", help="sizes and schedule")
    parser = argparse.ArgumentParser(parents=[first],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    # Files
    add("--data", nargs="+", default=["out.npz"], metavar="FILE", help="npz files of extract.py")
    add("--out", default="lvmae.pt", help="checkpoint; the log stands beside it, as .jsonl")
    add("--resume", action="store_true", help="continue from --out if it is there")
    # Masking
    add("--mask", choices=lvmae.MASKS, default="random", help="what to mask")
    add("--mask-ratio", type=float, help="share of masked segments; random 0.4, semantic 0.5")
    # Sizes; the encoder is as wide as the embeddings
    add("--depth", type=int, help="layers of the encoder")
    add("--heads", type=int, help="attention heads of the encoder")
    add("--decoder-dim", type=int, help="width of the decoder")
    add("--decoder-depth", type=int, help="layers of the decoder")
    add("--decoder-heads", type=int, help="attention heads of the decoder")
    add("--max-segments", type=int, default=256, help="longest stretch to train on, in segments")
    add("--input-scale", type=float, help="factor on the embeddings; None: sqrt(D)")
    # Optimisation
    add("--epochs", type=int, help="passes over the training videos")
    add("--warmup-epochs", type=float, help="epochs of linear warm-up")
    add("--batch-size", type=int, default=16, help="videos per process and step")
    add("--base-lr", type=float, help="peak rate for 256 videos a step; 16 have a 16th of it")
    add("--weight-decay", type=float, default=0.05, help="of AdamW, not on biases and norms")
    add("--beta1", type=float, default=0.9, help="of AdamW")
    add("--beta2", type=float, default=0.95, help="of AdamW")
    # The run
    add("--val-share", type=float, default=0.1, help="share of the videos kept for validation")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where")
    add("--seed", type=int, default=0, help="of weights, split, crops and masks")

    parser.set_defaults(**PRESETS[first.parse_known_args(argv)[0].preset])
    args = parser.parse_args(argv)
    if args.mask_ratio is None:
        args.mask_ratio = {"random": 0.4, "semantic": 0.5}[args.mask]  # the best of Figure 2
    if min(args.epochs, args.batch_size, args.max_segments - 1) < 1:
        parser.error("--epochs and --batch-size must be 1 or more, --max-segments 2 or more")
    if not 0 < args.mask_ratio < 1:
        parser.error(f"--mask-ratio {args.mask_ratio}: must lie between 0 and 1")
    return args


def seeded(seed, epoch=0):
    """A generator that depends on these two alone, so that any epoch can be drawn again.

    Epoch 0 stands for what holds in all epochs: the split and the validation masks.
    """
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def read_videos(files, val_share, seed):
    """Read npz files as one -> Data, indices of the training and of the validation videos.

    Each file is split by itself, so the split does not depend on which process reads which file.
    """
    parts, train, val, offset = [lvmae.load_data(path) for path in files], [], [], 0
    for part in parts:
        D, first_D = part.embeddings.shape[1], parts[0].embeddings.shape[1]
        require(D == first_D, f"{part.path}: embeddings of size {D}, but {files[0]} has {first_D}")
        usable = (part.lengths > 1).nonzero()[:, 0]  # one segment alone: nothing to predict it from
        n, n_val = len(usable), max(1, round(val_share * len(usable)))
        require(n_val < n, f"{part.path}: {n} videos of 2 or more segments: too few")
        order = usable[torch.randperm(n, generator=seeded(seed))] + offset
        val.append(order[:n_val])
        train.append(order[n_val:])
        offset += len(part.videos)
    embeddings = torch.cat([part.embeddings for part in parts]) if parts[1:] else part.embeddings
    lengths = torch.cat([part.lengths for part in parts])
    first = lengths.cumsum(0) - lengths  # of all files, only these three: training needs no more
    data = parts[0]._replace(embeddings=embeddings, lengths=lengths, first=first)
    return data, torch.cat(train), torch.cat(val)


def training_batches(data, videos, args, epoch, steps, share):
    """Yield the batches of an epoch: (embeddings (B, N, D), lengths (B,), is_masked (B, N))."""
    generator = seeded(args.seed, epoch)
    order = videos[torch.randperm(len(videos), generator=generator)]
    for batch in order.tensor_split(steps):
        lengths, first = crop(data.lengths[batch], data.first[batch], args.max_segments, generator)
        x = lvmae.pad(data.embeddings, first, lengths)  # (B, N, D)
        is_masked = lvmae.MASKS[args.mask](x, lengths, args.mask_ratio, generator)  # (B, N)
        yield x[share], lengths[share], is_masked[share]


def crop(lengths, first, max_segments, generator):
    """Section 3.3, "Training strategy": train on stretches of the videos, so that lengths vary.

    Paper: "randomly sample a duration". Here: uniform from 2 to min(n, --max-segments) segments.
    """
    u, v = torch.rand(2, len(lengths), generator=generator, dtype=torch.double)
    size = 2 + (u * (lengths.clamp(max=max_segments) - 1)).long()  # (B,)
    return size, first + (v * (lengths - size + 1)).long()


def make_optimizer(model, args):
    """AdamW of Table 5; biases and norms do not decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [dict(params=matrices, weight_decay=args.weight_decay),
              dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, betas=(args.beta1, args.beta2), fused=True)


def learning_rate(epoch, args, world):
    """Table 5: linear warm-up, then cosine decay to zero; `epoch` has a fraction."""
    # Paper: "base learning rate". Here, as in MAE: the rate for 256 videos a step, to be scaled.
    peak = args.base_lr * args.batch_size * world / 256
    if epoch < args.warmup_epochs:
        return peak * epoch / args.warmup_epochs
    progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return peak * (1 + math.cos(math.pi * progress)) / 2


def total(x):
    """Sum a tensor over all processes."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def train_epoch(net, optimizer, batches, epoch, steps, args, world, device):
    """One pass over the videos -> mean loss over their masked segments, number of segments."""
    sums = torch.zeros(3, device=device)  # loss of the masked segments, their number, all segments
    for step, (x, lengths, is_masked) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch + (step + 0.5) / steps, args, world)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, _ = net(lvmae.send(x, device), lengths, is_masked)
        # DDP averages the gradients of the processes, but the loss is a mean over the masked
        # segments of them all: each process is weighted by its share of these.
        counts = lvmae.send(torch.stack([is_masked.sum(), lengths.sum()]), device)
        (loss * counts[0] * world / total(counts[0].clone())).backward()
        optimizer.step()
        optimizer.zero_grad()
        sums += torch.cat([loss.detach()[None] * counts[0], counts])  # nothing waits for the GPU
    loss, masked, segments = total(sums).tolist()
    return loss / masked, segments


@torch.no_grad()
def evaluate(predict, data, batches, args, device):
    """Mean loss of Eq. (3) and mean cosine over the masked segments of the validation videos.

    These are not cropped, except to --max-segments, and masked alike in every epoch.
    """
    sums = torch.zeros(3)  # squared distance, cosine, number of masked segments
    for videos in batches:
        lengths = data.lengths[videos].clamp(max=args.max_segments)
        x = lvmae.pad(data.embeddings, data.first[videos], lengths)  # (B, N, D)
        is_masked = lvmae.MASKS[args.mask](x, lengths, args.mask_ratio, seeded(args.seed))
        predictions = predict(x.to(device), lengths, is_masked).cpu()[is_masked]  # (masked, D)
        distance = (predictions - x[is_masked]).square().sum(1)  # (masked,)
        cosine = F.cosine_similarity(predictions, x[is_masked])  # (masked,)
        sums += torch.stack([distance.sum(), cosine.sum(), is_masked.sum()])
    distance, cosine, masked = total(sums.to(device)).tolist()
    return distance / masked, cosine / masked


def settings(args, world):
    """What a run that goes on must have in common with its beginning."""
    free = ("data", "out", "resume", "device", "batch_size")
    kept = {f"--{name.replace('_', '-')}": x for name, x in vars(args).items() if name not in free}
    kept |= {"--batch-size x processes": args.batch_size * world, "--data": []}
    for path in args.data:
        with zipfile.ZipFile(path) as file:  # it holds a checksum of each array
            checksum = sum(array.CRC for array in file.infolist())
            kept["--data"].append(f"{os.path.basename(path)} ({checksum:x})")
    return kept


def main(args):
    """Train; write a line of the log and a checkpoint after each epoch."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun
    device = lvmae.pick_device(args.device)
    say = partial(print, flush=True) if rank == 0 else lambda line: None
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it

    # Fewer files than processes: all read all of them, and each takes its share of every batch.
    # Otherwise each reads its share of the files, and draws its batches from them.
    is_shared = len(args.data) < world
    files = args.data if is_shared else args.data[rank::world]
    share = slice(rank, None, world) if is_shared else slice(None)
    data, train, val = read_videos(files, args.val_share, args.seed)
    counts = torch.tensor([len(train), len(val)], device=device)
    videos, held_out = (counts if is_shared else total(counts)).tolist()  # of all processes
    steps = max(1, round(videos / (args.batch_size * world)))  # in an epoch
    require(len(train[share]) >= steps, f"{files}: too few videos for {world} processes")
    val = val[data.lengths[val].argsort(stable=True)]  # similar lengths together: little padding
    val_batches = val.split(16)[share]  # not --batch-size, on which masks must not depend

    config = lvmae.LVMAEConfig(
        data.embeddings.shape[1], args.depth, args.heads, args.decoder_dim, args.decoder_depth,
        args.decoder_heads, args.max_segments, args.input_scale)
    require(config.dim % config.heads == config.decoder_dim % config.decoder_heads == 0,
            f"--heads {config.heads}: must divide {config.dim}, the embedding size; "
            f"--decoder-heads {config.decoder_heads}: must divide {config.decoder_dim}")
    torch.manual_seed(args.seed)
    model = lvmae.LVMAE(config).to(device)
    optimizer, flags, log = make_optimizer(model, args), settings(args, world), []
    if args.resume and os.path.exists(args.out):
        with lvmae.explain(args.out, "a checkpoint: make it with train.py"):
            checkpoint = torch.load(args.out, map_location="cpu", weights_only=True)
            for flag, now in flags.items():  # the same sizes and files: so the weights fit
                then = checkpoint["args"].get(flag)
                require(now == then, f"{args.out}: made with {flag} {then}, found {now}")
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            log = checkpoint["log"]
        del checkpoint
    done = len(log)
    is_same = total(torch.tensor([done], device=device)).item() == done * world
    require(is_same, f"{args.out}: found different files, expected one that all machines share")
    require(done < args.epochs, f"{args.out}: has all {args.epochs} epochs behind it")
    net = DistributedDataParallel(model) if world > 1 else model

    size = sum(p.numel() for p in model.parameters()) / 1e6
    say(f"{videos} videos to train on, {held_out} to validate on")
    say(f"{size:.1f} M parameters on {device}, {steps} steps an epoch")
    best = -1
    for name in ("visible mean", "interpolation", "average of both"):
        guess = lambda x, *b, name=name: lvmae.trivial_predictions(x.cpu(), *b)[name]  # noqa: E731
        loss, cosine = evaluate(guess, data, val_batches, args, device)
        say(f"trivial predictor: {name:<15}  val loss {loss:.4f}  cosine {cosine:.4f}")
        best = max(best, cosine)

    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    begin = time.time()
    for epoch in range(done + 1, args.epochs + 1):
        epoch_begin = time.time()
        batches = lvmae.prefetch(training_batches(data, train, args, epoch, steps, share), 1)
        bar = tqdm(batches, f"epoch {epoch}", steps, leave=False, disable=True if rank else None)
        loss, segments = train_epoch(net, optimizer, bar, epoch - 1, steps, args, world, device)
        require(math.isfinite(loss), f"epoch {epoch}: the loss is {loss}: lower --base-lr")
        speed = segments / (time.time() - epoch_begin)
        val_loss, cosine = evaluate(lambda *b: model(*b)[1], data, val_batches, args, device)
        lr = optimizer.param_groups[0]["lr"]
        eta = (time.time() - begin) / (epoch - done) * (args.epochs - epoch) / 60
        say(f"epoch {epoch:3}/{args.epochs}  loss {loss:.4f}  val loss {val_loss:.4f}  "
            f"cosine {cosine:.4f}  lr {lr:.1e}  {speed:,.0f} segments/s  ETA {eta:.1f} min")
        log.append(dict(epoch=epoch, loss=loss, val_loss=val_loss, cosine=cosine, lr=lr))
        if rank == 0:
            with open(os.path.splitext(args.out)[0] + ".jsonl", "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in log)
            checkpoint = dict(model=model.state_dict(), config=asdict(config), epoch=epoch, log=log,
                              optimizer=optimizer.state_dict(), args=flags, data=flags["--data"],
                              encoder=data.meta)
            torch.save(checkpoint, args.out + ".tmp")  # then moved: --out is always whole
            os.replace(args.out + ".tmp", args.out)
    say(f"{args.out}: {args.epochs} epochs, validation cosine {cosine:.4f}, trivial {best:.4f}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(get_args())
    except KeyboardInterrupt:
        raise SystemExit("stopped: the same command with --resume goes on") from None
