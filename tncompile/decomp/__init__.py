"""Formats of factorized tensors: built from dense ones, exactly or to an error, a size or given ranks, and back."""

from tncompile.decomp.base import Factorized
from tncompile.decomp.block_train import BlockTrain
from tncompile.decomp.convert import convert, matrix_train
from tncompile.decomp.cp import CP
from tncompile.decomp.hierarchical import Hierarchical
from tncompile.decomp.kronecker import Kronecker
from tncompile.decomp.matrix_train import MatrixTrain
from tncompile.decomp.metric import Metric
from tncompile.decomp.modes import balanced
from tncompile.decomp.permutation import Permutation, by_correlation, reorder
from tncompile.decomp.ranks import EXACT, NoGainError, Ranks
from tncompile.decomp.resize import inflate, truncate
from tncompile.decomp.ring import Ring
from tncompile.decomp.split import Split
from tncompile.decomp.svd import SVD
from tncompile.decomp.tensor_train import TensorTrain
from tncompile.decomp.tucker import Tucker

__all__ = [
    "CP",
    "EXACT",
    "SVD",
    "BlockTrain",
    "Factorized",
    "Hierarchical",
    "Kronecker",
    "MatrixTrain",
    "Metric",
    "NoGainError",
    "Permutation",
    "Ranks",
    "Ring",
    "Split",
    "TensorTrain",
    "Tucker",
    "balanced",
    "by_correlation",
    "convert",
    "inflate",
    "matrix_train",
    "reorder",
    "truncate",
]
