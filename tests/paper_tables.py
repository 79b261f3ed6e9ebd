"""The paper's Tables 1 to 4 and 8, from embeddings, checkpoints and the published labels.

    python tests/paper_tables.py --lvu lvu_1.0 --breakfast breakfast --coin COIN.json \\
        --data out.npz --list-held-out held_out.txt
    python train.py --data out.npz --exclude held_out.txt
    python tests/paper_tables.py --lvu lvu_1.0 --breakfast breakfast --coin COIN.json \\
        --data out.npz --ckpt lvmae.pt --out tables

The first command writes the names of all videos that are validation or test in any task;
the second trains without them. The third writes one CSV of video,label,split a task into
tables/, runs probe.py on each, and prints the tables in Markdown, the paper's figures
beside ours. What is done is not done again: a result belongs to the very data,
checkpoint, labels, flags and code that made it. Give what you have, one benchmark or all.
Flags that are not listed go to probe.py: --runs 1, --val-share 0, --device cuda.

Formats: --lvu, nine folders of train.csv, val.csv and test.csv, with spaces between the
fields. --breakfast, train.csv and test.csv; without a folder, labels are read off the
names of the videos. --coin, the JSON of the data set. Several --data are one data set in
parts, of one encoder. Several --ckpt are rows of Tables 3, 4 and 8: masks and depths.
"""

import argparse
import csv
import hashlib
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import (
    check_outputs,
    index_names,
    load_checkpoint,
    load_data,
    replacing,
    require,
)

CODE = [ROOT / "probe.py", ROOT / "model.py"]

LVU_CLASSES = {  # folder: column of Table 1
    "director": "Dir.",
    "genre": "Genre",
    "writer": "Writer",
    "year": "Year",
    "scene": "Scene",
    "way_speaking": "Speak",
    "relationship": "Rel.",
}
LVU_NUMBERS = {"like_ratio": "Likes", "view_count": "Views"}
LVU = {*LVU_CLASSES, *LVU_NUMBERS}
NAMES = Path("the names of the videos")  # where Breakfast's labels are without a folder

# The paper's figures, of LanguageBind (LB) and InternVideo2 (IV2) embeddings. Table 1: the
# tasks in the order of LVU_CLASSES, their average, likes and views.
TABLE_1 = """
LB Baseline    | 64.48 61.47  5.95 29.08 30.86 31.91 48.78 38.9 0.21 2.90
LB Transformer | 24.30 57.88 16.07 18.44 35.80 32.45 51.22 33.7 0.56 3.04
LB Mamba       | 61.68 70.38 51.78 56.74 74.04 38.83 43.90 56.8 0.30 2.98
LB LV-MAE      | 77.57 71.57 64.28 58.15 72.84 40.95 58.53 63.4 0.23 2.52
IV2 Baseline   | 45.79 54.79  5.36  8.51 34.57 30.32 51.22 32.9 0.24 3.22
IV2 LV-MAE     | 62.62 68.15 57.14 58.15 77.78 39.89 53.66 59.6 0.23 2.68
"""
# Breakfast, COIN
TABLE_2 = """
LB Baseline  | 73.52 91.13
LB LV-MAE    | 91.55 92.42
IV2 Baseline | 83.94 88.41
IV2 LV-MAE   | 93.24 92.72
"""
# Average of LVU, Breakfast, COIN
TABLE_3 = """
LB linear, semantic masks     | 59.02 81.97 91.54
LB linear, random masks       | 58.32 81.69 91.46
IV2 linear, semantic masks    | 52.60 85.92 91.63
IV2 linear, random masks      | 53.63 85.63 91.29
LB attentive, semantic masks  | 63.41 90.70 91.8
LB attentive, random masks    | 62.54 91.55 92.42
IV2 attentive, semantic masks | 59.63 93.24 92.72
IV2 attentive, random masks   | 58.43 92.68 92.88
"""
TABLE_4 = """
LB depth 16 | 59.73 87.04 92.47
LB depth 24 | 60.04 89.58 93.26
LB depth 32 | 63.41 90.70 91.8
"""
# The tasks in the order of LVU_CLASSES, and their average
TABLE_8 = """
IV2 linear, semantic masks  | 55.14 58.56 49.40 43.26 72.84 37.77 51.22 52.60
IV2 linear, random masks    | 57.01 57.36 52.38 49.65 70.37 39.89 48.78 53.63
IV2 attentive, random masks | 54.21 66.95 55.36 56.03 80.25 42.55 53.66 58.43
LB linear, semantic masks   | 71.03 67.47 54.76 53.90 67.90 42.02 56.09 59.02
LB linear, random masks     | 71.96 67.12 55.36 53.19 71.60 37.76 51.22 58.32
LB attentive, random masks  | 78.50 69.17 60.12 61.70 72.84 39.36 56.09 62.54
"""

