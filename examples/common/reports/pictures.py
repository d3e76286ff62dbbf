"""Pictures of what the result files say, as small SVG files for the documents: the same bytes each time.

Text stays text, the background is left open, and the colours are readable on white and on black.
"""

import math
from html import escape

from common.reports import comparison, reached, reading

COLOURS = {"base": "#8b949e", "lora": "#3b82f6", "full": "#e07b00"}
NAMES = {"base": "frozen base", "lora": "LoRA", "full": "full fine-tuning"}
# What stands for the frozen base: on GLUE it needs a trained head, without which it is at chance.
BASES = ("none", "head", "majority")
ROUND = [digit * 10.0**power for power in range(-3, 6) for digit in (1, 2, 5)]  # of axes
STYLE = (
    "text{fill:#57606a;font:12px sans-serif}line{stroke:#8b949e}.grid{stroke-opacity:.3}.whisker{stroke:#24292f}"
    "@media(prefers-color-scheme:dark){text{fill:#b1bac4}.whisker{stroke:#f0f6fc}}"
)


def svg(width, height, title, parts):
    """The text of an SVG file."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    lines = [f'{head} role="img">', f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", *parts, "</svg>"]
    return "\n".join(lines) + "\n"


def text(x, y, content, anchor="start", **attributes):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{_more(attributes)}>{escape(content)}</text>'


def line(x1, y1, x2, y2, **attributes):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"{_more(attributes)}/>'


def _more(attributes):
    return "".join(f' {name.rstrip("_").replace("_", "-")}="{value}"' for name, value in attributes.items())


def legend(x, y, keys):
    parts = []
    for key in keys:
        parts.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{COLOURS[key]}"/>')
        parts.append(text(x + 15, y, NAMES[key]))
        x += 35 + 7 * len(NAMES[key])
    return parts


def loss_curve(records):
    """(Title, SVG) of the losses of LoRA and full fine-tuning on the E2E model and data that ship here."""
    group = reading.group_of({"task": "e2e", **_shipped("NLG")})
    pair = comparison.best_pairs(records)[group]
    curves = {key: records[name]["curve"] for key, name in zip(("lora", "full"), pair, strict=True)}
    points = {key: records[name]["history"] for key, name in zip(("lora", "full"), pair, strict=True)}
    last = max(step for curve in curves.values() for step, _ in curve)
    losses = [loss for curve in curves.values() for _, loss in curve]
    losses += [entry["valid_loss"] for entries in points.values() for entry in entries]
    low, high = math.log(min(losses)) - 0.05, math.log(max(losses)) + 0.05
    left, top, width, height = 45, 30, 420, 200

    def place(step, loss):
        return left + width * step / last, top + height * (high - math.log(loss)) / (high - low)

    parts = legend(left, 16, curves)
    for tick in ROUND:
        if low <= math.log(tick) <= high:
            _, y = place(0, tick)
            parts += [line(left, y, left + width, y, class_="grid"), text(left - 6, y + 4, f"{tick:g}", "end")]
    between = next(step for step in ROUND if step >= last / 6)
    for step in range(0, last + 1, int(between) or 1):
        parts.append(text(place(step, 1)[0], top + height + 18, f"{step:,}", "middle"))
    parts.append(line(left, top + height, left + width, top + height))
    parts.append(text(left + width / 2, top + height + 36, "optimizer step", "middle"))
    labels = {key: place(0, points[key][-1]["valid_loss"])[1] for key in curves}
    apart = max(0, 14 - abs(labels["full"] - labels["lora"])) / 2
    for key, curve in curves.items():
        path = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in curve)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[key]}" stroke-width="1.2"/>')
        for entry in points[key]:
            x, y = place(entry["step"], entry["valid_loss"])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{COLOURS[key]}" stroke="#fff"/>')
        shift = apart if labels[key] >= max(labels.values()) else -apart
        parts.append(text(left + width + 8, labels[key] + 4 + shift, f"{points[key][-1]['valid_loss']:.3f}"))
    return "Loss of training (lines) and validation (points) on the E2E data that ship here", svg(
        *(540, 275), "Loss of LoRA and of full fine-tuning, by optimizer step", parts
    )


def _shipped(folder):
    return {"configuration": {"model": f"examples/{folder}/model", "data_dir": f"examples/{folder}/data"}}


def quality(records, synthetic=False):
    """(Title, SVG) of the best run of each method and task, with the interval of its score."""
    found = [entry for entry in reached.best(records) if reading.is_synthetic(entry[0]) == synthetic]
    left, top, width, bar = 190, 30, 300, 13
    scale = width / 100
    height = top + len(found) * (3 * bar + 12)
    parts = legend(left, 16, COLOURS)
    for tick in range(0, 101, 25):
        x = left + scale * tick
        parts += [line(x, top, x, height, class_="grid"), text(x, height + 16, str(tick), "middle")]
    y = top + 6
    for record, key, kind, rows in found:
        base = next((rows[method] for method in BASES if method in rows), None)
        parts.append(text(left - 8, y + 1.5 * bar + 4, comparison.short_title(record, kind), "end"))
        for name, row in {"base": base, "lora": rows.get("lora"), "full": rows.get("full")}.items():
            if row is not None and row.scores[key][0] is not None:
                parts += _bar(left, y, scale * kind.factor, bar, COLOURS[name], row, key, kind)
            y += bar
        y += 12
    what = "the models and data that ship here (SYNTHETIC)" if synthetic else "real models and data"
    title = f"The best runs on {what}; a whisker is the 95 % interval over resamples of the test set"
    return title, svg(540, height + 24, title, parts)


def _bar(left, y, scale, height, colour, row, key, kind):
    mean, bounds = row.scores[key][0], row.intervals.get(key)
    length, middle = scale * max(0, mean), y + height / 2
    yield f'<rect x="{left}" y="{y:.1f}" width="{length:.1f}" height="{height - 2}" fill="{colour}"/>'
    end = left + length
    if bounds:
        low, high = (left + scale * bound for bound in bounds)
        end = max(end, high)
        yield line(low, middle - 1, high, middle - 1, class_="whisker")
        yield from (line(x, middle - 4, x, middle + 2, class_="whisker") for x in (low, high))
    yield text(end + 5, y + height - 3, kind.text(mean))


GROWING = {
    **{"memory": "#8b949e", "step": "#3b82f6", "save": "#e07b00", "load": "#2da44e"},
    **{"inject": "#bf3989", "switch": "#8250df"},
}


def growth(records):
    """(Title, SVG) of what grows with layers, adapters and rank, relative to the first point; both axes logarithmic."""
    title, panel, top, height, parts = "Time and memory, divided by those at the first number", 160, 40, 200, []
    for number, what in enumerate(GROWING):
        parts.append(f'<rect x="{45 + 85 * number}" y="7" width="10" height="10" fill="{GROWING[what]}"/>')
        parts.append(text(60 + 85 * number, 16, what))
    axes = records["benchmark_growth"]["axes"]
    most = max(
        point[what] / found["points"][0][what] for found in axes.values() for point in found["points"] for what in point
    )
    high, low = math.log(most) + 0.1, math.log(0.6)
    for number, (axis, found) in enumerate(axes.items()):
        left, first = 45 + number * (panel + 25), found["numbers"][0]
        across = math.log(found["numbers"][-1] / first)

        def place(value, ratio, left=left, first=first, across=across):
            x = left + panel * math.log(value / first) / across
            return x, top + height * (high - math.log(ratio)) / (high - low)

        for tick in (1, 2, 5, 10, 20, 50, 100):
            if tick <= most:
                y = place(first, tick)[1]
                parts += [line(left, y, left + panel, y, class_="grid")]
                parts += [text(left - 6, y + 4, str(tick), "end")] if not number else []
        for value in found["numbers"]:
            parts.append(text(place(value, 1)[0], top + height + 16, f"{value:,}", "middle"))
        parts.append(text(left + panel / 2, top + height + 34, axis, "middle"))
        end = min(found["numbers"][-1], first * math.exp(high))
        parts.append(line(*place(first, 1), *place(end, end / first), stroke_dasharray="4 3"))
        for what, colour in GROWING.items():
            ratios = [point[what] / found["points"][0][what] for point in found["points"]]
            path = " ".join("{:.1f},{:.1f}".format(*place(*at)) for at in zip(found["numbers"], ratios, strict=True))
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    title += "; dashed: linear growth"
    return title, svg(600, top + height + 44, title, parts)


SHADES = {
    "query and value": ("#86d993", "#2da44e", "#116329"),
    "all linear layers": ("#93c5fd", "#3b82f6", "#1d4ed8"),
    None: (COLOURS["full"],),
}


def regret(records):
    """(Title, SVG) of benchmarks/when_lora_equals_full.py: loss by learning rate for each batch size, and long runs."""
    record = records["when_lora_equals_full"]
    curves, runs, lines = record["curves"], record["long"], f"{record['counts']['train']:,} lines"
    ranks = sorted({curve["r"] for curve in curves if curve["r"]})
    sizes = sorted({curve["batch_size"] for curve in curves})
    panel, top, height, parts, drawn = 190, 62, 210, [], {}

    def colour(curve):
        shades = SHADES[curve["targets"]]
        return shades[min(ranks.index(curve["r"]), len(shades) - 1) if curve["r"] else 0]

    for number, curve in enumerate(curve for curve in curves if curve["batch_size"] == sizes[0]):
        x, y = 45 + 165 * (number // len(ranks)), 12 + 14 * (number % len(ranks))
        name = f"{curve['targets']}, r={curve['r']}" if curve["r"] else NAMES["full"]
        parts += [f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{colour(curve)}"/>', text(x + 15, y, name)]
    for size in sizes:
        losses = [(curve, curve["points"]) for curve in curves if curve["batch_size"] == size]
        drawn[f"batches of {size}, {lines}"] = "learning rate", losses, math.log10
    drawn[f"longer, batches of {runs[0]['batch_size']}"] = "lines", [(run, run["losses"]) for run in runs], float
    low = min(loss for _, found, _ in drawn.values() for _, points in found for _, loss in points if loss) - 0.01
    high = max(curve["mean"] or 0 for curve in curves) + 0.1  # what is above, or has diverged, is off the picture
    for number, (title, (across, found, scale)) in enumerate(drawn.items()):
        left = 45 + number * (panel + 25)
        ends = [scale(at) for _, points in found for at, _ in points]
        begin, end = min(ends), max(ends)

        def place(at, loss, begin=begin, end=end, scale=scale):
            return panel * (scale(at) - begin) / (end - begin), height * (high - loss) / (high - low)

        for tick in (step / 20 for step in range(41)):
            if low <= tick <= high:
                y = top + place(1, tick)[1]
                parts.append(line(left, y, left + panel, y, class_="grid"))
                parts += [text(left - 6, y + 4, f"{tick:.2f}", "end")] if not number else []
        if scale is float:
            ticks = {at: f"{at:,}" for at, _ in found[0][1][1::2]}
        else:
            ticks = {10.0**power: f"1e{power}" for power in range(math.ceil(begin), math.floor(end) + 1)}
        parts += [text(left + place(at, 0)[0], top + height + 16, tick, "middle") for at, tick in ticks.items()]
        parts.append(text(left + panel / 2, top + height + 34, across, "middle"))
        parts.append(text(left + panel / 2, top - 6, title, "middle"))
        parts.append(line(left, top + height, left + panel, top + height))
        parts.append(f'<svg x="{left}" y="{top}" width="{panel}" height="{height}">')
        for curve, points in found:
            path = ["{:.1f},{:.1f}".format(*place(*at)) for at in points if at[1] is not None]
            line_of = f'fill="none" stroke="{colour(curve)}" stroke-width="1.5"'
            parts.append(f'<polyline points="{" ".join(path)}" {line_of}/>')
            parts += ['<circle cx="{}" cy="{}" r="2" fill="{}"/>'.format(*at.split(","), colour(curve)) for at in path]
        parts.append("</svg>")
    title = "Loss on lines held out, by learning rate for two batch sizes, and by lines seen in longer runs"
    return title, svg(680, top + height + 44, title, parts)


PICTURES = {
    "when_lora_equals_full": regret,
    "growth_curves": growth,
    "loss_curve": loss_curve,
    "quality": quality,
    "quality_embedded": lambda records: quality(records, synthetic=True),
}
