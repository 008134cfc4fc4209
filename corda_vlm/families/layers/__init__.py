"""Layers that are no `nn.Linear`, presented as such while they are worked on."""
