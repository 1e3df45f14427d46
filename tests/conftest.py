"""Eight virtual CPU devices stand for a pod; compiled programs are kept between runs."""

import functools
import gc
import math
import os
import subprocess
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from gptjax.storage import BucketPath, Place, expand
from tests import buckets

STARTED = time.monotonic()

# Before jax starts, which reads these once; subprocesses of tests inherit them.
flags = ["--xla_force_host_platform_device_count=8"]
# Half the time of the suite is the compiler's: programs are optimised as text only (HLO), emitted
# as one module of LLVM and not as many at once, and fusions the older way, which newer jaxlibs do
# not know. Together that takes a sixth of the time. A test of the last bit that users get compiles
# in a process of its own.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
flags += ["--xla_cpu_parallel_codegen_split_count=1"]
if version("jaxlib") < "0.11":
    flags += ["--xla_cpu_use_fusion_emitters=false"]
os.environ["XLA_FLAGS"] = " ".join(flags)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax_cache"))
# Runs of tests are not to be in the user's ledger.
os.environ.setdefault("GPTJAX_CACHE", str(Path(__file__).parents[1] / ".jax_cache" / "gptjax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, default=math.inf, help="start no test after so long")
    parser.addoption("--kills", type=int, default=5, help="of tests/test_faults.py")


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported by now stays: collections need not walk through it again


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() - STARTED > item.config.getoption("seconds"):
        pytest.skip("the time of --seconds is over; `make test` runs it")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """Compiled programs hold memory maps, of which a process may have 65,530: LLVM then aborts."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture
def fresh_programs() -> Iterator[None]:
    """For tests that change what a program of the same config computes."""
    import jax

    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token store of `tiny.TEXT`."""
    from tests import tiny

    return tiny.make_store(tmp_path_factory.mktemp("text"))


@pytest.fixture
def few_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    """`scaling` draws its intervals in half a second; they are held in test_sizes_scaling.py."""
    from gptjax.sizes import scaling

    monkeypatch.setattr(scaling, "bootstrap", functools.partial(scaling.bootstrap, replicates=50))


@pytest.fixture(scope="module", autouse=True)
def _one_device() -> Iterator[None]:
    """Commands see one device: a run takes a third of the time that it takes on eight."""
    from tests import tiny

    with tiny.seeing(1):
        yield


@pytest.fixture
def eight_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    from tests import tiny

    monkeypatch.setattr(jax, "devices", tiny.devices)


@pytest.fixture(scope="module", params=("gs", "s3"))
def bucket(request: pytest.FixtureRequest) -> Iterator[buckets.Proxy]:
    with buckets.served(request.param) as proxy:
        proxy.scheme = request.param
        yield proxy


@pytest.fixture
def far(bucket: buckets.Proxy, request: pytest.FixtureRequest) -> Iterator[BucketPath]:
    """An empty folder in a bucket."""
    folder = expand(f"{bucket.scheme}://{buckets.BUCKET}/{request.node.name}")
    assert isinstance(folder, BucketPath)
    yield folder
    bucket.fault = lambda method, path: "pass"


@pytest.fixture(params=["disk", "gs", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """One on a disk, and one in each kind of bucket."""
    if request.param == "disk":
        yield tmp_path
        return
    with buckets.served(request.param):
        yield expand(f"{request.param}://{buckets.BUCKET}/runs")
