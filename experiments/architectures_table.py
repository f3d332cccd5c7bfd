"""Tables and figures of `architectures.sh`, from the numbers of all rows that are measured.

    python -m experiments.architectures_table OUT [--figures DIR] [--collect FILE.json]

OUT is the folder of the runs, or a file of all their numbers that `--collect` wrote before:
experiments/architectures.json is of the rows in experiments/architectures.md. Differences are of
the same images with the same noise: ± is the standard error of their mean.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import NullFormatter
from torch import Tensor

from experiments.architectures_steps import MINUTES, SHARES, rows_of
from mrcnf import files
from mrcnf.measure.evaluate import mean_and_error
from mrcnf.report.plot import COLOURS

Rows = dict[str, dict[str, Any]]
KINDS = ("continuous", "coupling")
SHUFFLED = ("split-random", "split-learned", "split-entropy", "split-context")
SCORES = ("likelihood", "complexity", "typicality")
COLOUR = dict(zip(KINDS, COLOURS, strict=False))
MARKER = {"continuous": "o", "coupling": "s"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--figures", type=Path, help="folder for the figures")
    parser.add_argument("--collect", type=Path, help="file to write the numbers of all rows to")
    options = parser.parse_args()
    rows = read(options.out)
    tables = (
        headline, main_table, shuffles, cost_table, codec_table,
        *(functools.partial(ood_table, score=score) for score in SCORES), levels_table,
        attack_table, controls_table,
    )  # fmt: skip
    for table in tables:
        print("\n".join(table(rows)), end="\n\n")
    if options.collect:
        files.write(options.collect, json.dumps(_rounded(rows), separators=(",", ":")) + "\n")
    if options.figures:
        options.figures.mkdir(parents=True, exist_ok=True)
        for figure in (differences, operations, compression, detections, attacks, strength):
            drawn = figure(rows)
            drawn.savefig(options.figures / f"architectures-{figure.__name__}.png", dpi=90)
            plt.close(drawn)


def read(out: Path) -> Rows:
    """The numbers of all rows: of a folder of runs, or of a file that they were collected in."""
    if out.is_file():
        found: Rows = json.loads(out.read_text())
        return found
    paths = {name: out / name / "measured.json" for name in rows_of("cpu")}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def _rounded(value: Any) -> Any:
    """With numbers of seven digits, which is more than any of them has."""
    if isinstance(value, dict):
        return {key: _rounded(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_rounded(own) for own in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


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


def shuffles(rows: Rows) -> list[str]:
    """What splits, an order of their channels, and wavelets buy couplings."""
    lines = _head("", "− one resolution", "− the split that does not shuffle")
    for name, _ in _with(rows, "bits"):
        if name.startswith("coupling-") and name != "coupling-one" and "adversarial" not in name:
            plain = "" if name == "coupling-split" else _difference(rows, name, "coupling-split")
            lines.append(_line(name, _difference(rows, name, "coupling-one"), plain))
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


def ood_table(rows: Rows, score: str) -> list[str]:
    """Areas by one score, with the interval that holds 95% of the resamples."""
    lines = _head(f"AUROC by {score}", *_kinds(rows))
    for name, row in _with(rows, "ood"):
        cells = []
        for own in row["ood"]["kinds"].values():
            low, high = own["interval"][score]
            cells.append(f"{own['auroc'][score]:.3f} ({low:.2f} to {high:.2f})")
        lines.append(_line(name, *cells))
    return lines


def levels_table(rows: Rows) -> list[str]:
    """Areas by each level's share of the bits, the base first; and what the images cost."""
    lines = _head("AUROC by level's share; bits/dim in all", *_kinds(rows))
    for name, row in _with(rows, "ood"):
        cells = []
        for own in row["ood"]["kinds"].values():
            areas = [v for score, v in own["auroc"].items() if score.startswith("level-")]
            by_level = " / ".join(f"{area:.3f}" for area in areas)
            cells.append(f"{by_level}; {own['bits']:.2f}" if areas else f"{own['bits']:.2f}")
        lines.append(_line(name, *cells))
    return lines


def _kinds(rows: Rows) -> list[str]:
    return next((list(row["ood"]["kinds"]) for _, row in _with(rows, "ood")), [])


def attack_table(rows: Rows) -> list[str]:
    lines = _head(
        "", "images", "ε", "natural", "attacked", "random signs", "attacked − natural",
        "random − natural", "ratio", "attacked − natural by level", "file of attacked",
        "over its bound", "without the beginning", "bit for bit",
    )  # fmt: skip
    for name, row in _with(rows, "attack"):
        own = row["attack"]
        natural = _total(own["natural"])
        for epsilon, found in own["epsilons"].items():
            changed, random = _total(found["attacked"]), _total(found["random"])
            more = [_mean(v - natural) for v in (changed, random)]
            pairs = zip(found["attacked"], own["natural"], strict=True)
            shares = [_mean(torch.tensor(a) - torch.tensor(n))[0] for a, n in pairs]
            lines.append(
                _line(
                    name,
                    str(own["images"]),
                    epsilon,
                    *("{:.3f} ± {:.3f}".format(*_mean(v)) for v in (natural, changed, random)),
                    *("{:+.3f} ± {:.3f}".format(*own) for own in more),
                    f"{more[0][0] / more[1][0]:.2f}",
                    " / ".join(f"{share:+.3f}" for share in shares) if len(shares) > 1 else "",
                    f"{found['file']['bits_per_dim']:.3f}",
                    _percent(found["file"]["overhead_percent"]),
                    _percent(found["file"]["excess_percent"]),
                    "yes" if found["file"]["same"] else "NO",
                )
            )
    return lines


