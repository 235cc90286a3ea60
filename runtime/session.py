"""The production front: seven calls, with the user side computed once and reused."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import NoReturn

from numpy.typing import ArrayLike

from stca.arrays import Array
from stca.bundle import Bundle
from stca.errors import EngineError, RequestError, UsageError
from stca.manifest import Manifest
from stca.opening import opened
from stca.runtime.batching import ALONE, Batcher, Runs
from stca.runtime.changing import change, checked_place
from stca.runtime.client_values import key_of, no_request
from stca.runtime.deadline import Deadline, Wanted
from stca.runtime.engine import Engine
from stca.runtime.machine import mark_after_fork
from stca.runtime.memory_pool import STATES, MemoryPool, SplitPolicy
from stca.runtime.model import Model
from stca.runtime.options import OnnxRuntimeOptions, Options
from stca.runtime.recording import Recorder, Recording
from stca.runtime.request import MOST_TARGETS, Request, RequestBatch
from stca.runtime.scoring import Answer, Asked, Scoring, column_names, joined
from stca.runtime.state import LOG
from stca.runtime.store import Residence, StateStore, StoreStats
from stca.runtime.swap import check_swap
from stca.runtime.tables import RowSource, on_cpu
from stca.runtime.turns import Turns
from stca.runtime.user_states import UserStates
from stca.signature import Key


class Session:
    """Scores targets for users. One session serves many threads. Make one with `Session.load`."""

    def __init__(self, model: Model, store: StateStore, options: Options) -> None:
        self._model, self._store, self._options = model, store, options
        store.serve(model.manifest.weights, model.format)
        self._pool = None if options.split is None else MemoryPool.of(options.split, options.cache_bytes, store)
        if self._pool is not None:
            self._pool.serve(model.row_caches)
        self._states = UserStates(store, check_versions=options.check_versions)
        self._turns = Turns(model.side_by_side)
        self._scoring = Scoring(self._states, self._turns)
        self._swapping = threading.Lock()
        self._recorder = None if options.record is None else Recorder(options.record)
        self._batcher: Batcher[Asked, Answer] | None = None
        if options.batch_seconds is not None:
            run, places = self._scoring.answers, model.side_by_side
            self._batcher = Batcher(run, options.batch_tokens, options.batch_seconds, places)
        self._at_once = self._batcher is None and self._recorder is None and not options.check_versions
        self.forked = self._closed = False
        mark_after_fork(self)

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str],
        *,
        cache_bytes: int = 1 << 30,
        threads: int | None = None,
        truncate: bool = False,
        engine: str | None = None,
        precision: str | None = None,
        trusted: Key | None = None,
        native_code: bool = False,
        max_users: int | None = None,
        max_targets: int = MOST_TARGETS,
        ttl_seconds: float | None = None,
        check_finite: bool = True,
        check_versions: bool = False,
        state_folder: str | os.PathLike[str] | None = None,
        state_folder_bytes: int = 1 << 33,
        batch_seconds: float | None = None,
        batch_tokens: int = 1024,
        onnxruntime: OnnxRuntimeOptions | None = None,
        gpu: int = 0,
        tables: Mapping[str, RowSource] | None = None,
        record: Recording | None = None,
        split: SplitPolicy | None = None,
    ) -> Session:
        """Load a bundle, checking every file of it.

        Args:
            bundle: its directory.
            cache_bytes: most bytes of user states to keep between requests; 0 keeps none.
            threads: threads of one request; None takes every processor that this process may use. A server with
                several callers at once does best with processors / callers.
            truncate: serve the most recent part of a history longer than bundle and engines take, and do not refuse it.
            engine: onnxruntime, tensorrt or tensorrt-rtx, whose built engines must run here, or graphs for the bundle's
                own graphs on a CPU; None takes the fastest that runs, and `engines` says which and why.
            precision: of that engine, fp32, bf16 or fp16; None takes the fastest that was built.
            trusted: Ed25519 public key, as the path or the bytes of a PEM file: this bundle, and those swapped in, must
                be signed by its holder (`stca sign`). None takes anyone's bundle.
            native_code: open engines that carry native code, as TensorRT's with our C++ plugin do, of bundles that no
                `trusted` key vouches for. Others are passed over, and refused where `engine` asks for them.
            max_users: most users whose states are kept; None for as many as fit into `cache_bytes`.
            max_targets: most targets of a request, or of a batch together.
            ttl_seconds: how long a state is kept; None for ever.
            check_finite: raise an EngineError where a score is NaN or infinite.
            check_versions: for debugging, refuse a history that is sent with the version of another one that is kept;
                otherwise a history sent on a hit is not looked at.
            state_folder: of files in which states outlive memory and the process, for engines on a CPU. It is this
                session's own until that is closed; None keeps states in memory alone.
            state_folder_bytes: most bytes of files in it.
            batch_seconds: compute requests together that find no processor free (processors / `threads` compute at a
                time). So many seconds a request waits for others even where one is; 0 for not at all. None computes
                each request by itself, at once.
            batch_tokens: most history tokens and targets of requests that are computed together. A request of so many
                is computed by itself, and no smaller one waits for it.
            onnxruntime: execution providers and settings of ONNX Runtime, which then runs the bundle's own graphs.
            gpu: number of the GPU for TensorRT's engines, as CUDA counts those that this process may see.
            tables: your own source of rows, a parameter server say, by the name of a table that left the graphs (`stca
                inspect` has them); the others, and all of them with None, are looked up in the bundle's files. States
                that are kept hold the rows of their time.
            record: keep a share of the requests as a trace; None records nothing.
            split: shares `cache_bytes` out between user states and rows of the bundle's table files, as
                `MarginalUtility()` does, for files on a slow disk: the page cache is faster. None keeps states alone.

        Raises:
            UsageError: when an option is not of the kind or in the range above.
            BundleError: when the bundle is missing, damaged, too new, or not signed by the holder of `trusted`.
            BuildError: when the engine cannot load a graph.
        """
        options = Options(
            cache_bytes=cache_bytes,
            threads=threads,
            truncate=truncate,
            engine=engine,
            precision=precision,
            trusted=trusted,
            native_code=native_code,
            max_users=max_users,
            max_targets=max_targets,
            ttl_seconds=ttl_seconds,
            check_finite=check_finite,
            check_versions=check_versions,
            state_folder=state_folder,
            state_folder_bytes=state_folder_bytes,
            batch_seconds=batch_seconds,
            batch_tokens=batch_tokens,
            onnxruntime=onnxruntime,
            gpu=gpu,
            tables=tables,
            record=record,
            split=split,
        )
        began = time.perf_counter()
        model = opened(bundle, lambda found: Model.load(found, options), trusted=trusted)
        LOG.info("loaded %r: %s, in %.2f s", os.fspath(bundle), model.told(), time.perf_counter() - began)
        if options.state_folder is not None and not on_cpu(model.encoder):
            raise UsageError(f"state_folder: is for engines on a CPU, not {model.encoder.name}; leave it out")
        store = StateStore.of(
            options.cache_bytes,
            max_users=options.max_users,
            ttl_seconds=options.ttl_seconds,
            folder=None if options.state_folder is None else Path(options.state_folder),
            folder_bytes=options.state_folder_bytes,
        )
        try:
            return cls(model, store, options)
        except BaseException:
            store.close()  # or its folder stays taken
            raise

    def score(self, request: Request | RequestBatch, *, deadline: Wanted = None) -> Array:
        """Scores `(targets, tasks)` of a request; of a batch, all requests' targets one after the other.

        A user whose state is kept is not encoded again; a batch goes through the target scorer in one piece.

        Args:
            request: one, or a batch of them.
            deadline: seconds from now in which the scores are of use, or a `Deadline`, which can be cancelled; it is
                looked at before work begins and between its stages.

        Raises:
            RequestError: naming the input, the value and the limit; nothing was computed or kept.
            EngineError: when an engine fails on valid inputs.
            DeadlineError, CancelledError: when the scores are not wanted any more; a state that was made is kept.
        """
        return self.answer(request, deadline=deadline).scores

    def answer(self, request: Request | RequestBatch, *, deadline: Wanted = None) -> Answer:
        """As `score`, and tells of each request whether it was a hit, and how long the stages took.

        Raises:
            RequestError, EngineError, DeadlineError, CancelledError: as `score`.
        """
        began, model = time.perf_counter(), self._running()
        if self._at_once and deadline is None and type(request) is Request:  # noqa: SIM102
            if (at_once := self._scoring.at_once(model, request, began)) is not None:
                return at_once
        wanted = Deadline.of(deadline)
        wanted.check()
        if not isinstance(request, (Request, RequestBatch)):
            raise RequestError(no_request(request))
        requests = model.door.unpack(request) if isinstance(request, RequestBatch) else (request,)
        asked = self._scoring.asked(model, requests, self._recorder)
        checked = time.perf_counter() - began
        if not asked:  # nothing is run, and nobody encoded, for no scores
            return Answer(model.none(), (False,) * len(requests), {"check": checked})
        if len(asked) > 1 or self._batcher is None:
            answer = joined(self._scoring.answers(asked, wanted))
        else:
            cost = asked[0].cost if model.door.ragged and asked[0].ready else ALONE
            answer = self._batcher.call(asked[0], cost, wanted)
        answer.seconds["check"] = checked
        return answer

    def append(
        self, user: Hashable, events: Mapping[str, ArrayLike], version: Hashable, *, after: Hashable = None
    ) -> bool:
        """Add new events, oldest first, to a kept state: only they are encoded, and the result is exact. Where states
        are sums over events, these may wait for the next request, a hit that takes longer then.

        Args:
            user: whose state.
            events: the per-token user inputs of the new events, by name; where states are sums over events (the
                manifest's `append`), the user's other inputs too, as they are now.
            version: of the history with the new events; the next request for it is a hit. Where it is kept already, the
                call counts as one made again, and adds nothing.
            after: version of the history they follow. Nothing is appended to another one, so no event lost on the way
                goes unnoticed; None appends to whichever is kept in memory.

        Returns:
            Whether the state with the new events is kept. If not, the next request brings the history: none was there
            to append to, it went or changed meanwhile, the new one is over the budget, or a sum would hold more events
            than `max_history`.

        Raises:
            RequestError: when an input is wrong, `version` is `after`, or the model's tokens depend on each other or on
                the request.
        """
        return change(self._running(), self._store, self._turns, user, events, version, after)

    def amend(
        self, user: Hashable, events: Mapping[str, ArrayLike], version: Hashable, *, at: int, after: Hashable = None
    ) -> bool:
        """Put corrected events in the place of kept ones, as when a label arrives late; exact, as `append`.

        Args:
            user: whose state.
            events: all per-token user inputs of the corrected events, by name.
            version: of the history with the corrections; the next request for it is a hit.
            at: place of the first in the kept history: 0 is the oldest event, -1 the newest; old ones may fall off.
            after: version of the history that is corrected; None amends whichever is kept in memory.

        Returns:
            Whether the amended state is kept; otherwise the next request brings the history.

        Raises:
            RequestError: as `append`, and when `at` is no integer, or not all events are within the kept history.
        """
        return change(self._running(), self._store, self._turns, user, events, version, after, checked_place(at))

    def warm(
        self, user: Hashable, history: Mapping[str, ArrayLike], version: Hashable = None, *, deadline: Wanted = None
    ) -> bool:
        """Make and keep a user's state ahead of the request that needs it, while targets are being recalled, say.

        It runs once a processor is free of scores, in the caller's thread. A request for the same version that comes
        meanwhile joins the encoding, or makes the state itself where that has not begun.

        Args:
            user: whose state.
            history: the user inputs, as a request has them; inputs of other scopes are not looked at. They may be left
                out where the version may be kept already.
            version: of the history; None takes a digest of the user inputs, as a request without version does.
            deadline: as of `score`; without one, a warm waits for its turn as long as it takes.

        Returns:
            Whether the state is kept: a request for it is a hit. Not when it is over the budget.

        Raises:
            RequestError, EngineError, DeadlineError, CancelledError: as `score`.
        """
        wanted = Deadline.of(deadline)
        wanted.check()
        model = self._running()
        return self._scoring.warm(model, user, history, version, wanted)

    def residence(self, user: Hashable, version: Hashable = None) -> Residence | None:
        """Where the user's state is kept, for a router; None where a request would be a miss. It counts as no use.

        Args:
            user: whose state.
            version: only of this history; None for whichever is kept.
        """
        self._running()
        return self._store.residence(key_of("user", user), key_of("version", version))

    def forget(self, user: Hashable) -> bool:
        """Drop what is kept of a user, and what is being encoded of them; False when nothing was."""
        self._running()
        return self._states.forget(key_of("user", user))

    def swap(self, bundle: str | os.PathLike[str]) -> None:
        """Serve another bundle from the next request on; running ones finish on the old. States of other weights go.

        Raises:
            BundleError, BuildError: as `load`, and when the bundle takes other inputs or gives other scores than the
                one being served, so that its clients' requests would fail. The session goes on with the bundle it has.
        """

        def load(found: Bundle) -> Model:
            check_swap(bundle, self._model.manifest, found.manifest)
            return Model.load(found, self._options)

        self._running()
        began = time.perf_counter()
        model = opened(bundle, load, trusted=self._options.trusted)
        LOG.info("swapped in %r: %s, in %.2f s", os.fspath(bundle), model.told(), time.perf_counter() - began)
        with self._swapping:  # else, of two at once, one's model would be served and the other's states kept
            self._model = model
            self._store.serve(model.manifest.weights, model.format)
            if self._pool is not None:
                self._pool.serve(model.row_caches)

    @property
    def manifest(self) -> Manifest:
        """Manifest of the bundle being served."""
        return self._model.manifest

    @property
    def tasks(self) -> tuple[str, ...]:
        """What each column of the scores is: an output's name, or `name[i]` where an output has several columns."""
        return column_names(self._model.manifest)

    @property
    def engines(self) -> Mapping[str, str]:
        """Which engine runs each half, in which `precision`, `why` that one, and why no other (`passed_over`)."""
        model = self._model
        return {"user_encoder": model.encoder.name, "target_scorer": model.scorer.name, **model.choice.told()}

    def close(self) -> None:
        """Give back the kept states; the session takes no more requests. A `with` block closes it at its end."""
        self._closed = True
        if self.forked:  # where another thread's lock would stay locked, and the parent records
            return
        if self._recorder is not None:
            self._recorder.close()
        if self._pool is not None:
            self._pool.close()
        self._store.close()

    def __reduce__(self) -> NoReturn:
        raise UsageError("a session cannot be copied, nor sent to another process; load the bundle there")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def loaded_engines(self) -> tuple[Engine, Engine]:
        """The engines of both halves."""
        return self._model.encoder, self._model.scorer

    def _running(self) -> Model:
        """The model being served.

        Raises:
            EngineError: in a process that was forked after the session was loaded, or when it is closed.
        """
        if self.forked or self._closed:
            self._check_here()
            raise EngineError("the session is closed; load another")
        return self._model

    def _check_here(self) -> None:
        if self.forked:
            raise EngineError(
                "this process was forked after Session.load, and engines' threads stay behind; load the session in the "
                "child, or start children with the spawn method"
            )

    def runs(self) -> dict[int, Runs]:
        """Where `batch_seconds` was given: how often so many requests were computed together, and for how long."""
        return {} if self._batcher is None else self._batcher.runs()

    def memory(self) -> Mapping[str, int]:
        """Bytes of `cache_bytes` that are now for user states (`states`) and for rows of each table, by its name."""
        self._check_here()
        return {STATES: self._options.cache_bytes} if self._pool is None else self._pool.bytes()

    def stats(self) -> StoreStats:
        """What the state store holds and did."""
        self._check_here()
        return self._store.stats()
