"""Preference pairs as text, in JSON lines; and, from one place, what else the package knows of collecting them."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhfkit.atomic import write_atomically
from rlhfkit.label_store import Comparison, Label, LabelStore, left_side
from rlhfkit.label_studio import LABEL_STUDIO_CONFIG, LabelStudioExport, read_label_studio, to_label_studio
from rlhfkit.tasks import Pair

__all__ = [
    "LABEL_STUDIO_CONFIG",
    "Agreement",
    "Comparison",
    "Label",
    "LabelStore",
    "LabelStudioExport",
    "judge_agreement",
    "left_side",
    "read_label_studio",
    "read_pairs",
    "to_label_studio",
    "write_pairs",
]


def read_pairs(path: str | os.PathLike[str], skip_bad: bool = False) -> list[Pair]:
    """Read preference pairs from a file of JSON lines, in any of the three forms that TRL's datasets have.

    Explicit: ``{"prompt": text, "chosen": text, "rejected": text}``, optionally ``"margin": number``; texts are kept
    as they are. Implicit: without ``prompt``, which is then the longest common beginning of both texts that ends with
    a word in both and leaves something of both: the first white space after it begins the responses.
    Conversational: lists of ``{"role": ..., "content": text}`` in place of texts, with the prompt explicit or the
    longest list of messages that both begin with. One message becomes its content; several become one line
    ``role: content`` each. Other fields are ignored, and so are blank lines and a byte order mark.

    Args:
        path: of the file, UTF-8.
        skip_bad: whether to return the good lines and warn of the bad, in place of an error at the first bad one.

    Returns:
        One pair for each line that is not blank, in the order of the file.

    Raises:
        ValueError: if a line is no pair; names file, line and field.

    Source: the form of the files is that of TRL's documentation, "Dataset formats and types". Its own rule for an
        implicit prompt may cut a word in two ("bl|ue", "bl|ack"); ours does not.
    """
    pairs, bad = [], []
    data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(data.split(b"\n"), 1):  # not splitlines: JSON text may hold other line ends
        if not line.strip():
            continue
        try:
            pairs.append(_pair(_object(line)))
        except ValueError as error:
            if not skip_bad:
                raise ValueError(f"{path}, line {number}: {error}") from error
            bad.append((number, error))
    if bad:
        lines = ", ".join(str(number) for number, _ in bad)
        text = f"{path}: left out {len(bad)} of {len(bad) + len(pairs)} lines: {lines}; the first: {bad[0][1]}"
        warnings.warn(text, stacklevel=2)
    return pairs


def write_pairs(path: str | os.PathLike[str], pairs: Iterable[Pair]) -> None:
    """Write pairs as JSON lines in TRL's explicit standard form, atomically: the same pairs, the same bytes.

    Args:
        path: of the file, replaced if it exists; UTF-8, no byte order mark, lines end with a line feed.
        pairs: to write; ``margin`` is left out where it is None.

    Raises:
        ValueError: if a prompt is empty or a text is not Unicode, which :func:`read_pairs` would refuse; names the
            index of the pair. Nothing is written then.
        OSError: if the file cannot be written; then the old one stays.
    """
    lines = []
    for index, pair in enumerate(pairs):
        record = {name: value for name, value in asdict(pair).items() if value is not None}
        try:
            _pair(record)  # what reading would refuse is not written
        except ValueError as error:
            raise ValueError(f"pairs[{index}]: {error}") from error
        lines.append(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    write_atomically(path, b"".join(lines))


def _object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"got {line[:40]!r}, expected JSON in UTF-8 ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"got a JSON {type(record).__name__}, expected an object with prompt, chosen and rejected")
    return record


def _pair(record: dict[str, Any]) -> Pair:
    """The pair of a record in any of the three forms."""
    for name in ("chosen", "rejected"):
        if name not in record:
            unpaired = "; prompt, completion and label are unpaired data" if "completion" in record else ""
            raise ValueError(f"{name}: missing, expected text or messages{unpaired}")
    prompt, chosen, rejected = record.get("prompt"), record["chosen"], record["rejected"]
    if not isinstance(chosen, str | list) or type(chosen) is not type(rejected):
        got = f"{type(chosen).__name__} and {type(rejected).__name__}"
        raise ValueError(f"chosen, rejected: got {got}, expected two texts or two lists of messages")
    if "prompt" not in record:
        n = (_last_word_end if isinstance(chosen, str) else _common)(chosen, rejected)
        prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
    if type(prompt) is not type(chosen):
        raise ValueError(f"prompt: got {type(prompt).__name__}, expected {type(chosen).__name__} like chosen")
    pair = Pair(_text("prompt", prompt), _text("chosen", chosen), _text("rejected", rejected), record.get("margin"))
    if not pair.prompt:
        raise ValueError("prompt: got an empty one, expected text (or, without a field prompt, a common beginning)")
    return pair


def _common(a: Any, b: Any) -> int:
    """How many items two sequences have in common from the start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _last_word_end(a: Any, b: Any) -> int:
    """End of the last word of the common beginning after which both texts go on with white space; 0 if none."""
    n = min(_common(a, b), len(a) - 1, len(b) - 1)
    return next((i for i in range(n, 0, -1) if a[i].isspace() and b[i].isspace() and not a[i - 1].isspace()), 0)


def _text(name: str, value: Any) -> str:
    """A text as it is; of messages, the only content, or one line ``role: content`` for each."""
    if isinstance(value, list):
        if not value:
            raise ValueError(f"{name}: got no message (of its own, if all are common), expected at least one")
        for message in value:
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise ValueError(f"{name}: got the message {message!r}, expected role and content, both text")
        lines = [f"{message['role']}: {message['content']}" for message in value]
        value = value[0]["content"] if len(value) == 1 else "\n".join(lines)
    if not isinstance(value, str):
        raise ValueError(f"{name}: got {value!r}, expected text or messages")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: got half of a surrogate pair, expected Unicode text") from error
    return value


@dataclass(frozen=True)
class Agreement:
    """How often a judge prefers what was chosen.

    Attributes:
        rate: mean over the pairs of 1 where the judge prefers the chosen response, 1/2 where it scores both the same,
            0 otherwise.
        standard_error: of the rate: the standard deviation of those numbers (divisor n - 1) over the square root of n;
            NaN for one pair.
        n: number of pairs.
    """

    rate: float
    standard_error: float
    n: int

    def __str__(self) -> str:
        return f"{self.rate:.3f}, standard error {self.standard_error:.3f}, n = {self.n}"


def judge_agreement(pairs: Sequence[Pair], judge: Callable[[str, str], float]) -> Agreement:
    """How often a judge prefers the response that was chosen.

    Args:
        pairs: the choices.
        judge: scores a response: (prompt, response) -> number, more is better.

    Returns:
        Rate, its standard error over pairs that are independent, and n.

    Raises:
        ValueError: if there is no pair.
    """
    if not pairs:
        raise ValueError("pairs: got none, expected at least one")
    gaps = [judge(pair.prompt, pair.chosen) - judge(pair.prompt, pair.rejected) for pair in pairs]
    wins = [1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps]
    n, rate = len(wins), sum(wins) / len(wins)
    variance = sum((x - rate) ** 2 for x in wins) / (n - 1) if n > 1 else math.nan
    return Agreement(rate, math.sqrt(variance / n), n)
