"""Bad input over real HTTP: the right status, a code and a sentence; and nothing left behind."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from support.metrics_page import scrape, total
from support.serving import MODEL, Running
from support.shared import shared_path

pytestmark = [pytest.mark.ray, pytest.mark.redis, pytest.mark.model, pytest.mark.timeout(600)]

Files = dict[str, bytes]
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def text(**fields: object) -> bytes:
    return json.dumps({"model": MODEL, "prompt": "Hi", "max_tokens": 2, **fields}).encode()


def chat(content: object, **fields: object) -> bytes:
    return json.dumps(
        {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 2, **fields}
    ).encode()


BODIES: list[tuple[str, str, bytes, int, str]] = [
    ("unknown model", TEXT, text(model="nobody"), 404, "model_not_found"),
    ("unknown version", TEXT, text(model="snips@99"), 404, "model_not_found"),
    ("path as model", TEXT, text(model="../snips"), 404, "model_not_found"),
    ("cut off", TEXT, b'{"model":', 400, "invalid_json"),
    ("an array", TEXT, b"[]", 400, "invalid_request"),
    ("not UTF-8", TEXT, b'{"model":"\xff\xfe","prompt":"x"}', 400, "invalid_json"),
    ("deep nesting", TEXT, b"[" * 100_000 + b"]" * 100_000, 400, "invalid_json"),
    ("5000 digits", TEXT, b'{"model":"x","prompt":"x","seed":' + b"9" * 5000 + b"}", 400, "invalid_json"),
    ("9 MB", TEXT, text(prompt="a" * 9_000_000), 413, "payload_too_large"),
    ("too long, text", TEXT, text(prompt="hello " * 9000), 400, "context_length_exceeded"),
    ("too long, token ids", TEXT, text(prompt=[5] * 8192), 400, "context_length_exceeded"),
    ("too long, chat", CHAT, chat("hello " * 9000), 400, "context_length_exceeded"),
    ("too long, streamed", CHAT, chat("hello " * 9000, stream=True), 400, "context_length_exceeded"),
    ("answer too long", TEXT, text(max_tokens=9000), 400, "context_length_exceeded"),
    ("token id outside", TEXT, text(prompt=[49152]), 400, "invalid_request"),
    ("bias outside", TEXT, text(logit_bias={"49152": 1}), 400, "invalid_request"),
    ("half a surrogate pair, text", TEXT, text(prompt="\ud800"), 400, "invalid_value"),
    ("half a surrogate pair, chat", CHAT, chat("\ud800"), 400, "invalid_value"),
    ("half a surrogate pair, parts", CHAT, chat([{"type": "text", "text": "\ud800"}]), 400, "invalid_value"),
    ("negative temperature", TEXT, text(temperature=-1), 400, "invalid_value"),
    ("NaN", TEXT, text(top_p=float("nan")), 400, "invalid_value"),
    ("Infinity", TEXT, text(min_p=float("inf")), 400, "invalid_value"),
    ("1e400", TEXT, b'{"model":"x","prompt":"x","temperature":1e400}', 400, "invalid_value"),
    ("negative max_tokens", TEXT, text(max_tokens=-1), 400, "invalid_value"),
    ("huge n", TEXT, text(n=10**30), 400, "invalid_value"),
    ("min over max", TEXT, text(min_tokens=3), 400, "invalid_value"),
    ("two limits", CHAT, chat("Hi", max_completion_tokens=3), 400, "invalid_value"),
    ("stream options, no stream", TEXT, text(stream_options={"include_usage": True}), 400, "invalid_value"),
    ("tools", CHAT, chat("Hi", tools=[{"type": "function"}]), 400, "invalid_value"),
    ("unknown field", TEXT, text(temprature=1), 400, "invalid_value"),
]


def expect(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status, response.text[:500]
    error = response.json()["error"]
    assert error["code"] == code
    assert len(error["message"]) > 20
    assert "Traceback" not in error["message"]


@pytest.mark.parametrize(("path", "body", "status", "code"), [b[1:] for b in BODIES], ids=[b[0] for b in BODIES])
def test_bodies(published: Running, path: str, body: bytes, status: int, code: str) -> None:
    with published.client() as client:
        expect(client.post(path, content=body, headers={"Content-Type": "application/json"}), status, code)


@pytest.mark.parametrize(
    ("key", "code"),
    [(None, "missing_api_key"), ("Basic abc", "missing_api_key"), ("Bearer nonsense", "invalid_api_key")],
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/adapters", "/v1/keys?tenant=demo"])
def test_keys(published: Running, path: str, key: str | None, code: str) -> None:
    headers = {"Authorization": key} if key else {}
    expect(httpx.get(published.url + path, headers=headers, trust_env=False), 401, code)


def test_another_tenants_adapter_looks_like_none(published: Running) -> None:
    admin = {"Authorization": f"Bearer {published.admin_key}"}
    made = httpx.post(f"{published.url}/v1/keys", json={"tenant": "stranger"}, headers=admin, trust_env=False)
    stranger = {"Authorization": f"Bearer {made.json()['secret']}"}
    calls: list[tuple[str, str, Callable[[str], object]]] = [
        ("GET", "/v1/adapters/{}", lambda _: None),
        ("DELETE", "/v1/adapters/{}", lambda _: None),
        ("GET", "/v1/adapters/{}/versions/1", lambda _: None),
        ("DELETE", "/v1/adapters/{}/versions/1", lambda _: None),
        ("PUT", "/v1/adapters/{}/aliases/prod", lambda _: {"version": 1}),
        ("GET", "/v1/models/{}@1", lambda _: None),
        ("POST", TEXT, lambda name: {"model": name, "prompt": "x"}),
        ("POST", CHAT, lambda name: {"model": name, "messages": [{"role": "user", "content": "x"}]}),
    ]

    with httpx.Client(base_url=published.url, headers=stranger, trust_env=False) as client:
        for method, path, body in calls:

            def ask(
                name: str, method: str = method, path: str = path, body: Callable[[str], object] = body
            ) -> tuple[int, str]:
                answer = client.request(method, path.format(name), json=body(name))
                return answer.status_code, answer.text.replace(name, "NAME")

            assert ask("snips") == ask("never-published")
            assert ask("snips")[0] == 404
    with published.client() as owner:
        assert owner.get("/v1/adapters/snips").status_code == 200


def lora() -> Files:
    folder = shared_path("adapters", "snips-turbo")
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def header_and_data(files: Files) -> tuple[dict[str, dict[str, object]], bytes]:
    raw = files[WEIGHTS]
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def with_tensors(files: Files, header: object, data: bytes) -> Files:
    head = json.dumps(header).encode()
    return {**files, WEIGHTS: struct.pack("<Q", len(head)) + head + data}


def with_first_tensor(files: Files, **changed: object) -> Files:
    header, data = header_and_data(files)
    name = min(name for name in header if name != "__metadata__")
    return with_tensors(files, {**header, name: {**header[name], **changed}}, data)


def with_nan(files: Files) -> Files:
    header, data = header_and_data(files)
    return with_tensors(files, header, b"\xff\xff\xff\xff" + data[4:])


def with_config(files: Files, **changed: object) -> Files:
    return {**files, CONFIG: json.dumps({**json.loads(files[CONFIG]), **changed}).encode()}


UPLOADS: list[tuple[str, str, Callable[[Files], Files]]] = [
    ("broken", "truncated_file", lambda f: {**f, WEIGHTS: f[WEIGHTS][:-1000]}),
    ("broken", "truncated_file", lambda f: {**f, WEIGHTS: f[WEIGHTS][:100]}),
    ("broken", "header_too_large", lambda f: {**f, WEIGHTS: struct.pack("<Q", 2**63) + b"{}"}),
    ("broken", "bad_header", lambda f: with_first_tensor(f, shape=[2**62, 2**62])),
    ("broken", "bad_header", lambda f: with_first_tensor(f, data_offsets=[0, 10**15])),
    ("broken", "wrong_shape", lambda f: with_first_tensor(f, shape=[1536, 16])),
    ("broken", "non_finite", with_nan),
    ("broken", "base_mismatch", lambda f: with_config(f, base_model_name_or_path="meta-llama/Llama-3.1-8B")),
    ("broken", "rank_mismatch", lambda f: with_config(f, r=8)),
    ("broken", "pickle_file", lambda f: {**f, "extra.bin": b"x"}),
    ("broken", "invalid_file_name", lambda f: {**f, "../evil.json": b"{}"}),
    ("broken", "invalid_file_name", lambda f: {**f, "..": b"{}"}),
    ("../broken", "invalid_name", lambda f: f),
    ("BROKEN", "invalid_name", lambda f: f),
]


def push(client: httpx.Client, name: str, files: Files) -> httpx.Response:
    return client.post("/v1/adapters", data={"name": name}, files=[("files", (n, c)) for n, c in files.items()])


def left_over(server: Running) -> list[Path]:
    return list((server.home / "uploads").iterdir())


def test_uploads_are_refused_by_name_and_leave_nothing(published: Running) -> None:
    good = lora()
    with published.client() as client:
        for name, code, broken in UPLOADS:
            expect(push(client, name, broken(good)), 400, code)
        assert client.get("/v1/adapters/broken").status_code == 404
    assert left_over(published) == []


def test_the_same_files_again_are_the_same_version(published: Running) -> None:
    with published.client() as client:
        answers = [push(client, "twice", lora()) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [201, 200]
        assert answers[0].json() == answers[1].json()
        assert client.delete("/v1/adapters/twice").status_code == 200


def connect(server: Running, path: str, length: int, kind: str) -> socket.socket:
    """A request whose body is announced and not sent."""
    address = urlsplit(server.url)
    connection = socket.create_connection((address.hostname, address.port), timeout=20)
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
        f"Content-Type: {kind}\r\nContent-Length: {length}\r\n\r\n".encode()
    )
    return connection


MULTIPART = "multipart/form-data; boundary=zz"


@pytest.mark.parametrize("path", ["/v1/adapters", TEXT])
def test_ten_gigabytes_are_refused_before_they_are_sent(published: Running, path: str) -> None:
    with connect(published, path, 10**10, MULTIPART) as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def eventually(true: Callable[[], bool], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_an_upload_that_is_cut_off_leaves_nothing(published: Running) -> None:
    part = b'--zz\r\nContent-Disposition: form-data; name="files"; filename="adapter_model.safetensors"\r\n\r\n'
    with connect(published, "/v1/adapters", 50 << 20, MULTIPART) as connection:
        connection.sendall(part + b"x" * (4 << 20))
        eventually(lambda: left_over(published) != [])
    eventually(lambda: left_over(published) == [])


def engine_gauge(running: Running, name: str) -> float:
    return total(scrape(running.url, None), f"slipstream_engine_{name}")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_blocks(published: Running, stream: bool) -> None:
    body = text(model="snips", max_tokens=4000, ignore_eos=True, stream=stream, n=2)
    with connect(published, TEXT, len(body), "application/json") as connection:
        connection.sendall(body)
        eventually(lambda: engine_gauge(published, "running_sequences") == 2)
    eventually(lambda: engine_gauge(published, "running_sequences") == 0)
    assert engine_gauge(published, "kv_blocks_used") == 0


def test_four_choices_each_under_load(published: Running) -> None:
    models = ["snips", "wikisql", MODEL]
    with published.client() as client, ThreadPoolExecutor(24) as pool:

        def ask(number: int) -> httpx.Response:
            fields = {"model": models[number % 3], "prompt": f"row {number}", "max_tokens": 4, "n": 4, "seed": 1}
            return client.post(TEXT, json=fields)

        answers = list(pool.map(ask, range(24)))
    assert [len(answer.json()["choices"]) for answer in answers] == [4] * 24


def test_an_adapter_removed_during_its_answer(published: Running) -> None:
    with published.client() as client:
        assert push(client, "leaving", lora()).status_code == 201
        fields = {"model": "leaving", "prompt": "Hi", "max_tokens": 40, "ignore_eos": True, "stream": True}
        with client.stream("POST", TEXT, json=fields) as response:
            lines = response.iter_lines()
            next(lines)
            assert client.delete("/v1/adapters/leaving").status_code == 200
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]
        expect(client.post(TEXT, json=fields), 404, "model_not_found")
