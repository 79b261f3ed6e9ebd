"""Tests of paper_tables.py: label files as published, results that are what they say."""

import json
import math
from pathlib import Path

import numpy as np
import paper_tables
import pytest
import torch

from model import LVMAE, LVMAEConfig

HEADER = "class_id class_name youtube_id imdb_id\n"


def write_npz(path, videos, meta=None):
    """Made-up embeddings of these videos."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2 * len(videos), 16))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.savez(
        path,
        embeddings=rows.astype(np.float16),
        lengths=np.full(len(videos), 2),
        videos=np.array(videos),
        meta=np.array(json.dumps(meta or {})),
    )


def write_checkpoint(path, depth=1, **more):
    """A tiny untrained LV-MAE, as train.py saves it."""
    torch.manual_seed(0)
    config = LVMAEConfig(
        dim=16, depth=depth, heads=2, decoder_dim=8, decoder_depth=1, decoder_heads=2
    )
    state = LVMAE(config).state_dict()
    torch.save({"model": state, "config": vars(config), **more}, path)


def write_lvu(folder, task, header, line, n=12):
    """A task of LVU with n videos a split; `line` makes the fields of the i-th."""
    (folder / task).mkdir(parents=True)
    for part, split in enumerate(("train", "val", "test")):
        lines = [line(i) for i in range(part * n, (part + 1) * n)]
        (folder / task / f"{split}.csv").write_text(header + "".join(lines))


def write_world(folder):
    """Two tasks of LVU, Breakfast and COIN, embeddings in two files, a checkpoint."""
    genre = lambda i: f"{i % 2} {'ab'[i % 2]} id{i} tt{i}\n"  # noqa: E731
    write_lvu(folder / "lvu", "genre", HEADER, genre)
    likes = lambda i: f"{i + 1} 10 id{i} tt{i}\n"  # noqa: E731
    header = "like_count dislike_count youtube_id imdb_id\n"
    write_lvu(folder / "lvu", "like_ratio", header, likes)
    movies = [f"lvu/id{i}.mp4" for i in range(35)]  # one is gone
    persons = [*range(3, 23), *range(47, 55)]
    dishes = ["tea", "milk"]
    cooking = [f"P{p:02}_cam01_P{p:02}_{dishes[p % 2]}.avi" for p in persons]
    write_npz(folder / "movies.npz", movies)
    coin = {}
    for i in range(40):
        subset = ["training", "testing"][i // 30]
        coin[f"-c{i}"] = {"class": "xy"[i % 2], "subset": subset}
    (folder / "COIN.json").write_text(json.dumps({"database": coin}))
    write_npz(folder / "others.npz", [*cooking, *(f"{name}.mp4" for name in coin)])
    write_checkpoint(folder / "a.pt", args={"mask": "semantic"}, videos=movies[:30])


def run_tables(*flags):
    """Run paper_tables.py in this process, in the present folder."""
    paper_tables.main(*paper_tables.get_args([*map(str, flags)]))


# ---- Label files -----------------------------------------------------------------------


def test_lvu_classes(tmp_path):
    """Catches ids that begin with '-' or the class named \\N being lost, mixed splits."""
    folder = tmp_path / "writer"
    folder.mkdir()
    (folder / "train.csv").write_text(HEADER + "0 \\N -a_b tt1\n1 nm0001220 --c tt2\n")
    (folder / "val.csv").write_text(HEADER + "0 \\N -D3 tt3\n")
    (folder / "test.csv").write_text(HEADER + "1 nm0001220 0E tt4\n")
    assert paper_tables.read_lvu(folder) == [
        ("-a_b", "\\N", "train"),
        ("--c", "nm0001220", "train"),
        ("-D3", "\\N", "val"),
        ("0E", "nm0001220", "test"),
    ]


def test_lvu_numbers(tmp_path):
    """Catches raw counts: likes are 10 * like / (like + dislike), views are logarithms."""
    header = "like_count dislike_count youtube_id imdb_id\n"
    write_lvu(tmp_path, "like_ratio", header, lambda i: f"30 10 x{i} tt\n", n=1)
    rows = paper_tables.read_lvu(tmp_path / "like_ratio")
    assert rows[0] == ("x0", 7.5, "train")
    header = "view_count youtube_id imdb_id\n"
    write_lvu(tmp_path, "view_count", header, lambda i: f"1000 -y{i} tt\n", n=1)
    rows = paper_tables.read_lvu(tmp_path / "view_count")
    assert rows[2] == ("-y2", math.log(1000), "test")


@pytest.mark.parametrize("separator", "_-/")
def test_breakfast_files(tmp_path, separator):
    """Catches ids with '-' that miss files named with '_', '-' or in folders."""
    header = "file_name,duration,action,class_id\n"
    (tmp_path / "train.csv").write_text(header + "P03-cam01-P03_tea,56,tea,2\n")
    (tmp_path / "test.csv").write_text(header + "P47-stereo-P47_milk_ch0,56,milk,8\n")
    videos = ["P03*cam01*P03_tea.avi", "set/P47*stereo*P47_milk_ch0.avi"]
    videos = [video.replace("*", separator) for video in videos]
    rows = paper_tables.read_breakfast(tmp_path, videos)
    assert rows == [(videos[0], "tea", "train"), (videos[1], "milk", "test")]


def test_breakfast_names():
    """Catches a wrong published test (persons 47 to 54), a stereo pair that counts twice."""
    videos = [
        "P03_cam01_P03_friedegg.avi",
        "P47_webcam02_P47_tea.avi",
        "holiday.avi",
        "P47/stereo/P47_milk_ch0.avi",
        "P47/stereo/P47_milk_ch1.avi",
        "P46-cam01-P46_tea.avi",
    ]
    assert paper_tables.read_breakfast_names(videos) == [
        (videos[0], "friedegg", "train"),
        (videos[1], "tea", "test"),
        (videos[3], "milk", "test"),
        (videos[5], "tea", "train"),
    ]


def test_coin_json(tmp_path):
    """Catches COIN's subsets, called training and testing, taken for other splits."""
    train = {"class": "Boil", "subset": "training"}
    test = {"class": "Cut", "subset": "testing"}
    path = tmp_path / "COIN.json"
    path.write_text(json.dumps({"database": {"abc": train, "-d": test}}))
    assert paper_tables.read_coin(path) == [
        ("abc", "Boil", "train"),
        ("-d", "Cut", "test"),
    ]


