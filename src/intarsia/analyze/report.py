"""One self-contained page about an adapter: what it is, where it changes the base, of which rank, and what it brings in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from intarsia import page
from intarsia._version import __version__
from intarsia.analyze.change import Group, Spectrum, WeightChange, group
from intarsia.analyze.intruders import Intruders
from intarsia.analyze.picture import directions_png, heat, heat_png, intruder_heat, spectra_png
from intarsia.store import Adapter

MOST = 60  # rows of a table of intruders; the rest is counted


def report(
    adapter: Adapter,
    changes: Sequence[WeightChange],
    spectra: Sequence[Spectrum],
    looked: Sequence[Intruders] = (),
    *,
    epsilon: float | None = None,
    file_bytes: int | None = None,
) -> str:
    """The page as HTML: pictures within it, no scripts, nothing from the network. ``page.write`` puts it into a file.

    Args:
        changes: of :func:`~intarsia.analyze.weight_changes`; with the base's weights, or sizes beside them are left out.
        looked: of :func:`~intarsia.analyze.adapter_intruders`; the section is left out without it.
        epsilon: the threshold that intruders were found with.
        file_bytes: of the adapter's folder.

    Raises:
        IntarsiaError: where the size of a change depends on the base, and is not known.
    """
    whole = group(changes, lambda change: "all")[0]
    sections = [("What it is", _facts(adapter)), ("Where it changes the base", _where(changes))]
    if spectra:
        sections.append(("Of which rank the changes are", _ranks(spectra)))
    if looked:
        sections.append(("Intruder dimensions", _intruders(looked, epsilon)))
    sections.append(("How this was made", _made(adapter, whole, looked)))
    return page.page(
        title=f"intarsia: {adapter.name}",
        kicker="intarsia show",
        headline=_headline(adapter, whole),
        head=page.tiles(_tiles(adapter, whole, looked, file_bytes)),
        sections=sections,
    )


def _headline(adapter: Adapter, whole: Group) -> str:
    method = adapter.method.get("name", "an adapter")
    moved = f", by {whole.relative:.1%} of their size" if whole.relative is not None else ""
    share = adapter.touched / adapter.size if adapter.size else 0.0
    return f"{adapter.name}: {method} changes up to {share:.2%} of the entries of {len(adapter.edits)} weights{moved}."


def _tiles(
    adapter: Adapter, whole: Group, looked: Sequence[Intruders], file_bytes: int | None
) -> list[tuple[str, str, bool]]:
    shown = [(f"{adapter.touched:,}", f"entries that it can change, of {adapter.size:,}", True)]
    if file_bytes is not None:
        shown.append((f"{file_bytes / 1e6:.2f} MB", "its folder", True))
    if whole.relative is not None:
        shown.append((f"{whole.relative:.2%}", "norm of the change beside that of the weights", True))
    if whole.invisible_share is not None:
        text = f"of the changed entries vanish when set into the {adapter.base.dtype} base"
        shown.append((f"{whole.invisible_share:.1%}", text, whole.invisible_share < 0.5))
    if looked:
        count, weights = sum(len(one.found) for one in looked), sum(bool(one.found) for one in looked)
        shown.append(
            (str(count), f"intruder dimension{'' if count == 1 else 's'}, in {weights} of {len(looked)} weights", True)
        )
    return shown


def _facts(adapter: Adapter) -> str:
    method = {key: value for key, value in adapter.method.items() if key != "name"}
    facts: dict[str, Any] = {"method": adapter.method.get("name", "?"), **method}
    facts |= {
        "base": f"{adapter.base.source or 'not named'}, {adapter.base.dtype}",
        "SHA-256 of the base": adapter.base.digest,
        "SHA-256 of the adapter": adapter.digest,
    }
    facts |= dict(adapter.about) | dict(adapter.note)
    rows = [[escape(str(key)), f"<code>{escape(_short(value))}</code>"] for key, value in facts.items()]
    return page.table(("", ""), rows)


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_short(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_short, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _where(changes: Sequence[WeightChange]) -> str:
    shown = heat(changes)
    rows = []
    for g in group(changes, lambda change: change.module):
        shapes = " or ".join(f"{rows} x {columns}" for rows, columns in g.shapes[:2])
        rows.append(
            [
                f"<code>{escape(g.name)}</code>",
                str(g.weights),
                shapes + (" ..." if len(g.shapes) > 2 else ""),
                f"{g.touched:,} ({g.touched / g.size:.2%})",
                f"{g.norm:.4g}" if g.norm is not None else "",
                _percent(g.relative),
                _percent(g.invisible_share),
                escape(", ".join(g.edits)),
            ]
        )
    head = ("module", "weights", "shape", "entries", "norm of change", "of the weight", "invisible", "edit")
    return (
        f"{page.embedded(heat_png(shown), f'Heat map: {shown.title}, by layer and module')}"
        f'<p class="note">Each cell is one weight: the {escape(shown.title)}.</p>'
        f"{page.table(head, rows, ['', *['right'] * 6, ''])}"
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def _ranks(spectra: Sequence[Spectrum]) -> str:
    rows = [
        [
            f"<code>{escape(one.name.removesuffix('.weight'))}</code>",
            f"{one.numerical_rank} of {len(one.values)}",
            f"{one.effective_rank:.1f}",
            f"{one.stable_rank:.1f}",
            f"{one.rankme:.1f}",
            ", ".join(f"{k}: {share:.0%}" for k, share in one.top_shares.items()),
        ]
        for one in spectra
    ]
    head = ("the most changed weights", "rank", "effective rank", "stable rank", "RankMe", "largest values hold")
    return (
        f"{page.embedded(spectra_png(spectra), 'Singular values of the changes')}"
        "<p>Effective rank: exp of the entropy of s / sum(s). Stable rank: ||D||<sub>F</sub>² / ||D||<sub>2</sub>². "
        "The last column: which share of ||D||<sub>F</sub>² the 1, 4, 16 and 64 largest singular values hold.</p>"
        f"{page.table(head, rows, ['', *['right'] * 4, ''])}"
    )


def _intruders(looked: Sequence[Intruders], epsilon: float | None) -> str:
    top = max(len(one.directions) for one in looked)
    found = [(one, direction) for one in looked for direction in one.found]
    below = "" if epsilon is None else f" below {epsilon:g}"
    parts = [
        f"<p>Of every changed weight the {top} leading singular directions, each with its likeness to the base's own: 1 for one that "
        f"the base has too. An intruder dimension, with a likeness{below}, is one that it has not; they go with forgetting "
        "(arXiv:2410.21228).</p>",
        page.embedded(directions_png(looked, epsilon), "Likeness of the leading directions to the base's"),
    ]
    if not found:
        least = min((d.within for one in looked for d in one.directions), default=1.0)
        return "".join([*parts, f"<p>There is none; the least likeness is {least:.2f}.</p>"])
    parts.append(page.embedded(heat_png(intruder_heat(looked)), "Heat map: intruder dimensions, by layer and module"))
    found.sort(key=lambda pair: pair[1].within)
    rows = [
        [f"<code>{escape(one.name)}</code>", str(d.j + 1), f"{d.value:.4g}", f"{d.similarity:.3f}", f"{d.within:.3f}"]
        for one, d in found[:MOST]
    ]
    head = ("weight", "j", "singular value", "likeness", "within nearly equal values")
    parts.append(page.table(head, rows, ["", *["right"] * 4]))
    if len(found) > MOST:
        parts.append(f'<p class="note">and {len(found) - MOST} more.</p>')
    return "".join(parts)


def _made(adapter: Adapter, whole: Group, looked: Sequence[Intruders]) -> str:
    based = whole.relative is not None
    model = f" --model {adapter.base.source or 'MODEL'}" if based else ""
    command = f"intarsia show {adapter.name}{model}{' --intruders' if looked else ''} --html ..."
    more = []
    if not based:
        more.append("--model adds sizes beside the base's weights and what rounding loses")
    if not looked:
        more.append("--model and --intruders add intruder dimensions")
    hint = f'<p class="note">{escape("; ".join(more))}.</p>' if more else ""
    return f"<p><code>{escape(command)}</code>, intarsia {escape(__version__)}.</p>{hint}"
