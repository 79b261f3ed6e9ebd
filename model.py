"""LV-MAE: a masked autoencoder over the segment embeddings of a long video (sections 3.2 and 3.3).

A video is N segments of 5 seconds; a frozen encoder gave each of them an embedding of size D. Some
embeddings are masked; an encoder sees the others, and a small decoder predicts the masked ones:

    embeddings (B, N, D) --drop the masked--> encoder --> latents (B, N+1, D), [CLS] first
                                                             |
    predictions (B, N, D) <-- decoder <-- mask tokens at the masked places

The letters in shape comments, here and in the other scripts:
    B videos, N segments of the longest of them, D size of an embedding, S segments of all V videos,
    T tokens of a batch without any padding, H attention heads, G videos of a group, L tokens of its
    longest video. In the decoder, D is its own width.

The other four scripts import this file; what they share stands at its end: errors, files, devices.
"""

import json
import os
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


class Data(NamedTuple):
    """One npz in memory: the segments of V videos, one video after the other, without padding."""

    path: str
    embeddings: torch.Tensor  # (S, D) float16, unit length
    lengths: torch.Tensor  # (V,) segments of each video
    first: torch.Tensor  # (V,) row of each video's first segment
    starts: torch.Tensor  # (S,) seconds
    videos: list
    labels: list  # '' where there is none
    meta: dict  # encoder and settings


def pad(embeddings, first, lengths):
    """Gather videos, or crops of them, into one batch: (S, D), (B,), (B,) -> (B, N, D) float32."""
    index = torch.arange(lengths.max())  # (N,)
    is_segment = index < lengths[:, None]  # (B, N)
    rows = (first[:, None] + index).clamp(max=len(embeddings) - 1)  # (B, N)
    return embeddings[rows].float() * is_segment[..., None]  # (B, N, D), zero beyond each length


def random_mask(embeddings, lengths, ratio, generator=None):
    """Section 3.2, "Masking": mask a random share of each video's segments.

    embeddings (B, N, D) and lengths (B,) on the CPU, ratio in (0, 1) -> is_masked (B, N) bool.
    """
    noise = torch.rand(embeddings.shape[:2], generator=generator)  # (B, N)
    return mask_lowest(noise, lengths, ratio)


def semantic_mask(embeddings, lengths, ratio, generator=None):
    """Section 3.2: mask the segments least similar to the one before, where something new happens.

    Same arguments and result as random_mask; nothing here is random.
    """
    similarity = F.cosine_similarity(embeddings[:, 1:], embeddings[:, :-1], dim=-1)  # (B, N-1)
    # Paper: silent on the first segment. Here: it counts as most similar, so it is masked last.
    similarity = F.pad(similarity, (1, 0), value=2.0)  # (B, N)
    return mask_lowest(similarity, lengths, ratio)


def mask_lowest(score, lengths, ratio):
    """Mask the segments with the lowest scores: (B, N), (B,) -> (B, N) bool."""
    # Paper: "a portion". Here: round(ratio * n), but at least 1 masked and at least 1 visible.
    n = lengths.double()  # in single precision, ratio * n may round the wrong way
    n_masked = (ratio * n).round().clamp(min=1).minimum(n - 1)  # (B,)
    is_padding = torch.arange(score.shape[1]) >= lengths[:, None]  # (B, N)
    score = score.masked_fill(is_padding, float("inf"))
    rank = score.argsort(dim=1, stable=True).argsort(dim=1)  # (B, N), 0 is the lowest score
    return rank < n_masked[:, None]


MASKS = {"random": random_mask, "semantic": semantic_mask}


