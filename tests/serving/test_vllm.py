"""vLLM with the plugin: the tokens of many requests over few slots are those of the exported model, in fp32.

On a machine with a GPU and vLLM, all tests run on it, and those of CUDA graphs, bf16 and tensor parallelism, too.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from launching import ROOT
from serving_models import CHUNK, HAS_GPU, LLAMA, PYTHON, QWEN2, QWEN3, SHAPES, Served, make_model

LENGTHS = [301, 20, 97, 250, 64, 32, 31, 1, 128, 5]  # around edges of chunks; the longest is read in parts
MODELS = {
    "qwen3": (QWEN3, {}),
    "input_embed, clipped": (QWEN3, dict(ttt_target="input_embed", ttt_clip=0.1)),
    "llama, clip of each layer, no projection": (LLAMA, dict(ttt_clip=[0.05, 0.2], ttt_proj=False)),
    "qwen2": (QWEN2, dict(num_attention_heads=2)),
    "bounded": (QWEN3, dict(ttt_bound=0.5, ttt_trained_length=2 * CHUNK + 5)),
}

pytestmark = pytest.mark.skipif(not PYTHON.is_file(), reason="make test-serving creates the environment with vLLM")
on_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU and vLLM")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Served]:
    return {
        name: make_model(tmp_path_factory.mktemp("model"), kind, keys, LENGTHS) for name, (kind, keys) in MODELS.items()
    }


def serve(model: tuple, tmp_path: Path, **settings) -> subprocess.CompletedProcess:
    """Run the engine on a model's folder and requests."""
    folder, requests = model[:2]
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    words = [str(folder), str(tmp_path / "requests.json"), str(tmp_path / "settings.json")]
    return subprocess.run(
        [PYTHON, ROOT / "tests/serving/engine.py", *words], capture_output=True, text=True, timeout=600, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def result(done: subprocess.CompletedProcess, name: str) -> list[list]:
    lines = [line for line in done.stdout.splitlines() if line.startswith(f"{name} ")]
    assert lines, done.stderr[-3000:] + done.stdout[-3000:]
    return json.loads(lines[-1].removeprefix(f"{name} "))


def tokens(done: subprocess.CompletedProcess) -> list[list[int]]:
    return result(done, "TOKENS")


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_the_exported_model(name, models, tmp_path):
    """Ten requests over three slots, prompts in parts of whole chunks; prefix caching is off by itself."""
    assert tokens(serve(models[name], tmp_path, max_num_batched_tokens=128)) == models[name][2]


def test_parts_of_any_size(models, tmp_path):
    assert tokens(serve(models["qwen3"], tmp_path, max_num_batched_tokens=101, max_num_seqs=4)) == models["qwen3"][2]


def test_preempted_requests_are_read_again(models, tmp_path):
    """With keys and values for fewer tokens than the requests have, vLLM takes requests out and starts them again."""
    few = dict(num_gpu_blocks_override=5, block_size=128, max_num_seqs=4)
    done = serve(models["qwen3"], tmp_path, max_num_batched_tokens=128, **few)
    assert tokens(done) == models["qwen3"][2]
    assert "PREEMPTED 0" not in done.stdout


def test_nothing_is_left_of_a_thousand_requests(models, tmp_path):
    """Their memory is free again, also of those that were aborted, and no later request sees their fast weights."""
    settings = dict(max_num_batched_tokens=128, max_num_seqs=16, enforce_eager=not HAS_GPU, churn=1000)
    done = serve(models["input_embed, clipped"], tmp_path, **settings)
    found = result(done, "BYTES")
    assert found[-1] <= found[1] + 2**16, found  # a state takes 90 KB
    assert tokens(done) == models["input_embed, clipped"][2]


@on_gpu
@pytest.mark.parametrize("name", ["qwen3", "input_embed, clipped"])
@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"])
def test_cuda_graphs(mode, name, models, tmp_path):
    graphs = dict(cudagraph_mode=mode, cudagraph_capture_sizes=[1, 2, 4, 8])
    done = serve(models[name], tmp_path, max_num_batched_tokens=101, enforce_eager=False, compilation_config=graphs)
    assert tokens(done) == models[name][2]


@on_gpu  # vLLM's kernel for sampling does not run in Triton's interpreter
def test_several_samples(models, tmp_path):
    folder, requests, expected = models["qwen3"]
    found = tokens(serve((folder, [one | dict(samples=3) for one in requests]), tmp_path, max_num_batched_tokens=101))
    assert found == [answer for answer in expected for _ in range(3)]


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", MODELS)
def test_tensor_parallel(name, models, tmp_path):
    done = serve(models[name], tmp_path, max_num_batched_tokens=101, enforce_eager=False, tensor_parallel_size=2)
    assert tokens(done) == models[name][2]


@torch.no_grad()
def logprobs_of(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probabilities that the exported model gives to an answer (t,)."""
    ids = torch.tensor([prompt + answer], device=model.device)
    logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()


@pytest.mark.parametrize("name", ["qwen3", "input_embed, clipped"])
def test_bf16_by_log_probabilities(name, models, tmp_path):
    """In bf16, tokens may differ; the log-probabilities differ from the exact ones as the exported model's do."""
    folder, requests, _ = models[name]
    settings = dict(max_num_batched_tokens=101, dtype="bfloat16", enforce_eager=not HAS_GPU)
    kind = MODELS[name][0]
    device = "cuda" if HAS_GPU else "cpu"
    exact, rounded = (kind.from_pretrained(folder, dtype=dtype).to(device) for dtype in (torch.float32, torch.bfloat16))

    def errors(**more) -> tuple[float, float]:
        done = serve(models[name], tmp_path, **settings, **more)
        found, other = [], []
        pairs = zip(requests, result(done, "TOKENS"), result(done, "LOGPROBS"), strict=True)
        for asked, answer, logprobs in pairs:
            right = logprobs_of(exact, asked["prompt"], answer)
            found.append((torch.tensor(logprobs) - right).square())
            other.append((logprobs_of(rounded, asked["prompt"], answer) - right).square())
        return torch.cat(found).mean().sqrt().item(), torch.cat(other).mean().sqrt().item()

    found, other = errors()
    assert found < 1.5 * other
    found, other = errors(broken="decoded chunks are forgotten")
    assert found > 3 * other


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3", "input_embed, clipped"])
def test_books(name, models, tmp_path):
    """A book of the exported model is loaded, and a saved one is the exported model's."""
    folder, kind = models[name][0], MODELS[name][0]
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    books = tmp_path / "books"
    books.mkdir()
    texts = [torch.randint(1, 198, (1, length)) for length in (3 * CHUNK + 7, 2 * CHUNK, 9)]
    question = torch.randint(1, 198, (1, 2 * CHUNK - 3))
    requests, answers = [], []
    for number, text in enumerate(texts):
        book = model.read(text)
        book.save(str(books / f"read{number}"))
        answers.append(model.generate(question, fast_weights=book, max_new_tokens=45, do_sample=False)[0, -45:])
        asked = dict(prompt=question[0].tolist(), tokens=45)
        requests.append(asked | dict(extra=dict(ttt_load=f"read{number}", ttt_save=f"more{number}")))
        requests.append(dict(prompt=text[0].tolist(), tokens=1 if number else 40, extra=dict(ttt_save=f"own{number}")))
    requests.append(asked)
    answers.append(model.generate(question, max_new_tokens=45, do_sample=False)[0, -45:])
    settings = dict(max_num_batched_tokens=101, additional_config=dict(ttt_books=str(books)))
    found = tokens(serve((folder, requests), tmp_path, **settings))
    assert found[::2] == [one.tolist() for one in answers]
    assert len(set(map(tuple, found[::2]))) == 4
    for number, text in enumerate(texts):
        before = model.read(text)
        pairs = {f"own{number}": before, f"more{number}": model.read(question, fast_weights=before)}
        for file, right in pairs.items():
            saved = model.load_fast_weights(str(books / file))
            assert saved.counts == right.counts and saved.chunks == right.chunks and saved.texts == right.texts
            for layer, state in right.layers.items():
                own = saved.layers[layer]
                for one, other in ((own.sums[0], state.sums[0]), (own.tails[0], state.tails[0])):
                    assert (one is None) == (other is None)
                    if one is not None:
                        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_books_that_cannot_be_used(models, tmp_path):
    folder, kind = models["qwen3"][0], QWEN3
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    books = tmp_path / "books"
    books.mkdir()
    text = torch.randint(1, 198, (2, 40))
    model.read(text[:1]).save(str(books / "good"))
    model.read(text).save(str(books / "two"))
    model.read(text[:1]).save(str(tmp_path / "outside"))
    (books / "link").symlink_to(tmp_path / "outside")
    (books / "damaged").write_bytes((books / "good").read_bytes()[:200])
    model.lm_head.weight.data += 1
    model.read(text[:1]).save(str(books / "other"))
    wide = kind(kind.config_class(**SHAPES | dict(intermediate_size=64)))
    wide.read(text[:1]).save(str(books / "narrow"))
    infinite = model.read(text[:1])
    infinite.layers[0].sums[0][0, 0] = float("inf")
    infinite.model = None
    infinite.save(str(books / "infinite"))
    expected = {
        "missing": "ttt_load=missing: there is no such file in the server's folder of books",
        "link": "ttt_load=link: there is no such file",
        "../outside": "ttt_load='../outside' is not a file name",
        str(tmp_path / "outside"): "is not a file name",
        "": "is not a file name",
        "two": "'two' holds 2 texts: a request takes a file with one",
        "damaged": "'damaged' is not a valid file of fast weights",
        "other": "'other' was made with another model",
        "narrow": "their shapes differ",
        "infinite": "'infinite' holds fast weights that are not finite",
    }
    cases = [(dict(ttt_load=name), message) for name, message in expected.items()] + [
        (dict(ttt_load=3), "ttt_load=3 is not a file name"),
        (dict(ttt_save="good"), "ttt_save=good: a file of this name exists; choose another name"),
        (dict(ttt_sav="new"), "ttt_sav is not an argument of fast weights: use ttt_load or ttt_save"),
    ]
    requests = [dict(prompt=[1, 2, 3], tokens=2, extra=extra, refused=True) for extra, _ in cases]
    requests.append(dict(prompt=[1, 2, 3], tokens=2, extra=dict(ttt_load="good", other=1)))
    done = serve((folder, requests), tmp_path, additional_config=dict(ttt_books=str(books)))
    for (extra, message), found in zip(cases, result(done, "REFUSED"), strict=True):
        assert message in found and str(books) not in found, (extra, found)
    assert len(tokens(done)) == 1
    requests[-1]["extra"] = None
    done = serve((folder, requests[-2:] + requests[:1]), tmp_path)
    assert all("this server has no folder of books" in one for one in result(done, "REFUSED")[1:])


def test_a_book_that_disappears_and_a_full_disk(models, tmp_path):
    """The request gets an empty answer, or its answer without a file; the others are as ever."""
    folder, requests, expected = models["qwen3"]
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | dict(eos_token_id=7)))
    (tmp_path / "books").mkdir()
    model = QWEN3.from_pretrained(folder, dtype=torch.float32).eval()
    model.read(torch.randint(1, 198, (1, 70))).save(str(tmp_path / "books/good"))
    settings = dict(additional_config=dict(ttt_books=str(tmp_path / "books")), max_num_seqs=2)
    for fault, key, answer in (
        ("books are gone", dict(ttt_load="good"), [7] * requests[2]["tokens"]),
        ("the disk is full", dict(ttt_save="new"), expected[2]),
    ):
        asked = [*requests[:2], requests[2] | dict(extra=key), *requests[3:6]]
        found = tokens(serve((tmp_path / "model", asked), tmp_path, broken=fault, **settings))
        assert found == [*expected[:2], answer, *expected[3:6]]
    assert [path.name for path in (tmp_path / "books").iterdir()] == ["good"]


