"""The program `mrcnf`: its commands, its arguments, one line for a mistake, its exit status."""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import tyro

from mrcnf import __version__
from mrcnf.cli.coding import compress, decompress
from mrcnf.cli.data import new, pack
from mrcnf.cli.looking import check, compare, entropy, info, report
from mrcnf.cli.training import assemble, calibrate, demo, extend, train
from mrcnf.cli.trying import attack, ood
from mrcnf.cli.using import evaluate, sample, upscale
from mrcnf.errors import TrainingError, UserError, out_of_memory
from mrcnf.flows.solve import SolverError
from mrcnf.plugins import CodeChanged

COMMANDS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        demo, new, pack, train, extend, assemble, calibrate, evaluate, sample, upscale, compress,
        decompress, info, report, compare, entropy, attack, ood, check,
    )
}  # fmt: skip
"""By name, in the order of `mrcnf --help`. Each reads its arguments, calls the library, and
prints what came back."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: exit status 0, 2 for the user's mistakes, 1 for anything else."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with _notes():
            parse(arguments)()
    except UserError as error:
        _fail(str(error), 2)
    except (SolverError, TrainingError) as error:
        _fail(str(error), 1)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        advice = "halve the batch (train.batch, --batch, --n), or double train.micro_batches"
        _fail(f"out of memory: {advice} ({str(error).splitlines()[0]})", 1)
    except KeyboardInterrupt:
        _fail("interrupted", 1)
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", 2)


def parse(arguments: list[str]) -> Callable[[], None]:
    """The call that the arguments ask for; what tyro says of mistakes becomes one line."""
    if arguments == ["--version"]:
        return functools.partial(print, "mrcnf", __version__)
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        close = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(COMMANDS)}"
        raise UserError(f"there is no command {arguments[0]!r}; {hint}")
    arguments, said = gather_overrides(arguments), io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return _parser().cli(
                prog="mrcnf",
                description="Multi-resolution continuous normalizing flows "
                f"(mrcnf {__version__}; --version says this alone).",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = [line.strip(" │╭╮╰╯─") for line in said.getvalue().splitlines()]
        words = " ".join(line for line in lines[1:] if line.strip("-"))
        what = re.split(" (?:For full|Argument) helptext", words)[0]
        raise UserError(f"{what.rstrip('.')}; see mrcnf --help") from None


def gather_overrides(arguments: list[str]) -> list[str]:
    """Move `section.key=value`, `--section.key=value` and `--section.key value` behind one flag.

    Section names contain no slash and no capital, so paths such as ./a.png are left alone.
    """
    rest, overrides = [], []
    pending = iter(arguments)
    for argument in pending:
        if re.fullmatch(r"(--)?[a-z_]+(\.[a-z0-9_-]+)+=.*", argument, flags=re.DOTALL):
            overrides.append(argument.removeprefix("--"))
        elif re.fullmatch(r"--[a-z_]+(\.[a-z0-9_-]+)+", argument):
            value = next(pending, None)
            if value is None:
                raise UserError(f"{argument} needs a value")
            overrides.append(f"{argument.removeprefix('--')}={value}")
        else:
            rest.append(argument)
    return [*rest, "--overrides", *overrides] if overrides else rest


def _parser() -> tyro.extras.SubcommandApp:
    app = tyro.extras.SubcommandApp()
    for function in COMMANDS.values():
        app.command(_deferred(function))
    return app


def _deferred(function: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """Parsing a command's arguments returns the call, to be made outside of tyro."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Callable[[], None]:
        return functools.partial(function, *arguments, **options)

    return call


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """Within: a warning that code has changed is a line as other notes are."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, CodeChanged):
                print(f"mrcnf: note: {message}", file=sys.stderr)
            else:
                usual(message, category, *where, **more)

        warnings.showwarning = show
        warnings.simplefilter("always", CodeChanged)
        yield


def _fail(message: str, status: int) -> NoReturn:
    print(f"mrcnf: {message}", file=sys.stderr)
    raise SystemExit(status)
