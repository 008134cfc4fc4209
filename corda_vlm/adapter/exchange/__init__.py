"""What other tools read of an adapter, and what they give back."""
