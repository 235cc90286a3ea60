"""What a graph takes, found by asking it: ranges of ids and lengths of histories that nothing in the graph declares.

What a graph cannot take may kill its process (an empty axis in a matrix product of ONNX Runtime's), so a child process
runs it, and a death is an answer. As a script, this module is that child.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from stca import probe
from stca.arrays import Array
from stca.errors import SplitError, said_by_onnxruntime
from stca.export.analysis.onnx_reference import reference_of
from stca.export.histories import event_inputs
from stca.specs import TOKENS, TensorSpec

# Sizes of the requests asked, and the longest history asked for: that of the longest probe of `stca.checks.verify`.
_EVENTS, _TARGETS, _LONGEST = 5, 3, 1000
_LONGEST_TABLE = 1 << 16
# Where it runs on none of `_EVENTS`: a model may take a longer history alone, or none.
_TRIED: Final = (_EVENTS, 1, 0, 20, 80, 320)
# Integers that are accepted up to here are seconds or counts, and not ids: the range that probes draw from.
_LARGEST: Final = probe.UNBOUNDED - 1
_SECONDS = 60.0
_LONG: Final = "it takes too long"
_NOT_FINITE: Final = "scores are not finite"
# A float that a normal distribution hardly goes beyond.
_FAR: Final = 4.0


@dataclass(frozen=True)
class Accepted:
    """What a graph takes.

    Attributes:
        inputs: with the ranges of integers found, and what stands for no event where it has no score for that alone.
        min_history: the shortest history that it takes and gives finite scores for; None where that is an empty one.
        max_history: the longest history it takes; None where the longest that was asked went well.
        told: a line on each input of floats whose range was found.
    """

    inputs: tuple[TensorSpec, ...]
    min_history: int | None
    max_history: int | None
    told: tuple[str, ...] = ()


def ask(
    model: Path,
    inputs: Sequence[TensorSpec],
    max_history: int | None = None,
    marks: Mapping[str, int] | None = None,
    sizes: Sequence[int] = (),
) -> Accepted:
    """Find what the graph in `model` takes, beyond what `inputs` and `max_history` say already.

    Args:
        model: the file of the graph.
        inputs: of the graph.
        max_history: longest history to serve; None for as long as the graph takes.
        marks: the id that means no event, of inputs where that is known.
        sizes: of tables of positions: about these lengths the histories may end that the graph takes.

    Raises:
        SplitError: when it runs on no request that was tried, with what ONNX Runtime says.
    """
    with contextlib.closing(Child(model)) as child:
        asked = _Questions(child.run, tuple(inputs))
        base, events = asked.any_request(max_history)
        told = asked.find_lows(base, events)
        inputs = asked.inputs
        shortest = asked.shortest(base, events) if asked.varies else None
        longest = max_history
        most = min(max_history or _LONGEST, _LONGEST)
        if asked.varies and not asked.takes(base, most):
            longest = _largest(lambda n: asked.takes(base, n), events, most)
        elif asked.varies:
            beyond = sorted({min(n + 1, max_history or n + 1) for n in sizes if n < _LONGEST_TABLE})
            refused = next((n for n in beyond if n > most and asked.refuses(base, n)), None)
            longest = _largest(lambda n: asked.takes(base, n), most, refused) if refused else max_history
        child.seconds = _SECONDS / 4  # these requests are small: what takes long is no id
        ranged = [asked.range_of(s, base, events) if _is_integer(s) else s for s in inputs]
        made = [
            dataclasses.replace(s, blank=asked.blank_of(s, base, events, (marks or {}).get(s.name))) for s in ranged
        ]
        return Accepted(tuple(made), shortest, longest, told)


class _Questions:
    """Requests with the same integer in all places of an input, and what the graph says of them."""

    def __init__(self, run: Callable[..., list[Array] | str], inputs: tuple[TensorSpec, ...]) -> None:
        self.run, self.inputs, self.given = run, inputs, inputs
        self.events = event_inputs(inputs)
        self.varies = any(TOKENS in s.shape for s in inputs) or any(
            isinstance(n, str) for n in probe.events_by_size(inputs)
        )
        self.unknown = [s.name for s in inputs if (s.limit, s.length_of) == (None,) * 2 and _is_integer(s)]

    def any_request(self, max_history: int | None) -> tuple[dict[str, int], int]:
        """Integers and a number of events on which the graph runs, with floats of both signs or from 0 on."""
        given, said = self.inputs, ""
        for self.inputs in dict.fromkeys((given, tuple(map(_from_0, given)))):
            for events in dict.fromkeys(min(n, max_history or n) for n in _TRIED):
                for value in (1, 0, 2):
                    base = dict.fromkeys(self.unknown, value)
                    answer = self.answer(base, events)
                    if not isinstance(answer, str):
                        return base, events
                    said = said or answer
        raise SplitError(
            f"the model fails on a request of {_EVENTS} events and {_TARGETS} targets, whether its integers are 0, "
            f"1 or 2: {said}; mend it, or give it inputs of which every value in a range is valid"
        )

    def find_lows(self, base: Mapping[str, int], events: int) -> tuple[str, ...]:
        """Have `inputs` say of each float whether it must not be negative; a line on each that must not.

        In every other place of it, a score must be finite with a large number, and not with its negative.
        """
        declared = self.given
        self.inputs = tuple(_from_0(s) for s in self.inputs)
        made, told = [], []
        for spec in declared:
            least = spec.low
            if _is_free_float(spec):
                negative, positive = (self.far(spec, sign * _FAR, base, events) for sign in (-1, 1))
                least = 0 if negative == _NOT_FINITE and not isinstance(positive, str) else None
            if least != spec.low:
                told.append(
                    f"{spec.name}: scores are not finite where it is negative, so requests that hold less than 0 are "
                    "refused; clamp it in the model to serve them"
                )
            made.append(dataclasses.replace(spec, low=least))
        self.inputs = tuple(made)
        return tuple(told)

    def far(self, spec: TensorSpec, value: float, base: Mapping[str, int], events: int) -> list[Array] | str:
        """What the graph makes of a number in every other place of an input of floats."""
        request = self.request(base, events)
        request[spec.name].flat[::2] = value
        return self.run(probe.pack(self.inputs, [request]), "onnxruntime")

    def answer(
        self, values: Mapping[str, int], events: int, by: str = "onnxruntime", first: tuple[str, int] | None = None
    ) -> list[Array] | str:
        """What the graph makes of these values in all places of inputs, and of another in the first place of one."""
        request = self.request(values, events)
        if first:
            request[first[0]].flat[0] = first[1]
        return self.run(probe.pack(self.inputs, [request]), by)

    def request(self, values: Mapping[str, int], events: int) -> dict[str, Array]:
        """A random request with these values in all places of inputs."""
        request = probe.single(self.inputs, events, _TARGETS, np.random.default_rng(0))
        return request | {n: np.full_like(request[n], v) for n, v in values.items()}

    def blank_of(self, spec: TensorSpec, base: Mapping[str, int], events: int, mark: int | None) -> int | None:
        """The value that stands for no event, where a history of it alone has no score; None where there is none."""
        if spec.name not in self.events:
            return None
        tried = [mark, 0, 1]
        if _is_integer(spec):
            tried += [n for n in (-1, (spec.limit or 0) - 1) if n >= np.iinfo(spec.dtype).min]
        return next((v for v in tried if v is not None and self.refuses_only(spec, v, base, events)), None)

    def refuses_only(self, spec: TensorSpec, value: int, base: Mapping[str, int], events: int) -> bool:
        """Whether this value in all places is refused, and in the first alone is not."""
        other = next(v for v in (base.get(spec.name, 1), 0, 1) if v != value)
        return isinstance(self.answer({**base, spec.name: value}, events), str) and not isinstance(
            self.answer({**base, spec.name: other}, events, first=(spec.name, value)), str
        )

    def takes(self, integers: Mapping[str, int], events: int) -> bool:
        return not isinstance(self.answer(integers, events), str)

    def refuses(self, integers: Mapping[str, int], events: int) -> bool:
        """Whether so many are not taken, for another reason than that they take long."""
        answer = self.answer(integers, events)
        return isinstance(answer, str) and answer != _LONG

    def shortest(self, integers: Mapping[str, int], events: int) -> int | None:
        """The least number of events that it takes, where it takes `events`; None for 0.

        ONNX's reference is asked too, where it can run the graph: to ONNX Runtime a mean over nothing is 0.
        """
        by = ["onnxruntime", "reference"]
        if isinstance(self.answer(integers, events, "reference"), str):
            by.pop()

        def takes(events: int) -> bool:
            return not any(isinstance(self.answer(integers, events, b), str) for b in by)

        if events > _EVENTS:  # as fewer were refused
            return _least(takes, _EVENTS, events)
        return next((n for n in range(events) if takes(n)), events) or None

    def range_of(self, spec: TensorSpec, base: Mapping[str, int], events: int) -> TensorSpec:
        """`spec` with the range of its integers: up to the largest that is taken, from 1 where 0 stands for that one.

        None is the largest of what may be larger in a longer history, such as its length.
        Scores that are not finite end no range: seconds far from the request's may overflow a decay, and no table. A
        gather counts an index of -1 from the end. So a length of 0, less 1, is scored like the longest.
        """
        most = spec.limit - 1 if spec.limit else min(_LARGEST, int(np.iinfo(spec.dtype).max))

        def takes(value: int, more: int = 0) -> bool | None:
            answer = self.answer({**base, spec.name: value}, events + more)
            return None if answer == _LONG else not isinstance(answer, str) or answer == _NOT_FINITE

        whole = spec.limit and spec.low is not None
        if whole or spec.length_of is not None or (not spec.limit and takes(most)):
            return spec
        largest = most if spec.limit else _largest(takes, base[spec.name], most)
        limit: int | None = largest + 1
        if not spec.limit and self.varies and takes(largest + 1) is False and takes(largest + 1, more=1):
            limit = None
        spec = dataclasses.replace(spec, limit=limit)
        if spec.low is not None:
            return spec
        below, zero, one, but_one, last = (
            self.answer({**base, spec.name: v}, events) for v in (-1, 0, 1, largest - 1, largest)
        )
        wraps = _same(zero, last) and _same(below, but_one) and not _same(zero, one) and not _same(zero, below)
        refused = isinstance(zero, str) and not isinstance(one, str) and not self.refuses_only(spec, 0, base, events)
        return dataclasses.replace(spec, low=1 if largest > 1 and (wraps or refused) else None)


def _is_integer(spec: TensorSpec) -> bool:
    return np.dtype(spec.dtype).kind in "iu" and not spec.is_offsets


def _is_free_float(spec: TensorSpec) -> bool:
    return np.dtype(spec.dtype).kind == "f" and spec.low is None


def _from_0(spec: TensorSpec) -> TensorSpec:
    return dataclasses.replace(spec, low=0) if _is_free_float(spec) else spec


def _same(one: list[Array] | str, other: list[Array] | str) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return False
    return all(map(np.array_equal, one, other))


def _largest(takes: Callable[[int], bool | None], good: int, bad: int) -> int:
    """The largest number that is taken, between one that is and one that is not; the first that takes long ends it.

    Small ones are asked first: where a number is a size, large ones take long, and all the memory there is.
    """
    step: int = 1
    while good + step < bad and (taken := takes(good + step)) is not False:
        if taken is None:
            return good
        good, step = good + step, 2 * step
    bad = min(bad, good + step)
    while bad - good > 1:
        middle = (good + bad) // 2
        taken = takes(middle)
        if taken is None:
            return good
        good, bad = (middle, bad) if taken else (good, middle)
    return good


def _least(takes: Callable[[int], bool], bad: int, good: int) -> int:
    """The smallest number that is taken, between one that is not and one that is."""
    while good - bad > 1:
        middle = (good + bad) // 2
        bad, good = (bad, middle) if takes(middle) else (middle, good)
    return good


class Child:
    """The process that runs the graph; a new one after a death."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._process: subprocess.Popen[bytes] | None = None
        self.seconds = _SECONDS

    def run(self, feeds: Mapping[str, Array], by: str = "onnxruntime") -> list[Array] | str:
        """The outputs by ONNX Runtime, or by ONNX's `reference`; or why there are none.

        That is what it said, the death of its process, or a value that is not finite.
        """
        seconds = self.seconds if self._process else _SECONDS  # a new process has much to load first
        process = self._process = self._process or self._start()
        assert process.stdin
        assert process.stdout
        slow = threading.Event()

        def end() -> None:
            slow.set()
            process.kill()

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            pickle.dump((dict(feeds), by), process.stdin)
            process.stdin.flush()
            answer: list[Array] | str = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            self.close()
            if slow.is_set():
                return _LONG
            return f"the process died with exit code {process.returncode}"
        finally:
            timer.cancel()
        if not isinstance(answer, str) and not all(np.isfinite(x).all() for x in answer):
            return _NOT_FINITE
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        paths = os.pathsep.join(p for p in sys.path if p)
        return subprocess.Popen(
            # -P: `-m` alone would import from the working directory first, which may be anyone's.
            [sys.executable, "-P", "-m", __name__, str(self._model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths, "ORT_DISABLE_TELEMETRY": "1"},
        )

    def close(self) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()
        self._process = None


def _serve(model: str) -> None:
    """Run the model on each request that comes in, until there are no more."""
    engines: dict[str, Callable[[dict[str, Array]], Any]] = {}
    while True:
        try:
            feeds, by = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            if by not in engines:
                engines[by] = _onnxruntime(model) if by == "onnxruntime" else _reference(model)
            answer = engines[by](feeds)
        except Exception as e:
            answer = said_by_onnxruntime(e)
        pickle.dump(answer, sys.stdout.buffer)
        sys.stdout.buffer.flush()


def _onnxruntime(model: str) -> Callable[[dict[str, Array]], Any]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return lambda feeds: session.run(None, {n: feeds[n] for n in names})


def _reference(model: str) -> Callable[[dict[str, Array]], Any]:
    import warnings

    import onnx

    warnings.simplefilter("ignore")
    evaluator = reference_of(onnx.load(model))
    return lambda feeds: list(evaluator.run(None, feeds))


if __name__ == "__main__":
    _serve(sys.argv[1])
