"""`python tests/fuzz/checkpoints.py`: hostile checkpoints, proven and served, or refused in one line.

Configs of impossible sizes and kinds, tensors missing, renamed, of other dtypes and shapes or with NaN, cut and changed
files, pickles that would run something. Nothing of a checkpoint may run, and no size may be believed before it is
compared. Cases run in a process beside this one, with little memory; where it dies or hangs, that is counted. A case
depends on its number alone. What was found goes to `--out` line by line; the same command again goes on where it
stopped. Exit codes: 0 nothing went wrong, 1 something did, 2 bad usage.
"""

from __future__ import annotations

import json
import pickle
import random
import resource
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import outcomes
import safetensors.torch
import torch
from outcomes import Outcome

from stca import probe
from stca.checks.verify import prove
from stca.errors import StcaError
from stca.export.pipeline import export_checkpoint
from stca.export.reference.checkpoint import CONFIG_KEY, load_checkpoint
from stca.export.reference.config import StcaConfig
from stca.export.reference.module import Stca
from stca.runtime import Request, Session

SECONDS = 120.0
MEMORY = 12 << 30  # of addresses: PyTorch alone takes some
RAN = "a pickle ran"
VALUES = (
    *(0, 1, -1, 3, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 40, 1 << 63, 1 << 70, 10**400, 1.5, -0.0, 1e308),
    *(None, True, False, "", "x\ny" * 1000, "relu", [], [[]], {}, [["a", 3]], [["a", -1]], [["a", 1 << 40]], [1], "2"),
    *(
        [["a", 3], ["a", 3]],
        [["__metadata__", 3]],
        [["x\n", 3]],
        [["a", 3]] * 300,
        ["t"] * 3,
        ["t\x00"],
        ["__metadata__"],
    ),
)
NAMES = ("__metadata__", "", "a\nb", "x" * 10_000, "../a", "\x00", "item_table.weight", "é")
DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8, torch.complex64)
Tensors = dict[str, torch.Tensor]


class Hostile:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@cache
def _sound() -> tuple[dict[str, Any], Tensors]:
    """The config and the weights of a model that exports in a second or two."""
    torch.manual_seed(0)
    config = StcaConfig(
        items=11,
        item_width=3,
        field_width=2,
        history_fields=(("action", 3),),  # type: ignore[arg-type]
        width=4,
        heads=2,
        layers=1,
        ffn_expansion=1,
        mixer_layers=1,
        mixer_head_width=2,
        mixer_expansion=1,
        max_history=16,
    )
    return json.loads(config.to_json()), {n: t.detach().clone() for n, t in Stca(config).state_dict().items()}


