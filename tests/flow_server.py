"""Fixtures of the tests of the flow: one real Prefect server for all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, PREFECT_HOME, temporary_settings

from flows import server
from flows.leash import leashed


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server of our own, where the code under test finds it."""
    home = tmp_path_factory.mktemp("prefect")
    port = server.free_port()
    url, env = server.api_url(port), {**server.prefect_environment(port), "PREFECT_HOME": str(home)}
    with leashed(server.prefect_command(port), home / "server.log", env) as child:
        server.wait_until(lambda: server.is_healthy(url), child, "Prefect", home / "server.log")
        settings = {PREFECT_API_URL: url, PREFECT_HOME: home, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
        with temporary_settings(settings):
            yield url
            server.deliver()


@pytest.fixture
def client(api: str) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client
