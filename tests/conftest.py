"""What every test runs under: one thread, fixed seeds, no network, and NaN in memory that nobody has written."""

import os

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import random
import socket

import pytest
import torch
import transformers

LOOPBACK = ("127.", "::1", "localhost")


def _refuse_network(event, args):
    """An audit hook sees every connect, also those of C extensions that go through the socket module."""
    if event != "socket.connect" or args[0].family not in (socket.AF_INET, socket.AF_INET6):
        return
    host = str(args[1][0])
    if not host.startswith(LOOPBACK):
        raise RuntimeError(f"a test tried to reach {host}: tests must run without a network")


def pytest_configure(config):
    import sys

    sys.addaudithook(_refuse_network)
    torch.set_num_threads(1)
    # In deterministic mode torch fills what torch.empty and friends return with NaN (floats) or the largest
    # value (integers): a kernel or a module that reads before it writes then shows in every comparison.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    transformers.logging.disable_progress_bar()
    # Short sequences and small models get the C++ kernels too.
    from lalm.modeling.ops import dispatch

    dispatch.EARNS_COMPILING = dispatch.WORTH_A_CONV_KERNEL = dispatch.WORTH_A_GATE_KERNEL = 0


@pytest.fixture(autouse=True)
def _fixed_seeds():
    random.seed(0)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub of this test's own (tests/hub_server.py), to which this process pushes as the user "me"."""
    from tests.hub_server import start_hub, use_hub

    server = start_hub()
    use_hub(server, tmp_path / "hub_home", monkeypatch)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True, scope="session")
def _memory_is_poisoned():
    """The guard above is worth nothing if it is switched off silently."""
    assert torch.empty(7).isnan().all(), "torch.empty must return NaN in tests"
