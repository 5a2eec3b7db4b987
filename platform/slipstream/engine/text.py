"""From token ids to text as it grows: incremental decoding, stop strings, and the pieces of logprobs people read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from transformers import PreTrainedTokenizerBase

from slipstream.protocol import SamplingParams

MAX_HELD_TOKENS = 8
CONTEXT_TOKENS = 6  # prompt tokens decoded along, so that word-start markers of the first answer token come out right
_BYTE_TOKEN = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")


class IncrementalText:
    """Decodes one answer token by token. Text that may still change (half a character) is held back."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-CONTEXT_TOKENS:])
        self._prefix = 0  # decoding starts here …
        self._read = len(self._ids)  # … and what lies before this has been given out
        self._special = frozenset(tokenizer.all_special_ids)

    def push(self, token: int) -> str:
        """The text this token completes (often some, sometimes none)."""
        if token in self._special:
            return ""
        self._ids.append(token)
        return self._advance(final=False)

    def flush(self) -> str:
        """What was held back; call once, at the end."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before = self._decode(self._ids[self._prefix : self._read])
        now = self._decode(self._ids[self._prefix :])
        # No character is longer than a few tokens: what is still incomplete after so many never will be complete.
        if len(self._ids) - self._read <= MAX_HELD_TOKENS and (
            len(now) <= len(before) or (now.endswith("\ufffd") and not final)
        ):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class ChoiceText:
    """The text of one choice: cut before the first stop string, held back while it might become one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], params: SamplingParams) -> None:
        self._text = IncrementalText(tokenizer, prompt)
        self._params = params
        self._pending = ""  # decoded, not given out
        self._count = 0
        self._stopped = False

    def push(self, token: int) -> bool:
        """Take in one answer token; True when a stop string is complete."""
        self._count += 1
        if token in self._params.stop_token_ids and self._count >= self._params.min_tokens:
            return False  # it ends the answer and is not part of the text
        piece = self._text.push(token)
        old = len(self._pending)
        self._pending += piece
        if piece and self._count >= self._params.min_tokens:
            # Only what this piece completes: a match from before min_tokens may or may not have been given out already.
            starts = (self._pending.find(s, max(0, old - len(s) + 1)) for s in self._params.stop)
            found = [at for at in starts if at >= 0]
            if found:
                self._pending = self._pending[: min(found)]
                self._stopped = True
        return self._stopped

    def take(self, finished: bool) -> str:
        """Text that is certain now."""
        if finished and not self._stopped:
            self._pending += self._text.flush()
        hold = 0 if finished else self._held_back()
        cut = len(self._pending) - hold
        out, self._pending = self._pending[:cut], self._pending[cut:]
        return out

    def _held_back(self) -> int:
        """Length of the longest tail that a stop string may begin with."""
        best = 0
        for stop in self._params.stop:
            for size in range(min(len(stop) - 1, len(self._pending)), best, -1):
                if self._pending.endswith(stop[:size]):
                    best = size
                    break
        return best


@cache
def _byte_of_char() -> dict[str, int]:
    """The printable stand-ins byte-level BPE uses for bytes (GPT-2), inverted."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in plain}
    rest = [b for b in range(256) if b not in plain]
    table.update({chr(256 + i): b for i, b in enumerate(rest)})
    return table


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """The bytes a token stands for; half a character stays half a character."""
    piece = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(piece, str):
        return b""
    match = _BYTE_TOKEN.match(piece)
    if match:
        return bytes([int(match.group(1), 16)])
    table = _byte_of_char()
    if token not in tokenizer.all_special_ids and all(c in table for c in piece):
        return bytes(table[c] for c in piece)
    return piece.replace("\u2581", " ").encode()
