"""report.html: one file without links to anything, with the table, the loss curves and what the run cost."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import Any

from dipaco.early_stopping import early_stopping_line
from dipaco.progress import duration
from dipaco.table import accuracy_line, cell, rows

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .25rem .8rem; border-bottom: 1px solid #ddd; }
td + td, th + th { text-align: right; } th { text-align: left; }
img { max-width: 100%; } code, td { word-break: break-word; }
"""


def page(report: dict[str, Any], curves_png: bytes | None) -> str:
    """The HTML of a report; without curves it says which extra draws them."""
    head = f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{_text(report['run'])}</title>"
    parts = [head, f"<style>{_STYLE}</style>", f"<h1>{_text(report['run'])}</h1>"]
    if report["perplexity"]:
        parts += ["<h2>Held-out perplexity</h2>", _perplexities(report)]
        parts.append(
            f"<p>{report['tokens']['evaluated']:,} tokens; the first tokens of each sequence do not count.</p>"
        )
    parts.append("<h2>Training loss by path</h2>")
    if curves_png is None:
        parts.append("<p>Loss curves need matplotlib: <code>pip install 'dipaco[report]'</code>.</p>")
    else:
        encoded = base64.b64encode(curves_png).decode()
        parts.append(f"<img alt='loss curves' src='data:image/png;base64,{encoded}'>")
    if report["path_load"]:
        routes = list(report["path_load"])
        loads = [
            (path, *(f"{report['path_load'][route][path]:.1%}" for route in routes))
            for path in report["path_load"][routes[0]]
        ]
        parts += ["<h2>Share of the held-out tokens by path and route</h2>", _table(("path", *routes), loads)]
        parts.append(f"<p>{_text(accuracy_line(report))}</p>")
    stages = [name for name, found in report["sharding"].items() if "token_shares" in found]
    if stages:
        shares = [
            (path, *(f"{report['sharding'][stage]['token_shares'][path]:.1%}" for stage in stages))
            for path in report["sharding"][stages[0]]["token_shares"]
        ]
        parts += ["<h2>Share of the training tokens by path and stage</h2>", _table(("path", *stages), shares)]
    if report["early_stopping"]:
        parts += ["<h2>Best version by path</h2>", _best_versions(report["early_stopping"])]
    parts += ["<h2>Cost</h2>", _table(("", ""), _costs(report))]
    parts += ["<h2>Identity</h2>", _table(("", ""), _identity(report)), "</html>"]
    return "\n".join(parts) + "\n"


def _perplexities(report: dict[str, Any]) -> str:
    measured = rows(report)
    overall = [(name, cell(ppl, ".3f"), cell(share, ".3f"), cell(bits, ".4f")) for name, ppl, share, bits in measured]
    by_domain = [
        (domain, *(cell(value, ".2f") for _, value, _, _ in rows({"perplexity": perplexity})))
        for domain, perplexity in report["per_domain"].items()
    ]
    names = [name for name, *_ in measured]
    head = _table(("model and route", "perplexity", "of dense", "bits per byte"), overall)
    return head + "<h3>By domain</h3>" + _table(("domain", *names), by_domain)


def _best_versions(found: dict[str, Any]) -> str:
    lines = [
        (path, str(best["version"]), f"{best['stop_loss']:.4f}", f"{best['tokens']:,}") if best else (path, "", "", "")
        for path, best in found["paths"].items()
    ]
    table = _table(("path", "outer steps", "loss on its stop sequences", "tokens"), lines)
    return f"{table}<p>{_text(early_stopping_line(found))}.</p>"


def _costs(report: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [("wall time", duration(report["wall_s"])), ("tokens trained on", f"{report['tokens']['trained']:,}")]
    lines += [(f"stage {name}", duration(seconds)) for name, seconds in report["stages"].items()]
    lines += [
        (f"wire: {name.replace('_', ' ')}", f"{count / 1e6:,.1f} MB") for name, count in report["wire_bytes"].items()
    ]
    return [*lines, ("peak memory of all processes", f"{report['peak_rss_mb']:,.0f} MB")]


def _identity(report: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("weights", report["digest"]),
        ("experiment", report["config_digest"]),
        *((name, str(value)) for name, value in report["hardware"].items()),
    ]


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    body = "\n".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<table><tr>{head}</tr>\n{body}</table>"


def _text(text: str) -> str:
    return html.escape(text)
