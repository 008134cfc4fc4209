"""Several processes of one run: what they agree on, how work is dealt out to them, and how what they made comes together.

The processes are those of torch.distributed, started by torchrun, `accelerate launch` or a tool of their own.
"""
