"""rlhfkit: the code of the book "RLHF, checked". Pure maths below, exact oracles beside it, short loops above.

Import from the modules (``from rlhfkit.advantages import gae``): the package itself imports nothing, so that it
costs no more than torch.
"""

__version__ = "0.1.0"