# ---- Labels as published -> rows of (video, label, split) ------------------------------


def read_rows(path, delimiter):
    """Read a CSV with a header -> list of dicts."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def read_lvu(folder):
    """Read a task of LVU. The names of its videos are YouTube's."""
    rows = []
    for split in ("train", "val", "test"):
        for row in read_rows(folder / f"{split}.csv", " "):
            if folder.name == "view_count":
                label = math.log(float(row["view_count"]))
            elif folder.name == "like_ratio":
                likes = float(row["like_count"])
                label = 10 * likes / (likes + float(row["dislike_count"]))
            else:
                label = row["class_name"]
            rows.append((row["youtube_id"], label, split))
    return rows


def breakfast_name(path):
    """Name of a Breakfast video, whatever parts it: P03-cam01-P03_tea, P03/cam01/P03_tea.avi."""
    return re.sub("[-/]", "_", re.sub(r"\.\w+$", "", path))


def read_breakfast(folder, videos):
    """Read Breakfast, whose videos have '-', '_' or '/' in the names on disk."""
    on_disk = {}
    for video in videos:
        person = re.search(r"P\d\d_\w+$", breakfast_name(video))
        if person:
            on_disk[person[0]] = video
    rows = []
    for split in ("train", "test"):
        for row in read_rows(folder / f"{split}.csv", ","):
            name = breakfast_name(row["file_name"])
            rows.append((on_disk.get(name, row["file_name"]), row["action"], split))
    return rows


def read_breakfast_names(videos):
    """Read Breakfast's labels off the names of the videos: P03_cam01_P03_cereals.avi.

    Persons 47 to 54 are the published test; of a stereo pair, channel 0 counts.
    """
    rows = []
    for video in videos:
        name = re.search(r"P(\d\d)_([a-z]+)(_ch0)?$", breakfast_name(video))
        if name:
            split = "test" if int(name[1]) >= 47 else "train"
            rows.append((video, name[2], split))
    return rows


def read_coin(path):
    """Read COIN's JSON, whose subsets are called training and testing."""
    rows = []
    for video, entry in json.loads(path.read_text("utf-8"))["database"].items():
        label = entry["class"]
        if not isinstance(label, str):
            raise ValueError(f"{video} has the class {label!r}, no text")
        split = {"training": "train", "testing": "test"}[entry["subset"]]
        rows.append((video, label, split))
    return rows


def find_sources(args):
    """Where the labels of each task are -> {task: path}."""
    sources = {}
    if args.lvu:
        for task in [*LVU_CLASSES, *LVU_NUMBERS]:
            if (args.lvu / task).is_dir():
                sources[task] = args.lvu / task
            else:
                print(f"{args.lvu}: no folder {task}: left out")
    if args.breakfast:
        sources["breakfast"] = args.breakfast
    if args.coin:
        sources["coin"] = args.coin
    require(sources, "no labels: give --lvu, --breakfast or --coin")
    return sources


def read_task(task, source, videos):
    """Read the published labels of a task -> rows of (video, label, split)."""
    try:
        if task in LVU:
            return read_lvu(source)
        if task == "coin":
            return read_coin(source)
        if source == NAMES:
            return read_breakfast_names(videos)
        return read_breakfast(source, videos)
    except Exception as error:
        message = f"{source}: found {error!r:.200}, expected the labels of {task}"
        raise SystemExit(message) from None


