"""What the families of models that generate text have in common."""
