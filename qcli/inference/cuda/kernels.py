"""All kernels, by the names under which the backend launches them."""

from qcli.inference.cuda.decode import decode
from qcli.inference.cuda.gemv import gemv
from qcli.inference.cuda.matmul import arrange, collect, matmul

__all__ = ["arrange", "collect", "decode", "gemv", "matmul"]
