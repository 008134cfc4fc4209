"""From rows of text to conversations, and from conversations to tokens."""
