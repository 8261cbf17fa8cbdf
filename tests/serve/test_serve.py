"""The server as a client meets it: OpenAI's own package, raw HTTP, many streams, broken lines, and its end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from tiny import make_checkpoint

from minillm import LLM, SamplingParams

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
LIMITS = (
    "--block-size",
    "4",
    "--num-blocks",
    "400",
    "--max-running",
    "16",
    "--max-step-tokens",
    "64",
    "--max-queue",
    "70",
)


@dataclass
class Running:
    """A server in a process of its own, and the model that it has."""

    process: subprocess.Popen[str]
    url: str
    llm: LLM

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="any", max_retries=0, timeout=60)

    def health(self) -> dict[str, Any]:
        return httpx.get(self.url.removesuffix("/v1") + "/health").json()

    def settle(self) -> dict[str, Any]:
        """Its state once nothing is under way."""
        until = time.monotonic() + 20
        while (state := self.health())["requests"] and time.monotonic() < until:
            time.sleep(0.05)
        return state


def start(folder: Path, *options: str) -> Running:
    command = [
        sys.executable,
        "-m",
        "minillm",
        "serve",
        "--model",
        str(folder),
        "--device",
        "cpu",
        "--port",
        "0",
        *options,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"at (http://\S+/v1)", line)
    assert found, line + process.stdout.read()
    return Running(process, found[1], LLM(folder, device="cpu"))


def stop(server: Running) -> int:
    server.process.send_signal(signal.SIGTERM)
    return server.process.wait(20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("served") / "tiny", max_position_embeddings=512)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<end>"}))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    server = start(folder, *LIMITS)
    yield server
    assert stop(server) in (0, -signal.SIGTERM)


GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True}}


def test_a_pipeline_behind_the_server(folder: Path) -> None:
    """The same answers from two ranks, closed streams and all; when a rank is killed, requests fail and the next are served."""
    server = start(folder, "--layout", "pp=2", *LIMITS)
    try:
        expected = server.llm.generate(["hello"], SamplingParams(max_tokens=9, ignore_eos=True))[0].text
        ask = {"model": "tiny", "prompt": "hello", "max_tokens": 9, **GREEDY}
        dropped = server.client.completions.create(**{**ask, "max_tokens": 400}, stream=True)
        next(iter(dropped))
        assert server.client.completions.create(**ask).choices[0].text == expected
        dropped.close()
        assert server.settle()["blocks_used"] == 0
        lost = server.client.completions.create(**{**ask, "max_tokens": 400}, stream=True)
        next(iter(lost))
        family = psutil.Process(server.process.pid).children(recursive=True)
        ranks = [child for child in family if child.ppid() != server.process.pid]  # children of the fork server
        ranks[-1].kill()
        with pytest.raises(openai.APIError, match="the engine failed"):
            list(lost)
        assert server.client.completions.create(**ask).choices[0].text == expected
        assert server.settle()["blocks_used"] == 0
    finally:
        assert stop(server) in (0, -signal.SIGTERM)


def test_completions_whole_and_streamed(server: Running) -> None:
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    expected = server.llm.generate(["hello", "wor"], params)
    whole = server.client.completions.create(model="tiny", prompt=["hello", "wor"], max_tokens=9, **GREEDY)
    assert [choice.text for choice in whole.choices] == [output.text for output in expected]
    assert [choice.finish_reason for choice in whole.choices] == ["length", "length"]
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (8, 18)
    texts = ["", ""]
    stream = server.client.completions.create(
        model="tiny",
        prompt=["hello", "wor"],
        max_tokens=9,
        stream=True,
        stream_options={"include_usage": True},
        **GREEDY,
    )
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
        usage = chunk.usage
    assert texts == [output.text for output in expected]
    assert usage.total_tokens == 26
    by_ids = server.client.completions.create(model="tiny", prompt=expected[0].prompt_token_ids, max_tokens=9, **GREEDY)
    assert by_ids.choices[0].text == expected[0].text


def test_chat_whole_and_streamed(server: Running) -> None:
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    whole = server.client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=8, **GREEDY)
    prompt = server.llm.tokenizer.chat([{"role": "user", "content": "hi"}])
    expected = server.llm.generate([prompt], SamplingParams(max_tokens=8, ignore_eos=True))[0].text
    assert whole.choices[0].message.content == expected
    stream = server.client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, stream=True, **GREEDY)
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert deltas[0].role == "assistant" and all(delta.role is None for delta in deltas[1:])
    assert "".join(delta.content or "" for delta in deltas) == expected


def test_samples_and_seeds(server: Running) -> None:
    params = SamplingParams(max_tokens=6, n=3, temperature=1.0, seed=5, ignore_eos=True)
    expected = [each.text for each in server.llm.generate(["abc"], params)[0].samples]
    got = server.client.completions.create(
        model="tiny", prompt="abc", max_tokens=6, n=3, seed=5, temperature=1.0, extra_body={"ignore_eos": True}
    )
    assert [choice.text for choice in got.choices] == expected


def test_sixty_four_streams_some_of_which_break(server: Running) -> None:
    """Every fourth is closed by its client after some tokens, every fourth loses its connection without a word."""
    prompts = [f"request {number} says {'x' * (number % 7)}" for number in range(64)]
    expected = server.llm.generate(prompts, SamplingParams(max_tokens=40, ignore_eos=True))
    together = threading.Barrier(64)

    def ask(number: int) -> str | None:
        together.wait(30)
        if number % 4 == 1:
            return cut(number)
        text = ""
        stream = server.client.completions.create(
            model="tiny", prompt=prompts[number], max_tokens=40, stream=True, **GREEDY
        )
        for count, chunk in enumerate(stream):
            text += chunk.choices[0].text
            if number % 4 == 3 and count == number % 10:
                stream.close()
                return None
        return text

    def cut(number: int) -> None:
        host, port = server.url.split("//")[1].removesuffix("/v1").split(":")
        body = json.dumps({"prompt": prompts[number], "max_tokens": 400, "ignore_eos": True, "stream": number % 8 == 1})
        with socket.create_connection((host, int(port))) as line:
            line.sendall(
                f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            time.sleep(0.2)
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # reset, not a polite end

    with ThreadPoolExecutor(64) as pool:
        texts = list(pool.map(ask, range(64)))
    assert [texts[number] for number in range(0, 64, 2)] == [expected[number].text for number in range(0, 64, 2)]
    state = server.settle()
    assert (state["running"], state["waiting"]) == (0, 0)
    assert state["blocks_used"] == 0


BAD = {
    "no JSON": (b"{oops", 400, "the body is not JSON"),
    "no UTF-8": (b"\xff\xfe", 400, "the body is not JSON"),
    "deep": (b"[" * 100_000, 400, "the body is not JSON"),
    "no object": (b"[1]", 400, "send an object"),
    "no prompt": ({}, 400, "prompt: give a text"),
    "mixed prompt": ({"prompt": ["a", 3]}, 400, "prompt: give a text"),
    "empty prompt": ({"prompt": ""}, 400, "prompt 0 is empty"),
    "token outside": ({"prompt": [9999]}, 400, "outside 0 … 256"),
    "text for a number": ({"prompt": "a", "max_tokens": "many"}, 400, "max_tokens='many'"),
    "below its range": ({"prompt": "a", "temperature": -1}, 400, "temperature=-1"),
    "negative n": ({"prompt": "a", "n": -1}, 400, "n=-1"),
    "too many samples": ({"prompt": "a", "n": 17}, 400, "only 16 can run together"),
    "no answer": ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens=0"),
    "stream": ({"prompt": "a", "stream": "yes"}, 400, "stream: give true or false"),
    "stop": ({"prompt": "a", "stop": [3]}, 400, "stop: give a text"),
    "unknown": ({"prompt": "a", "logprobs": 3}, 400, "logprobs: this server does not know it"),
    "model": ({"prompt": "a", "model": "gpt-9"}, 404, "the model 'gpt-9' is not here"),
    "too long": ({"prompt": [1] * 600}, 400, "leaves room for 511"),
    "never fits the queue": ({"prompt": ["a"] * 71}, 400, "71 requests in one call, but at most 70 may be under way"),
    "very many samples": ({"prompt": "a", "n": 10**9}, 400, "1000000000 requests in one call"),
    "long stop": ({"prompt": "a", "stop": "x" * 1001}, 400, "at most 16 texts of at most 1,000 characters"),
    "misspelt": ({"prompt": "a", "max_token": 3}, 400, "max_token: this server does not know it"),
    "huge temperature": ({"prompt": "a", "temperature": 10**400}, 400, "temperature="),
    "size": (b" " * (4 * 2**20 + 1), 413, "above 4 MiB"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bodies_are_refused(server: Running, name: str) -> None:
    body, status, text = BAD[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(server.url + "/completions", content=content)
    assert answer.status_code == status
    assert text in answer.json()["error"]["message"]
    assert server.settle()["blocks_used"] == 0


@pytest.mark.parametrize("messages", [None, [], "hi", [{"role": "user"}], [3], [{"role": 1, "content": "x"}]])
def test_bad_messages_are_refused(server: Running, messages: Any) -> None:
    answer = httpx.post(server.url + "/chat/completions", json={"messages": messages})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("messages: ")


def test_other_routes(server: Running) -> None:
    assert httpx.get(server.url + "/models").json()["data"][0]["id"] == "tiny"
    assert httpx.get(server.url + "/nothing").status_code == 404
    assert httpx.get(server.url + "/completions").status_code == 405
    assert server.health()["status"] == "ok"


def test_a_key_is_asked_for(folder: Path) -> None:
    server = start(folder, "--api-key", "secret", *LIMITS)
    try:
        assert httpx.get(server.url + "/models").status_code == 401
        assert httpx.get(server.url + "/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert httpx.get(server.url + "/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert server.health()["status"] == "ok"
    finally:
        stop(server)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--host", "0.0.0.0"), "can be reached by others: give --api-key"),
        (("--host", "no.such.host.invalid"), "can be reached by others"),
        (("--port", "99999"), "--port 99999: give a number"),
        (("--max-queue", "0"), "max_queue=0: give a whole number from 1"),
        (("--max-running", "-1"), "max_running=-1: give a whole number from 1"),
    ],
)
def test_servers_that_do_not_start(folder: Path, options: tuple[str, ...], text: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "MINILLM_API_KEY"}
    command = [sys.executable, "-m", "minillm", "serve", "--model", str(folder), "--device", "cpu", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 2
    assert text in done.stderr and done.stderr.count("\n") == 1


def test_an_end_that_lets_requests_finish(folder: Path) -> None:
    """SIGTERM while streams run: they end with their whole text, new ones are turned away, the process ends."""
    server = start(folder, *LIMITS)
    prompts = ["one", "two", "three"]
    expected = server.llm.generate(prompts, SamplingParams(max_tokens=300, ignore_eos=True))
    first = threading.Barrier(4)

    def ask(prompt: str) -> str:
        stream = server.client.completions.create(model="tiny", prompt=prompt, max_tokens=300, stream=True, **GREEDY)
        text = next(iter(stream)).choices[0].text
        first.wait(30)
        return text + "".join(chunk.choices[0].text for chunk in stream)

    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(ask, prompt) for prompt in prompts]
        first.wait(30)
        server.process.send_signal(signal.SIGTERM)
        assert [answer.result(60) for answer in answers] == [output.text for output in expected]
    assert server.process.wait(20) in (0, -signal.SIGTERM)


def test_a_second_signal_fails_requests_at_once(folder: Path) -> None:
    """Nobody is left without an answer: the stream ends with an error or a broken line."""
    server = start(folder, "--block-size", "16", "--num-blocks", "64")
    stream = server.client.completions.create(model="tiny", prompt="x", max_tokens=500, stream=True, **GREEDY)
    next(iter(stream))
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    server.process.send_signal(signal.SIGTERM)
    with pytest.raises((openai.APIError, httpx.HTTPError)):
        for _ in stream:
            pass
    assert server.process.wait(20) in (0, -signal.SIGTERM)
