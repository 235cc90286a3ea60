"""Export and deploy long-history recommenders (STCA): one operator, a reusable user state, parity at each step."""

__version__ = "0.1.0"
