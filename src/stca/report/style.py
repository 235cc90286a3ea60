"""The report's style sheet: light and dark, wide and narrow, screen and paper; nothing is loaded from anywhere."""

from __future__ import annotations

from typing import Final

CSS: Final = """
:root {
  color-scheme: light dark;
  --page: #f7f6f3; --paper: #ffffff; --ink: #1d2126; --muted: #5b636c; --line: #dedbd4; --grid: #eceae5;
  --user: #1c5f9e; --target: #b9501b; --request: #74489b; --other: #6c747d; --good: #237a49; --bad: #b3261e;
  --wire: #7d858d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121518; --paper: #1a1e23; --ink: #e9e7e3; --muted: #a3aab2; --line: #343a42; --grid: #282d34;
    --user: #79b8f2; --target: #f2a36f; --request: #c5a0e6; --other: #9aa2ab; --good: #6fc792; --bad: #f28b82;
    --wire: #858d96;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.6 ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1240px; margin: 0 auto; padding: 0 28px 72px; }
header { padding: 56px 0 8px; }
h1, h2 { font-family: "Iowan Old Style", "Palatino Linotype", Palatino, Georgia, "DejaVu Serif", serif;
  font-weight: 600;
  line-height: 1.2; letter-spacing: -0.01em; }
h1 { font-size: clamp(1.9rem, 1.3rem + 2.4vw, 3rem); margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 1.65rem; margin: 0 0 8px; }
h3 { font-size: 1rem; margin: 0 0 6px; }
p { margin: 0 0 14px; max-width: 72ch; }
a { color: var(--user); }
code, pre, .code { font-family: ui-monospace, "SF Mono", SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono",
  monospace; }
code { font-size: 0.88em; overflow-wrap: anywhere; }
.eyebrow { color: var(--muted); font-size: 0.86rem; margin: 0 0 10px; max-width: none; }
.badge { display: inline-block; border-radius: 99px; padding: 3px 14px; font-size: 0.86rem; font-weight: 600;
  border: 1.5px solid currentColor; }
.badge.good { color: var(--good); } .badge.bad { color: var(--bad); } .badge.none { color: var(--muted); }

.tiles { display: flex; flex-wrap: wrap; gap: 1px; margin: 30px 0 0; padding: 0; background: var(--line);
  border: 1px solid var(--line); border-radius: 14px; overflow: hidden; }
.tile { background: var(--paper); padding: 20px 22px 18px; }
.tile dt { font-size: 0.86rem; color: var(--muted); line-height: 1.45; margin-top: 4px; }
.tile dd { margin: 0; font-size: 2.15rem; font-weight: 650; line-height: 1.15; letter-spacing: -0.02em;
  white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.tile { flex: 1 1 215px; display: flex; flex-direction: column-reverse; justify-content: flex-end; }

section { margin-top: 64px; }
.steps { display: grid; grid-template-columns: repeat(auto-fit, minmax(250px, 1fr)); gap: 18px; margin-top: 22px; }
.step { border-top: 3px solid var(--line); padding-top: 14px; }
.step.user { border-color: var(--user); } .step.state { border-color: var(--ink); }
.step.target { border-color: var(--target); }
.step p { font-size: 0.95rem; color: var(--muted); margin: 0; }
figure { margin: 22px 0 0; background: var(--paper); border: 1px solid var(--line); border-radius: 14px;
  padding: 20px 22px 16px; }
figcaption { font-size: 0.9rem; color: var(--muted); margin-top: 12px; max-width: 84ch; }
figure > h3 { margin-bottom: 10px; }
.scroll { overflow-x: auto; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 12px 20px; }
.panels > div { max-width: 470px; }
.panels h3 { font-size: 0.92rem; margin: 0 0 2px; }
.missing { border: 1px dashed var(--line); border-radius: 14px; padding: 18px 22px; color: var(--muted);
  margin-top: 18px;
  max-width: none; }
.notice { border-left: 3px solid var(--c, var(--line)); padding: 2px 0 2px 16px; margin-top: 18px;
  overflow-wrap: anywhere; }
dl.terms { max-width: none; display: grid; grid-template-columns: max-content 1fr; gap: 6px 18px; margin: 14px 0 0;
  font-size: 0.95rem; }
dl.terms dt { font-weight: 600; } dl.terms dd { margin: 0; color: var(--muted); max-width: 68ch; }
dt.user { color: var(--user); } dt.target { color: var(--target); } dt.other { color: var(--other); }
dt.request { color: var(--request); }

table { border-collapse: collapse; min-width: min(100%, 620px); font-size: 0.88rem;
  font-variant-numeric: tabular-nums; }
details caption { position: absolute; clip-path: inset(50%); }
caption { text-align: left; font-weight: 600; padding: 0 0 8px; }
th, td { text-align: left; padding: 7px 30px 7px 0; border-bottom: 1px solid var(--grid); vertical-align: baseline; }
th { font-weight: 600; color: var(--muted); font-size: 0.82rem; border-bottom-color: var(--line);
  white-space: nowrap; }
th.n, td.n { text-align: right; white-space: nowrap; }
td:last-child, th:last-child { padding-right: 0; }
td code { white-space: nowrap; overflow-wrap: normal; }
.ok { color: var(--good); font-weight: 600; } .no { color: var(--bad); font-weight: 600; }
details { margin-top: 14px; border: 1px solid var(--line); border-radius: 12px; background: var(--paper); }
summary { cursor: pointer; padding: 11px 18px; font-weight: 600; font-size: 0.93rem; }
summary:focus-visible, .scroll:focus-visible { outline: 2px solid var(--user); outline-offset: 2px;
  border-radius: 10px; }
details > .scroll { padding: 4px 18px 16px; }
pre { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 14px 18px;
  overflow-x: auto;
  font-size: 0.86rem; line-height: 1.7; margin: 8px 0 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 360px), 1fr)); gap: 26px 40px;
  margin-top: 18px; align-items: start; }
footer { margin-top: 64px; padding-top: 18px; border-top: 1px solid var(--line); color: var(--muted);
  font-size: 0.86rem; }

svg.chart { display: block; width: 100%; height: auto; font-family: inherit; }
svg.chart text { fill: var(--ink); font-size: 12px; }
svg.chart .tick, svg.chart .note { fill: var(--muted); font-size: 11px; font-variant-numeric: tabular-nums; }
svg.chart .label { fill: var(--muted); font-size: 12px; }
svg.chart .row { font-size: 13px; } svg.chart .group { font-weight: 650; }
svg.chart .value { font-size: 11.5px; font-weight: 600; font-variant-numeric: tabular-nums; paint-order: stroke;
  stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; }
svg.chart .name { font-weight: 650; }
svg.chart .grid { stroke: var(--grid); stroke-width: 1; }
svg.chart .axis { stroke: var(--muted); stroke-width: 1; }
.key { display: inline-block; width: 0.8em; height: 0.8em; margin: 0 0.4em 0 0; background: var(--c); }
.key + .key, .key:nth-of-type(2) { margin-left: 1em; }
.hit, .target { --c: var(--target); } .miss, .user { --c: var(--user); }
.pointwise, .best, .reference { --c: var(--other); }
.request { --c: var(--request); }
.auc { --c: var(--user); }
svg.chart .line { fill: none; stroke: var(--c); stroke-width: 2.25; stroke-linejoin: round; }
svg.chart .pointwise .line { stroke-dasharray: 1 5; stroke-linecap: round; stroke-width: 2.75; }
svg.chart .best .line { stroke-dasharray: 6 5; stroke-width: 1.75; }
svg.chart .mark { fill: var(--c); stroke: var(--paper); stroke-width: 1.5; }
svg.chart .mark.hollow { fill: var(--paper); stroke: var(--c); stroke-width: 2; }
svg.chart .reference .line { stroke-dasharray: 1.5 4; stroke-width: 1.75; stroke-linecap: round; }
svg.chart .best .mark, svg.chart .reference .mark { display: none; }
svg.chart .whisker { stroke: var(--c); stroke-width: 2; opacity: 0.45; }
svg.chart .name { fill: var(--c); }
svg.chart .trained { fill: var(--user); opacity: 0.08; }
svg.chart .boundary { stroke: var(--user); stroke-width: 1.25; stroke-dasharray: 4 4; }
svg.chart .bar { fill: var(--c); }
svg.chart .allowed { fill: var(--good); opacity: 0.11; }
svg.chart .limit { stroke: var(--good); stroke-width: 2; }
svg.chart .stem { stroke-width: 2; } svg.chart .stem.good { stroke: var(--good); }
svg.chart .stem.bad { stroke: var(--bad); }
svg.chart .dot { stroke: var(--paper); stroke-width: 2; }
svg.chart .dot.good { fill: var(--good); } svg.chart .dot.bad { fill: var(--bad); }

svg.graph { margin: 0 auto; }
svg.graph .region { fill: var(--c); opacity: 0.06; }
svg.graph .cut { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 3 5; }
svg.graph .side { font-size: 16px; font-weight: 650; }
svg.graph text.side.user, svg.graph text.side.target { fill: var(--c); }
svg.graph .wire { fill: none; stroke: var(--wire); stroke-width: 1.3; stroke-linejoin: round; }
svg.graph marker path { fill: var(--wire); }
svg.graph .paper { fill: var(--paper); stroke: var(--line); }
svg.graph .block .fill { fill: var(--c); stroke: var(--c); stroke-width: 1.25; }
svg.graph .block .label { fill: var(--ink); font-size: 12.5px; font-weight: 650; }
svg.graph .block .note { fill: var(--ink); }
svg.graph .track { fill: var(--c); opacity: 0.18; }
svg.graph .meter { fill: var(--c); }
svg.graph .chip .paper { stroke: var(--ink); stroke-width: 1.25; }
svg.graph .chip.verbatim .paper { stroke: var(--muted); stroke-dasharray: 4 3; }
svg.graph .code { font-size: 10.5px; }
svg.graph .names .paper { stroke: var(--c); stroke-opacity: 0.5; }

@media (max-width: 640px) {
  main { padding: 0 16px 48px; }
  header { padding-top: 32px; }
  section { margin-top: 48px; }
  figure { padding: 14px 12px 12px; }
  .tile dd { font-size: 1.8rem; }
  dl.terms { grid-template-columns: 1fr; gap: 0; } dl.terms dd { margin-bottom: 8px; }
  svg.wide { min-width: 680px; }
}
@media print {
  :root { color-scheme: light; --page: #fff; --paper: #fff; --ink: #000; --muted: #444; --line: #bbb; --grid: #ddd;
    --user: #1c5f9e; --target: #b9501b; --request: #74489b; --other: #555; --good: #237a49; --bad: #b3261e;
  --wire: #777; }
  body { font-size: 10.5pt; } main { max-width: none; padding: 0; } header { padding-top: 0; }
  section { margin-top: 26pt; }
  figure, .tiles, .step, table, details { break-inside: avoid; } h2, h3 { break-after: avoid; }
  svg.graph { min-width: 0 !important; } .scroll { overflow: visible; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
"""
