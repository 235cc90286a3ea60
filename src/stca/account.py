"""What a bundle tells of its making: model, cut, parity and parts in 8 bits, as commands and the report read it.

A server needs none of it, so that loading does not ask; what prints it checks it first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from stca import typed_json
from stca.errors import BundleError
from stca.manifest import MANIFEST, Manifest
from stca.specs import ITEM_BYTES, Reason

Told: TypeAlias = Mapping[str, Any]
_Names: TypeAlias = tuple[str, ...]
_Rows: TypeAlias = tuple[Told, ...]
# The types of what is told, by name; of those that end in "?", None may stand there, or nothing.
_CUT: dict[str, Any] = {
    **dict.fromkeys(
        ("state_bytes", "bytes_per_token", "user_work", "recomputed_work", "request_work", "target_work"), int
    ),
    "hit_work_without_rules?": int,
    "workload": Mapping[str, int],
    "reasons?": tuple[Reason, ...],
    **dict.fromkeys(("encoder_nodes?", "scorer_nodes?", "rules_without_a_place?"), _Names),
    "lifted?": Told,
    **dict.fromkeys(("tables?", "rules?"), _Rows),
    "notes": _Names,
    "request_dependencies": _Rows,
}
_VERDICTS: dict[str, dict[str, Any]] = {
    "tables": {"table": str, "bytes": int, "why?": str},
    "rules": {"rule": str, "node": str, "why?": str},
}
_STAGE: dict[str, Any] = {
    **dict.fromkeys(("name", "against"), str),
    **dict.fromkeys(("max_abs", "max_rel", "cosine", "topk_overlap"), float),
    "limit?": float,
    "passed": bool,
}
_PARITY: dict[str, Any] = {"passed": bool, "reference": str, "left_out?": _Names}
_KIND: TypeAlias = Literal["int8", "fp8"]
_EIGHT_BITS: dict[str, Any] = {"kind": _KIND, "tensors": _Names, "activations?": str, "granularity?": str}
_PART: dict[str, Any] = {"name": str, "node": str, "rms": float, "saved": int}
_TRIED: dict[str, Any] = {
    **dict.fromkeys(("quantized", "high"), _Names),
    **dict.fromkeys(("ratio", "weights_ratio", "rms"), float),
    "bytes": int,
    "verdict": Literal["holds", "undecided", "broken"],
    "measures": _Rows,
}


def check_account(manifest: Manifest, *, cut: bool = True) -> None:
    """Check what commands and the report read of a bundle beside its graphs, and a server does not need.

    Args:
        manifest: of the bundle.
        cut: whether it must tell of its cut.

    Raises:
        BundleError: naming the first entry of `model`, `precision`, `split`, `parity` or `quantization` that is not of
            its kind.
    """
    try:
        _check_model(manifest)
        if cut:
            _check_cut(manifest.split)
        if manifest.parity.get("stages"):
            _check(manifest.parity, _PARITY, "parity")
            for place, stage in _rows(manifest.parity["stages"], "parity: stages"):
                _check(stage, _STAGE, place)
        _check_eight_bits(manifest.quantization or {})
    except (TypeError, ValueError) as e:
        raise BundleError(f"{MANIFEST} is malformed ({e}); export the bundle again") from e


def _check(told: Told, kinds: Mapping[str, Any], where: str) -> None:
    """Raises TypeError or ValueError naming the first of a part's entries that is of another type."""
    for name, kind in kinds.items():
        value = told.get(name.removesuffix("?"))
        if value is not None or not name.endswith("?"):
            typed_json.as_type(kind, value, f"{where}: {name.removesuffix('?')}")


def _rows(told: Any, where: str) -> list[tuple[str, Told]]:
    rows: _Rows = typed_json.as_type(_Rows, told, where)
    return [(f"{where}[{i}]", row) for i, row in enumerate(rows)]


def _check_model(manifest: Manifest) -> None:
    model = manifest.model
    if model.get("kind") not in ("stca", "callable", "onnx"):
        raise ValueError(f"model: kind is {model.get('kind')!r:.60}, expected stca, callable or onnx")
    if model["kind"] == "stca":
        typed_json.as_type(Told, model.get("config"), "model: config")
    if manifest.precision not in ITEM_BYTES or "float" not in manifest.precision:
        raise ValueError(f"precision: {manifest.precision!r:.60} is no floating-point dtype")


def _check_cut(split: Told) -> None:
    _check({"notes": (), "request_dependencies": (), **split}, _CUT, "split")
    split = {name: told for name, told in split.items() if told is not None}
    typed_json.as_type(Mapping[str, str], split.get("lifted", {}).get("decisions", {}), "split: lifted: decisions")
    for place, one in _rows(split.get("request_dependencies", ()), "split: request_dependencies"):
        typed_json.as_type(str, one.get("text"), f"{place}: text")
    for name, kinds in _VERDICTS.items():
        for place, one in _rows(split.get(name, ()), f"split: {name}"):
            _check(one, kinds, place)


def _check_eight_bits(told: Told) -> None:
    for part in ("state", "tables", "weights"):
        if part in told:
            _check(typed_json.as_type(Told, told[part], f"quantization: {part}"), _EIGHT_BITS, f"quantization: {part}")
    if "budget" not in told or not told.get("tried"):
        return
    _check(told, {"budget": Told, "requests": int, "float32_bytes": int, "parts": _Rows}, "quantization")
    _check(told["budget"], {"auc?": float, "top": Mapping[str, float]}, "quantization: budget")
    for place, one in _rows(told["parts"], "quantization: parts"):
        _check(one, _PART, place)
    for place, tried in _rows(told["tried"], "quantization: tried"):
        _check(tried, _TRIED, place)
        for where, measure in _rows(tried["measures"], f"{place}: measures"):
            _check(measure, {"name": str, "estimate": Told}, where)
            _check(measure["estimate"], {"value": float}, f"{where}: estimate")