def match(rows, videos, source):
    """Rows whose video is there, under its full name, and the names of the others."""
    index = index_names(videos)
    for i, video in enumerate(videos):
        index[video] = [i]  # a full name comes before a part of another one
    found = []
    absent = []
    for name, label, split in rows:
        hits = [videos[i] for i in index.get(name, [])]
        require(len(hits) < 2, f"{source}: {name} may be {' or '.join(hits[:3])}")
        if hits:
            found.append((hits[0], label, split))
        else:
            absent.append((name, label, split))
    return found, absent


# ---- Data and probing ------------------------------------------------------------------


def merge(parts, path):
    """Write several Data, all of one encoder, as one npz."""
    metas = [(part.meta.get("model"), part.meta.get("pretrained")) for part in parts]
    require(len(set(metas)) == 1, f"--data: of different encoders: {metas}")
    rows = []
    lengths = []
    videos = []
    for part in parts:
        rows += part.embeddings
        lengths += [len(video) for video in part.embeddings]
        videos += part.videos
    with replacing(path) as file:
        np.savez(
            file,
            embeddings=torch.cat(rows).numpy(),
            lengths=np.array(lengths),
            videos=np.array(videos),
            meta=np.array(json.dumps(parts[0].meta)),
        )


def write_labels(path, rows):
    """Write the CSV that probe.py reads."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["video", "label", "split"])
    writer.writerows(rows)
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def digest(paths):
    """A short name for what some files hold."""
    total = hashlib.sha256()
    for path in paths:
        total.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return total.hexdigest()[:12]


def is_json(path):
    """Say whether a file is there and whole."""
    try:
        return "rows" in json.loads(path.read_text())
    except (OSError, ValueError):
        return False


def run_probe(files, flags, out):
    """Run probe.py, if that is not done -> what it writes, or None where it fails.

    files: {flag: path}, of labels, data and checkpoint. The name of the result holds a
    digest of them, of the flags and of the code: nothing else is taken for it.
    """
    command = [sys.executable, str(ROOT / "probe.py"), *flags]
    for flag, path in files.items():
        command += [flag, str(path)]
    inputs = digest([*files.values(), *CODE])
    key = hashlib.sha256(f"{inputs} {flags}".encode()).hexdigest()[:12]
    task = Path(files["--labels"]).stem
    result = out / f"{task}.{Path(files['--ckpt']).stem}.{key}.json"
    if not is_json(result):
        print(f"\n{result}: {task}", *flags, flush=True)
        status = subprocess.run([*command, "--json", str(result)]).returncode
        if status:
            print(f"{task}: probe.py has failed; the others go on", flush=True)
            return None
    return json.loads(result.read_text())


def probe_all(tasks, data, ckpts, flags, out):
    """Probe all tasks with all checkpoints.

    -> {(ckpt, task): what probe.py writes}, and how many calls of it failed. Rows without
    a checkpoint are trained once, with the first.
    """
    results = {}
    n_failed = 0
    for ckpt in ckpts:
        for task in tasks:
            calls = [["--head", "attentive"], ["--head", "linear"]]
            if ckpt == ckpts[0]:
                calls = [["--compare"]]
            elif task in LVU_NUMBERS:
                calls = [["--head", "linear"]]
            for call in calls:
                if task in LVU_NUMBERS:
                    call = [*call, "--regression"]
                files = {
                    "--labels": out / f"{task}.csv",
                    "--data": data,
                    "--ckpt": ckpt,
                }
                result = run_probe(files, [*call, *flags], out)
                if result is None:
                    n_failed += 1
                    continue
                if (ckpt, task) in results:
                    result["rows"].update(results[ckpt, task]["rows"])
                results[ckpt, task] = result
    return results, n_failed


# ---- Tables ----------------------------------------------------------------------------


def cell(results, ckpt, task, name):
    """Mean and deviation of a row of probe.py's table, or '-'."""
    row = results.get((ckpt, task), {"rows": {}})["rows"].get(name)
    if row is None:
        return "-"
    return f"{row['mean']:.2f} ± {row['std']:.2f}"


def average(results, ckpt, name):
    """Average of the seven classifications of LVU, or '-' where one is missing."""
    means = []
    for task in LVU_CLASSES:
        if name not in results.get((ckpt, task), {"rows": {}})["rows"]:
            return "-"
        means.append(results[ckpt, task]["rows"][name]["mean"])
    return f"{mean(means):.2f}"


