"""Checkpoints: what is saved comes back bit for bit; all else is refused in one line, and nothing is executed."""

from __future__ import annotations

import os
import pickle

import pytest
import safetensors.torch
import torch
from hypothesis import given, strategies as st
from support import tiny
from support.errors import nothing_or_one_line, one_line

from stca.errors import CheckpointError
from stca.export.reference.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

CONFIG = tiny.config(time="delta")
TENSORS = tiny.module(CONFIG).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def changed(**tensors):
    return Checkpoint(CONFIG, {**TENSORS, **tensors})


def test_save_and_load(tmp_path):
    file = tmp_path / "c.safetensors"
    save_checkpoint(file, tiny.module(CONFIG), {"auc": "0.75"})
    loaded = load_checkpoint(file)
    assert loaded.config == CONFIG
    assert same(loaded.tensors, TENSORS)
    assert loaded.metadata["auc"] == "0.75"
    for form in ("projected", "absorbed"):
        assert same(loaded.build(form).state_dict(), TENSORS)
        assert not loaded.build(form).training
    assert os.listdir(tmp_path) == ["c.safetensors"]


def test_saving_keeps_the_models_own_config_whatever_the_metadata_says(tmp_path):
    """Metadata taken over from an older checkpoint has that one's config in it."""
    file = tmp_path / "c.safetensors"
    save_checkpoint(file, tiny.module(CONFIG), {"stca.config": tiny.config(layers=1).to_json()})
    assert load_checkpoint(file).config == CONFIG


def test_a_failed_save_leaves_what_was_there(tmp_path):
    file = tmp_path / "c.safetensors"
    save_checkpoint(file, tiny.module(CONFIG))
    before = tiny.contents(tmp_path)
    with pytest.raises(Exception, match="str"):
        save_checkpoint(file, tiny.module(CONFIG), {"not a string": 3})
    assert tiny.contents(tmp_path) == before


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_config_in_a_json_beside(tmp_path, suffix):
    file = tmp_path / f"c.{suffix}"
    if suffix == "pt":
        torch.save(TENSORS, file)
    else:
        safetensors.torch.save_file(TENSORS, file)
    with one_line(CheckpointError, "c.json", "config"):
        load_checkpoint(file)
    (tmp_path / "c.json").write_text(CONFIG.to_json())
    loaded = load_checkpoint(file)
    assert loaded.config == CONFIG
    assert same(loaded.build().state_dict(), TENSORS)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_what_training_loops_save(tmp_path, key, prefix):
    file = tmp_path / "c.ckpt"
    named = {prefix + n: t for n, t in TENSORS.items()}
    torch.save({"epoch": 3, key: named, "optimizer_states": [{"lr": 0.1}]}, file)
    (tmp_path / "c.json").write_text(CONFIG.to_json())
    assert same(load_checkpoint(file).build().state_dict(), TENSORS)


def test_the_checkpoint_of_another_model_is_shown_its_way(tmp_path):
    torch.save({"state_dict": {"w": torch.zeros(2)}}, tmp_path / "c.ckpt")
    with one_line(CheckpointError, "c.json", "--model"):
        load_checkpoint(tmp_path / "c.ckpt")


@pytest.mark.parametrize(
    ("json_bytes", "words"),
    [
        (b"", ("JSON",)),
        (b"{}", ("'items'",)),
        (b'{"items": 9, "n_heads": 3}', ("'n_heads'",)),
        (b"\xff\xfe", ("c.json",)),
    ],
)
def test_a_bad_json_beside(tmp_path, json_bytes, words):
    torch.save(TENSORS, tmp_path / "c.pt")
    (tmp_path / "c.json").write_bytes(json_bytes)
    with one_line(CheckpointError, *words):
        load_checkpoint(tmp_path / "c.pt")


def test_a_json_that_is_a_directory(tmp_path):
    torch.save(TENSORS, tmp_path / "c.pt")
    (tmp_path / "c.json").mkdir()
    with one_line(CheckpointError, "c.json"):
        load_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floating_dtypes_are_converted(dtype):
    tensors = {n: t.to(dtype) for n, t in TENSORS.items()}
    built = Checkpoint(CONFIG, tensors).build().state_dict()
    assert same(built, {n: t.float() for n, t in tensors.items()})


def test_wrong_key():
    short = {n: t for n, t in TENSORS.items() if n != "layers.1.key.weight"}
    with one_line(CheckpointError, "'layers.1.key.weight'"):
        Checkpoint(CONFIG, short).build()
    with one_line(CheckpointError, "'item_table'", "'module.item_table'", "rename"):
        Checkpoint(CONFIG, {f"module.{n}": t for n, t in TENSORS.items()}).build()
    with one_line(CheckpointError, "'extra'", "remove it"):
        changed(extra=torch.zeros(2)).build()
    with one_line(CheckpointError, "'item_table'"):
        Checkpoint(CONFIG, {}).build()


