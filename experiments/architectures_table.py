"""Tables and figures of `architectures.sh`, from the numbers of all rows that are measured.

    python -m experiments.architectures_table OUT [--figures DIR]

Differences are of the same images with the same noise: ± is the standard error of their mean.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from experiments.architectures_steps import MINUTES, SHARES, rows_of
from mrcnf.measure.evaluate import mean_and_error
from mrcnf.report.plot import COLOURS

Rows = dict[str, dict[str, Any]]
KINDS = ("continuous", "coupling")
COLOUR = dict(zip(KINDS, COLOURS, strict=False))
MARKER = {"continuous": "o", "coupling": "s"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--figures", type=Path, help="folder for the figures")
    options = parser.parse_args()
    rows: Rows = {}
    for name in rows_of("cpu"):
        path = options.out / name / "measured.json"
        if path.exists():
            rows[name] = json.loads(path.read_text())
    for table in (headline, main_table, cost_table, codec_table, ood_table, attack_table):
        print("\n".join(table(rows)), end="\n\n")
    if options.figures:
        options.figures.mkdir(parents=True, exist_ok=True)
        for figure in (differences, operations, compression, detections, attacks):
            drawn = figure(rows)
            drawn.savefig(options.figures / f"architectures-{figure.__name__}.png", dpi=90)
            plt.close(drawn)


def headline(rows: Rows) -> list[str]:
    """What more levels buy: differences within an objective."""
    lines = _head("", "two levels − one", "three − one", "three − two")
    for kind in KINDS:
        pairs = (("wavelet-2", "one"), ("wavelet-3", "one"), ("wavelet-3", "wavelet-2"))
        cells = [_difference(rows, f"{kind}-{a}", f"{kind}-{b}") for a, b in pairs]
        lines.append(_line(kind, *cells))
    return lines


def main_table(rows: Rows) -> list[str]:
    lines = _head(
        "", "parameters", "bits/dim", "difference from one resolution", "shares of levels"
    )
    for name, row in _with(rows, "bits", "cost"):
        reference = _reference(name)
        shares = " / ".join(f"{_mean(own)[0]:.3f}" for own in row["bits"]["levels"].values())
        lines.append(
            _line(
                name,
                f"{row['cost']['parameters']:,}",
                "{:.4f} ± {:.4f}".format(*_mean(row["bits"]["bits"])),
                "" if reference == name else _difference(rows, name, reference),
                shares if len(row["bits"]["levels"]) > 1 else "",
            )
        )
    return lines


def cost_table(rows: Rows) -> list[str]:
    lines = _head(
        "", "steps × images", "ms a step", "MFLOP an image: likelihood", "a training step",
        "MB of a training step", "evaluations", "likelihoods/s", "samples/s",
    )  # fmt: skip
    for name, row in _with(rows, "bits", "cost"):
        cost, levels = row["cost"], list(row["cost"]["levels"].values())
        each = [
            60_000 * MINUTES * share / own["steps"]
            for share, own in zip(SHARES[len(levels)], levels, strict=True)
        ]
        lines.append(
            _line(
                name,
                ", ".join(f"{own['steps']:,} × {own['batch']}" for own in levels),
                ", ".join(f"{value:.0f}" for value in each),
                f"{cost['flop'] / 1e6:,.0f}",
                ", ".join(f"{own['step_flop'] / 1e6:,.0f}" for own in levels),
                ", ".join(f"{own['peak_bytes'] / 1e6:,.0f}" for own in levels),
                str(cost["evaluations"]),
                f"{row['bits']['images_per_second']:.1f}",
                f"{cost['samples_per_second']:.1f}",
            )
        )
    return lines


def codec_table(rows: Rows) -> list[str]:
    lines = _head(
        "", "images", "bits/dim of the file", "the bound", "over it", "without the beginning",
        "images/s written", "read", "bit for bit",
    )  # fmt: skip
    for name, row in _with(rows, "codec"):
        own = row["codec"]
        lines.append(
            _line(
                name,
                str(own["images"]),
                f"{own['bits_per_dim']:.3f}",
                f"{own['bound']:.3f}",
                f"{own['overhead_percent']:+.2f}%",
                _percent(own["excess_percent"]),
                f"{own['written_per_second']:.2f}",
                f"{own['read_per_second']:.2f}",
                "yes" if own["same"] else "NO",
            )
        )
    return lines


def ood_table(rows: Rows) -> list[str]:
    scores = ("likelihood", "complexity", "typicality")
    kinds = next((list(row["ood"]["kinds"]) for _, row in _with(rows, "ood")), [])
    lines = _head("", "against", "bits/dim of those", *scores)
    for name, row in _with(rows, "ood"):
        for kind in kinds:
            own = row["ood"]["kinds"][kind]
            cells = []
            for score in scores:
                low, high = own["interval"][score]
                cells.append(f"{own['auroc'][score]:.3f} ({low:.3f} to {high:.3f})")
            lines.append(_line(name, kind, f"{own['bits']:.3f}", *cells))
    return lines


def attack_table(rows: Rows) -> list[str]:
    lines = _head(
        "", "images", "ε", "natural", "attacked", "random signs", "attacked − natural",
        "random − natural", "file of attacked", "over its bound", "bit for bit",
    )  # fmt: skip
    for name, row in _with(rows, "attack"):
        own = row["attack"]
        natural = _total(own["natural"])
        for epsilon, found in own["epsilons"].items():
            changed, random = _total(found["attacked"]), _total(found["random"])
            lines.append(
                _line(
                    name,
                    str(own["images"]),
                    epsilon,
                    *("{:.3f} ± {:.3f}".format(*_mean(v)) for v in (natural, changed, random)),
                    *("{:+.3f} ± {:.3f}".format(*_mean(v - natural)) for v in (changed, random)),
                    f"{found['file']['bits_per_dim']:.3f}",
                    _percent(found["file"]["overhead_percent"]),
                    "yes" if found["file"]["same"] else "NO",
                )
            )
    return lines


def differences(rows: Rows) -> plt.Figure:
    """Bits of every row against those of one resolution."""
    shown = [name for name, _ in _with(rows, "bits") if name != _reference(name)]
    shown = [name for name in shown if _reference(name) in rows]

    def point(name: str) -> tuple[float, float]:
        return _mean(_bits(rows, name) - _bits(rows, _reference(name)))

    figure, axis = _by_row(shown, "bits/dim − those of one resolution, same kind and minutes")
    _points(axis, shown, point)
    axis.axvline(0, color="grey", linewidth=0.8)
    return figure


def operations(rows: Rows) -> plt.Figure:
    """Bits against what an image's likelihood costs."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, row in _with(rows, "bits", "cost"):
        mean, error = _mean(row["bits"]["bits"])
        kind = name.split("-")[0]
        x = row["cost"]["flop"] / 1e6
        axis.errorbar(x, mean, error, marker=MARKER[kind], color=COLOUR[kind], capsize=2)
        axis.annotate(name.removeprefix(f"{kind}-"), (x, mean), (4, 3), fontsize=7,
                      textcoords="offset points")  # fmt: skip
    _legend(axis)
    axis.set(xscale="log", xlabel="MFLOP for the likelihood of an image", ylabel="bits/dim")
    return figure


