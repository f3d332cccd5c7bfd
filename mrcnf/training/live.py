"""How far training is, on stderr: a bar in a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_EVERY = 30.0
"""Seconds between plain lines, at least."""


class Live:
    """What the user sees while levels train; a context, at whose end the bar stays as it is.

    Args:
        name: of what is trained.
        shown: whether anything is to be seen.
        progress: how much is done already, from 0 to 1.
    """

    def __init__(self, name: str, shown: bool, progress: float) -> None:
        terminal = sys.stderr.isatty()
        self.name, self.lines = name, shown and not terminal
        self.began, self.before = time.monotonic(), progress
        self.spoke = self.began
        self.bar = tqdm(
            total=1.0,
            initial=progress,
            desc=name,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            disable=not shown or not terminal,
            mininterval=0.5,
            dynamic_ncols=True,
        )

    def show(self, progress: float, said: str, news: bool) -> None:
        """Tell how far it is.

        Args:
            progress: from 0 to 1.
            said: what there is to say.
            news: whether that has changed: a plain line is written then alone.
        """
        done = min(progress, 1.0)
        self.bar.set_postfix_str(said, refresh=False)
        self.bar.update(done - self.bar.n)
        now = time.monotonic()
        if self.lines and (done == 1 or (news and now - self.spoke >= LINE_EVERY)):
            self.spoke = now
            left = self._time(now, done)
            print(f"{self.name}: {int(100 * done)}%, {said}, {left}", file=sys.stderr)

    def _time(self, now: float, done: float) -> str:
        taken = now - self.began
        if done == 1:
            return f"took {tqdm.format_interval(taken)}"
        left = taken * (1 - done) / max(done - self.before, 1e-9)
        return f"{tqdm.format_interval(left)} left"

    def __enter__(self) -> Live:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()
