"""Conversations whose last message the model continues."""

from __future__ import annotations

from typing import Any

from keras_kvcache.errors import quoted

# The names that a message's reasoning goes by.
REASONING = ("reasoning_content", "thinking", "reasoning")
# Its space tells whether the template strips messages.
_MARK = "CONTINUE_THE_FINAL_MESSAGE_HERE "


def mark_ending(template: str, messages: list[dict[str, Any]], key: str) -> str:
    """Puts a mark after the text to be continued, in the last of `messages`.

    Args:
        template: The chat template, which must read the key.
        messages: The turns; the last one is changed.
        key: Which of its entries is continued, a text or a list of parts.

    Returns:
        The text that was marked.

    Raises:
        ValueError: There is no such text.
    """
    final = messages[-1].get(key) if messages else None
    keys = [key]
    if key in REASONING and final is not None:
        # It's there by several names, of which a template reads one.
        keys = [name for name in REASONING if messages[-1].get(name) == final]
    if final is None or not any(name in template for name in keys):
        raise ValueError(
            "`continue_final_message` needs a last message with a text that the chat "
            f"template reads, in {quoted(key)}. Received: "
            f"{'a message without it' if final is None else 'a template without it'}"
        )
    if isinstance(final, str):
        for name in keys:
            messages[-1][name] = final + _MARK
        return final
    parts = final if isinstance(final, (list, tuple)) else ()
    for part in reversed(parts):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            text = part["text"]
            part["text"] = text + _MARK
            return text
    raise ValueError(
        f"`continue_final_message` needs a text in {quoted(key)} of the last message, "
        "or a part with a 'text'. Received: neither"
    )


def cut_after_ending(text: str, ending: str) -> str:
    """The text of a conversation up to the mark.

    Args:
        text: The text that the template wrote.
        ending: The text that `mark_ending` returned.

    Raises:
        ValueError: The template left out what was marked.
    """
    mark = _MARK.strip()
    if mark not in text or ending.strip() not in text:
        raise ValueError(
            "`continue_final_message` needs a chat template that writes the last "
            "message as it is; this one leaves out part of it."
        )
    place = text.rindex(mark)
    if text[place:].startswith(_MARK):
        return text[:place]
    # The template strips messages: where ours ended in a space, it left none.
    return text[:place].rstrip()
