"""Is an alignment meaningful before it is paid for?  The papers' figures for any two models."""

from .analyze import Analysis, analyze
from .recomposition import basis_moment, recomposition_cosines, round_trip
from .similarity import cka_matrix, layer_activations

__all__ = [
    "Analysis",
    "analyze",
    "basis_moment",
    "cka_matrix",
    "layer_activations",
    "recomposition_cosines",
    "round_trip",
]
