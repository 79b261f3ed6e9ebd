"""The main job end to end: the commands of README.md, on a small toy world."""

import csv
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toyworld

from model import load_data

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder that README.md's first command makes, in its small size, and what it printed."""
    toy = tmp_path_factory.mktemp("world") / "toy"
    command = [
        sys.executable,
        str(ROOT / "tests/toyworld.py"),
        str(toy),
        "--small",
        "--run",
    ]
    done = subprocess.run(command, cwd=toy.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return toy, done.stdout


def blocks(heading, language=""):
    """The code blocks of one section of README.md."""
    section = README.split(f"{heading}\n", 1)[1].split("\n#", 1)[0]
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.S | re.M)


def forms(text):
    """The lines of a text, whatever the numbers and the spaces between them are."""
    return {
        " ".join(re.sub(r"[\d.,]+", "1", line).split()) for line in text.splitlines()
    }


def test_the_whole_method_runs(world):
    """Catches scripts that do not fit each other: flags, file formats, names in the JSON files."""
    toy, printed = world
    commands = re.findall(r"^\$ python (\w+)\.py", printed, re.M)
    assert commands == ["extract", "train", "probe", "retrieve"]
    assert "24 of 24 videos" in printed and printed.splitlines()[-1].startswith(
        "the whole took"
    )

    # The captions that were drawn and the segments that were extracted are the same ones.
    data = load_data(str(toy / "out.npz"))
    with open(toy / "captions.csv", newline="") as file:
        drawn = {(row["video"], float(row["start"])) for row in csv.DictReader(file)}
    names = np.repeat(data.videos, data.lengths)
    assert drawn == set(zip(names.tolist(), data.starts.tolist(), strict=True))
    assert set(data.labels) == {f"{pair}{half}" for pair in "1234" for half in "ab"}

    ranks = json.loads((toy / "retrieve.json").read_text())
    assert ranks["chance"]["R@1"] < ranks["true"]["R@1"]
    assert json.loads((toy / "probe.json").read_text())["classes"] == 8


def test_output_blocks_have_the_form_of_the_output(world):
    """Catches tables in README.md that the scripts no longer print."""
    _, printed = world
    first, ends_with = README.split("```")[1], blocks("## Run it")[1]
    assert forms(ends_with) <= forms(printed)
    assert forms(first.split("rank of the")[1].split("\n", 1)[1]) <= forms(printed)
    assert forms(first.splitlines()[3]) <= forms(printed)


def test_short_commands_chain(world, monkeypatch, capsys):
    """Catches defaults that no longer name the file which the stage before has written."""
    toy, _ = world
    monkeypatch.chdir(toy)
    (toy / "out.npz").unlink()
    (toy / "lvmae.pt").unlink()
    short = {
        "extract": "--model clip",
        "train": "--epochs 1",
        "probe": "--runs 1",
        "retrieve": "",
    }
    commands = re.findall(
        r"^python (\w+)\.py ([^#\n]*)", blocks("## Your own videos")[0], re.M
    )
    assert [script for script, _ in commands] == list(short)
    for script, flags in commands:
        stage = importlib.import_module(script)
        try:
            stage.main(stage.get_args(shlex.split(f"{flags} {short[script]}")))
        except SystemExit as end:  # extract.py ends with one
            assert not end.code
    assert "LV-MAE attentive" in capsys.readouterr().out


def test_ablation_loops(world, monkeypatch):
    """Catches loops in README.md whose commands, files or summary do not fit together."""
    toy, _ = world
    monkeypatch.chdir(toy.parent)
    (block,) = blocks("### The paper's ablations, at desk size", "bash")
    # All commands are written down; the summary at the end is run.
    real = f'if [ "$1" = - ]; then {sys.executable} -; else echo "$@" >> commands; fi'
    subprocess.run(["bash", "-ec", f"python() {{ {real}; }}\n{block}"], check=True)
    commands = [shlex.split(line) for line in Path("commands").read_text().splitlines()]
    assert len(commands) == 3 * (2 + 6 + 2) * 3
    for script, *flags in commands[:3]:
        stage = importlib.import_module(script.removesuffix(".py"))
        stage.main(stage.get_args([*flags, "--epochs", "1"]))
    summary = "python() { %s -; }\npython -%s" % (
        sys.executable,
        block.split("python -")[1],
    )
    done = subprocess.run(
        ["bash", "-ec", summary], check=True, capture_output=True, text=True
    )
    expected = {f"table1-random {head} 1 +- 1 n=1" for head in ("attentive", "linear")}
    assert forms(done.stdout) == expected


def test_pairs_differ_in_order_alone():
    """Catches a world whose recipes the bag of segments can tell apart."""
    recipes = toyworld.make_recipes(np.random.default_rng(0))
    for pair in "1234":
        one, other = recipes[f"{pair}a"], recipes[f"{pair}b"]
        assert sorted(one) == sorted(other) and one != other
    used = [
        step for name, steps in recipes.items() if name.endswith("a") for step in steps
    ]
    assert sorted(used) == sorted(toyworld.OBJECTS)
