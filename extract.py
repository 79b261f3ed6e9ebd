"""Stage 1 of LV-MAE: cut every video of a folder into 5-second segments and embed each of them.

Section 3.1: a video is N consecutive segments of T frames, and a frozen short-video encoder turns
each segment into one embedding. Here the encoder is an image tower of open_clip, and the embedding
of a segment is the mean over its frames.

    python extract.py videos/ out.npz                       # ViT-B-32, downloaded on first use
    python extract.py videos/ out.npz --model FOLDER        # an open_clip model on disk
    torchrun --nproc-per-node 2 extract.py videos/ out.npz  # two processes share the videos

Its last line is "97 of 100 videos, 4,812 segments; 3 failed:" and the list of these. Given again,
the command goes on where it was stopped; later it extracts what is new, what changed, what failed.
Processes on one file system split the videos by RANK and WORLD_SIZE (torchrun sets them) and the
last to finish writes out.npz. Its keys, for V videos and S segments in all, of embedding size D:

    embeddings (S, D) float16, unit length; lengths (V,) in segments; starts (S,) in seconds;
    videos (V,) paths; labels (V,) folder names; meta JSON; for this script: digests, notes (V,)
"""

import argparse
import hashlib
import json
import logging
import os
import shutil
import socket
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from urllib.parse import urlsplit
from urllib.request import getproxies

import cv2
import huggingface_hub
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import center_crop_or_pad
from tqdm import tqdm

from model import pick_device

VIDEO_ENDINGS = (".3gp", ".asf", ".avi", ".f4v", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4",
                 ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv")


def get_args(argv=None):
    """Read the command line."""
    p = argparse.ArgumentParser(description="Embed the segments of all videos below a folder.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("videos", help="folder of videos, searched with its subfolders")
    add("out", help="npz file to write")
    # Encoder
    add("--model", default="ViT-B-32", help="open_clip model: a name, or a folder on disk")
    add("--pretrained", default="datacomp_xl_s13b_b90k", help="weights of a model name: open_clip "
        "tag, or file (colours then normalised as OpenAI's; a folder knows its own normalisation)")
    # Segments
    add("--segment-seconds", type=float, default=5.0, help="length of a segment")
    add("--frames", type=int, default=8, help="frames per segment, evenly spaced")
    # Machine
    add("--batch-size", type=int, default=0, help="frames; 0: 16 on CPU, 256 on GPU")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    return p.parse_args(argv)


def find_videos(root):
    """List the videos below `root`, sorted, as paths relative to it."""
    videos, visited = [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=print):
        if os.path.realpath(folder) in visited:  # a link to a folder above makes a loop
            subfolders.clear()
            continue
        visited.add(os.path.realpath(folder))
        subfolders.sort()
        paths = [os.path.join(folder, name) for name in subfolders + files]
        videos += [os.path.relpath(p, root) for p in paths if p.lower().endswith(VIDEO_ENDINGS)]
    return sorted(video.replace(os.sep, "/") for video in videos)


def load_encoder(model, pretrained, device):
    """Return the frozen open_clip model, and the name by which open_clip.get_tokenizer knows it."""
    name, weights = (f"local-dir:{model}", None) if os.path.isdir(model) else (model, pretrained)
    if weights and not os.path.isfile(weights) and not getproxies():
        # Without a network the hub's client retries for 47 s: ask once, then use its cache or fail.
        hub = urlsplit(huggingface_hub.constants.ENDPOINT)
        try:
            socket.create_connection((hub.hostname, hub.port or 443), timeout=5).close()
        except OSError:
            huggingface_hub.constants.HF_HUB_OFFLINE = True
    logging.disable(logging.CRITICAL)  # pages of log; the one line below says it all
    try:  # unlike create_model, this never returns random weights
        clip, _ = open_clip.create_model_from_pretrained(name, weights, device=device)
    except Exception as error:  # files, pickles, shapes, hub: a dozen types of error
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:150]
        raise SystemExit(f"--model {model} --pretrained {pretrained}: no weights ({reason}): give "
                         "--model FOLDER (open_clip model on disk) or --pretrained FILE") from None
    finally:
        logging.disable(logging.NOTSET)
    return clip.eval(), name


def grab_frames(path, discard="default"):
    """Yield (capture, time, seconds per frame, seconds its header promises) for every frame."""
    os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "-8"  # damaged videos fill the screen
    os.environ["OPENCV_FFMPEG_READ_ATTEMPTS"] = "1000000000"  # much sound between two frames
    os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = f"avdiscard;{discard}"
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])  # 1: least CPU
    fps, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    step, promised = (1 / fps, count / fps) if 1 <= fps <= 240 else (1 / 25, 0.0)  # 0, -1, 90000..
    time, failures = -step, 0
    while failures < 1000:  # one False is a bad packet, not the end
        failures += 1
        if capture.grab():
            failures, stamp = 0, capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            time = stamp if time < stamp < float("inf") else time + step  # always forward
            yield capture, time, step, promised


