"""The slot that computing tasks take turns on: the global concurrency limit `gpu`, one slot unless someone raises it.

Held through a lease that is renewed. A lease that is lost (the server was away for longer than it lasts) is logged and
taken again; Prefect's own `concurrency` either ends the work or goes on without. The lease is noted with the flow run,
so that the slot of a run that was killed is freed by the next one instead of by the clock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.runtime import flow_run
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows.background import meanwhile

SLOT = "gpu"
LEASE = "proximal.gpu_lease"
"""Label of the flow run that names the lease it holds; empty where it holds none."""
LEASE_SECONDS = 90.0
RENEW_SECONDS = 30.0
POLL_SECONDS = 3.0

log = logging.getLogger(__name__)


def ensure_limit() -> None:
    """Create the limit where it is missing. A number of slots that someone has set is kept."""
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(SLOT)
        except ObjectNotFound:
            try:
                client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=SLOT, limit=1))
            except ObjectAlreadyExists:
                log.debug("another run created the limit %s at the same time", SLOT)


@contextmanager
def gpu_slot() -> Iterator[None]:
    """Wait for a slot, hold it through the block."""
    with get_client(sync_client=True) as client:
        slot = _Slot(client)
        slot.take()
        try:
            with meanwhile("gpu slot", slot.keep):
                yield
        finally:
            slot.give_back()


class _Slot:
    """One slot of the limit, by the lease that stands for it."""

    def __init__(self, client: SyncPrefectClient) -> None:
        self.client = client
        self.lease: UUID | None = None

    def take(self) -> None:
        """Wait until there is a slot. Where the server has gone in mid-run, the work goes on without."""
        waiting = False
        try:
            while not self.try_take():
                if not waiting:
                    log.info("waiting for a %s slot; another run holds it", SLOT)
                    waiting = True
                time.sleep(POLL_SECONDS)
        except httpx.TransportError as error:
            log.warning("cannot ask for a %s slot (%s): the work goes on, and the slot is asked for again", SLOT, error)

    def try_take(self) -> bool:
        """Take a slot if one is free."""
        try:
            taken = self.client.increment_concurrency_slots_with_lease(
                [SLOT], slots=1, mode="concurrency", lease_duration=LEASE_SECONDS
            )
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.LOCKED:
                raise
            return False
        self.lease = UUID(taken.json()["lease_id"])
        self._note(str(self.lease))
        return True

    def keep(self, ended: threading.Event) -> None:
        """Renew the lease again and again until `ended`."""
        # What fails is tried again soon enough: the client's own patience would only hold up the end of the work.
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
            while not ended.wait(RENEW_SECONDS):
                self.renew()

    def renew(self) -> None:
        """Make the lease last, or take another in its place. Where neither works, say so and try again later."""
        try:
            if self.lease is None:
                self.try_take()
            else:
                self.client.renew_concurrency_lease(self.lease, LEASE_SECONDS)
        except httpx.HTTPError as error:
            try:
                taken = self.try_take()
            except httpx.HTTPError:
                taken = False
            outcome = "taken again" if taken else "the work goes on, and the slot is asked for again"
            log.warning("the lease of the %s slot was not renewed (%s): %s", SLOT, error, outcome)

    def give_back(self) -> None:
        if self.lease is None:
            return
        try:
            self.client.release_concurrency_slots_with_lease(self.lease)
            self._note("")
        except httpx.HTTPError as error:
            log.warning("the %s slot was not given back (%s); it is free in %.0f s", SLOT, error, LEASE_SECONDS)

    def _note(self, lease: str) -> None:
        self.client.update_flow_run_labels(UUID(flow_run.id), {LEASE: lease})
