"""Conversations as tokens: rows of ``messages``, or of a prompt and its completion; only answers count in the loss.

The tokenizer's chat template renders the text. Each assistant message counts, from the end of the generation prompt to
the token that ends the turn.
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
    """Extract conversations from rows of JSON or Parquet (a ``Field``, see documents.py)."""

    def columns(self, names: list[str]) -> list[str] | None:
        """Return the columns of a table that contain conversations; None if there are none."""
        known = (["messages"], ["prompt", "completion"])
        return next((wanted for wanted in known if set(wanted) <= set(names)), None)

    def take(self, row, place: str, report: SkipReport) -> str | None:
        """Return the messages of a row as JSON; None if they are unusable, which the report counts."""
        try:
            messages = _messages(row)
        except ValueError as error:
            report.leave_out(place, str(error))
            return None
        return report.checked(json.dumps(messages, ensure_ascii=False), place)

    def __str__(self) -> str:
        return NEEDED


def _messages(row) -> list[dict]:
    """Return the messages of a row. Raises ValueError if they are invalid."""
    if not isinstance(row, dict):
        raise ValueError(f"is {type(row).__name__}: it must be an object with {NEEDED}")
    if row.get("messages") is not None:
        messages = _listed(row["messages"], "messages", "user")
    elif row.get("prompt") is not None and row.get("completion") is not None:
        messages = _listed(row["prompt"], "prompt", "user") + _listed(row["completion"], "completion", ASSISTANT)
    else:
        raise ValueError(f"has neither {NEEDED} (found: {', '.join(map(str, list(row)[:20]))})")
    if not any(message["role"] == ASSISTANT and message["content"].strip() for message in messages):
        raise ValueError(f"has no answer (a message with role {ASSISTANT})")
    return messages


def _listed(value, key: str, role: str) -> list[dict]:
    """Return a list of messages; a string becomes one message of ``role``. Raises ValueError if it is invalid."""
    if isinstance(value, str) and key != "messages":
        return [dict(role=role, content=value)]
    if not isinstance(value, list) or not value:
        raise ValueError(f"has {type(value).__name__} under '{key}': it must be a list of messages")
    for number, message in enumerate(value):
        fits = isinstance(message, dict) and all(isinstance(message.get(one), str) for one in ("role", "content"))
        if not fits:
            raise ValueError(f"has a message without the strings 'role' and 'content' ('{key}', message {number})")
    return [{name: part for name, part in message.items() if part is not None} for message in value]


@dataclass(frozen=True)
class Encoded:
    """Hold the tokens of a conversation."""

    tokens: np.ndarray  # (n,) token IDs
    counts: np.ndarray  # (n,) uint8: 1 if the token is part of an answer


class Encoder:
    """Tokenize conversations with a tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, begin: bool, end: bool, control: bool):
        """Check and store the tokenizer.

        Args:
            begin: put the begin-of-text token first, unless the template does.
            end: append the end-of-text token, which counts, if the template does not end the last answer.
            control: tokenize names of special tokens inside messages as these tokens.

        Raises UserError if the tokenizer has no chat template or no offset mapping.
        """
        if not tokenizer.chat_template:
            raise UserError(
                "--supervised: the tokenizer has no chat template to render conversations: use the tokenizer of a chat "
                "model"
            )
        if not tokenizer.is_fast:
            raise UserError("--supervised: the tokenizer does not return token offsets: use a fast tokenizer")
        self.tokenizer, self.begin, self.end, self.control = tokenizer, begin, end, control
        self.special = _special_tokens(tokenizer)

    def encode(self, content: str) -> Encoded:
        """Return the tokens of messages, given as JSON from ``Conversations``.

        Raises ValueError if the chat template rejects or changes them.
        """
        messages = json.loads(content)
        if not self.control:
            self._refuse_special_tokens(messages)
        text = self._render(messages)
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens, offsets = found["input_ids"], np.asarray(found["offset_mapping"]).reshape(-1, 2)
        counted, ended = np.zeros(len(tokens), dtype=np.uint8), True
        for start, stop in self._answers(messages, text):
            inside = np.flatnonzero(
                (offsets[:, 0] < stop) & (offsets[:, 1] > start)
            )  # the first token may start before the answer
            counted[inside] = 1
            behind = last = int(inside[-1]) + 1
            while last < len(tokens) and not text[slice(*offsets[last])].strip():
                last += 1  # white space before the end of the turn
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
        """Return (start, stop) of each answer in the text. Raises ValueError if the template changes it."""
        places = []
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before = self._render(messages[:number], add_generation_prompt=True)
            answer = message["content"].strip()
            if not text.startswith(before):
                raise ValueError(
                    "is changed by the chat template: the text before an answer differs from its rendered prefix"
                )
            start = text.find(answer, len(before))
            if start < 0:
                raise ValueError("is changed by the chat template: the text does not contain an answer")
            places.append((len(before), start + len(answer)))
        return places

    def _render(self, messages: list[dict], **options) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options)) if messages else ""
        except Exception as error:  # templates may raise anything
            raise ValueError(f"is rejected by the chat template ({one_line(error)})") from error

    def _refuse_special_tokens(self, messages: list[dict]) -> None:
        for message in messages:
            named = next((token for token in self.special.values() if token in message["content"]), None)
            if named is not None:
                raise ValueError(
                    f"contains {named} in a message: use --special-tokens control to tokenize it as that token"
                )


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the special tokens by token ID."""
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
