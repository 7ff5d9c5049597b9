"""The bar of a command that measures rows, some of which learn first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

OnRow = Callable[[int, int], None]
OnStep = Callable[[int, float], None]


@contextmanager
def rows(unit: str) -> Iterator[tuple[OnRow, OnStep]]:
    """A bar over rows. Gives what to call with (done, total) of rows, and with (step, loss) while one learns."""
    from tqdm import tqdm

    with tqdm(unit=unit) as bar:

        def on_row(done: int, total: int) -> None:
            bar.total = total
            bar.set_postfix_str("", refresh=False)
            bar.update(done - bar.n)

        def on_step(step: int, loss: float) -> None:
            bar.set_postfix_str(f"training, step {step + 1}, loss {loss:.3f}")

        yield on_row, on_step
