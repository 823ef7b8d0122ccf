"""Turn conversations into tokens: the chat template makes the text, and only the assistant's turns count in the loss.

A turn of the assistant begins after the generation prompt, as in inference, and ends with the token that ends the turn.
Templates do not say where a turn ends. Its end is found from the text that the template puts between two messages,
which is known from renderings in which the content of a message is replaced by a marker.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from inplace_ttt.config import UserError, one_line
from inplace_ttt.data.conversations import ASSISTANT, Conversation

MARKER = "7461930258"  # digits, which templates neither trim nor change
QUESTION, ANSWER = "1593572684", "8642097531"  # contents of a conversation that shows the template's separators
CHANGED = "is changed by the chat template"


@dataclass(frozen=True)
class Encoded:
    """Hold the tokens of a conversation."""

    tokens: np.ndarray  # (n,)
    counts: np.ndarray  # (n,) uint8: 1 if the token counts in the loss


class Encoder:
    """Encode conversations with the chat template of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, begin: bool, end: bool, control: bool):
        """Raise UserError if the tokenizer has no chat template, or does not give the offsets of its tokens.

        Args:
            begin: put the begin-of-text token first, unless the template does.
            end: append the end-of-text token to the last answer if the template does not end it; the token counts.
            control: read names of special tokens in messages as these tokens; otherwise such conversations are refused.
        """
        if not tokenizer.chat_template:
            raise UserError(
                "--supervised: the tokenizer has no chat template, which renders conversations: use the tokenizer of a "
                "chat model"
            )
        if not tokenizer.is_fast:
            raise UserError("--supervised: the tokenizer does not give the offsets of its tokens: use a fast tokenizer")
        self.tokenizer, self.begin, self.end, self.control = tokenizer, begin, end, control
        self.headers: dict[str, str] = {}
        self.turn_end: str | None = None
        self.forbidden: list[str] | None = None

    def encode(self, conversation: Conversation) -> Encoded:
        """Return the tokens of a conversation. Raises ValueError if the template or a message does not allow it."""
        if not self.control:
            self._refuse_control_tokens(conversation)
        text = self._render(conversation)
        self._check_contents(conversation, text)
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens, offsets = list(found["input_ids"]), np.asarray(found["offset_mapping"]).reshape(-1, 2)
        counts = np.zeros(len(tokens), dtype=np.uint8)
        for start, stop in self._spans(conversation, text):
            counts[(offsets[:, 0] < stop) & (offsets[:, 1] > start)] = 1  # the first token may begin before the span
        counted = counts.tolist()
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if self.begin and tokens[:1] != [first]:
            tokens, counted = [first, *tokens], [0, *counted]
        if self.end and len(conversation.messages) - 1 in conversation.answers() and not self._turn_end().strip():
            tokens, counted = [*tokens, last], [*counted, 1]
        return Encoded(np.asarray(tokens), np.asarray(counted, dtype=np.uint8))

    def _spans(self, conversation: Conversation, text: str) -> Iterator[tuple[int, int]]:
        """Yield the start and the end of each turn of the assistant in the text. Raises ValueError."""
        for number in conversation.answers():
            message, start = conversation.messages[number], self._start(conversation, number, text)
            stop = self._stop(conversation, number, text)
            parts = [message["content"].strip(), *_names(message.get("tool_calls"))]
            if any(part not in text[start:stop] for part in parts):
                raise ValueError(f"{CHANGED}: message {number} ({ASSISTANT}) is changed in the rendered text")
            yield start, stop

    def _start(self, conversation: Conversation, number: int, text: str) -> int:
        """Return where a turn begins: after the generation prompt, or else after the header of the turn."""
        if number:
            earlier = conversation.messages[:number]
            before = self._render(conversation, earlier)
            prompt = self._render(conversation, earlier, add_generation_prompt=True)
            if prompt != before and text.startswith(prompt):
                return len(prompt)
        plain = dict(role=ASSISTANT)  # without reasoning and tool calls, which templates put before the content
        return self._content(conversation, number, text, plain)

    def _stop(self, conversation: Conversation, number: int, text: str) -> int:
        """Return where a turn ends: after the token that ends it, without white space behind it."""
        if number + 1 == len(conversation.messages):
            return len(text.rstrip()) if self._turn_end().strip() else len(text)
        following = conversation.messages[number + 1]
        stop, header = self._content(conversation, number + 1, text, following), self._header(following["role"])
        if not text[:stop].endswith(header):
            raise ValueError(f"{CHANGED}: the end of message {number} ({ASSISTANT}) cannot be found")
        return len(text[: stop - len(header)].rstrip())

    def _content(self, conversation: Conversation, number: int, text: str, message: dict) -> int:
        """Return where the content of a message begins in the text. Raises ValueError if the template moves it."""
        before = self._before_content(conversation, number, text, message)
        if before is None or not text.startswith(before):
            raise ValueError(f"{CHANGED}: message {number} ({message['role']}) is not where it should be")
        return len(before)

    def _before_content(self, conversation: Conversation, number: int, text: str, message: dict) -> str | None:
        """Return the text before the content of a message; None if the template leaves the content out."""
        messages, marker = list(conversation.messages), MARKER
        while marker in text:
            marker += marker
        messages[number] = message | dict(content=marker)
        before, found, _ = self._render(conversation, messages).partition(marker)
        return before if found else None

    def _check_contents(self, conversation: Conversation, text: str) -> None:
        """Raise ValueError if the template drops or changes a message, for example one with an unknown role."""
        roles = {ASSISTANT}  # its turns are checked one by one; templates may shorten those that do not count
        for number, message in enumerate(conversation.messages):
            dropped = message["role"] != ASSISTANT and message["content"].strip() not in text
            if message["role"] not in roles and not dropped:
                roles.add(message["role"])
                dropped = self._before_content(conversation, number, text, message) is None
            if dropped:
                raise ValueError(f"{CHANGED}: message {number} ({message['role']}) is changed in the rendered text")

    def _turn_end(self) -> str:
        """Return what the template puts after the content of an answer, before the header of the next message."""
        if self.turn_end is None:
            self.turn_end = self._common(self._after_answer(), self._after_answer("user"))
        return self.turn_end

    def _common(self, first: str, second: str) -> str:
        """Return the common beginning of two texts, in whole tokens: names of control tokens begin alike."""
        found = [self.tokenizer(one, add_special_tokens=False, return_offsets_mapping=True) for one in (first, second)]
        tokens, others = (one["input_ids"] for one in found)
        count = next((n for n, pair in enumerate(zip(tokens, others, strict=False)) if pair[0] != pair[1]), None)
        count = min(len(tokens), len(others)) if count is None else count
        return first[: found[0]["offset_mapping"][count - 1][1]] if count else ""

    def _header(self, role: str) -> str:
        """Return what the template puts between the end of an answer and the content of a message of a role."""
        if role not in self.headers:
            self.headers[role] = self._after_answer(role).removeprefix(self._turn_end())
        return self.headers[role]

    def _after_answer(self, role: str | None = None) -> str:
        """Return the text from an answer to the content of a following message of a role, or to the end."""
        talk = [dict(role="user", content=QUESTION), dict(role=ASSISTANT, content=ANSWER)]
        following = [] if role is None else [dict(role=role, content=MARKER)]
        return self._render(Conversation([*talk, *following])).rpartition(ANSWER)[2].partition(MARKER)[0]

    def _render(self, conversation: Conversation, messages: list[dict] | None = None, **options) -> str:
        """Return the text of all messages, or of some. Raises ValueError if the template refuses them."""
        messages = conversation.messages if messages is None else messages
        try:
            options = dict(tools=conversation.tools, tokenize=False) | options
            return str(self.tokenizer.apply_chat_template(messages, **options))
        except Exception as error:  # a template raises anything
            raise ValueError(f"is not accepted by the chat template ({one_line(error)})") from error

    def _refuse_control_tokens(self, conversation: Conversation) -> None:
        """Raise ValueError if a message has, in any field, the name of a token that controls the conversation."""
        if self.forbidden is None:
            self.forbidden = sorted(_control_tokens(self.tokenizer, self._turn_end() + self._header("user")))
        for number, message in enumerate(conversation.messages):
            parts = list(_texts(message))
            named = next((token for token in self.forbidden if any(token in part for part in parts)), None)
            if named is not None:
                raise ValueError(f"has {named} in message {number}: --special-tokens control reads it as that token")


def _control_tokens(tokenizer: PreTrainedTokenizerBase, separators: str) -> set[str]:
    """Return the special tokens, and the other added tokens that the template puts between messages."""
    added = tokenizer.added_tokens_decoder.values()
    return {*tokenizer.all_special_tokens, *(str(one) for one in added if one.special or str(one) in separators)}


def _names(calls) -> list[str]:
    """Return the names of the functions that a message calls."""
    found = [call.get("function", call) for call in calls or [] if isinstance(call, dict)]
    return [str(one["name"]) for one in found if isinstance(one, dict) and "name" in one]


def _texts(value) -> Iterator[str]:
    """Yield all texts in a message, keys included."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield str(key)
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, str):
        yield value
