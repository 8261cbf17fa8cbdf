"""Two nodes of two ranks, as two launch agents on the loopback interface: the same calls, errors and tokens as on one host."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import psutil
import pytest
from tiny import make_checkpoint

from minillm import LLM, SamplingParams

TESTS = Path(__file__).parents[1]
LIMIT_S = 120


class Nodes:
    """Two launch agents, each in a process group of its own, whose output goes to files."""

    def __init__(self, folder: Path, launcher: str, *program: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.outputs = [folder / f"node{number}.txt" for number in range(2)]
        environment = os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1"}
        self.agents = [
            subprocess.Popen(
                [sys.executable, "-m", *_agent(launcher, number, port), *program], stdout=output.open("w"),
                stderr=subprocess.STDOUT, start_new_session=True, env=environment,
            )
            for number, output in enumerate(self.outputs)
        ]  # fmt: skip

    def wait(self) -> list[int]:
        """Both agents' exit statuses."""
        return [agent.wait(LIMIT_S) for agent in self.agents]

    def text(self, node: int = 0) -> str:
        return self.outputs[node].read_text()

    def until(self, word: str) -> None:
        """Wait until the first node has printed it."""
        end = time.monotonic() + LIMIT_S
        while word not in self.text():
            assert time.monotonic() < end and self.agents[0].poll() is None, self.text()
            time.sleep(0.05)

    def power_off(self, node: int) -> None:
        """Every process of a node is gone at once, with no time for last words."""
        family = psutil.Process(self.agents[node].pid).children(recursive=True)
        for process in family:
            process.suspend()
        for process in [psutil.Process(self.agents[node].pid), *family]:
            process.kill()

    def close(self) -> None:
        for agent in self.agents:
            if agent.poll() is None:
                for child in psutil.Process(agent.pid).children(recursive=True):
                    child.send_signal(signal.SIGKILL)
                agent.kill()
                agent.wait()


def _agent(launcher: str, node: int, port: str) -> list[str]:
    if launcher == "torchrun":
        rendezvous = ["--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", port]
        return ["torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2", *rendezvous]
    machines = ["--num_machines", "2", "--num_processes", "4", "--machine_rank", str(node), "--mixed_precision", "no"]
    rendezvous = ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
    return ["accelerate.commands.launch", "--multi_gpu", *machines, *rendezvous]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Nodes]]:
    """What a test starts; nothing of it is left."""
    started: list[Nodes] = []
    yield started
    for each in started:
        each.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("launch"), num_hidden_layers=4, max_position_embeddings=4096, num_key_value_heads=4
    )


PROMPTS = [[number, 2, 3] for number in range(6)]
LONG = SamplingParams(max_tokens=30, ignore_eos=True)

JOB = """
import json, os, signal, socket, sys, time
import torch, torch.distributed as dist
from minillm import LLM, RankError, SamplingParams, lead
from minillm.ranks.membership import context
from minillm.trace.trace import Kind

checkpoint, out = sys.argv[1:]
LONG = SamplingParams(max_tokens=30, ignore_eos=True)
PROMPTS = [[number, 2, 3] for number in range(6)]


def total():
    here = context()
    own = here.comm().all_reduce(torch.ones(1))
    dist.all_reduce(own)
    return [here.rank, list(here.nodes), here.comm().shared is None, own.item(), os.getppid()]


def absent():
    if context().rank != 3:
        context().comm().all_reduce(torch.ones(1))


def broken():
    if context().rank == 2:
        raise ValueError("no such thing")
    context().comm().barrier()


def caught(pool, fn):
    try:
        pool.run(fn)
    except RankError as error:
        return [error.fault.value, error.ranks, str(error).splitlines()[0]]


def stranger(said):
    # somebody who is at the wrong port, and one who says nothing
    link = socket.create_connection(launch._listener.address)
    link.sendall(said)
    return link


with lead() as launch:
    guests = [stranger(b"GET / HTTP/1.1\\r\\n\\r\\n" * 20), stranger(b"")]
    found = {"hosts": [[card.rank, card.node, card.local_rank] for card in launch.cards]}
    try:
        LLM(checkpoint, "tp=2", "cpu", ranks=launch)
    except ValueError as error:
        found["refused"] = str(error)
    (pool,) = launch.split(1, "cpu")
    with pool:
        found["total"] = pool.run(total)
        found["absent"], found["broken"] = caught(pool, absent), caught(pool, broken)
        pool.timeout_s = 1
        found["pids"] = list(pool.pids)
        found["stopped"] = caught(pool, lambda: os.kill(os.getpid(), signal.SIGSTOP) if context().rank == 1 else context().comm().barrier())
        found["killed"] = caught(pool, lambda: os.kill(os.getpid(), signal.SIGKILL) if context().rank == 3 else context().comm().barrier())
        found["again"] = pool.run(total)
    found["tokens"] = {}
    for layout in ("tp=4", "pp=2,tp=2", "dp=2,tp=2"):
        with LLM(checkpoint, layout, "cpu", ranks=launch) as llm:
            found["tokens"][layout] = [output.token_ids for output in llm.generate(PROMPTS, LONG)]
            found["ranks"] = llm.trace.ranks
    json.dump(found, open(out, "w"))
"""


