"""A real HTTP server that speaks S3: moto's, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import httpx
from support.processes import eventually, free_port

BUCKET = "adapters"


@contextmanager
def running_s3(bucket: str = BUCKET) -> Iterator[Mapping[str, str]]:
    """With one bucket; yields the environment that leads clients there."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            assert eventually(lambda: _answers(url), 30)
            httpx.put(f"{url}/{bucket}", trust_env=False).raise_for_status()
            yield {
                "AWS_ENDPOINT_URL": url,
                "AWS_ALLOW_HTTP": "true",
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_REGION": "us-east-1",
            }
        finally:
            process.kill()


def put_object(environment: Mapping[str, str], key: str, data: bytes) -> None:
    """As somebody else would."""
    httpx.put(f"{environment['AWS_ENDPOINT_URL']}/{BUCKET}/{key}", content=data, trust_env=False).raise_for_status()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False, timeout=1).status_code < 500
    except httpx.TransportError:
        return False
