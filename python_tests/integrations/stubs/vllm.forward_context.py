"""What all layers of a step read."""

from types import SimpleNamespace

context = SimpleNamespace(attn_metadata=None)


def get_forward_context():
    return context
