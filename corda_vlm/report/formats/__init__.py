"""The results of other tools, and of ours, read into one form: a reader a tool, each in a file of its own."""
