"""Token ids as text, and where in the text each token ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

REPLACEMENT = "\ufffd"
"""What decoders put in place of bytes that are not a whole character."""
_LONGEST_WAIT = 8
"""Tokens without a whole character after which the bytes are taken as invalid; a character has at most 4 bytes."""

Decode = Callable[[tuple[int, ...]], str]


def decoder(tokenizer: Any) -> Decode:
    """Token ids to text by a transformers tokenizer, with special tokens and nothing tidied up."""
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def text_and_ends(token_ids: Sequence[int], decode: Decode) -> tuple[str, list[int]]:
    """The text of the tokens, and the number of its characters that are complete after each token.

    Byte-level tokens that split a character repeat the number; the last token's is the length of the text. Tokens are
    decoded after the one before them, since a decoder may treat the first token of a text differently.
    """
    pieces: list[str] = []
    ends: list[int] = []
    context, done, end, known = 0, 0, 0, ""
    for index in range(len(token_ids)):
        text = decode(tuple(token_ids[context : index + 1]))
        last = index + 1 == len(token_ids)
        if last or not text.endswith(REPLACEMENT) or index - done >= _LONGEST_WAIT:
            piece = text[len(known) :]
            pieces.append(piece)
            end += len(piece)
            context, done = done, index + 1
            known = decode(tuple(token_ids[context:done]))
        ends.append(end)
    return "".join(pieces), ends
