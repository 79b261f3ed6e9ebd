"""What was measured on the toy world: seeds, ablations, curves (see tests/README.md).

    python tests/toyworld.py toy/ --labelled 20 --run    # with more labelled videos
    python tests/experiments.py toy/               # train, probe, read captions: hours
    python tests/experiments.py toy/ --report      # tables and pictures of what is done

Each experiment is a training with three seeds. Its encoder is probed with few labels,
its reconstructions are read as captions, both on test videos. A result is a small JSON
file in toy/experiments; what is there is not done again.
"""

import argparse
import csv
import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import plot
import toyworld

ROOT = Path(__file__).resolve().parent.parent
LABELLED = 5  # videos of a recipe to train a head on, unless a curve needs others
COUNTS = (3, 5, 10, 20)
UNLABELLED = (250, 1000, 4000, 16000)
RATIOS = (0.25, 0.5, 0.75, 0.9)  # of masked segments, as in Figure 2
HEADS = ("linear", "attentive")
BASELINES = ("raw linear", "raw attentive", "transformer", "mamba")


@dataclass
class Experiment:
    """A training: its name, the flags that differ from the toy world's, its data."""

    name: str
    flags: str = ""
    sequences: int = 4000


def list_experiments():
    """All trainings; the first is the toy world's own."""
    found = [Experiment("base")]
    # With 4 layers as in the base, many of these would come close to 100 %.
    found.append(Experiment("untrained", "--depth 2 --epochs 1 --base-lr 0"))
    for mask in ("random", "semantic"):
        for ratio in RATIOS:
            if (mask, ratio) != ("random", 0.75):  # that is depth-2
                flags = f"--depth 2 --mask {mask} --mask-ratio {ratio}"
                found.append(Experiment(f"{mask}-{ratio}", flags))
    for sequences in (250, 1000, 16000):
        # The same number of steps as with 4,000: only the variety differs.
        epochs = max(1, toyworld.EPOCHS * 4000 // sequences)
        name = f"unlabelled-{sequences}"
        found.append(Experiment(name, f"--epochs {epochs}", sequences))
    for depth in (1, 2):
        found.append(Experiment(f"depth-{depth}", f"--depth {depth}"))
    return found


def write_labels(folder):
    """Write labels-N.csv: of each recipe, only N videos to train a head on."""
    with open(folder / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for count in COUNTS:
        used = {}
        kept = []
        for row in rows:
            if row["split"] == "train":
                used[row["label"]] = used.get(row["label"], 0) + 1
                if used[row["label"]] > count:
                    continue
            kept.append(row.values())
        if min(used.values()) < count:
            message = f"{folder}: {min(used.values())} labelled videos of a recipe"
            raise SystemExit(f"{message}, expected {count}: toyworld.py --labelled 20")
        toyworld.write_csv(folder / f"labels-{count}.csv", list(rows[0]), kept)


def run(folder, command):
    """Run one stage in the folder of the world, on one thread."""
    script, *flags = shlex.split(command)
    command = [sys.executable, str(ROOT / script), *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(command)}: {done.stderr[-2000:]}")


def probe(folder, ckpt, head, count):
    """Accuracy of a head on latents with `count` labelled videos of a recipe, in %."""
    out = f"{ckpt}.{head}.{count}.json"
    if not (folder / out).exists():
        labels = f"--labels labels-{count}.csv"
        run(folder, f"probe.py --ckpt {ckpt} {labels} --head {head} --json {out}")
    rows = json.loads((folder / out).read_text())["rows"]
    return rows[f"LV-MAE {head}"]["mean"]


def work(folder, experiment, seed):
    """Train, probe and read captions, unless that is done -> nothing."""
    ckpt = f"experiments/{experiment.name}.{seed}.pt"
    data = f"unlabelled-{experiment.sequences}.npz"
    common = f"--data {data} --out {ckpt} --seed {seed} --resume"
    if not (folder / f"{ckpt}.captions.json").exists():
        run(folder, f"train.py {toyworld.FLAGS} {common} {experiment.flags}")
        captions = f"--ckpt {ckpt} --json {ckpt}.captions.json"
        run(folder, f"retrieve.py --data test.npz {captions}")
    counts = [LABELLED]
    if experiment.name == "base":
        counts = COUNTS
    for count in counts:
        for head in HEADS:
            probe(folder, ckpt, head, count)
    print(f"{experiment.name}, seed {seed}: done", flush=True)


def compare(folder, count):
    """Accuracies of all heads with `count` labelled videos of a recipe -> {row: ...}."""
    out = f"experiments/compare.{count}.json"
    if not (folder / out).exists():
        flags = f"--ckpt experiments/base.0.pt --labels labels-{count}.csv"
        run(folder, f"probe.py {flags} --compare --json {out}")
    return json.loads((folder / out).read_text())["rows"]


# ---- Report ---------------------------------------------------------------------------


def collect(folder, experiment, read):
    """Mean, standard deviation and number of what `read` finds for each seed."""
    found = []
    for path in sorted(folder.glob(f"experiments/{experiment.name}.*.captions.json")):
        ckpt = path.relative_to(folder).as_posix().removesuffix(".captions.json")
        found.append(read(ckpt))
    spread = 0.0
    if len(found) > 1:
        spread = statistics.stdev(found)
    if not found:
        return float("nan"), 0.0, 0
    return statistics.mean(found), spread, len(found)


def accuracy(folder, experiment, head, count=LABELLED):
    """Accuracy over the seeds of an experiment."""
    return collect(folder, experiment, lambda ckpt: probe(folder, ckpt, head, count))


def recall(folder, experiment, name="reconstructed"):
    """R@1 over the seeds of an experiment."""

    def read(ckpt):
        return json.loads((folder / f"{ckpt}.captions.json").read_text())[name]["R@1"]

    return collect(folder, experiment, read)


def cell(found):
    """Write mean and spread as in a table."""
    mean, spread, n = found
    if n < 3:
        return f"{mean:.1f} ± {spread:.1f} (n={n})"
    return f"{mean:.1f} ± {spread:.1f}"


def print_tables(folder):
    """Print Markdown: a row for each experiment."""
    print("| experiment | LV-MAE linear | LV-MAE attentive | R@1 | interpolation |")
    print("|---|---|---|---|---|")
    for experiment in list_experiments():
        cells = [f"{experiment.name}"]
        cells += [cell(accuracy(folder, experiment, head)) for head in HEADS]
        cells.append(cell(recall(folder, experiment)))
        cells.append(cell(recall(folder, experiment, "interpolation")))
        print("|", " | ".join(cells), "|")

    print("\n| labelled videos of a recipe |", " | ".join(map(str, COUNTS)), "|")
    print("|---|" + "---|" * len(COUNTS))
    base = list_experiments()[0]
    for name in BASELINES:
        means = [f"{compare(folder, count)[name]['mean']:.1f}" for count in COUNTS]
        print("|", " | ".join([name, *means]), "|")
    for head in HEADS:
        cells = [cell(accuracy(folder, base, head, count)) for count in COUNTS]
        print("|", " | ".join([f"LV-MAE {head}", *cells]), "|")


def draw_curves(folder, path):
    """Draw accuracy against labelled videos, and all against unlabelled videos."""
    labelled = plot.Chart(
        "accuracy in %, unseen videos", "labelled videos of a recipe", [], COUNTS, True
    )
    for name in BASELINES:
        ys = [compare(folder, count)[name]["mean"] for count in COUNTS]
        labelled.lines.append(plot.Line(name, COUNTS, ys, is_dashed=True))
    base, *others = list_experiments()
    for head in HEADS:
        found = [accuracy(folder, base, head, count) for count in COUNTS]
        labelled.lines.append(line_of(f"LV-MAE {head}", COUNTS, found))

    title = f"{LABELLED} labelled videos of a recipe"
    unlabelled = plot.Chart(title, "unlabelled videos", [], UNLABELLED, True)
    experiments = [base] + [e for e in others if e.name.startswith("unlabelled")]
    experiments.sort(key=lambda experiment: experiment.sequences)
    for head in HEADS:
        found = [accuracy(folder, experiment, head) for experiment in experiments]
        unlabelled.lines.append(line_of(f"LV-MAE {head}", UNLABELLED, found))
    found = [recall(folder, experiment) for experiment in experiments]
    unlabelled.lines.append(line_of("R@1 of reconstructions", UNLABELLED, found))
    plot.draw([labelled, unlabelled], path)


def line_of(name, xs, found):
    """Make a line of a chart from (mean, spread, n) at each x."""
    means = [mean for mean, _, _ in found]
    spreads = [spread for _, spread, _ in found]
    return plot.Line(name, xs, means, spreads)


def main(args):
    """Do what is not done, in parallel; then report."""
    sys.stdout.reconfigure(errors="backslashreplace")
    folder = args.folder
    mark = folder / "toyworld.txt"
    if not mark.exists() or "--seed" not in mark.read_text():
        raise SystemExit(f"{folder}: no toy world: tests/toyworld.py makes one")
    (folder / "experiments").mkdir(exist_ok=True)
    write_labels(folder)
    for count in {experiment.sequences for experiment in list_experiments()}:
        if not (folder / f"unlabelled-{count}.npz").exists():
            name = f"unlabelled-{count}.npz"
            toyworld.splice(folder, count, toyworld.read_seed(folder), name)

    if not args.report:
        with ThreadPoolExecutor(args.workers) as pool:
            # The toy world itself, then the first seed of everything else.
            base, *others = list_experiments()
            todo = [(base, seed) for seed in range(args.seeds)]
            for seed in range(args.seeds):
                todo += [(experiment, seed) for experiment in others]
            futures = [pool.submit(work, folder, *each) for each in todo]
            for future in futures:
                future.result()
    print_tables(folder)
    draw_curves(folder, args.picture)


def get_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, help="of the toy world, with --run behind it")
    add("--workers", type=int, default=2, help="trainings at a time, a core each")
    add("--seeds", type=int, default=3, help="trainings of each experiment")
    add("--report", action="store_true", help="train no more, report what is done")
    add("--picture", default="curves.svg", help="where to draw the curves")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(get_args())
