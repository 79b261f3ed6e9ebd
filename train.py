"""Pre-train LV-MAE on segment embeddings (section 3.3, Table 5).

    out.npz --crop, mask--> batches (B, N, D) --LVMAE, Eq. (3)--> lvmae.pt, lvmae.jsonl

    python train.py --data out.npz --mask semantic
    torchrun --nproc-per-node 8 train.py --data out.npz --preset paper

Prints what trivial predictors score on the validation masks, then a line an epoch. Last line: TODO
"""

import argparse
import json
import math
import os
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import (
    LVMAE,
    LVMAEConfig,
    load_data,
    pad,
    pick_device,
    random_mask,
    semantic_mask,
    trivial_predictions,
)

# Every number of Table 5 and of section 7, and a small model for a few hundred videos on a CPU.
PRESETS = {
    "paper": dict(
        depth=32, heads=16, decoder_dim=512, decoder_depth=8, decoder_heads=16, epochs=150,
        warmup_epochs=40, base_lr=1.5e-4, weight_decay=0.05, beta1=0.9, beta2=0.95, batch_size=16,
        max_segments=256,
    ),
}  # fmt: skip
PRESETS["compact"] = PRESETS["paper"] | dict(
    depth=6, heads=8, decoder_dim=256, decoder_depth=2, decoder_heads=8, epochs=60,
    warmup_epochs=5, base_lr=8e-3,
)  # fmt: skip
MASK_RATIO = {"random": 0.4, "semantic": 0.5}  # the best of Figure 2