@pytest.mark.parametrize("broken", ["slots are not cleared", "slots are exchanged", "decoded chunks are forgotten"])
def test_faults_are_seen(broken, models, tmp_path):
    found = tokens(serve(models["qwen3"], tmp_path, max_num_batched_tokens=128, broken=broken))
    assert found != models["qwen3"][2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(enable_prefix_caching=True), "prefix caching is not supported with fast weights"),
        (
            dict(compilation_config=dict(cudagraph_mode="FULL"), enforce_eager=False),
            "cudagraph_mode=FULL is not supported",
        ),
        (dict(additional_config=dict(ttt_books="missing/folder")), "ttt_books='missing/folder', which is not a folder"),
        (dict(max_num_seqs=10**8, max_num_batched_tokens=10**8), "max_num_seqs=100000000 needs"),
        (dict(runner="pooling"), "runner=pooling is not supported with fast weights"),
        (dict(kv_offloading_size=1.0), "offloading of keys and values: not supported with fast weights"),
        (dict(additional_config=dict(ttt_book="x")), "additional_config has ttt_book, which is not known"),
        (dict(enable_lora=True), "LoRA adapters: not supported with fast weights; leave enable_lora out"),
        (
            dict(speculative_config=dict(method="ngram", num_speculative_tokens=2, prompt_lookup_max=2)),
            "speculative decoding: not supported with fast weights",
        ),
    ],
)
def test_refused_in_a_sentence(settings, message, models, tmp_path):
    done = serve(models["qwen3"], tmp_path, **settings)
    assert done.returncode and message in done.stderr + done.stdout
