"""One loaded bundle: its two engines, and how users' states and scores go through them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np

from stca.arrays import Array, all_finite
from stca.bundle import Bundle
from stca.contract import as_built, check_engine, kept_sums
from stca.errors import EngineError, RequestError
from stca.manifest import Manifest
from stca.pieces import PIECES, pieces_of
from stca.runtime.deadline import NEVER, Deadline
from stca.runtime.engine import Engine, scores_of
from stca.runtime.engine_choice import Choice, best_engine, open_engines, open_own, own_graphs
from stca.runtime.machine import processors
from stca.runtime.options import Options
from stca.runtime.request import Door
from stca.runtime.row_cache import RowCache
from stca.runtime.runs import limits_of, parted
from stca.runtime.state import StateArray, StateKey, UserState, along, join
from stca.runtime.tables import on_cpu, sources, with_tables
from stca.specs import GROWER, HALVES, TARGETS, TOKENS, USERS, StateSpec, TensorSpec

# Most history tokens of several users encoded in one run. A run has a price of its own, and so have the copies that
# part users encoded together: on a CPU they break even at a few hundred tokens. `benchmarks/misses.py` measures it.
_TOKENS_TOGETHER: Final = 256


@dataclass(frozen=True)
class Model:
    """One loaded bundle; immutable, so that a swap is one assignment and running requests finish on what they began.

    `window` is the longest history that the bundle and its engines serve.
    """

    manifest: Manifest
    door: Door
    encoder: Engine
    scorer: Engine
    format: str
    choice: Choice
    window: int | None
    check_finite: bool = True
    threads: int | None = None
    grower: Engine | None = None
    pieces_scorer: Engine | None = None
    row_caches: Mapping[str, RowCache] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, bundle: Bundle, options: Options) -> Model:
        manifest = bundle.manifest
        if options.onnxruntime is not None:
            choice = own_graphs("options for ONNX Runtime were given, and it runs the bundle's own graphs")
        elif options.engine == "graphs":
            choice = own_graphs()
        else:
            native_code = options.native_code or options.trusted is not None
            choice = best_engine(
                manifest, only=options.engine, precision=options.precision, gpu=options.gpu, native_code=native_code
            )
        engines = open_engines(
            bundle, choice, threads=options.threads, onnxruntime=options.onnxruntime, gpu=options.gpu
        )
        if GROWER in manifest.graphs:
            engines[GROWER] = open_own(bundle, GROWER, threads=options.threads, onnxruntime=options.onnxruntime)
        if PIECES in manifest.graphs and on_cpu(engines["target_scorer"]) and choice.precision == "fp32":
            engines[PIECES] = open_own(bundle, PIECES, threads=options.threads, onnxruntime=options.onnxruntime)
        rows = sources(bundle, options.tables, options.page_bytes)
        engines = {half: with_tables(bundle, half, engine, rows) for half, engine in engines.items()}
        for half, engine in engines.items():
            entry = choice.entries.get(half)
            precision = "fp32" if half not in HALVES else choice.precision
            promised = as_built(manifest, half, precision, requests=entry.requests if entry else None)
            check_engine(half, promised, *engine.signature(), may_leave_out=engine.may_leave_out)
        layout = ";".join(f"{s.name}:{s.dtype}:{','.join(map(str, s.shape))}" for s in manifest.state)
        # Equal weights do not make equal states: what the encoder computes, for which window, and in what, counts too.
        graph = manifest.graphs["user_encoder"]
        encoder = ";".join(manifest.files[file]["sha256"] for file in (graph.file, graph.ids) if file)
        limits = [limits_of(choice, half)[TOKENS] for half in HALVES]
        limits += [] if manifest.max_history is None else [manifest.max_history]
        window = None if min(limits) == sys.maxsize else min(limits)
        layout += f";{encoder};window:{window};{choice.flavour} {choice.precision}"
        door = Door(
            dataclasses.replace(manifest, max_history=window),
            truncate=options.truncate,
            max_targets=options.max_targets,
        )
        return cls(
            manifest,
            door,
            engines["user_encoder"],
            engines["target_scorer"],
            layout,
            choice,
            window,
            options.check_finite,
            options.threads,
            engines.get(GROWER),
            engines.get(PIECES),
            {name: kept for name, kept in rows.items() if isinstance(kept, RowCache)},
        )

    @property
    def side_by_side(self) -> int:
        """How many calls compute at once before they slow each other down."""
        return max(1, processors() // self.threads) if self.threads and on_cpu(self.encoder) else 1

    def key(self, user: Hashable, version: Hashable) -> StateKey:
        """What a state is kept under; both are plain values, as `client_values.key_of` makes them."""
        return StateKey(user, version, self.manifest.weights, self.format)

    def encode(self, users: Sequence[Mapping[str, Array]], deadline: Deadline = NEVER) -> Iterator[UserState]:
        """The states of users, in their order, from their admitted inputs. Those with short histories go through the
        user encoder together, and the states of a run are given before the next begins.

        Raises:
            EngineError: when it fails.
            DeadlineError, CancelledError: between runs, when the states are not wanted any more.
        """
        tokens = [self.tokens(arrays) for arrays in users]
        if len(users) == 1:
            deadline.check()
            yield from self._encode(users, tokens)
            return
        limits = limits_of(self.choice, "user_encoder")
        limits[TOKENS] = min(limits[TOKENS], _TOKENS_TOGETHER)
        if not all(self.is_offsets(s) or s.shape[:1] in ((TOKENS,), (USERS,)) for s in self.manifest.state):
            limits[USERS] = 1  # what is neither per token nor per user cannot be parted
        if self.door.stacked:
            limits[USERS] = 1
        for run in parted([{USERS: 1, TOKENS: n} for n in tokens], limits):
            deadline.check()
            yield from self._encode(users[run], tokens[run])

    def _encode(self, users: Sequence[Mapping[str, Array]], tokens: Sequence[int]) -> list[UserState]:
        out = self.encoder.run(_fed(self._pack(users), self._takes["user_encoder"]))
        self._check_rows(out, sum(tokens), len(users))
        if len(users) == 1:
            # A copy: ONNX Runtime keeps the memory of its outputs for later runs, even that of states that went.
            return [UserState({n: x.copy() if isinstance(x, np.ndarray) else x for n, x in out.items()}, tokens[0])]
        ends = np.cumsum(tokens)
        return [
            UserState({s.name: self._part(s, out[s.name], i, end - n, end) for s in self.manifest.state}, n)
            for i, (n, end) in enumerate(zip(tokens, ends.tolist(), strict=True))
        ]

    def grown(self, old: UserState, arrays: Mapping[str, Array]) -> UserState:
        """What the user grower makes of admitted user inputs, new events and the others as they are now, on top of the
        sums of an old state.
        """
        assert self.grower is not None
        events = {s.name: arrays[s.name] for s in self.manifest.graphs[GROWER].inputs if s.scope is not None}
        out, tokens = self.grower.run({**self.kept_sums(old), **events}), self.tokens(arrays)
        self._check_rows(out, tokens, 1)
        return UserState({n: x.copy() for n, x in out.items()}, tokens)

    def kept_sums(self, old: UserState) -> dict[str, Array]:
        """The sums of a state, as the user grower takes them.

        Raises:
            RequestError: when the encoder's engine keeps sums elsewhere, or of another type, than the grower adds in.
        """
        feeds: dict[str, Array] = {}
        for name, kept in self.sums.items():
            value = old.tensors[name]
            if not isinstance(value, np.ndarray) or value.dtype.name != kept.dtype:
                raise RequestError(
                    f"append: the {self.choice.flavour} engine keeps sums as {self.choice.precision} of its own, to "
                    "which nothing is added; send the whole history with a new version, or load with engine='graphs'"
                )
            feeds[kept.name] = value
        return feeds

    def _check_rows(self, state: Mapping[str, StateArray], tokens: int, users: int) -> None:
        """A row for each token, and for each user: a row too many would be the next user's."""
        for name, size in self._rows_of.items():
            wanted = tokens if size == TOKENS else users
            if (made := state[name].shape[0]) != wanted:
                raise EngineError(f"the user encoder gave {made} rows of {name!r} for {wanted}; export the model anew")

    def _part(self, spec: StateSpec, rows: StateArray, user: int, begin: int, end: int) -> StateArray:
        """One user's rows of a state tensor of several, copied: a view would keep all of them alive, uncounted."""
        if self.is_offsets(spec):
            return np.array([0, end - begin], spec.dtype)
        return rows[begin:end].copy() if spec.shape[:1] == (TOKENS,) else rows[user : user + 1].copy()

    def score(
        self, states: Sequence[UserState], rows: Sequence[Mapping[str, Array]], deadline: Deadline = NEVER
    ) -> list[Array]:
        """Run the target scorer for several users, all at once where it can.

        Args:
            states: of each user.
            rows: their request and target inputs.
            deadline: looked at before each run, which raises what it says.
        """
        if len(states) == 1:
            deadline.check()
            return [self.score_one(states[0], rows[0])]
        if self.door.stacked or any(state.in_pieces for state in states):
            runs: Iterator[slice] = (slice(i, i + 1) for i in range(len(states)))
        else:
            runs = parted(self._sizes(states, rows), limits_of(self.choice, "target_scorer"))
        scores: list[Array] = []
        for run in runs:
            deadline.check()
            if all(self.targets(row) == 0 for row in rows[run]):  # of a batch whose other requests have some
                scores += [self.none() for _ in rows[run]]
            else:
                scores += self._score(states[run], rows[run])
        return scores

    def _sizes(self, states: Sequence[UserState], rows: Sequence[Mapping[str, Array]]) -> list[dict[str, int]]:
        """What each request adds to a run of the target scorer."""
        targets = next((n for n, s in self.door.offsets.items() if s.scope == "target"), None)
        return [
            {USERS: 1, TOKENS: s.tokens, TARGETS: int(r[targets][-1]) if targets else 0}
            for s, r in zip(states, rows, strict=True)
        ]

    def score_one(self, state: UserState, row: Mapping[str, Array]) -> Array:
        """As `score`, of one user."""
        if self._shared:
            self._check_shared(state, row)
        return self._scores({**row, **state.tensors}, (row,), state.in_pieces)

    def gives_finite(self, state: UserState) -> bool:
        """Whether the scores of a state are finite, by those of one made-up target."""
        names = self.door.names("request", "target")
        row = self.door.admit({n: self.door.placeholder(n) for n in names}, "request", "target")
        of_tokens = {n: along(n, row[n], state) for n in self.door.of_tokens}
        feeds = {**row, **of_tokens, **state.tensors}
        outputs = self.scorer.run(_fed(feeds, self._takes["target_scorer"]))
        return all(all_finite(x) for x in outputs.values())

    def _score(self, states: Sequence[UserState], rows: Sequence[Mapping[str, Array]]) -> list[Array]:
        if len(states) == 1:
            return [self.score_one(states[0], rows[0])]
        scores = self._scores({**self._pack(rows), **self._joined(states)}, rows)
        targets = next(n for n, s in self.door.offsets.items() if s.scope == "target")
        return np.split(scores, np.cumsum([r[targets][-1] for r in rows])[:-1])

    def _scores(self, feeds: dict[str, Any], rows: Sequence[Mapping[str, Array]], in_pieces: bool = False) -> Array:
        scorer, graph = (self.pieces_scorer, PIECES) if in_pieces else (self.scorer, "target_scorer")
        assert scorer is not None
        outputs = scorer.run(_fed(feeds, self._takes[graph]))
        scores = scores_of(tuple(map(outputs.__getitem__, self._given)))
        if (counted := self._counted) is not None:
            name, axis = counted
            targets = 0
            for row in rows:
                targets += row[name].shape[axis]
            if len(scores) != targets:
                # It may have broadcast one user to several, or read one row alone.
                raise EngineError(
                    f"the model gave {len(scores)} scores for {targets} targets ({name}); give each target a row of "
                    "every input, or export the model anew"
                )
        if self.check_finite and not all_finite(scores):
            wrong = next(n for n in self._given if not np.isfinite(outputs[n]).all())
            raise EngineError(
                f"output {wrong!r} of the target scorer is not finite for {int((~np.isfinite(scores)).sum())} of "
                f"{scores.size} scores; look for overflow, NaN in the weights or a mask that leaves no event, or load "
                "with check_finite=False"
            )
        return scores

    # What each request would find in the manifest again.

    @cached_property
    def _per_token(self) -> str | None:
        """An input with a row for each history token."""
        return next((n for n in self.door.names("user") if self.door.inputs[n].shape[:1] == (TOKENS,)), None)

    @cached_property
    def _events(self) -> tuple[str, int] | None:
        """An input with an entry for each event of a history of any length, and the axis of these."""
        specs = (self.door.inputs[n] for n in self.door.names("user"))
        return next(((s.name, s.shape.index(TOKENS)) for s in specs if TOKENS in s.shape), None)

    def tokens(self, arrays: Mapping[str, Array]) -> int:
        """History tokens in a user's admitted inputs; 0 where the model has a fixed number."""
        name, axis = self._events or ("", 0)
        return int(arrays[name].shape[axis]) if name else 0

    @cached_property
    def sums(self) -> Mapping[str, TensorSpec]:
        """State tensors that are sums over all history tokens, and what takes the kept ones in the user grower."""
        return kept_sums(self.manifest)

    @cached_property
    def _takes(self) -> Mapping[str, frozenset[str]]:
        """Inputs of each graph."""
        return {name: frozenset(s.name for s in graph.inputs) for name, graph in self.manifest.graphs.items()}

    @cached_property
    def _rows_of(self) -> Mapping[str, str]:
        """State tensors with a row for each history token, or for each user, and which."""
        # Without offsets, B is whatever the model means by it.
        sizes = [*([USERS] if self.door.offsets else []), *([TOKENS] if self._per_token else [])]
        return {s.name: str(s.shape[0]) for s in self.manifest.state if s.shape[:1] and s.shape[0] in sizes}

    @cached_property
    def pieces(self) -> tuple[Mapping[str, str], ...]:
        """Of each piece behind the first that is read where it lies: its inputs, by the target scorer's."""
        return pieces_of(self.manifest) if self.pieces_scorer is not None else ()

    @cached_property
    def _given(self) -> tuple[str, ...]:
        """Outputs of the target scorer."""
        return tuple(s.name for s in self.manifest.graphs["target_scorer"].outputs)

    @cached_property
    def _shared(self) -> tuple[tuple[str, str, int, str, int], ...]:
        """Sizes of states that other inputs have too: the size, the state and its axis, the input and its."""
        others = [s for s in self.door.inputs.values() if s.scope != "user"]
        known = {n: (s.name, axis) for s in others for axis, n in enumerate(s.shape)}
        states = [s for s in self.manifest.state if not self.is_offsets(s)]  # which are made, and not kept
        sizes = [(n, s.name, axis) for s in states for axis, n in enumerate(s.shape)]
        return tuple((n, *of, *known[n]) for n, *of in sizes if isinstance(n, str) and n in known)  # type: ignore[misc]

    @cached_property
    def _counted(self) -> tuple[str, int] | None:
        """A target input and its axis with as many places as there are scores; None where either is fixed."""
        if not isinstance(next(iter(self.manifest.graphs["request"].outputs[0].shape), 0), str):
            return None
        shapes = {n: self.door.inputs[n].shape for n in self.door.names("target")}
        return self._counting or next(((n, 0) for n, of in shapes.items() if isinstance(next(iter(of), 0), str)), None)

    def _check_shared(self, state: UserState, row: Mapping[str, Array]) -> None:
        """Sizes that a state shares with the other inputs: where a user's rows are copies for targets, say."""
        for n, made, axis, name, at in self._shared:
            if (has := row[name].shape[at]) != (kept := state.tensors[made].shape[axis]):
                raise RequestError(
                    f"{name}: has shape {list(row[name].shape)}, with {n} = {has}; the user's inputs had {kept}"
                )

    def _joined(self, states: Sequence[UserState]) -> Mapping[str, StateArray]:
        """The tensors of several users' states as one ragged batch."""
        tokens = np.cumsum([0, *(s.tokens for s in states)])
        return {
            s.name: tokens.astype(s.dtype) if self.is_offsets(s) else join([one.tensors[s.name] for one in states])
            for s in self.manifest.state
        }

    def _pack(self, rows: Sequence[Mapping[str, Array]]) -> Mapping[str, Array]:
        """Admitted inputs of several requests as one ragged batch."""
        if len(rows) == 1:
            return rows[0]
        return {
            name: np.cumsum([0, *(r[name][-1] for r in rows)]).astype(first.dtype)
            if name in self.door.offsets
            else np.concatenate([r[name] for r in rows])
            for name, first in rows[0].items()
        }

    @cached_property
    def _counting(self) -> tuple[str, int] | None:
        """An input and its axis with a place for each target: of the size with that meaning, or that of the scores."""
        specs = [self.door.inputs[n] for n in self.door.names("target")]
        rows = self.manifest.graphs["target_scorer"].outputs[0].shape[:1]
        for size in (TARGETS, *(n for n in rows if isinstance(n, str))):
            if counting := next((s for s in specs if size in s.shape), None):
                return counting.name, counting.shape.index(size)
        return None

    def targets(self, row: Mapping[str, Array]) -> int | None:
        """How many targets a request has; None where the model's inputs do not say."""
        if self._counting is not None:
            name, axis = self._counting
            return int(row[name].shape[axis])
        sizes = {row[n].shape[:1] for n in self.door.names("target")}
        return next(iter(sizes))[0] if len(sizes) == 1 and () not in sizes else None

    def none(self) -> Array:
        """Scores of no target."""
        specs = self.manifest.graphs["request"].outputs
        return scores_of([np.zeros((0, *(n for n in s.shape if isinstance(n, int))), s.dtype) for s in specs])

    def is_offsets(self, spec: StateSpec) -> bool:
        """Whether a state tensor says where each user's tokens begin: then it is made anew, not cut or joined."""
        return spec.input in self.door.offsets

    def told(self) -> str:
        """Weights and engines, for the log."""
        engines = ", ".join(dict.fromkeys((self.encoder.name, self.scorer.name)))
        return f"weights {self.manifest.weights[:12]}, {engines}"


def _fed(known: Mapping[str, Any], taken: frozenset[str]) -> Mapping[str, Any]:
    """What a graph takes of all that is known."""
    return known if known.keys() == taken else {n: known[n] for n in taken}
