"""Multiruns: their jobs, where they run, how far they are, and the search over them. Imports no torch and no Hydra."""