def compression(rows: Rows) -> plt.Figure:
    """What files take, with and without what a file begins with."""
    shown = [name for name, _ in _with(rows, "codec")]
    figure, axis = _by_row(shown, "bits/dim of a file of images")
    for i, name in enumerate(shown):
        own, colour = rows[name]["codec"], COLOUR[name.split("-")[0]]
        axis.plot(own["bound"], i, marker="|", color="black", markersize=12)
        axis.plot(own["bits_per_dim"], i, marker=MARKER[name.split("-")[0]], color=colour)
    axis.plot([], [], "|", color="black", markersize=12, label="the bound on the same noise")
    _legend(axis)
    return figure


def detections(rows: Rows) -> plt.Figure:
    """Areas by row and kind of images."""
    shown = [name for name, _ in _with(rows, "ood")]
    kinds = list(rows[shown[0]]["ood"]["kinds"]) if shown else []
    figure, axis = _by_row(shown, "AUROC by complexity (bits of a file − the model's)")
    for k, kind in enumerate(kinds):
        found = [rows[name]["ood"]["kinds"][kind] for name in shown]
        middle = [own["auroc"]["complexity"] for own in found]
        ends = [own["interval"]["complexity"] for own in found]
        below = [m - low for m, (low, _) in zip(middle, ends, strict=True)]
        above = [high - m for m, (_, high) in zip(middle, ends, strict=True)]
        places = [i + 0.12 * (k - 1.5) for i in range(len(shown))]
        axis.errorbar(middle, places, xerr=(below, above), fmt="osD^"[k % 4], color=COLOURS[k],
                      markersize=4, label=f"against {kind}")  # fmt: skip
    axis.axvline(0.5, color="grey", linewidth=0.8)
    axis.legend(fontsize=7)
    return figure


