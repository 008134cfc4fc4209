"""The kinds of tasks, one file each: what is measured, and how it is scored."""
