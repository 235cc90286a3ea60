"""A table larger than memory: what its export takes, and how fast its rows are looked up, beside numpy's memmap.

    python benchmarks/tables.py [--gigabytes 10] [--folder DIR] [--out FILE.json]

A model with one table, sparse on disk, is split with all of its proof in a process of its own, whose time and largest
resident memory are measured. Then rows are looked up in batches of one history, from a set of rows that fits into
memory; the first pass over it, which also checks its blocks, is given apart. Both ways of looking up take turns; the
same ids are looked up in C++ after them, where there is cmake.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from outcome import tell

WIDTH, BATCH, BATCHES, TURNS = 64, 10_000, 20, 9


def write_model(folder: Path, rows: int) -> Path:
    """An ONNX file with one table of `rows`, in a sparse file beside it; 1 row in 1000 holds something."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    file = folder / "table.bin"
    with file.open("wb") as f:
        f.truncate(rows * WIDTH * 4)
        for at in (0, rows // 2, rows - rows // 2000):
            f.seek(at * WIDTH * 4)
            f.write(rng.standard_normal((rows // 2000, WIDTH), np.float32).tobytes())
    table = TensorProto(name="table", data_type=TensorProto.FLOAT, dims=[rows, WIDTH])
    table.raw_data = b""
    onnx.external_data_helper.set_external_data(table, file.name, length=rows * WIDTH * 4)
    table.ClearField("raw_data")
    weights = {"w": rng.standard_normal((WIDTH, WIDTH), np.float32) / 8, "zero": np.array([0]), "one": np.array([1])}
    node, info = helper.make_node, helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            node("Gather", ["table", "hist"], ["events"]),
            node("Gather", ["table", "item"], ["items"]),
            node("MatMul", ["events", "w"], ["projected"]),
            node("Relu", ["projected"], ["encoded"]),
            node("ReduceMean", ["encoded", "zero"], ["user"], keepdims=1),
            node("Mul", ["user", "items"], ["products"]),
            node("ReduceSum", ["products", "one"], ["scores"], keepdims=1),
        ],
        "table",
        [info("hist", TensorProto.INT64, ["N_h"]), info("item", TensorProto.INT64, ["N_t"])],
        [info("scores", TensorProto.FLOAT, ["N_t", 1])],
        [table, *(numpy_helper.from_array(x, n) for n, x in weights.items())],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


# Memory is that of the process and not of its children: a fork's count begins with its parent's.
EXPORT = """
import json, re, sys, time
from stca import commands
began = time.perf_counter()
code = commands.main(sys.argv[1:])
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
print(json.dumps({"seconds": time.perf_counter() - began, "peak_bytes": peak}))
sys.exit(code)
"""


def export(model: Path, out: Path) -> dict[str, Any]:
    """Seconds and largest resident memory of a split with its proof."""
    arguments = [str(model), "--user-inputs", "hist", "--target-inputs", "item", "--out", str(out)]
    done = subprocess.run([sys.executable, "-c", EXPORT, "split", *arguments], stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def lookups(bundle: Path, folder: Path) -> dict[str, Any]:
    """Rows a second of this library and of a memmap with an array of indices, warm; and of the first pass."""
    from stca.bundle import Bundle
    from stca.runtime.tables import sources

    began = time.perf_counter()
    loaded = Bundle.load(bundle)
    (source,) = sources(loaded).values()
    load = time.perf_counter() - began
    (spec,) = loaded.manifest.tables or ()
    mapped = np.memmap(bundle / spec.file, np.float32, "r", shape=(spec.rows, spec.width))
    rng = np.random.default_rng(1)
    some = rng.integers(0, spec.rows, 100_000)
    batches = [rng.choice(some, BATCH) for _ in range(BATCHES)]

    def seconds(look_up: Any) -> float:
        began = time.perf_counter()
        for ids in batches:
            look_up(ids)
        return time.perf_counter() - began

    first = seconds(source.rows)
    seconds(mapped.__getitem__)
    times: dict[str, list[float]] = {"stca": [], "memmap": []}
    for _ in range(TURNS):
        times["stca"].append(seconds(source.rows))
        times["memmap"].append(seconds(mapped.__getitem__))
    rows = BATCH * BATCHES
    assert np.array_equal(source.rows(batches[0]), mapped[batches[0]])
    cpp = {"cpp": in_cpp(bundle, batches, folder)["warm"]} if shutil.which("cmake") else {}
    return {
        "load_seconds": load,
        "first_pass_rows_per_second": rows / first,
        "warm_rows_per_second": {name: rows / float(np.median(t)) for name, t in times.items()} | cpp,
        "row_bytes": spec.row_bytes,
    }


def in_cpp(bundle: Path, batches: list[Any], folder: Path) -> dict[str, float]:
    """The same look-ups in C++, in a process of its own; built here, with optimization."""
    source = Path(__file__).resolve().parents[1] / "runtime" / "cpp"
    build = ["-DCMAKE_BUILD_TYPE=Release", "-DSTCA_BUILD_BENCHMARKS=ON"]
    for command in (
        ["cmake", "-S", source, "-B", folder / "cpp", *build],
        ["cmake", "--build", folder / "cpp", "--target", "stca_table_benchmark", "--parallel", "2"],
    ):
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    np.concatenate(batches).tofile(folder / "ids")
    program = [str(folder / "cpp" / "stca_table_benchmark"), str(bundle), str(folder / "ids"), str(BATCH), str(TURNS)]
    done = subprocess.run(program, check=True, stdout=subprocess.PIPE)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def score(bundle: Path) -> float:
    """Median milliseconds of a miss of 10,000 events and 300 targets."""
    from stca.runtime import Request, Session

    session, times = Session.load(bundle), []
    limit = session.manifest.graphs["request"].inputs[0].limit or 1
    rng = np.random.default_rng(2)
    request = Request({"hist": rng.integers(0, limit, BATCH), "item": rng.integers(0, limit, 300)})
    for _ in range(11):
        began = time.perf_counter()
        session.score(request)
        times.append(time.perf_counter() - began)
    return float(np.median(times)) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--folder", help="for the files (default: the system's place for temporary ones)")
    parser.add_argument("--out", help="file for the results, as JSON")
    args = parser.parse_args()
    from stca.checks.timing import machine

    rows = int(args.gigabytes * 1e9) // (WIDTH * 4)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        model, bundle = write_model(Path(folder), rows), Path(folder, "bundle")
        found = {
            "table": {"rows": rows, "width": WIDTH, "bytes": rows * WIDTH * 4, "sparse": True},
            "machine": {**machine(None), "python": platform.python_version(), "numpy": np.__version__},
            "export": export(model, bundle),
            "lookups": lookups(bundle, Path(folder)),
            "miss_ms": score(bundle),
        }
    tell(found, args.out)


if __name__ == "__main__":
    main()
