"""What the parts of report.html share: escaping, images inside the page, and the style sheet.

Light and dark follow the reader's setting; a phone gets one column.
"""

import base64
import html
from pathlib import Path

GIB = 2**30


def escape(value) -> str:
    return html.escape(str(value))


def image(path: Path) -> str:
    return f'<img alt="{escape(path.stem)}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def number(value) -> float:
    """A number from a JSON file of unknown quality; 0 for anything else."""
    return float(value) if isinstance(value, float | int) else 0.0


def mapping(value) -> dict:
    return value if isinstance(value, dict) else {}


def words(name: str) -> str:
    """grad_norm -> Grad norm."""
    return name.replace("_", " ").capitalize()


CSS = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b1f27; --muted: #667085; --line: #e1e4ea; --grid: #e9ebf0; --soft: #f1f3f6;
  --train: #2f6feb; --val: #d9580d; --third: #0f8a6a; --bad: #d1242f; --good: #137a4b; --warn: #9a6700;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (prefers-color-scheme: dark) { :root {
  --page: #0e1116; --card: #161b22; --ink: #e6e9ef; --muted: #95a0b2; --line: #2a313c; --grid: #262d38; --soft: #1d242e;
  --train: #6ea2ff; --val: #ff9a57; --third: #3fc79c; --bad: #ff6b6b; --good: #4cc38a; --warn: #e3b341; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 32px 24px 48px; }
h1 { margin: 0; font-size: 28px; line-height: 1.2; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { margin: 44px 0 14px; font-size: 19px; letter-spacing: -.005em; }
h3 { margin: 0; font-size: 14px; font-weight: 600; }
a { color: var(--train); text-decoration: none; } a:hover { text-decoration: underline; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 14px; font-size: 14px; }
small, .muted { color: var(--muted); font-size: 13px; }
.title { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 14px; }
.pill { display: inline-block; padding: 1px 10px; border-radius: 99px; border: 1px solid currentColor;
  font-size: 12.5px; font-weight: 600; white-space: nowrap; color: var(--muted); }
.pill.good { color: var(--good); } .pill.bad { color: var(--bad); } .pill.warn { color: var(--warn); }
.pill.info { color: var(--train); }
.notice { margin: 16px 0 0; padding: 10px 14px; border-left: 3px solid var(--bad); background: var(--card);
  border-radius: 4px; overflow-wrap: anywhere; }
.done { height: 6px; margin: 18px 0 20px; border-radius: 3px; background: var(--line); overflow: hidden; }
.done i { display: block; height: 100%; background: var(--train); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; }
.card, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 16px 18px; margin-bottom: 14px; min-width: 0; }
.tile { padding: 12px 14px 11px; min-width: 0; }
.tile span { display: block; color: var(--muted); font-size: 13px; }
.tile b { display: block; font-size: 23px; line-height: 1.3; font-weight: 650; letter-spacing: -.01em;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tile b.words { font-size: 16px; line-height: 1.45; padding: 3px 0 2px; }
.tile small { display: block; line-height: 1.4; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 14px; }
.charts .card { margin: 0; }
.chart-head { display: flex; flex-wrap: wrap; gap: 2px 16px; align-items: baseline; margin-bottom: 6px; }
.key { font-size: 13px; color: var(--muted); }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; background: var(--c); }
svg { display: block; width: 100%; height: auto; } svg text { font-family: inherit !important; }
.narrow { display: none; }
details > summary { cursor: pointer; font-weight: 600; font-size: 14px;
  list-style-position: outside; margin-left: 16px; }
details > summary .muted { font-weight: 400; margin-left: 6px; }
details[open] > summary { margin-bottom: 10px; }
summary .peek { display: block; font: 12.5px/1.5 var(--mono); color: var(--muted);
  white-space: nowrap; overflow: hidden; text-overflow: ellipsis; } details[open] > summary .peek { display: none; }
pre { margin: 0 0 10px; padding: 12px 14px; background: var(--soft); border-radius: 8px; font: 13px/1.5 var(--mono);
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 30em; overflow-y: auto; }
pre:last-child { margin-bottom: 0; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr));
  gap: 10px; align-items: start; }
.samples pre { margin: 0; }
.card img { display: block; max-width: 100%; height: auto; margin: 12px auto 0; border-radius: 6px; background: #fff; }
.samples img { margin: 0; image-rendering: pixelated; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--muted); font-size: 13px; white-space: nowrap; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; } td:last-child, th:last-child { padding-right: 0; }
td.num, th.num { text-align: right; white-space: nowrap; }
td code { overflow-wrap: anywhere; } code { font: 12.5px/1.5 var(--mono); }
.memory { margin: 12px 0 16px; }
.memory > div { display: grid; grid-template: "name bar size" / 56px 1fr 176px; gap: 6px 12px; align-items: center;
  padding: 4px 0; } .memory b { grid-area: name; } .memory .bar { grid-area: bar; }
.memory span { white-space: nowrap; } .memory > div > span { grid-area: size; text-align: right; }
.bar { position: relative; height: 22px; border-radius: 5px; background: var(--soft); overflow: hidden; display: flex; }
.bar i { height: 100%; }
.bar .rest { position: absolute; right: 0; top: 0; bottom: 0; border-left: 2px solid var(--muted);
  background: repeating-linear-gradient(135deg, var(--line) 0 5px, transparent 5px 10px); }
.arguments { background: var(--train); } .temporaries { background: var(--val); } .outputs { background: var(--third); }
.config { columns: 2; column-gap: 14px; } .config .card { break-inside: avoid; }
.config td:first-child { width: 46%; color: var(--muted); }
footer { margin-top: 36px; padding-top: 14px; border-top: 1px solid var(--line); color: var(--muted); font-size: 13px; }
@media (max-width: 720px) {
  main { padding: 20px 14px 32px; } h1 { font-size: 23px; } h2 { margin-top: 32px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 8px; } .tile b { font-size: 19px; } .card { padding: 13px 13px; }
  .wide { display: none; } .narrow { display: block; } .config { columns: 1; }
  .memory > div { grid-template: "name size" "bar bar" / 1fr max-content; } .buffers { min-width: 640px; } }
@media print { body { background: #fff; } .card, .tile { break-inside: avoid; } nav { display: none; } }
"""