def lvu_cells(results, ckpt, name):
    """The seven classifications of LVU and their average."""
    cells = [cell(results, ckpt, task, name) for task in LVU_CLASSES]
    return [*cells, average(results, ckpt, name)]


def three_cells(results, ckpt, name):
    """The average of LVU, Breakfast and COIN."""
    others = [cell(results, ckpt, task, name) for task in ("breakfast", "coin")]
    return [average(results, ckpt, name), *others]


def format_table(title, columns, ours, counts, paper):
    """A table in Markdown: our rows {name: cells}, videos found, the paper's rows."""
    lines = [f"### {title}", ""]
    lines.append(" | ".join(["|", *columns]) + " |")
    lines.append("|---" * (len(columns) + 1) + "|")
    for name, cells in {**ours, "videos found of published": counts}.items():
        lines.append(" | ".join([f"| {name}", *cells]) + " |")
    for row in paper.strip().splitlines():
        name, figures = row.split("|")
        lines.append(" | ".join([f"| paper: {name.strip()}", *figures.split()]) + " |")
    return "\n".join(lines) + "\n"


def count_cell(counts, tasks):
    """How many videos of some tasks were found, of how many published."""
    found = sum(counts[task][0] for task in tasks if task in counts)
    published = sum(counts[task][1] for task in tasks if task in counts)
    return f"{found} of {published}"


def make_tables(results, ckpts, counts):
    """All tables, as text. ckpts: {path: (masks, depth)}; counts: {task: (found, of)}."""
    first = list(ckpts)[0]
    classes = list(LVU_CLASSES.values())
    class_counts = [count_cell(counts, [task]) for task in LVU_CLASSES]
    number_counts = [count_cell(counts, [task]) for task in LVU_NUMBERS]
    three = ["LVU", "Breakfast", "COIN"]
    three_counts = [count_cell(counts, LVU_CLASSES)]
    three_counts += [count_cell(counts, [task]) for task in ("breakfast", "coin")]

    # Table 1: numbers are predicted by linear heads (section 4.2)
    pairs = {
        "raw attentive": "raw linear",
        "transformer": "transformer",
        "mamba": "mamba",
    }
    table_1 = {}
    table_2 = {"raw attentive": three_cells(results, first, "raw attentive")[1:]}
    for name, number_name in pairs.items():
        numbers = [cell(results, first, task, number_name) for task in LVU_NUMBERS]
        table_1[name] = lvu_cells(results, first, name) + numbers
    table_3 = {}
    table_4 = {}
    table_8 = {}
    for ckpt, (masks, depth) in ckpts.items():
        title = f"LV-MAE attentive ({ckpt})"
        numbers = [cell(results, ckpt, task, "LV-MAE linear") for task in LVU_NUMBERS]
        table_1[title] = lvu_cells(results, ckpt, "LV-MAE attentive") + numbers
        table_2[title] = three_cells(results, ckpt, "LV-MAE attentive")[1:]
        title = f"depth {depth} ({ckpt})"
        table_4[title] = three_cells(results, ckpt, "LV-MAE attentive")
        for head in ("linear", "attentive"):
            title = f"{head}, {masks} masks ({ckpt})"
            table_3[title] = three_cells(results, ckpt, f"LV-MAE {head}")
            table_8[title] = lvu_cells(results, ckpt, f"LV-MAE {head}")

    tables = []
    if counts.keys() & LVU:
        title = "Table 1: LVU, accuracy in %; likes and views, mean squared error"
        columns = [*classes, "Avg.", *LVU_NUMBERS.values()]
        n = [*class_counts, three_counts[0], *number_counts]
        tables.append(format_table(title, columns, table_1, n, TABLE_1))
    if counts.keys() & {"breakfast", "coin"}:
        title = "Table 2: Breakfast and COIN, accuracy in %"
        tables.append(
            format_table(title, three[1:], table_2, three_counts[1:], TABLE_2)
        )
    title = "Table 3: heads and masks, accuracy in %"
    tables.append(format_table(title, three, table_3, three_counts, TABLE_3))
    title = "Table 4: depth of the encoder, attentive probing, accuracy in %"
    tables.append(format_table(title, three, table_4, three_counts, TABLE_4))
    if counts.keys() & LVU:
        title = "Table 8: heads and masks on LVU, accuracy in %"
        columns = [*classes, "Avg."]
        n = [*class_counts, three_counts[0]]
        tables.append(format_table(title, columns, table_8, n, TABLE_8))
    return "\n".join(tables)