def get_args(argv=None):
    """Parse the command line; the preset supplies the defaults of the numbers."""
    preset = argparse.ArgumentParser(add_help=False)
    preset.add_argument("--preset", choices=sorted(PRESETS), default="compact")
    numbers = PRESETS[preset.parse_known_args(argv)[0].preset]

    parser = argparse.ArgumentParser(
        parents=[preset],
        description="Pre-train LV-MAE on segment embeddings.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    # files
    add("--data", nargs="+", default=["out.npz"], help="npz files of extract.py")
    add("--out", default="lvmae.pt", help="checkpoint; the log goes beside it as .jsonl")
    add("--resume", action="store_true", help="continue from --out, if it exists")
    # masking
    add("--mask", choices=["random", "semantic"], default="random", help="what to mask")
    add("--mask-ratio", type=float, help="share masked; None: 0.4 random, 0.5 semantic")
    # model (its width is the size of the embeddings)
    add("--depth", type=int, default=numbers["depth"], help="encoder layers")
    add("--heads", type=int, default=numbers["heads"], help="encoder heads")
    add("--decoder-dim", type=int, default=numbers["decoder_dim"], help="decoder width")
    add("--decoder-depth", type=int, default=numbers["decoder_depth"], help="decoder layers")
    add("--decoder-heads", type=int, default=numbers["decoder_heads"], help="decoder heads")
    add("--max-segments", type=int, default=numbers["max_segments"], help="longest crop, segments")
    add("--input-scale", type=float, help="factor on the embeddings; None: sqrt(D), released: 1")
    # optimisation (Table 5)
    add("--epochs", type=int, default=numbers["epochs"], help="passes over the videos")
    add("--warmup-epochs", type=float, default=numbers["warmup_epochs"], help="linear warm-up")
    add("--batch-size", type=int, default=numbers["batch_size"], help="videos per process")
    add("--base-lr", type=float, default=numbers["base_lr"], help="lr = this * whole batch / 256")
    add("--weight-decay", type=float, default=numbers["weight_decay"], help="of AdamW")
    add("--beta1", type=float, default=numbers["beta1"], help="of AdamW")
    add("--beta2", type=float, default=numbers["beta2"], help="of AdamW")
    # the run
    add("--val-share", type=float, default=0.1, help="share of the videos kept for validation")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    add("--seed", type=int, default=0, help="of weights, split, crops and masks")
    args = parser.parse_args(argv)
    if args.mask_ratio is None:
        args.mask_ratio = MASK_RATIO[args.mask]
    return args


# ---- Data ---------------------------------------------------------------------------------------


def read_videos(files, val_share, seed):
    """Read npz files as one set of videos -> Data, indices of the train and of the validation ones.

    Each file is split by itself: the split stays the same whichever process reads which file.
    """
    parts = [load_data(path) for path in files]
    train, val, offset = [], [], 0
    for part in parts:
        D, expected = part.embeddings.shape[1], parts[0].embeddings.shape[1]
        if D != expected:
            raise SystemExit(f"{part.path}: embeddings of size {D}, {files[0]} has {expected}")
        usable = (part.lengths > 1).nonzero()[:, 0]  # one segment alone: nothing to predict it from
        number = max(1, round(val_share * len(usable)))
        if number >= len(usable):
            raise SystemExit(f"{part.path}: {len(usable)} videos of 2 segments or more: too few")
        usable = usable[torch.randperm(len(usable), generator=seeded(seed))] + offset
        val.append(usable[:number])
        train.append(usable[number:])
        offset += len(part.videos)
    lengths = torch.cat([part.lengths for part in parts])
    data = parts[0]._replace(
        embeddings=torch.cat([part.embeddings for part in parts]),  # (S, D)
        lengths=lengths,  # (V,)
        first=lengths.cumsum(0) - lengths,  # (V,)
    )
    return data, torch.cat(train), torch.cat(val)


def seeded(seed, epoch=0):
    """A generator that depends on these two alone, so that any epoch can be drawn again."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def crop(lengths, first, max_segments, generator):
    """Section 3.3, "Training strategy": train on a stretch of each video, so that lengths vary.

    Paper: "randomly sample a duration". Here: uniform from 2 segments to the whole video.
    lengths and first rows (B,) of the videos -> those of the crops.
    """
    u, v = torch.rand(2, len(lengths), generator=generator, dtype=torch.double)
    size = 2 + (u * (lengths.clamp(max=max_segments) - 1)).long()  # (B,)
    return size, first + (v * (lengths - size + 1)).long()


def fixed_batches(data, videos, mask, args):
    """The validation batches: whole videos and one mask each, the same in every epoch.

    Returns [(lengths (B,), first rows (B,), is_masked (B, N))].
    """
    videos = videos[data.lengths[videos].argsort(stable=True)]  # similar lengths together
    batches = []
    for batch in videos.split(args.batch_size):
        n, first = data.lengths[batch].clamp(max=args.max_segments), data.first[batch]
        x = pad(data.embeddings, first, n)  # (B, N, D)
        batches.append((n, first, mask(x, n, args.mask_ratio, seeded(args.seed))))
    return batches


def random_batches(data, videos, mask, args, epoch, steps, share):
    """Yield the batches of an epoch: (embeddings (B, N, D), lengths (B,), is_masked (B, N)).

    A thread assembles the next batch while this one is used.
    """
    generator = seeded(args.seed, epoch + 1)
    order = videos[torch.randperm(len(videos), generator=generator)].tensor_split(steps)

    def assemble(step):
        n, first = data.lengths[order[step]], data.first[order[step]]
        n, first = crop(n, first, args.max_segments, generator)
        x = pad(data.embeddings, first, n)  # (B, N, D)
        is_masked = mask(x, n, args.mask_ratio, generator)  # (B, N)
        x = x[share]  # drawn for the batch of all processes, so that their number changes nothing
        return x.pin_memory() if torch.cuda.is_available() else x, n[share], is_masked[share]

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(assemble, 0)
        for step in range(steps):
            ready = coming.result()
            if step + 1 < steps:
                coming = pool.submit(assemble, step + 1)
            yield ready


# ---- Learning -----------------------------------------------------------------------------------


def learning_rate(args, epoch, world):
    """Table 5: linear warm-up, then cosine decay to zero; `epoch` counts in fractions."""
    # Paper: "base learning rate". Here: MAE's rule, relative to an effective batch of 256 videos.
    peak = args.base_lr * args.batch_size * world / 256
    if epoch < args.warmup_epochs:
        return peak * epoch / args.warmup_epochs
    progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model, args):
    """AdamW of Table 5; biases and norms do not decay."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(args.beta1, args.beta2), fused=True)


def total(x):
    """Sum a tensor over all processes."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def train_epoch(net, optimizer, batches, args, epoch, steps, world, device):
    """One pass over the videos -> mean loss over the masked segments, number of segments."""
    sums = torch.zeros(2, device=device)  # loss times masked segments, masked segments
    segments = 0
    for step, (x, lengths, is_masked) in enumerate(batches):
        lr = learning_rate(args, epoch + (step + 0.5) / steps, world)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, _ = net(x.to(device, non_blocking=True), lengths, is_masked)
        # Here: the mean is over the masked segments of the whole batch. DistributedDataParallel
        # averages over processes, so each weighs its loss with its share of them.
        masked = is_masked.sum().to(device, non_blocking=True)
        (loss * masked * world / total(masked.clone())).backward()
        optimizer.step()
        optimizer.zero_grad()
        sums += torch.stack([loss.detach() * masked, masked])
        segments += int(lengths.sum())
    sums = total(sums)
    return (sums[0] / sums[1]).item(), segments * world


@torch.no_grad()
def evaluate(predict, data, batches, device):
    """Mean loss of Eq. (3) and mean cosine over the masked segments of the validation videos."""
    sums = torch.zeros(3, device=device)  # distance, cosine, number of masked segments
    for lengths, first, is_masked in batches:
        x = pad(data.embeddings, first, lengths)  # (B, N, D)
        predictions = predict(x.to(device), lengths, is_masked).cpu()  # (B, N, D)
        distance = (predictions - x).square().sum(2)  # (B, N)
        cosine = F.cosine_similarity(predictions, x, dim=2)  # (B, N)
        sums += torch.tensor([(y * is_masked).sum() for y in (distance, cosine, is_masked)]).to(device)
    sums = total(sums)
    return (sums[:2] / sums[2]).tolist()


# ---- Checkpoint ---------------------------------------------------------------------------------


def digests(files, world):
    """{file name: CRC-32 of its arrays}, of all processes; the zip directory holds them ready."""
    mine = {}
    for path in files:
        with zipfile.ZipFile(path) as file:
            mine[os.path.basename(path)] = " ".join(f"{e.CRC:08x}" for e in file.infolist())
    everybodys = [mine]
    if dist.is_initialized():
        everybodys = [None] * world
        dist.all_gather_object(everybodys, mine)
    return {name: crc for part in everybodys for name, crc in part.items()}


def resume(args, data, model, optimizer):
    """Load --out back into model and optimizer -> the number of epochs that it has behind it."""
    checkpoint = torch.load(args.out, map_location="cpu", weights_only=True)
    free = {"data", "out", "resume", "device", "batch_size"}  # may differ; the rest must not
    for name, value in checkpoint["args"].items():
        if name not in free and vars(args)[name] != value:
            flag = "--" + name.replace("_", "-")
            raise SystemExit(f"{args.out}: made with {flag} {value}, not {vars(args)[name]}")
    if checkpoint["data"] != data:
        raise SystemExit(f"{args.out}: made from {checkpoint['data']}, but --data has {data}")
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return checkpoint["epoch"]


def save(path, **checkpoint):
    """Write the checkpoint to a temporary name, then move it into place: it is always whole."""
    torch.save(checkpoint, path + ".tmp")
    os.replace(path + ".tmp", path)


# ---- The whole stage ----------------------------------------------------------------------------


def main(args):
    """Train, and write a checkpoint and a line of the log after each epoch."""
    device, rank, world = pick_device(args.device), 0, 1
    if "RANK" in os.environ:  # torchrun started this process
        if device.type == "cuda":
            torch.cuda.set_device(device := torch.device("cuda", int(os.environ["LOCAL_RANK"])))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        rank, world = dist.get_rank(), dist.get_world_size()
    say = print if rank == 0 else lambda *words, **options: None
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it

    # With fewer files than processes, each process reads all and takes its share of every batch.
    # Otherwise it reads its share of the files, and draws batches from those.
    is_shared = len(args.data) < world
    files = args.data if is_shared else args.data[rank::world]
    share = slice(rank, None, world) if is_shared else slice(None)
    data, train, val = read_videos(files, args.val_share, args.seed)
    mask = {"random": random_mask, "semantic": semantic_mask}[args.mask]
    val_batches = fixed_batches(data, val, mask, args)[share]
    videos = len(train) if is_shared else int(total(torch.tensor(len(train), device=device)))
    steps = max(1, round(videos / (args.batch_size * world)))  # an epoch
    if len(train[share]) < steps:
        raise SystemExit(f"{', '.join(files)}: too few videos for {world} processes")

    torch.manual_seed(args.seed)
    config = LVMAEConfig(
        data.embeddings.shape[1], args.depth, args.heads, args.decoder_dim, args.decoder_depth,
        args.decoder_heads, args.max_segments, args.input_scale,
    )  # fmt: skip
    model = LVMAE(config).to(device)
    optimizer = make_optimizer(model, args)
    origin, done = digests(files, world), 0
    if args.resume and os.path.exists(args.out):
        done = resume(args, origin, model, optimizer)
    net = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model

    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    say(f"{videos} videos to train on, {len(val)} to validate on, D = {config.dim}")
    say(f"model: {parameters:.1f} M parameters on {device}, {steps} steps an epoch")
    for name in ("visible mean", "interpolation", "average of both"):

        def guess(x, lengths, is_masked):
            return trivial_predictions(x.cpu(), lengths, is_masked)[name]  # noqa: B023

        val_loss, cosine = evaluate(guess, data, val_batches, device)
        say(f"  predicting the {name:<15}  val loss {val_loss:.4f}  cosine {cosine:.4f}")

    log = os.path.splitext(args.out)[0] + ".jsonl"
    if rank == 0:
        lines = open(log).readlines()[:done] if done else []
        with open(log, "w") as file:
            file.writelines(lines)
    begin = time.time()
    for epoch in range(done, args.epochs):
        epoch_begin = time.time()
        batches = random_batches(data, train, mask, args, epoch, steps, share)
        batches = tqdm(batches, f"epoch {epoch + 1}", steps, leave=False, disable=rank > 0 or None)
        loss, segments = train_epoch(net, optimizer, batches, args, epoch, steps, world, device)
        if not math.isfinite(loss):
            raise SystemExit(f"epoch {epoch + 1}: loss {loss}: lower --base-lr, then --resume")
        speed = segments / (time.time() - epoch_begin)
        val_loss, cosine = evaluate(lambda *batch: model(*batch)[1], data, val_batches, device)
        lr = optimizer.param_groups[0]["lr"]
        eta = (time.time() - begin) / (epoch + 1 - done) * (args.epochs - epoch - 1)
        say(
            f"epoch {epoch + 1:3}/{args.epochs}  loss {loss:.4f}  val loss {val_loss:.4f}  "
            f"cosine {cosine:.4f}  lr {lr:.1e}  {speed:,.0f} segments/s  ETA {eta / 60:.1f} min"
        )
        if rank == 0:
            with open(log, "a") as file:
                record = dict(epoch=epoch + 1, loss=loss, val_loss=val_loss, cosine=cosine, lr=lr)
                file.write(json.dumps(record) + "\n")
            save(
                args.out, model=model.state_dict(), config=asdict(config), epoch=epoch + 1,
                optimizer=optimizer.state_dict(), args=vars(args), data=origin, encoder=data.meta,
            )  # fmt: skip
    say(f"{args.out}: {args.epochs} epochs, validation cosine {cosine:.4f}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(get_args())
    except KeyboardInterrupt:
        raise SystemExit("stopped: go on with the same command and --resume") from None
