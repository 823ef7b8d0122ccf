"""What a token may influence: nothing before it, and through the fast weights every later chunk of its document."""

import pytest
import torch
import torch.distributed as dist

from inplace_ttt.ttt.layout import SequenceLayout, in_sequence_order, take_local
from models import SEQ_LENGTH, VOCAB, Training, tiny_config
from ranks import run_ranks


def changed_places(changes: list[dict], tokens: list[int], documents) -> list[list[bool]]:
    """For each token, where in the sequence the logits change when it does."""
    training = Training(tiny_config(*changes))
    model, groups = training.model.eval(), training.groups
    cp, rank = groups.cp.size(), groups.cp.rank()

    def logits(text):
        positions = take_local(torch.arange(SEQ_LENGTH)[None], cp, rank, 1)
        with torch.no_grad():
            local = model(take_local(text, cp, rank, 1), positions, SequenceLayout(documents=documents))[0]
        parts = [torch.empty_like(local) for _ in range(cp)]
        dist.all_gather(parts, local.contiguous(), group=groups.cp)
        return in_sequence_order(torch.cat(parts), cp)

    text = torch.randint(0, VOCAB, (1, SEQ_LENGTH), generator=torch.Generator().manual_seed(0))
    before, places = logits(text), []
    for token in tokens:
        other = text.clone()
        other[0, token] = (text[0, token] + 1) % VOCAB
        places.append(((logits(other) - before).abs().amax(dim=-1) > 0).tolist())
    return places


# attention that sees itself alone: whatever crosses tokens crosses through fast weights
ALONE = {"model": {"sliding_window": 1}, "ttt": {"layers": [2]}}


@pytest.mark.parametrize(
    ("size", "layout"), [(1, {}), (2, {"context_parallel_size": 2}), (4, {"context_parallel_size": 4})]
)
@pytest.mark.parametrize("target", ["hidden_states", "input_embed"])
def test_fast_weights_reach_later_chunks_of_the_document_alone(size, layout, target):
    changes = [ALONE, {"ttt": {"target": target}}, {"parallel": layout}]
    documents = (0, 40, SEQ_LENGTH)
    tokens = [0, 13, 39]
    for token, changed in zip(tokens, run_ranks(size, changed_places, changes, tokens, documents)[0], strict=True):
        chunk_end = (token // 8 + 1) * 8
        assert not any(changed[:token]) and changed[token]
        assert not any(changed[token + 1 : chunk_end]), "a chunk saw its own update"
        assert all(changed[chunk_end:40]), "an update did not reach a later chunk"
        assert not any(changed[40:]), "an update reached another document"


def test_nothing_reaches_back():
    tokens, layout = [20, SEQ_LENGTH - 1], {"parallel": {"context_parallel_size": 4}}
    for token, changed in zip(tokens, run_ranks(4, changed_places, [layout], tokens, None)[0], strict=True):
        assert not any(changed[:token]) and all(changed[token:])
