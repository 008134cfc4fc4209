"""What a model gained and what it kept, from the results of any tool before and after training."""
