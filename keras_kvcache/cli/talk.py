"""Chats cut to a model's context."""


def drop_oldest_turns(messages, count_tokens, context, room):
    """Drops the oldest turns of a chat until the rest fits into the context.

    Args:
        messages: Perhaps a system message, which is always kept, then pairs of a
            user's and an assistant's, and a user's as the last.
        count_tokens: Function of messages that gives their number of tokens.
        context: Most tokens of messages and answer together.
        room: Tokens to leave to the answer while there are turns to drop; in all
            cases one is left.

    Returns:
        A list of messages.

    Raises:
        ValueError: The last turn alone leaves no room.
    """
    first = 1 if messages[0]["role"] == "system" else 0
    kept = list(messages)
    while (length := count_tokens(kept)) + room > context and len(kept) > first + 1:
        del kept[first : first + 2]
    if length >= context:
        raise ValueError(
            f"This turn must leave room in the model's context of {context} tokens. "
            f"Received: {length} tokens; it is left out of the talk."
        )
    return kept
