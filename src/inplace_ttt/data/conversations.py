"""Read rows of supervised data: ``messages``, or ``prompt`` and ``completion``, in JSON or Parquet."""

import json
from dataclasses import asdict, dataclass

from inplace_ttt.data.documents import SkipReport

ASSISTANT = "assistant"
NEEDED = "'messages', or 'prompt' and 'completion'"


@dataclass(frozen=True)
class Conversation:
    """Hold the messages of a row."""

    messages: list[dict]
    first: int = 0  # index of the first message whose answer counts: the messages of a prompt do not
    tools: list[dict] | None = None  # as the chat template takes them
    place: str = ""  # file and line, for reports

    @classmethod
    def from_json(cls, text: str) -> "Conversation":
        """Return the conversation that ``to_json`` has written."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """Return the conversation as JSON. Raises TypeError for values that JSON cannot express."""
        return json.dumps(asdict(self), ensure_ascii=False)

    def answers(self) -> list[int]:
        """Return the indices of the messages whose tokens count in the loss: non-empty messages of the assistant."""
        return [number for number, message in enumerate(self.messages) if number >= self.first and _answers(message)]


class Conversations:
    """Take conversations from rows of JSON or Parquet; used in place of the name of a text field."""

    def columns(self, names: list[str]) -> list[str] | None:
        """Return the columns of a table that are read, or None if the table has no conversations."""
        whole = "messages" in names or {"prompt", "completion"} <= set(names)
        return [name for name in ("messages", "prompt", "completion", "tools") if name in names] if whole else None

    def take(self, row, place: str, report: SkipReport) -> str | None:
        """Return the conversation of a row as JSON, or None if the row is unusable, which ``report`` counts."""
        try:
            return report.checked(_conversation(row, place).to_json(), place)
        except ValueError as error:
            report.leave_out(place, str(error))
        except TypeError:  # dates, bytes and decimals of Parquet
            report.leave_out(place, "has a value in its messages that JSON cannot express: use text")
        return None

    def __str__(self) -> str:
        return NEEDED


def _conversation(row, place: str) -> Conversation:
    """Return the conversation of a row. Raises ValueError with a description of the fault."""
    if not isinstance(row, dict):
        raise ValueError(f"is {type(row).__name__}, where there should be an object with {NEEDED}")
    tools = row.get("tools") or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("has 'tools' that are not a list of objects")
    if row.get("messages") is not None:
        found = Conversation(_listed(row["messages"], "messages", "user"), 0, _without_nulls(tools), place)
    elif row.get("prompt") is not None and row.get("completion") is not None:
        prompt = _listed(row["prompt"], "prompt", "user")
        messages = prompt + _listed(row["completion"], "completion", ASSISTANT)
        found = Conversation(messages, len(prompt), _without_nulls(tools), place)
    else:
        raise ValueError(f"has neither {NEEDED} (it has: {', '.join(map(str, list(row)[:20]))})")
    if not found.answers():
        if row.get("messages") is None and isinstance(row["completion"], str):
            raise ValueError("has a completion without text")
        raise ValueError(f"has no answer: no message with the role {ASSISTANT} has content")
    return found


def _listed(value, key: str, role: str) -> list[dict]:
    """Return a list of messages; text becomes one message of ``role``."""
    if isinstance(value, str) and key != "messages":
        return [dict(role=role, content=value)]
    if not isinstance(value, list):
        raise ValueError(f"has {type(value).__name__} under '{key}', where there should be a list of messages")
    if not value:
        raise ValueError(f"has an empty list under '{key}', where there should be messages")
    return [_message(message, f"a message {number} under '{key}'") for number, message in enumerate(value)]


def _message(message, place: str) -> dict:
    """Return a message with a role and a text. Raises ValueError."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"has {place} without the text 'role'")
    message = _without_nulls(message)
    content = message.get("content", "" if message.get("tool_calls") else None)
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"has {place} without the text 'content'")
    return message | dict(content=content)


def _without_nulls(value):
    """Return a value without keys that are null: Parquet adds them to every object that lacks a key of another."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _answers(message: dict) -> bool:
    return message["role"] == ASSISTANT and bool(message["content"].strip() or message.get("tool_calls"))