def look(case: str) -> Outcome:
    """What becomes of the case `N`, in this process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with tempfile.TemporaryDirectory() as folder:
        mark = Path(folder, "ran")
        try:
            file = _written(random.Random(f"checkpoint {case}"), int(case), Path(folder), mark)
            seen = _exported(case, file, Path(folder, "bundle"))
        except StcaError as e:
            seen = outcomes.refused(case, e)
        except Exception as e:
            seen = outcomes.unexpected(case, e)
        if mark.exists():
            return Outcome(case, "wrong", RAN)
        return Outcome(case, seen.kind, seen.said.replace(folder, "FOLDER"))


def _exported(case: str, file: Path, out: Path) -> Outcome:
    bundle = export_checkpoint(load_checkpoint(file), out, prove=prove)
    session = Session.load(bundle.path, threads=1)
    inputs = probe.single(bundle.manifest.graphs["request"].inputs, 3, 2, np.random.default_rng(0))
    scores = [session.score(Request(inputs, "ann", 1)) for _ in ("miss", "hit")]
    return Outcome(case, "served" if np.array_equal(*scores) else "wrong", "a hit differs from its miss")


def _written(rng: random.Random, number: int, folder: Path, mark: Path) -> Path:
    """A checkpoint with something wrong, but each 25th."""
    config, tensors = dict(_sound()[0]), {n: t.clone() for n, t in _sound()[1].items()}
    kinds: Sequence[Callable[[], object]] = (
        *(lambda: _change_config(rng, config),) * 3,
        *(lambda: _change_tensors(rng, tensors),) * 3,
    )
    way = rng.choice(("safetensors", "safetensors", "safetensors", "bytes", "state dict", "pickle"))
    if number % 25 == 0:
        return _safetensors(folder, config, tensors)
    if way != "pickle" or rng.random() < 0.5:
        for _ in range(rng.randint(way not in ("bytes", "pickle"), 2)):
            rng.choice(kinds)()
    if way == "safetensors":
        return _safetensors(folder, config, tensors)
    if way == "bytes":
        file = _safetensors(folder, config, tensors)
        file.write_bytes(_spoilt(rng, file.read_bytes()))
        return file
    (folder / "model.json").write_text(json.dumps(config), encoding="utf-8")
    return _pickled(rng, folder / "model.pt", tensors, mark if way == "pickle" else None)


def _change_config(rng: random.Random, config: dict[str, Any]) -> None:
    name, how = rng.choice(list(config)), rng.randrange(8)
    if how == 0:
        del config[name]
    elif how == 1:
        config[rng.choice(NAMES)] = rng.choice(VALUES)
    else:
        config[name] = rng.choice(VALUES)


def _change_tensors(rng: random.Random, tensors: Tensors) -> None:
    name, how = rng.choice(list(tensors)), rng.randrange(7)
    x = tensors[name]
    if how == 0:
        del tensors[name]
    elif how == 1:
        tensors[rng.choice(NAMES)] = x if rng.random() < 0.5 else tensors.pop(name)
    elif how == 2:
        tensors[name] = x.to(rng.choice(DTYPES))
    elif how == 3:
        tensors[name] = rng.choice(
            (
                x[:0],
                x[None],
                x.flatten()[:1],
                torch.cat([x, x]),
                x.transpose(0, -1).contiguous() if x.dim() else x[None],
                torch.ones(()),
            )
        )
    elif how == 4 and x.numel():
        x.view(-1)[rng.randrange(x.numel())] = rng.choice((float("nan"), float("inf"), -float("inf"), 3e38, 1e-45))
    elif how == 5:
        x.mul_(rng.choice((0.0, 1e30, 1e19, -1.0, 1e-30)))
    else:
        x.fill_(rng.choice((0.0, 1.0, 1e10)))


def _safetensors(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    """Written by hand, so that names which the library refuses to write come through."""
    header: dict[str, Any] = {}
    content = b""
    for name, x in tensors.items():
        saved = safetensors.torch.save({"x": x.contiguous().clone()})
        begin = 8 + struct.unpack("<Q", saved[:8])[0]
        entry = json.loads(saved[8:begin])["x"]
        header[name] = entry | {"data_offsets": [len(content), len(content) + len(saved) - begin]}
        content += saved[begin:]
    text = json.dumps({"__metadata__": {CONFIG_KEY: json.dumps(config)}, **header}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content)
    return folder / "model.safetensors"


def _spoilt(rng: random.Random, content: bytes) -> bytes:
    end = 8 + struct.unpack("<Q", content[:8])[0]
    how = rng.randrange(6)
    if how == 0:
        return content[: rng.randrange(len(content))]
    if how == 1:
        return struct.pack("<Q", rng.choice((0, 1, end, 1 << 31, 1 << 40, (1 << 64) - 1))) + content[8:]
    if how == 2:
        return content + bytes(rng.randrange(1, 100))
    if how == 3:
        digits = rng.choice(("-1", "9" * 30, "1e3", "null", "[]", "0"))
        return content[:8] + content[8:end].replace(b'"data_offsets": [0', b'"data_offsets": [' + digits.encode(), 1)
    made = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        made[rng.randrange(end if how == 4 else len(made))] = rng.randrange(256)
    return bytes(made)


def _pickled(rng: random.Random, file: Path, tensors: Tensors, mark: Path | None) -> Path:
    if mark is None:
        torch.save(tensors, file)
        return file
    how = rng.randrange(6)
    if how == 0:
        torch.save({**tensors, "x": Hostile(mark)}, file)
    elif how == 1:
        torch.save(Hostile(mark), file)
    elif how == 2:
        file.write_bytes(pickle.dumps(Hostile(mark)))
    elif how == 3:
        torch.save(torch.nn.Linear(2, 2), file)
    elif how == 4:
        odd = ([*tensors.values()], {1: torch.ones(2)}, {"a": {"b": torch.ones(2)}}, {"state_dict": tensors}, None, {})
        torch.save(rng.choice(odd), file)
    else:
        torch.save(tensors, file)
        content = bytearray(file.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content[: rng.randrange(len(content))] if rng.random() < 0.5 else content)
    return file


def found(asked: Iterable[str]) -> Iterator[Outcome]:
    """What became of each case, in order."""
    return outcomes.outcomes(asked, look, SECONDS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what was asked and has not been run yet; returns the exit code."""
    return outcomes.command(__file__, found, argv, about=__doc__, rounds=500, of="checkpoints")


if __name__ == "__main__":
    sys.exit(main())