def fit(image, preprocess):
    """Crop or pad, and resize, as open_clip does, at a third of the cost; BGR to RGB."""
    size, mode = np.broadcast_to(preprocess["size"], 2), preprocess["resize_mode"]
    if mode != "squash":  # first give the image the shape of the target
        scale = (max if mode == "longest" else min)(image.shape[:2] / size)
        shape = (size * scale).round().astype(int).tolist()
        image = torch.from_numpy(image).movedim(2, 0)
        image = center_crop_or_pad(image, shape, preprocess["fill_color"]).movedim(0, 2).numpy()
    is_smaller = size.prod() < image.shape[0] * image.shape[1]
    interpolation = cv2.INTER_AREA if is_smaller else cv2.INTER_CUBIC
    return cv2.resize(image, size[::-1].tolist(), interpolation=interpolation)[:, :, ::-1]


def decode(path, segment_seconds, frames_per_segment, preprocess):
    """Yield (segment, frame), and at the end (None, (seconds decoded, note)).

    The first frame of every segment_seconds / frames_per_segment is taken. To grab all frames and
    convert the pixels of a few is several times faster than to seek, and exact.
    """
    found, end = set(), 0.0
    is_readable = (os.path.isfile(path) and os.access(path, os.R_OK)
                   and path.encode(errors="replace") == os.fsencode(path))  # else cv2 crashes
    # nonref: FFmpeg skips frames that no other frame needs, a third of the work. Should a segment
    # lose all its frames by that, the video is read again for it.
    for discard in ("nonref", "default") if is_readable else ():
        note, before, last = "", set(found), -1
        for capture, time, step, promised in grab_frames(path, discard):
            slot = int(time * frames_per_segment / segment_seconds)
            segment, end = slot // frames_per_segment, max(end, time + step)
            if slot > last and segment not in before:
                is_good, image = capture.retrieve()
                if is_good:
                    last = slot
                    found.add(segment)
                    yield segment, fit(image, preprocess)
        if found and end < 0.9 * promised - 1:
            note = f"decoded {end:.1f} s of the {promised:.1f} s in its header"
        elif found and len(found) == max(found) + 1:
            break
    if not found:
        note = ("not a readable file with a UTF-8 name" if not is_readable else
                "no video that OpenCV can read" if os.path.getsize(path) else "empty file")
    yield None, (end, note)


def prefetch(generator, size):
    """Run a generator in a thread, `size` items ahead: cv2 decodes while torch encodes."""
    pool = ThreadPoolExecutor(1)
    ahead = [pool.submit(next, generator, None) for _ in range(size)]
    try:
        while (item := ahead.pop(0).result()) is not None:
            ahead.append(pool.submit(next, generator, None))
            yield item
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@torch.inference_mode()
def embed(frames, model, preprocess, batch_size):
    """Encode n frames, uint8 (n, H, W, 3), into unit-length embeddings (n, D).

    A batch always has the same size, so that an embedding is the same to the last bit wherever its
    frame stands: a resumed run equals an uninterrupted one.
    """
    batch = np.zeros((batch_size, *frames[0].shape), np.uint8)
    batch[: len(frames)] = frames
    device = model.logit_scale.device
    mean, std = (torch.tensor(preprocess[key], device=device) for key in ("mean", "std"))
    images = (torch.from_numpy(batch).to(device) / 255 - mean) / std  # (B, H, W, 3)
    with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
        embeddings = model.encode_image(images.permute(0, 3, 1, 2)).float()  # (B, D)
    return F.normalize(embeddings, dim=1).cpu()[: len(frames)]


def extract(folder, videos, model, segment_seconds, frames_per_segment, batch_size):
    """Yield the part of each video: the arrays of out.npz, for this video alone.

    Batches cross the borders of segments and videos; a part comes when its last frame is encoded.
    """
    preprocess = open_clip.get_model_preprocess_cfg(model)
    settings = segment_seconds, frames_per_segment, preprocess
    stream = ((video, *item) for video in videos
              for item in decode(os.path.join(folder, video), *settings))
    entries, n_frames, sums = [], 0, {}  # sums: segment -> sum of the embeddings of its frames
    for entry in prefetch(stream, 2 * batch_size):
        entries.append(entry)
        n_frames += entry[1] is not None
        if n_frames not in (0, batch_size) and entry[:2] != (videos[-1], None):
            continue
        frames = [item for _, segment, item in entries if segment is not None]
        embedded = iter(embed(frames, model, preprocess, batch_size) if frames else ())
        for video, segment, item in entries:
            if segment is not None:
                sums[segment] = sums.get(segment, 0) + next(embedded)
                continue
            (end, note), segments = item, sorted(sums)
            # Paper: silent. Here: a tail of half a segment or more is a segment, a shorter is none.
            if segments[1:] and end - segments[-1] * segment_seconds < segment_seconds / 2 - 1e-3:
                segments.pop()
            # Paper: one call of a video encoder. Here: the mean over frames, of unit length again.
            embeddings = [F.normalize(sums[segment], dim=0).half().numpy() for segment in segments]
            if not all(np.isfinite(row).all() and row.any() for row in embeddings):
                embeddings, segments, note = [], [], "the encoder gave zero or non-finite numbers"
            yield {"embeddings": embeddings, "lengths": [len(segments)], "videos": [video],
                   "starts": np.array(segments, np.float32) * np.float32(segment_seconds),
                   "labels": [os.path.basename(os.path.dirname(video))], "notes": [note]}
            sums = {}
        entries, n_frames = [], 0


