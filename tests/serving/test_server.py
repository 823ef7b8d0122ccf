"""``vllm serve`` with the plugin, over HTTP: many connections, requests that are given up, and errors."""

import http.client
import json
import os
import random
import socket
import subprocess
import threading
import time

import pytest
import torch

from launching import ROOT
from serving_models import HAS_GPU, PYTHON, QWEN3, Served, make_model

pytestmark = pytest.mark.skipif(not PYTHON.is_file(), reason="make test-serving creates the environment with vLLM")
CONNECTIONS, SECONDS = 64, 20


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Served:
    return make_model(tmp_path_factory.mktemp("model"), QWEN3, {}, lengths=[1, 5, 31, 32, 33, 64, 90, 130, 200, 301])


@pytest.fixture(scope="module")
def port(served, tmp_path_factory):
    """A server in a process of its own; its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = tmp_path_factory.mktemp("server")
    (place / "books").mkdir()
    words = [
        str(served.folder), "--skip-tokenizer-init", "--dtype", "float32", "--max-model-len", "512",
        "--port", str(port),
        "--max-num-seqs", "16", "--max-num-batched-tokens", "128", "--num-gpu-blocks-override", "40",
        "--additional-config", json.dumps(dict(ttt_books=str(place / "books"))),
    ]  # fmt: skip
    if not HAS_GPU:
        words.append("--enforce-eager")
    with (place / "log").open("w+") as log:
        process = subprocess.Popen(
            [PYTHON, str(ROOT / "tests/serving/server.py"), *words], stdout=log, stderr=subprocess.STDOUT, cwd=place,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, start_new_session=True,
        )  # fmt: skip
        try:
            for _ in range(300):
                try:
                    if ask(port, "GET", "/health")[0] == 200:
                        break
                except OSError:
                    pass
                assert process.poll() is None, (place / "log").read_text()[-3000:]
                time.sleep(1)
            yield port
        finally:
            os.killpg(process.pid, 9)
            process.wait()


def ask(port: int, method: str, path: str, body: dict | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def body_of(served: Served, request: dict, **more) -> dict:
    keys = dict(prompt=request["prompt"], max_tokens=request["tokens"], temperature=0, ignore_eos=True)
    return dict(model=str(served.folder), return_token_ids=True, **keys, **more)


def test_many_connections(served, port):
    """Each answer is the exported model's, while other requests are given up before their end."""
    wrong, counts, end = [], dict(done=0, given_up=0), time.time() + SECONDS

    def client(number: int) -> None:
        choose = random.Random(number)
        while time.time() < end:
            request, expected = choose.choice(list(zip(served.requests, served.expected, strict=True)))
            if choose.random() < 0.25:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
                words = json.dumps(body_of(served, request, stream=True))
                connection.request("POST", "/v1/completions", words, {"Content-Type": "application/json"})
                if choose.random() < 0.5:
                    connection.getresponse().read(200)
                connection.close()
                counts["given_up"] += 1
            else:
                status, text = ask(port, "POST", "/v1/completions", body_of(served, request))
                found = json.loads(text)["choices"][0]["token_ids"] if status == 200 else text
                if found != expected:
                    wrong.append((len(request["prompt"]), found, expected))
                counts["done"] += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, (len(wrong), counts, wrong[0])
    assert counts["done"] > CONNECTIONS and counts["given_up"] > 4


def test_books_over_http(served, port):
    """A state that one call saves is loaded by another; a name that does not exist is a client's error."""
    text, question = served.requests[-1], served.requests[2]
    status, text_found = ask(
        port, "POST", "/v1/completions", body_of(served, text, vllm_xargs=dict(ttt_save="novel.safetensors"))
    )
    assert status == 200, text_found
    status, found = ask(
        port, "POST", "/v1/completions", body_of(served, question, vllm_xargs=dict(ttt_load="novel.safetensors"))
    )
    model = QWEN3.from_pretrained(served.folder, dtype=torch.float32).eval()
    book = model.read(torch.tensor([text["prompt"]]))
    prompt = torch.tensor([question["prompt"]])
    answer = model.generate(prompt, fast_weights=book, max_new_tokens=question["tokens"], do_sample=False)
    assert json.loads(found)["choices"][0]["token_ids"] == answer[0, prompt.shape[1] :].tolist()
    assert json.loads(found)["choices"][0]["token_ids"] != served.expected[2]
    status, found = ask(port, "POST", "/v1/completions", body_of(served, question, vllm_xargs=dict(ttt_load="none")))
    assert status == 400
    assert (
        json.loads(found)["error"]["message"] == "ttt_load=none: there is no such file in the server's folder of books"
    )
