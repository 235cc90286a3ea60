"""The picture of a split graph: history comes from the left, targets from the right, and they meet at the cut.

Columns are fixed and a row is an attention layer, so that nearly every edge is a straight line. What goes everywhere
and weighs nothing (offsets, lengths) is not drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from stca.report.blocks import LABELS, Block, Condensed, Key, State
from stca.report.formats import byte_count, flop_count, share
from stca.report.markup import el, polyline, svg

_GAP, _HEADER, _ROW, _ROW_GAP, _CHIP = 24.0, 70.0, 82.0, 18.0, 40.0
_COLUMNS = (
    ("in_user", 134), ("tokens", 100), ("encode", 142), ("cut", 186), ("request_tokens", 100), ("request_encode", 112),
    ("attention", 142), ("query", 108), ("target", 104), ("in_target", 134),
)  # fmt: skip
_COLUMN_OF = {"features": "encode", "per_request": "request_encode", "head": "attention"}
_TALL = {"tokens", "request_tokens", "target"}
_MOST_CHIPS = {"layer": 3, "shared": 8, "other": 5}
_PER_LETTER = 7.3  # width of a letter of the fixed-width text


@dataclass(frozen=True)
class _Box:
    x: float
    y: float
    w: float
    h: float

    @property
    def right(self) -> float:
        return self.x + self.w

    @property
    def bottom(self) -> float:
        return self.y + self.h

    @property
    def middle(self) -> float:
        return self.y + self.h / 2

    @property
    def center(self) -> float:
        return self.x + self.w / 2


def block_picture(graph: Condensed) -> Markup:
    """`graph` as inline SVG."""
    return _Picture(graph).draw()


class _Picture:
    def __init__(self, graph: Condensed) -> None:
        self.graph = graph
        self.blocks = {b.key: b for b in graph.blocks}
        self.heaviest = max((b.flops for b in graph.blocks), default=1)
        self.lanes = {
            r: _fold([s for s in graph.state if s.row == r], _MOST_CHIPS["layer"])
            for r in range(1, len(graph.rows) + 1)
        }
        # Computed ones below those that are inputs as they came, whose edges then pass above the block.
        shared = sorted((s for s in graph.state if s.row == 0), key=lambda s: not self._verbatim(s))
        self.shared = _fold(shared, _MOST_CHIPS["shared"])
        # Those that the head reads itself above those that go by what is done once per request.
        other = [s for s in graph.state if s.row is None]
        direct = [s for s in other if (("state", s.name), ("head", 0)) in graph.edges]
        via = sorted((s for s in other if s not in direct), key=self._verbatim)
        self.direct, self.via = _fold(direct, _MOST_CHIPS["other"]), _fold(via, _MOST_CHIPS["other"])
        self.columns = self._columns()
        self._place_rows()
        self.boxes: dict[Key, _Box] = {}
        self._place_blocks()
        self._place_chips()

    def _verbatim(self, state: State) -> bool:
        return (("in", "user"), ("state", state.name)) in self.graph.edges

    # Where things are.

    def _columns(self) -> dict[str, _Box]:
        used = {"in_user", "cut", "in_target", "attention"} | {
            _COLUMN_OF.get(b.kind, b.kind) for b in self.graph.blocks
        }
        x, found = 16.0, {}
        for name, width in _COLUMNS:
            if name in used:
                found[name] = _Box(x, 0, width, 0)
                x += width + _GAP
        self.width = x - _GAP + 16
        return found

    def _place_rows(self) -> None:
        count = len(self.lanes)
        heights = [max(_ROW, len(self.lanes[r]) * _CHIP) for r in self.lanes]
        strip = len(self.shared) * _CHIP
        self.strip = strip if any(self.lanes.values()) else 0.0  # above the layers, unless the column is free anyway
        if not self.strip:
            lacking = strip - (sum(heights) + max(0, count - 1) * _ROW_GAP)
            heights = [h + max(0.0, lacking) / count for h in heights]
        y = _HEADER + self.strip
        self.rows: dict[int, tuple[float, float]] = {}
        for r, h in enumerate(heights, 1):
            self.rows[r] = (y, h)
            y += h + _ROW_GAP
        self.rows_end = y - _ROW_GAP
        above, below = len(self.direct) * _CHIP, len(self.via) * _CHIP
        if ("per_request", 0) in self.blocks:
            below = max(below, _ROW)
        self.last = (y + (12 if count else 0), max(_ROW if count else 120.0, above + below))
        self.height = self.last[0] + self.last[1] + 34 + 30 + 22

    def _span(self, kind: str) -> tuple[float, float]:
        """Top and height of a block that is as tall as all layers; of the last row where there are no layers."""
        return (_HEADER, self.rows_end - _HEADER) if self.rows else self.last

    def _place_blocks(self) -> None:
        for (kind, row), block in self.blocks.items():
            column = self.columns[_COLUMN_OF.get(kind, kind)]
            y, h = self._span(kind) if kind in _TALL else self.rows[block.row] if block.row else self.last
            if kind == "head" and self.rows:
                right = self.columns.get("target", self.columns.get("query", column)).right
                column = replace(column, w=right - column.x)
            if kind == "features":
                h = min(h, _ROW)
            if kind == "per_request":
                y, h = y + len(self.direct) * _CHIP, h - len(self.direct) * _CHIP
            self.boxes[kind, row] = _Box(column.x, y, column.w, h)
        bottom = sum(self.last) - _HEADER
        self.boxes["in", "user"] = _Box(self.columns["in_user"].x, _HEADER, self.columns["in_user"].w, bottom)
        y, h = self._span("target")
        self.boxes["in", "target"] = _Box(self.columns["in_target"].x, y, self.columns["in_target"].w, h)
        below = sum(self.last) + 34
        scores = self.boxes.get(("head", 0)) or self.boxes.get(("attention", len(self.rows)))
        if scores:
            self.boxes["out", ""] = _Box(scores.center - 70, below, 140, 30)
        if self.graph.inputs["request"]:
            readers = (("request_tokens", 0), ("per_request", 0), ("request_encode", len(self.rows)))
            over = [self.boxes[key] for key in readers if key in self.boxes]
            over = over or [self.columns["in_target"]]  # targets alone read them
            x = min(box.x for box in over)
            self.boxes["in", "request"] = _Box(x, below, max(box.right for box in over) - x, 30)

    def _place_chips(self) -> None:
        column = self.columns["cut"]
        places: list[tuple[Sequence[State], float, float]] = [(self.lanes[r], y, h) for r, (y, h) in self.rows.items()]
        y, h = self.last
        middle = y + (len(self.direct) * _CHIP if self.via else h)
        places += [
            (self.shared, _HEADER, self.strip or self.rows_end - _HEADER),
            (self.direct, y, middle - y),
            (self.via, middle, y + h - middle),
        ]
        for states, y, h in places:
            top = y + (h - len(states) * _CHIP) / 2
            for i, s in enumerate(states):
                self.boxes["state", s.name] = _Box(column.x, top + i * _CHIP + 2, column.w, _CHIP - 4)
        tokens = self.boxes.get(("tokens", 0))
        computed = [self.boxes["state", s.name] for s in self.shared if not self._verbatim(s)]
        if tokens and computed and "encode" not in self.columns:  # no taller than what it makes
            h = max(_ROW, computed[-1].bottom - computed[0].y)
            self.boxes["tokens", 0] = replace(tokens, y=computed[0].y, h=h)

    # Edges.

    def _edges(self) -> list[Markup]:
        parts = []
        for a, b in sorted(self.graph.edges, key=str):
            if a in self.boxes and b in self.boxes and self._drawn(a, b):
                parts.append(_wire(self.boxes[a], self.boxes[b]))
        for s in (*self.lanes.values(), self.shared, self.direct, self.via):
            parts += [_wire(*ends) for ends in self._folded(s)]
        return parts + self._bus()

    def _drawn(self, a: Key, b: Key) -> bool:
        edges, (kind, row) = self.graph.edges, b
        if kind == "attention":
            if a[0] == "state":
                return next(s.row for s in self.graph.state if s.name == a[1]) in (0, row)
            better = {"in": ("query", "target"), "target": ("query",), "request_tokens": ("request_encode",)}
            if any(((k, r), b) in edges for k in better.get(a[0], ()) for r in (0, row)):
                return False
            return a[0] not in ("attention", "per_request", "head") and a != ("in", "user")
        if a[0] in ("attention", "query") and kind in ("query", "head"):
            return False  # these are the bus
        if a == ("in", "target") and kind == "head":
            return not self.rows and ("target", 0) not in self.boxes
        return not (a[0] == "request_tokens" and kind not in ("request_encode", "attention"))

    def _folded(self, states: Sequence[State]) -> list[tuple[_Box, _Box]]:
        """Ends of the edges of the chip that stands for several state tensors: as the chip above it has them."""
        if len(states) < 2 or ("state", states[-1].name) in {e for edge in self.graph.edges for e in edge}:
            return []
        chip, above = self.boxes["state", states[-1].name], ("state", states[-2].name)
        pairs = [(a, b) for a, b in self.graph.edges if above in (a, b) and self._drawn(a, b)]
        return [(chip, self.boxes[b]) if a == above else (self.boxes[a], chip) for a, b in sorted(pairs, key=str)]

    def _bus(self) -> list[Markup]:
        """What leaves an attention layer: straight down from the last to the head, one line past all later queries."""
        parts, head = [], self.boxes.get(("head", 0))
        last = self.boxes.get(("attention", len(self.rows)))
        if head and last:
            parts.append(_path((last.center, last.bottom), (last.center, head.y)))
        leaving = [r for r in self.rows if r < len(self.rows) and ("attention", r) in self.boxes]
        entered = [r for r in self.rows if r > 1 and ("query", r) in self.boxes]
        if not leaving or not last:
            return parts
        x = last.right + _GAP / 2
        begin = self.boxes["attention", leaving[0]].bottom - 11
        skips = any(
            a[0] in ("attention", "query") and a[1] != len(self.rows) and b[0] == "head" for a, b in self.graph.edges
        )
        queries = [self.boxes["query", r] for r in entered]
        end = head.y if skips and head else max((q.y + 11 for q in queries), default=begin)
        for r in leaving:
            box = self.boxes["attention", r]
            parts.append(_path((box.right, box.bottom - 11), (x, box.bottom - 11), arrow=False))
        parts.append(_path((x, begin), (x, end), arrow=bool(skips)))
        parts += [_path((x, q.y + 11), (q.x, q.y + 11)) for q in queries]
        return parts

    # What is seen.

    def draw(self) -> Markup:
        cut = self.columns["cut"]
        user, target = (self.graph.side_flops(side) / max(1, self.graph.flops) for side in ("user", "target"))
        ahead = f"runs once per user and is kept · {share(user)} of the work" if user else "keeps inputs as they came"
        bottom = self.height - 8
        parts = [
            el("defs", el("marker", el("path", d="M0 0 8 4 0 8z"), id="arrow", viewBox="0 0 8 8", refX="7.5", refY="4",
                          markerWidth="7", markerHeight="7", orient="auto")),
            el("rect", x=8, y=4, width=cut.center - 8, height=bottom - 4, class_="region user"),
            el("rect", x=cut.center, y=4, width=self.width - 8 - cut.center, height=bottom - 4, class_="region target"),
            el("line", x1=cut.center, x2=cut.center, y1=52, y2=bottom, class_="cut"),
            el("text", "User encoder", x=18, y=30, class_="side user"),
            el("text", ahead, x=18, y=48, class_="note"),
            el("text", "Target scorer", x=self.width - 18, y=30, class_="side target", text_anchor="end"),
            el("text", f"runs for every request · {share(target)} of the work", x=self.width - 18, y=48, class_="note",
               text_anchor="end"),
            el("text", "User state", x=cut.center, y=30, class_="side", text_anchor="middle"),
            el("text", byte_count(sum(s.bytes for s in self.graph.state)), x=cut.center, y=48, class_="note",
               text_anchor="middle"),
        ]  # fmt: skip
        parts += self._edges()
        for scope in ("user", "target", "request"):
            if ("in", scope) in self.boxes:
                parts.append(self._names(self.graph.inputs[scope], self.boxes["in", scope], scope))
        if out := self.boxes.get(("out", "")):
            parts.append(self._names(self.graph.outputs, out, "target"))
        parts += [self._block(block, self.boxes[key]) for key, block in self.blocks.items()]
        for states in (*self.lanes.values(), self.shared, self.direct, self.via):
            parts += [self._chip(s) for s in states]
        return svg(self.width, self.height, "The two graphs and their cut", self._in_words(), parts, kind="graph",
                   style=f"min-width: {0.92 * self.width:.0f}px; max-width: {1.1 * self.width:.0f}px")  # fmt: skip

    def _block(self, block: Block, box: _Box) -> Markup:
        part = block.flops / max(1, self.graph.flops)
        kind = "request" if str(block.scope) == "request" or block.kind == "per_request" else block.side
        row = [self.graph.row_name(block.row)] if block.row else []
        lines = [*_wrapped(LABELS[block.kind], box.w), *row, f"{share(part)} · {flop_count(block.flops)}"]
        if box.w < 115:
            lines[-1:] = [share(part), flop_count(block.flops)] if box.h > 100 else [share(part)]
        top = box.middle - 7.5 * (len(lines) - 1) + (0 if box.h > 100 else -1)
        strong = len(_wrapped(LABELS[block.kind], box.w))
        operators = ", ".join(f"{n} {op}" for op, n in block.operators.items())
        return el(
            "g",
            el("title", f"{LABELS[block.kind]} {' '.join(row)}: {flop_count(block.flops)}. {operators}"),
            el("rect", x=box.x, y=box.y, width=box.w, height=box.h, rx=8, class_="paper"),
            el("rect", x=box.x, y=box.y, width=box.w, height=box.h, rx=8, class_="fill",
               fill_opacity=0.06 + 0.34 * (block.flops / self.heaviest) ** 0.5),
            [
                el("text", line, x=box.center, y=top + 15 * i + 2, text_anchor="middle",
                   class_="label" if i < strong else "note")
                for i, line in enumerate(lines)
            ],
            el("rect", x=box.x + 8, y=box.bottom - 8, width=box.w - 16, height=3, rx=1.5, class_="track"),
            el("rect", x=box.x + 8, y=box.bottom - 8, width=max(1.0, (box.w - 16) * part), height=3, rx=1.5,
               class_="meter"),
            class_=f"block {kind}",
        )  # fmt: skip

    def _chip(self, state: State) -> Markup:
        box = self.boxes["state", state.name]
        each = f"{byte_count(state.bytes_per_token)} per event · " if state.bytes_per_token else ""
        return el(
            "g",
            el("title", f"{state.name}: {state.about}, {each}{byte_count(state.bytes)}"),
            el("rect", x=box.x, y=box.y, width=box.w, height=box.h, rx=box.h / 2, class_="paper"),
            el("text", _clip(state.name, box.w - 16), x=box.center, y=box.middle - 4, text_anchor="middle",
               class_="code"),
            el("text", f"{each}{byte_count(state.bytes)}", x=box.center, y=box.middle + 11, text_anchor="middle",
               class_="note"),
            class_="chip verbatim" if self._verbatim(state) else "chip",
        )  # fmt: skip

    def _names(self, names: Sequence[str], box: _Box, scope: str) -> Markup:
        fit = max(1, int((box.h - 10) // 16))
        if box.h < 40:  # one line for all
            shown = [_clip(", ".join(names), box.w - 8)]
        else:
            shown = [_clip(n, box.w - 8) for n in names[:fit]]
            if len(names) > fit:
                shown[-1] = f"and {len(names) - fit + 1} more"
        top = box.middle - 8 * (len(shown) - 1) + 4
        return el(
            "g",
            el("title", f"{scope}: {', '.join(names)}"),
            el("rect", x=box.x, y=box.y, width=box.w, height=box.h, rx=8, class_="paper"),
            [
                el("text", n, x=box.center, y=top + 16 * i, text_anchor="middle", class_="code")
                for i, n in enumerate(shown)
            ],
            class_=f"names {scope}",
        )

    def _in_words(self) -> str:
        def of(side: str) -> str:
            return ", ".join(
                LABELS[b.kind] + (f" {self.graph.row_name(b.row)}" if b.row else "")
                + f" ({share(b.flops / max(1, self.graph.flops))})"
                for b in self.graph.blocks
                if b.side == side
            )  # fmt: skip

        state = ", ".join(f"{s.name} ({byte_count(s.bytes)})" for s in self.graph.state)
        return (
            f"Left, the user encoder with its share of the work: {of('user')}. Across the cut, the state: {state}. "
            f"Right, the target scorer: {of('target')}."
        )


def _fold(states: Sequence[State], most: int) -> list[State]:
    """At most `most` chips: the last stands for what is left over."""
    if len(states) <= most:
        return list(states)
    rest = states[most - 1 :]
    total, each = sum(s.bytes for s in rest), sum(s.bytes_per_token for s in rest)
    names = ", ".join(s.name for s in rest)
    return [*states[: most - 1], State(f"and {len(rest)} more", names, total, each, rest[0].row)]


def _clip(name: str, width: float) -> str:
    most = int(width / _PER_LETTER)
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _wrapped(label: str, width: float) -> list[str]:
    """A label in one line, or in two where it is too wide."""
    words = label.split()
    if len(label) * 7.2 <= width - 8 or len(words) < 2:
        return [label]
    half = (len(words) + 1) // 2
    return [" ".join(words[:half]), " ".join(words[half:])]


def _path(*points: tuple[float, float], arrow: bool = True) -> Markup:
    return el("path", d=polyline(points), class_="wire", marker_end="url(#arrow)" if arrow else None)


def _wire(a: _Box, b: _Box) -> Markup:
    """A straight line where the boxes see one another, else one with a step in the gap before `b`."""
    if a.right <= b.x or b.right <= a.x:
        forward = a.right <= b.x
        begin, end = (a.right, b.x) if forward else (a.x, b.right)
        top, low = max(a.y, b.y) + 6, min(a.bottom, b.bottom) - 6
        if top <= low:
            level = (a if a.h < b.h else b).middle
            level = min(max(level, top), low)
            return _path((begin, level), (end, level))
        turn = end - _GAP / 2 if forward else end + _GAP / 2
        return _path((begin, a.middle), (turn, a.middle), (turn, b.middle), (end, b.middle))
    level = (a if a.w < b.w else b).center
    return _path((level, a.bottom), (level, b.y)) if a.bottom <= b.y else _path((level, a.y), (level, b.bottom))