def save(path, folder, **arrays):
    """Write an npz in `folder` and move it to `path`: readers see all of it or nothing."""
    half = f"{folder}/{socket.gethostname()}.{os.getpid()}.half"
    try:
        os.makedirs(folder, exist_ok=True)
        with open(half, "wb") as file:
            np.savez(file, **arrays)
        os.replace(half, path)
    except OSError as error:
        if os.path.exists(half):
            os.remove(half)
        raise SystemExit(f"{path}: {error.strerror}; the same command goes on from here") from None


def load(paths):
    """Read the parts in these npz files, of those that can be read: {digest: part}."""
    parts = {}
    for path in paths:
        with suppress(FileNotFoundError, KeyError, ValueError, EOFError, zipfile.BadZipFile), \
             np.load(path) as file:
            arrays = {key: file[key] for key in file.files if key != "meta"}
            ends = np.cumsum(arrays["lengths"])
            for i, digest in enumerate(arrays["digests"].tolist()):
                rows = slice(ends[i] - arrays["lengths"][i], ends[i])
                parts[digest] = {key: array[rows if key in ("embeddings", "starts") else [i]]
                                 for key, array in arrays.items()}
    return parts


def main(args):
    """Extract this process's share of the videos; the last process to finish writes the npz."""
    if args.frames < 1 or not 0 < args.segment_seconds < float("inf") or os.path.isdir(args.out):
        raise SystemExit("expected --frames of 1 or more, --segment-seconds above 0, a file as out")
    sys.stdout.reconfigure(errors="backslashreplace")  # file names hold anything
    videos = find_videos(args.videos)
    if not videos:
        raise SystemExit(f"{args.videos}: no videos there, that is, no {' '.join(VIDEO_ENDINGS)}")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    batch_size = args.batch_size or (16 if device.type == "cpu" else 256)
    model, _ = load_encoder(args.model, args.pretrained, device)
    source = args.model, "" if os.path.isdir(args.model) else args.pretrained
    source = [os.path.abspath(name) if os.path.exists(name) else name for name in source]
    meta = {"format": 1, "model": source[0], "pretrained": source[1],
            "segment_seconds": args.segment_seconds, "frames_per_segment": args.frames}

    # The digest of a video tells when the file, the settings or the encoder have changed.
    settings = hashlib.sha256(json.dumps([meta, open_clip.get_model_preprocess_cfg(model)]).encode())
    for tensor in model.visual.state_dict().values():
        settings.update(tensor.cpu().numpy().tobytes())
    digests = []
    for video in videos:
        path = os.path.join(args.videos, video)
        state = os.path.isfile(path) and [os.path.getsize(path), os.path.getmtime(path)]
        digest = hashlib.sha256(json.dumps([video, state, settings.hexdigest()]).encode())
        digests.append(digest.hexdigest()[:24])
    folder = f"{args.out}.parts"
    paths = [f"{folder}/{digest}.npz" for digest in digests] + [args.out]
    parts = load(paths)
    mine = dict(zip(videos[rank::world], digests[rank::world], strict=True))
    todo = [v for v, digest in mine.items() if digest not in parts or not parts[digest]["lengths"]]

    with tqdm(total=len(mine), initial=len(mine) - len(todo), unit="video") as bar:
        settings, n_segments = (model, args.segment_seconds, args.frames, batch_size), 0
        for part in extract(args.videos, todo, *settings):
            digest = mine[part["videos"][0]]
            save(f"{folder}/{digest}.npz", folder, **part, digests=[digest])
            n_segments += part["lengths"][0]
            bar.set_postfix_str(f"{n_segments / bar.format_dict['elapsed']:.1f} segments/s")
            bar.update()

    parts = load(paths)
    if missing := sum(digest not in parts for digest in digests):
        return print(f"{missing} of {len(videos)} videos are still with other processes; the last "
                     f"one writes {args.out} (if all have ended, give the command again)")
    parts = [parts[digest] for digest in digests]
    good, failed = [p for p in parts if p["lengths"]], [p for p in parts if not p["lengths"]]
    if good:
        save(args.out, folder, meta=json.dumps(meta),
             **{key: np.concatenate([part[key] for part in good]) for key in good[0]})
    shutil.rmtree(folder, ignore_errors=True)
    for part in good:
        if note := part["notes"][0]:
            print(f"warning: {part['videos'][0]}: {note}")
    n_segments = sum(len(part["starts"]) for part in good)
    print(f"{len(good)} of {len(videos)} videos, {n_segments:,} segments; {len(failed)} failed"
          + ":" * bool(failed), *(f"  {p['videos'][0]}: {p['notes'][0]}" for p in failed), sep="\n")
    if not good:
        sys.exit(1)


if __name__ == "__main__":
    try:
        main(get_args())
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from here")
