"""The findings about an artifact as one HTML page that needs nothing else: no script, font or image from outside."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from engine.models import names
from engine.storage.artifacts import SHORT
from pipelines.diagnostics import svg
from pipelines.diagnostics.findings import LEVELS, Findings
from pipelines.quant.walk import ORDER
from pipelines.units import human_size, human_time

STYLE = """
:root{--back:#fff;--fore:#1b1f24;--dim:#5c6670;--rule:#d8dde2;--warn:#a4420b;--c0:#9aa3ad;--c1:#0b6bcb;--c2:#c2410c;--c3:#0f766e}
@media(prefers-color-scheme:dark){:root{--back:#14171a;--fore:#e6e9ec;--dim:#9aa4ae;--rule:#333a41;--warn:#f0a070;
--c0:#7d8791;--c1:#5aa9f5;--c2:#f08a5d;--c3:#4fc3b4}}
body{margin:0 auto;max-width:1240px;padding:24px 20px 60px;background:var(--back);color:var(--fore);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:22px;margin:0 0 2px}h2{font-size:17px;margin:34px 0 4px}h3{font-size:14px;margin:0 0 2px;font-weight:600}
p{margin:4px 0 10px;max-width:80ch}code,td.n,th.n{font-variant-numeric:tabular-nums}
code{font-family:ui-monospace,Consolas,monospace;font-size:13px;overflow-wrap:anywhere}
.dim,.none,figcaption{color:var(--dim)}.warn{color:var(--warn);font-weight:600}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(240px,1fr));gap:14px 22px}
figure{margin:0}svg{width:100%;height:auto;display:block}
.text{fill:var(--dim);font-size:11px}.grid{stroke:var(--rule);stroke-width:1}
polyline{fill:none;stroke-width:2;stroke-linejoin:round}
.line-0{stroke:var(--c0)}.line-1{stroke:var(--c1)}.line-2{stroke:var(--c2)}.line-3{stroke:var(--c3)}
.dot-0{fill:var(--c0)}.dot-1{fill:var(--c1)}.dot-2{fill:var(--c2)}.dot-3{fill:var(--c3)}
.cell{fill:var(--c1);stroke:var(--rule);stroke-width:.5}
.legend span{margin-right:18px;white-space:nowrap}
.legend i{display:inline-block;width:16px;height:3px;margin:0 6px 4px 0}
.key-0{background:var(--c0)}.key-1{background:var(--c1)}.key-2{background:var(--c2)}.key-3{background:var(--c3)}
table{border-collapse:collapse;font-size:13px}.wide{overflow-x:auto}
th,td{padding:3px 12px 3px 0;text-align:left;border-bottom:1px solid var(--rule);white-space:nowrap}
th{color:var(--dim);font-weight:600}td.n,th.n{text-align:right}tr.worst td{font-weight:600}
"""
# The columns of a recipe's report, in the order in which errors come about, and what they are.
ERRORS = {
    "error_rounded": "rounded to nearest",
    "error_unscaled": "before scaling",
    "error_unsmoothed": "before smoothing",
    "error": "as built",
}

NORMS = {"input_layernorm": "input norm", "post_attention_layernorm": "norm before MLP"}
METRICS = ("perplexity_base", "perplexity", "kl_mean", "top1_agreement")


def page(findings: Findings, artifact_id: str, verdict: str | None) -> str:
    """The whole document."""
    title = f"{findings.key}: {findings.manifest.recipe}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        *_summary(findings, artifact_id, verdict),
        *_left_as_they_were(findings),
        *_output_errors(findings),
        *_outliers(findings),
        *_weights(findings),
        *_kv(findings),
        *_table(findings),
        *_runs(findings),
        *_made_of(findings),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return (
        f"<!doctype html>\n<html lang=en>{head}<style>{STYLE}</style>\n<body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def _summary(findings: Findings, artifact_id: str, verdict: str | None) -> Iterator[str]:
    manifest = findings.manifest
    yield f'<p><code>{artifact_id}</code></p><p class="dim">{manifest.tp} rank{"s" if manifest.tp > 1 else ""},'
    yield f" {len(manifest.files)} files, {human_size(manifest.size)}; {findings.config.num_layers} layers.</p>"
    statement = findings.statement or {}
    metrics = statement.get("metrics", {})
    if verdict:
        said = [f"{name.replace('_', ' ')} {_figure(metrics[name])}" for name in METRICS if name in metrics]
        mark = "" if verdict == "pass" else ' class="warn"'
        yield f"<p><span{mark}>Evaluation: {escape(verdict)}</span> {escape(' · '.join(['', *said]))}</p>"
    worst = max(findings.errors, key=lambda row: _number(row.get("error")), default=None)
    if worst and "error" in worst:
        yield (
            f"<p>The largest error of outputs is {worst['error']:.2e} of their power, in layer {worst['layer']}"
            f" ({escape(_pair(worst['pair']))}).</p>"
        )
    for note in findings.notes:
        yield f'<p class="warn">{escape(note)}</p>'


def _left_as_they_were(findings: Findings) -> Iterator[str]:
    yield "<h2>What is not quantized</h2>"
    linears = findings.unquantized
    if findings.manifest.recipe.weights == "fp16":
        yield "<p>Nothing is: the weights are the checkpoint's own.</p>"
    elif linears:
        yield f'<p class="warn">{len(linears)} linears of decoder layers stayed floats; the recipe says otherwise:</p>'
        yield f"<p><code>{escape(', '.join(linears))}</code></p>"
    else:
        count, head = len(names.LINEARS) * findings.config.num_layers, findings.manifest.recipe.head
        floats = "embedding, norms and biases" if head != "fp16" else "embedding, output matrix, norms and biases"
        yield f"<p>All {count} linears of the decoder layers are. Floats, as the recipe has it: {floats}.</p>"
        if head != "fp16":
            error = findings.head.get("error")
            said = f", with an error of outputs of {error:.2e} of their power" if error is not None else ""
            yield f"<p>The output matrix is {escape(head)}{said}.</p>"


def _output_errors(findings: Findings) -> Iterator[str]:
    columns = _columns(findings)
    if not columns:
        return
    yield _section(
        "Error of outputs",
        "What quantizing a pair's linears changes in their outputs, in parts of the outputs' power, on the calibration"
        " text.",
    )
    yield svg.legend([ERRORS[name] for name in columns])
    figures = {}
    for pair in sorted({row["pair"] for row in findings.errors}, key=_order):
        rows = {row["layer"]: row for row in findings.errors if row["pair"] == pair}
        layers = range(findings.config.num_layers)
        series = {ERRORS[c]: [_number(rows.get(layer, {}).get(c)) for layer in layers] for c in columns}
        figures[_pair(pair)] = svg.lines(series, log=True, what=f"error of outputs, {_pair(pair)}")
    yield _figures(figures)


def _outliers(findings: Findings) -> Iterator[str]:
    if not findings.outliers:
        return
    yield _section(
        "Outliers of inputs",
        "The largest input channel in parts of the median one, over the calibration text: as the model has it, and"
        " after what was scaled or smoothed.",
    )
    yield svg.legend(["as the model has it", "after scaling"])
    yield _figures(
        {
            _pair(pair): svg.lines(
                {"as the model has it": [one for one, _ in values], "after scaling": [other for _, other in values]},
                log=True,
                what=f"outliers of the inputs, {_pair(pair)}",
            )
            for pair, values in findings.outliers.items()
        }
    )


def _weights(findings: Findings) -> Iterator[str]:
    if not findings.weights:
        return
    values = [value for row in findings.weights.values() for value in row]
    gptq = "gptq" in str(findings.options.get("method"))
    feedback = " Error feedback makes this larger, to make the error of outputs smaller." if gptq else ""
    yield _section(
        "Error of weights",
        "How far the weights are from the checkpoint's, in parts of their norm, with scales taken out that cancel out"
        f" in the model. From {min(values):.3f} (pale) to {max(values):.3f} (strong).{feedback}",
    )
    shown = {_module(module): row for module, row in findings.weights.items()}
    yield f'<div class="wide">{svg.heat(shown, what="error of weights")}</div>'


def _kv(findings: Findings) -> Iterator[str]:
    granularity = (findings.options.get("kv") or {}).get("granularity")
    kept = findings.manifest.recipe.kv + (f" (granularity: {granularity})" if granularity else "")
    yield _section(
        "Keys and values",
        f"The recipe keeps them as {kept}. With one scale for a whole layer, or one a head, a channel uses only a part"
        f" of the {LEVELS} steps of an int8: shown for the median channel and the smallest. With a scale a channel"
        " every channel uses all of them.",
    )
    order = ["a layer, median", "a layer, smallest", "a head, median", "a head, smallest"]
    yield svg.legend(order)
    figures = {}
    for what, name in (("K", "keys, after rotary"), ("V", "values, after smoothing")):
        layer, head = findings.levels[what, "layer"], findings.levels[what, "head"]
        columns = ([m for m, _ in layer], [s for _, s in layer], [m for m, _ in head], [s for _, s in head])
        figures[name] = svg.lines(dict(zip(order, columns, strict=True)), log=False, what=f"steps used by {name}")
    yield _figures(figures)


def _table(findings: Findings) -> Iterator[str]:
    if not findings.errors:
        return
    columns = _columns(findings)
    others = [
        key for key in dict.fromkeys(k for row in findings.errors for k in row) if key not in (*ERRORS, "layer", "pair")
    ]
    worst = sorted((_number(row.get("error")) for row in findings.errors if "error" in row), reverse=True)[:3]
    yield _section("Every layer", "Errors as above; the three largest are marked.")
    yield "<div class=wide><table><tr><th class=n>layer<th>pair" + "".join(
        f"<th class=n>{escape(ERRORS[c])}" for c in columns
    )
    yield "".join(f"<th class=n>{escape(c.replace('_', ' '))}" for c in others)
    yield "<th class=n>outlier before<th class=n>after</tr>"
    for row in findings.errors:
        outlier = findings.outliers.get(row["pair"])
        before, after = outlier[row["layer"]] if outlier else (math.nan, math.nan)
        mark = " class=worst" if columns and row.get("error") in worst else ""
        cells = [f"<td class=n>{_shown(row.get(c), '.2e')}" for c in columns]
        cells += [f"<td class=n>{_shown(row.get(c), '.3g')}" for c in others]
        cells += [f"<td class=n>{_shown(value, '.1f')}" for value in (before, after)]
        yield f"<tr{mark}><td class=n>{row['layer']}<td>{escape(_pair(row['pair']))}{''.join(cells)}</tr>"
    yield "</table></div>"


def _runs(findings: Findings) -> Iterator[str]:
    yield "<h2>What it took</h2>"
    if not findings.runs:
        yield "<p>Nothing was computed here: calibration and weights came from the cache.</p>"
        return
    yield "<table><tr><th>stage<th class=n>memory<th class=n>forecast<th class=n>time<th class=n>forecast<th>on</tr>"
    for stage, run in findings.runs.items():
        expected, measured = run["forecast"], run["measured"]
        cells = [
            human_size(measured["memory"]),
            human_size(sum(expected["memory"].values())),
            human_time(measured["seconds"]),
            human_time(expected["seconds"]),
        ]
        figures = "".join(f"<td class=n>{cell}" for cell in cells)
        yield f"<tr><td>{escape(stage)}{figures}<td>{escape(run['device'])}</tr>"
    yield "</table>"


def _made_of(findings: Findings) -> Iterator[str]:
    manifest = findings.manifest
    yield "<h2>Made of</h2>"
    yield _pairs("Recipe", {key: value for key, value in findings.options.items() if value is not None})
    if findings.calibration:
        yield _pairs("Calibration", findings.calibration)
    yield _pairs("Sources (SHA-256)", {name: digest[:SHORT] for name, digest in sorted(manifest.sources.items())})


def _section(title: str, text: str) -> str:
    return f"<h2>{escape(title)}</h2><p>{escape(text)}</p>"


def _pairs(title: str, content: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(str(key))}<td><code>{escape(_text(value))}</code></tr>" for key, value in content.items()
    )
    return f"<h3>{escape(title)}</h3><div class=wide><table>{rows}</table></div><p></p>"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_text(one)}" for key, one in value.items())
    if isinstance(value, list):
        return ", ".join(_text(one) for one in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _figures(figures: Mapping[str, str]) -> str:
    inner = "".join(f"<figure><h3>{escape(name)}</h3>{figure}</figure>" for name, figure in figures.items())
    return f'<div class="figures">{inner}</div>'


def _columns(findings: Findings) -> list[str]:
    return [name for name in ERRORS if any(name in row for row in findings.errors)]


def _pair(name: str) -> str:
    """A pair as people say it: `v → o`."""
    before, _, after = name.partition(" -> ")
    return f"{NORMS.get(before, _module(before))} → {', '.join(_module(part) for part in after.split(', '))}"


def _order(pair: str) -> int:
    """In the order in which a token goes through a layer."""
    known = [each.name for each in ORDER]
    return known.index(pair) if pair in known else len(known)


def _module(name: str) -> str:
    return name.rpartition(".")[2].removesuffix("_proj")


def _figure(metric: Mapping[str, Any]) -> str:
    value = metric.get("value")
    return "-" if value is None else f"{value:.4g}"


def _shown(value: Any, form: str) -> str:
    number = _number(value)
    return format(number, form) if math.isfinite(number) else "-"


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
