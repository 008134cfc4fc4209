"""The pictures of a report, one file each, in one style."""
