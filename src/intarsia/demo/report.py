"""The demo's report: one HTML file that needs nothing else, and one picture."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from typing import Any

from intarsia import page as shared
from intarsia.demo.charts import Bar, Line, line_chart, log_bars, share_bars
from intarsia.demo.result import About, DemoResult, Fusion, Trained, milliseconds, percent
from intarsia.evaluate import BASE
from intarsia.train.plots import smooth

SPARSE, LORA, GREY = "#0f766e", "#c2570c", "#8a8f98"


def write_report(result: DemoResult, path: Path) -> Path:
    """Write the page, aside and renamed: inline styles and SVG, no scripts, nothing from the network."""
    return shared.write(page(result), path)


def page(result: DemoResult) -> str:
    """The whole page as HTML."""
    sections = [
        ("Which adapter is good at what", _matrix(result)),
        ("How they were trained", _training(result)),
        ("Switching", _switching(result)),
        ("Two skills at once", _fusing(result)),
        ("What they answer", _examples(result)),
        ("The adapters", _adapters(result)),
        ("How this was made", _about(result)),
    ]
    quick = '<p class="note">Quick run: a few steps on few items. The skills are poorer than they could be.</p>'
    return shared.page(
        title=f"intarsia: {len(result.skills)} skills on {result.title}",
        kicker="intarsia demo",
        headline=result.headline(),
        head=(quick if result.quick else "") + _tiles(result),
        sections=sections,
        style=STYLE,
    )


# ---------------------------------------------------------------------------------------------------- sections


def _tiles(result: DemoResult) -> str:
    deck, lora = result.switch("deck"), result.switch("lora-switch")
    wins, own = result.sparse_wins(), result.on_diagonal(sparse=True)
    sparse = [a for a in result.adapters if a.sparse]
    tiles = [
        (milliseconds(deck.seconds), f"to switch the skill of the whole model; LoRA fused out and in: {milliseconds(lora.seconds)}"),
        (
            "to the bit" if result.exactness.exact else "changed",
            f"the base after {result.exactness.switches} switches and fusions (SHA-256 of all weights)",
        ),
        (f"{max(a.file_bytes for a in sparse) / 1e6:.1f} MB", f"the largest adapter; {max(a.share for a in sparse):.1%} of the values trained"),
        (f"{len(own)} of {len(result.skills)}", "skills whose own sparse adapter is the best sparse one on them"),
        (f"{len(wins)} of {len(result.skills)}", "skills on which sparse has a lower held-out loss than LoRA at the same count"),
    ]  # fmt: skip
    good = [True, result.exactness.exact, True, True, True]
    return shared.tiles((figure, text, fine) for (figure, text), fine in zip(tiles, good, strict=True))


def _matrix(result: DemoResult) -> str:
    table = result.matrix
    kinds = {a.name: a for a in result.adapters}
    order = [BASE, *(a.name for a in result.adapters if a.sparse), *(a.name for a in result.adapters if not a.sparse)]
    head = "".join(
        f"<th>{escape(s.title)}<small>loss · {escape(s.measure)} {_arrow(s)}</small></th>" for s in result.skills
    )
    rows = []
    for name in order:
        cells = "".join(_cell(result, name, skill) for skill in result.skills)
        what = "" if name == BASE else f"<small>{escape(kinds[name].kind)}</small>"
        first = ' class="rule"' if name != BASE and order.index(name) in (1, 1 + len(result.skills)) else ""
        rows.append(f"<tr{first}><th>{escape(name)}{what}</th>{cells}</tr>")
    skills = "".join(
        f"<li><b>{escape(s.title)}.</b> {escape(s.sentence)} {s.held_out_items} held-out items, {s.train_items} to train "
        f"on; {escape(s.source)}.</li>"
        for s in result.skills
    )
    losses = [table[row, s.name].loss for row in order for s in result.skills]
    return (
        f"<ul>{skills}</ul>"
        "<p>Held-out loss in nats an answer token (lower is better), and below it the skill's own measure. The deeper the "
        "colour, the more of the best gain on that skill; a frame marks an adapter on its own skill.</p>"
        f'<div class="scroll"><table class="matrix"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        f'<p class="note">Losses from {min(losses):.2f} to {max(losses):.2f}. No held-out item is seen in training in any '
        "form: word families, function names and related names stay on one side.</p>"
    )


def _cell(result: DemoResult, name: str, skill: About) -> str:
    table = result.matrix
    cell, base = table[name, skill.name], table[BASE, skill.name].loss
    best = table[table.best(skill.name), skill.name].loss
    gain = max(0.0, (base - cell.loss) / (base - best)) if base > best else 0.0
    own = any(a.name == name and a.skill == skill.name for a in result.adapters)
    score = "" if cell.score is None else f"<small>{cell.score:.3f}</small>"
    best_mark = "<b>" if cell.loss == best else ""
    return (
        f'<td class="{"own" if own else ""}{" deep" if gain > 0.55 else ""}" style="--gain:{gain:.3f}">'
        f"{best_mark}{cell.loss:.3f}{'</b>' if best_mark else ''}{score}</td>"
    )


def _training(result: DemoResult) -> str:
    charts = []
    for skill in result.skills:
        lines = []
        for sparse in (False, True):
            adapter = result.of(skill.name, sparse=sparse)
            style = "sparse" if sparse else "lora"
            window = max(1, len(adapter.losses) // 10)
            steps = [step for step, _ in adapter.losses]
            smoothed = smooth([loss for _, loss in adapter.losses], window)
            lines.append(Line(list(zip(steps, smoothed, strict=True)), style, f"{adapter.kind} training"))
            lines.append(Line(adapter.held_out, style, f"{adapter.kind} held out", marked=True))
        own = result.of(skill.name, sparse=True)
        chart = line_chart(lines, f"Loss while training on {skill.title}", "optimizer step")
        charts.append(f"<figure><figcaption>{escape(skill.title)} · {escape(own.kind)}</figcaption>{chart}</figure>")
    return (
        "<p>Thin: training loss, a running mean. With dots: held-out loss on a part of the held-out items. "
        f"{_legend()} Every pair has the same data, the same number of trained values and steps; each method its own "
        "learning rate.</p>"
        f'<div class="three">{"".join(charts)}</div>'
    )


def _switching(result: DemoResult) -> str:
    bars = [Bar(s.what, s.seconds * 1e3, milliseconds(s.seconds), _style(s.name)) for s in result.switches]
    wrong = result.switch("lora-switch").changed_share
    exact = result.exactness
    verdict = (
        f"After {exact.switches} random switches and fusions over all {len(result.adapters)} adapters, after the timing and "
        f"after the fusions below, the SHA-256 over all base weights is what it was before training: <code>{exact.before}</code>."
        if exact.exact
        else f"<b>The base changed</b>: <code>{exact.before}</code> before, <code>{exact.after}</code> after."
    )
    return (
        "<p>Time to change the skill of the whole model, every adapted weight of it; medians of one run in which the ways "
        f"alternate. The axis is logarithmic.</p>{log_bars(bars, 'Time of a switch', 'ms')}"
        f"<p>{verdict}</p>"
        f"<p>Adding and subtracting LoRA as often leaves {wrong:.2%} of the entries different from the base.</p>"
    )


def _fusing(result: DemoResult) -> str:
    first = result.fusions[0]
    titles = {s.name: s.title for s in result.skills}
    pair = [_named(result, name).skill for name in first.adapters]
    groups = []
    for strength in dict.fromkeys(f.strength for f in result.fusions):
        for place, skill in enumerate(pair):
            bars = [_fusion_bar(f, place) for f in result.fusions if f.strength == strength]
            groups.append((f"{titles[skill]}, strength {strength:g}", bars))
    kinds = " and ".join(_named(result, name).kind for name in first.adapters)
    return (
        f"<p>{escape(titles[pair[0]])} and {escape(titles[pair[1]])} set in at once, each with the same strength, sparse "
        f"({escape(kinds)}) and LoRA. A bar is the share of the adapter's own gain in held-out loss that is left. Both sums "
        f"are exact; the two sparse supports share {result.overlap:.1%} of their entries. {_legend()}</p>"
        f"{share_bars(groups, 'Share of the gain that is left after fusing')}"
    )


def _fusion_bar(fusion: Fusion, place: int) -> Bar:
    share = fusion.retained[place]
    text = f"{percent(share)} (loss {fusion.losses[place]:.2f})"
    return Bar(fusion.kind, share or 0.0, text, "sparse" if fusion.kind == "sparse" else "lora")


def _examples(result: DemoResult) -> str:
    parts = ["<p>The first held-out items as they come; nobody picked them.</p>"]
    for skill in result.skills:
        own = result.of(skill.name, sparse=True)
        rows = [
            [
                f"<code>{escape(e.prompt)}</code>",
                *(escape(t or "(nothing)") for t in (e.truth, e.base, e.sparse, e.lora)),
            ]
            for e in result.examples
            if e.skill == skill.name
        ]
        parts.append(f"<h3>{escape(skill.title)}</h3>")
        parts.append(shared.table(("given", "truth", "base", own.kind, "LoRA"), rows, ("", "truth", "", "", "")))
    return "".join(parts)


def _adapters(result: DemoResult) -> str:
    rows = [
        [
            escape(a.name),
            escape(a.kind),
            f"<code>{escape(_fields(a))}</code>",
            f"{a.trained:,} ({a.share:.2%})",
            f"{a.file_bytes / 1e6:.2f} MB",
            f"{a.steps}, lr {a.lr:g}",
            f"{a.tokens_per_second:.0f}",
            f"<code>{a.digest[:12]}</code>",
        ]
        for a in result.adapters
    ]
    head = ("adapter", "method", "settings", "trained", "file", "steps", "tokens/s", "SHA-256")
    return (
        f"<p>Each in a folder of its own under <code>adapters/</code>, with a model card.</p>{shared.table(head, rows)}"
    )


def _about(result: DemoResult) -> str:
    command = "make demo ARGS=--quick" if result.quick else "make demo"
    machine = ", ".join(f"{key} {value}" for key, value in result.machine.items())
    versions = ", ".join(f"{key} {value}" for key, value in result.versions.items())
    seconds = ", ".join(f"{part} {value:.0f} s" for part, value in result.seconds.items() if part != "all")
    return (
        f"<p><code>{command}</code> (seed {result.seed}), {result.seconds['all']:.0f} s in all: {escape(seconds)}.</p>"
        f"<p>{escape(machine)}. {escape(versions)}.</p><p>All figures stand in <code>results.json</code>.</p>"
    )


# ------------------------------------------------------------------------------------------------------ pieces


def _legend() -> str:
    return '<span class="key sparse">sparse</span> <span class="key lora">LoRA</span>.'


def _arrow(skill: About) -> str:
    return "↑" if skill.higher_is_better else "↓"


def _style(name: str) -> str:
    return "lora" if name.startswith("lora") else "plain" if name == "dense" else "sparse"


def _fields(adapter: Trained) -> str:
    return ", ".join(
        f"{k}={v}" for k, v in adapter.method.items() if k not in ("name", "alpha", "offset") and v is not None
    )


def _named(result: DemoResult, name: str) -> Trained:
    return next(a for a in result.adapters if a.name == name)


STYLE = """
.matrix td{text-align:center;background:rgba(var(--heat),calc(var(--gain)*.62));border:2px solid var(--card);border-radius:6px}
.matrix td.own{outline:2px solid var(--ink);outline-offset:-3px}
.matrix td.deep small{color:inherit;opacity:.85}
.matrix thead th{text-align:center}
.matrix tr.rule>*{border-top:10px solid var(--card)}
.matrix tbody th{white-space:nowrap}
td.truth{font-weight:600}
.three{display:grid;grid-template-columns:repeat(auto-fit,minmax(270px,1fr));gap:18px}
figure{margin:0}
figcaption{font-weight:600;font-size:14px;margin-bottom:4px}
svg{width:100%;height:auto;display:block;font-family:inherit}
svg .grid{stroke:var(--line);stroke-width:1}
svg .strong{stroke:var(--soft);stroke-dasharray:3 3}
svg text{fill:var(--ink);font-size:12.5px}
svg .tick{fill:var(--soft);font-size:10.5px}
svg .mid{text-anchor:middle}
svg .end{text-anchor:end}
svg .group{font-weight:600;font-size:12px}
svg .name{font-size:12px}
svg .value{font-size:12px;font-weight:600}
svg .line{fill:none;stroke-width:2}
svg .thin{stroke-width:1.1;opacity:.45}
svg .line.sparse{stroke:var(--sparse)}
svg .line.lora{stroke:var(--lora)}
svg .bar.sparse,svg .dot.sparse{fill:var(--sparse)}
svg .bar.lora,svg .dot.lora{fill:var(--lora)}
svg .bar.plain{fill:var(--plain)}
.key{font-weight:600;white-space:nowrap}
.key::before{content:"";display:inline-block;width:10px;height:10px;border-radius:3px;margin:0 5px 0 2px;background:currentColor}
.key.sparse{color:var(--sparse)}
.key.lora{color:var(--lora)}
"""


# ----------------------------------------------------------------------------------------------------- picture


def write_picture(result: DemoResult, path: Path) -> Path:
    """One PNG with the matrix, the losses, the switch times and the fusion; written aside and renamed."""
    # Figures made without pyplot leave the user's backend and open figures alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    spacing = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.14, wspace=0.03, hspace=0.05)
    figure = Figure(figsize=(13, 7.6), dpi=120, layout=spacing, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic([["matrix", "loss"], ["switch", "fuse"]], width_ratios=[1, 1.05])
    _draw_matrix(axes["matrix"], result)
    _draw_losses(axes["loss"], result)
    _draw_switches(axes["switch"], result)
    _draw_fusions(axes["fuse"], result)
    aside = path.with_suffix(".part.png")
    figure.savefig(aside, metadata={"Software": None})
    os.replace(aside, path)
    return path


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11.5, fontweight="bold", pad=10)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_matrix(axes: Any, result: DemoResult) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    table = result.matrix
    rows = [BASE, *(a.name for a in result.adapters if a.sparse), *(a.name for a in result.adapters if not a.sparse)]
    gains = []
    for row in rows:
        base = {s.name: table[BASE, s.name].loss for s in result.skills}
        best = {s.name: table[table.best(s.name), s.name].loss for s in result.skills}
        gains.append([max(0.0, (base[n] - table[row, n].loss) / max(1e-9, base[n] - best[n])) for n in base])
    colours = LinearSegmentedColormap.from_list("gain", ["#f6f7f6", "#9fd0ca", SPARSE])
    axes.imshow(gains, cmap=colours, vmin=0, vmax=1.25, aspect="auto")
    own = {(a.name, a.skill) for a in result.adapters}
    for y, row in enumerate(rows):
        for x, skill in enumerate(result.skills):
            cell = table[row, skill.name]
            score = "" if cell.score is None else f"   {cell.score:.2f}"
            bold = "bold" if (row, skill.name) in own else "normal"
            axes.text(x, y, f"{cell.loss:.2f}{score}", ha="center", va="center", fontsize=10, fontweight=bold)
            if bold == "bold":
                from matplotlib.patches import Rectangle

                axes.add_patch(Rectangle((x - 0.49, y - 0.47), 0.98, 0.94, fill=False, linewidth=1.4))
    axes.set_xticks(range(len(result.skills)), [f"{s.title}\nloss · {s.measure} {_arrow(s)}" for s in result.skills])
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0, labelsize=9)
    axes.xaxis.tick_top()
    _title(axes, f"Every adapter on every skill, held out ({result.title})")
    axes.spines[:].set_visible(False)


def _draw_losses(axes: Any, result: DemoResult) -> None:
    labels: list[tuple[float, str, str]] = []
    for skill, dash in zip(result.skills, ("-", "--", ":"), strict=False):
        for sparse, colour in ((True, SPARSE), (False, LORA)):
            adapter = result.of(skill.name, sparse=sparse)
            steps = [step / adapter.steps for step, _ in adapter.held_out]
            losses = [loss for _, loss in adapter.held_out]
            axes.plot(steps, losses, dash, color=colour, linewidth=1.8, marker="o", markersize=3.5)
            labels.append((losses[-1], f"{skill.name} {adapter.kind} {losses[-1]:.2f}", colour))
    losses = [loss for adapter in result.adapters for _, loss in adapter.held_out]
    low, high = min(losses) / 1.12, max(losses) * 1.12
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.set_yticks([tick for tick in (0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 9, 12) if low < tick < high])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlim(0, 1.5)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_xlabel("share of the training")
    axes.set_ylabel("loss (nats an answer token)")
    apart = (high / low) ** 0.062  # labels stand beside their lines, never on each other
    places = [loss for loss, _, _ in sorted(labels)]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] * apart)
    lift = min(1.0, high / places[-1])
    for place, (_, text, colour) in zip(places, sorted(labels), strict=True):
        axes.annotate(text, (1.03, place * lift), color=colour, va="center", fontsize=9, annotation_clip=False)
    _title(axes, "Held-out loss at the same number of trained values")


def _draw_switches(axes: Any, result: DemoResult) -> None:
    colours = {"sparse": SPARSE, "lora": LORA, "plain": GREY}
    for y, switch in enumerate(result.switches):
        axes.barh(y, switch.seconds * 1e3, color=colours[_style(switch.name)], height=0.62)
        axes.text(
            switch.seconds * 1e3 * 1.08, y, milliseconds(switch.seconds), va="center", fontsize=10, fontweight="bold"
        )
    axes.set_yticks(range(len(result.switches)), [s.what.replace(" (", "\n(") for s in result.switches])
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.set_xscale("log")
    axes.set_xlim(min(s.seconds for s in result.switches) * 1e3 / 3, max(s.seconds for s in result.switches) * 1e3 * 3)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("milliseconds (log)")
    axes.invert_yaxis()
    exact = "the base comes back to the bit" if result.exactness.exact else "THE BASE CHANGED"
    _title(axes, f"Switching the whole model: {exact}")


def _draw_fusions(axes: Any, result: DemoResult) -> None:
    strengths = list(dict.fromkeys(f.strength for f in result.fusions))
    skills = [_named(result, name).skill for name in result.fusions[0].adapters]
    places, names = [], []
    x = 0.0
    for strength in strengths:
        for place, skill in enumerate(skills):
            for offset, fusion in zip((-0.2, 0.2), (f for f in result.fusions if f.strength == strength), strict=True):
                share = fusion.retained[place]
                height = max(0.0, share or 0.0) * 100
                axes.bar(x + offset, height, width=0.37, color=SPARSE if fusion.kind == "sparse" else LORA)
                text = "–" if share is None else f"{share * 100:.0f}"
                axes.text(x + offset, height + 1.5, text, ha="center", fontsize=8.5)
            places.append(x)
            names.append(f"{skill}\n× {strength:g}")
            x += 1.0
        x += 0.35
    axes.set_xticks(places, names, fontsize=9)
    axes.tick_params(axis="x", length=0)
    axes.axhline(100, color=GREY, linewidth=0.9, linestyle=(0, (4, 4)))
    tallest = max((share or 0.0) * 100 for fusion in result.fusions for share in fusion.retained)
    axes.set_ylim(0, max(122.0, tallest * 1.2))
    axes.set_ylabel("% of the gain that is left")
    axes.text(0.0, 0.955, " ■ sparse", color=SPARSE, transform=axes.transAxes, fontsize=10, fontweight="bold")
    axes.text(0.16, 0.955, " ■ LoRA", color=LORA, transform=axes.transAxes, fontsize=10, fontweight="bold")
    _title(axes, "Two skills fused: how much of each is left")