def attacks(rows: Rows) -> plt.Figure:
    """What an attack and random signs add."""
    shown = [name for name, _ in _with(rows, "attack")]
    figure, axis = _by_row(shown, "bits/dim more than the natural images")
    styles = {("2", "attacked"): "o", ("2", "random"): "^", ("8", "attacked"): "s",
              ("8", "random"): "D"}  # fmt: skip
    for k, ((epsilon, kind), marker) in enumerate(styles.items()):
        pairs = []
        for name in shown:
            own = rows[name]["attack"]
            more = _total(own["epsilons"][epsilon][kind]) - _total(own["natural"])
            pairs.append(_mean(more))
        axis.errorbar([mean for mean, _ in pairs], range(len(shown)),
                      xerr=[error for _, error in pairs], fmt=marker, color=COLOURS[k],
                      markersize=5, label=f"{kind}, ε = {epsilon}")  # fmt: skip
    axis.set_xscale("symlog", linthresh=0.1)
    axis.legend(fontsize=7)
    return figure


def _by_row(names: Sequence[str], label: str) -> tuple[plt.Figure, plt.Axes]:
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.32 * len(names)), layout="constrained")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlabel(label)
    axis.grid(axis="x", linewidth=0.3)
    return figure, axis


def _points(
    axis: plt.Axes, names: Iterable[str], point: Callable[[str], tuple[float, float]]
) -> None:
    for i, name in enumerate(names):
        mean, error = point(name)
        kind = name.split("-")[0]
        axis.errorbar(mean, i, xerr=error, marker=MARKER[kind], color=COLOUR[kind], capsize=2)
    _legend(axis)


def _legend(axis: plt.Axes) -> None:
    for kind in KINDS:
        axis.plot([], [], MARKER[kind], color=COLOUR[kind], label=kind)
    axis.legend(fontsize=7)


def _with(rows: Rows, *parts: str) -> list[tuple[str, dict[str, Any]]]:
    return [(name, row) for name, row in rows.items() if all(part in row for part in parts)]


def _reference(name: str) -> str:
    """What a row is compared with: one resolution; trained on attacked images, itself without."""
    plain = name.removesuffix("-adversarial")
    return plain if plain != name else f"{name.split('-')[0]}-one"


def _bits(rows: Rows, name: str) -> Tensor:
    return torch.tensor(rows[name]["bits"]["bits"], dtype=torch.float64)


def _total(shares: list[list[float]]) -> Tensor:
    return torch.tensor(shares, dtype=torch.float64).sum(0)


def _mean(values: Tensor | list[float]) -> tuple[float, float]:
    return mean_and_error(torch.as_tensor(values, dtype=torch.float64), None)


def _difference(rows: Rows, after: str, before: str) -> str:
    if any("bits" not in rows.get(name, {}) for name in (after, before)):
        return ""
    return "{:+.4f} ± {:.4f}".format(*_mean(_bits(rows, after) - _bits(rows, before)))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}%"


def _head(*names: str) -> list[str]:
    return [_line(*names), "|---" * len(names) + "|"]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
