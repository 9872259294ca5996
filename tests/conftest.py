"""What tests share: one local Ray, tiny models, an engine, and proof that nothing is left."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from hypothesis import settings as hypothesis_settings

if TYPE_CHECKING:
    from pear_ray.engines.engine_pool import EnginePool

# Read when the libraries are imported or Ray starts, and handed on to every process of the tests.
MARK = ("PEAR_RAY_TEST_SESSION", uuid.uuid4().hex)
os.environ.update(
    {
        MARK[0]: MARK[1],
        # Process titles must not overwrite the environment in which the mark is read.
        "SPT_NOENV": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ahead of the tests that run beside them in their pauses.
        "RAY_worker_niceness": "0",
        # One process less to start in each Ray Train run.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # DeepSpeed asks for ninja beside this Python.
        "PATH": f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}",
    }
)
os.environ.pop("RAY_ADDRESS", None)

# How long an example takes depends on what else the machine does.
hypothesis_settings.register_profile("any machine", deadline=None)
hypothesis_settings.load_profile("any machine")

pytest_plugins = ["tests.rl.fixtures", "tests.score.fixtures"]

SECONDS_TO_END = 30
VOCABULARY = [f"w{number}" for number in range(97)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that use the shared Ray as `cluster`; those with clusters or ranks of their own are marked in their
    modules."""
    for item in items:
        if "ray_session" in getattr(item, "fixturenames", ()):
            item.add_marker("cluster")


@pytest.fixture(scope="session", autouse=True)
def nothing_left() -> Iterator[None]:
    """Fails when a process that the tests started outlives them."""
    yield
    deadline = time.monotonic() + SECONDS_TO_END
    while (left := living()) and time.monotonic() < deadline:
        time.sleep(0.2)
    names = [" ".join(process.cmdline())[:120] for process in left if process.is_running()]
    for process in left:
        process.kill()
    assert not names, f"the tests left processes behind: {names}"


def living() -> list[psutil.Process]:
    """Children of the tests, also those that an ended child left to others."""
    found = {process.pid: process for process in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK[0]) == MARK[1]:
                found[process.pid] = process
        except psutil.Error:
            continue
    return [p for p in found.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="session")
def ray_session(nothing_left: None) -> Iterator[None]:
    """One local Ray for all tests that want one; more CPUs than there are, for processes wait."""
    import ray

    # Short names: the path of a Unix socket ends after 107 characters.
    scratch = tempfile.mkdtemp(prefix="r-", dir=os.environ.get("RAY_TMPDIR"))
    temporary = Path(scratch, "t")
    temporary.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        ray.init(
            address="local",
            num_cpus=4,
            object_store_memory=512 * 2**20,
            include_dashboard=False,
            # Without a dashboard, Ray Train warns every second that it cannot see its own state.
            log_to_driver=False,
            _temp_dir=scratch,
        )
    # Workers cannot import the tests, so functions of the tests travel whole.
    for module in list(sys.modules.values()):
        if (getattr(module, "__file__", None) or "").startswith(str(Path(__file__).parent)):
            ray.cloudpickle.register_pickle_by_value(module)
    yield
    ray.shutdown()
    shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a Hugging Face folder of a tiny Qwen3 with 100 words, by `tied`, `seed` and the number of layers."""

    @cache
    def make(tied: bool, seed: int = 0, num_layers: int = 2) -> Path:
        from pear_ray.config import Pretrain
        from pear_ray.train.new_model import write_new_model

        settings = Pretrain(
            styles={},
            seed=seed,
            hidden_size=64,
            intermediate_size=128,
            num_layers=num_layers,
            tie_word_embeddings=tied,
            # Fresh weights predict and attend to all alike; larger ones do not.
            initializer_range=0.08,
        )
        folder = tmp_path_factory.mktemp(f"{'tied' if tied else 'untied'}-{seed}-")
        write_new_model(folder, settings, VOCABULARY)
        return folder

    return make


@pytest.fixture(scope="session")
def engine_of(ray_session: None, tiny_model: Callable[..., Path]) -> Iterator[Callable[[bool], EnginePool]]:
    """vLLM engines of the tied and of the untied model, each in its own process. They start slowly, so each starts once
    and serves model after model."""
    from pear_ray.config import Generator as Settings
    from pear_ray.config import Job
    from pear_ray.engines.engine_pool import EnginePool
    from pear_ray.weights.fetch import WeightCache

    settings = Settings(
        max_new_tokens=24,
        max_model_len=48,
        max_num_seqs=64,
        threads=1,
        timeout_seconds=200,
        tensor_parallel_size=int(os.environ.get("PEAR_RAY_TENSOR_PARALLEL", "1")),
    )
    with ExitStack() as started:

        @cache
        def engine(tied: bool) -> EnginePool:
            path = str(tiny_model(tied))
            job = Job(
                run={"dir": "unused", "seed": 0},
                model={"path": path, "dtype": "float32"},
                generator=settings,
                tasks=[{"name": "countdown"}],
            )
            pool = EnginePool(job, path, lambda kind, text: None, WeightCache)
            return started.enter_context(pool)

        yield engine


@pytest.fixture(scope="session")
def scraped_metrics() -> set[str]:
    """Names of the metrics that Prometheus could have read during `tiny_run`."""
    return set()


@pytest.fixture(scope="session")
def tiny_run(ray_session: None, scraped_metrics: set[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the whole tiny chain, on one node."""
    from tests.tiny_chain import SECONDS, drive, scraped

    folder = tmp_path_factory.mktemp("pipeline") / "run"
    driver = drive(folder)
    with scraped(scraped_metrics):
        ended = driver.wait(timeout=SECONDS)
    assert ended == 0, (folder.parent / "driver.log").read_text()[-5000:]
    return folder


@pytest.fixture
def pear_ray(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in this process: (exit code, printed, complained)."""
    from pear_ray.__main__ import main

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(list(words))
        return end.value.code, *capsys.readouterr()

    return run