def leakage(results):
    """Say of each checkpoint how many test videos of each task it was trained on."""
    lines = ["Test videos that were in the pre-training:", ""]
    for (ckpt, task), result in results.items():
        lines.append(f"- {ckpt}, {task}: {result['seen']} of {result['tested']}")
    return "\n".join(lines) + "\n"


# ---- Command line ----------------------------------------------------------------------


def get_args(argv=None):
    """Read the command line -> arguments, and the flags that are for probe.py."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="All other flags go to probe.py.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--lvu", type=Path, metavar="FOLDER", help="of LVU's nine tasks")
    breakfast_help = (
        "of train.csv and test.csv; none: labels off the names of the videos"
    )
    add(
        "--breakfast",
        type=Path,
        nargs="?",
        const=NAMES,
        metavar="FOLDER",
        help=breakfast_help,
    )
    add("--coin", type=Path, metavar="FILE", help="COIN.json")
    add("--data", nargs="+", default=["out.npz"], metavar="FILE", help="embeddings")
    add("--ckpt", nargs="+", default=[], metavar="FILE", help="checkpoints of train.py")
    add("--out", type=Path, default=Path("tables"), help="folder of CSVs and results")
    add("--list-held-out", metavar="FILE", help="write names for train.py --exclude")
    return parser.parse_known_args(argv)


def main(args, flags):
    """Read the labels, list the held-out videos, probe, print the tables."""
    sys.stdout.reconfigure(errors="backslashreplace")
    require(
        args.ckpt or args.list_held_out, "nothing to do: no --ckpt, --list-held-out"
    )
    sources = find_sources(args)
    inputs = [*args.data, *args.ckpt, *sources.values()]
    outputs = {str(args.out / f"{task}.csv"): ".csv" for task in sources}
    outputs[str(args.out / "tables.md")] = ".md"
    if args.list_held_out:
        outputs[args.list_held_out] = ".txt"
    check_outputs(outputs, inputs)
    parts = [load_data(path) for path in args.data]
    videos = []
    for part in parts:
        videos += part.videos
    require(len(set(videos)) == len(videos), "--data: a video is there twice")

    # Labels of the videos that are there
    counts = {}
    held_out = set()
    for task, source in sources.items():
        rows = read_task(task, source, videos)
        found, absent = match(rows, videos, source)
        held_out.update(name for name, _, split in found + absent if split != "train")
        counts[task] = (len(found), len(rows))
        print(f"{task}: {len(found)} videos found of {len(rows)} published")
        write_labels(args.out / f"{task}.csv", found + absent)
    if args.list_held_out:
        with replacing(args.list_held_out) as file:
            file.write("".join(f"{name}\n" for name in sorted(held_out)).encode())
        print(f"{args.list_held_out}: {len(held_out)} validation and test videos")
    if not args.ckpt:
        return

    # Probing
    data = args.data[0]
    if len(parts) > 1:
        data = str(args.out / f"data.{digest(args.data)}.npz")
        if not Path(data).exists():
            merge(parts, data)
    ckpts = {}
    for path in args.ckpt:
        model, checkpoint = load_checkpoint(path, parts[0], torch.device("cpu"))
        masks = checkpoint.get("args", {}).get("mask", "unknown")
        ckpts[path] = (masks, model.config.depth)
    tasks = [task for task in sources if counts[task][0] > 0]
    results, n_failed = probe_all(tasks, data, list(ckpts), flags, args.out)

    # Tables
    text = make_tables(results, ckpts, counts) + "\n" + leakage(results)
    with replacing(args.out / "tables.md") as file:
        file.write(text.encode())
    print(f"\n{text}")
    require(n_failed == 0, f"{n_failed} results are missing, see above")


if __name__ == "__main__":
    try:
        main(*get_args())
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on") from None