@pytest.mark.parametrize(
    "task, text",
    [
        ("coin", "[1]"),
        ("coin", '{"database": {"1": {"class": "x", "subset": "validation"}}}'),
        ("coin", '{"database": {"1": {"class": ["x"], "subset": "testing"}}}'),
        ("coin", '{"database": {"1": {"class": NaN, "subset": "testing"}}}'),
        ("like_ratio", "like_count dislike_count youtube_id\n0 0 x\n"),
        ("view_count", "view_count youtube_id\nmany x\n"),
        ("genre", "class,video\na,x\n"),
    ],
)
def test_foreign_files_end_in_one_line(tmp_path, task, text):
    """Catches labels read from a file of another form, or a traceback."""
    source = tmp_path / task
    if task == "coin":
        source.write_text(text)
    else:
        source.mkdir()
        for split in ("train", "val", "test"):
            (source / f"{split}.csv").write_text(text)
    with pytest.raises(SystemExit) as error:
        paper_tables.read_task(task, source, [])
    assert str(source) in str(error.value) and "\n" not in str(error.value)


def test_published_names_find_one_video():
    """Catches a label for the wrong one of two videos of one name."""
    rows = [("x", "L", "train"), ("y", "L", "test")]
    found, absent = paper_tables.match(rows, ["a/x.mp4", "b/z.mp4"], "labels")
    assert found == [("a/x.mp4", "L", "train")] and absent == [("y", "L", "test")]
    with pytest.raises(SystemExit, match="x may be"):
        paper_tables.match(rows, ["a/x.mp4", "b/x.mp4"], "labels")


# ---- The whole -------------------------------------------------------------------------


def test_paper_figures_are_whole():
    """Catches a figure of the paper that was lost in copying: averages must agree."""
    for table in (paper_tables.TABLE_1, paper_tables.TABLE_8):
        for line in table.strip().splitlines():
            figures = [float(figure) for figure in line.split("|")[1].split()]
            assert sum(figures[:7]) / 7 == pytest.approx(figures[7], abs=0.06), line


