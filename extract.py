"""Stage 1 of LV-MAE: cut every video of a folder into 5-second segments and embed each of them.

Section 3.1 of the paper: a video is N consecutive segments, each segment is T frames, and a frozen
vision-language encoder turns a segment into one embedding. The encoder here is an image tower of
open_clip: a segment's embedding is the mean of its T frame embeddings.

    python extract.py videos/ out.npz                      # ViT-B-32, downloaded on first use
    python extract.py videos/ out.npz --model FOLDER       # an open_clip model on disk
    torchrun --nproc-per-node 2 extract.py videos/ out.npz # the videos split among processes

Run the same command again after an interruption and it goes on where it stopped; after a finished
run it extracts only what is new, what has changed and what failed. The last lines say what failed:

    97 of 100 videos, 4,812 segments; 3 failed:
      holidays/broken.mp4: no video stream that OpenCV can read

out.npz holds the S segments of V videos, one video after the other, D numbers each:

    embeddings  float16 (S, D)  unit length         videos  str (V,)  path below the input folder
    lengths     int64   (V,)    segments per video  labels  str (V,)  name of the video's folder
    starts      float32 (S,)    seconds             meta    str ()    JSON: encoder and settings
    digests     str     (V,)    changes with the video or the settings; for extract.py alone

Several processes (torchrun, or RANK and WORLD_SIZE set by hand on machines that share a file
system) each take every WORLD_SIZE-th video. The one that finishes last writes out.npz.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import logging
import os
import queue
import shutil
import socket
import sys
import threading
import time
import urllib.parse
import urllib.request
import uuid
import zipfile

# FFmpeg reads these when OpenCV loads it: no chatter on stderr; no limit on the packets of other
# streams between two video frames.
os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
os.environ.setdefault("OPENCV_FFMPEG_READ_ATTEMPTS", "1000000000")

import cv2  # noqa: E402
import huggingface_hub  # noqa: E402
import numpy as np  # noqa: E402
import open_clip  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tqdm import tqdm  # noqa: E402

from model import pick_device  # noqa: E402

VIDEO_ENDINGS = (".3gp", ".asf", ".avi", ".divx", ".f4v", ".flv", ".m2ts", ".m2v", ".m4v", ".mkv",
                 ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".rm", ".ts", ".vob",
                 ".webm", ".wmv")  # fmt: skip


def get_args(argv=None):
    """Read the command line."""
    p = argparse.ArgumentParser(
        description="Embed the segments of all videos below a folder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("videos", help="folder; every video below it is extracted")
    p.add_argument("out", help="npz file to write")
    # The encoder
    p.add_argument("--model", default="ViT-B-32", help="open_clip model name, or open_clip folder")
    p.add_argument("--pretrained", default="datacomp_xl_s13b_b90k", help="weights of a model name: "
                   "open_clip tag, or file (normalised as OpenAI's: a folder is safer)")  # fmt: skip
    # The segments
    p.add_argument("--segment-seconds", type=float, default=5.0, help="length of a segment")
    p.add_argument("--frames", type=int, default=8, help="frames per segment, evenly spaced")
    # The machine
    p.add_argument("--batch-size", type=int, default=0, help="frames; 0: 16 on CPU, 256 on GPU")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return p.parse_args(argv)


def find_videos(root):
    """List the videos below `root`, sorted, as paths relative to it; linked folders count once."""
    videos, visited = [], set()
    warn = lambda error: print(f"warning: {error.filename}: {error.strerror}")  # noqa: E731
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=warn):
        if os.path.realpath(folder) in visited:  # a link back: without this, a loop has no end
            subfolders.clear()
            continue
        visited.add(os.path.realpath(folder))
        subfolders.sort()
        paths = [os.path.join(folder, name) for name in subfolders + files]
        videos += [os.path.relpath(p, root) for p in paths if p.lower().endswith(VIDEO_ENDINGS)]
    return sorted(video.replace(os.sep, "/") for video in videos)


def load_encoder(model, pretrained, device):
    """Return the frozen open_clip model and the name that open_clip.get_tokenizer knows it by."""
    name, weights = model, pretrained
    if os.path.isdir(model):
        name, weights = f"local-dir:{model}", None
    elif not os.path.isfile(pretrained) and not urllib.request.getproxies():
        # Without a network the hub's client retries for 47 s: ask once, then use its cache or fail.
        hub = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT)
        try:
            socket.create_connection((hub.hostname, hub.port or 443), timeout=5).close()
        except OSError:
            huggingface_hub.constants.HF_HUB_OFFLINE = True
    logging.disable(logging.CRITICAL)  # the one line below says it better
    try:
        # Unlike create_model, this call never returns random weights.
        clip, _ = open_clip.create_model_from_pretrained(name, weights, device=device)
    except Exception as error:  # open_clip lets through a dozen types: files, pickles, shapes, hub
        raise SystemExit(
            f"--model {model} --pretrained {pretrained}: no weights "
            f"({str(error).splitlines()[0][:120]}): give --model FOLDER (an open_clip folder on "
            "disk) or --pretrained FILE, or connect to the internet once"
        ) from None
    finally:
        logging.disable(logging.NOTSET)
    return clip.eval(), name


def open_video(path, discard="nonref"):
    """Open a video; return the capture, the seconds per frame and the seconds its header promises.

    `nonref` lets FFmpeg skip frames that no other frame needs: a third less work, the others are
    bit-identical. One decoder thread costs the least CPU time in all.
    """
    os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = f"avdiscard;{discard}"  # read on opening
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    fps, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    if not 1 <= fps <= 240:  # headers say 0, -1, 90000: believe none of it
        return capture, 1 / 25, 0.0
    return capture, 1 / fps, max(count, 0) / fps


def frame_times(capture, step):
    """Grab frame after frame, the cheapest way through a video; yield the time of each, in s."""
    now, failures = -step, 0
    while failures < 1000:  # one False is a bad packet, not the end
        if capture.grab():
            stamp, failures = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000, 0
            now = stamp if now < stamp < float("inf") else now + step  # never back, never stuck
            yield now
        else:
            failures += 1


def frames_at(path, times):
    """Return the frames shown at `times` (ascending, seconds), RGB; fewer if the video ends."""
    capture, step, _ = open_video(path, "default")
    frames = []
    for now in frame_times(capture, step):
        while len(frames) < len(times) and now + step > times[len(frames)]:
            frames.append(capture.retrieve()[1][:, :, ::-1])  # (H, W, 3)
        if len(frames) == len(times):
            break
    return frames


def fit(image, preprocess):
    """Bring a frame to the encoder's size as open_clip does, at a third of the cost; BGR to RGB."""
    size, mode = preprocess["size"], preprocess["resize_mode"]
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    if mode != "squash":  # crop (shortest) or pad (longest) to the shape of the target
        h, w = image.shape[:2]
        scale = (max if mode == "longest" else min)(h / height, w / width)
        dy, dx = round(height * scale) - h, round(width * scale) - w
        image = image[max(-dy, 0) // 2 :, max(-dx, 0) // 2 :][: h + dy, : w + dx]
        if max(dy, dx) > 0:
            top, left, color = max(dy, 0) // 2, max(dx, 0) // 2, [preprocess["fill_color"]] * 3
            bottom, right = max(dy, 0) - top, max(dx, 0) - left
            image = cv2.copyMakeBorder(image, top, bottom, left, right, 0, value=color)
    is_smaller = height * width < image.shape[0] * image.shape[1]
    shrink_or_grow = cv2.INTER_AREA if is_smaller else cv2.INTER_CUBIC
    return cv2.resize(image, (width, height), interpolation=shrink_or_grow)[:, :, ::-1]


def why_unreadable(path):
    """Say why `path` cannot be read at all; None if it can."""
    if os.path.exists(path) and not os.path.isfile(path):
        return "not a file"
    try:
        with open(path, "rb") as file:
            return None if file.read(1) else "empty file"
    except OSError as error:
        return error.strerror


def decode(path, segment_seconds, frames_per_segment, preprocess):
    """Yield (segment, frame) for the first frame of each slot; at last (None, (seconds, note)).

    A slot is segment_seconds / frames_per_segment long. 0 seconds: unusable, and the note says why.
    """
    if reason := why_unreadable(path):
        yield None, (0.0, reason)
        return
    found, end = set(), 0.0
    for discard in ("nonref", "default"):
        capture, step, promised = open_video(path, discard)
        before, last_slot = set(found), -1
        for now in frame_times(capture, step):
            end = max(end, now + step)
            slot = int(now * frames_per_segment / segment_seconds)
            segment = slot // frames_per_segment
            if slot > last_slot and segment not in before:
                is_good, image = capture.retrieve()
                if is_good:
                    last_slot = slot
                    found.add(segment)
                    yield segment, fit(image, preprocess)
        is_short = end < 0.9 * promised - 1
        if found and len(found) == max(found) + 1 and not is_short:
            break  # else read again without the option: a segment may have lost all its frames
    if found:
        note = f"decoded {end:.1f} s of the {promised:.1f} s in its header" if is_short else ""
        yield None, (end, note)
    else:
        yield None, (0.0, "no video that OpenCV can read")


def decode_all(folder, videos, *settings):
    """Yield (video, segment, frame) for all videos, each followed by (video, None, its end)."""
    for video in videos:
        try:
            for segment, item in decode(os.path.join(folder, video), *settings):
                yield video, segment, item
        except cv2.error as error:
            yield video, None, (0.0, f"OpenCV: {error.err}")


def prefetch(generator, size):
    """Run `generator` in a thread, up to `size` items ahead: cv2 decodes while torch encodes."""
    items = queue.Queue(size)

    def work():
        try:
            for item in generator:
                items.put(item)
            items.put(None)
        except BaseException as error:  # raised again below, where it can be seen
            items.put(error)

    threading.Thread(target=work, daemon=True).start()
    while (item := items.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        yield item


def embed(model, frames, preprocess):
    """Encode frames, uint8 (B, H, W, 3), into unit-length embeddings, (B, D)."""
    device = model.logit_scale.device
    mean, std = (torch.tensor(preprocess[key], device=device) for key in ("mean", "std"))
    images = torch.from_numpy(frames).to(device) / 255  # (B, H, W, 3)
    images = ((images - mean) / std).permute(0, 3, 1, 2)  # (B, 3, H, W)
    is_cuda = device.type == "cuda"
    with torch.inference_mode(), torch.autocast(device.type, torch.float16, enabled=is_cuda):
        return F.normalize(model.encode_image(images).float(), dim=1).cpu()


def embed_all(stream, model, preprocess, batch_size):
    """Replace the frames in a stream of (video, segment, frame) by their embeddings, (D,).

    Batches cross the borders of segments and videos. All have the same size, the last one too:
    so an embedding is the same to the bit wherever its frame stands, and resuming changes nothing.
    """
    waiting, batch, count = [], None, 0
    for entry in itertools.chain(stream, [None]):
        if entry is not None:
            waiting.append(entry)
            if entry[1] is not None:
                batch = np.zeros((batch_size, *entry[2].shape), np.uint8) if batch is None else batch
                batch[count] = entry[2]
                count += 1
        if count in (0, batch_size) or entry is None:
            embeddings = iter(embed(model, batch, preprocess) if count else ())
            for video, segment, item in waiting:
                yield video, segment, item if segment is None else next(embeddings)
            waiting, count = [], 0


def extract(stream, segment_seconds):
    """Gather the embeddings of frames into segments: yield (video, embeddings, starts, note)."""
    sums = {}
    for video, segment, item in stream:
        if segment is not None:
            sums[segment] = sums.get(segment, 0) + item
            continue
        (end, note), segments = item, sorted(sums)
        # Paper: silent. Here: a last piece of less than half a segment is dropped.
        if len(segments) > 1 and end - segments[-1] * segment_seconds < segment_seconds / 2 - 1e-3:
            segments.pop()
        # Paper: one call of a video encoder. Here: the mean over frames, made unit-length again.
        embeddings = [F.normalize(sums[segment], dim=0).half().numpy() for segment in segments]
        starts = np.array(segments, np.float32) * segment_seconds
        if not all(np.isfinite(e).all() and e.any() for e in embeddings):
            embeddings, note = [], "the encoder gave an embedding that is zero or not finite"
        yield video, embeddings, starts, note
        sums = {}


def save(folder, path, **arrays):
    """Write an npz in one move: a reader sees all of it or nothing. `folder` is for half files."""
    half = os.path.join(folder, f"{uuid.uuid4().hex}.half")
    try:
        os.makedirs(folder, exist_ok=True)
        with open(half, "wb") as file:
            np.savez(file, **arrays)
            os.fsync(file.fileno())
        os.replace(half, path)
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}; mend it and run the same command again, it "
                         "goes on where it stopped") from None  # fmt: skip
    finally:
        with contextlib.suppress(OSError):
            os.remove(half)


