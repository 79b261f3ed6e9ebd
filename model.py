"""LV-MAE: a masked autoencoder over the segment embeddings of a long video.

Sections 3.2 and 7. A video is N segments of 5 seconds; a frozen encoder (extract.py)
gave each an embedding of size D. Some are masked. The encoder sees the others, and a
small decoder predicts the masked ones:

    embeddings (B, N, D) --drop the masked--> encoder --> latents (B, N+1, D), [CLS] first
                                                             |
    predictions (B, N, D) <-- decoder <-- mask tokens at the masked places

Shapes: B videos, N segments of the longest, D size of an embedding, H heads, T tokens.
Videos differ in length, so (B, N, D) is mostly padding. One boolean mask packs a batch
and unpacks it again:

    x[is_token]                  (B, N+1, D) -> (T, D), the tokens of all videos in a row
    unpack(tokens, is_token)     (T, D) -> (B, N+1, D), zero where there is no token

The end of this file is what the other four scripts share: files, flags, devices.
"""

import argparse
import json
import math
import os
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

# ---- Masking, on the CPU ---------------------------------------------------------------


def random_mask(embeddings, lengths, ratio, generator=None):
    """Section 3.2: mask a random share of each video.

    embeddings (B, N, D), lengths (B,), ratio from 0 to 1 -> is_masked (B, N) bool.
    """
    noise = torch.rand(embeddings.shape[:2], generator=generator)  # (B, N)
    return mask_lowest(noise, lengths, ratio)


def semantic_mask(embeddings, lengths, ratio, generator=None):
    """Section 3.2: mask the segments least similar to the one before, the new ones.

    Arguments and result are those of random_mask; nothing here is random.
    """
    before = embeddings[:, :-1]
    similarity = F.cosine_similarity(embeddings[:, 1:], before, dim=-1)  # (B, N-1)
    # Paper: silent on the first segment. Here: it counts as most similar, is masked last.
    similarity = F.pad(similarity, (1, 0), value=2.0)  # (B, N)
    return mask_lowest(similarity, lengths, ratio)


def mask_lowest(score, lengths, ratio):
    """Mask the segments of each video that have the lowest score (B, N)."""
    # Paper: "a portion". Here: round(ratio * n), at least 1 masked and at least 1 visible.
    n = lengths.double()  # in single precision, ratio * n may round the wrong way
    n_masked = (ratio * n).round().clamp(min=1).minimum(n - 1)  # (B,)
    is_padding = torch.arange(score.shape[1]) >= lengths[:, None]  # (B, N)
    score = score.masked_fill(is_padding, float("inf"))
    order = score.argsort(dim=1, stable=True)  # (B, N), from the lowest score
    rank = order.argsort(dim=1)  # (B, N), its inverse: 0 where the score is lowest
    return rank < n_masked[:, None]


MASKS = {"random": random_mask, "semantic": semantic_mask}


# ---- Transformer: tokens (T, D) of all videos, and how many of them each video has -----


class Attention(nn.Module):
    """Multi-head self-attention of each token to the tokens of its own video."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, counts):  # x (T, D), counts: a list of B integers, T in all
        outs = []
        # One video at a time: without padding there is no key mask to get wrong. On a CPU
        # it is as fast as groups of like lengths.
        for qkv in self.qkv(x).split(counts):
            qkv = qkv.view(1, len(qkv), 3, self.heads, -1)  # a batch of one video
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (1, H, n, D/H) each
            out = F.scaled_dot_product_attention(q, k, v)  # (1, H, n, D/H)
            outs.append(out.transpose(1, 2).flatten(2)[0])  # (n, D)
        return self.proj(torch.cat(outs))  # (T, D)


class MLP(nn.Module):
    """Two linear layers, applied to each token."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)

    def forward(self, x, counts):
        x = x + self.attn(self.norm1(x), counts)
        x = x + self.mlp(self.norm2(x))
        return x


