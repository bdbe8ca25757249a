"""One HTML file that needs nothing else: the frame, style, tables and tiles that the reports share. No scripts, no network."""

from __future__ import annotations

import base64
import contextlib
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from intarsia.errors import IntarsiaError

Section = tuple[str, str]  # title as plain text, content as HTML


def page(
    *,
    title: str,
    kicker: str,
    headline: str,
    sections: Sequence[Section],
    head: str = "",
    style: str = "",
) -> str:
    """The whole page. ``head``: HTML below the headline, such as tiles; ``style``: rules of a report's own."""
    body = "\n".join(f"<section><h2>{escape(name)}</h2>\n{content}</section>" for name, content in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
<main>
<header>
<p class="kicker">{escape(kicker)}</p>
<h1>{escape(headline)}</h1>
{head}
</header>
{body}
</main>
</body>
</html>
"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], styles: Sequence[str] | None = None) -> str:
    """``rows`` hold HTML already, ``head`` plain text; ``styles``: a CSS class a column."""
    styles = styles or [""] * len(head)
    body = "".join(
        "<tr>" + "".join(f'<td class="{style}">{cell}</td>' for cell, style in zip(row, styles, strict=True)) + "</tr>"
        for row in rows
    )
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="scroll"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def tiles(shown: Iterable[tuple[str, str, bool]]) -> str:
    """(figure, what it is, whether it is as it should be), as plain text."""
    return '<div class="tiles">' + "".join(
        f'<div class="tile{"" if good else " bad"}"><b>{escape(figure)}</b><span>{escape(text)}</span></div>'
        for figure, text, good in shown
    ) + "</div>"  # fmt: skip


def embedded(png: bytes, label: str) -> str:
    """A picture within the page."""
    data = base64.b64encode(png).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{escape(label)}">'


def write(html: str, path: Path) -> Path:
    """Write the page aside and rename it, so that a failure leaves what stood there.

    Raises:
        IntarsiaError: when it cannot be written.
    """
    aside = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(html, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise IntarsiaError(f"could not write {path}: {error.strerror or error}") from error
    return path


STYLE = """
:root{color-scheme:light dark;--bg:#fbfbf9;--card:#fff;--ink:#1c2024;--soft:#5d6670;--line:#e3e5e4;--sparse:#0f766e;
--lora:#c2570c;--plain:#8a8f98;--bad:#b42318;--heat:15,118,110}
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--card:#1b1f23;--ink:#e8eaec;--soft:#9aa4ad;--line:#2d3338;
--sparse:#2dd4bf;--lora:#fb923c;--plain:#7c858e;--bad:#f97066;--heat:45,212,191}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1020px;margin:0 auto;padding:48px 24px 96px}
header{margin-bottom:24px}
.kicker{margin:0;color:var(--sparse);font-weight:650;letter-spacing:.08em;text-transform:uppercase;font-size:13px}
h1{font-size:clamp(21px,2.7vw,29px);line-height:1.32;font-weight:650;letter-spacing:-.012em;margin:.4em 0 1em;text-wrap:pretty}
h2{font-size:20px;letter-spacing:-.01em;margin:0 0 .5em}
h3{font-size:15px;margin:1.4em 0 .3em}
p{margin:.5em 0 1em;max-width:78ch}
ul{padding-left:1.2em;max-width:78ch}
li{margin:.25em 0}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:24px 26px;margin:20px 0}
.note{color:var(--soft);font-size:14px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 16px}
.tile b{display:block;font-size:23px;font-weight:650;color:var(--sparse);letter-spacing:-.01em}
.tile.bad b{color:var(--bad)}
.tile span{font-size:13px;line-height:1.35;display:block;color:var(--soft)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:7px 10px;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600}
thead th{color:var(--soft);font-weight:550;font-size:13px}
small{display:block;font-weight:400;color:var(--soft);font-size:12px}
code{font:13px/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
@media print{section{break-inside:avoid}}
img{max-width:100%;height:auto;display:block;background:#fff;border-radius:8px}
.right{text-align:right}
"""
