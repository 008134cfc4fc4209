"""The layers of a model that carry an adapter, and how PEFT is told to wrap them."""