def sincos_positions(length, dim):
    """Sine-cosine positions of [CLS] (zero) and segments 0, 1, ... (1, length+1, dim)."""
    place = torch.arange(length, dtype=torch.double)
    frequency = 10000 ** (-2 * torch.arange(dim // 2, dtype=torch.double) / dim)
    angle = place[:, None] * frequency  # (length, dim/2)
    positions = torch.cat([angle.sin(), angle.cos()], dim=1)  # (length, dim)
    return F.pad(positions, (0, 0, 1, 0))[None].float()


def token_positions(table, is_token):
    """Positions of tokens, (B, N+1) bool -> (T, dim).

    They stand in a table, as in MAE's checkpoints; for longer videos they are made anew.
    """
    length = is_token.shape[1]
    if length > table.shape[1]:
        table = sincos_positions(length - 1, table.shape[2]).to(table)
    place = is_token.nonzero()[:, 1]  # (T,), of each token in its video
    return table[0, place.to(table.device)]  # (T, dim)


def unpack(tokens, is_token):
    """Undo x[is_token]: (T, D) -> (B, N+1, D), zero where there is no token."""
    x = tokens.new_zeros(*is_token.shape, tokens.shape[1])
    x[is_token] = tokens
    return x


# ---- The model (Figure 1) --------------------------------------------------------------


@dataclass
class LVMAEConfig:
    """Sizes of the model; `dim` is that of the embeddings and of the encoder."""

    dim: int
    depth: int
    heads: int
    decoder_dim: int
    decoder_depth: int
    decoder_heads: int
    max_segments: int = 256
    input_scale: float | None = None  # None: sqrt(dim)

    def __post_init__(self):
        """Refuse widths that are odd or that the heads do not divide."""
        for dim, heads in (
            (self.dim, self.heads),
            (self.decoder_dim, self.decoder_heads),
        ):
            if dim % 2 or dim % heads:
                raise ValueError(f"width {dim}, {heads} heads: must be even, divisible")


class LVMAE(nn.Module):
    """The masked autoencoder, with the parameter names of the authors' checkpoints."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.dim
        decoder_dim = config.decoder_dim
        max_segments = config.max_segments

        # Paper: positions are added to the embeddings. Here: to embeddings times sqrt(D).
        # They have length 1, positions sqrt(D/2): unscaled, the encoder would see little
        # but the positions.
        self.input_scale = config.input_scale
        if self.input_scale is None:
            self.input_scale = D**0.5

        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.register_buffer("pos_embed", sincos_positions(max_segments, D))
        blocks = [Block(D, config.heads) for _ in range(config.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(D, eps=1e-6)

        self.decoder_embed = nn.Linear(D, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        positions = sincos_positions(max_segments, decoder_dim)
        self.register_buffer("decoder_pos_embed", positions)
        blocks = [
            Block(decoder_dim, config.decoder_heads)
            for _ in range(config.decoder_depth)
        ]
        self.decoder_blocks = nn.ModuleList(blocks)
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, D)

        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, embeddings, lengths, is_masked):
        """Reconstruct the masked embeddings -> loss (), predictions (B, N, D).

        embeddings (B, N, D) on the model's device, zero beyond each length; lengths (B,)
        and is_masked (B, N) on the CPU, for they only make indices.
        """
        latents = self.encode(embeddings, lengths, is_masked)  # (B, N+1, D)
        predictions = self.decode(latents, lengths, is_masked)  # (B, N, D)
        # train.py's validation takes it too, for the trivial predictors as well.
        loss = masked_loss(predictions, embeddings, is_masked)
        return loss, predictions

    def encode(self, embeddings, lengths, is_masked=None):
        """Eq. (1): latents (B, N+1, D) of [CLS] and the visible segments, zero elsewhere.

        Without is_masked all segments are visible.
        """
        B, N, D = embeddings.shape
        is_visible = torch.arange(N) < lengths[:, None]  # (B, N), all but padding
        if is_masked is not None:
            is_visible = is_visible & ~is_masked
        is_token = F.pad(is_visible, (1, 0), value=True)  # (B, N+1), with [CLS]
        counts = is_token.sum(1).tolist()  # tokens of each video

        cls = self.cls_token.expand(B, 1, D)
        x = torch.cat([cls, embeddings * self.input_scale], dim=1)  # (B, N+1, D)
        x = x[is_token]  # (T, D)
        x = x + token_positions(self.pos_embed, is_token)
        for block in self.blocks:
            x = block(x, counts)
        return unpack(self.norm(x), is_token)  # (B, N+1, D)

    def decode(self, latents, lengths, is_masked):
        """Eq. (2): predictions (B, N, D) of all segments, zero beyond each length."""
        N = is_masked.shape[1]
        is_segment = torch.arange(N) < lengths[:, None]  # (B, N), masked ones too
        is_token = F.pad(is_segment, (1, 0), value=True)  # (B, N+1), with [CLS]
        counts = is_token.sum(1).tolist()  # tokens of each video

        x = self.decoder_embed(latents[is_token])  # (T, decoder_dim)
        is_hidden = F.pad(is_masked, (1, 0))[is_token].to(x.device)  # (T,)
        x = torch.where(is_hidden[:, None], self.mask_token[0], x)
        x = x + token_positions(self.decoder_pos_embed, is_token)
        for block in self.decoder_blocks:
            x = block(x, counts)
        x = self.decoder_pred(self.decoder_norm(x)) / self.input_scale  # (T, D)
        return unpack(x, is_token)[:, 1:]  # (B, N, D), without [CLS]


def masked_loss(predictions, embeddings, is_masked):
    """Eq. (3): squared L2 distance, averaged over the masked segments of the batch."""
    error = predictions[is_masked] - embeddings[is_masked]  # (masked, D)
    return error.square().sum(1).mean()


# ---- Files, flags and devices, as the other four scripts need them ---------------------


@dataclass
class Data:
    """The V videos of one npz. Each list has one entry a video, of n segments."""

    path: str
    videos: list  # names, unique
    embeddings: list  # (n, D) float16, of unit length
    starts: list  # (n,) float32, seconds
    labels: list  # names of classes, '' where there is none
    meta: dict  # the encoder and its settings, {} where unknown


def require(is_right, message):
    """Stop with one line, not a traceback, where an input is not as it must be."""
    if not is_right:
        raise SystemExit(message)


def load_data(path):
    """Read segment embeddings, from extract.py or anybody else -> Data.

    Raises SystemExit with one line for all that would else be wrong in silence.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            # All of it: with a damaged name, an optional array would seem absent.
            damaged = file.zip.testzip()
            require(damaged is None, f"{path}: damaged: {damaged} differs")
            embeddings = torch.from_numpy(file["embeddings"])
            lengths = file["lengths"]
            videos = file["videos"]
            labels = file.get("labels", np.full(videos.shape, ""))
            starts = file.get("starts")
            meta = json.loads(str(file.get("meta", "{}")))
        seconds = float(meta.get("segment_seconds", 5))
        S, _ = embeddings.shape  # it has two dimensions, or this raises
        if starts is not None:
            starts = torch.from_numpy(starts.astype(np.float32, casting="same_kind"))
    except Exception as error:
        expected = "an npz with embeddings (S, D), lengths (V,), videos (V,), meta JSON"
        raise SystemExit(f"{path}: found {error!r:.200}, expected {expected}") from None

    is_right = lengths.dtype.kind in "iu"
    require(is_right, f"{path}: lengths: {lengths.dtype}, not integers")
    lengths = lengths.flatten().tolist()
    found = f"sum {sum(lengths)}, smallest {min(lengths, default=0)}"
    is_right = sum(lengths) == S and min(lengths, default=0) > 0
    require(is_right, f"{path}: lengths: {found}, expected sum {S}, each above 0")

    for key, names in (("videos", videos), ("labels", labels)):
        is_right = names.dtype.kind == "U" and names.shape == (len(lengths),)
        require(is_right, f"{path}: {key}: {names.dtype} {names.shape}, not texts (V,)")
    n_names = len(set(videos.tolist()) - {""})
    require(n_names == len(lengths), f"{path}: videos: a name is empty or there twice")

    require(embeddings.is_floating_point(), f"{path}: embeddings: {embeddings.dtype}")
    embeddings = embeddings.half()
    norm = embeddings.norm(dim=1).float()  # (S,)
    row = (norm - 1).abs().argmax().item()  # NaN counts as most
    found = f"row {row} has a length of {norm[row]:.3g}"
    require(abs(norm[row] - 1) < 0.01, f"{path}: embeddings: {found}, expected 1")

    require(0 < seconds < math.inf, f"{path}: meta: segment_seconds is {seconds}")
    if starts is None:
        starts = torch.cat([torch.arange(n) * seconds for n in lengths])
    is_right = starts.shape == (S,) and starts.isfinite().all()
    require(is_right, f"{path}: starts: expected {S} finite seconds")
    for video, times in zip(videos, starts.split(lengths), strict=True):
        is_sorted = (times.diff() >= 0).all()
        require(is_sorted, f"{path}: starts: those of {video} are not in time order")
    return Data(
        path=path,
        videos=videos.tolist(),
        embeddings=list(embeddings.split(lengths)),
        starts=list(starts.split(lengths)),
        labels=labels.tolist(),
        meta=meta,
    )


def collate(videos):
    """Batch a list of (n, D) -> embeddings (B, N, D) float32, lengths (B,)."""
    lengths = torch.tensor([len(video) for video in videos])
    return pad_sequence(videos, batch_first=True).float(), lengths


def index_names(videos):
    """Find videos by name, with or without folder and ending -> {name: indices}."""
    index = {}
    for i, video in enumerate(videos):
        base = os.path.basename(video)
        stems = [os.path.splitext(video)[0], os.path.splitext(base)[0]]
        for name in {video, base, *stems}:
            index.setdefault(name, []).append(i)
    return index


def find_seen(videos, trained_on):
    """Find those of the videos that a model was trained on -> set of names.

    One of two extractions may have begun a folder higher: b.mp4 counts as a/b.mp4.
    """
    trained_on = set(trained_on)
    ends = set()
    for video in trained_on:
        ends |= ends_of(video)
    seen = set()
    for video in videos:
        if video in ends or not trained_on.isdisjoint(ends_of(video)):
            seen.add(video)
    return seen


def ends_of(path):
    """All that a path may be called from the folders above it: a/b -> {a/b, b}."""
    parts = path.split("/")
    return {"/".join(parts[i:]) for i in range(len(parts))}


def read_checkpoint(path):
    """Read a checkpoint of train.py -> LVMAE on the CPU, and all that is in it as a dict.

    Raises SystemExit where it is damaged, not finite, or made by other code.
    """
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        require(damaged is None, f"{path}: damaged: the checksum of {damaged} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config = LVMAEConfig(**checkpoint["config"])  # names what it does not know
        model = LVMAE(config)
        model.load_state_dict(checkpoint["model"])
    except Exception as error:
        message = f"{path}: found {error!r:.200}, expected a checkpoint of train.py"
        raise SystemExit(message) from None

    for name, weights in model.state_dict().items():
        require(weights.isfinite().all(), f"{path}: {name} is not finite: train anew")
    return model.eval(), checkpoint


def load_checkpoint(path, data, device):
    """Read a checkpoint for the embeddings of `data` -> LVMAE on the device, the dict."""
    model, checkpoint = read_checkpoint(path)
    dim = model.config.dim
    found = data.embeddings[0].shape[1]
    require(dim == found, f"{path} is for embeddings of {dim}, {data.path} has {found}")
    compare_encoders(path, checkpoint.get("encoder", {}), data.path, data.meta)
    return model.to(device), checkpoint


def compare_encoders(path, meta, other_path, other_meta):
    """Warn where two files, by their meta, hold embeddings of different encoders."""
    for key in ("model", "pretrained", "segment_seconds", "frames_per_segment"):
        one = meta.get(key, "unknown")
        other = other_meta.get(key, "unknown")
        is_known = "unknown" not in (one, other) or key == "model"
        if one != other and is_known:
            message = f"warning: {path}: {key} {one}, but {other_path}: {key} {other}"
            print(message, file=sys.stderr)


def number(kind, low, high=math.inf):
    """Make a type for argparse: an int or a float from low to high, never infinite."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text}: expected {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls it
    return parse


FIRST_BYTES = {
    ".npz": b"PK",
    ".pt": b"PK",
    ".json": b"{",
    ".jsonl": b"{",
    ".png": b"\x89",
    ".csv": b"video,label,split\r\n",  # of tests/paper_tables.py, as .md
    ".md": b"### Table",
}


def check_outputs(outputs, inputs):
    """Refuse, before any work, outputs that cannot be written or replace other files.

    outputs: {path: its ending}. What is there already must begin as such a file does.
    """
    inputs = [os.path.realpath(path) for path in inputs]
    for path, ending in outputs.items():
        require(path.endswith(ending), f"{path}: expected a name that ends in {ending}")
        require(os.path.realpath(path) not in inputs, f"{path}: would replace an input")
        try:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            open(temporary_name(path), "wb").close()
            os.remove(temporary_name(path))
            if os.path.lexists(path):
                require(os.path.isfile(path), f"{path}: there, and no regular file")
                expected = FIRST_BYTES.get(ending, b"")
                with open(path, "rb") as file:
                    found = file.read(len(expected))
                is_ours = found in (b"", expected)
                require(is_ours, f"{path}: there, and no {ending} file: rename one")
        except OSError as error:
            raise SystemExit(f"{path}: cannot be written: {error}") from None


def temporary_name(path):
    """Where a process writes `path` first; one that was killed leaves it to the next."""
    return f"{path}.{os.environ.get('RANK', 0)}.tmp"


@contextmanager
def replacing(path):
    """Open a temporary file beside `path`, which at the end is moved there whole."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save, disk full
        raise SystemExit(f"{path}: cannot be written: {error}") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def pick_device(name):
    """Device of a name; 'auto' is the first of cuda, mps and cpu that is there."""
    there = []
    if torch.cuda.is_available():
        there.append("cuda")
    if torch.backends.mps.is_available():
        there.append("mps")
    there.append("cpu")
    if name == "auto":
        name = there[0]
    require(name in there, f"--device {name}: not here, only {', '.join(there)}")
    if name == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))  # of torchrun
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    return torch.device(name)


def read_rank():
    """Rank of this process and number of processes, as torchrun sets them."""
    rank = os.environ.get("RANK", "0")
    world = os.environ.get("WORLD_SIZE", "1")
    is_right = rank.isdecimal() and world.isdecimal() and int(rank) < int(world)
    require(is_right, f"RANK {rank} of WORLD_SIZE {world}: expected a smaller rank")
    return int(rank), int(world)
