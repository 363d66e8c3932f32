"""Why ours is not ahead of a peer in a column, where somebody has found out."""

REASONS: dict[tuple[str, str], str] = {
    # (peer, column): a sentence
}