def load_done(out, digests):
    """Read what other runs and processes have done: {digest: (embeddings, starts, note)}."""
    done = {}
    for digest in digests:
        with contextlib.suppress(FileNotFoundError), np.load(f"{out}.parts/{digest}.npz") as part:
            done[digest] = part["embeddings"], part["starts"], str(part["note"])
    if os.path.exists(out):
        if not zipfile.is_zipfile(out) or "digests" not in (old := np.load(out)).files:
            raise SystemExit(f"{out}: exists, but extract.py did not write it: use another name")
        ends = np.cumsum(old["lengths"])[:-1]
        embeddings, starts = np.split(old["embeddings"], ends), np.split(old["starts"], ends)
        done |= {d: (e, s, "") for d, e, s in zip(old["digests"], embeddings, starts, strict=True)}
    return done


def assemble(out, digests, meta):
    """Write the npz if all videos are done, and say how it went."""
    done = load_done(out, digests.values())
    if missing := len(digests) - sum(digest in done for digest in digests.values()):
        return print(f"{missing} of {len(digests)} videos are with other processes: "
                     f"the last one writes {out}; if none does, run the command again")  # fmt: skip
    good = {video: done[d] for video, d in digests.items() if len(done[d][0])}
    failed = {video: done[d][2] for video, d in digests.items() if video not in good}
    if good:
        save(
            f"{out}.parts", out,
            embeddings=np.concatenate([embeddings for embeddings, _, _ in good.values()]),
            lengths=np.array([len(embeddings) for embeddings, _, _ in good.values()]),
            starts=np.concatenate([starts for _, starts, _ in good.values()]),
            videos=np.array(list(good)),
            labels=np.array([os.path.basename(os.path.dirname(video)) for video in good]),
            meta=json.dumps(meta),
            digests=np.array([digests[video] for video in good]),
        )  # fmt: skip
    shutil.rmtree(f"{out}.parts", ignore_errors=True)
    for video, (_, _, note) in good.items():
        if note:
            print(f"warning: {video}: {note}")
    n_segments = sum(len(embeddings) for embeddings, _, _ in good.values())
    print(f"{len(good)} of {len(digests)} videos, {n_segments:,} segments; {len(failed)} failed"
          + ":" * bool(failed))  # fmt: skip
    for video, reason in failed.items():
        print(f"  {video}: {reason}")
    if not good:
        sys.exit(1)


