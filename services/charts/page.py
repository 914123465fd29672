"""The frame of a results page: one HTML file without any outside resource."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from services.charts.svg import text

_STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#1c2329;--soft:#5b6770;--edge:#dfe3e6;--track:#eceff1;
--good:#14784f;--bad:#b3372b;--unsure:#8a6100;--mark:#b3372b;--band:#00000010}
@media (prefers-color-scheme:dark){:root{--bg:#14181b;--card:#1c2226;--ink:#e6eaed;--soft:#9aa6ae;--edge:#333c42;
--track:#2a3238;--good:#5fce9b;--bad:#f08a7d;--unsure:#e0b252;--mark:#f08a7d;--band:#ffffff14}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1140px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;margin:0 0 6px}h2{font-size:19px;margin:38px 0 4px}
p{margin:4px 0 10px;max-width:78ch}.soft{color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:12px;margin:18px 0 8px}
.tile{background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:12px 14px}
.tile b{display:block;font-size:25px;line-height:1.25}.tile span{font-size:13px;color:var(--soft);display:block}
.chip{display:inline-block!important;font-weight:600;font-size:12px!important;border:1px solid;border-radius:99px;
padding:0 8px;margin-top:6px}.held{color:var(--good)!important}.missed{color:var(--bad)!important}
.unresolved{color:var(--unsure)!important}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--edge);border-radius:10px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:7px 8px;text-align:right;border-bottom:1px solid var(--edge);white-space:nowrap}
th{font-weight:600;font-size:13px;color:var(--soft);vertical-align:bottom;white-space:normal}
th:first-child,td:first-child{text-align:left;white-space:normal}tr:last-child td{border-bottom:0}
th.words,td.words{text-align:left}:is(.scroll,.pair)+.scroll{margin-top:12px}
td small{display:block;color:var(--soft);font-size:11px;font-weight:400}td.best{font-weight:700}
.figure{background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:14px;margin:8px 0}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(380px,1fr));gap:12px}.pair .figure{margin:0}
.pair.even{grid-template-columns:repeat(auto-fill,minmax(380px,1fr))}
svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font:12px system-ui,sans-serif;
paint-order:stroke;stroke:var(--card);stroke-width:3px}
svg .cell{stroke:none}svg .name{fill:var(--ink);font-size:12.5px}svg .strong{font-weight:600;fill:var(--ink)}
.grid{stroke:var(--edge)}.axis{stroke:var(--soft)}.whisker{stroke:var(--ink);stroke-width:2}.area{stroke:none;opacity:.18}.dots{fill:none;stroke-width:6;stroke-linecap:round;opacity:.75}.line{fill:none;stroke-width:2;stroke-linejoin:round}
.marker{stroke:var(--mark);stroke-width:1.5;stroke-dasharray:4 3}.band{fill:var(--band)}.track{fill:var(--track)}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;margin:0 0 8px;font-size:13px}
.key i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;vertical-align:-1px}
.warn{border-left:4px solid var(--bad);padding:6px 12px;background:var(--card)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:3px 18px;margin:8px 0}dt{color:var(--soft)}dd{margin:0}
pre{overflow-x:auto;background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:12px;
font-size:12.5px}
"""


def document(title: str, parts: Sequence[str]) -> str:
    """The whole page."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def notice(title: str, lines: Sequence[str]) -> str:
    """A warning with its reasons; nothing without any."""
    if not lines:
        return ""
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return f'<div class="warn"><b>{title}:</b><ul>{items}</ul></div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: Collection[int] = ()) -> str:
    """A table from cells that are HTML already. words: indices of columns of text, aligned to the left."""
    titles = _cells("th", head, words)
    body = "".join(f"<tr>{_cells('td', row, words)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def _cells(tag: str, cells: Sequence[str], words: Collection[int]) -> str:
    css = (' class="words"' if index in words else "" for index in range(len(cells)))
    return "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(css, cells, strict=True))


def tile(value: str, label: str, extra: str) -> str:
    """One figure that everybody should see."""
    return f'<div class="tile"><b>{value}</b><span>{text(label)}</span>{extra}</div>'


def chip(verdict: str, limit: str) -> str:
    """A verdict ("held", "missed", "unresolved") with the limit it was judged by."""
    return f'<span class="chip {verdict}">{verdict}: {text(limit)}</span>'


def facts(items: Mapping[str, object]) -> str:
    """Names with what they are."""
    return "<dl>" + "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in items.items()) + "</dl>"


def configuration(config: Mapping[str, Any]) -> str:
    """Every setting, folded away."""
    lines = "\n".join(_flat("", config))
    return f"<details><summary>Configuration</summary><pre>{text(lines)}</pre></details>"


def _flat(prefix: str, values: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, value in values.items():
        lines += _flat(f"{prefix}{key}.", value) if isinstance(value, Mapping) else [f"{prefix}{key} = {value}"]
    return lines