def test_tables_in_one_command(tmp_path, monkeypatch, capfd):
    """Catches tasks that fail, counts or figures in the wrong place, work done twice."""
    monkeypatch.chdir(tmp_path)
    write_world(tmp_path)
    flags = ["--lvu", "lvu", "--breakfast", "--coin", "COIN.json"]
    flags += ["--data", "movies.npz", "others.npz"]

    run_tables(*flags, "--list-held-out", "held.txt")
    held_out = set(Path("held.txt").read_text().splitlines())
    expected = {f"lvu/id{i}.mp4" for i in range(12, 35)} | {"id35"}
    assert {name for name in held_out if "id" in name} == expected
    assert "P47_cam01_P47_milk.avi" in held_out and "-c30.mp4" in held_out
    assert "P03_cam01_P03_milk.avi" not in held_out and "-c29.mp4" not in held_out

    flags += ["--ckpt", "a.pt", "--runs", "1", "--epochs", "1", "--device", "cpu"]
    run_tables(*flags)
    printed = capfd.readouterr().out
    assert "genre: 35 videos found of 36 published" in printed
    text = Path("tables/tables.md").read_text()
    assert text in printed
    (result,) = Path("tables").glob("genre.a.*.json")
    mean = json.loads(result.read_text())["rows"]["LV-MAE attentive"]["mean"]
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    row = [row for row in rows if row[1:2] == ["LV-MAE attentive (a.pt)"]][0]
    assert row[3] == f"{mean:.2f} ± 0.00" and row[2] == row[9] == "-"
    assert float(row[10].split()[0]) > 0
    for table in ("1", "2", "3", "4", "8"):
        assert f"### Table {table}:" in text
    assert "35 of 36" in text and "28 of 28" in text and "40 of 40" in text
    assert "linear, semantic masks (a.pt)" in text and "depth 1 (a.pt)" in text
    assert "- a.pt, genre: 6 of 11" in text

    files = {path: path.stat().st_mtime_ns for path in Path("tables").glob("*.json")}
    assert len(files) == 4
    run_tables(*flags)
    for path, time in files.items():
        assert path.stat().st_mtime_ns == time
    assert Path("tables/tables.md").read_text() == text


def test_result_of_something_else_is_not_taken(tmp_path, monkeypatch):
    """Catches figures of another checkpoint, data, labels or flags under the same name."""
    monkeypatch.chdir(tmp_path)
    made = []

    def run(command, **kwargs):
        made.append(command)
        Path(command[-1]).write_text(json.dumps({"rows": {}}))
        return paper_tables.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(paper_tables.subprocess, "run", run)
    files = {"--labels": "l.csv", "--data": "d.npz", "--ckpt": "c.pt"}
    for path in files.values():
        Path(path).write_text("1")
    flags = ["--runs", "1"]
    for expected in (1, 1):
        paper_tables.run_probe(files, flags, tmp_path)
        assert len(made) == expected
    for expected, path in enumerate(files.values(), start=2):
        Path(path).write_text("2")
        paper_tables.run_probe(files, flags, tmp_path)
        assert len(made) == expected
    paper_tables.run_probe(files, ["--runs", "2"], tmp_path)
    assert len(made) == 5 and len(list(tmp_path.glob("l.c.*.json"))) == 5


def test_one_failing_task_does_not_stop_the_others(tmp_path, monkeypatch, capfd):
    """Catches a night of probing lost to one task, or a '-' that nobody mentions."""
    monkeypatch.chdir(tmp_path)
    write_world(tmp_path)
    coin = json.loads(Path("COIN.json").read_text())
    for entry in coin["database"].values():
        entry["class"] = "all the same"
    Path("COIN.json").write_text(json.dumps(coin))
    flags = ["--breakfast", "--coin", "COIN.json", "--data", "others.npz"]
    flags += ["--ckpt", "a.pt", "--runs", "1", "--epochs", "1", "--device", "cpu"]
    with pytest.raises(SystemExit, match="1 results are missing"):
        run_tables(*flags)
    assert "coin: probe.py has failed" in capfd.readouterr().out
    assert "| LV-MAE attentive (a.pt) |" in Path("tables/tables.md").read_text()


def test_a_head_that_fails_is_counted(tmp_path, monkeypatch):
    """Catches a '-' in the tables, beside rows of the same task, that passes for done."""
    calls = iter([{"rows": {"a": 1}}, {"rows": {"b": 1}}, None])
    monkeypatch.setattr(paper_tables, "run_probe", lambda *_: next(calls))
    tasks = ["breakfast"]
    _, n_failed = paper_tables.probe_all(tasks, "d.npz", ["a", "b"], [], tmp_path)
    assert n_failed == 1


def test_encoders_are_not_mixed(tmp_path, monkeypatch):
    """Catches one data set out of the embeddings of two encoders."""
    monkeypatch.chdir(tmp_path)
    write_world(tmp_path)
    write_npz("others.npz", ["P03_cam01_P03_tea.avi"], meta={"model": "another"})
    flags = ["--lvu", "lvu", "--data", "movies.npz", "others.npz", "--ckpt", "a.pt"]
    with pytest.raises(SystemExit, match="of different encoders"):
        run_tables(*flags)


def test_inputs_are_not_replaced(tmp_path, monkeypatch):
    """Catches a list of names written over the data or the labels."""
    monkeypatch.chdir(tmp_path)
    write_world(tmp_path)
    before = Path("COIN.json").read_bytes()
    with pytest.raises(SystemExit):
        run_tables("--coin", "COIN.json", "--list-held-out", "COIN.json")
    assert Path("COIN.json").read_bytes() == before
