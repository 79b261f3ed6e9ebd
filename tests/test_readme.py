"""What README.md says is run or looked up here, so that it cannot drift from the code."""

import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from model import load_data

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = ("extract", "train", "probe", "retrieve")


def where(name):
    """The lines of a function or class, as README.md writes them: model.py:120-135."""
    script, *path = name.split(".")
    thing = importlib.import_module(script)
    for part in path:
        thing = getattr(thing, part)
    lines, first = inspect.getsourcelines(thing)
    return f"{script}.py:{first}-{first + len(lines) - 1}"


def test_map_from_paper_to_code():
    """Catches line numbers in README.md that no longer point to what they name."""
    rows = re.findall(r"\| `([\w.]+)` \| ([\w.:-]*) \|", README)
    assert len(rows) > 10
    assert rows == [(name, where(name)) for name, _ in rows]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    """Catches a --help that fails, or a flag without a word of help."""
    command = [sys.executable, str(ROOT / f"{script}.py"), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for flag in re.findall(r"^  (--[\w-]+)", text, re.M):
        entry = re.search(rf"^  {flag}\b(.*(?:\n {{10,}}.*)*)", text, re.M)[1]
        words = re.sub(r"[A-Z_\[\]{},.|]|\(default.*", "", entry).split()
        assert len(words) >= 2, f"{script}.py {flag}"


def test_every_command_is_understood():
    """Catches commands in README.md and in docstrings with flags that are gone."""
    texts = [README.replace("\\\n", "")]  # continued lines as one
    texts += [importlib.import_module(script).__doc__ for script in SCRIPTS]
    commands = re.findall(
        r"(?:python|\d) (\w+)\.py (.*?)(?:#.*)?$", "\n".join(texts), re.M
    )
    assert {script for script, _ in commands} >= set(SCRIPTS)
    for script, arguments in commands:
        if script in SCRIPTS and "..." not in arguments and "$" not in arguments:
            importlib.import_module(script).get_args(shlex.split(arguments))


def test_continuous_integration_runs_these_lines():
    """Catches a README.md whose install and test line is not the one that is tested."""
    assert "\npip install -r requirements.txt && python -m pytest\n" in README
    assert (
        "pip install -r requirements.txt && python -m pytest"
        in (ROOT / ".ci/run").read_text()
    )


def snippets():
    return re.findall(r"```python\n(.*?)```", README, re.S)


def test_example_of_own_embeddings(tmp_path, monkeypatch):
    """Catches an example that writes what load_data refuses."""
    monkeypatch.chdir(tmp_path)
    exec(snippets()[0], {})
    data = load_data("out.npz")
    assert data.lengths.tolist() == [30, 12] and data.videos == ["a.mp4", "b.mp4"]


def test_example_of_languagebind(tmp_path, monkeypatch):
    """Catches segments in the order of their names (10 before 5), and rows not of unit length."""
    monkeypatch.chdir(tmp_path)
    for video, n in (("one", 13), ("two", 3)):
        for i in range(n):
            folder = tmp_path / "langbind" / video / f"{5 * i}-{5 * i + 5}"
            folder.mkdir(parents=True)
            embedding = torch.eye(16)[i][None] * 3
            part = {"embedding": embedding, "start": 5 * i, "end": 5 * i + 5}
            torch.save(part, folder / "langbind_output.pt")
    exec(snippets()[1], {})
    data = load_data("out.npz")
    assert data.videos == ["one", "two"] and data.lengths.tolist() == [13, 3]
    assert data.starts.tolist() == [5.0 * i for n in (13, 3) for i in range(n)]
    assert np.array_equal(data.embeddings[:13], np.eye(16)[:13])


def test_example_of_captions(tmp_path, monkeypatch):
    """Catches an example whose captions are not those of the segments."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    size = (64, 48)
    fourcc = cv2.VideoWriter_fourcc(*"mp4v")
    writer = cv2.VideoWriter("videos/a.mp4", fourcc, 4, size)
    for i in range(60):
        writer.write(np.full((48, 64, 3), 60 * (1 + i // 20), np.uint8))
    writer.release()
    np.savez("out.npz", embeddings=np.eye(3, 8), lengths=[3], videos=["a.mp4"])
    exec(snippets()[2], {})
    captions = open("captions.csv").read().splitlines()
    assert captions[0] == "video,start,caption" and len(captions) == 4
    for i, line in enumerate(captions[1:]):
        assert line.startswith(f"a.mp4,{5.0 * i},a picture")
        numbers = [
            float(n)
            for n in re.findall(r"[\d.]+(?=[. \]])", line.split("colour of")[1])
        ]
        assert all(abs(n - 60 * (i + 1)) < 15 for n in numbers), line
