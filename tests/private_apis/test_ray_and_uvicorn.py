"""Ray and uvicorn: errors of workers, quiet logs, replicas, and the parts of a request."""

from __future__ import annotations

from pathlib import Path

import pytest

from cllm4rec_dist.errors import CLLM4RecError
from cllm4rec_dist.launchers import ray_launcher
from tests.private_apis.listing import relies_on


@relies_on("launchers/ray_launcher.py", "_base_exc", "worker_failures")
def test_ray_keeps_the_error_of_a_worker() -> None:
    """A run on Ray ends with the error that a rank raised, which is inside of what Ray makes of it.

    If this fails, see ray/train/v2/api/exceptions.py for where the errors of workers are: else people see Ray's own
    message with a traceback of it instead of ours.
    """
    from ray.train import TrainingFailedError
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
    from ray.train.v2.api.exceptions import WorkerGroupError

    ours = CLLM4RecError("field", 1, "is wrong", "Mend it.")
    for failure in (ours, UserExceptionWithTraceback(ours, "a traceback")):
        error = WorkerGroupError("a worker failed", {0: failure})
        assert isinstance(error, TrainingFailedError)
        assert ray_launcher._original(error) is ours


@relies_on(
    "launchers/ray_launcher.py",
    "RAY_USAGE_STATS_ENABLED",
    "RAY_TRAIN_ENABLE_PRINT_PATCH",
    "RAY_DEDUP_LOGS",
    "RAY_DISABLE_WORKER_LOG_PREFIX",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER",
)
def test_ray_reads_the_variables_that_keep_it_quiet() -> None:
    """Ray's notices are turned off by environment variables, some of which are not documented.

    If this fails, a variable has another name and Ray's lines are among ours; nothing else depends on it.
    """
    import ray
    from ray.train.v2._internal import constants

    assert constants.ENABLE_PRINT_PATCH_ENV_VAR in ray_launcher._QUIET
    assert constants.ENABLE_PREEMPTION_WATCHER_ENV_VAR in ray_launcher._QUIET
    sources = [Path(ray.__file__).parent / "_private" / name for name in ("ray_constants.py", "worker.py")]
    sources.append(Path(ray.__file__).parent / "_common" / "usage" / "usage_constants.py")
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_DEDUP_LOGS", "RAY_DISABLE_WORKER_LOG_PREFIX"):
        assert name in text, name


@relies_on("launchers/ray_launcher.py", "ray_current_cluster")
@pytest.mark.parametrize(
    "variables", [{}, {"TMPDIR": "/a"}, {"RAY_TMPDIR": "/b"}, {"TMPDIR": "/a", "RAY_TMPDIR": "/b"}]
)
def test_ray_notes_its_cluster_in_a_file(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """RAY_ADDRESS=auto is answered in a second where the cluster that `ray start` noted is gone.

    If this fails, the file has moved (`get_ray_address_file`): Ray itself then waits for a minute before it says so.
    """
    from ray._common.utils import get_ray_address_file

    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(ray_launcher._current_cluster(variables)) == get_ray_address_file(None)


@relies_on("serving/app.py", "__serve_build_asgi_app__")
def test_ray_serve_asks_a_replica_for_its_application() -> None:
    """A replica makes its application when it starts, by a method that Ray Serve calls by this name.

    If this fails, see `serve.ingress` in ray/serve/api.py for how a class gives its application.
    """
    from ray.serve._private.replica import SERVE_BUILD_ASGI_APP_METHOD

    from cllm4rec_dist.serving.app import _Replica

    assert hasattr(_Replica, SERVE_BUILD_ASGI_APP_METHOD)


@relies_on("log.py", "tqdm_ray")
def test_ray_has_bars_for_workers() -> None:
    """Bars of rank 0 in a Ray worker are drawn by the driver, by an experimental part of Ray.

    If this fails, leave bars in Ray workers to lines (`progress_bar` in log.py).
    """
    from ray.experimental import tqdm_ray

    assert {"update", "close", "set_description"} <= {*dir(tqdm_ray.tqdm)}


@relies_on("serving/slow_clients.py", "HttpToolsProtocol", "cycle", "response_complete", "on_headers_complete", "loop")
def test_uvicorn_has_the_parts_that_end_slow_headers() -> None:
    """`TimedHeaderProtocol` starts and stops its timer in methods of uvicorn's protocol and reads its request cycle.

    If this fails, see uvicorn/protocols/http/httptools_impl.py; without the timer a client that never finishes a header
    holds its connection for ever (tests/serving/test_slow_clients.py).
    """
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

    protocol = HttpToolsProtocol.__init__.__code__.co_names
    assert {"loop", "transport", "cycle"} <= {*protocol}
    assert "response_complete" in RequestResponseCycle.__init__.__code__.co_names
    for name in ("connection_made", "connection_lost", "data_received", "on_headers_complete"):
        assert callable(getattr(HttpToolsProtocol, name))
