"""A Dask cluster that somebody else runs: reached, or refused in one line. For sweeps and for a class's submissions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distributed import Client


@contextmanager
def connected(address: str, wait: float) -> Iterator[Client]:
    """A client of the scheduler at `address`, which has a worker at least.

    wait: seconds for an answer of the scheduler, and again for a first worker. Raises OSError where there is none, ImportError
    without Dask.
    """
    from distributed import Client

    try:
        client = Client(address, timeout=wait)
    except (OSError, ValueError) as error:
        raise OSError(f"no Dask scheduler answers at {address!r}: {error}") from error
    with client:
        wait_for_worker(client, address, wait)
        yield client


def wait_for_worker(client: Client, address: str, wait: float) -> None:
    """Raises OSError where the cluster of `client` has no worker after so many seconds."""
    try:
        client.wait_for_workers(1, timeout=wait)
    except TimeoutError:
        raise OSError(f"no worker is with the scheduler at {address}: dask worker {address} --nthreads 1") from None
