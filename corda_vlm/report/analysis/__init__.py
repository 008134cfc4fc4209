"""What the scores say: curves, comparisons and findings. Numbers and sentences; nothing is drawn or written here."""
