"""Conversations: rows of ``messages``, or of a prompt and its completion, as tokens of which the answers alone count.

The tokenizer's chat template makes the text. Of the text, each message of the assistant counts from behind the
beginning that the template gives to its answers up to the token that ends the turn.
"""

import json
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from inplace_ttt.config import UserError, one_line
from inplace_ttt.data.documents import SkipReport

ASSISTANT = "assistant"
NEEDED = "'messages', or 'prompt' and 'completion'"


class Conversations:
    """Take conversations out of rows of JSON or Parquet, in the place of a field of text."""

    def columns(self, names: list[str]) -> list[str] | None:
        """Return the columns of a table that hold conversations; None where there are none."""
        known = (["messages"], ["prompt", "completion"])
        return next((wanted for wanted in known if set(wanted) <= set(names)), None)

    def take(self, row, place: str, report: SkipReport) -> str | None:
        """Return the messages of a row as JSON; None where it has none that can be used, which the report counts."""
        try:
            messages = _messages(row)
        except ValueError as error:
            report.leave_out(place, str(error))
            return None
        return report.checked(json.dumps(messages, ensure_ascii=False), place)

    def __str__(self) -> str:
        return NEEDED


def _messages(row) -> list[dict]:
    """Return the messages of a row. Raises ValueError with what is wrong."""
    if not isinstance(row, dict):
        raise ValueError(f"is {type(row).__name__}, where there should be an object with {NEEDED}")
    if row.get("messages") is not None:
        messages = _listed(row["messages"], "messages", "user")
    elif row.get("prompt") is not None and row.get("completion") is not None:
        messages = _listed(row["prompt"], "prompt", "user") + _listed(row["completion"], "completion", ASSISTANT)
    else:
        raise ValueError(f"has neither {NEEDED} (there is: {', '.join(map(str, list(row)[:20]))})")
    if not any(message["role"] == ASSISTANT and message["content"].strip() for message in messages):
        raise ValueError(f"has no answer (a message whose role is {ASSISTANT})")
    return messages


def _listed(value, key: str, role: str) -> list[dict]:
    """Return messages; text alone is one of ``role``."""
    if isinstance(value, str) and key != "messages":
        return [dict(role=role, content=value)]
    if not isinstance(value, list) or not value:
        raise ValueError(f"has {type(value).__name__} under '{key}', where there should be a list of messages")
    for number, message in enumerate(value):
        fits = isinstance(message, dict) and all(isinstance(message.get(one), str) for one in ("role", "content"))
        if not fits:
            raise ValueError(f"has under '{key}' a message {number} without the texts 'role' and 'content'")
    return [{name: part for name, part in message.items() if part is not None} for message in value]


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens."""

    tokens: np.ndarray  # (n,)
    counts: np.ndarray  # (n,) uint8: 1 where the token is a part of an answer


class Encoder:
    """Turn conversations into tokens by a tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, begin: bool, end: bool, control: bool):
        """Raises UserError where the tokenizer cannot do it.

        Args:
            begin: put the begin-of-text token first, unless the template does.
            end: where the template does not end the last answer, put the end-of-text token there, which counts.
            control: take names of special tokens inside messages for these tokens.
        """
        if not tokenizer.chat_template:
            raise UserError(
                "--supervised: the tokenizer has no chat template, which makes text of conversations: use the "
                "tokenizer of a model that chats"
            )
        if not tokenizer.is_fast:
            raise UserError("--supervised: the tokenizer does not say where its tokens lie in a text: use a fast one")
        self.tokenizer, self.begin, self.end, self.control = tokenizer, begin, end, control
        self.special = _special_tokens(tokenizer)

    def encode(self, content: str) -> Encoded:
        """Return the tokens of messages, which ``Conversations`` wrote. Raises ValueError where that cannot be."""
        messages = json.loads(content)
        if not self.control:
            self._refuse_special_tokens(messages)
        text = self._render(messages)
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens, offsets = found["input_ids"], np.asarray(found["offset_mapping"]).reshape(-1, 2)
        counted, ended = np.zeros(len(tokens), dtype=np.uint8), True
        for start, stop in self._answers(messages, text):
            inside = np.flatnonzero((offsets[:, 0] < stop) & (offsets[:, 1] > start))  # the first may begin before it
            counted[inside] = 1
            behind = last = int(inside[-1]) + 1
            while last < len(tokens) and not text[slice(*offsets[last])].strip():
                last += 1  # white space before what ends the turn
            ended = last < len(tokens) and tokens[last] in self.special
            if ended or last == len(tokens):
                counted[behind : last + 1] = 1
        tokens, counts = list(tokens), counted.tolist()
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if self.begin and tokens[:1] != [first]:
            tokens, counts = [first, *tokens], [0, *counts]
        if self.end and not ended and messages[-1]["role"] == ASSISTANT:
            tokens, counts = [*tokens, last], [*counts, 1]
        return Encoded(np.asarray(tokens), np.asarray(counts, dtype=np.uint8))

    def _answers(self, messages: list[dict], text: str) -> list[tuple[int, int]]:
        """Return where each answer begins and stops in the text. Raises ValueError."""
        places = []
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before = self._render(messages[:number], add_generation_prompt=True)
            answer = message["content"].strip()
            if not text.startswith(before):
                raise ValueError("is changed by the chat template: what precedes an answer is not what it began with")
            start = text.find(answer, len(before))
            if start < 0:
                raise ValueError("is changed by the chat template: an answer is not in its text")
            places.append((len(before), start + len(answer)))
        return places

    def _render(self, messages: list[dict], **options) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options)) if messages else ""
        except Exception as error:  # a template raises anything
            raise ValueError(f"is not taken by the chat template ({one_line(error)})") from error

    def _refuse_special_tokens(self, messages: list[dict]) -> None:
        for message in messages:
            named = next((token for token in self.special.values() if token in message["content"]), None)
            if named is not None:
                raise ValueError(f"holds {named} in a message: --special-tokens control takes it for that token")


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the tokens that stand for no text, by number."""
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