def main(args):
    """Extract this process's share of the videos; the last process to finish writes the npz."""
    if args.frames < 1 or not 0 < args.segment_seconds < float("inf"):
        raise SystemExit("--frames must be at least 1 and --segment-seconds more than 0")
    videos = find_videos(args.videos)
    if not videos:
        raise SystemExit(f"{args.videos}: no videos (files that end in {' '.join(VIDEO_ENDINGS)})")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    batch_size = args.batch_size or (16 if device.type == "cpu" else 256)
    model, _ = load_encoder(args.model, args.pretrained, device)
    preprocess = open_clip.get_model_preprocess_cfg(model)
    is_folder = os.path.isdir(args.model)
    is_file = os.path.isfile(args.pretrained)
    meta = {
        "format": 1,
        "model": os.path.abspath(args.model) if is_folder else args.model,
        "pretrained": os.path.abspath(args.pretrained) if is_file else args.pretrained,
        "segment_seconds": args.segment_seconds,
        "frames_per_segment": args.frames,
    }
    weights = hashlib.sha256()
    for tensor in model.visual.state_dict().values():
        weights.update(tensor.cpu().numpy().tobytes())
    digests = {}
    for video in videos:
        try:
            stat = os.stat(os.path.join(args.videos, video))
            state = stat.st_size, stat.st_mtime_ns
        except OSError:
            state = None
        source = json.dumps([video, state, args.segment_seconds, args.frames, preprocess])
        digests[video] = hashlib.sha256((source + weights.hexdigest()).encode()).hexdigest()[:24]
    mine, done = videos[rank::world], load_done(args.out, digests.values())
    todo = [v for v in mine if digests[v] not in done or not len(done[digests[v]][0])]
    stream = decode_all(args.videos, todo, args.segment_seconds, args.frames, preprocess)
    stream = embed_all(prefetch(stream, 2 * batch_size), model, preprocess, batch_size)
    n_segments, began = 0, time.time()
    with tqdm(total=len(mine), initial=len(mine) - len(todo), unit="video") as bar:
        for video, embeddings, starts, note in extract(stream, args.segment_seconds):
            path = f"{args.out}.parts/{digests[video]}.npz"
            save(f"{args.out}.parts", path, embeddings=embeddings, starts=starts, note=note)
            n_segments += len(embeddings)
            bar.set_postfix_str(f"{n_segments / (time.time() - began):.1f} segments/s")
            bar.update()
    assemble(args.out, digests, meta)


if __name__ == "__main__":
    try:
        main(get_args())
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