def trivial_predictions(embeddings, lengths, is_masked):
    """Guess the masked embeddings without any training: what a model must beat.

    Same arguments as LVMAE.forward, all on the CPU -> {name: (B, N, D)}; the masked places count.
    """
    mean, line = torch.zeros_like(embeddings), torch.zeros_like(embeddings)  # (B, N, D)
    for b, n in enumerate(lengths.tolist()):
        index = (~is_masked[b, :n]).nonzero()[:, 0]  # of the visible segments
        visible = embeddings[b, index]  # (n_visible, D)
        mean[b, :n] = visible.mean(0)
        # Interpolated one-hot vectors: the weights of the visible segments at each place.
        weights = np.stack([np.interp(np.arange(n), index, one) for one in np.eye(len(index))])
        line[b, :n] = torch.from_numpy(weights).to(visible).T @ visible  # (n, D)
    return {"visible mean": mean, "interpolation": line, "average of both": (mean + line) / 2}


def find_tokens(N, lengths, is_masked=None):
    """[CLS] and the segments, but not padding or what is masked: -> is_token (B, N+1) bool."""
    is_segment = torch.arange(N) < lengths[:, None]  # (B, N)
    return F.pad(is_segment if is_masked is None else is_segment & ~is_masked, (1, 0), value=True)


def send(x, device):
    """Copy to the device; to a GPU from pinned memory, so that the host does not wait for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def find_groups(is_token, device):
    """Sort the T tokens of a batch into groups of videos of similar length.

    The linear layers see the tokens as one matrix. Only attention must know which of them belong
    together: it runs group by group, each padded to its longest video, and that padding is little.
    is_token (B, N+1) bool -> rows (T,): places of the tokens in the flattened batch, group after
    group, and a list of groups, each with
        place: those of its tokens in its own padded rows, flattened
        shape: (G, L) of these
        is_key: (G, 1, 1, L), which of them may be attended to; None: all
    """
    count = is_token.sum(1)  # (B,) tokens of each video
    size_class = (2 * count.double().log2()).ceil()  # longest / shortest is sqrt(2) at most
    rows, groups = [], []
    for size in size_class.unique():  # a loop over groups, not over videos
        is_member = size_class == size  # (B,)
        rows.append((is_token & is_member[:, None]).flatten().nonzero()[:, 0])
        n = count[is_member]
        is_key = torch.arange(int(n.max())) < n[:, None]  # (G, L)
        place = send(is_key.flatten().nonzero()[:, 0], device)
        groups.append((place, is_key.shape,
                       None if is_key.all() else send(is_key[:, None, None], device)))
    return send(torch.cat(rows), device), groups


def unpack(x, rows, shape):
    """Put tokens to their places in a padded batch: (T, D) -> (*shape, D), zero elsewhere."""
    places = x.new_zeros(*shape, x.shape[1]).flatten(0, 1)  # (B * (N+1), D), or (G * L, D)
    return places.index_copy(0, rows, x).unflatten(0, shape)


class Attention(nn.Module):
    """Multi-head self-attention of each token to the tokens of its own video."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, groups):  # x (T, D)
        outs = []
        tokens = self.qkv(x).split([len(place) for place, *_ in groups])  # per group (its T, 3D)
        for qkv, (place, shape, is_key) in zip(tokens, groups, strict=True):
            qkv = unpack(qkv, place, shape).unflatten(2, (3, self.heads, -1))  # (G, L, 3, H, D/H)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (G, H, L, D/H) each
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=is_key)  # (G, H, L, D/H)
            outs.append(out.transpose(1, 2).flatten(2).flatten(0, 1)[place])  # (its T, D)
        return self.proj(torch.cat(outs))  # (T, D)


class Block(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x, groups):  # x (T, D)
        x = x + self.attn(self.norm1(x), groups)
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