def controls_table(rows: Rows) -> list[str]:
    """Is the attack a real one? White box against random signs and another row's attack."""
    lines = _head(
        "", "images", "ε", "natural", "attacked − natural", "random − natural", "ratio", "through",
        "transferred − natural", "PNG natural / attacked / random", "JPEG XL",
    )  # fmt: skip
    for name, row in _with(rows, "controls"):
        own = row["controls"]
        cells = [
            f"{own[what]:+.3f} ± {own[what + '_stderr']:.3f}"
            for what in ("increase", "random_increase", "transferred_increase")
        ]
        sizes = [
            " / ".join(f"{codec[kind]:.2f}" for kind in ("natural", "attacked", "random"))
            for codec in own["sizes"].values()
        ]
        lines.append(
            _line(
                name,
                str(own["images"]),
                str(own["epsilon"]),
                f"{own['natural']:.3f} ± {own['natural_stderr']:.3f}",
                *cells[:2],
                f"{own['increase'] / own['random_increase']:.2f}",
                own["transfer"],
                cells[2],
                *sizes,
            )
        )
    return lines


def differences(rows: Rows) -> plt.Figure:
    """Bits of every row against those of one resolution."""
    shown = [name for name, _ in _with(rows, "bits") if name != _reference(name)]
    shown = [name for name in shown if _reference(name) in rows]

    def point(name: str) -> tuple[float, float]:
        return _mean(_bits(rows, name) - _bits(rows, _reference(name)))

    figure, axis = _by_row(shown, "bits/dim less those of one resolution; adversarial: of itself")
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
        label = name.removeprefix(f"{kind}-")
        if label in SHUFFLED:
            continue
        if name == "coupling-split":
            label = "split, any shuffle"
        place = (4, -10 if label == "wavelet-3" else 3)  # not over its neighbour's
        axis.annotate(label, (x, mean), place, fontsize=7, textcoords="offset points")
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
    """Areas by row and kind of images, by bits and by bits beside a file's."""
    shown, kinds = [name for name, _ in _with(rows, "ood")], _kinds(rows)
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 1.6 + 0.3 * len(shown)), sharey=True, layout="constrained"
    )
    titles = {"likelihood": "by −bits/dim", "complexity": "by bits of a file − the model's"}
    for axis, (score, title) in zip(axes, titles.items(), strict=True):
        areas = np.array(
            [[rows[name]["ood"]["kinds"][kind]["auroc"][score] for kind in kinds] for name in shown]
        )
        drawn = axis.imshow(areas, cmap="PuOr", vmin=0, vmax=1, aspect="auto")
        for (i, k), area in np.ndenumerate(areas):
            colour = "white" if abs(area - 0.5) > 0.3 else "black"
            axis.text(k, i, f"{area:.2f}", ha="center", va="center", fontsize=7, color=colour)
        axis.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right", fontsize=8)
        axis.set_yticks(range(len(shown)), shown, fontsize=8)
        axis.set_title(f"AUROC {title}", fontsize=9)
    figure.colorbar(drawn, ax=axes, label="0.5: cannot tell; 0: the others look likelier")
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


def strength(rows: Rows) -> plt.Figure:
    """What the attack adds, by its steps."""
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for k, (name, row) in enumerate(_with(rows, "controls")):
        own = row["controls"]
        steps = [point["steps"] for point in own["curve"]]
        more = [point["attacked"] - own["natural"] for point in own["curve"]]
        axis.plot(steps, more, marker="osD^v"[k % 5], color=COLOURS[k], label=name)
        axis.axhline(own["random_increase"], color=COLOURS[k], linestyle=":", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set(xlabel="steps of the attack, ε = 4 (dotted: random signs)",
             ylabel="bits/dim more than the natural images")  # fmt: skip
    axis.grid(linewidth=0.3)
    if _with(rows, "controls"):
        axis.legend(fontsize=7)
        axis.set_xticks(steps := (1, 4, 16, 64, 256), steps)
        axis.set_yticks(bits := (2, 5, 10, 20, 50), bits)
        axis.yaxis.set_minor_formatter(NullFormatter())
    return figure


def _by_row(names: Sequence[str], label: str) -> tuple[plt.Figure, plt.Axes]:
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.32 * len(names)), layout="constrained")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(max(len(names), 1) - 0.5, -0.5)
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
