"""Serve a bundle: `Session.load`, `score`, `append`, `amend`, `warm`, `forget`, `swap`. Needs numpy and onnxruntime."""

from stca.runtime.cache import StateCache
from stca.runtime.deadline import Deadline
from stca.runtime.engine import Engine, OnnxRuntimeEngine
from stca.runtime.memory_pool import MarginalUtility, SplitPolicy, Static
from stca.runtime.options import OnnxRuntimeOptions
from stca.runtime.recording import Recording
from stca.runtime.request import Request, RequestBatch
from stca.runtime.scoring import Answer
from stca.runtime.session import Session
from stca.runtime.split_file import Recorded, Replayed
from stca.runtime.state import UserState
from stca.runtime.store import Residence, StoreStats
from stca.runtime.tables import RowSource

__all__ = [
    "Answer",
    "Deadline",
    "Engine",
    "MarginalUtility",
    "OnnxRuntimeEngine",
    "OnnxRuntimeOptions",
    "Recorded",
    "Recording",
    "Replayed",
    "Request",
    "RequestBatch",
    "Residence",
    "RowSource",
    "Session",
    "SplitPolicy",
    "StateCache",
    "Static",
    "StoreStats",
    "UserState",
]