def sincos_positions(length, dim):
    """Sine-cosine positions of [CLS] (zero) and of segments 0, 1, 2, ... -> (1, length+1, dim)."""
    frequency = 10000 ** (-2 * torch.arange(dim // 2, dtype=torch.double) / dim)  # (dim/2,)
    angle = torch.arange(length, dtype=torch.double)[:, None] * frequency  # (length, dim/2)
    positions = torch.cat([angle.sin(), angle.cos()], dim=1)  # (length, dim)
    return F.pad(positions, (0, 0, 1, 0))[None].float()


def stored_positions(buffer, N):
    """The stored positions of N segments, or the formula where the video is longer than those."""
    is_longer = N >= buffer.shape[1]  # the buffer has a row for [CLS], too
    return sincos_positions(N, buffer.shape[2]).to(buffer) if is_longer else buffer[:, : N + 1]


@dataclass
class LVMAEConfig:
    """Sizes of the model; `dim` is the size of the embeddings and the width of the encoder."""

    dim: int
    depth: int
    heads: int
    decoder_dim: int
    decoder_depth: int
    decoder_heads: int
    max_segments: int = 256
    input_scale: float | None = None  # None: sqrt(dim)


class LVMAE(nn.Module):
    """The masked autoencoder (Figure 1; section 7), with the names of the authors' checkpoints."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        # Paper: positions are added to the embeddings. Here: to embeddings times sqrt(D). They have
        # length 1, positions sqrt(D/2): unscaled, the encoder would see little but the positions.
        self.input_scale = c.dim**0.5 if c.input_scale is None else c.input_scale
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        self.register_buffer("pos_embed", sincos_positions(c.max_segments, c.dim))
        self.blocks = nn.ModuleList(Block(c.dim, c.heads) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.dim, eps=1e-6)

        self.decoder_embed = nn.Linear(c.dim, c.decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.decoder_dim))
        self.register_buffer("decoder_pos_embed", sincos_positions(c.max_segments, c.decoder_dim))
        layers = (Block(c.decoder_dim, c.decoder_heads) for _ in range(c.decoder_depth))
        self.decoder_blocks = nn.ModuleList(layers)
        self.decoder_norm = nn.LayerNorm(c.decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(c.decoder_dim, c.dim)

        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, embeddings, lengths, is_masked):
        """Reconstruct the masked embeddings.

        embeddings (B, N, D), lengths (B,), is_masked (B, N) bool -> loss (), predictions (B, N, D).
        `lengths` and `is_masked` stay on the CPU, so that the host never waits for the GPU.
        """
        latents = self.encode(embeddings, lengths, is_masked)  # (B, N+1, D)
        predictions = self.decode(latents, lengths, is_masked)  # (B, N, D)
        # Eq. (3): squared L2 distance, averaged over the masked segments of the batch.
        is_masked = send(is_masked, embeddings.device)
        distance = (predictions - embeddings).square().sum(2)  # (B, N)
        return (distance * is_masked).sum() / is_masked.sum(), predictions

    def encode(self, embeddings, lengths, is_masked=None):
        """Eq. (1): encode the visible segments -> latents (B, N+1, D), [CLS] at 0.

        Without `is_masked` all segments are visible. Rows of masked segments and padding are zero.
        """
        B, N, _ = embeddings.shape
        rows, groups = find_groups(find_tokens(N, lengths, is_masked), embeddings.device)
        x = torch.cat([self.cls_token.expand(B, -1, -1), embeddings * self.input_scale], dim=1)
        x = x + stored_positions(self.pos_embed, N)  # (B, N+1, D)
        x = x.flatten(0, 1)[rows]  # (T, D)
        for block in self.blocks:
            x = block(x, groups)
        return unpack(self.norm(x), rows, (B, N + 1))  # (B, N+1, D)

    def decode(self, latents, lengths, is_masked):
        """Eq. (2): predict every segment from the latents of the visible ones -> (B, N, D)."""
        B, N = is_masked.shape
        rows, groups = find_groups(find_tokens(N, lengths), latents.device)
        is_hidden = send(F.pad(is_masked, (1, 0)), latents.device).flatten()[rows]  # (T,)
        x = self.decoder_embed(latents.flatten(0, 1)[rows])  # (T, D)
        x = torch.where(is_hidden[:, None], self.mask_token[0], x)
        x = x + stored_positions(self.decoder_pos_embed, N).expand(B, -1, -1).flatten(0, 1)[rows]
        for block in self.decoder_blocks:
            x = block(x, groups)
        x = self.decoder_pred(self.decoder_norm(x)) / self.input_scale  # (T, D)
        return unpack(x, rows, (B, N + 1))[:, 1:]  # without [CLS]: (B, N, D)


def require(is_right, message):
    """Stop with one line, not a traceback, where a file or a flag is not as it must be."""
    if not is_right:
        raise SystemExit(message)


@contextmanager
def explain(source, expected, *errors):
    """Turn what libraries raise for broken files into such a line."""
    try:
        yield
    except (AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError,
            zipfile.BadZipFile, pickle.UnpicklingError, *errors) as error:
        raise SystemExit(f"{source}: found {error!r:.200}, expected {expected}") from None


def load_data(path):
    """Read an npz of segment embeddings, from extract.py or anybody else, and check it -> Data.

    Raises SystemExit with one line that names the file, the key, what was found and expected.
    """
    with explain(path, "an npz with embeddings (S, D), lengths (V,) and videos (V,), as from "
                 "extract.py; 'meta', if there, is a JSON object"):
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        (S, D), (V,), _ = (arrays[key].shape for key in ("embeddings", "lengths", "videos"))
        meta = dict(json.loads(str(arrays.get("meta", "{}"))))

    formats = {"embeddings": (np.floating, (S, D)), "lengths": (np.integer, (V,)),
               "videos": (np.str_, (V,)), "labels": (np.str_, (V,)), "starts": (np.floating, (S,))}
    for key, x in arrays.items():
        kind, shape = formats.get(key, (np.generic, x.shape))  # any other key may hold anything
        require(np.issubdtype(x.dtype, kind) and x.shape == shape, f"{path}: key '{key}': found "
                f"{x.dtype} {x.shape}, expected {kind.__name__} {shape}")
    lengths = torch.from_numpy(arrays["lengths"].astype(np.int64))
    require(lengths.sum() == S > 0 and lengths.min() > 0, f"{path}: key 'lengths': found "
            f"{lengths[:4].tolist()}, sum {lengths.sum()}, expected each > 0, sum {S}")
    first = lengths.cumsum(0) - lengths  # (V,)
    place = (torch.arange(S) - first.repeat_interleave(lengths)).numpy()  # (S,) in its own video
    starts = arrays.get("starts", place * meta.get("segment_seconds", 5.0))
    require(np.isfinite(starts).all(), f"{path}: key 'starts': found not finite, expected seconds")
    videos, labels = (arrays.get(key, np.full(V, "")).tolist() for key in ("videos", "labels"))
    require(len(set(videos)) == V, f"{path}: key 'videos': found a name twice, expected once")
    embeddings = torch.from_numpy(arrays["embeddings"].astype(np.float16, copy=False))
    norm = embeddings.norm(dim=1)  # (S,)
    worst = (norm - 1).abs().argmax()  # what is not a number counts as most
    require((norm[worst] - 1).abs() < 0.01, f"{path}: key 'embeddings': found length "
            f"{norm[worst]:.3g} in row {worst}, expected 1: divide by the norm")
    starts = torch.from_numpy(starts.astype(np.float32))
    return Data(path, embeddings, lengths, first, starts, videos, labels, meta)


def load_checkpoint(path, data, device):
    """Rebuild the model of train.py's checkpoint, for embeddings like `data`.

    Raises SystemExit with one line if there is no checkpoint or it was trained on another size.
    """
    with explain(path, "a checkpoint: make it with train.py"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model = LVMAE(LVMAEConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
    found, expected = data.embeddings.shape[1], model.config.dim
    require(found == expected, f"{data.path}: embeddings of size {found}, {path} has {expected}")
    return model.to(device).eval()


def pick_device(name):
    """'auto' is the first of cuda, mps and cpu; each process of torchrun has a GPU of its own."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(device for device in has if has[device]) if name == "auto" else name
    require(has[name], f"--device {name}: torch finds none, take --device cpu")
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(name)


def prefetch(generator, size):
    """Run a generator, of anything but None, in a thread, `size` items ahead of who uses them."""
    pool = ThreadPoolExecutor(1)
    ahead = [pool.submit(next, generator, None) for _ in range(size)]
    try:
        while (item := ahead.pop(0).result()) is not None:
            ahead.append(pool.submit(next, generator, None))
            yield item
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
