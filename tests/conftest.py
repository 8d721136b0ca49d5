"""What every test gets: no network, fixed seeds, and the default model on request."""

from __future__ import annotations

import gc
import ipaddress
import os
import socket
from collections.abc import Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it fails at once instead of retrying
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["PIP_NO_INDEX"] = "1"  # of the processes that tests start, which the guard below does not reach
os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels run on CPU tensors
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that waits leaves its core to another worker
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start: each worker has one core

if gc.isenabled():
    gc.disable()  # nothing that is imported becomes garbage; pytest_collection_finish enables it

import hypothesis
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agentmem import models
from agentmem.hf import self_check
from agentmem.reference_queries import patterns
from support import forked, matrices
from support.waiting import LIMIT

hypothesis.settings.register_profile(  # the same examples in every run, however slow the machine is
    "any machine", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")

_THREADS = 4  # tiny tensors get slower, not faster, on the many cores of a large machine


class NetworkBlocked(RuntimeError):
    """A test tried to reach beyond this machine. Not an OSError, so that nobody takes it for a bad connection."""


def _is_local(address: object) -> bool:
    """Whether a socket address is on this machine: a path, ``localhost`` or a loopback address."""
    if not isinstance(address, tuple):
        return True
    host = str(address[0])
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in {"localhost", ""}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Whether matrices of parameters are run whole; see support/matrices.py."""
    parser.addoption(matrices.EXHAUSTIVE, action="store_true", help="all combinations of parameters")


def pytest_configure(config: pytest.Config) -> None:
    """Before any test is collected."""
    matrices.whole = config.getoption(matrices.EXHAUSTIVE)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Fork the process off that runs Python commands for tests, while nothing else has run; not where none will run."""
    if session.config.pluginmanager.hasplugin("dsession"):
        gc.enable()
    else:
        forked.start()


def pytest_collection_finish() -> None:
    """Spare the garbage collector the million objects that were imported, in tests that call it and at the end."""
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    """End it."""
    forked.stop()


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Refuse every connection and every name look-up that leaves this machine."""
    patch = pytest.MonkeyPatch()
    resolve = socket.getaddrinfo

    def guarded(name: str) -> Any:
        original = getattr(socket.socket, name)

        def connect(self: socket.socket, address: Any) -> Any:
            if not _is_local(address):
                raise NetworkBlocked(f"a test connects to {address!r}; tests run without a network")
            return original(self, address)

        return connect

    def look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host is not None and not _is_local((host,)):
            raise NetworkBlocked(f"a test looks up {host!r}; tests run without a network")
        return resolve(host, *args, **kwargs)

    patch.setattr(socket.socket, "connect", guarded("connect"))
    patch.setattr(socket.socket, "connect_ex", guarded("connect_ex"))
    patch.setattr(socket, "getaddrinfo", look_up)
    yield
    patch.undo()


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    """Few threads: one per worker under pytest-xdist, else at most four."""
    worker = "PYTEST_XDIST_WORKER" in os.environ
    torch.set_num_threads(1 if worker else min(_THREADS, torch.get_num_threads()))


@pytest.fixture(autouse=True, scope="session")
def _no_hurry() -> Iterator[None]:
    """No machine is so busy that a check of a model, or a search for a pattern, is refused for the time it takes."""
    patch = pytest.MonkeyPatch()
    patch.setattr(self_check, "SECONDS", LIMIT)
    patch.setattr(patterns, "SECONDS", LIMIT)
    yield
    patch.undo()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A memory is planned by torch's threads: the caps of these tests are for one, on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every test starts from the same random state of torch, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def default_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The default model in float32, in eval mode, and its tokenizer. Shared: leave it as you found it."""
    if not models.is_fetched():
        pytest.fail(
            f"the default model is not in {models.default_folder()}: run `make test`, or `agentmem model fetch` once",
            pytrace=False,
        )
    return models.load()
