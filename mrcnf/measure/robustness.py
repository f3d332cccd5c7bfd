"""What attacks do to the bits of images, beside what random signs do: a table."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from mrcnf.errors import UserError
from mrcnf.image.noise import check_images
from mrcnf.measure.attack import AttackResult, attack, check, random_signs
from mrcnf.measure.classical import available, bits_of_files
from mrcnf.measure.evaluate import bits_by_level, mean_and_error
from mrcnf.model.level import Level, check_size

CODECS = ("PNG", "JPEG XL, effort 7")
"""What attacked images are compressed with too, where it is installed."""


@dataclass
class Row:
    """One ε. Bits are per dimension, means over images, all on the same noise and probes."""

    epsilon: int
    natural: float
    natural_stderr: float
    attacked: float
    attacked_stderr: float
    random: float
    """With random signs of this ε."""
    random_stderr: float
    increase: float
    """Attacked over natural; its error is that of the differences."""
    increase_stderr: float
    random_increase: float
    random_increase_stderr: float
    transferred: float | None
    """Attacked through another model."""
    transferred_stderr: float | None
    transferred_increase: float | None
    transferred_increase_stderr: float | None
    levels: list[dict[str, float]]
    """By level: its resolution, and its shares of the above."""
    sizes: dict[str, dict[str, float]]
    """By codec: bits per dimension of files of the same images, one by one."""
    trajectory: list[float]
    """Bits per dimension that the attack met, step by step."""
    curve: list[dict[str, float]]
    """The same attack with fewer steps, if that was asked for: steps, attacked, attacked_stderr."""
    steps: int
    step_size: float
    restarts: int
    images: int
    seconds: float
    """That finding the attacked images took."""


@dataclass
class Robustness:
    """Rows for every ε, and what they are of."""

    data: str
    minimise: bool
    solver: str
    trace: str
    rows: list[Row]
    left_out: str
    """Codecs that are not installed, and why, or ""."""
    pixels: dict[int, Tensor] = field(default_factory=dict, repr=False)
    """The attacked images by ε, uint8 (N, C, H, W)."""

    def to_dict(self) -> dict[str, Any]:
        table = {key: value for key, value in vars(self).items() if key not in ("rows", "pixels")}
        return table | {"rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        images, what = self.rows[0].images, "minimising" if self.minimise else "maximising"
        lines = [
            f"{images} images of {self.data}, {what} attack in {self.rows[0].steps} steps, "
            f"restarts: {self.rows[0].restarts}; bits/dim",
            f"{'ε':>3} {'natural':>16} {'attacked':>16} {'random signs':>16} {'transferred':>16}"
            f" {'increase':>9} {'random':>7} {'ratio':>6}",
        ]
        for row in self.rows:
            pairs = (
                (row.natural, row.natural_stderr),
                (row.attacked, row.attacked_stderr),
                (row.random, row.random_stderr),
                (row.transferred, row.transferred_stderr),
            )
            cells = " ".join(
                f"{'':>16}" if mean is None else f"{mean:8.3f} ± {error:5.3f}"
                for mean, error in pairs
            )
            ratio = row.increase / row.random_increase if row.random_increase else float("nan")
            lines.append(
                f"{row.epsilon:3d} {cells} {row.increase:+9.3f} {row.random_increase:+7.3f} "
                f"{ratio:6.2f}"
            )
        lines += [f"  ε = {row.epsilon}, increase by level: {_by_level(row)}" for row in self.rows]
        for row in self.rows:
            for codec, sizes in row.sizes.items():
                found = ", ".join(f"{name} {bits:.3f}" for name, bits in sizes.items())
                lines.append(f"  ε = {row.epsilon}, {codec}: {found}")
        total = sum(row.seconds for row in self.rows)
        lines.append(f"  {total:.1f} s, {total / images / len(self.rows):.2f} s an image and ε")
        return "\n".join(lines + ([f"  {self.left_out}"] if self.left_out else []))


def robustness(
    levels: Iterable[Level],
    images: Tensor,
    epsilons: Sequence[int] = (1, 2, 4, 8),
    *,
    data: str = "images",
    transfer: Iterable[Level] | None = None,
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    draws: int = 1,
    minimise: bool = False,
    budgets: Sequence[int] = (),
    batch: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> Robustness:
    """Bits of natural, attacked and randomly altered images, for every ε.

    The noise and probes that they are measured on are the same for all, and other ones than the
    attack knew.

    Args:
        levels, images: as for `attack`, whose other arguments are here too.
        epsilons: of the balls.
        data: what to call the images.
        transfer: levels of another model, to attack through that one too.
        budgets: attack with these numbers of steps too.

    Raises:
        UserError: as `attack`; or fewer than 2 images, or a model that cannot be attacked through.
    """
    levels, other = list(levels), None if transfer is None else list(transfer)
    check(epsilons, steps, step_size, restarts, draws, batch)
    for part in (levels, other or levels):
        check_images(images, part[0].model.channels)
        check_size(part, images.shape[2:])
    if len(images) < 2:
        raise UserError(f"{data}: {len(images)} image(s) to attack; at least 2 are needed")
    names, left_out = available()
    codecs = [name for name in CODECS if name in names]

    def bits(pixels: Tensor) -> Tensor:
        return bits_by_level(
            levels, pixels, batch=batch, draws=draws, seed=seed, progress=progress
        )

    def attacked_by(model: list[Level], epsilon: int, steps: int) -> AttackResult:
        return attack(
            model, images, epsilon=epsilon, steps=steps, step_size=step_size, restarts=restarts,
            draws=draws, minimise=minimise, batch=batch, seed=seed, progress=progress,
        )  # fmt: skip

    rows, pixels, natural = [], {}, bits(images)
    for epsilon in epsilons:
        started = time.perf_counter()
        found = attacked_by(levels, epsilon, steps)
        seconds = time.perf_counter() - started
        kinds = {
            "natural": images,
            "attacked": found.pixels,
            "random": random_signs(images, epsilon, seed),
        }
        if other is not None:
            kinds["transferred"] = attacked_by(other, epsilon, steps).pixels
        shares = {
            name: natural if name == "natural" else bits(changed)
            for name, changed in kinds.items()
        }
        curve = []
        for budget in budgets:
            again = found.pixels if budget == steps else attacked_by(levels, epsilon, budget).pixels
            mean, error = mean_and_error(bits(again).sum(0), None)
            curve.append({"steps": budget, "attacked": mean, "attacked_stderr": error})
        pixels[epsilon] = found.pixels
        rows.append(
            Row(
                epsilon=epsilon,
                **_summary(shares),
                levels=[_level(level, i, shares) for i, level in enumerate(levels)],
                sizes={codec: _sizes(kinds, codec) for codec in codecs},
                trajectory=found.trajectory,
                curve=curve,
                steps=steps,
                step_size=found.step_size,
                restarts=restarts,
                images=len(images),
                seconds=seconds,
            )
        )
    solved = [level for level in levels if level.flow.solved]
    return Robustness(
        data,
        minimise,
        " | ".join(dict.fromkeys(str(level.solver) for level in solved)) or "no solver: one pass",
        " | ".join(dict.fromkeys(str(level.trace) for level in solved)) or "exact",
        rows,
        left_out,
        pixels,
    )


def _summary(shares: dict[str, Tensor]) -> dict[str, Any]:
    """The means and errors of a row, from bits (levels, N) by kind."""
    found: dict[str, Any] = {}
    base = shares["natural"].sum(0)
    for kind, increase in (
        ("natural", ""), ("attacked", "increase"), ("random", "random_increase"),
        ("transferred", "transferred_increase"),
    ):  # fmt: skip
        bits = shares[kind].sum(0) if kind in shares else None
        pair = (None, None) if bits is None else mean_and_error(bits, None)
        found[kind], found[f"{kind}_stderr"] = pair
        if increase:
            pair = (None, None) if bits is None else mean_and_error(bits - base, None)
            found[increase], found[f"{increase}_stderr"] = pair
    return found


def _sizes(kinds: dict[str, Tensor], codec: str) -> dict[str, float]:
    return {kind: float(bits_of_files(pixels, codec).mean()) for kind, pixels in kinds.items()}


def _level(level: Level, i: int, shares: dict[str, Tensor]) -> dict[str, float]:
    table: dict[str, float] = {"resolution": level.resolution}
    for kind, bits in shares.items():
        table[kind] = float(bits[i].mean())
    table["increase"], table["increase_stderr"] = mean_and_error(
        shares["attacked"][i] - shares["natural"][i], None
    )
    table["random_increase"] = table["random"] - table["natural"]
    return table


def _by_level(row: Row) -> str:
    return ", ".join(
        f"{level['resolution']} {level['increase']:+.3f} (random {level['random_increase']:+.3f})"
        for level in row.levels
    )