def test_everything_that_ranks_do_on_one_host(tmp_path: Path, folder: Path, nodes: list[Nodes]) -> None:
    script, out = tmp_path / "job.py", tmp_path / "found.json"
    script.write_text(JOB)
    nodes.append(Nodes(tmp_path, "torchrun", str(script), str(folder), str(out)))
    assert nodes[0].wait() == [0, 0], nodes[0].text()
    found = json.loads(out.read_text())
    assert found["hosts"] == [[0, 0, 0], [1, 0, 1], [2, 1, 0], [3, 1, 1]]
    assert found["refused"].startswith(
        "layout 'tp=2' takes 2 ranks, but the launcher has started 4: give a layout of 4"
    )
    for total in ("total", "again"):
        assert [each[:4] for each in found[total]] == [[rank, [0, 0, 1, 1], True, 16.0] for rank in range(4)]
    assert found["absent"][:2] == ["absent", [3]]
    assert found["broken"] == ["raised", [2], "rank 2 raised ValueError: no such thing"]
    assert found["stopped"][:2] == ["late", [1]] and found["killed"][:2] == ["died", [3]]
    with LLM(folder, device="cpu") as one:
        expected = [output.token_ids for output in one.generate(PROMPTS, LONG)]
    assert found["tokens"] == dict.fromkeys(("tp=4", "pp=2,tp=2", "dp=2,tp=2"), expected)
    assert found["ranks"] == [0, 1, 2, 3]


def test_generate_under_torchrun(tmp_path: Path, folder: Path, nodes: list[Nodes]) -> None:
    """One answer, from rank 0; the log says who sits where."""
    command = ["-m", "minillm", "generate", "--model", str(folder), "--device", "cpu", "--layout", "pp=2,tp=2"]
    nodes.append(Nodes(tmp_path, "torchrun", *command, "--prompt", "abc", "--raw", "--max-tokens", "5", "--json"))
    assert nodes[0].wait() == [0, 0], nodes[0].text()
    text = nodes[0].text()
    figures = json.loads(text[text.index("{") : text.rindex("}") + 1])
    with LLM(folder, device="cpu") as one:
        assert figures["token_ids"] == one.generate(["abc"], SamplingParams(max_tokens=5))[0].token_ids
    host = socket.gethostname()
    assert f"rank 0: node 0 ({host}), local rank 0: stage 0, slice 0\n" in text
    assert f"rank 3: node 1 ({host}), local rank 1: stage 1, slice 1\n" in text
    assert "token_ids" not in nodes[0].text(1)


def test_serve_under_accelerate(tmp_path: Path, folder: Path, nodes: list[Nodes]) -> None:
    """Answers come from both nodes' replicas, and Ctrl-C on the first sends everybody home."""
    command = [
        "-m",
        "minillm",
        "serve",
        "--model",
        str(folder),
        "--device",
        "cpu",
        "--layout",
        "dp=2,tp=2",
        "--port",
        "0",
    ]
    nodes.append(Nodes(tmp_path, "accelerate", *command))
    nodes[0].until("http://127.0.0.1:")
    address = re.search(r"http://127\.0\.0\.1:\d+", nodes[0].text())
    with LLM(folder, device="cpu") as one:
        expected = [output.text for output in one.generate(["abc", "def"], SamplingParams(max_tokens=5))]
    body = json.dumps({"model": folder.name, "prompt": ["abc", "def"], "max_tokens": 5, "temperature": 0})
    request = Request(f"{address and address[0]}/v1/completions", body.encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=LIMIT_S) as answer:
        assert [choice["text"] for choice in json.load(answer)["choices"]] == expected
    os.killpg(nodes[0].agents[0].pid, signal.SIGINT)
    nodes[0].wait()
    leftover = [each for each in psutil.process_iter(["cmdline"]) if str(folder) in (each.info["cmdline"] or [])]
    assert leftover == []


STREAM = """
import json, sys, warnings
from minillm import LLM, SamplingParams, lead

checkpoint, out, layout = sys.argv[1:]
with lead() as launch, LLM(checkpoint, layout, "cpu", ranks=launch) as llm:
    for instance in llm.instances:
        instance.ranks.timeout_s = 1
    requests = llm.prepare([[number, 2, 3] for number in range(6)], SamplingParams(max_tokens=500, ignore_eos=True))
    llm.submit(requests)
    said = False
    while llm.engine.requests:
        llm.step()
        if len(requests[0].inbox) > 60 and not said:
            print("under way", flush=True)
            said = True
    json.dump([request.token_ids for request in requests], open(out, "w"))
    print("all are served", flush=True)
"""


@pytest.mark.parametrize("layout", ["dp=2,tp=2", "tp=4"])
def test_a_node_dies(tmp_path: Path, folder: Path, nodes: list[Nodes], layout: str) -> None:
    """A replica on one node is lost with it, and the other serves its requests; a layout across both cannot go on."""
    script, out = tmp_path / "stream.py", tmp_path / "tokens.json"
    script.write_text(STREAM)
    nodes.append(Nodes(tmp_path, "torchrun", str(script), str(folder), str(out), layout))
    nodes[0].until("under way")
    nodes[0].power_off(1)
    host = socket.gethostname()
    if layout == "tp=4":
        assert nodes[0].agents[0].wait(LIMIT_S) == 1
        assert f"with node 1 ({host}), which is gone" in nodes[0].text()
        return
    nodes[0].until("all are served")
    assert "replica 1 was lost, its requests go on at others" in nodes[0].text()
    with LLM(folder, device="cpu") as one:
        params = SamplingParams(max_tokens=500, ignore_eos=True)
        assert json.loads(out.read_text()) == [output.token_ids for output in one.generate(PROMPTS, params)]
