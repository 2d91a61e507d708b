"""The public Count Sketch: a table, and the kernel that fits its device."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hvd_sketch import gpu
from hvd_sketch.native import serves
from hvd_sketch.settings import check_given
from hvd_sketch.sketch import native, reference
from hvd_sketch.sketch.geometry import Geometry
from hvd_sketch.sparse.chosen import Chosen

_INPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_ROWS_ON_GPU = 9
"""The median of more would not fit a GPU's registers; the reference takes it."""


class CountSketch:
    """A linear summary of a vector of ``dim`` coordinates in ``rows * cols`` floats.

    Coordinate i is added to one cell of each row with a random sign; its estimate is the
    median over the rows of the signed cells. A row's estimate is unbiased with variance at
    most ``||v||^2 / cols``; coordinates well above ``||v|| / sqrt(cols)`` stand out.

    Tables made with the same (dim, rows, cols, seed) may be summed cell by cell: the sketch of
    a sum is the sum of the sketches. See `hvd_sketch.sketch.geometry` for the hash functions.

    Args:
        dim: coordinates of the vector; may exceed 2^31.
        rows: independent estimates of each coordinate. Odd, or the median is biased (one warning).
        cols: cells of a row.
        seed: any integer; sketches with different seeds must not be summed.
        device: where the table lives.
        table: storage to use, float32 of shape ``(rows, cols)``; made and zeroed when not given.

    Raises:
        ValueError: for a size below 1 or a table that does not fit.
    """

    def __init__(
        self,
        dim: int,
        rows: int,
        cols: int,
        seed: int = 0,
        *,
        device: torch.device | str = "cpu",
        table: Tensor | None = None,
    ) -> None:
        check_given(CountSketch.__init__, locals())
        self.geometry = Geometry(dim, rows, cols)
        self.seed = seed
        if rows % 2 == 0:
            warnings.warn(
                f"CountSketch: rows={rows} is even; an odd number gives a sharper median for fewer bytes",
                stacklevel=2,
            )
        if table is None:
            table = torch.zeros(rows, cols, dtype=torch.float32, device=device)
        elif table.shape != (rows, cols) or table.dtype != torch.float32 or not table.is_contiguous():
            raise ValueError(
                f"CountSketch: table must be contiguous float32 of shape ({rows}, {cols}), "
                f"got {table.dtype} of shape {tuple(table.shape)}"
            )
        self.table = table
        self._choosers: dict[tuple[int, int], Any] = {}
        """On a GPU: what chooses so many of this table, by its address."""

    @property
    def _kernel(self) -> ModuleType:
        if serves(self.table):
            return native
        if self.geometry.rows <= _MOST_ROWS_ON_GPU and gpu.serves(self.table):
            return importlib.import_module("hvd_sketch.sketch.cuda")  # with Triton, which no other device needs
        return reference

    def reset(self, seed: int) -> None:
        """Empty the table and draw new cells and signs."""
        self.seed = seed
        self.table.zero_()

    def add(self, vector: Tensor, offset: int = 0, scale: float | Tensor = 1.0) -> None:
        """Add ``scale * vector`` as coordinates ``offset, offset + 1, …`` of the sketched vector.

        Args:
            vector: contiguous, float32, float16 or bfloat16, of any shape; read as flat.
            offset: coordinate of its first element.
            scale: factor, rounded to float32; or as one number of that type on the device, which need not be waited
                for where the GPU's kernel serves.

        Raises:
            ValueError: when the slice does not fit, or its dtype, device or layout is not supported.
        """
        self._check(vector, offset)
        kernel = self._kernel
        if isinstance(scale, Tensor) and kernel in (native, reference):
            scale = float(scale)
        kernel.add(self.geometry, self.seed, self.table, vector.view(-1), offset, scale)

    def add_many(self, vectors: Sequence[Tensor], offsets: Sequence[int], scale: float = 1.0) -> None:
        """`add` each vector at its offset, at the cost of a single one where they are small.

        Args:
            vectors: each as for `add`; dtypes may differ.
            offsets: coordinate of each vector's first element; ascending, without overlap.
            scale: factor of all of them, rounded to float32.

        Raises:
            ValueError: as `add`, and when the slices overlap or do not ascend.
        """
        stop = 0
        for vector, offset in zip(vectors, offsets, strict=True):
            self._check(vector, offset)
            if offset < stop:
                raise ValueError(
                    f"CountSketch.add_many: offset {offset} lies before {stop}, where the last slice ends"
                )
            stop = offset + vector.numel()
        kernel = self._kernel
        if kernel is native:
            native.add_many(self.geometry, self.seed, self.table, vectors, offsets, scale)
        else:
            for vector, offset in zip(vectors, offsets, strict=True):
                kernel.add(self.geometry, self.seed, self.table, vector.view(-1), offset, scale)

    def add_advanced(self, vector: Tensor, change: Tensor, scale: float, kept: Chosen, values: Tensor) -> None:
        """``vector += scale * change``, put the values that are kept in their places, and `add` the vector.

        In one pass over both vectors where the native kernel serves.

        Args:
            vector: all coordinates, float32, contiguous; changed in place.
            change: of the same kind and size.
            scale: factor of the change, rounded to float32; the product is not rounded before it is added.
            kept: which coordinates have other values than the sum; indices are contiguous.
            values: these values, float32.

        Raises:
            ValueError: as `add`, and when one of the vectors is not of ``dim`` float32 values.
        """
        for given in (vector, change):
            self._check(given, 0)
            if given.numel() != self.geometry.dim or given.dtype != torch.float32:
                raise ValueError(
                    f"CountSketch.add_advanced: expected {self.geometry.dim} float32 values, "
                    f"got {given.numel()} of dtype {given.dtype}"
                )
        if self._kernel is native:
            native.add_advanced(self.geometry, self.seed, self.table, vector, (change, scale), kept, values)
            return
        vector.add_(change, alpha=scale)
        kept.put(vector, values)
        self.add(vector)

    def _check(self, vector: Tensor, offset: int) -> None:
        if vector.dtype not in _INPUT_DTYPES:
            raise ValueError(f"CountSketch.add: dtype {vector.dtype} is not one of {_INPUT_DTYPES}")
        if offset < 0 or offset + vector.numel() > self.geometry.dim:
            raise ValueError(
                f"CountSketch.add: coordinates {offset} to {offset + vector.numel()} "
                f"do not fit a sketch of dim={self.geometry.dim}"
            )
        if vector.device != self.table.device:
            raise ValueError(f"CountSketch.add: vector on {vector.device}, table on {self.table.device}")
        if not vector.is_contiguous():
            raise ValueError("CountSketch.add: vector must be contiguous; call .contiguous() on it")

    def estimate(self, index: Tensor | None = None) -> Tensor:
        """Estimates (float32) of the coordinates in ``index`` (int64), or of all of them."""
        if index is None and (kernel := self._kernel) is not reference:
            estimates: Tensor = kernel.estimate_all(self.geometry, self.seed, self.table)
            return estimates
        if index is None:
            index = torch.arange(self.geometry.dim, device=self.table.device)
        return reference.estimate(self.geometry, self.seed, self.table, index)

    def top_k(self, k: int) -> tuple[Tensor, Tensor]:
        """The k coordinates of largest absolute estimate: (indices ascending, estimates).

        Ties go to the smaller index, so equal tables give equal choices on every rank.
        Indices are int64, estimates float32. Raises ValueError unless ``1 <= k <= dim``.
        """
        if not 1 <= k <= self.geometry.dim:
            raise ValueError(f"CountSketch.top_k: k must be in 1 … dim={self.geometry.dim}, got {k}")
        kernel = self._kernel
        if kernel in (native, reference):
            indices, estimates = kernel.top_k(self.geometry, self.seed, self.table, k)
        else:
            indices, estimates = self._chooser(kernel, k)(self.seed)
        return indices, estimates

    def _chooser(self, kernel: ModuleType, k: int) -> Any:
        key = k, self.table.data_ptr()
        if key not in self._choosers:
            self._choosers = {key: kernel.Chooser(self.geometry, self.table, k)}
        return self._choosers[key]

    def l2_norm(self) -> Tensor:
        """Estimate of ``||v||``, float64: the square root of the median over rows of the row's energy."""
        norms: Tensor = torch.linalg.vector_norm(self.table, dim=1, dtype=torch.float64)
        return norms.square().quantile(0.5).sqrt()
