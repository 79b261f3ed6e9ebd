"""Properties of the model and the masks (model.py)."""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model import (
    LVMAE,
    MASKS,
    LVMAEConfig,
    check_outputs,
    collate,
    find_seen,
    index_names,
    load_checkpoint,
    load_data,
    number,
    pick_device,
    random_mask,
    read_rank,
    replacing,
    semantic_mask,
    sincos_positions,
)

D, LENGTHS = 24, torch.tensor([2, 9, 32, 9, 5, 20])


def make_model(**changes):
    sizes = dict(
        dim=D, depth=2, heads=4, decoder_dim=16, decoder_depth=2, decoder_heads=2
    )
    torch.manual_seed(0)
    model = LVMAE(LVMAEConfig(**sizes | dict(max_segments=32) | changes)).double()
    for p in (
        model.parameters()
    ):  # biases start at zero, where a forgotten one would not show
        torch.nn.init.normal_(p, std=0.2)
    return model


def make_batch(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(
        len(lengths), int(lengths.max()), D, generator=generator, dtype=torch.double
    )
    is_segment = torch.arange(x.shape[1]) < lengths[:, None]
    return F.normalize(x, dim=2) * is_segment[..., None]


# ---- An independent reference: one video at a time, nothing padded, formulas written out --------


def reference_block(block, x, heads):
    h = F.layer_norm(x, x.shape[1:], block.norm1.weight, block.norm1.bias, 1e-6)
    q, k, v = (h @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, dim=1)
    size, outs = x.shape[1] // heads, []
    for i in range(heads):
        part = slice(i * size, (i + 1) * size)
        attention = (q[:, part] @ k[:, part].T / size**0.5).softmax(dim=1)
        outs.append(attention @ v[:, part])
    x = x + torch.cat(outs, dim=1) @ block.attn.proj.weight.T + block.attn.proj.bias
    h = F.layer_norm(x, x.shape[1:], block.norm2.weight, block.norm2.bias, 1e-6)
    h = F.gelu(h @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
    return x + h @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


def reference_position(i, dim):
    angles = [i / 10000 ** (2 * j / dim) for j in range(dim // 2)]
    return torch.tensor([np.sin(a) for a in angles] + [np.cos(a) for a in angles])


def reference(model, embeddings, lengths, is_masked):
    config, scale = model.config, model.input_scale
    latents, predictions, distances = [], [], []
    for video, n, masked in zip(embeddings, lengths.tolist(), is_masked, strict=True):
        visible = [i for i in range(n) if not masked[i]]
        tokens = [model.cls_token[0, 0]]
        tokens += [
            video[i] * scale + reference_position(i, config.dim) for i in visible
        ]
        x = torch.stack(tokens)
        for block in model.blocks:
            x = reference_block(block, x, config.heads)
        x = F.layer_norm(x, x.shape[1:], model.norm.weight, model.norm.bias, 1e-6)
        latents.append(x)
        z = x @ model.decoder_embed.weight.T + model.decoder_embed.bias
        tokens = [z[0]]
        for i in range(n):
            token = z[1 + visible.index(i)] if i in visible else model.mask_token[0, 0]
            tokens.append(token + reference_position(i, config.decoder_dim))
        x = torch.stack(tokens)
        for block in model.decoder_blocks:
            x = reference_block(block, x, config.decoder_heads)
        norm = model.decoder_norm
        x = F.layer_norm(x, x.shape[1:], norm.weight, norm.bias, 1e-6)
        x = (x @ model.decoder_pred.weight.T + model.decoder_pred.bias)[1:] / scale
        predictions.append(x)
        distances += [((x[i] - video[i]) ** 2).sum() for i in range(n) if masked[i]]
    return sum(distances) / len(distances), latents, predictions


@pytest.mark.parametrize("input_scale", [None, 1.0])
@pytest.mark.parametrize(
    "lengths", [LENGTHS, torch.tensor([8, 8, 8])], ids=["ragged", "equal"]
)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_equals_reference_forward_and_gradients(lengths, mask, input_scale):
    """Catches errors of packing, grouping, key masks, positions, scale, loss and gradients."""
    model, embeddings = make_model(input_scale=input_scale), make_batch(lengths)
    is_masked = mask(embeddings, lengths, 0.5, torch.Generator().manual_seed(1))
    loss, predictions = model(embeddings, lengths, is_masked)
    expected_loss, expected_latents, expected = reference(
        model, embeddings, lengths, is_masked
    )
    torch.testing.assert_close(loss, expected_loss)
    latents = model.encode(embeddings, lengths, is_masked)
    for b, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(predictions[b, :n], expected[b])
        assert not predictions[b, n:].any()
        is_visible = ~is_masked[b, :n]
        torch.testing.assert_close(latents[b, 0], expected_latents[b][0])
        torch.testing.assert_close(
            latents[b, 1 : n + 1][is_visible], expected_latents[b][1:]
        )
        assert (
            not latents[b, 1 : n + 1][~is_visible].any()
            and not latents[b, n + 1 :].any()
        )
    parameters = dict(model.named_parameters())
    ours = torch.autograd.grad(loss, parameters.values())
    theirs = torch.autograd.grad(expected_loss, parameters.values())
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_nothing_of_a_masked_embedding_reaches_the_model():
    """Catches a masked embedding that leaks into the latents or the predictions."""
    model, embeddings = make_model(), make_batch()
    is_masked = random_mask(embeddings, LENGTHS, 0.5)
    changed = torch.where(is_masked[..., None], 7.0, embeddings)
    assert torch.equal(
        model.encode(embeddings, LENGTHS, is_masked),
        model.encode(changed, LENGTHS, is_masked),
    )
    assert torch.equal(
        model(embeddings, LENGTHS, is_masked)[1], model(changed, LENGTHS, is_masked)[1]
    )


def test_every_visible_segment_is_seen():
    """Catches a key mask that is one short, so that the last segment is never attended to."""
    model, embeddings = make_model(), make_batch()
    for b, n in enumerate(LENGTHS.tolist()):
        for i in range(n):
            changed = embeddings.clone()
            changed[b, i] *= -1
            before, after = (
                model.encode(x, LENGTHS)[b, 0] for x in (embeddings, changed)
            )
            assert (before - after).abs().max() > 1e-4, (b, i)


def test_padding_and_neighbours_change_nothing():
    """Catches a video whose latents depend on the padding or on the rest of the batch."""
    model, embeddings = make_model(), make_batch()
    latents = model.encode(embeddings, LENGTHS)
    wide = F.pad(embeddings, (0, 0, 0, 11), value=3.0)
    torch.testing.assert_close(model.encode(wide, LENGTHS)[:, :33], latents)
    order = torch.tensor([3, 0, 5])
    torch.testing.assert_close(
        model.encode(embeddings[order], LENGTHS[order]), latents[order]
    )


def test_longer_than_max_segments_follows_the_formula():
    """Catches positions that end at the buffer: a film of 90 minutes has 1,080 segments."""
    lengths = torch.tensor([1080])
    embeddings = make_batch(lengths)
    short, long = make_model(max_segments=32), make_model(max_segments=1080)
    torch.testing.assert_close(
        short.encode(embeddings, lengths), long.encode(embeddings, lengths)
    )
    last = sincos_positions(1080, D)[0, 1080].double()
    torch.testing.assert_close(last, reference_position(1079, D), atol=1e-6, rtol=0)


def test_names_and_shapes_are_those_of_mae():
    """Catches a renamed parameter: a state dict of the authors' release must load strictly."""
    block = {
        "norm1.weight": 1, "norm1.bias": 1, "attn.qkv.weight": 2, "attn.qkv.bias": 1,
        "attn.proj.weight": 2, "attn.proj.bias": 1, "norm2.weight": 1, "norm2.bias": 1,
        "mlp.fc1.weight": 2, "mlp.fc1.bias": 1, "mlp.fc2.weight": 2, "mlp.fc2.bias": 1,
    }  # fmt: skip
    expected = {"cls_token": 3, "mask_token": 3, "pos_embed": 3, "decoder_pos_embed": 3}
    for name in ("norm", "decoder_norm"):
        expected |= {f"{name}.weight": 1, f"{name}.bias": 1}
    for name in ("decoder_embed", "decoder_pred"):
        expected |= {f"{name}.weight": 2, f"{name}.bias": 1}
    for i in range(2):
        expected |= {f"blocks.{i}.{name}": ndim for name, ndim in block.items()}
        expected |= {f"decoder_blocks.{i}.{name}": ndim for name, ndim in block.items()}
    state = make_model().state_dict()
    assert {name: tensor.ndim for name, tensor in state.items()} == expected
    assert state["pos_embed"].shape == (1, 33, D) and not state["pos_embed"][0, 0].any()
    assert state["decoder_pos_embed"].shape == (1, 33, 16)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("ratio", [0.01, 0.4, 0.5, 0.75, 0.99])
def test_number_of_masked_segments(mask, ratio):
    """Catches a count off by one from float error, masked padding, nothing masked or visible."""
    lengths = torch.arange(2, 101)
    embeddings = make_batch(lengths)
    is_masked = mask(embeddings, lengths, ratio)
    expected = [min(max(round(ratio * n), 1), n - 1) for n in lengths.tolist()]
    assert is_masked.sum(1).tolist() == expected
    assert not is_masked[torch.arange(100) >= lengths[:, None]].any()


def test_random_mask_is_uniform_and_repeatable():
    """Catches a random mask that prefers some places, or ignores its generator."""
    lengths = torch.full((2000,), 10)
    embeddings = torch.zeros(2000, 10, 1)
    is_masked, again = (
        random_mask(embeddings, lengths, 0.4, torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert torch.equal(is_masked, again)
    share = is_masked.float().mean(0)
    assert (share - 0.4).abs().max() < 0.05


def test_semantic_mask_by_hand():
    """Catches semantic masking reversed: what differs from the segment before is masked."""
    a, b = torch.eye(D)[:2]
    near = F.normalize(a + 0.1 * b, dim=0)
    videos = [[a, a, b, b, a, near], [a, b, b, b, b, b], [b, a]]
    lengths = torch.tensor([6, 6, 2])
    x = torch.stack([F.pad(torch.stack(v), (0, 0, 0, 6 - len(v))) for v in videos])
    expected = [[0, 0, 1, 0, 1, 1], [0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0]]
    assert semantic_mask(x, lengths, 0.5).int().tolist() == expected


def test_config_refuses_widths_that_heads_do_not_divide():
    """Catches heads that do not fit, and odd widths, whose positions are one short."""
    for changes in (dict(heads=5), dict(decoder_heads=3), dict(dim=27, heads=3)):
        with pytest.raises(ValueError, match="must be even, divisible"):
            make_model(**changes)


# ---- What the scripts share ---------------------------------------------------------


def write_npz(path, **changes):
    embeddings = F.normalize(torch.randn(7, D), dim=1).half().numpy()
    arrays = dict(
        embeddings=embeddings, lengths=np.array([3, 4]), videos=np.array(["a", "b"])
    )
    arrays |= changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return str(path)


def test_load_and_collate(tmp_path):
    """Catches rows that go to the wrong video, and optional keys that are not optional."""
    path = write_npz(tmp_path / "x.npz")
    rows = torch.from_numpy(np.load(path)["embeddings"])
    data = load_data(path)
    batch, lengths = collate(data.embeddings)
    assert lengths.tolist() == [3, 4] and batch.dtype == torch.float32
    assert torch.equal(batch[0, :3], rows[:3].float()) and not batch[0, 3].any()
    assert torch.equal(batch[1], rows[3:].float())
    assert torch.cat(data.starts).tolist() == [0, 5, 10, 0, 5, 10, 15]
    assert data.labels == ["", ""] and data.meta == {}
    data = load_data(write_npz(path, meta=np.array('{"segment_seconds": 2}')))
    assert torch.cat(data.starts).tolist() == [0, 2, 4, 0, 2, 4, 6]


def test_unknown_arrays_are_not_read(tmp_path, monkeypatch):
    """Catches a reader that loads arrays it does not know, nine times the memory."""
    path = write_npz(tmp_path / "x.npz", frames=np.zeros((7, 8, D)))
    read = []
    get = np.lib.npyio.NpzFile.__getitem__

    def spy(file, key):
        read.append(key)
        return get(file, key)

    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", spy)
    load_data(path)
    assert "embeddings" in read and "frames" not in read


ZERO_ROW = np.pad(np.eye(6, D), ((0, 1), (0, 0)))
NAN_ROW = np.where(np.arange(7)[:, None] == 4, np.nan, np.eye(7, D))
HUGE = np.array([2**63 - 1, 2**63 - 1, 9])  # in 64 bits these sum to 7


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(embeddings=None), "KeyError..embeddings"),
        (dict(lengths=None), "KeyError..lengths"),
        (dict(videos=None), "KeyError..videos"),
        (dict(embeddings=np.eye(7, D)[0]), "expected an npz with embeddings .S, D"),
        (dict(embeddings=np.eye(7, D).astype(int)), "embeddings: .*int64"),
        (dict(embeddings=ZERO_ROW), "embeddings: row 6 has a length of 0, expected 1"),
        (dict(embeddings=NAN_ROW), "embeddings: row 4 has a length of nan"),
        (dict(embeddings=2 * np.eye(7, D)), "embeddings: row 0 has a length of 2"),
        (dict(embeddings=1e30 * np.eye(7, D)), "embeddings: row 0 has a length of"),
        (dict(lengths=np.array([3, 5])), "lengths: sum 8.*expected sum 7"),
        (dict(lengths=np.array([0, 7])), "lengths: .*smallest 0"),
        (dict(lengths=np.array([3.0, 4.0])), "lengths: float64"),
        (dict(lengths=HUGE, videos=np.array(["a", "b", "c"])), "lengths: sum"),
        (dict(videos=np.array(["a"])), r"videos: <U1 \(1,\)"),
        (dict(videos=np.array(["a", "a"])), "videos: a name is empty or there twice"),
        (dict(videos=np.array(["a", ""])), "videos: a name is empty or there twice"),
        (dict(videos=np.array(["a", "b"], dtype=object)), "Object arrays"),
        (dict(starts=np.zeros(3)), "starts: expected 7 finite seconds"),
        (dict(starts=np.full(7, np.nan)), "starts: expected 7 finite seconds"),
        (dict(starts=np.array([0, 10, 5, 0, 5, 10, 15])), "starts: those of a are not"),
        (dict(starts=np.full(7, 1e300)), "starts: expected 7 finite seconds"),
        (dict(starts=np.full(7, "0")), "found .*expected an npz"),
        (dict(labels=np.array(["a"])), r"labels: <U1 \(1,\)"),
        (dict(meta=np.array("{broken")), "JSON"),
        (dict(meta=np.array("null")), "JSON"),
        (dict(meta=np.array('{"segment_seconds": -1}')), "segment_seconds is -1"),
        (dict(meta=np.array('{"segment_seconds": "x"}')), "found ValueError"),
    ],
)
def test_broken_npz_is_refused(tmp_path, changes, message):
    """Catches a broken file that is read in silence: each rule of the format has its error."""
    path = write_npz(tmp_path / "broken.npz", **changes)
    with pytest.raises(SystemExit, match=f"broken.npz: .*{message}") as error:
        load_data(path)
    assert "\n" not in str(error.value)


def test_seen_from_another_folder():
    """Catches a test video of the pre-training that passes for new by a shorter path."""
    trained_on = ["train/a/1.mp4", "2.mp4"]
    tested = ["a/1.mp4", "x/2.mp4", "b/1.mp4", "12.mp4"]
    assert find_seen(tested, trained_on) == {"a/1.mp4", "x/2.mp4"}


def test_more_processes_than_gpus(monkeypatch):
    """Catches a second process on one GPU, or on the CPU, that dies of its LOCAL_RANK."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pick_device("auto") == torch.device("cuda") and chosen == [1]
    assert pick_device("cpu") == torch.device("cpu") and chosen == [1]


def flip_a_bit(path):
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_files_that_are_no_npz(tmp_path):
    """Catches a traceback, or wrong numbers, where a file is missing, cut or damaged."""
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").write_text("")
    with open(tmp_path / "array.npz", "wb") as file:
        np.save(file, np.eye(3))  # one array alone, as in a .npy
    whole = Path(write_npz(tmp_path / "flipped.npz")).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    flip_a_bit(tmp_path / "flipped.npz")
    renamed = whole.replace(b"videos.npy", b"wideos.npy", 1)  # not in the directory
    (tmp_path / "renamed.npz").write_bytes(renamed)
    gone = bytearray(whole)
    gone[whole.rfind(b"videos.npy")] ^= 1  # in the directory alone
    (tmp_path / "gone.npz").write_bytes(gone)
    names = ("missing", "text", "empty", "array", "cut", "flipped", "renamed", "gone")
    for name in names:
        with pytest.raises(
            SystemExit, match=f"{name}.npz: (found .*expected an|damaged)"
        ):
            load_data(str(tmp_path / f"{name}.npz"))


def write_checkpoint(path, model, **changes):
    config = vars(model.config) | changes.pop("config", {})
    torch.save({"model": model.state_dict(), "config": config, **changes}, path)


def test_checkpoint_that_does_not_fit(tmp_path, capsys):
    """Catches a checkpoint of other shapes, damaged, not finite, or of other code."""
    data = load_data(write_npz(tmp_path / "x.npz"))
    path = tmp_path / "m.pt"
    model = make_model().float()

    def error_of_loading():
        with pytest.raises(SystemExit) as error:
            load_checkpoint(str(path), data, torch.device("cpu"))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "m.pt: found FileNotFound" in error_of_loading()
    torch.save({"model": {}}, path)
    assert "expected a checkpoint" in error_of_loading()
    path.write_text("{}")
    assert "expected a checkpoint" in error_of_loading()
    write_checkpoint(path, model, config={"loss": "cosine"})
    assert "keyword argument 'loss'" in error_of_loading()
    write_checkpoint(path, model, config={"depth": 3})
    assert "expected a checkpoint" in error_of_loading()
    write_checkpoint(path, make_model(dim=16).float())
    assert "for embeddings of 16, " in error_of_loading()
    write_checkpoint(path, model)
    load_checkpoint(str(path), data, torch.device("cpu"))
    flip_a_bit(path)
    assert "m.pt" in error_of_loading()
    torch.nn.init.constant_(model.norm.bias, float("nan"))
    write_checkpoint(path, model)
    assert "norm.bias is not finite" in error_of_loading()


def test_another_encoder_is_said(tmp_path, capsys):
    """Catches a checkpoint used in silence with embeddings of another encoder."""
    encoder = {"model": "A", "segment_seconds": 5}
    write_checkpoint(tmp_path / "m.pt", make_model().float(), encoder=encoder)
    others = {
        "m.pt: model A, but": {"model": "B"},
        "m.pt: segment_seconds 5, but": {"model": "A", "segment_seconds": 60},
        "": {"model": "A", "frames_per_segment": 8},
    }
    for words, meta in others.items():
        meta = np.array(json.dumps(meta))
        data = load_data(write_npz(tmp_path / "x.npz", meta=meta))
        load_checkpoint(str(tmp_path / "m.pt"), data, torch.device("cpu"))
        said = capsys.readouterr().err
        assert words in said and bool(said) == bool(words)


def test_numbers_of_flags():
    """Catches NaN, infinity or a value out of range that passes as a flag."""
    share = number(float, 0, 0.9)
    assert share("0.5") == 0.5 and number(int, 1)("3") == 3
    for text in ("nan", "inf", "-0.1", "0.91"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text}: expected 0 to"):
            share(text)
    with pytest.raises(argparse.ArgumentTypeError):
        number(float, 0)("inf")


def test_outputs_are_checked(tmp_path):
    """Catches an output that replaces an input or a device, or fails after the work."""
    (tmp_path / "in.npz").touch()
    (tmp_path / "link.npz").symlink_to(tmp_path / "in.npz")
    (tmp_path / "file").touch()
    (tmp_path / "text.npz").write_text("mine")
    (tmp_path / "folder.npz").mkdir()
    os.mkfifo(tmp_path / "pipe.npz")
    inputs = [str(tmp_path / "in.npz")]
    wrong = {
        "in.npz": "would replace an input",
        "link.npz": "would replace an input",
        "text.npz": "no .npz file",
        "folder.npz": "no regular file",
        "pipe.npz": "no regular file",
        "file/x.npz": "cannot be written",
        "x.pt": "ends in .npz",
        "x" * 249 + ".npz": "cannot be written",
    }
    for name, words in wrong.items():
        with pytest.raises(SystemExit, match=words):
            check_outputs({str(tmp_path / name): ".npz"}, inputs)
    check_outputs({str(tmp_path / "new" / "x.npz"): ".npz"}, inputs)


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_replacing_leaves_all_or_nothing(tmp_path, error):
    """Catches a full disk or Ctrl-C that costs the old file, or leaves half a new one."""
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        with replacing(str(path)) as file:
            file.write(b"half of")
            raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.json"]
    with replacing(str(path)) as file:
        file.write(b"new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["x.json"]


def test_ranks_that_make_no_sense(monkeypatch):
    """Catches a wrong RANK or WORLD_SIZE that takes no video, or the same as another."""
    for rank, world in (("2", "2"), ("-1", "2"), ("a", "2"), ("0", "0"), ("0", "")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(SystemExit, match="RANK"):
            read_rank()
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert read_rank() == (3, 4)


def test_names_with_and_without_folder_and_ending():
    """Catches a name that finds no video, or only the first of two."""
    index = index_names(["a/one.x.mp4", "two.mp4", "b/two.avi"])
    expected = {"a/one.x.mp4": [0], "one.x": [0], "a/one.x": [0], "two": [1, 2]}
    for name, found in (expected | {"b/two": [2], "two.avi": [2]}).items():
        assert index[name] == found