def test_key_that_is_no_string(tmp_path):
    torch.save({1: torch.zeros(2)}, tmp_path / "c.pt")
    (tmp_path / "c.json").write_text(CONFIG.to_json())
    with one_line(CheckpointError, "c.pt"):
        load_checkpoint(tmp_path / "c.pt").build()


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.zeros(96, 6), ("[96, 6]", "[97, 6]")),
        (torch.zeros(97 * 6), ("[582]", "[97, 6]")),
        (torch.zeros(97, 6, dtype=torch.int32), ("torch.int32", "torch.float32")),
        (torch.zeros(97, 6, dtype=torch.bool), ("torch.bool", "torch.float32")),
        (torch.zeros(97, 6, dtype=torch.complex64), ("torch.complex64", "torch.float32")),
        (torch.zeros(97, 6).index_put((torch.tensor(3), torch.tensor(2)), torch.tensor(torch.nan)), ("NaN",)),
        (torch.full((97, 6), -torch.inf), ("infinite",)),
        (torch.full((97, 6), 1e300, dtype=torch.float64), ("float32",)),  # finite, and infinite once it is loaded
        (torch.zeros(97, 6).to(torch.float8_e4m3fn), ("float8",)),
        (torch.zeros(97, 6).to_sparse(), ("sparse",)),
        (torch.zeros(97, 6, device="meta"), ("meta",)),
    ],
    ids=lambda x: f"{x.dtype} {x.device} {x.layout}" if isinstance(x, torch.Tensor) else None,
)
def test_wrong_tensor(tensor, words):
    with one_line(CheckpointError, "'item_table'", *words):
        changed(item_table=tensor).build()


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (os.system, (f"touch '{self.file}'",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", ["pickle", "torch.save", "legacy"])
def test_a_pickle_is_refused_unexecuted(tmp_path, write):
    file, harm = tmp_path / "c.pt", tmp_path / "harm"
    (tmp_path / "c.json").write_text(CONFIG.to_json())
    loads = {**TENSORS, "extra": Payload(harm)}
    if write == "pickle":
        file.write_bytes(pickle.dumps(loads))
    else:
        torch.save(loads, file, _use_new_zipfile_serialization=write == "torch.save")
    with one_line(CheckpointError, "c.pt", "safetensors", "state_dict"):
        load_checkpoint(file)
    assert not harm.exists()
    torch.load(file, weights_only=False) if write != "pickle" else pickle.loads(file.read_bytes())
    assert harm.exists(), "the payload works, had it been run"


def test_a_pickled_module_is_refused(tmp_path):
    torch.save(tiny.module(CONFIG), tmp_path / "c.pt")
    with one_line(CheckpointError, "c.pt", "state_dict"):
        load_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize("holds", [[1, 2], {"weights": TENSORS}, torch.zeros(2), {"a": 3}], ids=type)
def test_a_torch_file_that_is_no_state_dict(tmp_path, holds):
    torch.save(holds, tmp_path / "c.pt")
    with one_line(CheckpointError, "c.pt", "state_dict"):
        load_checkpoint(tmp_path / "c.pt")


def test_no_such_file(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path, tmp_path / "a\0b"):
        with one_line(CheckpointError, "no such"):
            load_checkpoint(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    file = tmp_path_factory.mktemp("saved") / "c.safetensors"
    save_checkpoint(file, tiny.module(CONFIG))
    return file.read_bytes()


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 50, 2000, -1])
def test_truncated(tmp_path, saved, keep):
    file = tmp_path / "c.safetensors"
    file.write_bytes(saved[:keep])
    with one_line(CheckpointError, "c.safetensors"):
        load_checkpoint(file)


@given(st.data())
def test_a_changed_byte_gives_tensors_or_one_line(tmp_path_factory, saved, data):
    """Safetensors has no digest, so a changed weight is a weight; in the header, it must not end in a traceback."""
    header = 8 + int.from_bytes(saved[:8], "little")
    at = data.draw(st.integers(0, header))
    file = tmp_path_factory.getbasetemp() / "changed.safetensors"
    file.write_bytes(saved[:at] + bytes([saved[at] ^ data.draw(st.integers(1, 255))]) + saved[at + 1 :])
    with nothing_or_one_line(CheckpointError):
        load_checkpoint(file).build()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 4096, "heads": 2}, ("the config needs",)),
        ({"width": 2**31, "heads": 2}, ("config",)),
        ({"items": 2**62, "item_width": 2**62}, ("beyond any memory",)),
        ({"items": 10**400}, ("beyond any memory",)),
        ({"items": 10**12}, ("'item_table'", "[97, 6]", "[1000000000000, 6]")),
        ({"layers": 10**5}, ("layers is 100000",)),
        ({"mixer_layers": 10**9}, ("mixer_layers is 1000000000",)),
        ({"mixer_head_width": 10**6}, ("the config needs",)),
        ({"ffn_expansion": 10**7}, ("the config needs",)),
    ],
)
def test_nothing_is_built_before_it_is_compared(changes, words):
    """A config that asks for terabytes, or for minutes, is refused at once and by name."""
    import resource
    import time

    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with one_line(CheckpointError, *words):
        Checkpoint(tiny.config(time="delta", **changes), TENSORS).build()
    assert time.monotonic() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
