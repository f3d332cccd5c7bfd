"""What a level is trained on: maximum likelihood, flow matching, or a user's own objective.

All take a level and dequantised images at the finest resolution and return a loss to
minimise, in a form that needs one backward pass. Each may be trained on images that are
attacked first (Madry et al. 2018, eq. 2.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mrcnf import plugins, seeds
from mrcnf.errors import UserError
from mrcnf.flows import paths
from mrcnf.flows.solve import Solver, SolverError
from mrcnf.flows.trace import Trace
from mrcnf.image.bits import bits_per_dim
from mrcnf.image.noise import dequantise
from mrcnf.image.straight import roundings_pass
from mrcnf.measure.ascent import STRIDE, ascend
from mrcnf.model.level import Level
from mrcnf.model.settings import ModelConfig
from mrcnf.runs.config import Config
from mrcnf.runs.settings import LOGIT_MEAN, LOGIT_STD, TrainConfig
from mrcnf.training.times import SHORTEST_TIME, draw_times

NOISE_SHARE = 8
"""One in so many images of a batch trains learned noise."""


def likelihood(
    level: Level,
    x: Tensor,
    log_q: Tensor,
    *,
    solver: Solver,
    trace: Trace,
    kinetic: float = 0.01,
    frobenius: float = 0.01,
    steer: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The level's bits per (own) dimension, plus the regularisers of RNODE.

    Args:
        x, log_q: dequantised images (N, C, H, W) and their log q (N,), from `dequantise`.
        kinetic, frobenius: weights of ∫ mean f² dt and ∫ ‖∂f/∂y‖²_F / D dt
            (Finlay et al. 2020, eq. 11), of flows that are solved.
        steer: half-width of the uniform jitter of the end time (Ghosh et al. 2020); one draw
            per call.

    Returns:
        the loss, a scalar, and its detached parts: `bpd` and, of flows that have them, `kinetic`,
        `frobenius` and `penalty` (`FlowResult.penalty`).
    """
    end = 1.0
    if steer:
        jitter = torch.rand((), generator=generator, device=x.device).item()
        end = 1.0 + steer * (2 * jitter - 1)
    regularise = bool(kinetic or frobenius)
    result = level.log_prob(
        x, solver=solver, trace=trace, end=end, regularise=regularise, generator=generator
    )
    bpd = bits_per_dim(level.bound(result, x, log_q), result.dims).mean()
    parts, loss = {"bpd": bpd}, bpd
    if result.kinetic is not None and result.frobenius is not None:
        parts |= {"kinetic": result.kinetic.mean(), "frobenius": result.frobenius.mean()}
        loss = loss + kinetic * parts["kinetic"] + frobenius * parts["frobenius"]
    if result.penalty is not None:
        parts["penalty"] = result.penalty.mean()
        loss = loss + parts["penalty"]
    return loss, {name: part.detach() for name, part in parts.items()}


