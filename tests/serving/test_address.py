"""The address of a service: taken at once, or refused by name."""

from __future__ import annotations

import socket

import pytest

from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.serving.address import listen, url


def test_a_taken_port_is_refused_by_its_name() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--port: {port} cannot be used on 127.0.0.1.*Choose another"):
            listen("127.0.0.1", port)
    listen("127.0.0.1", port).close()


def test_a_host_that_is_not_of_this_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--host.*cannot be resolved"):
        listen("no-such-host.invalid", 0)
    with pytest.raises(ConfigError, match=r"cannot be used on 203\.0\.113\.1"):
        listen("203.0.113.1", 0)


def test_connections_send_small_answers_at_once() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_url_can_be_opened_on_this_machine() -> None:
    assert url("0.0.0.0", 8000) == "http://127.0.0.1:8000"
    assert url("::1", 80) == "http://[::1]:80"
    assert url("localhost", 80) == "http://localhost:80"
