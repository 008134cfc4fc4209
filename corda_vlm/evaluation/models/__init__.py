"""What the tasks ask models for: encodings of pictures and texts, generated text, likelihoods."""
