"""How fast each stage is, next to what the machine can do. A script, not a test.

    python tests/bench.py extract     # decoding, encoding, both
    python tests/bench.py train       # a step at the paper's sizes, on real lengths
    python tests/bench.py probe       # features and heads at COIN's size
    python tests/bench.py retrieve    # a million captions

Figures are ratios of things measured in turn in one run; a goal stands behind each.
"""

import argparse
import logging
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as extract.py, before torch

import cv2
import numpy as np
import open_clip
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import extract
import model
import probe
import retrieve
import train


def get_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("stage", choices=["extract", "train", "probe", "retrieve"])
    parser.add_argument("--rounds", type=int, default=5, help="of extract and train")
    parser.add_argument(
        "--seconds", type=int, default=180, help="extract: length of the videos"
    )
    parser.add_argument(
        "--depth", type=int, default=2, help="train: encoder layers; the paper: 32"
    )
    parser.add_argument(
        "--videos", type=int, default=11_827, help="probe: number of videos"
    )
    parser.add_argument(
        "--captions", type=int, default=1_000_000, help="retrieve: how many"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # for peak_memory
    return parser.parse_args(argv)


def timed(work, device, times=3):
    """Seconds that `work` takes on `device`, at best: others use the machine too."""
    wait, best = (
        torch.cuda.synchronize if device.type == "cuda" else (lambda: None),
        float("inf"),
    )
    for _ in range(times):
        wait()
        begin = time.perf_counter()
        work()
        wait()
        best = min(best, time.perf_counter() - begin)
    return best


# ---- extract ------------------------------------------------------------------------------------


def clock():
    """Wall seconds, and CPU seconds of all threads of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return np.array([time.perf_counter(), usage.ru_utime + usage.ru_stime])


def write_720p(path, seconds):
    """Write a moving, noisy 720p video at 30 fps; h264 with B-frames where ffmpeg is there."""
    if shutil.which("ffmpeg"):
        source = f"testsrc2=size=1280x720:rate=30:duration={seconds}"
        command = ["ffmpeg", "-v", "error", "-y", "-f", "lavfi"]
        command += ["-i", f"{source},noise=alls=8:allf=t", "-c:v", "libx264"]
        command += "-preset veryfast -bf 3 -g 250 -pix_fmt yuv420p".split()
        command += [str(path)]
        subprocess.run(command, check=True)
        return "h264 with B-frames, from ffmpeg"
    noise = np.random.default_rng(0).integers(0, 256, (90, 320, 3), np.uint8)
    noise = cv2.resize(noise, (2560, 720))
    codec = cv2.VideoWriter_fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, codec, 30, (1280, 720))
    for i in range(30 * seconds):
        writer.write(noise[:, 4 * i % 1280 :][:, :1280])
    writer.release()
    return "MPEG-4 without B-frames, from OpenCV"


def bench_extract(args):
    """Decoding, encoding and both together, as ratios of one run."""
    logging.disable(logging.WARNING)
    clip, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32")
    logging.disable(logging.NOTSET)
    clip.eval()  # random weights: no less work
    n_videos = 2
    with tempfile.TemporaryDirectory() as folder:
        videos = [f"{folder}/{i}.mp4" for i in range(n_videos)]
        kind = write_720p(videos[0], args.seconds)
        shutil.copy(videos[0], videos[1])
        threads = torch.get_num_threads()
        print(f"{n_videos} videos of {args.seconds} s, 720p, {kind}; ", end="")
        print(f"ViT-B-32, 8 frames a segment, {threads} threads")

        costs = {"grab": [], "decode": [], "prepare": [], "encode": [], "extract": []}
        for _ in range(args.rounds):  # in turns: a busy machine disturbs all alike
            # What `ffmpeg -i video -f null -` does, with default threads.
            options = os.environ.pop("OPENCV_FFMPEG_CAPTURE_OPTIONS")
            begin = clock()
            for video in videos:
                capture = cv2.VideoCapture(video, cv2.CAP_FFMPEG)
                while capture.grab():
                    pass
            costs["grab"].append(clock() - begin)
            os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = options

            begin = clock()
            frames = []
            for video in videos:
                frames += extract.decode(video, 5.0, 8)
            costs["decode"].append(clock() - begin)

            begin = clock()
            batches = list(extract.batches(frames, preprocess, 224))
            costs["prepare"].append(clock() - begin)

            begin = clock()
            for _, images in batches:
                extract.encode_images(images, clip)
            costs["encode"].append(clock() - begin)

            del frames, batches
            begin = clock()
            for video in videos:
                extract.embed_video(
                    extract.VideoReader(video), clip, preprocess, 5.0, 8
                )
            costs["extract"].append(clock() - begin)

    best = {name: np.min(cost, axis=0) for name, cost in costs.items()}
    for name, (wall, cpu) in best.items():
        spread = np.max(costs[name], axis=0)[1] / cpu
        print(
            f"{name:8} {wall:6.1f} s wall {cpu:6.1f} s CPU, worst / best {spread:.2f}"
        )
    decoding = best["decode"] + best["prepare"]
    ratio = decoding[1] / best["grab"][1]
    print(f"(decode + prepare) / grab only, CPU  {ratio:.2f}  (at most 0.70)")
    ratio = best["extract"][1] / (decoding[1] + best["encode"][1])
    print(f"extract / the three, CPU             {ratio:.2f}  (at most 1.15)")
    ratio = best["extract"][0] / max(decoding[0], best["encode"][0])
    print(
        f"extract / the longer of both, wall   {ratio:.2f}  (near 1 with spare cores)"
    )
    speed = n_videos * args.seconds / best["extract"][0]
    print(f"{speed / 5:.1f} segments/s, {speed:.1f} x real time")


# ---- train --------------------------------------------------------------------------------------

PAPER = dict(heads=16, decoder_dim=512, decoder_heads=16)  # and 32 + 8 layers, D = 1024


def paper_lengths(videos, generator):
    """Lengths like the paper's data: 60 % near 24 segments, 30 % near 56, 10 % at 256."""
    kind = torch.rand(videos, generator=generator)
    spread = torch.randn(videos, generator=generator)
    lengths = (
        torch.where(kind < 0.6, 24 + 4 * spread, 56 + 8 * spread)
        .round()
        .long()
        .clamp(2, 256)
    )
    return torch.where(kind < 0.9, lengths, 256)


class PaddedMAE(torch.nn.Module):
    """What one would write instead: library layers, every sequence padded to 256 tokens."""

    def __init__(self, dim, depth, decoder_depth):
        super().__init__()

        def layers(width, number):
            make = torch.nn.TransformerEncoderLayer
            options = dict(
                dropout=0, activation="gelu", batch_first=True, norm_first=True
            )
            return torch.nn.ModuleList(
                make(width, 16, 4 * width, **options) for _ in range(number)
            )

        self.blocks, self.decoder_blocks = (
            layers(dim, depth),
            layers(512, decoder_depth),
        )
        self.embed, self.pred = torch.nn.Linear(dim, 512), torch.nn.Linear(512, dim)
        self.mask_token = torch.nn.Parameter(torch.zeros(512))
        self.register_buffer("positions", model.sincos_positions(256, dim)[0, 1:])
        self.register_buffer(
            "decoder_positions", model.sincos_positions(256, 512)[0, 1:]
        )

    def forward(self, embeddings, lengths, is_masked):
        x = F.pad(embeddings, (0, 0, 0, 256 - embeddings.shape[1]))  # (B, 256, D)
        is_masked = F.pad(is_masked, (0, 256 - is_masked.shape[1])).to(x.device)
        is_padding = torch.arange(256, device=x.device) >= lengths.to(x.device)[:, None]
        order = (
            (is_masked | is_padding).long().argsort(dim=1, stable=True)
        )  # visible ones first
        spread = order[..., None].expand_as(x)
        z = (x * x.shape[2] ** 0.5 + self.positions).gather(1, spread)
        is_hidden = (is_masked | is_padding).gather(1, order)
        for block in self.blocks:
            z = block(z, src_key_padding_mask=is_hidden)
        z = self.embed(z).masked_fill(is_hidden[..., None], 0)
        z = torch.zeros_like(z).scatter(1, order[..., None].expand_as(z), z)
        z = torch.where(is_masked[..., None], self.mask_token.to(z.dtype), z)
        z = z + self.decoder_positions
        for block in self.decoder_blocks:
            z = block(z, src_key_padding_mask=is_padding)
        distance = (self.pred(z) - x).square().sum(2)
        return (distance * is_masked).sum() / is_masked.sum(), z


def make_step(net, args, device):
    """One training step, as train.py does it: a function of a batch."""
    optimizer = train.make_optimizer(net, train.get_args(["--base-lr", "1e-9"]))

    def step(lengths, generator):
        x = torch.randn(len(lengths), int(lengths.max()), 1024, generator=generator)
        x = (
            F.normalize(x, dim=2)
            * (torch.arange(x.shape[1]) < lengths[:, None])[..., None]
        )
        is_masked = model.random_mask(x, lengths, 0.5, generator)
        x = x.to(device)
        return timed(lambda: train_once(x, lengths, is_masked), device)

    def train_once(x, lengths, is_masked):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, _ = net(x, lengths, is_masked)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def flops(lengths, depth, decoder_depth):
    """Floating-point operations of a step on real tokens; backward costs twice forward."""
    n = lengths.double() + 1
    visible = n - (lengths * 0.5).round()
    encoder = depth * (24 * 1024**2 * visible + 4 * 1024 * visible**2)
    decoder = decoder_depth * (24 * 512**2 * n + 4 * 512 * n**2)
    return 3 * (encoder + decoder + 2 * 1024 * 512 * (visible + n)).sum().item()


def peak_memory(kind, args):
    """Peak memory in GiB of one step in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "train",
        "--only",
        kind,
        "--depth",
        str(args.depth),
    ]
    return float(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )


def bench_train(args):
    """Steps of pre-training at the paper's sizes, against equal lengths, a matmul and padding."""
    device = model.pick_device(args.device)
    torch.set_float32_matmul_precision("high")
    decoder_depth = max(1, args.depth // 4)
    config = model.LVMAEConfig(1024, args.depth, decoder_depth=decoder_depth, **PAPER)
    generator = torch.Generator().manual_seed(0)
    make = {
        "ours": lambda: model.LVMAE(config),
        "padded": lambda: PaddedMAE(1024, args.depth, decoder_depth),
    }
    if args.only:  # called by peak_memory
        make_step(make[args.only]().to(device), args, device)(
            torch.tensor([24] * 10 + [56] * 4 + [256] * 2), generator
        )
        if device.type == "cuda":
            print(torch.cuda.max_memory_allocated() / 2**30)
        else:  # not ru_maxrss, which a process inherits from the one that started it
            status = Path("/proc/self/status").read_text()
            print(int(status.split("VmHWM:")[1].split()[0]) / 2**20)
        return
    ours, padded = (
        make_step(make[kind]().to(device), args, device) for kind in ("ours", "padded")
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(n, 1024, device=device, dtype=dtype) for n in (512, 4096))

    print(f"D 1024, {args.depth} + {decoder_depth} layers, 16 videos a step, {device}")
    columns = {
        name: [] for name in ("ragged / equal lengths", "of a matmul", "padded / ours")
    }
    seconds = []
    for count in range(args.rounds + 1):
        lengths = paper_lengths(16, generator)
        equal = torch.full((16,), round(lengths.double().mean().item()))
        ragged_time, equal_time = ours(lengths, generator), ours(equal, generator)
        matmul_time = timed(lambda: a @ b.T, device, times=20)
        padded_time = padded(lengths, generator)
        if count == 0:  # warm-up
            continue
        per_token = ragged_time / lengths.sum().item()
        columns["ragged / equal lengths"].append(
            per_token / (equal_time / equal.sum().item())
        )
        speed = flops(lengths, args.depth, decoder_depth) / ragged_time
        columns["of a matmul"].append(speed / (2 * 512 * 4096 * 1024 / matmul_time))
        columns["padded / ours"].append(padded_time / ragged_time)
        seconds.append(per_token)
    goals = "at most 1.15", "at least 0.70 on a CPU, 0.40 on a GPU", "at least 5"
    print("                           min  median   max")
    for (name, values), goal in zip(columns.items(), goals, strict=True):
        row = min(values), statistics.median(values), max(values)
        print("{:24} {:6.2f} {:6.2f} {:6.2f}  ({})".format(name, *row, goal))
    memory = {kind: peak_memory(kind, args) for kind in make}
    print(f"peak memory, GiB: ours {memory['ours']:.2f}, padded {memory['padded']:.2f}")

    # How long the loop waits for its batches, as train.py draws them.
    lengths = paper_lengths(160, generator)
    rows = F.normalize(torch.randn(int(lengths.sum()), 1024), dim=1).half()
    videos = list(rows.split(lengths.tolist()))
    batches = train.training_batches(videos, 10, train.get_args([]), generator)
    net = model.LVMAE(config).to(device)
    waited = 0.0
    begin = before = time.perf_counter()
    for x, n, is_masked in batches:
        waited += time.perf_counter() - before
        net(x.to(device), n, is_masked)[0].backward()
        before = time.perf_counter()
    print(f"waiting for data: {waited / (before - begin):.1%} of the loop")
    # Half of each video on average: crops are uniform between 2 segments and all.
    tokens = 70_000 * 150 * (0.6 * 24 + 0.3 * 56 + 0.1 * 256) / 2
    hours = tokens * statistics.median(seconds) * 32 / args.depth / 3600
    print(
        f"70,000 videos, 150 epochs, 32 + 8 layers, on this machine: {hours:,.0f} hours"
    )


# ---- probe --------------------------------------------------------------------------------------


def bench_probe(args):
    """Features once, and an epoch of each head, at the size of COIN."""
    n_videos, n_segments, n_classes, dim = args.videos, 28, 180, 512
    device = model.pick_device(args.device)
    config = model.LVMAEConfig(
        dim=dim, depth=2, heads=8, decoder_dim=256, decoder_depth=2, decoder_heads=8
    )
    net = model.LVMAE(config).to(device).eval()
    rows = F.normalize(torch.randn(n_videos * n_segments, dim), dim=1).half()
    videos = rows.split(n_segments)

    begin = time.perf_counter()
    probe.encode(net, videos, list(range(n_videos)), device)
    seconds = time.perf_counter() - begin
    print(f"features of {n_videos:,} videos: {seconds:.1f} s on {device}", flush=True)

    features = {i: F.pad(video, (0, 0, 1, 0)) for i, video in enumerate(videos)}
    classes = torch.arange(n_videos) % n_classes
    targets = F.one_hot(classes, n_classes).float()
    train, val = torch.arange(n_videos).tensor_split([n_videos * 4 // 5])
    options = probe.get_args(["--epochs", "1", "--lr", "1e-3"])
    for name, Head in probe.HEADS.items():
        begin = time.perf_counter()
        probe.fit(Head, features, targets, train, val, options, device)
        seconds = time.perf_counter() - begin
        print(f"{name:12} {seconds:7.1f} s an epoch", flush=True)


# ---- retrieve -----------------------------------------------------------------------------------


def bench_retrieve(args):
    """Rank, and find the best, among a million captions, against the product alone."""
    n_queries = 1024
    dim = 512
    torch.manual_seed(0)
    captions = F.normalize(torch.randn(args.captions, dim), dim=1)
    queries = F.normalize(torch.randn(n_queries, dim), dim=1)
    truth = torch.randint(len(captions), (n_queries,))

    seconds = {"matmul": 0.0, "rank": 0.0, "search": 0.0}
    # In turns: machines are noisy. Of these blocks, a product is the fastest.
    for q, t in zip(queries.split(128), truth.split(128), strict=True):
        times = [time.perf_counter()]
        q @ captions.T
        times.append(time.perf_counter())
        retrieve.rank_captions(q, captions, t)
        times.append(time.perf_counter())
        retrieve.search(q, captions, 5)
        times.append(time.perf_counter())
        for name, duration in zip(seconds, np.diff(times), strict=True):
            seconds[name] += duration

    print(f"{n_queries:,} queries, {len(captions):,} captions of size {dim}, top 5")
    for name in ("rank", "search"):
        ratio = seconds[name] / seconds["matmul"]
        print(f"{name:6} / matmul  {ratio:.2f}  (at most 1.50)")
    print(f"matmul {1e3 * seconds['matmul'] / n_queries:.1f} ms a query")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.1f} GiB, {captions.nbytes / 2**30:.1f} of it captions")


if __name__ == "__main__":
    args = get_args()
    globals()[f"bench_{args.stage}"](args)