def flow_matching(
    level: Level,
    x: Tensor,
    *,
    clean: Tensor | None = None,
    times: str = "logit-normal",
    centre: float = LOGIT_MEAN,
    spread: float = LOGIT_STD,
    shape_noise: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error of the velocity along paths from data to noise.

    y_t = α(t)·y + β(t)·z on the path of the level's field (`paths`), and f(t, y_t) regresses
    on dy_t/dt: z - y on straight paths (Lipman et al. 2023, eq. 23, with the data at t = 0).
    Its minimiser transports the data's distribution to the normal.

    Args:
        x: dequantised images (N, C, H, W).
        clean: images at the centres of their cells. With Gaussian dequantisation they supply y,
            as x is y with noise, the paths' points at t = 0; x supplies the coarse image.
        times: distribution of t: "logit-normal", log t/(1-t) being normal (Esser et al. 2024,
            §3.1), which leaves out the times at which nothing, or nothing more, can be told of
            the noise; "uniform"; "log-uniform", down to 1e-3; "mixed", half of each of these two;
            or "likelihood", log-uniform with errors weighted as the evidence lower bound does
            (`Path.likelihood_weight`). Where the data come with noise, it is
            log-uniform together with t, in its geometric mean over channels.
        centre, spread: mean and standard deviation of that normal.
        shape_noise: draw times, and cut gradients, for learned noise as is said below.

    Variational dequantisation is trained along: its noise on the evidence lower bound, in nats per
    dimension over log 1000, at likelihood times whatever `times` are. An eighth of the batch
    has such times then, the first one, and from the others the noise learns nothing; the
    field learns from all of them alike, and nothing of it changes with the noise's weights.

    Returns:
        the loss, a scalar, and no further parts; with variational dequantisation, what the noise
        adds to the loss beside errors of the velocity comes from `log_det`, nats per dimension.
    """
    if level.noisy:
        assert clean is not None, "Gaussian dequantisation is matched on clean images"
    y, condition, log_det = level.prepare(x, clean if level.noisy else None)
    n, noise = len(y), level.noise.log().mean().exp()
    t = draw_times(n, times, noise, y, generator, centre=centre, spread=spread)
    shaping = 0
    if shape_noise and level.learned_noise is not None and times != "likelihood":
        shaping = -(-n // NOISE_SHARE)
        t = torch.cat((draw_times(shaping, "log-uniform", noise, y, generator), t[shaping:]))
    z = torch.randn(y.shape, generator=generator, device=y.device, dtype=y.dtype)
    path = paths.at(level.field.path, t[:, None, None, None], level.noise)
    weights = path.likelihood_weight * (noise + (1 - noise) * t)[:, None, None, None]
    if shaping and y.requires_grad:
        shares = torch.zeros_like(weights)
        shares[:shaping] = weights[:shaping] * (n / shaping)
        y.register_hook(lambda gradient: gradient * shares)
    predicted = level.flow.velocity(t, path.point(y, z), condition)
    errors = (predicted - path.velocity(y, z)).square()
    if times == "likelihood":
        errors = errors * weights
    loss = errors.mean()
    if level.learned_noise is None:
        return loss, {}
    # Over the density of t, 1/(t·log 1000), the weighted errors are log 1000 times the loss.
    log_det = log_det.mean() / y[0].numel()
    return loss + log_det / math.log(SHORTEST_TIME), {"log_det": log_det.detach()}


class Objective(nn.Module):
    """From a piece of a batch to its loss; a module, so that DistributedDataParallel wraps it.

    Raises:
        UserError: there is no such objective of the user's own.
    """

    def __init__(self, level: Level, config: Config) -> None:
        super().__init__()
        self.level, self.config = level, config
        self.name = f"train.objective {config.train.objective!r}"
        self.own: Callable[..., Any] | None = None
        if plugins.is_own(config.train.objective):
            self.own = plugins.find(config.train.objective, "train.objective")

    def try_out(self, images: Tensor) -> None:
        """Refuse an objective of the user's own whose answer on a few images does not fit.

        Raises:
            UserError: it cannot be called as it will be, fails, or answers no loss.
        """
        if self.own is None:
            return
        model, generator = self.level.model, seeds.generator(0, images.device)
        x, log_q = dequantise(
            images, nbits=model.nbits, kind=model.pixel_noise, generator=generator
        )
        options = {"generator": generator, **self.config.train.options}
        plugins.check_call(self.own, self.name, self.level, x, log_q, **options)
        training = self.level.training
        self.level.eval()
        try:
            self._own_loss(self.own, x, log_q, generator)
        except (UserError, SolverError):
            raise
        except Exception as error:
            raise UserError(
                f"{self.name}, tried on {len(images)} images, failed: {plugins.place_of(error)}"
            ) from error
        finally:
            self.level.train(training)

    def forward(
        self, images: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        train, model = self.config.train, self.level.model
        images, x, log_q = seen(images, train, model, generator)
        if train.attack_share:
            images = self._attacked(images, generator)
            x, log_q = dequantise(
                images, nbits=model.nbits, kind=model.pixel_noise, generator=generator
            )
        return self._loss(images, x, log_q, generator)

    def _loss(
        self,
        images: Tensor,
        x: Tensor,
        log_q: Tensor,
        generator: torch.Generator,
        moved: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of images and these dequantised.

        Args:
            moved: zeros, shaped as x, that an attack takes gradients by: added to all pixels.
        """
        train, model = self.config.train, self.level.model
        low_precision = torch.autocast(
            x.device.type, torch.bfloat16, enabled=train.precision == "bfloat16"
        )
        with low_precision:
            if self.own is not None:
                seen = x if moved is None else x + moved
                return self._own_loss(self.own, seen, log_q, generator)
            if train.objective == "flow-matching":
                clean = None
                if self.level.noisy:
                    clean = ((images >> (8 - model.nbits)) + 0.5) / 2**model.nbits
                    clean = clean if moved is None else clean + moved
                return flow_matching(
                    self.level,
                    x if moved is None else x + moved,
                    clean=clean,
                    times=train.times,
                    centre=train.times_centre,
                    spread=train.times_spread,
                    shape_noise=moved is None,
                    generator=generator,
                )
            return likelihood(
                self.level,
                x if moved is None else x + moved,
                log_q,
                solver=self.config.train_solver,
                trace=self.config.train_trace,
                kinetic=train.kinetic,
                frobenius=train.frobenius,
                steer=train.steer,
                generator=generator,
            )

    def _own_loss(
        self, own: Callable[..., Any], x: Tensor, log_q: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        answer = own(self.level, x, log_q, generator=generator, **self.config.train.options)
        loss, parts = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, {})
        if not isinstance(loss, Tensor) or loss.shape or not loss.requires_grad:
            found = (
                f"a {type(loss).__name__}"
                if not isinstance(loss, Tensor)
                else f"a tensor of shape {tuple(loss.shape)}"
                if loss.shape
                else "a loss without gradient"
            )
            raise UserError(
                f"{self.name} must answer a scalar loss to minimise, or that and a dict of scalars "
                f"to log; it answers {found}"
            )
        if not isinstance(parts, dict) or any(torch.as_tensor(v).shape for v in parts.values()):
            raise UserError(f"{self.name} must answer beside its loss a dict of scalars to log")
        return loss, {name: torch.as_tensor(part).detach() for name, part in parts.items()}

    def _attacked(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The images, the last ones of them attacked: see `ascent.ascend`."""
        train, model = self.config.train, self.level.model
        chosen = images[len(images) - train.attacked :]

        def slope(pixels: Tensor) -> Tensor:
            x, log_q = dequantise(
                pixels, nbits=model.nbits, kind=model.pixel_noise, generator=generator
            )
            moved = torch.zeros_like(x, requires_grad=True)
            with torch.enable_grad(), roundings_pass():
                loss, _ = self._loss(pixels, x, log_q, generator, moved)
            return torch.autograd.grad(loss, moved)[0]

        attacked = ascend(
            chosen,
            slope,
            epsilon=train.attack_epsilon,
            steps=train.attack_steps,
            step_size=STRIDE * train.attack_epsilon,
            generator=generator,
            scatter=True,
        )
        return torch.cat((images[: len(images) - train.attacked], attacked))


def seen(
    images: Tensor, train: TrainConfig, model: ModelConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Images as training sees them: augmented, and these dequantised, x and log q (N,)."""
    images = augment(images, train.flip, train.crop, generator)
    x, log_q = dequantise(images, nbits=model.nbits, kind=model.pixel_noise, generator=generator)
    return images, x, log_q


def augment(images: Tensor, flip: bool, crop: int, generator: torch.Generator) -> Tensor:
    """Mirror each image with probability 1/2, and cut one random window for the whole batch."""
    if flip:
        mirrored = torch.rand(len(images), generator=generator, device=images.device) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    side = images.shape[-1]
    if crop and crop < side:
        host = seeds.generator(generator.initial_seed())
        top, left = torch.randint(0, side - crop + 1, (2,), generator=host).tolist()
        images = images[..., top : top + crop, left : left + crop]
    return images
